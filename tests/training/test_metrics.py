"""Metrics against hand-computed cases and scikit-learn, and their edge cases."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from credence.training import metrics
from credence.training.errors import MetricError


def test_accuracy_and_nll() -> None:
    assert metrics.accuracy([True, False, True, True]) == 0.75
    assert metrics.nll(np.log([0.5, 0.25])) == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_nll_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=50)
    targets = rng.integers(0, 4, 50)
    expected = log_loss(targets, probs, labels=[0, 1, 2, 3])
    assert metrics.nll(np.log(probs[np.arange(50), targets])) == pytest.approx(expected)


def test_brier() -> None:
    # (0.7 - 1)^2 + 0.2^2 + 0.1^2 = 0.14 and 0.5^2 + (0.5 - 1)^2 = 0.5
    scores = metrics.brier_scores([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]], [0, 1])
    assert scores == pytest.approx([0.14, 0.5])
    assert metrics.brier(scores) == pytest.approx(0.32)
    p = np.array([0.1, 0.8, 0.4])
    two_class = metrics.brier(metrics.brier_scores(np.stack([1 - p, p], 1), [0, 1, 1]))
    assert two_class == pytest.approx(2 * brier_score_loss([0, 1, 1], p))


def test_ece_by_hand() -> None:
    # Ten bins: 0.95 and 0.91 in the last (accuracy 1/2, confidence 0.93), 0.55 and 0.6 in (0.5, 0.6] (1/2, 0.575).
    confidence, correct = [0.95, 0.91, 0.55, 0.60], [1, 0, 1, 0]
    assert metrics.ece(confidence, correct, bins=10) == pytest.approx(0.5 * 0.43 + 0.5 * 0.075)
    # One bin is the gap of the means.
    assert metrics.ece(confidence, correct, bins=1) == pytest.approx(abs(0.5 - 0.7525))


def test_ece_bins_are_closed_on_the_right() -> None:
    assert metrics.ece([0.1, 0.2], [0, 0], bins=10) == pytest.approx(0.15)
    # 0.1 alone, right: gap 0.9; 0.15 alone, wrong: gap 0.15.
    assert metrics.ece([0.1, 0.15], [1, 0], bins=10) == pytest.approx((0.9 + 0.15) / 2)
    assert metrics.ece([0.0, 1.0], [0, 1], bins=10) == 0


def test_ece_equal_mass_by_hand() -> None:
    # Two bins of two: {0.1, 0.2} with accuracy 1/2 and {0.8, 0.9} with accuracy 1.
    value = metrics.ece_equal_mass([0.9, 0.1, 0.8, 0.2], [1, 1, 1, 0], bins=2)
    assert value == pytest.approx(0.5 * abs(0.5 - 0.15) + 0.5 * abs(1 - 0.85))
    assert metrics.ece_equal_mass([0.3], [1], bins=15) == pytest.approx(0.7)


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): 3>1, 3>2, 2>1 and the tie 2=2 counts half: 3.5 of 4.
    assert metrics.auroc([3, 2, 1, 2], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    assert metrics.auroc([0, 1], [1, 0]) == 0


def test_fpr_at_recall_by_hand() -> None:
    # All positives are found at threshold 1, where 1 of 2 negatives is above.
    assert metrics.fpr_at_recall([3, 1, 2, 0], [1, 1, 0, 0]) == 0.5
    assert metrics.fpr_at_recall([3, 1, 2, 0], [1, 1, 0, 0], recall=0.5) == 0
    assert metrics.fpr_at_recall([1, 1, 1, 1], [1, 1, 0, 0]) == 1


def test_aurc_by_hand() -> None:
    # In order of confidence: right, wrong, right: risks 0, 1/2, 1/3.
    assert metrics.aurc([0.9, 0.5, 0.8], [1, 1, 0]) == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    # Ties share their error rate: 1/2 at every coverage, in any order.
    assert metrics.aurc([0.5, 0.5], [1, 0]) == metrics.aurc([0.5, 0.5], [0, 1]) == 0.5
    assert metrics.aurc([0.2, 0.3], [1, 1]) == 0
    assert metrics.aurc([0.2, 0.3], [0, 0]) == 1


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]])
def test_all_right_and_all_wrong(correct: list[int]) -> None:
    confidence = np.array([0.2, 0.5, 0.9])
    wrong = 1 - np.array(correct)
    assert metrics.auroc(1 - confidence, wrong) is None
    assert metrics.fpr_at_recall(1 - confidence, wrong) is None
    assert metrics.aurc(confidence, correct) == float(wrong[0])
    assert 0 <= metrics.ece(confidence, correct) <= 1
    assert 0 <= metrics.ece_equal_mass(confidence, correct) <= 1


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [
        ([], [], "non-empty"),
        ([0.1, float("nan")], [0, 1], "1 values that are not finite"),
        ([0.1, 0.2], [0], "as many"),
        ([0.1, 0.2], [0, 2], "must be 0 or 1"),
        ([[0.1]], [[1]], "shape"),
    ],
)
def test_bad_input_is_refused(scores: list[float], truth: list[int], message: str) -> None:
    for metric in (metrics.auroc, metrics.aurc, metrics.ece, metrics.ece_equal_mass, metrics.fpr_at_recall):
        with pytest.raises(MetricError, match=message):
            metric(scores, truth)


def test_confidence_outside_the_unit_interval() -> None:
    with pytest.raises(MetricError, match="must lie in"):
        metrics.ece([1.2], [1])


def test_aupr_by_hand() -> None:
    # Thresholds 3, 2, 1: recall 1/2, 1/2, 1 at precision 1, 1/2, 2/3.
    assert metrics.aupr([3, 2, 1], [1, 0, 1]) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    # Equal scores say nothing: the share of positives.
    assert metrics.aupr([1, 1, 1, 1], [1, 0, 0, 0]) == pytest.approx(1 / 4)
    assert metrics.aupr([1, 2], [1, 1]) is None and metrics.aupr([1, 2], [0, 0]) is None


def test_brier_parts_by_hand() -> None:
    # Two bins: {0.4, 0.5} with one of two right and {0.8, 0.9} with both; the base rate is 3/4.
    parts = metrics.brier_parts([0.4, 0.5, 0.8, 0.9], [0, 1, 1, 1], bins=2)
    assert parts.reliability == pytest.approx(0.5 * (0.5 - 0.45) ** 2 + 0.5 * (1 - 0.85) ** 2)
    assert parts.resolution == pytest.approx(0.5 * (0.5 - 0.75) ** 2 + 0.5 * (1 - 0.75) ** 2)
    assert parts.uncertainty == pytest.approx(3 / 16)
    # Of the first bin variance 0.0025 and covariance 0.025, of the second variance 0.0025.
    assert parts.within_bins == pytest.approx(0.5 * (0.0025 - 0.05) + 0.5 * 0.0025)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_brier_parts_add_up(bins: int) -> None:
    rng = np.random.default_rng(3)
    confidence = rng.random(200)
    correct = (rng.random(200) < confidence).astype(float)
    parts = metrics.brier_parts(confidence, correct, bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert total == pytest.approx(brier_score_loss(correct, confidence))
    constant = metrics.brier_parts(np.full(200, 0.3), correct, bins)
    assert constant.resolution == pytest.approx(0) and constant.within_bins == pytest.approx(0)


def test_risk_and_coverage_by_hand() -> None:
    # In order of confidence: right, right, wrong, right.
    confidence, correct = [0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1]
    coverages, risks = metrics.risk_coverage(confidence, correct)
    assert coverages == pytest.approx([0.25, 0.5, 0.75, 1]) and risks == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert metrics.accuracy_at_coverage(confidence, correct, 0.5) == 1
    assert metrics.accuracy_at_coverage(confidence, correct, 0.51) == pytest.approx(2 / 3)
    assert metrics.accuracy_at_coverage(confidence, correct, 1) == pytest.approx(3 / 4)
    assert metrics.accuracy_at_coverage(confidence, correct, 0.01) == 1
    assert metrics.coverage_at_risk(confidence, correct, 0) == 0.5
    assert (
        metrics.coverage_at_risk(confidence, correct, 0.25) == 1
    )  # more coverage than at 1/3 - small, where the risk is higher
    assert metrics.coverage_at_risk([0.5, 0.5, 0.5, 0.5], [1, 1, 0, 1], 0.2) == 0  # all or none
    assert metrics.coverage_at_risk([0.9], [0], 0.5) == 0


def test_coverage_at_risk_equals_brute_force() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        confidence = rng.integers(0, 12, 40) / 12
        correct = (rng.random(40) < confidence).astype(int)
        for risk in (0.0, 0.1, 0.3, 1.0):
            kept = [confidence >= threshold for threshold in np.unique(confidence)]
            allowed = [float(k.mean()) for k in kept if 1 - correct[k].mean() <= risk + 1e-12]
            assert metrics.coverage_at_risk(confidence, correct, risk) == pytest.approx(max(allowed, default=0.0))


@pytest.mark.parametrize("coverage", [0, -0.1, 1.1])
def test_a_coverage_outside_its_range_is_refused(coverage: float) -> None:
    with pytest.raises(MetricError, match=r"the coverage must lie in \(0, 1\]"):
        metrics.accuracy_at_coverage([0.5], [1], coverage)


def test_a_risk_outside_its_range_is_refused() -> None:
    with pytest.raises(MetricError, match=r"the risk must lie in \[0, 1\], got 1.5"):
        metrics.coverage_at_risk([0.5], [1], 1.5)
