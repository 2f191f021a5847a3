"""Predictions of a running server for the evaluation of an artifact: the rows of ``credence eval --engine URL``.

A row is one request of mode ``choices`` for each K, its prompt as the token ids that the offline evaluation reads, its calibration left
out; several rows are under way at once. Temperatures and metrics are computed here, from the probabilities that come back. A row whose
answer is generated (``--generate``) is one request of mode ``ensemble``; the confidence is computed here too, from the text's scores.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from credence.adapters.artifact import Artifact
from credence.clients import Client, Completion, Model, Uncertainty
from credence.training.data import DataFormat
from credence.training.errors import MetricError
from credence.training.generation import Written
from credence.training.predict import Prediction
from credence.training.prompts import IGNORED, Encoder, Example
from credence.training.session import artifact_encoder, artifact_format

DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEngine:
    """Asks the server for the averages of K samples; see ``credence.training.evaluate.Engine``."""

    client: Client
    model: str
    seed: int
    encoder: Encoder
    concurrency: int

    def predict(self, examples: Sequence[Example], sizes: Sequence[int], tau: float) -> Iterator[Prediction]:
        """Yields the average over K samples of all the rows, for every K in ``sizes``.

        Raises:
            CredenceError: a row was not answered; see ``credence.clients.errors``.
        """
        width = max(len(example.candidates) for example in examples)
        target = torch.tensor([IGNORED if example.answer is None else example.answer for example in examples])
        rows = [{"prompt": example.prompt, "choices": self.encoder.answer_texts(example)} for example in examples]
        for k in sizes:
            answers = self.client.map(
                rows,
                concurrency=self.concurrency,
                progress=False,
                model=self.model,
                uncertainty=True,
                mode="choices",
                n_samples=k,
                tau=tau,
                seed=self.seed,
                calibrated=False,
                max_tokens=1,
            )
            # The client has checked that every answer has it.
            found = [answer.uncertainty for answer in answers if answer.uncertainty is not None]
            yield Prediction(
                k=k,
                row=torch.arange(len(examples)),
                target=target,
                log_mean_PC=torch.stack([_log_probs(answer, width) for answer in found]),
                expected_entropy=torch.tensor([answer.aleatoric for answer in found], dtype=torch.float64),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedWriter:
    """Has the server write texts; see ``credence.training.generation.Writer``."""

    client: Client
    model: str
    seed: int
    encoder: Encoder
    concurrency: int

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        k: int,
        tau: float,
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Written]:
        """One text for each prompt.

        Raises:
            MetricError: the server does not return token ids.
            CredenceError: a row was not answered; see ``credence.clients.errors``.
        """
        each = seeds if seeds is not None else [None] * len(prompts)
        rows = [
            {
                "prompt": prompt,
                "max_tokens": min(max_new_tokens, self.encoder.max_length - len(prompt)),
                "temperature": 0.0 if seed is None else 1.0,
                "sampling_seed": seed,
            }
            for prompt, seed in zip(prompts, each, strict=True)
        ]
        answers = self.client.map(
            rows,
            concurrency=self.concurrency,
            progress=False,
            model=self.model,
            uncertainty=True,
            mode="ensemble",
            n_samples=k,
            tau=tau,
            seed=self.seed,
            calibrated=False,
            # Otherwise the server takes these from the model's generation settings.
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            extra_body={"return_token_ids": True},
        )
        return [self._written(answer) for answer in answers]

    def _written(self, answer: Completion) -> Written:
        choice, uncertainty = answer.choices[0], answer.uncertainty
        assert uncertainty is not None  # The client has checked it.
        if choice.token_ids is None or uncertainty.sequence is None or uncertainty.sequence.mean_logprob is None:
            raise MetricError("the server returned no token ids or scores of its text; a newer server is needed")
        return Written(
            tokens=choice.token_ids,
            text=self.encoder.tokenizer.decode(list(choice.token_ids), skip_special_tokens=True),
            stopped=choice.finish_reason == "stop",
            score=uncertainty.sequence.mean_logprob,
            total=uncertainty.total or 0.0,
            epistemic=uncertainty.epistemic or 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running server, and the name under which it serves the artifact that is evaluated.

    Attributes:
        connect: opens a client and closes it at the end.
        model: name of the adapter.
        concurrency: rows under way at once.
    """

    connect: Callable[[], AbstractContextManager[Client]]
    model: str
    concurrency: int = DEFAULT_CONCURRENCY

    @contextmanager
    def open(self, artifact: Artifact, base: str | Path, largest_k: int) -> Iterator[ServedEngine]:
        """Connects to the server and makes sure that it serves this very artifact and takes so many samples.

        Args:
            base: the base model, for its tokenizer alone.

        Raises:
            MetricError: the server does not serve the artifact, takes fewer samples, or the rows are free text.
            ModelError: the base model's tokenizer is not usable, or the artifact does not say what data it was trained on.
            CredenceError: the server cannot be asked; see ``credence.clients.errors``.
        """
        if artifact.head:
            raise MetricError(
                f"{artifact.path} is a classifier on an encoder, which no server serves; evaluate it with --engine hf"
            )
        data_format = artifact_format(artifact)
        if not data_format.has_candidates:
            raise MetricError(
                f"the adapter was trained on {data_format} rows; a server evaluates {DataFormat.LABEL} and {DataFormat.CHOICES} rows, "
                "free text is generated with --generate, or scored with --engine hf"
            )
        with self._connected(artifact, largest_k) as (client, length):
            encoder = artifact_encoder(artifact, base, max_length=length - 1)
            yield ServedEngine(client=client, encoder=encoder, **self._settings(artifact))

    @contextmanager
    def open_writer(self, artifact: Artifact, base: str | Path, largest_k: int) -> Iterator[ServedWriter]:
        """Like :meth:`open`, for texts that the server is to write."""
        with self._connected(artifact, largest_k) as (client, length):
            encoder = artifact_encoder(artifact, base, max_length=length)
            yield ServedWriter(client=client, encoder=encoder, **self._settings(artifact))

    def _settings(self, artifact: Artifact) -> dict[str, Any]:
        return {"model": self.model, "seed": artifact.config.default_seed, "concurrency": self.concurrency}

    @contextmanager
    def _connected(self, artifact: Artifact, largest_k: int) -> Iterator[tuple[Client, int]]:
        """A client of the server, and how many tokens it reads."""
        with self.connect() as client:
            served = _find(client.models(), artifact, self.model)
            most = served.posterior.max_n_samples if served.posterior else None
            if most is not None and largest_k > most:
                raise MetricError(
                    f"K is {largest_k}; the server takes at most {most} samples: ask for fewer, or raise its --max-samples"
                )
            yield client, served.max_model_len or min(m.max_model_len or 2048 for m in client.models())


def _find(models: Sequence[Model], artifact: Artifact, name: str) -> Model:
    found = next((model for model in models if model.id == name), None)
    if found is None:
        raise MetricError(f"the server has no model {name!r}; it serves {', '.join(model.id for model in models)}")
    digest = found.posterior.digest if found.posterior else None
    if digest != artifact.digest:
        raise MetricError(
            f"{name!r} on the server is {digest or 'not an artifact'}, {artifact.path} is {artifact.digest}: "
            "serve the artifact that is to be evaluated, or name the one that is served"
        )
    return found


def _log_probs(answer: Uncertainty, width: int) -> Tensor:
    """Log-probabilities of a row's answers in the order asked for, padded to ``width`` with probability zero."""
    probs = [choice.prob for choice in answer.choices or ()]
    return torch.tensor([*probs, *[0.0] * (width - len(probs))], dtype=torch.float64).log()
