"""The model `credence` of EleutherAI's lm-evaluation-harness: log-likelihoods and texts of the posterior predictive.

Importing this module registers the model; `credence lm-eval` does so before it starts the harness. It takes the arguments of
the harness's own `local-completions` (the same tokens go to the server) and those of `CredenceLM`.

What the harness calls the log-likelihood of a continuation y_1 ... y_n is, with `average=token`, the sum of ln mean_k p_k(y_t | y_<t):
the probability with which mode `ensemble` says it. With `average=sequence` it is ln mean_k prod_t p_k(y_t | y_<t), the Bayesian
predictive of the whole text. Of one token they are the same.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tqdm import tqdm

from credence.clients import Client, Model, Uncertainty
from credence.clients.requests import GenerationOptions

AVERAGES = ("token", "sequence")
MODES = ("score", "choices")
_COMPLETIONS = "/v1/completions"

Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would say the continuation."""
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@register_model("credence")
class CredenceLM(LocalCompletionsAPI):
    """A served adapter, asked with K posterior samples."""

    MULTIMODAL = False

    def __init__(
        self,
        *,
        base_url: str = "http://127.0.0.1:8000",
        model: str | None = None,
        pretrained: str | None = None,
        n_samples: int | None = None,
        tau: float | None = None,
        posterior_seed: int | None = None,
        mode: str = "score",
        average: str = "token",
        uncertainty_file: str | None = None,
        max_length: int | None = None,
        timeout: int = 300,
        **options: Any,
    ) -> None:
        """Connect to the server, and make sure that it can answer.

        Args:
            base_url: Address of the server, with or without `/v1/completions`. A key is taken from CREDENCE_API_KEY.
            model: Name of the adapter; `pretrained` is the harness's other word for it.
            n_samples: K; 0 is the mean adapter, None the server's default.
            tau: Posterior temperature; None is the adapter's fitted value.
            posterior_seed: Seed of the samples; None is the adapter's resident set. (`seed` is that of sampled tokens.)
            mode: `score` reads every continuation; `choices` asks for the continuations of one context together, as the labels of mode
                `choices`, whose log-likelihoods are those among each other.
            average: `token` or `sequence`, see above; for mode `score`.
            uncertainty_file: JSON Lines file for the uncertainty of every request.
            max_length: Context in tokens; None is the server's.
            timeout: Seconds to wait for one answer.
            options: Arguments of `local-completions` (`tokenizer`, `add_bos_token`, `num_concurrent`, ...).

        Raises:
            ValueError: An argument is not usable, or the server does not serve this model with so many samples.
            CredenceError: The server cannot be asked; see `credence.clients.errors`.
        """
        for name, given, allowed in (("mode", mode, MODES), ("average", average, AVERAGES)):
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; it may be {' or '.join(allowed)}")
        adapter = model or pretrained
        if adapter is None:
            raise ValueError("no model given; give the name of a served adapter, model=NAME")
        address = base_url.rstrip("/").removesuffix(_COMPLETIONS)
        connection: dict[str, Any] = {"api_key": os.environ.get("CREDENCE_API_KEY") or None, "timeout_s": timeout}
        with Client(address, **connection) as client:
            served = client.models()
        mine = _find(served, adapter, n_samples)
        lengths = [card.max_model_len for card in (mine, *served) if card.max_model_len is not None]
        super().__init__(
            base_url=address.removesuffix("/v1") + _COMPLETIONS,
            model=adapter,
            max_length=max_length or (lengths[0] if lengths else 2048),
            timeout=timeout,
            **options,
        )
        self._client = Client(address, **connection)
        # The mean adapter is the posterior at tau = 0, of which one sample is enough.
        asked = {"n_samples": n_samples, "tau": tau} if n_samples != 0 else {"n_samples": 1, "tau": 0.0}
        self._samples: dict[str, Any] = asked | {"seed": posterior_seed}
        self._mode = mode
        self._average = average
        self._instances: Iterable[Instance] = ()
        self._file = None if uncertainty_file is None else Path(uncertainty_file)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file.touch(exist_ok=False)
            except FileExistsError:
                raise ValueError(f"uncertainty_file {self._file} is there already; remove it or name another") from None

    def close(self) -> None:
        """Close the connections to the server; the harness leaves this to the end of the process."""
        self._client.close()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would say it."""
        self._instances = requests
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        sums: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm):
            self._instances = repeat(request)
            sums += super().loglikelihood_rolling([request], disable_tqdm=True)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text of each context, every token chosen from the average of the K predictive distributions."""

        def ask(request: Instance) -> tuple[Instance, str, Uncertainty]:
            context, given = request.args
            return request, *self._complete(context, given)

        texts: list[str] = []
        for request, text, uncertainty in self._each(ask, requests, disable_tqdm):
            self._write(request, "generate_until", request.args[0], text, uncertainty)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _complete(self, context: str, given: dict[str, Any]) -> tuple[str, Uncertainty]:
        body = self._create_payload(
            [], generate=True, gen_kwargs=copy.deepcopy(given), seed=self._seed, eos=self.eos_string
        )
        room = self.max_length - body["max_tokens"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {body['max_tokens']}, the model reads {self.max_length}: nothing is left for the prompt; lower it"
            )
        prompt = self.tok_encode(context, add_special_tokens=self.add_bos_token)[-room:]
        del body["prompt"], body["model"]
        body["sampling_seed"] = body.pop("seed")
        options = {name: body.pop(name) for name in list(body) if name in GenerationOptions.__optional_keys__}
        answer = self._client.complete(
            prompt,
            model=self.model,
            uncertainty=True,
            mode="ensemble",
            granularity="token",
            extra_body=body or None,
            **options,
            **self._samples,
        )
        assert answer.uncertainty is not None  # The client has checked it.
        return answer.text, answer.uncertainty

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Answer]:
        inputs, context_lengths, keys = self.batch_loglikelihood_requests([requests])
        texts = [(ids[:length], ids[length:]) for ids, length in zip(inputs, context_lengths, strict=True)]
        about = list(zip(self._instances, keys, strict=False))
        groups: list[list[int]] = [[number] for number in range(len(texts))]
        if self._mode == "choices":
            together: dict[object, list[int]] = {}
            for number, (instance, key) in enumerate(about):
                alone = number if key is None else key[0]
                together.setdefault((instance.task_name, instance.doc_id, alone), []).append(number)
            groups = list(together.values())

        def ask(group: list[int]) -> tuple[list[int], list[Answer], Uncertainty, str]:
            labels = [_label(*keys[number]) for number in group if keys[number] is not None]
            if len(set(labels)) > 1:
                prompt = min((texts[number][0] for number in group), key=len)
                return group, *self._choose(prompt, labels)
            [number] = group
            answer, uncertainty = self._score(*texts[number])
            return group, [answer], uncertainty, (keys[number] or self.decode_batch([texts[number][1]]))[-1]

        found: dict[int, Answer] = {}
        for group, answers, uncertainty, text in self._each(ask, groups, disable_tqdm):
            instance, key = about[group[0]]
            context = self.decode_batch([texts[group[0]][0]])[0] if key is None else key[0]
            self._write(instance, instance.request_type, context, text, uncertainty)
            for number, answer in zip(group, answers, strict=True):
                found[number] = answer
                if keys[number] is not None:
                    self.cache_hook.add_partial("loglikelihood", keys[number], answer)
        return [found[number] for number in range(len(texts))]

    def _score(self, prompt: list[int], text: list[int]) -> tuple[Answer, Uncertainty]:
        scored = self._client.score(
            model=self.model,
            prompt=prompt,
            completion=text,
            granularity="token",
            return_samples=self._average == "sequence" or None,
            **self._samples,
        ).uncertainty
        tokens = scored.tokens or ()
        greedy = True
        for token in tokens:
            if token.top_logprob is None:
                raise ValueError("the server does not say which token is the most likely one (top_logprob); update it")
            greedy = greedy and token.logprob >= token.top_logprob
        total = sum(token.logprob for token in tokens)
        if self._average == "sequence":
            total = _log_mean_exp(
                [
                    -math.inf if sample.mean_logprob is None else len(tokens) * sample.mean_logprob
                    for sample in scored.samples or ()
                ]
            )
        return (total, greedy), scored

    def _choose(self, prompt: list[int], labels: list[str]) -> tuple[list[Answer], Uncertainty, str]:
        """Log-probability of each label among all of them; which of them greedy decoding would say is not known."""
        answer = self._client.complete(
            prompt,
            model=self.model,
            uncertainty=True,
            mode="choices",
            choices=list(dict.fromkeys(labels)),
            calibrated=False,
            max_tokens=1,
            **self._samples,
        )
        assert answer.uncertainty is not None  # The client has checked it.
        probs = {choice.label: choice.prob for choice in answer.uncertainty.choices or ()}
        log_probs = [math.log(probs[label]) if probs[label] > 0 else -math.inf for label in labels]
        return [(value, False) for value in log_probs], answer.uncertainty, answer.text

    def _each(self, ask: Callable[[ItemT], ResultT], items: Sequence[ItemT], quiet: bool) -> Iterator[ResultT]:
        """Yields the answers in order; `num_concurrent` questions are under way at once."""
        with ThreadPoolExecutor(max(1, self._concurrent)) as pool:
            answers = [pool.submit(ask, item) for item in items]
            try:
                for answer in tqdm(answers, desc="Requesting API", disable=quiet):
                    yield answer.result()
            finally:  # One failed request fails the evaluation; the others are not asked for any more.
                pool.shutdown(cancel_futures=True)

    def _write(self, instance: Instance, request: str, prompt: str, answer: str, uncertainty: Uncertainty) -> None:
        if self._file is None:
            return
        row = {
            "task": instance.task_name,
            "doc_id": instance.doc_id,
            "index": instance.idx,
            "request": request,
            "prompt": prompt,
            "answer": answer,
            "uncertainty": uncertainty.model_dump(mode="json", exclude_none=True),
        }
        with self._file.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _find(served: Sequence[Model], name: str, n_samples: int | None) -> Model:
    found = next((card for card in served if card.id == name), None)
    if found is None or found.posterior is None:
        adapters = ", ".join(card.id for card in served if card.posterior is not None)
        why = "is not on the server" if found is None else "has no posterior; the harness's local-completions asks it"
        raise ValueError(f"model {name!r} {why}; adapters with uncertainty: {adapters or 'none'}")
    most = found.posterior.max_n_samples
    if n_samples is not None and not 0 <= n_samples <= (n_samples if most is None else most):
        raise ValueError(f"n_samples is {n_samples}; it may be 0 (the mean adapter) to {most}")
    return found


def _label(context: str, continuation: str) -> str:
    """The continuation with the context's last spaces, which the harness counts as its own."""
    return context[len(context.rstrip()) :] + continuation


def _log_mean_exp(values: Sequence[float]) -> float:
    largest = max(values)
    if largest == -math.inf:
        return largest
    return largest + math.log(sum(math.exp(value - largest) for value in values) / len(values))
