"""The four modes of an uncertainty request, each a replacement of vLLM's ``generate`` for one prompt.

ensemble
    K members in lock-step; every token is drawn from the average of their predictive distributions.
score
    vLLM's own generation with the mean adapter, untouched; then its tokens are read under K samples.
choices
    The labels are read under K samples. The prompt is read once per sample: the first gang gives the first token of every label (and so
    all there is to know about labels of one token), the others find the prompt's full blocks in the prefix cache.
generate
    One completion per sample, with the sample's own distribution; the answer most samples agree on is returned and scored under all.

What a mode yields are vLLM's ``RequestOutput``; what it found out about them waits in :attr:`Run.uncertainty` for the response.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import merge_async_iterators

from credence.adapters import (
    Agreement,
    ChoiceScores,
    agreement,
    choice_scores,
    lowest_score,
    settled_choice,
    settled_flag,
    settled_threshold,
    stages,
)
from credence.serve.ensemble import FIRST_STAGE, Ensemble, Gang, Plan
from credence.serve.errors import BadRequest
from credence.serve.report import describe, describe_agreement, describe_choices, sequence_confidence, token_details
from credence.serve.schemas import AutoSamples, TokenUncertainty, Uncertainty
from credence.serve.step_stats import StepTable
from credence.serve.vllm_plugin.engine_client import GangRunner
from credence.serve.vllm_plugin.text import continuation, texts_instead, token_texts

Outputs = AsyncGenerator[RequestOutput, None]
Options = dict[str, Any]
T = TypeVar("T")

LABELS_AT_ONCE = 4
"""Labels of several tokens that one request reads at the same time, each under all samples."""


class Run:
    """One uncertainty request on its way through vLLM's handler.

    Attributes:
        uncertainty: what is known about each finished choice, by the choice's index in the response.
        error: the first exception of a mode, which a stream's handler would turn into a text.
    """

    def __init__(self, *, ensemble: Ensemble, runner: GangRunner, tokenizer: Any, max_logprobs: int) -> None:
        self.ensemble = ensemble
        self.uncertainty: dict[int, Uncertainty] = {}
        self.error: Exception | None = None
        self._runner = runner
        self._tokenizer = tokenizer
        self._max_logprobs = max_logprobs
        self._num_prompts = 0
        self._streaming: dict[int, Gang] = {}
        self._told: dict[int, int] = {}

    @property
    def plan(self) -> Plan:
        """The request's plan."""
        return self.ensemble.plan

    @property
    def num_samples(self) -> int:
        """Samples drawn so far."""
        return len(self.ensemble.slots)

    def usage(self) -> dict[str, int]:
        """The ``uncertainty_details`` of ``usage``: work done under posterior samples, which is in no other count."""
        return {
            "n_samples": self.num_samples,
            "sample_prompt_tokens": self.ensemble.sample_prompt_tokens,
            "sample_completion_tokens": self.ensemble.sample_completion_tokens,
        }

    def generate(self, prompt: Any, params: SamplingParams, request_id: str, options: Options) -> Outputs:
        """Answers the next prompt of the request.

        Args:
            options: what vLLM's handler passes beside it (lora_request, priority, trace headers, ...).

        Raises:
            BadRequest: the request can never be run; raised before anything is yielded.
        """
        number, self._num_prompts = self._num_prompts, self._num_prompts + 1
        modes: dict[str, Callable[..., Outputs]] = {
            "ensemble": self._run_ensemble,
            "score": self._run_score,
            "choices": self._run_choices,
            "generate": self._run_generate,
        }
        return self._noting_errors(modes[self.plan.options.mode](number, prompt, params, request_id, dict(options)))

    async def score(self, prompt_ids: list[int], token_ids: list[int], request_id: str, options: Options) -> None:
        """Reads a text the caller already has; the result is choice 0."""
        self.uncertainty[0] = await self._describe_read(prompt_ids, token_ids, request_id, options)

    def new_tokens(self, index: int) -> list[TokenUncertainty]:
        """Scores of the tokens of a streaming ensemble choice that were not told before."""
        gang = self._streaming.get(index)
        start = self._told.get(index, 0)
        if gang is None or len(gang.token_ids) <= start:
            return []
        self._told[index] = len(gang.token_ids)
        before, new, table = gang.prompt_token_ids + gang.token_ids[:start], gang.token_ids[start:], gang.table(start)
        texts = token_texts(self._tokenizer, before, new)
        return token_details(table, texts, favourites=self._favourites(table, before, new))

    def _favourites(
        self, table: StepTable | None, prompt_ids: list[int], token_ids: list[int]
    ) -> list[list[str]] | None:
        """Texts of what each sample would most likely have said in place of each token, where the request wants to see it."""
        options = self.plan.options
        if table is None or not options.return_samples or options.granularity != "token":
            return None
        return texts_instead(self._tokenizer, prompt_ids, token_ids, table.member_tokens.tolist())

    async def _noting_errors(self, outputs: Outputs) -> Outputs:
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except Exception as error:
            self.error = self.error or error
            raise

    # --- ensemble ------------------------------------------------------------------------------------------------

    def _run_ensemble(
        self, number: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        del options["lora_request"]
        if params.logprobs is not None and not 0 <= params.logprobs <= self._max_logprobs:
            raise BadRequest(
                f"logprobs must be 0 to {self._max_logprobs} (--max-logprobs) with uncertainty, got {params.logprobs}",
                param="logprobs",
            )
        first = number * params.n
        gangs = [
            self.ensemble.gang(
                prompt["prompt_token_ids"],
                max_tokens=params.max_tokens or 1,
                sequence=first + index,
                num_top=params.logprobs or 0,
            )
            for index in range(params.n)
        ]
        self._streaming |= {first + index: gang for index, gang in enumerate(gangs)}
        return self._ensemble_outputs(first, gangs, prompt, params, request_id, options)

    async def _ensemble_outputs(
        self, first: int, gangs: list[Gang], prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        streams = [self._runner.stream(gang, prompt, params, request_id, options) for gang in gangs]
        done: dict[int, RequestOutput] = {}
        async with aclosing(merge_async_iterators(*streams)) as merged:
            async for index, output in merged:
                output.outputs[0].index = index
                if output.finished:
                    gang = gangs[index]
                    prompt_ids, table = gang.prompt_token_ids, gang.table()
                    texts = token_texts(self._tokenizer, prompt_ids, gang.token_ids)
                    favourites = self._favourites(table, prompt_ids, gang.token_ids)
                    self.uncertainty[first + index] = describe(
                        self.plan, gang.num_samples, table, texts, favourites=favourites
                    )
                    done[index] = output
                if params.output_kind == RequestOutputKind.DELTA:
                    yield output
        if params.output_kind != RequestOutputKind.DELTA:
            done[0].outputs = [done[index].outputs[0] for index in range(len(gangs))]
            yield done[0]

    # --- score ---------------------------------------------------------------------------------------------------

    def _run_score(
        self, number: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        self.ensemble.check_fits(len(prompt["prompt_token_ids"]) + (params.max_tokens or 1), params.max_tokens or 1)
        return self._score_outputs(number * params.n, prompt, params, request_id, options)

    async def _score_outputs(
        self, first: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        token_ids: dict[int, list[int]] = {index: [] for index in range(params.n)}
        async with aclosing(self._runner.client.generate(prompt, params, request_id, **options)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    known = token_ids[completion.index]
                    known[len(known) if params.output_kind == RequestOutputKind.DELTA else 0 :] = completion.token_ids
                yield output
        del options["lora_request"]
        prompt_ids = list(prompt["prompt_token_ids"])
        reads = (self._describe_read(prompt_ids, ids, request_id, options) for ids in token_ids.values())
        described = await _all(reads)
        self.uncertainty |= {first + index: uncertainty for index, uncertainty in enumerate(described)}

    async def _describe_read(
        self, prompt_ids: list[int], token_ids: list[int], request_id: str, options: Options
    ) -> Uncertainty:
        """Describes a text by its tokens' scores; an adaptive request reads it again under more samples until its flag is settled."""
        table: StepTable | None = None

        async def read() -> None:
            nonlocal table
            table = await self._read(prompt_ids, token_ids, request_id, options)

        auto = await self._until_settled(
            read,
            lambda: table is None or self._flag_is_settled(table),
            lambda number: table is None or self._flag_is_settled(table, number),
        )
        texts = token_texts(self._tokenizer, prompt_ids, token_ids)
        favourites = self._favourites(table, prompt_ids, token_ids)
        return describe(self.plan, len(self.ensemble.slots), table, texts, favourites=favourites, auto=auto)

    async def _read(
        self, prompt_ids: list[int], token_ids: list[int], request_id: str, options: Options
    ) -> StepTable | None:
        """Scores of a text's tokens on the full vocabulary, by teacher forcing under the samples drawn so far; None without tokens.

        If the tokens are reported, each record also has the average's most likely token.
        """
        if not token_ids:
            return None
        targets = [(len(prompt_ids) - 1 + index, token) for index, token in enumerate(token_ids)]
        num_top = 1 if self.plan.options.granularity == "token" else 0
        gang = self.ensemble.gang([*prompt_ids, *token_ids[:-1]], targets=targets, num_top=num_top)
        await self._runner.score(gang, request_id, options)
        return gang.table()

    def _flag_is_settled(self, table: StepTable, projected_n: int | None = None) -> bool:
        """Whether the confidence of all samples lies on the same side of the threshold as that of the samples drawn so far.

        A subset's confidence is that of its average at temperature 1, times the factor that the calibration makes for the samples drawn.
        A map of the confidence never falls, so there the averages are compared with the one that the map takes to the threshold.
        """
        options, support = self.plan.options, self.plan.adapter.support
        confidence, calibrated = sequence_confidence(self.plan, table)
        steps = slice(0, 1) if calibrated and support else slice(None)
        probs_TK = np.exp(table.member_log_probs[steps])

        def uncalibrated(samples: Any) -> float:
            with np.errstate(divide="ignore"):
                return float(np.exp(np.log(probs_TK[:, samples].mean(1)).mean()))

        assert options.threshold is not None
        threshold, factor = options.threshold, 1.0
        fitted = self.plan.confidence_map(probs_TK.shape[1])
        if fitted is None:
            factor = confidence / max(uncalibrated(slice(None)), float(np.finfo(np.float64).tiny))
        else:
            score = lowest_score(fitted, threshold)
            if score > 0 or score == -math.inf:
                return True  # no text reaches the threshold, or every text does
            threshold = math.exp(score)
        return settled_flag(
            lambda samples: factor * uncalibrated(samples),
            probs_TK.shape[1],
            threshold,
            projected_n=projected_n,
            **self._rule(),
        )

    # --- choices -------------------------------------------------------------------------------------------------

    def _run_choices(
        self, number: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        _refuse_several(params, "choices")
        del options["lora_request"]
        prompt_ids = list(prompt["prompt_token_ids"])
        labels = self.plan.options.choices or []
        known = self.plan.adapter.labels
        if set(labels) <= set(known):
            tokens = [[known[label]] for label in labels]
        else:
            tokens = [continuation(self._tokenizer, prompt_ids, label) for label in labels]
        if [] in tokens or len({tuple(label) for label in tokens}) < len(labels):
            raise BadRequest(
                "uncertainty.choices has labels that are the same tokens, or none, after this prompt; make them differ",
                param="uncertainty.choices",
            )
        longest = max(map(len, tokens))
        self.ensemble.check_fits(len(prompt_ids) + longest, longest)
        return self._choices_outputs(number, prompt_ids, labels, tokens, request_id, options)

    async def _choices_outputs(
        self,
        number: int,
        prompt_ids: list[int],
        labels: list[str],
        tokens: list[list[int]],
        request_id: str,
        options: Options,
    ) -> Outputs:
        plan = self.plan
        calibrated = plan.options.calibrated and plan.adapter.can_calibrate_choices(tokens)

        log_probs_KL = torch.empty(0, len(labels), dtype=torch.float64)

        def scores_of(log_probs_nL: Tensor) -> ChoiceScores:
            return choice_scores(
                log_probs_nL,
                [len(label) for label in tokens],
                length_normalized=plan.options.length_normalized,
                temperature=plan.temperature(len(log_probs_nL)) if calibrated else 1.0,
            )

        async def read() -> None:
            nonlocal log_probs_KL
            new = slice(len(log_probs_KL), len(self.ensemble.slots))
            log_probs_KL = torch.cat(
                [log_probs_KL, await self._label_log_probs(prompt_ids, tokens, new, request_id, options)]
            )

        auto = await self._until_settled(read, lambda: self._choice_is_settled(scores_of, log_probs_KL))
        scores = scores_of(log_probs_KL)
        self.uncertainty[number] = describe_choices(plan, len(log_probs_KL), scores, calibrated=calibrated, auto=auto)
        yield RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=prompt_ids,
            prompt_logprobs=None,
            outputs=[
                CompletionOutput(
                    index=0,
                    text=labels[scores.top],
                    token_ids=tokens[scores.top],
                    cumulative_logprob=None,
                    logprobs=None,
                    finish_reason="stop",
                )
            ],
            finished=True,
        )

    async def _label_log_probs(
        self, prompt_ids: list[int], tokens: list[list[int]], samples: slice, request_id: str, options: Options
    ) -> Tensor:
        """[K, L] log-probability of each label's tokens after the prompt under each sample, nats, float64."""
        end = len(prompt_ids) - 1
        first = self.ensemble.gang(prompt_ids, samples=samples, targets=[(end, label[0]) for label in tokens])
        await self._runner.score(first, request_id, options)
        log_probs_KL = torch.tensor(first.table().member_log_probs).T.contiguous()
        rest = {
            index: self.ensemble.gang(
                [*prompt_ids, *label[:-1]],
                samples=samples,
                targets=[(end + step, token) for step, token in enumerate(label) if step],
            )
            for index, label in enumerate(tokens)
            if len(label) > 1
        }
        some = asyncio.Semaphore(LABELS_AT_ONCE)

        async def read(gang: Gang) -> None:
            async with some:
                await self._runner.score(gang, request_id, options)

        await _all(map(read, rest.values()))
        for index, gang in rest.items():
            log_probs_KL[:, index] += torch.tensor(gang.table().member_log_probs).sum(0)
        return log_probs_KL

    def _choice_is_settled(self, scores_of: Callable[[Tensor], ChoiceScores], log_probs_nL: Tensor) -> bool:
        """Whether the top label, and the flag if there is a threshold, are those of all samples."""
        threshold, scores = self.plan.options.threshold, scores_of(log_probs_nL)
        rule = self._rule(decisions=1 if threshold is None else 2)
        if not settled_choice(scores.member_probs_KL, **rule):
            return False

        def confidence(samples: Any) -> float:
            return float(scores_of(log_probs_nL[torch.as_tensor(samples)]).prob_L[scores.top])

        return threshold is None or settled_flag(confidence, len(log_probs_nL), threshold, **rule)

    # --- generate ------------------------------------------------------------------------------------------------

    def _run_generate(
        self, number: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        _refuse_several(params, "generate")
        del options["lora_request"]
        self.ensemble.check_fits(len(prompt["prompt_token_ids"]) + (params.max_tokens or 1), params.max_tokens or 1)
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        return self._generate_outputs(number, prompt, params, request_id, options)

    async def _generate_outputs(
        self, number: int, prompt: Any, params: SamplingParams, request_id: str, options: Options
    ) -> Outputs:
        finished: list[tuple[Gang, RequestOutput]] = []

        async def complete(sample: int) -> tuple[Gang, RequestOutput]:
            gang = self.ensemble.gang(
                prompt["prompt_token_ids"],
                max_tokens=params.max_tokens or 1,
                samples=slice(sample, sample + 1),
                sequence=number * self.plan.num_samples + sample,
            )
            async with aclosing(self._runner.stream(gang, prompt, params, request_id, options)) as outputs:
                [output] = [output async for output in outputs]
            return gang, output

        async def ask() -> None:
            finished.extend(await _all(map(complete, range(len(finished), len(self.ensemble.slots)))))

        auto = await self._until_settled(ask, lambda: self._agreement_is_settled(agreement(*_said(finished))))
        texts, mean_log_probs = _said(finished)
        result = agreement(texts, mean_log_probs)
        gang, output = finished[result.index]
        table = await self._read(gang.prompt_token_ids, gang.token_ids, request_id, options)
        tokens = token_texts(self._tokenizer, gang.prompt_token_ids, gang.token_ids)
        self.uncertainty[number] = describe_agreement(
            self.plan,
            len(finished),
            table,
            tokens,
            result,
            texts,
            mean_log_probs,
            favourites=self._favourites(table, gang.prompt_token_ids, gang.token_ids),
            auto=auto,
        )
        yield output

    def _agreement_is_settled(self, result: Agreement) -> bool:
        """Whether the modal answer, and the flag if there is a threshold, are those of all samples.

        The votes have one column more, for an answer that nobody has given yet.
        """
        threshold, answers = self.plan.options.threshold, np.array(result.answer_K)
        rule = self._rule(decisions=1 if threshold is None else 2)
        if not settled_choice(np.eye(len(result.answers) + 1)[answers], **rule):
            return False
        votes = (answers == answers[result.index]).astype(float)
        return threshold is None or bool(settled_threshold(votes, threshold, **rule))

    # --- adaptive K ----------------------------------------------------------------------------------------------

    async def _until_settled(
        self,
        work: Callable[[], Awaitable[None]],
        settled: Callable[[], bool],
        promising: Callable[[int], bool] = lambda number: True,
    ) -> AutoSamples | None:
        """Draws samples in stages, and works with them, until the decision is settled; of a request with a given K, all at once.

        Args:
            promising: whether a stage of so many samples is likely to settle it; others are skipped, where each stage starts anew.

        Returns:
            The stages of an adaptive request, else None.
        """
        if not self.plan.adaptive:
            await work()
            return None
        tried: list[int] = []
        most = self.plan.num_samples
        for number in stages(most, FIRST_STAGE):
            if tried and number < most and not promising(number):
                continue
            await self.ensemble.draw(number)
            tried.append(number)
            await work()
            if settled():
                break
        return AutoSamples(stages=tried, settled=tried[-1] < most)

    def _rule(self, decisions: int = 1) -> dict[str, Any]:
        """Arguments of the stopping rule, for each of several decisions that are to be right together."""
        most = self.plan.num_samples
        return {
            "maximum": most,
            "confidence": 1 - (1 - self.plan.options.stop_confidence) / decisions,
            "looks": max(len(stages(most, FIRST_STAGE)) - 1, 1),
            "minimum": FIRST_STAGE,
        }


def _said(finished: Sequence[tuple[Gang, RequestOutput]]) -> tuple[list[str], list[float]]:
    """Text and mean log-probability, under its own sample, of each completion."""
    texts = [output.outputs[0].text for _, output in finished]
    return texts, [float(gang.table().log_prob.mean()) if gang.token_ids else 0.0 for gang, _ in finished]


def _refuse_several(params: SamplingParams, mode: str) -> None:
    if params.n != 1:
        raise BadRequest(f"n must be 1 with uncertainty mode {mode!r}, got {params.n}", param="n")
    if params.logprobs is not None:
        raise BadRequest(
            f"logprobs cannot be combined with uncertainty mode {mode!r}: each sample has its own; "
            "leave it out, or ask for uncertainty.return_samples",
            param="logprobs",
        )


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs coroutines at the same time; when one fails, ends the others before raising."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
