"""Scores against slow float64 loops and closed forms, and the bounds that hold for every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credence.adapters.uncertainty import sequence_scores, token_scores, truncated_token_scores


def slow_scores(log_probs_KV: Tensor) -> tuple[list[float], float, float, float, float]:
    """The definitions, one number at a time: average, total, aleatoric, epistemic, variation ratio."""
    members = [[math.exp(x) for x in row] for row in log_probs_KV.double().tolist()]
    k = len(members)
    average = [sum(column) / k for column in zip(*members, strict=True)]

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    total = entropy(average)
    aleatoric = sum(entropy(member) for member in members) / k
    # the mutual information as a mean divergence from the average, not as the difference of the two entropies
    epistemic = (
        sum(sum(x * math.log(x / a) for x, a in zip(member, average, strict=True) if x > 0) for member in members) / k
    )
    best = average.index(max(average))
    return average, total, aleatoric, epistemic, sum(member.index(max(member)) != best for member in members) / k


@st.composite
def member_log_probs(draw: st.DrawFn, max_k: int = 6, max_v: int = 9) -> Tensor:
    """[K, V] float64 log-probabilities: spread out, near one-hot, and with impossible tokens."""
    k, v = draw(st.integers(1, max_k)), draw(st.integers(1, max_v))
    scale = draw(st.sampled_from([0.0, 1.0, 10.0, 200.0]))
    logits = torch.tensor(
        draw(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=v, max_size=v), min_size=k, max_size=k)),
        dtype=torch.float64,
    )
    masked = torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=v, max_size=v), min_size=k, max_size=k)), dtype=torch.bool
    )
    masked[masked.all(dim=1)] = False
    return torch.log_softmax((scale * logits).masked_fill(masked, -math.inf), dim=-1)


def random_log_probs(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


@pytest.mark.parametrize(("k", "v"), [(1, 1), (1, 7), (2, 3), (8, 50), (32, 5)])
def test_scores_equal_a_slow_loop(k: int, v: int) -> None:
    log_probs = random_log_probs(k, v)
    log_probs[0, 0] = -math.inf if v > 1 else 0.0
    log_probs = torch.log_softmax(log_probs, dim=-1)
    average, total, aleatoric, epistemic, ratio = slow_scores(log_probs)
    scores = token_scores(log_probs)
    torch.testing.assert_close(scores.mean_log_probs.exp(), torch.tensor(average, dtype=torch.float64))
    assert float(scores.total) == pytest.approx(total, abs=1e-12)
    assert float(scores.aleatoric) == pytest.approx(aleatoric, abs=1e-12)
    assert float(scores.epistemic) == pytest.approx(epistemic, abs=1e-12)
    assert float(scores.variation_ratio) == pytest.approx(ratio)


def test_float32_on_a_large_vocabulary_is_close_enough() -> None:
    log_probs = random_log_probs(8, 32_000, dtype=torch.float32)
    exact, rounded = token_scores(log_probs.double()), token_scores(log_probs)
    assert rounded.total.dtype == torch.float32
    for name in ("total", "aleatoric", "epistemic"):
        assert float(getattr(rounded, name)) == pytest.approx(float(getattr(exact, name)), abs=2e-5)


@settings(max_examples=100, deadline=None)
@given(log_probs=member_log_probs())
def test_the_decomposition_and_its_bounds(log_probs: Tensor) -> None:
    k, v = log_probs.shape
    scores = token_scores(log_probs)
    _, total, aleatoric, epistemic, _ = slow_scores(log_probs)
    assert float(scores.total) == pytest.approx(total, abs=1e-9)
    assert float(scores.epistemic) == pytest.approx(epistemic, abs=1e-9)
    assert float(scores.aleatoric) == pytest.approx(aleatoric, abs=1e-9)
    assert float(scores.aleatoric + scores.epistemic) == pytest.approx(float(scores.total), abs=1e-15)
    assert 0 <= float(scores.epistemic) <= math.log(k)
    assert -1e-12 <= float(scores.aleatoric)
    assert -1e-12 <= float(scores.total) <= math.log(v) + 1e-12
    assert 0 <= float(scores.variation_ratio) <= 1
    assert float(scores.mean_log_probs.exp().sum()) == pytest.approx(1)


@settings(max_examples=100, deadline=None)
@given(log_probs=member_log_probs())
def test_float32_rounding_never_leaves_the_bounds(log_probs: Tensor) -> None:
    scores = token_scores(log_probs.float())
    assert 0 <= float(scores.epistemic) <= float(torch.tensor(math.log(log_probs.shape[0])))
    assert math.isfinite(float(scores.total)) and math.isfinite(float(scores.aleatoric))


def test_one_sample_has_no_epistemic_part() -> None:
    log_probs = random_log_probs(4, 1, 11)
    scores = token_scores(log_probs)
    assert scores.epistemic.tolist() == [0.0] * 4
    assert torch.equal(scores.aleatoric, scores.total)
    assert scores.variation_ratio.tolist() == [0.0] * 4


def test_identical_samples_agree() -> None:
    scores = token_scores(random_log_probs(1, 20).expand(8, 20))
    assert float(scores.epistemic) == pytest.approx(0, abs=1e-12)
    assert float(scores.variation_ratio) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 8, 32])
def test_disjoint_certain_samples_reach_ln_k(k: int, dtype: torch.dtype) -> None:
    """K one-hot distributions on K tokens: all of the uncertainty is epistemic, ln K; all but one sample dissent."""
    scores = token_scores(torch.eye(k, k + 2, dtype=dtype).log())
    assert float(scores.epistemic) == pytest.approx(math.log(k), abs=1e-6)
    assert float(scores.epistemic) <= float(torch.tensor(math.log(k), dtype=dtype))
    assert float(scores.aleatoric) == pytest.approx(0, abs=1e-6)
    assert float(scores.variation_ratio) == pytest.approx((k - 1) / k)


def test_permuting_the_draws_changes_nothing() -> None:
    log_probs = random_log_probs(8, 40)
    for seed in range(5):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        a, b = token_scores(log_probs), token_scores(log_probs[order])
        torch.testing.assert_close(a.mean_log_probs, b.mean_log_probs)
        for name in ("total", "aleatoric", "epistemic", "variation_ratio"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name))


def test_batch_dimensions_are_independent() -> None:
    log_probs = random_log_probs(2, 3, 4, 10)
    scores = token_scores(log_probs)
    assert scores.total.shape == (2, 3) and scores.mean_log_probs.shape == (2, 3, 10)
    for i in range(2):
        for j in range(3):
            single = token_scores(log_probs[i, j])
            for name in ("mean_log_probs", "total", "aleatoric", "epistemic", "variation_ratio"):
                torch.testing.assert_close(getattr(scores, name)[i, j], getattr(single, name))


def test_probabilities_are_averaged_never_logits() -> None:
    """Averaged logits would give 0.909 for the first token."""
    scores = token_scores(torch.tensor([[0.99, 0.01], [0.5, 0.5]], dtype=torch.float64).log())
    assert scores.mean_log_probs.exp().tolist() == pytest.approx([0.745, 0.255])


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 0)])
def test_missing_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"log_probs must be \[\.\.\., K, V\] with K, V >= 1, got shape"):
        token_scores(torch.zeros(shape))


@settings(max_examples=100, deadline=None)
@given(log_probs=member_log_probs(), data=st.data())
def test_truncated_scores_are_lower_bounds(log_probs: Tensor, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, log_probs.shape[1]))
    full = token_scores(log_probs)
    scores, tail = truncated_token_scores(log_probs[:, :m])
    assert float(scores.total) <= float(full.total) + 1e-9
    assert float(scores.epistemic) <= float(full.epistemic) + 1e-9
    assert float(tail) == pytest.approx(float(log_probs[:, m:].exp().sum(-1).mean()), abs=1e-9)
    assert 0 <= float(tail) <= 1
    assert scores.mean_log_probs.shape == (m + 1,)
    assert float(scores.mean_log_probs[-1].exp()) == pytest.approx(float(tail), abs=1e-12)


def test_truncation_to_the_whole_vocabulary_is_no_truncation() -> None:
    log_probs = random_log_probs(3, 6, 12)
    full = token_scores(log_probs)
    scores, tail = truncated_token_scores(log_probs)
    assert float(tail.abs().max()) < 1e-14
    for name in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(scores, name), getattr(full, name), rtol=0, atol=1e-12)


def test_disagreement_inside_the_tail_is_not_seen() -> None:
    """Two samples that agree on the kept token and differ beyond it: the truncated epistemic score is 0, the full one is not."""
    members = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64).log()
    scores, tail = truncated_token_scores(members[:, :1])
    assert float(scores.epistemic) == pytest.approx(0, abs=1e-12)
    assert float(tail) == pytest.approx(0.5)
    assert float(token_scores(members).epistemic) == pytest.approx(0.5 * math.log(2))


def test_sequence_scores_by_hand() -> None:
    """T = 2 tokens, K = 2 samples."""
    scores = sequence_scores(
        log_prob_T=torch.tensor([-0.5, -1.5]),
        total_T=torch.tensor([0.4, 1.0]),
        epistemic_T=torch.tensor([0.3, 0.1]),
        variation_ratio_T=torch.tensor([0.0, 0.5]),
        member_log_probs_TK=torch.tensor([[-0.4, -0.6], [-1.0, -3.0]]),
    )
    assert scores.num_tokens == 2
    assert scores.total == pytest.approx(0.7)
    assert scores.epistemic == pytest.approx(0.2)
    assert scores.aleatoric == pytest.approx(0.5)
    assert scores.total == pytest.approx(scores.aleatoric + scores.epistemic, abs=1e-15)
    assert (scores.max_total, scores.max_epistemic) == pytest.approx((1.0, 0.3))
    assert scores.mean_logprob == pytest.approx(-1.0)
    # means of the samples: -0.7 and -1.8; population standard deviation of two values is half their distance
    assert scores.logprob_std == pytest.approx(0.55)
    assert scores.variation_ratio == pytest.approx(0.25)


def uniform_sequence(members: Tensor) -> dict[str, Tensor]:
    zeros = torch.zeros(members.shape[0])
    return {
        "log_prob_T": zeros,
        "total_T": zeros,
        "epistemic_T": zeros,
        "variation_ratio_T": zeros,
        "member_log_probs_TK": members,
    }


def test_the_spread_of_one_sample_is_zero_and_of_an_impossible_token_infinite() -> None:
    assert sequence_scores(**uniform_sequence(torch.tensor([[-0.3], [-2.0]]))).logprob_std == 0
    assert sequence_scores(**uniform_sequence(torch.tensor([[-math.inf], [-2.0]]))).logprob_std == 0
    assert sequence_scores(**uniform_sequence(torch.tensor([[-0.3, -math.inf], [-1.0, -2.0]]))).logprob_std == math.inf


def test_a_sequence_without_tokens_or_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one token, got lengths \[0\]"):
        sequence_scores(**uniform_sequence(torch.zeros(0, 4)))
    with pytest.raises(ValueError, match=r"one value per token .* got lengths \[2, 3\]"):
        sequence_scores(**{**uniform_sequence(torch.zeros(3, 4)), "total_T": torch.zeros(2)})
