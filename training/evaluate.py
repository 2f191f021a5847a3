"""Evaluation of an artifact in transformers + PEFT: accuracy, likelihood, calibration and out-of-distribution detection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from credence.adapters.artifact import Artifact, load_artifact
from credence.training import metrics
from credence.training.data import read_data
from credence.training.errors import MetricError
from credence.training.predict import Factors, Predictor, Scores, score
from credence.training.prompts import Example
from credence.training.session import open_session

Temperatures = dict[int, list[float]]


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
) -> dict[str, Any]:
    """Evaluates the mean (K = 0) and averages of K samples, each at temperature 1 and at the fitted temperature.

    Label and choice rows are scored on the restricted softmax over their answers; free text token by token, teacher-forced.

    Args:
        ood: rows from elsewhere, of the same format; their labels are ignored.
        tau: posterior temperature of K > 0, or ``"fitted"``.

    Returns:
        ``credence eval --json``: adapter, data, and one result per K and temperature. A metric that is not defined on these data is None.

    Raises:
        ArtifactError, DataError, ModelError, MetricError: with the reason.
    """
    ks = list(dict.fromkeys(ks))
    if not ks or min(ks) < 0:
        raise MetricError(f"K must be 0 (the mean) or more, and one K is needed, got {ks}")
    artifact = load_artifact(path)
    taus = {k: artifact.config.fitted_tau(k) if tau == "fitted" else float(tau) for k in ks}
    taus = {k: value if k > 0 and artifact.has_posterior else 0.0 for k, value in taus.items()}
    temperatures = {k: [1.0, artifact.calibration.fitted_temperature(k)] for k in ks}
    with open_session(artifact, base, dtype=dtype, batch_size=batch_size) as session:
        file = read_data(data, expected=session.format)
        examples = session.encoder.encode(file)
        scores = _scores(session.predictor, artifact, examples, taus, temperatures)
        ood_examples: list[Example] = []
        ood_scores: dict[tuple[int, int], Scores] = {}
        if ood is not None:
            ood_examples = session.encoder.encode(read_data(ood, expected=session.format), answers=False)
            ood_scores = _scores(session.predictor, artifact, ood_examples, taus, temperatures)
    results = []
    for k in ks:
        for index, temperature in enumerate(temperatures[k]):
            entry = {"k": k, "tau": taus[k], "temperature": temperature}
            results.append({**entry, **summarise(scores[k, index], ood_scores.get((k, index)))})
    return {
        "adapter": {"method": artifact.config.method, "digest": artifact.digest},
        "data": {"file": Path(data).name, "rows": len(examples), "ood_rows": len(ood_examples)},
        "results": results,
    }


def summarise(scores: Scores, ood: Scores | None = None) -> dict[str, float | None]:
    """The metrics of ``credence eval --json`` from per-position scores; OOD scores are means over each row's positions."""
    correct, confidence = scores.correct.numpy(), scores.confidence.numpy()
    result: dict[str, float | None] = {
        "accuracy": metrics.accuracy(correct),
        "nll": metrics.nll(scores.log_prob.numpy()),
        "ece10": metrics.ece(confidence, correct, bins=10),
        "ece15": metrics.ece(confidence, correct, bins=15),
        "ece_equal_mass": metrics.ece_equal_mass(confidence, correct, bins=15),
        "brier": metrics.brier(scores.brier.numpy()),
        "error_auroc": metrics.auroc(1 - confidence, ~correct),
        "aurc": metrics.aurc(confidence, correct),
        "ood_auroc_total": None,
        "ood_auroc_epistemic": None,
        "ood_fpr95": None,
        "mean_confidence": float(confidence.mean()),
    }
    if ood is not None:
        for name in ("total", "epistemic"):
            inside, outside = scores.by_row(name).tolist(), ood.by_row(name).tolist()
            if name == "epistemic" and not any(inside) and not any(outside):
                continue  # a single predictor has no epistemic score; 0.5 would look like a measurement
            is_ood = [0] * len(inside) + [1] * len(outside)
            result[f"ood_auroc_{name}"] = metrics.auroc(inside + outside, is_ood)
            if name == "total":
                result["ood_fpr95"] = metrics.fpr_at_recall(inside + outside, is_ood)
    return result


def _scores(
    predictor: Predictor,
    artifact: Artifact,
    examples: Sequence[Example],
    taus: dict[int, float],
    temperatures: Temperatures,
) -> dict[tuple[int, int], Scores]:
    """Scores by (K, index of the temperature). K's that share a tau share their samples and the passes over them."""
    seed = artifact.config.default_seed
    result: dict[tuple[int, int], Scores] = {}
    for tau in dict.fromkeys(taus.values()):
        asked = [k for k in taus if taus[k] == tau]
        # K = 0 and any K at tau 0 are the mean: one pass. The members of an ensemble are so many and no more.
        most = artifact.num_distinct_samples or max(asked)
        sizes = {k: 1 if tau == 0 else min(k, most) for k in asked}
        draws: list[Factors] = [artifact.draw(seed=seed, index=i, tau=tau) for i in range(max(sizes.values()))]
        parts: dict[tuple[int, int], list[Scores]] = {}
        for prediction in predictor.predict(examples, draws, sorted(set(sizes.values()))):
            for k in (k for k in asked if sizes[k] == prediction.k):
                for index, temperature in enumerate(temperatures[k]):
                    parts.setdefault((k, index), []).append(score(prediction, temperature))
        result.update({key: Scores.concatenate(value) for key, value in parts.items()})
    return result
