"""What a stored map says: from the score of a generated text to the probability that it is correct (docs/equations.md, section 7).

Release, evaluation and serving call these functions, so that a confidence is the same number wherever it is computed.
"""

import math

import numpy as np

from credence.adapters.config import IsotonicMap, PlattMap


def probability_correct(fitted: PlattMap | IsotonicMap, score: float) -> float:
    """Probability in [0, 1] that a text is correct, never falling in its score.

    Args:
        score: mean log-probability of the text's tokens under the average of the samples at temperature 1, nats; -inf is allowed.

    Raises:
        ValueError: the score is NaN.
    """
    if math.isnan(score):
        raise ValueError("the score of a text is NaN; it must be the mean log-probability of its tokens")
    if isinstance(fitted, IsotonicMap):
        scores, probabilities = zip(*fitted.knots, strict=True)
        return float(np.interp(score, scores, probabilities))
    if fitted.slope == 0:  # also at -inf
        return _sigmoid(fitted.intercept)
    return _sigmoid(fitted.slope * score + fitted.intercept)


def lowest_score(fitted: PlattMap | IsotonicMap, probability: float) -> float:
    """The smallest score whose probability of being correct is at least ``probability``.

    So a confidence is below a threshold exactly if the score is below ``lowest_score(fitted, threshold)``.

    Returns:
        A score in nats, possibly above 0, which no text has; -inf if every score reaches the probability, inf if none does.
    """
    if isinstance(fitted, PlattMap):
        if probability <= 0 or fitted.slope == 0:
            return -math.inf if probability <= probability_correct(fitted, 0.0) else math.inf
        if probability >= 1:
            return math.inf
        return (math.log(probability / (1 - probability)) - fitted.intercept) / fitted.slope
    scores, probabilities = zip(*fitted.knots, strict=True)
    index = int(np.searchsorted(probabilities, probability, side="left"))
    if index == 0:
        return -math.inf
    if index == len(scores):
        return math.inf
    share = (probability - probabilities[index - 1]) / (probabilities[index] - probabilities[index - 1])
    return float(scores[index - 1] + share * (scores[index] - scores[index - 1]))


def _sigmoid(x: float) -> float:
    # exp never overflows in either branch.
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))
