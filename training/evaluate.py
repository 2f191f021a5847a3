"""Evaluation of an artifact, in this process or by a running server: accuracy, likelihood, calibration, detection of unfamiliar rows."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from credence.adapters.artifact import Artifact, load_artifact
from credence.training import metrics
from credence.training.data import read_data
from credence.training.errors import MetricError
from credence.training.predict import Factors, Prediction, Predictor, Scores, score
from credence.training.prompts import Encoder, Example
from credence.training.session import artifact_format, open_session

Temperatures = dict[int, list[float]]
OOD_SCORES = ("total", "epistemic", "confidence")


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


def evaluate(
    path: str | Path,
    base: str | Path,
    data: str | Path,
    ood: str | Path | None = None,
    ks: Sequence[int] = (0, 10),
    tau: Literal["fitted"] | float = "fitted",
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    resamples: int = 0,
    server: EngineSource | None = None,
) -> dict[str, Any]:
    """Evaluates the mean (K = 0) and averages of K samples, each at temperature 1 and at the fitted temperature.

    Label and choice rows are scored on the restricted softmax over their answers; free text token by token, teacher-forced.

    Args:
        ood: rows from elsewhere, of the same format; their labels are ignored.
        tau: posterior temperature of K > 0, or ``"fitted"``.
        resamples: bootstrap samples of the 95 % intervals; 0 computes none.
        server: answers the rows (label and choice rows only); None evaluates in this process.

    Returns:
        ``credence eval --json``: adapter, data, and one result per K and temperature. A metric that is not defined on these data is None.

    Raises:
        ArtifactError, DataError, ModelError, MetricError: with the reason.
        CredenceError: the server did not answer; see ``credence.clients.errors``.
    """
    ks = list(dict.fromkeys(ks))
    if not ks or min(ks) < 0:
        raise MetricError(f"K must be 0 (the mean) or more, and one K is needed, got {ks}")
    artifact = load_artifact(path)
    taus = {k: artifact.config.fitted_tau(k) if tau == "fitted" else float(tau) for k in ks}
    taus = {k: value if k > 0 and artifact.has_posterior else 0.0 for k, value in taus.items()}
    temperatures = {k: [1.0, artifact.calibration.fitted_temperature(k)] for k in ks}
    expected = artifact_format(artifact)
    file = read_data(data, expected=expected)
    ood_file = read_data(ood, expected=expected) if ood is not None else None
    with _engine(artifact, base, server, max(ks), dtype, batch_size) as engine:
        examples = engine.encoder.encode(file)
        ood_examples = engine.encoder.encode(ood_file, answers=False) if ood_file is not None else []
        scores = _scores(engine, artifact, examples, taus, temperatures)
        ood_scores = _scores(engine, artifact, ood_examples, taus, temperatures) if ood_examples else {}
    results = []
    for k in ks:
        for index, temperature in enumerate(temperatures[k]):
            entry = {"k": k, "tau": taus[k], "temperature": temperature}
            found, outside = scores[k, index], ood_scores.get((k, index))
            ends = {"intervals": intervals(found, outside, resamples=resamples)} if resamples else {}
            results.append({**entry, **summarise(found, outside), **ends})
    return {
        "adapter": {"method": artifact.config.method, "digest": artifact.digest},
        "data": {"file": Path(data).name, "rows": len(examples), "ood_rows": len(ood_examples)},
        **({"bootstrap": {"resamples": resamples, "level": 0.95, "seed": 0}} if resamples else {}),
        "results": results,
    }


def summarise(scores: Scores, ood: Scores | None = None) -> dict[str, float | None]:
    """The metrics of ``credence eval --json`` from per-position scores; OOD scores are means over each row's positions.

    None where a metric is not defined. A single predictor has no epistemic score; 0.5 would look like a measurement.
    """
    correct, confidence = scores.correct.numpy(), scores.confidence.numpy()
    parts, has_epistemic = metrics.brier_parts(confidence, correct), bool(scores.epistemic.any())
    result: dict[str, float | None] = {
        "accuracy": metrics.accuracy(correct),
        "nll": metrics.nll(scores.log_prob.numpy()),
        "ece10": metrics.ece(confidence, correct, bins=10),
        "ece15": metrics.ece(confidence, correct, bins=15),
        "ece_equal_mass": metrics.ece_equal_mass(confidence, correct, bins=15),
        "brier": metrics.brier(scores.brier.numpy()),
        "brier_reliability": parts.reliability,
        "brier_resolution": parts.resolution,
        "brier_uncertainty": parts.uncertainty,
        "error_auroc": metrics.auroc(1 - confidence, ~correct),
        "error_auroc_total": metrics.auroc(scores.total.numpy(), ~correct),
        "error_auroc_epistemic": metrics.auroc(scores.epistemic.numpy(), ~correct) if has_epistemic else None,
        "error_aupr": metrics.aupr(1 - confidence, ~correct),
        "aurc": metrics.aurc(confidence, correct),
        "accuracy_at_coverage_80": metrics.accuracy_at_coverage(confidence, correct, 0.8),
        "accuracy_at_coverage_50": metrics.accuracy_at_coverage(confidence, correct, 0.5),
        "coverage_at_risk_10": metrics.coverage_at_risk(confidence, correct, 0.1),
        "coverage_at_risk_5": metrics.coverage_at_risk(confidence, correct, 0.05),
        **{f"ood_{metric}_{name}": None for metric in ("auroc", "aupr", "fpr95") for name in OOD_SCORES},
        "ood_fpr95": None,
        "mean_confidence": float(confidence.mean()),
    }
    if ood is not None:
        for name in OOD_SCORES:
            inside, outside = (_ood_score(part, name) for part in (scores, ood))
            if name == "epistemic" and not any(inside) and not any(outside):
                continue
            found, is_ood = inside + outside, [0] * len(inside) + [1] * len(outside)
            result[f"ood_auroc_{name}"] = metrics.auroc(found, is_ood)
            result[f"ood_aupr_{name}"] = metrics.aupr(found, is_ood)
            result[f"ood_fpr95_{name}"] = metrics.fpr_at_recall(found, is_ood)
        result["ood_fpr95"] = result["ood_fpr95_total"]
    return result


def intervals(
    scores: Scores, ood: Scores | None = None, *, resamples: int, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap intervals of :func:`summarise` (Efron, Annals of Statistics 1979).

    Rows are drawn with replacement, test rows and OOD rows each among themselves; a row of several positions is drawn whole.

    Args:
        resamples: bootstrap samples; the interval's ends are quantiles of as many values.

    Returns:
        The ends by metric; None where the metric is not defined, on the data or on more than a twentieth of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    point = summarise(scores, ood)
    found: dict[str, list[float]] = {name: [] for name, number in point.items() if number is not None}
    for _ in range(resamples):
        drawn = summarise(scores.resampled(generator), ood.resampled(generator) if ood is not None else None)
        for name, numbers in found.items():
            number = drawn[name]
            if number is not None:
                numbers.append(number)
    ends = ((1 - level) / 2, (1 + level) / 2)
    result: dict[str, tuple[float, float] | None] = dict.fromkeys(point)
    for name, numbers in found.items():
        if len(numbers) >= 0.95 * resamples:
            low, high = np.quantile(numbers, ends)
            result[name] = (float(low), float(high))
    return result


def _ood_score(scores: Scores, name: str) -> list[float]:
    """Score of every row, higher for less familiar ones."""
    values: list[float] = scores.by_row(name).tolist()
    return [1 - value for value in values] if name == "confidence" else values


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


def _scores(
    engine: Engine,
    artifact: Artifact,
    examples: Sequence[Example],
    taus: dict[int, float],
    temperatures: Temperatures,
) -> dict[tuple[int, int], Scores]:
    """Scores by (K, index of the temperature). K's that share a tau share their samples and the passes over them."""
    result: dict[tuple[int, int], Scores] = {}
    for tau in dict.fromkeys(taus.values()):
        asked = [k for k in taus if taus[k] == tau]
        # K = 0 and any K at tau 0 are the mean: one pass. The members of an ensemble are so many and no more.
        most = artifact.num_distinct_samples or max(asked)
        sizes = {k: 1 if tau == 0 else min(k, most) for k in asked}
        parts: dict[tuple[int, int], list[Scores]] = {}
        for prediction in engine.predict(examples, sorted(set(sizes.values())), tau):
            for k in (k for k in asked if sizes[k] == prediction.k):
                for index, temperature in enumerate(temperatures[k]):
                    parts.setdefault((k, index), []).append(score(prediction, temperature))
        result.update({key: Scores.concatenate(value) for key, value in parts.items()})
    return result
