"""Sequential stopping: t quantiles against tables, the rules against the definitions, error rates by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from credence.adapters.adaptive import settled_choice, settled_flag, settled_threshold, stages, student_t_quantile

N = 32
LOOKS = 3  # of stages(32): 4, 8, 16
RULE = {"maximum": N, "confidence": 0.95, "looks": LOOKS}


def test_stages_double_up_to_the_maximum() -> None:
    assert stages(32) == (4, 8, 16, 32)
    assert stages(20) == (4, 8, 16, 20)
    assert stages(10, minimum=3) == (3, 6, 10)
    assert stages(5) == (4, 5)
    assert stages(4) == (4,) and stages(1) == (1,)


@pytest.mark.parametrize(("maximum", "minimum"), [(0, 4), (8, 1), (8, 0)])
def test_impossible_stages_are_refused(maximum: int, minimum: int) -> None:
    with pytest.raises(ValueError, match=f"maximum >= 1 and minimum >= 2, got maximum={maximum} and minimum={minimum}"):
        stages(maximum, minimum)


# Upper quantiles as printed in tables of Student's distribution.
TABLE = {
    (0.025, 1): 12.706, (0.05, 2): 2.920, (0.05, 3): 2.353, (0.005, 3): 5.841, (0.05, 4): 2.132, (0.01, 5): 3.365, (0.01, 7): 2.998,
    (0.025, 9): 2.262, (0.01, 10): 2.764, (0.025, 15): 2.131, (0.0005, 30): 3.646, (0.025, 60): 2.000, (0.1, 120): 1.289,
}  # fmt: skip


@pytest.mark.parametrize(("tail", "dof"), list(TABLE))
def test_t_quantiles_equal_the_tables(tail: float, dof: int) -> None:
    assert student_t_quantile(tail, dof) == pytest.approx(TABLE[tail, dof], abs=5.1e-4)


@pytest.mark.parametrize("tail", [0.4, 0.05, 0.05 / 3, 1e-3, 1e-5])
def test_t_quantiles_equal_closed_forms_and_scipy(tail: float) -> None:
    assert student_t_quantile(tail, 1) == pytest.approx(math.tan(math.pi * (0.5 - tail)), rel=1e-9)
    assert student_t_quantile(tail, 2) == pytest.approx((1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail)), rel=1e-9)
    for dof in (3, 4, 7, 15, 31, 100, 255):
        assert student_t_quantile(tail, dof) == pytest.approx(float(stats.t.isf(tail, dof)), rel=1e-8)


@pytest.mark.parametrize(("tail", "dof"), [(0.0, 3), (0.5, 3), (-0.1, 3), (0.05, 0)])
def test_t_quantiles_outside_their_range_are_refused(tail: float, dof: int) -> None:
    with pytest.raises(ValueError, match=f"got tail={tail} and dof={dof}"):
        student_t_quantile(tail, dof)


def test_the_difference_of_two_means_has_the_standard_error_of_the_rule() -> None:
    """Var(mean of n - mean of N) = S^2 (N - n) / (N n) over all samples without replacement; here one population, many orders."""
    rng = np.random.default_rng(1)
    population = rng.beta(2, 5, N)
    orders = rng.permuted(np.tile(population, (40_000, 1)), axis=1)
    for n in (4, 16):
        deviations = orders[:, :n].mean(1) - population.mean()
        expected = population.std(ddof=1) * math.sqrt((N - n) / (N * n))
        assert deviations.std() == pytest.approx(expected, rel=0.02)


def critical_gap(values: NDArray[np.float64], tail: float, bound: float | None) -> float:
    """The right side of the rule, from its definition."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    share = math.log(1 / 0.05) / math.log(10) / (n + 1)
    reserve = 0.0 if bound is None else (N - n) / N * abs(mean - bound) * share
    return float(stats.t.isf(tail, n - 1)) * math.sqrt(variance * (N - n) / (N * n)) + reserve


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("bounded", [True, False])
def test_the_threshold_test_turns_at_its_critical_value(n: int, side: int, bounded: bool) -> None:
    values = np.random.default_rng(n).uniform(0.45, 0.55, n)
    bounds = (0.0, 1.0) if bounded else (-math.inf, math.inf)
    bound = (0.0 if side > 0 else 1.0) if bounded else None
    gap = critical_gap(values, 0.05 / LOOKS, bound)
    rule = {**RULE, "lower": bounds[0], "upper": bounds[1]}
    assert settled_threshold(values, values.mean() - side * gap * 1.0001, **rule)
    assert not settled_threshold(values, values.mean() - side * gap * 0.9999, **rule)


@pytest.mark.parametrize("n", [4, 8])
def test_the_choice_test_compares_the_top_with_every_other_label(n: int) -> None:
    """Against the rule written out for each pair, near its critical value: moving one label's mean turns the decision."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.02, (n, 4))
    outcomes = set()
    for shift in np.linspace(0.0, 1.2, 300):
        q = np.array([0.30 + shift, 0.30, 0.25, 0.15]) + noise
        q /= q.sum(1, keepdims=True)
        expected = all(
            (q[:, 0] - q[:, label]).mean() > critical_gap(q[:, 0] - q[:, label], 0.05 / LOOKS / 3, -1.0)
            for label in (1, 2, 3)
        )
        assert settled_choice(q, **RULE) == (expected and q.mean(0).argmax() == 0)
        outcomes.add(expected)
    assert outcomes == {True, False}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.sampled_from([1, 2, 4, 6, 8, 11, 12]))
def test_what_cannot_change_is_settled_and_only_that_before_the_minimum(data: st.DataObject, n: int) -> None:
    """For n < minimum the rule must equal: no completion of the values within the bounds moves the mean across the threshold."""
    values = data.draw(st.lists(st.integers(0, 20).map(lambda i: i / 20), min_size=n, max_size=n))
    threshold = data.draw(st.integers(0, 20)) / 20 + 0.013
    lowest, highest = sum(values) / 12, (sum(values) + 12 - n) / 12
    certain = lowest > threshold or highest < threshold or n == 12
    rule = {"maximum": 12, "confidence": 0.95, "looks": 2}
    assert settled_threshold(values, threshold, **rule, minimum=13) == certain
    if certain:
        assert settled_threshold(values, threshold, **rule)


def test_a_choice_that_cannot_change_is_settled_before_the_minimum() -> None:
    rule = {"maximum": 12, "confidence": 0.95, "looks": 2, "minimum": 12}
    votes = np.eye(3)[[0] * 6 + [1]]  # 6 against 1, 5 unseen: at worst 6 against 6
    assert not settled_choice(votes, **rule)
    assert settled_choice(np.eye(3)[[0] * 7], **rule)  # 7 against 0, 5 unseen
    assert not settled_choice(np.eye(3)[[0] * 6], **rule)  # at worst a tie
    assert settled_choice([[1.0]], **rule)  # one label has no rival


def test_equal_values_are_settled_from_the_minimum_on_and_a_tie_never() -> None:
    assert not settled_threshold([0.7] * 3, 0.5, **RULE)
    assert settled_threshold([0.7] * 4, 0.5, **RULE)
    assert not settled_threshold([0.7] * 7, 0.5, **RULE, minimum=8)
    assert not settled_threshold([0.5] * 16, 0.5, **RULE)
    assert not settled_choice([[0.5, 0.5, 0.0]] * 16, **RULE)
    assert settled_choice([[0.7, 0.3]] * 4, **RULE) and not settled_choice([[0.7, 0.3]] * 3, **RULE)


def test_all_samples_are_always_enough() -> None:
    assert settled_threshold([0.5] * 32, 0.5, **RULE)
    assert settled_choice([[0.5, 0.5]] * 32, **RULE)
    assert settled_flag(lambda indices: math.nan, 32, 0.5, **RULE)
    assert settled_threshold([0.5], 0.5, maximum=1, confidence=0.95, looks=0)


def test_more_confidence_looks_or_labels_ask_for_more() -> None:
    values = [0.60, 0.62, 0.58, 0.64, 0.61, 0.57, 0.63, 0.59]

    def gap_needed(confidence: float, looks: int) -> float:
        grid = np.linspace(0, 0.59, 600)
        rule = {"maximum": N, "confidence": confidence, "looks": looks}
        return 0.605 - max(threshold for threshold in grid if settled_threshold(values, float(threshold), **rule))

    assert gap_needed(0.9, 3) < gap_needed(0.95, 3) < gap_needed(0.99, 3)
    assert gap_needed(0.95, 1) < gap_needed(0.95, 3)
    pair = np.random.default_rng(5).normal(0, 0.1, 8)
    two = np.stack([0.70 + pair, 0.30 - pair], axis=1)
    spread_thin = np.concatenate([two, np.zeros((8, 200))], axis=1)
    assert settled_choice(two, **RULE) and not settled_choice(spread_thin, **RULE)


def test_the_jackknife_of_a_mean_is_the_rule_for_values() -> None:
    rng = np.random.default_rng(7)
    outcomes = []
    for n in (4, 8, 16):
        for values in rng.uniform(0.5, 0.95, (100, n)):
            expected = settled_threshold(values, 0.5, **RULE)
            assert settled_flag(lambda i, x=values: float(x[i].mean()), n, 0.5, **RULE) == expected
            outcomes.append(expected)
    assert 30 < sum(outcomes) < 270


def test_the_jackknife_of_a_square_by_hand() -> None:
    """f = mean^2 has the pseudo-values n m^2 - (n m - x_i)^2 / (n - 1) and a bias of -s^2/n towards the limit's square."""
    values = np.array([0.3, 0.5, 0.6, 0.9, 0.4, 0.8, 0.7, 0.6])
    n, m = 8, values.mean()
    pseudo = n * m**2 - (n * m - values) ** 2 / (n - 1)
    assert pseudo.mean() == pytest.approx(m**2 - values.var(ddof=1) / n)  # unbiased for the square of the limit
    estimate = m**2 - (1 - n / N) * values.var(ddof=1) / n
    se = pseudo.std(ddof=1) * math.sqrt((N - n) / (N * n))
    reserve = (N - n) / N * estimate * math.log10(20) / (n + 1)
    gap = float(stats.t.isf(0.05 / LOOKS, n - 1)) * se + reserve

    def square(indices: NDArray[np.intp]) -> float:
        return float(values[indices].mean()) ** 2

    assert settled_flag(square, n, estimate - gap - 1e-6, **RULE)
    assert not settled_flag(square, n, estimate - gap + 1e-6, **RULE)


def test_a_statistic_that_is_not_finite_is_never_settled_early() -> None:
    assert not settled_flag(lambda i: -math.inf, 8, 0.5, **RULE)
    assert not settled_flag(lambda i: 0.9 if 0 in i else -math.inf, 8, 0.5, **RULE)
    assert settled_flag(lambda i: 0.9, 8, 0.5, **RULE)
    assert not settled_flag(lambda i: 0.9, 3, 0.5, **RULE)
    with pytest.raises(ValueError, match="statistic of 8 samples or of 7 of them is NaN"):
        settled_flag(lambda i: math.nan if len(i) == 7 else 0.9, 8, 0.5, **RULE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": 0.5}, "confidence is 0.5; it must be above 0.5 and below 1"),
        ({"confidence": 1.0}, "confidence is 1.0; it must be above 0.5"),
        ({"confidence": math.nan}, "confidence is nan"),
        ({"maximum": 7}, "8 samples were seen; it must be 1 to maximum = 7"),
        ({"minimum": 1}, "minimum is 1; a standard deviation needs at least 2"),
        ({"looks": 0}, "looks is 0, but n = 8 of 32 is one"),
        ({"looks": -1, "maximum": 8}, "looks is -1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    rule = {**RULE, **change}
    calls: list[Callable[[], bool]] = [
        lambda: settled_threshold([0.6] * 8, 0.5, **rule),
        lambda: settled_choice([[0.6, 0.4]] * 8, **rule),
        lambda: settled_flag(lambda i: 0.6, 8, 0.5, **rule),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_values_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"within \[0.0, 1.0\], got \[0.2, 1.5\]"):
        settled_threshold([0.2, 1.5], 0.5, **RULE)
    assert settled_threshold([1.5, 1.6, 1.5, 1.6], 0.5, **RULE, upper=2)
    with pytest.raises(ValueError, match="finite and within"):
        settled_threshold([0.2, math.nan], 0.5, **RULE)
    with pytest.raises(ValueError, match=r"values must be \[n\], got shape \(1, 2\)"):
        settled_threshold([[0.2, 0.3]], 0.5, **RULE)
    with pytest.raises(ValueError, match="0 samples were seen"):
        settled_threshold([], 0.5, **RULE)
    for rows in ([[0.6, 0.6]], [[1.2, -0.2]], [[math.nan, 0.4]]):
        with pytest.raises(ValueError, match="every row of q must be a distribution over the 2 labels"):
            settled_choice(rows, **RULE)
    with pytest.raises(ValueError, match=r"q must be \[n, L\] with L >= 1, got shape \(2,\)"):
        settled_choice([0.5, 0.5], **RULE)


def simulate(
    population: NDArray[np.float64],
    settled: Callable[[NDArray[np.float64]], bool],
    decide: Callable[[NDArray[np.float64]], object],
) -> tuple[float, float]:
    """The share of trials [trials, N, ...] whose decision at the stop is not that of all N samples, and the mean n at the stop."""
    changed, used = 0, 0
    for trial in population:
        n = next(n for n in stages(N) if settled(trial[:n]))
        changed += decide(trial[:n]) != decide(trial)
        used += n
    return changed / len(population), used / len(population)


def allowed(confidence: float, trials: int) -> float:
    """1 - confidence and two binomial standard errors; the seeds are fixed."""
    return 1 - confidence + 2 * math.sqrt(confidence * (1 - confidence) / trials)


TRIALS = 500


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("concentration", [0.5, 2.0, 20.0])
def test_threshold_decisions_are_those_of_all_samples(concentration: float, confidence: float) -> None:
    """Beta(mean c, (1 - mean) c) values, U-shaped for c = 0.5; means beside each threshold, where decisions are hard."""
    rng = np.random.default_rng(11)
    rule = {**RULE, "confidence": confidence}
    for threshold in (0.5, 0.9):
        for mean in (threshold - 0.05, threshold, threshold + 0.05):
            values = rng.beta(mean * concentration, (1 - mean) * concentration, (TRIALS, N))
            changed, _ = simulate(
                values,
                lambda x, t=threshold: settled_threshold(x, t, **rule),
                lambda x, t=threshold: x.mean() > t,
            )
            assert changed <= allowed(confidence, TRIALS), (threshold, mean)


def test_the_reserve_is_what_protects_a_threshold_near_a_bound() -> None:
    """Beta(0.86, 0.14) against 0.9: four values near 1 say nothing of those near 0. Without bounds the plain t-test is misled."""
    values = np.random.default_rng(13).beta(0.86, 0.14, (2 * TRIALS, N))

    def decide(x: NDArray[np.float64]) -> bool:
        return bool(x.mean() > 0.9)

    plain, _ = simulate(values, lambda x: settled_threshold(x, 0.9, **RULE, lower=-math.inf, upper=math.inf), decide)
    guarded, _ = simulate(values, lambda x: settled_threshold(x, 0.9, **RULE), decide)
    assert plain > 0.12
    assert guarded <= allowed(0.95, 2 * TRIALS)


def test_easy_thresholds_stop_early_and_hard_ones_do_not() -> None:
    rng = np.random.default_rng(17)

    def used(mean: float, concentration: float) -> float:
        values = rng.beta(mean * concentration, (1 - mean) * concentration, (TRIALS, N))
        return simulate(values, lambda x: settled_threshold(x, 0.5, **RULE), lambda x: x.mean() > 0.5)[1]

    assert used(0.9, 50) < 4.5
    assert used(0.8, 10) < 10
    assert used(0.5, 10) > 28


def dirichlet(rng: np.random.Generator, mean: list[float], concentration: float) -> NDArray[np.float64]:
    return rng.dirichlet(np.array(mean) * concentration, (TRIALS, N))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("concentration", [0.5, 2.0, 20.0])
def test_choices_are_those_of_all_samples(concentration: float, confidence: float) -> None:
    rng = np.random.default_rng(19)
    rule = {**RULE, "confidence": confidence}
    for mean in ([0.5, 0.5], [0.56, 0.44], [0.35, 0.33, 0.32], [0.45, 0.35, 0.1, 0.1]):
        q = dirichlet(rng, mean, concentration)
        changed, _ = simulate(q, lambda x: settled_choice(x, **rule), lambda x: int(x.mean(0).argmax()))
        assert changed <= allowed(confidence, TRIALS), mean


def test_skewed_differences_are_no_trap_for_choices() -> None:
    """Most samples prefer label 0 a little, some label 1 by far, so that the averages are nearly equal."""
    rng = np.random.default_rng(23)
    dissent = rng.random((TRIALS, N, 1)) < 0.2
    q = np.where(dissent, dirichlet(rng, [0.2, 0.8], 20), dirichlet(rng, [0.57, 0.43], 100))
    changed, _ = simulate(q, lambda x: settled_choice(x, **RULE), lambda x: int(x.mean(0).argmax()))
    assert changed <= allowed(0.95, TRIALS)


def test_votes_are_settled_as_the_votes_of_all_samples() -> None:
    """One-hot rows, for the modal answer of independent completions."""
    rng = np.random.default_rng(29)
    for share in (0.5, 0.6, 0.8):
        votes = np.eye(3)[rng.choice(3, (TRIALS, N), p=[share, 0.9 * (1 - share), 0.1 * (1 - share)])]
        changed, _ = simulate(votes, lambda x: settled_choice(x, **RULE), lambda x: int(x.mean(0).argmax()))
        assert changed <= allowed(0.95, TRIALS), share


def test_an_answer_not_given_yet_is_a_rival_too() -> None:
    """Four equal votes: an unknown rival may have log10(1000) / 5 of the 28 unseen ones, which turns 4 + 28 (1 - 2 * 0.6)."""
    strict = {**RULE, "confidence": 0.999}
    assert settled_choice([[1.0]] * 4, **strict)
    assert not settled_choice([[1.0, 0.0]] * 4, **strict)
    assert settled_choice([[1.0, 0.0]] * 4, **RULE)


def test_easy_choices_stop_early_and_hard_ones_do_not() -> None:
    rng = np.random.default_rng(31)

    def used(mean: list[float], concentration: float) -> float:
        q = dirichlet(rng, mean, concentration)
        return simulate(q, lambda x: settled_choice(x, **RULE), lambda x: int(x.mean(0).argmax()))[1]

    assert used([0.9, 0.1], 50) < 4.5
    assert used([0.7, 0.1, 0.1, 0.1], 20) < 10
    assert used([0.5, 0.5], 20) > 28


@pytest.mark.parametrize("concentration", [1.0, 5.0, 50.0])
def test_flags_of_nonlinear_statistics_are_those_of_all_samples(concentration: float) -> None:
    """The confidence of a text of three tokens, exp(mean_t ln mean_k p_k), and a tempered probability of one of two labels."""
    rng = np.random.default_rng(37)
    trials = 400

    def geometric(p: NDArray[np.float64]) -> float:
        return math.exp(float(np.log(p.mean(0)).mean()))

    def tempered(p: NDArray[np.float64]) -> float:
        q = float(p[:, 0].mean())
        return q**0.5 / (q**0.5 + (1 - q) ** 0.5)

    for statistic, shift in ((geometric, 0.0), (geometric, 0.05), (tempered, 0.0)):
        for centre in (0.5, 0.8):
            threshold = centre if statistic is geometric else centre**0.5 / (centre**0.5 + (1 - centre) ** 0.5)
            mean = centre + shift
            p = rng.beta(mean * concentration, (1 - mean) * concentration, (trials, N, 3))
            changed, _ = simulate(
                p,
                lambda x, f=statistic, t=threshold: settled_flag(lambda i: f(x[i]), len(x), t, **RULE),
                lambda x, f=statistic, t=threshold: f(x) > t,
            )
            assert changed <= allowed(0.95, trials), (statistic.__name__, centre, shift)


def test_easy_flags_stop_early_and_hard_ones_do_not() -> None:
    rng = np.random.default_rng(41)

    def used(mean: float) -> float:
        p = rng.beta(mean * 30, (1 - mean) * 30, (300, N, 3))
        return simulate(
            p,
            lambda x: settled_flag(lambda i: float(np.exp(np.log(x[i].mean(0)).mean())), len(x), 0.6, **RULE),
            lambda x: bool(np.exp(np.log(x.mean(0)).mean()) > 0.6),
        )[1]

    assert used(0.9) < 5
    assert used(0.6) > 26


def test_a_projection_asks_the_same_question_for_more_samples_like_those_seen() -> None:
    """Values of known mean and spread: settled at n exactly where the written-out criterion says so with n in the place of the 4 seen."""
    values = np.array([0.62, 0.5, 0.58, 0.66])
    gap, spread, maximum, confidence, looks = values.mean() - 0.5, values.std(ddof=1), 32, 0.95, 3

    def flag(n: int | None) -> bool:
        return settled_flag(
            lambda samples: float(values[samples].mean()), 4, 0.5, maximum=maximum, confidence=confidence, looks=looks, projected_n=n
        )  # fmt: skip

    expected = {}
    for n in (4, 8, 16):
        share = (maximum - n) / maximum
        reserve = share * (values.mean() - 0.0) * min(1.0, math.log10(1 / (1 - confidence)) / (n + 1))
        error = spread * math.sqrt(share / n)
        expected[n] = bool(gap > student_t_quantile((1 - confidence) / looks, n - 1) * error + reserve)
    assert expected == {4: False, 8: False, 16: True}
    assert {n: flag(n) for n in expected} == expected
    assert flag(None) == flag(4)
    assert flag(32)
    for n in (3, 33):
        with pytest.raises(ValueError, match="projected_n"):
            flag(n)
