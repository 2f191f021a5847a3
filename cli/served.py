"""Predictions of a running server for the evaluation of an artifact: the rows of ``credence eval --engine URL``.

A row is one request of mode ``choices`` for each K, its prompt as the token ids that the offline evaluation reads, its calibration left
out; several rows are under way at once. Temperatures and metrics are computed here, from the probabilities that come back.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from credence.adapters.artifact import Artifact
from credence.clients import Client, Model, Uncertainty
from credence.training.data import DataFormat
from credence.training.errors import MetricError
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
        for k in sizes:
            with ThreadPoolExecutor(self.concurrency) as pool:
                answers = [pool.submit(self._ask, example, k, tau) for example in examples]
                try:
                    found = [answer.result() for answer in answers]
                finally:  # One failed row fails the evaluation; the others are not asked for any more.
                    pool.shutdown(cancel_futures=True)
            yield Prediction(
                k=k,
                row=torch.arange(len(examples)),
                target=target,
                log_mean_PC=torch.stack([_log_probs(answer, width) for answer in found]),
                expected_entropy=torch.tensor([answer.aleatoric for answer in found], dtype=torch.float64),
            )

    def _ask(self, example: Example, k: int, tau: float) -> Uncertainty:
        answer = self.client.complete(
            example.prompt,
            model=self.model,
            uncertainty=True,
            mode="choices",
            choices=self.encoder.answer_texts(example),
            n_samples=k,
            tau=tau,
            seed=self.seed,
            calibrated=False,
            max_tokens=1,
        )
        assert answer.uncertainty is not None  # The client has checked it.
        return answer.uncertainty


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
                "free text is evaluated with --engine hf"
            )
        with self.connect() as client:
            served = _find(client.models(), artifact, self.model)
            most = served.posterior.max_n_samples if served.posterior else None
            if most is not None and largest_k > most:
                raise MetricError(
                    f"K is {largest_k}; the server takes at most {most} samples: ask for fewer, or raise its --max-samples"
                )
            length = served.max_model_len or min(m.max_model_len or 2048 for m in client.models())
            encoder = artifact_encoder(artifact, base, max_length=length - 1)
            yield ServedEngine(
                client=client,
                model=self.model,
                seed=artifact.config.default_seed,
                encoder=encoder,
                concurrency=self.concurrency,
            )


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
