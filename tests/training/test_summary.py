"""Summaries of scores and their bootstrap intervals, against closed forms and hand-made cases."""

import math

import pytest
import torch

from credence.training.predict import TOP_ANSWERS, Scores
from credence.training.summary import intervals, summarise


def scores_of(rows: int, positions: int = 1, *, right: float = 0.8, seed: int = 0, alike: bool = False) -> Scores:
    """Rows of so many positions; ``alike`` positions of a row are all right or all wrong."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(rows).repeat_interleave(positions)
    if alike:
        correct = (torch.rand(rows, generator=generator) < right).repeat_interleave(positions)
    else:
        correct = torch.rand(rows * positions, generator=generator) < right
    confidence = 0.5 + 0.5 * torch.rand(len(row), generator=generator, dtype=torch.float64)
    return Scores(
        row=row,
        log_prob=confidence.log(),
        choice=torch.zeros_like(row),
        correct=correct,
        confidence=confidence,
        brier=(1 - confidence) ** 2,
        total=torch.rand(len(row), generator=generator, dtype=torch.float64),
        epistemic=torch.rand(len(row), generator=generator, dtype=torch.float64),
        top=torch.zeros((len(row), TOP_ANSWERS), dtype=torch.int64),
        top_probs=torch.zeros(len(row), TOP_ANSWERS),
    )


def width(ends: tuple[float, float] | None) -> float:
    assert ends is not None
    return ends[1] - ends[0]


def test_the_interval_of_the_accuracy_is_the_binomial_one() -> None:
    scores = scores_of(400)
    found, point = intervals(scores, resamples=600), summarise(scores)["accuracy"]
    assert point is not None
    assert width(found["accuracy"]) == pytest.approx(2 * 1.96 * math.sqrt(point * (1 - point) / 400), rel=0.15)
    low, high = found["accuracy"]  # type: ignore[misc]
    assert low < point < high
    assert intervals(scores, resamples=50) == intervals(scores, resamples=50)
    assert intervals(scores, resamples=50) != intervals(scores, resamples=50, seed=1)


def test_positions_of_a_row_are_drawn_together() -> None:
    """300 rows of 9 equal positions know as much as 300 positions, 2700 free ones know more."""
    together = width(intervals(scores_of(300, 9, alike=True), resamples=300)["accuracy"])
    alone = width(intervals(scores_of(300, alike=True), resamples=300)["accuracy"])
    free = width(intervals(scores_of(300, 9), resamples=300)["accuracy"])
    assert together == pytest.approx(alone, rel=0.2)
    assert free == pytest.approx(together / 3, rel=0.2)


def test_a_resample_holds_whole_rows() -> None:
    scores = Scores(
        row=torch.tensor([1, 0, 1, 2, 1]),
        choice=torch.zeros(5, dtype=torch.int64),
        correct=torch.tensor([True] * 5),
        top=torch.zeros((5, TOP_ANSWERS), dtype=torch.int64),
        top_probs=torch.zeros(5, TOP_ANSWERS),
        **{name: torch.tensor([1.0, 2, 3, 4, 5]) for name in ("log_prob", "confidence", "brier", "total", "epistemic")},
    )
    whole = {(2.0,), (1.0, 3.0, 5.0), (4.0,)}
    seen = set()
    for seed in range(20):
        drawn = scores.resampled(torch.Generator().manual_seed(seed))
        groups = [tuple(drawn.total[drawn.row == row].tolist()) for row in range(3)]
        assert len(drawn.row) == sum(map(len, groups)) and set(groups) <= whole
        seen.update(groups)
    assert seen == whole


def test_the_order_of_test_and_ood_rows_is_that_of_the_seed() -> None:
    inside, outside = scores_of(200), scores_of(60, seed=1)
    found = intervals(inside, outside, resamples=100)
    point = summarise(inside, outside)
    for name in ("ood_auroc_total", "ood_aupr_epistemic", "ood_fpr95_confidence", "error_aupr", "brier_resolution"):
        low, high = found[name]  # type: ignore[misc]
        assert low < high and low <= point[name] + 0.05 and point[name] - 0.05 <= high  # type: ignore[operator]
    assert width(found["ood_auroc_total"]) > 0.05


def test_what_is_not_defined_has_no_interval_and_no_nan() -> None:
    scores = scores_of(30, right=1.0)
    point, found = summarise(scores), intervals(scores, resamples=20)
    assert point["error_auroc"] is None and found["error_auroc"] is None
    assert point["ood_auroc_total"] is None and found["ood_auroc_total"] is None
    assert all(value is None or math.isfinite(value) for value in point.values())
    # One wrong row: a third of the samples does not hold it.
    scores = scores_of(30, right=1.0)
    scores.correct[0] = False
    assert summarise(scores)["error_auroc"] is not None and intervals(scores, resamples=100)["error_auroc"] is None


def test_a_single_predictor_has_no_epistemic_score() -> None:
    scores, outside = scores_of(30), scores_of(30, seed=1)
    scores.epistemic.zero_()
    outside.epistemic.zero_()
    point = summarise(scores, outside)
    assert point["error_auroc_epistemic"] is None and point["ood_auroc_epistemic"] is None
    assert point["ood_fpr95"] == point["ood_fpr95_total"] is not None
