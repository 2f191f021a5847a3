"""The metrics of an evaluation from the scores of its positions, and their bootstrap intervals."""

import numpy as np
import torch

from credence.training import metrics
from credence.training.predict import Scores

OOD_SCORES = ("total", "epistemic", "confidence")


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
