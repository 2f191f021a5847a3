"""Every metric against a slow implementation of its definition, on random data full of ties; no metric is ever NaN."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from credence.training import metrics
from credence.training.predict import Scores
from credence.training.summary import summarise

LEVELS = [0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0]
pairs = st.lists(st.tuples(st.sampled_from(LEVELS), st.booleans()), min_size=1, max_size=7)
two_classes = pairs.filter(lambda rows: len({truth for _, truth in rows}) == 2)


def columns(rows: Sequence[tuple[float, bool]]) -> tuple[list[float], list[bool]]:
    return [score for score, _ in rows], [truth for _, truth in rows]


@given(two_classes)
def test_auroc_counts_pairs(rows: list[tuple[float, bool]]) -> None:
    positive = [score for score, truth in rows if truth]
    negative = [score for score, truth in rows if not truth]
    won = sum((a > b) + (a == b) / 2 for a, b in itertools.product(positive, negative))
    assert metrics.auroc(*columns(rows)) == pytest.approx(won / (len(positive) * len(negative)))


@given(two_classes)
def test_aupr_and_fpr_walk_down_the_thresholds(rows: list[tuple[float, bool]]) -> None:
    scores, truth = columns(rows)
    total, before, area, rates = sum(truth), 0, 0.0, []
    for threshold in sorted(set(scores), reverse=True):
        taken = [t for s, t in rows if s >= threshold]
        area += (sum(taken) - before) / total * sum(taken) / len(taken)
        before = sum(taken)
        if before >= 0.95 * total:
            rates.append((len(taken) - before) / (len(rows) - total))
    assert metrics.aupr(scores, truth) == pytest.approx(area)
    assert metrics.fpr_at_recall(scores, truth) == pytest.approx(min(rates))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LEVELS), st.booleans()), min_size=1, max_size=5))
def test_risk_and_coverage_average_over_the_orders_of_ties(rows: list[tuple[float, bool]]) -> None:
    orders = [order for order in itertools.permutations(rows) if list(order) == sorted(order, key=lambda r: -r[0])]
    risks = [[sum(not t for _, t in order[: n + 1]) / (n + 1) for n in range(len(rows))] for order in orders]
    expected = [sum(column) / len(orders) for column in zip(*risks, strict=True)]
    coverage, found = metrics.risk_coverage(*columns(rows))
    assert found.tolist() == pytest.approx(expected)
    assert metrics.aurc(*columns(rows)) == pytest.approx(sum(expected) / len(expected))
    for share in (0.2, 0.5, 1.0):
        count = next(n for n in range(1, len(rows) + 1) if Fraction(n, len(rows)) >= Fraction(str(share)))
        assert metrics.accuracy_at_coverage(*columns(rows), share) == pytest.approx(1 - expected[count - 1])
    assert coverage[-1] == 1


@given(pairs, st.sampled_from([10, 15]))
def test_ece_and_its_parts_bin_by_bin(rows: list[tuple[float, bool]], bins: int) -> None:
    """Bin edges as exact fractions: the confidences are decimals, (i/n, (i+1)/n] holds them without rounding."""
    members: dict[int, list[tuple[float, bool]]] = {}
    for score, truth in rows:
        exact = Fraction(str(score))
        index = next(i for i in range(bins) if exact <= Fraction(i + 1, bins))
        members.setdefault(index, []).append((score, truth))
    share = {index: len(inside) / len(rows) for index, inside in members.items()}
    means = {
        i: tuple(sum(map(float, column)) / len(inside) for column in zip(*inside, strict=True))
        for i, inside in members.items()
    }
    base = sum(truth for _, truth in rows) / len(rows)
    assert metrics.ece(*columns(rows), bins=bins) == pytest.approx(
        sum(share[i] * abs(c - a) for i, (c, a) in means.items())
    )
    parts = metrics.brier_parts(*columns(rows), bins=bins)
    assert parts.reliability == pytest.approx(sum(share[i] * (c - a) ** 2 for i, (c, a) in means.items()))
    assert parts.resolution == pytest.approx(sum(share[i] * (a - base) ** 2 for i, (_, a) in means.items()))
    assert parts.uncertainty == pytest.approx(base * (1 - base))
    squares = sum((score - truth) ** 2 for score, truth in rows) / len(rows)
    whole = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert whole == pytest.approx(squares)


@given(pairs, st.integers(min_value=1, max_value=4))
def test_equal_mass_bins_differ_by_one_row_at_most(rows: list[tuple[float, bool]], bins: int) -> None:
    ordered = sorted(rows, key=lambda row: row[0])
    count, extra = divmod(len(rows), bins)
    gap, start = 0.0, 0
    for index in range(bins):
        inside = ordered[start : start + count + (index < extra)]
        start += len(inside)
        gap += abs(sum(truth - score for score, truth in inside))
    assert metrics.ece_equal_mass(*columns(rows), bins=bins) == pytest.approx(gap / len(rows))


def scores_of(rows: Sequence[tuple[float, bool]], epistemic: float) -> Scores:
    """One position a row; a total entropy that falls with the confidence."""
    confidence = torch.tensor([0.5 + score / 2 for score, _ in rows], dtype=torch.float64)
    return Scores(
        row=torch.arange(len(rows)),
        log_prob=confidence.log(),
        choice=torch.zeros(len(rows), dtype=torch.int64),
        top=torch.zeros(len(rows), 1, dtype=torch.int64),
        top_probs=confidence[:, None],
        correct=torch.tensor([truth for _, truth in rows]),
        confidence=confidence,
        brier=(1 - confidence) ** 2,
        total=1 - confidence,
        epistemic=torch.full((len(rows),), epistemic, dtype=torch.float64),
    )


@settings(deadline=None)
@given(pairs, st.one_of(st.none(), pairs), st.sampled_from([0.0, 0.1]))
def test_a_summary_has_numbers_or_none(
    rows: list[tuple[float, bool]], ood: list[tuple[float, bool]] | None, epistemic: float
) -> None:
    """One row, one class, all right, all wrong, ties everywhere, no rows from elsewhere, a single predictor."""
    found = summarise(scores_of(rows, epistemic), scores_of(ood, epistemic) if ood else None)
    numbers = {name: number for name, number in found.items() if number is not None}
    assert all(math.isfinite(number) for number in numbers.values())
    one_class = len({truth for _, truth in rows}) == 1
    for name in ("error_auroc", "error_aupr", "error_auroc_total"):
        assert (name not in numbers) == one_class
    assert ("error_auroc_epistemic" in numbers) == (not one_class and epistemic > 0)
    for name in ("ood_auroc_total", "ood_fpr95", "ood_aupr_confidence"):
        assert (name in numbers) == (ood is not None)
    assert ("ood_auroc_epistemic" in numbers) == (ood is not None and epistemic > 0)
    assert {"accuracy", "nll", "ece10", "ece15", "ece_equal_mass", "brier", "aurc", "coverage_at_risk_10"} <= set(
        numbers
    )
    assert np.isclose(found["mean_confidence"], np.mean([0.5 + score / 2 for score, _ in rows]))  # type: ignore[arg-type]
