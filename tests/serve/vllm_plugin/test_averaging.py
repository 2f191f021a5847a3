"""credence.serve.vllm_plugin.averaging against closed forms and slow float64 loops."""

import math

import pytest
import torch
from torch import Tensor

from credence.serve.vllm_plugin.averaging import (
    ChoiceRule,
    average,
    calibrated_log_prob,
    choose_token,
    constraint,
    mean_log_normaliser,
    penalise,
)

K, V = 5, 37


def gangs(number: int, seed: int = 0, num_samples: int = K) -> Tensor:
    return 3 * torch.randn(number, num_samples, V, generator=torch.Generator().manual_seed(seed))


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-300).log()).sum(-1)


def test_average_is_the_log_of_the_mean_probability() -> None:
    logits = gangs(4)
    step = average(logits)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(step.scores.mean_log_probs.double(), p.mean(1).log(), rtol=0, atol=2e-6)
    torch.testing.assert_close(step.scores.total.double(), entropy(p.mean(1)), rtol=0, atol=5e-6)
    torch.testing.assert_close(step.scores.aleatoric.double(), entropy(p).mean(1), rtol=0, atol=5e-6)
    torch.testing.assert_close(step.member_log_probs.double(), p.log(), rtol=0, atol=2e-6)
    disagree = (p.argmax(-1) != p.mean(1).argmax(-1, keepdim=True)).double().mean(-1)
    assert step.scores.variation_ratio.double().tolist() == pytest.approx(disagree.tolist())
    assert step.scores.mean_log_probs.dtype == torch.float32


def test_records_add_up_and_stay_within_bounds() -> None:
    identical = gangs(1)[:, :1].expand(1, K, V)
    logits = torch.cat([gangs(200, seed=1), gangs(200, seed=2) * 8, torch.zeros(1, K, V), identical])
    step = average(logits)
    for record in step.record(step.scores.mean_log_probs.argmax(-1)):
        _, total, aleatoric, epistemic, ratio, *members = record
        assert total == pytest.approx(aleatoric + epistemic, abs=1e-6)
        assert 0 <= epistemic <= math.log(K) and 0 <= ratio <= 1 and len(members) == 3 * K


def test_records_of_several_tokens_of_some_gangs() -> None:
    step = average(gangs(3))
    tokens, rows = torch.tensor([4, 9, 4, 0]), torch.tensor([2, 0, 2, 2])
    records = step.record(tokens, rows)
    for record, token, row in zip(records, tokens.tolist(), rows.tolist(), strict=True):
        assert record == step.record(torch.full((3,), token))[row]
        assert record[0] == float(step.scores.mean_log_probs[row, token])
        assert record[5 : 5 + K] == step.member_log_probs[row, :, token].tolist()
        best = step.member_log_probs[row].max(-1)
        assert record[5 + K :] == [*best.indices.tolist(), *best.values.tolist()]


def test_top_lists_are_the_most_likely_tokens_in_order() -> None:
    step = average(gangs(3))
    mean = step.scores.mean_log_probs
    tokens, log_probs = step.top(4)
    for row in range(3):
        expected = sorted(range(V), key=lambda token: -float(mean[row, token]))[:4]
        assert tokens[row] == expected
        assert log_probs[row] == mean[row, expected].tolist()
    assert step.top(0) == ([[]] * 3, [[]] * 3)
    tokens, log_probs = step.top(V + 2)
    assert tokens[0][-2:] == [-1, -1] and log_probs[0][-2:] == [-math.inf] * 2
    assert sorted(tokens[0][:-2]) == list(range(V))


def test_a_constraint_is_what_was_added() -> None:
    raw = torch.tensor([1.0, -2.0, 0.5, -torch.inf, 3.0, -torch.inf])
    after = torch.tensor([1.0, -1.5, -torch.inf, -torch.inf, -97.0, -torch.inf])
    assert constraint(raw, after).tolist() == [0.0, 0.5, -math.inf, -math.inf, -100.0, -math.inf]


def test_certain_members_that_disagree_reach_the_largest_epistemic_score() -> None:
    logits = torch.full((1, 4, 4), -torch.inf)
    logits[0, range(4), range(4)] = 0.0
    step = average(logits)
    assert step.scores.epistemic.item() == pytest.approx(math.log(4))
    assert step.scores.aleatoric.item() == pytest.approx(0, abs=1e-6)
    assert step.scores.variation_ratio.item() == pytest.approx(0.75)


def test_one_member_is_its_own_average() -> None:
    step = average(gangs(3, num_samples=1))
    torch.testing.assert_close(step.scores.mean_log_probs, step.member_log_probs[:, 0])
    assert step.scores.epistemic.tolist() == [0, 0, 0] and step.scores.variation_ratio.tolist() == [0, 0, 0]


def test_masked_tokens_give_no_nan_and_are_never_chosen() -> None:
    logits = gangs(1)
    logits[:, :, ::2] = -torch.inf
    logits[:, 0, 1] = -torch.inf
    step = average(logits)
    assert not any(t.isnan().any() for t in (step.scores.mean_log_probs, step.scores.total, step.scores.epistemic))
    assert torch.isfinite(step.scores.mean_log_probs[0, 1])
    for number in range(300):
        rule = ChoiceRule(seed=number, temperature=5.0, top_p=0.999)
        assert int(choose_token(step.scores.mean_log_probs[0], rule, 0)) % 2 == 1


def test_a_gang_does_not_depend_on_the_others_bit_for_bit() -> None:
    logits = gangs(6)
    together = average(logits)
    for number in range(6):
        alone = average(logits[number : number + 1])
        assert torch.equal(alone.scores.mean_log_probs[0], together.scores.mean_log_probs[number])
        assert torch.equal(alone.scores.total[0], together.scores.total[number])
        assert torch.equal(alone.scores.epistemic[0], together.scores.epistemic[number])


def test_half_precision_logits_are_averaged_in_float32() -> None:
    logits = gangs(2).to(torch.bfloat16)
    torch.testing.assert_close(average(logits).scores.total, average(logits.float()).scores.total, rtol=0, atol=0)


def test_variation_ratio_is_deterministic_under_ties() -> None:
    logits = torch.zeros(1, 3, 5)
    assert {average(logits).scores.variation_ratio.item() for _ in range(5)} == {0.0}


def expected_distribution(log_probs: Tensor, rule: ChoiceRule) -> Tensor:
    """Temperature, min_p, top_k, top_p one token at a time, in float64."""
    p = (log_probs.double() / rule.temperature).softmax(-1)
    keep = p >= rule.min_p * p.max()
    if rule.top_k > 0:
        keep &= p >= p.sort(descending=True).values[min(rule.top_k, len(p)) - 1]
    p = torch.where(keep, p, 0.0)
    p = p / p.sum()
    if rule.top_p < 1:
        mass = 0.0
        kept = torch.zeros_like(p)
        for token in p.argsort(descending=True, stable=True).tolist():
            if mass >= rule.top_p:
                break
            kept[token], mass = p[token], mass + p[token].item()
        p = kept / kept.sum()
    return p


RULES = [
    ChoiceRule(seed=0, temperature=1.0),
    ChoiceRule(seed=0, temperature=0.6),
    ChoiceRule(seed=0, temperature=1.5, top_k=4),
    ChoiceRule(seed=0, temperature=1.0, top_p=0.8),
    ChoiceRule(seed=0, temperature=1.3, min_p=0.1),
    ChoiceRule(seed=0, temperature=1.2, top_k=9, top_p=0.9, min_p=0.02),
    ChoiceRule(seed=0, temperature=1.0, top_p=1e-9),
]


@pytest.mark.parametrize("rule", RULES)
def test_token_frequencies_match_the_closed_form(rule: ChoiceRule) -> None:
    log_probs = average(gangs(1, seed=3)).scores.mean_log_probs[0]
    p = expected_distribution(log_probs, rule)
    number = 4000
    tokens = [int(choose_token(log_probs, ChoiceRule(**{**fields(rule), "seed": s}), s % 7)) for s in range(number)]
    counts = torch.bincount(torch.tensor(tokens), minlength=V)
    assert counts[p == 0].sum() == 0, "a token outside the support was chosen"
    common = p * number >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = number * torch.cat([p[common], p[~common].sum()[None]])
    chi2 = ((observed - wanted) ** 2 / wanted.clamp_min(1)).sum().item()
    degrees = max(int(common.sum()), 1)
    # Wilson-Hilferty: the 1 - 1e-5 quantile of chi-square; the seeds are fixed, so this cannot flake.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.26 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi2 < limit


def fields(rule: ChoiceRule) -> dict[str, float]:
    return {name: getattr(rule, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def test_greedy_takes_the_most_likely_token_and_ignores_the_filters() -> None:
    log_probs = average(gangs(1)).scores.mean_log_probs[0]
    for rule in (ChoiceRule(seed=1), ChoiceRule(seed=2, temperature=9e-6, top_k=1, top_p=0.1, min_p=0.5)):
        assert int(choose_token(log_probs, rule, 3)) == int(log_probs.argmax())


def test_the_choice_is_a_function_of_seed_and_step() -> None:
    log_probs = average(gangs(1)).scores.mean_log_probs[0]
    hot = [ChoiceRule(seed=seed, temperature=20.0) for seed in (0, 1, 2**64 - 1)]
    tokens = [[int(choose_token(log_probs, rule, step)) for step in range(50)] for rule in hot]
    assert tokens == [[int(choose_token(log_probs, rule, step)) for step in range(50)] for rule in hot]
    assert len({tuple(row) for row in tokens}) == 3


def test_tiny_temperature_and_huge_logits_stay_finite() -> None:
    log_probs = torch.tensor([0.0, -1e-3, -1e4])
    assert int(choose_token(log_probs, ChoiceRule(seed=0, temperature=1.1e-5), 0)) == 0


def test_penalties_follow_the_slow_definition() -> None:
    logits = gangs(1, seed=9)[0, 0]
    rule = ChoiceRule(seed=0, presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.4)
    prompt, output = [1, 2, 3], [3, 4, 4, -1]
    expected = logits.clone()
    for token in {1, 2, 3, 4}:
        expected[token] = expected[token] / 1.4 if expected[token] > 0 else expected[token] * 1.4
    for token, count in ((3, 1), (4, 2)):
        expected[token] -= 0.2 * count + 0.3
    torch.testing.assert_close(penalise(logits, rule, prompt, output), expected)
    assert rule.penalised and not ChoiceRule(seed=0).penalised


def test_one_member_with_a_repetition_penalty_sees_its_own_logits() -> None:
    logits = gangs(1, num_samples=1)
    restored = average(logits).scores.mean_log_probs[0] + mean_log_normaliser(logits[0])
    torch.testing.assert_close(restored, logits[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("support", [(), (4, 1, 6)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.7])
def test_calibrated_log_prob_is_the_tempered_average(support: tuple[int, ...], temperature: float) -> None:
    """p_y^(1/T) / sum p^(1/T), over the support."""
    probabilities = torch.softmax(torch.randn(9, generator=torch.Generator().manual_seed(0)), -1).double()
    powered = probabilities ** (1 / temperature)
    tokens = support or tuple(range(9))
    for token in tokens:
        expected = powered[token] / sum(powered[other] for other in tokens)
        value = calibrated_log_prob(probabilities.log(), token, temperature, support)
        assert math.exp(value) == pytest.approx(float(expected), abs=1e-12)


def test_calibration_says_nothing_about_tokens_outside_its_support() -> None:
    assert math.isnan(calibrated_log_prob(torch.zeros(5).log_softmax(-1), 3, 1.0, (0, 1)))
