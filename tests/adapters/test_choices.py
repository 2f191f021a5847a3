"""Choice scores against slow float64 loops and closed forms, and the bounds that hold for every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credence.adapters.choices import ChoiceScores, choice_scores
from credence.adapters.uncertainty import token_scores

SCALARS = ("total", "aleatoric", "epistemic", "variation_ratio")


def slow_scores(rows: list[list[float]], lengths: list[int], normalized: bool, temperature: float) -> dict[str, object]:
    """The definitions, one number at a time."""
    k, num_labels = len(rows), len(lengths)
    members = []
    for row in rows:
        weights = [math.exp(x / n if normalized else x) for x, n in zip(row, lengths, strict=True)]
        members.append([w / sum(weights) for w in weights])
    average = [sum(q[label] for q in members) / k for label in range(num_labels)]
    tempered = [a ** (1 / temperature) for a in average]

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    top = average.index(max(average))
    return {
        "prob_L": [t / sum(tempered) for t in tempered],
        "std_L": [math.sqrt(sum((q[i] - average[i]) ** 2 for q in members) / k) for i in range(num_labels)],
        "member_probs_KL": members,
        "top": top,
        "total": entropy(average),
        "aleatoric": sum(entropy(q) for q in members) / k,
        # as a mean divergence from the average, not as the difference of the two entropies
        "epistemic": sum(x * math.log(x / a) for q in members for x, a in zip(q, average, strict=True) if x > 0) / k,
        "variation_ratio": sum(q.index(max(q)) != top for q in members) / k,
        "mass": None if normalized else sum(math.exp(x) for row in rows for x in row) / k,
    }


def random_log_probs(k: int, num_labels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -6 * torch.rand(k, num_labels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("k", "num_labels"), [(1, 1), (1, 4), (3, 1), (2, 2), (8, 5), (5, 77)])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
def test_scores_equal_a_slow_loop(k: int, num_labels: int, normalized: bool, temperature: float) -> None:
    log_probs = random_log_probs(k, num_labels)
    if num_labels > 2:
        log_probs[0, 0] = log_probs[:, 1] = -math.inf
    lengths = [1 + label % 3 for label in range(num_labels)]
    scores = choice_scores(log_probs, lengths, length_normalized=normalized, temperature=temperature)
    expected = slow_scores(log_probs.tolist(), lengths, normalized, temperature)
    for name, value in expected.items():
        got = getattr(scores, name)
        if isinstance(got, Tensor):
            torch.testing.assert_close(got, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-12)
        else:
            assert got == (value if value is None else pytest.approx(value, abs=1e-12)), name


def test_two_labels_by_hand() -> None:
    """p_1 = (0.3, 0.1) and p_2 = (0.02, 0.02): q_1 = (3/4, 1/4) and q_2 = (1/2, 1/2), average (5/8, 3/8)."""
    log_probs = torch.tensor([[0.3, 0.1], [0.02, 0.02]], dtype=torch.float64).log()
    scores = choice_scores(log_probs, [1, 1], temperature=0.5)
    assert scores.prob_L.tolist() == pytest.approx([25 / 34, 9 / 34])
    assert scores.std_L.tolist() == pytest.approx([1 / 8, 1 / 8])
    assert scores.mass == pytest.approx(0.22)
    assert (scores.top, scores.variation_ratio) == (0, 0.0)
    h = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (5 / 8, 3 / 4, 1 / 2)]
    assert scores.total == pytest.approx(h[0]) and scores.aleatoric == pytest.approx((h[1] + h[2]) / 2)


def test_length_normalization_compares_the_means_per_token() -> None:
    """Three tokens at 0.5 each and one at 0.25: 1/8 against 1/4 as texts, 1/2 against 1/4 per token."""
    log_probs = torch.tensor([[math.log(1 / 8), math.log(1 / 4)]], dtype=torch.float64)
    plain = choice_scores(log_probs, [3, 1])
    normalized = choice_scores(log_probs, [3, 1], length_normalized=True)
    assert plain.prob_L.tolist() == pytest.approx([1 / 3, 2 / 3]) and plain.mass == pytest.approx(3 / 8)
    assert normalized.prob_L.tolist() == pytest.approx([2 / 3, 1 / 3]) and normalized.mass is None
    assert (plain.top, normalized.top) == (1, 0)


def test_samples_are_restricted_before_they_are_averaged() -> None:
    """A sample that leaves the labels little mass has a full vote; averaging first would give 0.892 to label 0."""
    log_probs = torch.tensor([[0.9, 0.1], [0.001, 0.009]], dtype=torch.float64).log()
    assert choice_scores(log_probs, [1, 1]).prob_L.tolist() == pytest.approx([0.5, 0.5])


def test_labels_of_the_whole_vocabulary_give_the_token_scores() -> None:
    log_probs = torch.log_softmax(random_log_probs(8, 30), dim=-1)
    scores, token = choice_scores(log_probs, [1] * 30), token_scores(log_probs)
    assert scores.mass == pytest.approx(1)
    for name in SCALARS:
        assert getattr(scores, name) == pytest.approx(float(getattr(token, name)), abs=1e-12)


@st.composite
def label_log_probs(draw: st.DrawFn) -> Tensor:
    """[K, L] log-probabilities: near and far, beyond the range of exp, and impossible labels."""
    k, num_labels = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.0, 1e-9, 1.0, 40.0, 2000.0]))
    row = st.lists(st.floats(0, 1), min_size=num_labels, max_size=num_labels)
    values = -scale * torch.tensor(draw(st.lists(row, min_size=k, max_size=k)), dtype=torch.float64)
    flags = st.lists(st.booleans(), min_size=num_labels, max_size=num_labels)
    impossible = torch.tensor(draw(st.lists(flags, min_size=k, max_size=k)))
    impossible[impossible.all(dim=1)] = False
    return values.masked_fill(impossible, -math.inf)


@settings(max_examples=150, deadline=None)
@given(log_probs=label_log_probs(), normalized=st.booleans(), temperature=st.sampled_from([0.25, 1.0, 8.0]))
def test_the_bounds_hold_for_every_input(log_probs: Tensor, normalized: bool, temperature: float) -> None:
    k, num_labels = log_probs.shape
    scores = choice_scores(
        log_probs, list(range(1, num_labels + 1)), length_normalized=normalized, temperature=temperature
    )
    assert float(scores.prob_L.sum()) == pytest.approx(1) and float(scores.prob_L.min()) >= 0
    assert scores.member_probs_KL.sum(-1).tolist() == pytest.approx([1.0] * k)
    assert 0 <= scores.epistemic <= math.log(min(k, num_labels))
    assert 0 <= scores.aleatoric <= scores.total <= math.log(num_labels)
    assert scores.aleatoric + scores.epistemic == pytest.approx(scores.total, abs=1e-15)
    assert 0 <= scores.variation_ratio <= 1
    assert 0 <= float(scores.std_L.min()) and float(scores.std_L.max()) <= 0.5 + 1e-12
    assert float(scores.prob_L[scores.top]) == float(scores.prob_L.max())
    assert bool((scores.prob_L[log_probs.isneginf().all(0)] == 0).all())


@pytest.mark.parametrize(("k", "num_labels"), [(2, 3), (3, 3), (8, 3), (10, 2), (10, 5)])
def test_certain_samples_that_differ_reach_the_bound(k: int, num_labels: int) -> None:
    """One-hot samples spread evenly: epistemic = total = ln(number of labels met), at most ln min(K, L)."""
    members = torch.eye(num_labels, dtype=torch.float64)[torch.arange(k) % num_labels].log()
    scores = choice_scores(members, [1] * num_labels)
    assert 0 <= scores.aleatoric <= 1e-12
    assert scores.epistemic == pytest.approx(scores.total) and scores.epistemic <= math.log(min(k, num_labels))
    if k % num_labels == 0 or k < num_labels:
        assert scores.epistemic == pytest.approx(math.log(min(k, num_labels)))


def test_one_sample_has_no_spread_and_no_epistemic_part() -> None:
    scores = choice_scores(random_log_probs(1, 5), [1] * 5)
    assert (scores.epistemic, scores.variation_ratio) == (0.0, 0.0)
    assert scores.std_L.tolist() == [0.0] * 5 and scores.aleatoric == scores.total > 0


@pytest.mark.parametrize("k", range(1, 41))
def test_one_label_is_certain_whatever_rounds(k: int) -> None:
    scores = choice_scores(torch.full((k, 1), -3.0), [2])
    assert (scores.total, scores.aleatoric, scores.epistemic, scores.variation_ratio) == (0.0, 0.0, 0.0, 0.0)
    assert scores.prob_L.tolist() == [1.0]


def test_the_temperature_moves_the_probabilities_only() -> None:
    log_probs = random_log_probs(6, 4)
    plain, flat = choice_scores(log_probs, [1] * 4), choice_scores(log_probs, [1] * 4, temperature=3.0)
    assert float(flat.prob_L.max()) < float(plain.prob_L.max())
    assert torch.equal(plain.std_L, flat.std_L) and torch.equal(plain.member_probs_KL, flat.member_probs_KL)
    assert [getattr(plain, name) for name in (*SCALARS, "top", "mass")] == [
        getattr(flat, name) for name in (*SCALARS, "top", "mass")
    ]


def test_the_order_of_samples_and_labels_does_not_matter() -> None:
    log_probs, lengths = random_log_probs(6, 4), [1, 2, 3, 4]
    permutation = [2, 0, 3, 1]
    a = choice_scores(log_probs, lengths, length_normalized=True)
    b = choice_scores(log_probs.flip(0)[:, permutation], [lengths[i] for i in permutation], length_normalized=True)
    torch.testing.assert_close(a.prob_L[permutation], b.prob_L)
    torch.testing.assert_close(a.std_L[permutation], b.std_L)
    assert [getattr(b, name) for name in SCALARS] == pytest.approx([getattr(a, name) for name in SCALARS])
    assert permutation[b.top] == a.top


def test_float32_input_is_computed_in_float64() -> None:
    log_probs = random_log_probs(4, 3).float()
    exact = choice_scores(log_probs.double(), [1] * 3)
    assert torch.equal(choice_scores(log_probs, [1] * 3).prob_L, exact.prob_L)
    assert exact.prob_L.dtype == torch.float64


def refused(log_probs: Tensor, lengths: list[int], message: str, temperature: float = 1.0) -> None:
    with pytest.raises(ValueError, match=message):
        choice_scores(log_probs, lengths, temperature=temperature)


def test_input_that_has_no_answer_is_refused() -> None:
    good = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])
    assert isinstance(choice_scores(good, [1, 2]), ChoiceScores)
    refused(good[0], [1, 2], r"log_probs must be \[K, L\] with K, L >= 1, got shape \(2,\)")
    refused(good[:0], [1, 2], r"got shape \(0, 2\)")
    refused(good[:, :0], [], r"got shape \(2, 0\)")
    refused(good, [1], r"at least 1 token for each of the 2 labels, got \[1\]")
    refused(good, [1, 0], r"at least 1 token for each of the 2 labels, got \[1, 0\]")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        refused(good, [1, 2], f"temperature is {temperature}; it must be a finite number above 0", temperature)
    refused(torch.tensor([[-1.0, -2.0], [-1.0, math.nan]]), [1, 2], r"log_probs\[1, 1\] is nan")
    refused(
        torch.tensor([[-1.0, 0.5]]), [1, 2], r"log_probs\[0, 1\] is 0.5; the log-probability of a label is at most 0"
    )
    refused(
        torch.tensor([[-1.0, -2.0], [-math.inf, -math.inf]]),
        [1, 2],
        "sample 1 gives each of the 2 labels probability 0",
    )
    assert choice_scores(torch.tensor([[1e-6, -20.0]]), [1, 1]).top == 0  # rounding of a certain label
