"""Sequential stopping: fewer samples than N where the decision over all N is settled (docs/equations.md, section 12).

The samples 0..N-1 of a seed are a fixed finite population, seen in stages of n = 4, 8, 16, ..., N. What all N would decide is the sign of
the mean of N values, and after n of them it is settled when it could change only with probability 1 - confidence, or not at all.

Assumptions, and where they fail:

- Exchangeable samples. Draws of one posterior under one seed are; values sorted or chosen by the caller are not.
- The t-test takes the values as normal; it is then exact for one look, and Bonferroni over looks and comparisons makes it conservative.
- Few, extreme samples not yet seen are what breaks a t-test of four values: near a bound, with a long tail to the other side, it changed
  up to 45 % of hard decisions. The reserve for unseen values (settled_threshold) is there for them. With it the rate of changed decisions
  stayed below 1 - confidence for Beta and Dirichlet distributed probabilities, U-shaped ones included, at confidence 0.9 to 0.99, also
  where the mean of all lies beside the threshold. It is no guarantee: for values that are only 0 or 1 and a threshold of 0.7 the rate can
  reach 0.10 at confidence 0.95. Raise ``minimum`` where such values are expected.

Shape suffixes: n samples seen, L labels. No unit is assumed; means, thresholds and bounds share the values' unit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

# What rounding may add to a probability or to a sum of them.
_ROUNDING = 1e-4


def stages(maximum: int, minimum: int = 4) -> tuple[int, ...]:
    """Gives the numbers of samples after which a decision is looked at: minimum, its doublings below maximum, maximum.

    Only the stages before the last are looks of a test: ``looks = len(stages(maximum)) - 1``.

    Raises:
        ValueError: unless maximum >= 1 and minimum >= 2.
    """
    if maximum < 1 or minimum < 2:
        raise ValueError(f"stages need maximum >= 1 and minimum >= 2, got maximum={maximum} and minimum={minimum}")
    counts = []
    n = minimum
    while n < maximum:
        counts.append(n)
        n *= 2
    return (*counts, maximum)


@lru_cache(maxsize=4096)
def student_t_quantile(tail: float, dof: int) -> float:
    """Computes t with P(T > t) = tail for Student's t with a whole number of degrees of freedom.

    The distribution function is a finite trigonometric series in theta = atan(t / sqrt(dof)) (Abramowitz and Stegun, 1964, eqs. 26.7.3 and
    26.7.4); it is inverted by bisection in theta, to the last bit.

    Raises:
        ValueError: unless 0 < tail < 0.5 and dof >= 1.
    """
    if not 0 < tail < 0.5 or dof < 1:
        raise ValueError(f"the t quantile needs 0 < tail < 0.5 and dof >= 1, got tail={tail} and dof={dof}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if (1 - _central_probability(middle, dof)) / 2 > tail:
            low = middle
        else:
            high = middle
    return math.sqrt(dof) * math.tan(low)


def _central_probability(theta: float, dof: int) -> float:
    """P(|T| <= sqrt(dof) tan theta)."""
    cosine, odd = math.cos(theta), dof % 2
    # dof even: 1 + 1/2 c^2 + (1 3)/(2 4) c^4 + ...; dof odd: c + 2/3 c^3 + (2 4)/(3 5) c^5 + ...
    term, series = (cosine if odd else 1.0), 0.0
    for i in range(1 + odd, dof, 2):
        series += term
        term *= i / (i + 1) * cosine * cosine
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * series)
    return math.sin(theta) * series


def settled_threshold(
    values_n: ArrayLike,
    threshold: float,
    *,
    maximum: int,
    confidence: float,
    looks: int,
    minimum: int = 4,
    lower: float = 0.0,
    upper: float = 1.0,
) -> bool:
    """Says whether it is settled on which side of a threshold the mean of all ``maximum`` values lies.

    With m and s the mean and standard deviation of the n values seen, N = maximum and b the bound on the threshold's other side, it is if
    n = N, if the mean stays on its side with every unseen value at b, or if n >= minimum and

        |m - threshold| > t s sqrt((N - n) / (N n)) + w |m - b| (N - n) / N,   P(T_{n-1} > t) = (1 - confidence) / looks

    The root is the standard error of the difference of the two means under sampling without replacement (Cochran, 1977, sec. 2.6).
    One-sided quantiles suffice: for normal values that difference is independent of the final mean. The last term is a reserve for
    values of which a sample of n cannot tell: a share w = min(1, log10(1 / (1 - confidence)) / (n + 1)) of the unseen is put at the
    bound. At confidence 0.9 that is the share 1 / (n + 1) expected, by exchangeability, beyond all n seen; with the confidence it grows
    like the rule of three's bound ln(1 / (1 - confidence)) / n on a share that left no trace (Hanley and Lippman-Hand, 1983), which
    would rarely let anything settle. The factor was chosen by simulation. An infinite bound takes the reserve and the certain rule away
    from its side.

    Args:
        values_n: the n values seen, in the order of their samples.
        threshold: what the mean is compared with.
        maximum: N, the number of samples whose mean decides.
        confidence: probability with which a settled decision is that of all N, in (0.5, 1).
        looks: how often the question is asked before n = N, ``len(stages(maximum, minimum)) - 1``.
        minimum: fewest values for the test, at least 2.
        lower, upper: bounds of a value.

    Raises:
        ValueError: if there is no value or more than maximum, a value is not finite or not within its bounds, or a setting is out of range.
    """
    values = np.asarray(values_n, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be [n], got shape {values.shape}")
    if (
        not np.isfinite(values).all()
        or values.size
        and not lower - _ROUNDING <= values.min() <= values.max() <= upper + _ROUNDING
    ):
        raise ValueError(f"values must be finite and within [{lower}, {upper}], got {values.tolist()}")
    n = values.size
    look = _look(n, maximum, confidence, looks, minimum)
    if n == maximum:
        return True
    mean = float(values.mean())
    bound = lower if mean > threshold else upper
    worst = mean + (maximum - n) / maximum * (bound - mean)
    if worst > threshold if mean > threshold else worst < threshold:
        return True
    if n < minimum:
        return False
    return look.settles(mean - threshold, float(values.std(ddof=1)), abs(mean - bound))


def settled_choice(
    q_nL: ArrayLike,
    *,
    maximum: int,
    confidence: float,
    looks: int,
    minimum: int = 4,
) -> bool:
    """Says whether the most likely label of the average over all ``maximum`` samples is settled.

    It is if the differences q(top) - q(l) to each other label l, values within [-1, 1], are settled to be above 0; each of these L - 1
    tests gets the share (1 - confidence) / (L - 1). Rows may be one-hot votes, for the modal answer of independent completions; a last
    column of zeros then stands for an answer not given yet.

    Args:
        q_nL: [n, L] each sample's distribution over the labels.
        maximum, confidence, looks, minimum: as in :func:`settled_threshold`.

    Raises:
        ValueError: if a row is not a distribution, there is no row or more than maximum, or a setting is out of range.
    """
    q = np.asarray(q_nL, dtype=np.float64)
    if q.ndim != 2 or q.shape[1] == 0:
        raise ValueError(f"q must be [n, L] with L >= 1, got shape {q.shape}")
    if not (np.isfinite(q).all() and (q >= -_ROUNDING).all() and (np.abs(q.sum(1) - 1) <= _ROUNDING).all()):
        raise ValueError(f"every row of q must be a distribution over the {q.shape[1]} labels, got {q.tolist()}")
    n, num_labels = q.shape
    look = _look(n, maximum, confidence, looks, minimum, comparisons=max(num_labels - 1, 1))
    if n == maximum:
        return True
    mean = q.mean(0)
    top = int(mean.argmax())
    differences = np.delete(q[:, top : top + 1] - q, top, axis=1)
    gaps = np.delete(mean[top] - mean, top)
    certain = n * gaps > maximum - n
    if n < minimum or certain.all():
        return bool(certain.all())
    spreads = differences.std(axis=0, ddof=1)
    return all(
        is_certain or look.settles(gap, spread, gap + 1)
        for gap, spread, is_certain in zip(gaps.tolist(), spreads.tolist(), certain.tolist(), strict=True)
    )


def settled_flag(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    threshold: float,
    *,
    maximum: int,
    confidence: float,
    looks: int,
    minimum: int = 4,
    lower: float = 0.0,
    upper: float = 1.0,
    projected_n: int | None = None,
) -> bool:
    """Says whether it is settled on which side of a threshold a function of all ``maximum`` samples lies, by the jackknife.

    For smooth functions of averages, such as a confidence exp(mean_t ln mean_k p_k(y_t)) or a tempered probability. With f the statistic of
    the n samples seen and f_(i) without sample i, the pseudo-values n f - (n - 1) f_(i) (Tukey, 1958) take the place of the values in
    :func:`settled_threshold`, for a linear statistic exactly. Their mean J estimates the limit of infinitely many samples; the statistic of
    N samples keeps n/N of f's bias, so its estimate is f + (1 - n/N) (J - f). There is no certain rule: n = N or the test.

    The jackknife is not valid for medians, extremes or votes. Under a strong curvature at few samples its variance is a rough estimate.

    Args:
        statistic: takes an index array, any subset of 0..n-1 of n or n - 1 samples, and returns the statistic of these samples. A value
            that is not finite (an impossible token, say) is never settled before N.
        n: samples seen.
        threshold, maximum, confidence, looks, minimum: as in :func:`settled_threshold`.
        lower, upper: bounds of the statistic.
        projected_n: asks instead whether it would be settled after so many samples (n to maximum), if they were like those seen: for
            choosing the next stage, never for stopping.

    Raises:
        ValueError: if the statistic is NaN, n is not within 1..maximum, or a setting is out of range.
    """
    at = n if projected_n is None else projected_n
    if projected_n is not None and not n <= projected_n <= maximum:
        raise ValueError(f"projected_n is {projected_n}; it must be n = {n} to maximum = {maximum}")
    look = _look(at, maximum, confidence, looks, minimum)
    if at == maximum:
        return True
    if n < minimum:
        return False
    everything = np.arange(n)
    full = float(statistic(everything))
    without = np.array([float(statistic(np.delete(everything, i))) for i in range(n)])
    if math.isnan(full) or bool(np.isnan(without).any()):
        raise ValueError(f"the statistic of {n} samples or of {n - 1} of them is NaN; it must be a number")
    if not (math.isfinite(full) and bool(np.isfinite(without).all())):
        return False
    pseudo = n * full - (n - 1) * without
    estimate = full + (1 - n / maximum) * (float(pseudo.mean()) - full)
    bound = lower if estimate > threshold else upper
    return look.settles(estimate - threshold, float(pseudo.std(ddof=1)), abs(estimate - bound))


@dataclass(frozen=True, slots=True)
class _Look:
    """One question whether something is settled, asked after n of ``maximum`` samples."""

    n: int
    maximum: int
    tail: float  # error probability that one test may spend
    share: float  # of the unseen values, put at the bound

    def settles(self, gap: float, spread: float, reach: float) -> bool:
        """The test of settled_threshold; ``reach`` is the distance from the mean to the bound (infinite: none is known)."""
        reserve = (self.maximum - self.n) / self.maximum * self.share * reach if math.isfinite(reach) else 0.0
        error = spread * math.sqrt((self.maximum - self.n) / (self.maximum * self.n))
        return abs(gap) > student_t_quantile(self.tail, self.n - 1) * error + reserve


def _look(n: int, maximum: int, confidence: float, looks: int, minimum: int, comparisons: int = 1) -> _Look:
    if not 1 <= n <= maximum:
        raise ValueError(f"{n} samples were seen; it must be 1 to maximum = {maximum}")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be above 0.5 and below 1")
    if minimum < 2:
        raise ValueError(f"minimum is {minimum}; a standard deviation needs at least 2 samples")
    if looks < (n < maximum):
        raise ValueError(f"looks is {looks}, but n = {n} of {maximum} is one; give len(stages(maximum, minimum)) - 1")
    return _Look(
        n=n,
        maximum=maximum,
        tail=(1 - confidence) / (max(looks, 1) * comparisons),
        share=min(1.0, -math.log10(1 - confidence) / (n + 1)),
    )
