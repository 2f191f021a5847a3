"""Evaluation metrics of classifiers and token predictors, from per-prediction numbers.

Every function takes 1-D array-likes and returns a float, or None where the metric is not defined (one class only, nothing to
count); none returns NaN. A non-finite input is an error. Curves that scikit-learn has are scikit-learn's.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BrierParts:
    """Parts of the mean squared difference between confidence and correctness, mean (p - y)^2 = the sum of the parts with these signs:

        + reliability - resolution + uncertainty + within_bins

    Attributes:
        reliability: sum_b (n_b / n) (mean correct - mean confidence)^2; 0 is calibrated.
        resolution: sum_b (n_b / n) (mean correct - base rate)^2; more tells right from wrong better.
        uncertainty: base rate (1 - base rate), of the data and the predictions alone.
        within_bins: variance of the confidence less twice its covariance with ``correct``, inside the bins.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


def brier_parts(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> BrierParts:
    """Decomposition of the Brier score of "this prediction is right" (Murphy, J. Appl. Meteor. 1973) in equal-width bins.

    Murphy's parts add up only if all confidences of a bin are equal; ``within_bins`` is the rest (Stephenson et al., Weather and
    Forecasting 2008). The bins are those of :func:`ece`.
    """
    confidence, correct = _confidences(confidence, correct)
    base_rate, total = float(correct.mean()), len(confidence)
    reliability = resolution = within = 0.0
    for member in _equal_width(confidence, bins):
        count = int(member.sum())
        if not count:
            continue
        p, y = confidence[member], correct[member]
        reliability += count / total * float(y.mean() - p.mean()) ** 2
        resolution += count / total * float(y.mean() - base_rate) ** 2
        within += count / total * float(p.var() - 2 * ((p - p.mean()) * (y - y.mean())).mean())
    return BrierParts(
        reliability=reliability, resolution=resolution, uncertainty=base_rate * (1 - base_rate), within_bins=within
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """The predictions whose confidence lies in (low, high].

    Attributes:
        count, right: how many they are, and how many of them are right.
        confidence: their mean confidence; None where there are none.
    """

    low: float
    high: float
    count: int
    right: int
    confidence: float | None

    @property
    def accuracy(self) -> float | None:
        """Share of right ones; None where there are none."""
        return self.right / self.count if self.count else None


def calibration_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> list[CalibrationBin]:
    """The bins of :func:`ece`, empty ones included: a reliability diagram, and the histogram of the confidence."""
    confidence, correct = _confidences(confidence, correct)
    return [
        CalibrationBin(
            low=index / bins,
            high=(index + 1) / bins,
            count=int(member.sum()),
            right=int(correct[member].sum()),
            confidence=float(confidence[member].mean()) if member.any() else None,
        )
        for index, member in enumerate(_equal_width(confidence, bins))
    ]


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error with ``bins`` equal-width bins (i/n, (i+1)/n], 0 included in the first.

    sum_b (n_b / n) |mean correct - mean confidence| (Guo et al., ICML 2017, eq. 3). The papers differ: IVON 10 bins, BLoB 15.
    """
    confidence, correct = _confidences(confidence, correct)
    return _calibration_gap(confidence, correct, _equal_width(confidence, bins))


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


def aupr(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Area under the precision-recall curve as average precision: sum_i (recall_i - recall_{i-1}) precision_i over the thresholds.

    Its value for scores that say nothing is the share of positives. None with one class only.
    """
    scores, positive = _pair(scores, positive)
    if positive.min() == positive.max():
        return None
    return float(average_precision_score(positive, scores))


def fpr_at_recall(scores: ArrayLike, positive: ArrayLike, recall: float = 0.95) -> float | None:
    """Smallest false-positive rate at which at least ``recall`` of the positives are found (FPR95). None with one class only."""
    scores, positive = _pair(scores, positive)
    if positive.min() == positive.max():
        return None
    false_rate, true_rate, _ = roc_curve(positive, scores, drop_intermediate=False)
    return float(false_rate[true_rate >= recall - 1e-12].min())


def risk_coverage(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """The risk-coverage curve: coverages 1/n, ..., n/n, and the error rate of that share of most confident predictions, both [n].

    Predictions of equal confidence share their group's error rate (its expectation if ties are broken at random), so the order given
    does not matter.
    """
    confidence, correct = _pair(confidence, correct)
    _, group = np.unique(-confidence, return_inverse=True)
    group_error = np.bincount(group, weights=1 - correct) / np.bincount(group)
    counts = np.arange(1, len(confidence) + 1)
    return counts / len(confidence), np.cumsum(group_error[np.sort(group)]) / counts


def aurc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Area under the risk-coverage curve: the mean risk over the coverages 1/n, ..., n/n."""
    return float(risk_coverage(confidence, correct)[1].mean())


def accuracy_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Accuracy of the most confident share ``coverage``, in (0, 1], of the predictions: of the fewest that are at least so many."""
    if not 0 < coverage <= 1:
        raise MetricError(f"the coverage must lie in (0, 1], got {coverage}")
    coverages, risks = risk_coverage(confidence, correct)
    return float(1 - risks[np.searchsorted(coverages, coverage - 1e-12)])


def coverage_at_risk(confidence: ArrayLike, correct: ArrayLike, risk: float) -> float:
    """Largest share of predictions that a threshold on the confidence lets through at an error rate of at most ``risk``; 0 if none.

    A threshold cannot tell equal confidences apart, so it lets all of them through or none.
    """
    if not 0 <= risk <= 1:
        raise MetricError(f"the risk must lie in [0, 1], got {risk}")
    coverages, risks = risk_coverage(confidence, correct)
    ordered = np.sort(_numbers("confidence", confidence))[::-1]
    ends_group = np.append(ordered[1:] != ordered[:-1], True)
    return float(coverages[ends_group & (risks <= risk + 1e-12)].max(initial=0.0))


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that one of k samples passes, estimated from n of which c passed: 1 - C(n - c, k) / C(n, k).

    Unbiased for independent samples (Chen et al., arXiv:2107.03374, 2021, eq. 1).

    Raises:
        MetricError: not 1 <= k <= n or not 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise MetricError(
            f"pass@k needs 1 <= k <= samples and 0 <= passed <= samples, got k = {k}, {num_samples} samples, {num_passed} passed"
        )
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_passed, k)) / ways


def _confidences(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _pair(confidence, correct)
    if first.min() < 0 or first.max() > 1 + 1e-9:
        raise MetricError(f"confidence must lie in [0, 1], got {first.min()} to {first.max()}")
    return first, second


def _equal_width(confidence: Floats, bins: int) -> list[Any]:
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [index == b for b in range(bins)]


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
