"""Evaluation of an artifact, in this process or by a running server: accuracy, likelihood, calibration, detection of unfamiliar rows."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from credence.adapters.artifact import Artifact, load_artifact
from credence.adapters.sampling import NoiseSource, inverse_cdf
from credence.training.data import DataFile, read_data
from credence.training.errors import MetricError
from credence.training.predict import Factors, Prediction, Predictor, Scores, score
from credence.training.prompts import Encoder, Example
from credence.training.session import artifact_format, open_session
from credence.training.summary import intervals, summarise

Tau = Literal["fitted"] | float


class Engine(Protocol):
    """What computes the predictions of an artifact's samples."""

    @property
    def encoder(self) -> Encoder:
        """Encodes the rows."""

    def predict(self, examples: Sequence[Example], sizes: Sequence[int], tau: float) -> Iterator[Prediction]:
        """Yields, for all rows in one or several parts and every K in ``sizes``, the average over the first K samples at ``tau``."""


class EngineSource(Protocol):
    """Where an engine comes from that is not transformers + PEFT in this process."""

    def open(self, artifact: Artifact, base: str | Path, largest_k: int) -> AbstractContextManager[Engine]:
        """Opens an engine of this artifact for up to ``largest_k`` samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineEngine:
    """Transformers + PEFT in this process."""

    predictor: Predictor
    encoder: Encoder
    artifact: Artifact

    def predict(self, examples: Sequence[Example], sizes: Sequence[int], tau: float) -> Iterator[Prediction]:
        """See :class:`Engine`; a batch of rows passes through the largest K once for all of ``sizes``."""
        seed = self.artifact.config.default_seed
        draws: list[Factors] = [self.artifact.draw(seed=seed, index=index, tau=tau) for index in range(max(sizes))]
        return self.predictor.predict(examples, draws, sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Scores of all rows under one predictor.

    Attributes:
        k: samples averaged; 0 is the mean.
        tau: posterior temperature of the samples; 0 where there are none.
        scores: of the test rows. ood: of the rows from elsewhere, if there are any.
    """

    k: int
    tau: float
    temperature: float
    scores: Scores
    ood: Scores | None = None

    def document(self, resamples: int) -> dict[str, Any]:
        """Its settings and metrics, with bootstrap intervals if there are ``resamples``."""
        ends = {"intervals": intervals(self.scores, self.ood, resamples=resamples)} if resamples else {}
        settings = {"k": self.k, "tau": self.tau, "temperature": self.temperature}
        return {**settings, **summarise(self.scores, self.ood), **ends}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured, row by row.

    Attributes:
        examples: the encoded test rows, in the order of ``data.rows``; ``ood_examples`` those of ``ood``.
        entries: one for every K, tau and temperature.
        token_samples: one for every K > 0, the share of each answer among K tokens drawn from the mean; none if not asked for.
    """

    artifact: Artifact
    encoder: Encoder
    data: DataFile
    ood: DataFile | None
    examples: Sequence[Example]
    ood_examples: Sequence[Example]
    entries: tuple[Entry, ...]
    token_samples: tuple[Entry, ...] = ()

    def document(self, resamples: int = 0) -> dict[str, Any]:
        """``credence eval --json``. A metric that is not defined on these data is None.

        Args:
            resamples: bootstrap samples of the 95 % intervals; 0 computes none.
        """
        return {
            "adapter": {"method": self.artifact.config.method, "digest": self.artifact.digest},
            "data": {"file": self.data.path.name, "rows": len(self.examples), "ood_rows": len(self.ood_examples)},
            **({"bootstrap": {"resamples": resamples, "level": 0.95, "seed": 0}} if resamples else {}),
            "results": [entry.document(resamples) for entry in self.entries],
            **(
                {"token_samples": [entry.document(resamples) for entry in self.token_samples]}
                if self.token_samples
                else {}
            ),
        }


def evaluate(
    path: str | Path,
    base: str | Path,
    data: str | Path,
    ood: str | Path | None = None,
    ks: Sequence[int] = (0, 10),
    tau: Tau | Sequence[Tau] = "fitted",
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    resamples: int = 0,
    token_samples: bool = False,
    server: EngineSource | None = None,
) -> dict[str, Any]:
    """Measures an artifact and returns ``credence eval --json``; see :func:`measure` and :meth:`Evaluation.document`."""
    evaluation = measure(
        path,
        base,
        data,
        ood,
        ks,
        tau,
        dtype=dtype,
        batch_size=batch_size,
        token_samples=token_samples,
        server=server,
    )
    return evaluation.document(resamples)


def measure(
    path: str | Path,
    base: str | Path,
    data: str | Path,
    ood: str | Path | None = None,
    ks: Sequence[int] = (0, 10),
    tau: Tau | Sequence[Tau] = "fitted",
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    token_samples: bool = False,
    server: EngineSource | None = None,
) -> Evaluation:
    """Scores every row under the mean (K = 0) and averages of K samples, each at temperature 1 and at the fitted temperature.

    Label and choice rows are scored on the restricted softmax over their answers; free text token by token, teacher-forced.

    Args:
        ood: rows from elsewhere, of the same format; their labels are ignored.
        tau: posterior temperature of K > 0, ``"fitted"``, or several of them.
        token_samples: also answer with K tokens drawn from the mean, for every K > 0 (label and choice rows only).
        server: answers the rows (label and choice rows only); None evaluates in this process.

    Raises:
        ArtifactError, DataError, ModelError, MetricError: with the reason.
        CredenceError: the server did not answer; see ``credence.clients.errors``.
    """
    ks = list(dict.fromkeys(ks))
    if not ks or min(ks) < 0:
        raise MetricError(f"K must be 0 (the mean) or more, and one K is needed, got {ks}")
    asked: list[Tau] = [tau] if isinstance(tau, str | float | int) else list(tau)
    artifact = load_artifact(path)
    expected = artifact_format(artifact)
    if token_samples and not expected.has_candidates:
        raise MetricError(
            f"token samples are shares of answers out of a known set, and the adapter was trained on {expected} rows; leave them out"
        )
    points = [(k, value) for k in ks for value in taus_of(artifact, k, asked)]
    file = read_data(data, expected=expected)
    ood_file = read_data(ood, expected=expected) if ood is not None else None
    with _engine(artifact, base, server, max(ks), dtype, batch_size) as engine:
        examples = engine.encoder.encode(file)
        ood_examples = engine.encoder.encode(ood_file, answers=False) if ood_file is not None else []
        inside = _Rows.scored(engine, artifact, examples, points, token_samples)
        outside = _Rows.scored(engine, artifact, ood_examples, points, token_samples) if ood_examples else None
        encoder = engine.encoder

    def entry(k: int, value: float, temperature: float, scores: Scores, ood: Scores | None) -> Entry:
        return Entry(k=k, tau=value, temperature=temperature, scores=scores, ood=ood)

    return Evaluation(
        artifact=artifact,
        encoder=encoder,
        data=file,
        ood=ood_file,
        examples=examples,
        ood_examples=ood_examples,
        entries=tuple(
            entry(k, value, temperature, scores, outside.averages[k, value][index] if outside else None)
            for (k, value), found in inside.averages.items()
            for index, (temperature, scores) in enumerate(zip(_temperatures(artifact, k), found, strict=True))
        ),
        token_samples=tuple(
            entry(k, 0.0, 1.0, scores, outside.token_samples[k] if outside else None)
            for k, scores in inside.token_samples.items()
        ),
    )


def taus_of(artifact: Artifact, k: int, asked: Sequence[Tau]) -> list[float]:
    """The values of tau for K samples, each once; the mean has none."""
    if k == 0 or not artifact.has_posterior:
        return [0.0]
    return list(dict.fromkeys(artifact.config.fitted_tau(k) if value == "fitted" else float(value) for value in asked))


def _temperatures(artifact: Artifact, k: int) -> tuple[float, float]:
    return 1.0, artifact.calibration.fitted_temperature(k)


@contextmanager
def _engine(
    artifact: Artifact,
    base: str | Path,
    server: EngineSource | None,
    largest_k: int,
    dtype: str | None,
    batch_size: int,
) -> Iterator[Engine]:
    if server is not None:
        with server.open(artifact, base, largest_k) as served:
            yield served
    else:
        with open_session(artifact, base, dtype=dtype, batch_size=batch_size) as session:
            yield OfflineEngine(predictor=session.predictor, encoder=session.encoder, artifact=artifact)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Scores of one set of rows: of averages by (K, tau), one for each temperature, and of token samples by K."""

    averages: dict[tuple[int, float], list[Scores]]
    token_samples: dict[int, Scores]

    @classmethod
    def scored(
        cls,
        engine: Engine,
        artifact: Artifact,
        examples: Sequence[Example],
        points: Sequence[tuple[int, float]],
        token_samples: bool,
    ) -> "_Rows":
        """Points that share a tau share their samples and the passes over them."""
        averages: dict[tuple[int, float], list[list[Scores]]] = {point: [[], []] for point in points}
        drawn: dict[int, list[Scores]] = {k: [] for k, _ in points if k > 0 and token_samples}
        uniforms = NoiseSource(0, 0, "tokens").uniform("rows", "answer", (len(examples), max(drawn, default=0)))
        for tau in dict.fromkeys([*(tau for _, tau in points), *([0.0] if drawn else [])]):
            # K = 0 and any K at tau 0 are the mean: one pass. The members of an ensemble are so many and no more.
            ks = [k for k, value in points if value == tau]
            most = artifact.num_distinct_samples or max(ks, default=1)
            sizes = {k: 1 if tau == 0 else min(k, most) for k in ks}
            for prediction in engine.predict(examples, sorted({*sizes.values()} or {1}), tau):
                for k in (k for k in ks if sizes[k] == prediction.k):
                    for parts, temperature in zip(averages[k, tau], _temperatures(artifact, k), strict=True):
                        parts.append(score(prediction, temperature))
                for k, parts in drawn.items() if tau == 0 else ():
                    parts.append(score(token_shares(prediction, uniforms[prediction.row, :k])))
        return cls(
            averages={point: [Scores.concatenate(parts) for parts in found] for point, found in averages.items()},
            token_samples={k: Scores.concatenate(parts) for k, parts in drawn.items()},
        )


def token_shares(mean: Prediction, uniforms_PK: torch.Tensor) -> Prediction:
    """What K tokens drawn from the mean's distribution over the answers say: the baseline of K samples at equal cost.

    The probability of an answer is (count + 1 / C) / (K + 1), of C answers: the posterior mean under a Dirichlet prior of total weight 1.
    Plain shares would give most right answers probability zero, and an infinite NLL.

    Args:
        mean: over candidates; those of probability zero are no answers.
        uniforms_PK: [P, K] on [0, 1), one for each token.

    Returns:
        A single predictor: it has no samples of the weights, so no epistemic score.
    """
    probs_PC = mean.log_mean_PC.double().cpu().exp()
    P, K = uniforms_PK.shape
    chosen_PK = inverse_cdf(probs_PC[:, None].expand(P, K, -1), uniforms_PK.double()[..., None])
    counts_PC = torch.zeros_like(probs_PC).scatter_add_(1, chosen_PK, torch.ones(P, K).double())
    is_answer_PC = probs_PC > 0
    shares_PC = (counts_PC + is_answer_PC.double() / is_answer_PC.sum(-1, keepdim=True)) / (K + 1)
    entropy_P = torch.special.entr(shares_PC).sum(-1)
    return replace(mean, k=1, target=mean.target.cpu(), log_mean_PC=shares_PC.log(), expected_entropy=entropy_P)
