"""Evaluation metrics of classifiers and token predictors, from per-prediction numbers.

Every function takes 1-D array-likes and returns a float, or None where the metric is not defined (one class only, nothing to
count); none returns NaN. A non-finite input is an error. Curves that scikit-learn has are scikit-learn's.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from credence.training.errors import MetricError

Floats = NDArray[np.float64]


def accuracy(correct: ArrayLike) -> float:
    """Share of right predictions."""
    return float(_numbers("correct", correct).mean())


def nll(log_probs: ArrayLike) -> float:
    """Mean negative log-likelihood of the right answers, nats."""
    return float(-_numbers("log_probs", log_probs).mean())


def brier(scores: ArrayLike) -> float:
    """Mean over the predictions of sum_c (p_c - y_c)^2, in [0, 2] (0 is best)."""
    return float(_numbers("scores", scores).mean())


def brier_scores(probs: ArrayLike, targets: ArrayLike) -> Floats:
    """sum_c (p_c - y_c)^2 of each row of ``probs`` [N, C] with right class ``targets`` [N]."""
    p = np.asarray(probs, dtype=np.float64)
    right = p[np.arange(len(p)), np.asarray(targets)]
    result: Floats = (p**2).sum(1) - 2 * right + 1
    return result


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error with ``bins`` equal-width bins (i/n, (i+1)/n], 0 included in the first.

    sum_b (n_b / n) |mean correct - mean confidence| (Guo et al., ICML 2017, eq. 3). The papers differ: IVON 10 bins, BLoB 15.
    """
    confidence, correct = _pair(confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1 + 1e-9:
        raise MetricError(f"confidence must lie in [0, 1], got {confidence.min()} to {confidence.max()}")
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return _calibration_gap(confidence, correct, [index == b for b in range(bins)])


def ece_equal_mass(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error with bins of equal counts (sizes differ by one at most), in the order of confidence.

    Equal confidences are kept in the order given; with fewer predictions than bins every prediction is a bin.
    """
    confidence, correct = _pair(confidence, correct)
    order = np.argsort(confidence, kind="stable")
    return _calibration_gap(confidence, correct, np.array_split(order, min(bins, len(order))))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count half. None with one class only."""
    scores, positive = _pair(scores, positive)
    if positive.min() == positive.max():
        return None
    return float(roc_auc_score(positive, scores))


def fpr_at_recall(scores: ArrayLike, positive: ArrayLike, recall: float = 0.95) -> float | None:
    """Smallest false-positive rate at which at least ``recall`` of the positives are found (FPR95). None with one class only."""
    scores, positive = _pair(scores, positive)
    if positive.min() == positive.max():
        return None
    false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(false_rate[true_rate >= recall - 1e-12].min())


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: mean over coverages 1/n, ..., n/n of the error rate of the most confident predictions.

    Predictions of equal confidence share their group's error rate, so the order given does not matter.
    """
    confidence, correct = _pair(confidence, correct)
    _, group = np.unique(-confidence, return_inverse=True)
    group_error = np.bincount(group, weights=1 - correct) / np.bincount(group)
    expected_error = group_error[np.sort(group)]
    return float((np.cumsum(expected_error) / np.arange(1, len(confidence) + 1)).mean())


def _calibration_gap(confidence: Floats, correct: Floats, members: list[Any]) -> float:
    gap = 0.0
    for member in members:
        inside = confidence[member]
        if len(inside):
            gap += len(inside) * abs(float(correct[member].mean()) - float(inside.mean()))
    return gap / len(confidence)


def _numbers(name: str, values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise MetricError(f"{name} must be a non-empty list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise MetricError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def _pair(scores: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _numbers("scores", scores), _numbers("truth", truth)
    if len(first) != len(second):
        raise MetricError(f"{len(first)} scores and {len(second)} truths; they must be as many")
    if not np.isin(second, (0.0, 1.0)).all():
        raise MetricError("the truth must be 0 or 1 (or booleans)")
    return first, second
