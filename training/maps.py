"""Maps from the score of a generated text to the probability that it is correct (docs/equations.md, section 7).

The geometric mean of a text's token probabilities is no probability of being correct. Where the data are free text, release lets the
average itself answer some held-out rows, compares the answers with the references, and fits the map on (score, correct).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from credence.adapters.calibration import probability_correct
from credence.adapters.config import BeforeAfter, IsotonicMap, PlattMap
from credence.training.errors import MetricError
from credence.training.generate import generate
from credence.training.predict import Factors, Predictor
from credence.training.prompts import Example
from credence.training.verifiers import normalise_text

FOLDS = 5
FEWEST_OF_A_CLASS = FOLDS
"""Fewer right or wrong answers fit no map: a fold would have none."""
ISOTONIC_ROWS, ISOTONIC_OF_A_CLASS = 100, 20
CLIP = float(np.finfo(np.float32).eps)
"""Confidences are kept this far from 0 and 1 in the NLL: they come from float32 probabilities, which reach 1 exactly."""

Floats = NDArray[np.float64]
Map = PlattMap | IsotonicMap


@dataclass(frozen=True, slots=True, kw_only=True)
class MapResult:
    """A map, or why there is none.

    Attributes:
        rows, correct: rows answered, and those whose answer is the reference.
        fitted: None without a map; ``reason`` then says why.
    """

    rows: int
    correct: int
    fitted: Map | None = None
    reason: str = ""

    def metrics(self) -> dict[str, Any]:
        """Its part of metrics.json."""
        counts: dict[str, Any] = {"rows": self.rows, "correct": self.correct}
        if self.fitted is None:
            return {**counts, "kind": None, "reason": self.reason}
        scores = {"nll": self.fitted.nll.model_dump(), "brier": self.fitted.brier.model_dump()}
        return {**counts, "kind": self.fitted.kind, **scores}

    def line(self) -> str:
        """One line for the log."""
        found = f"{self.correct} of {self.rows} greedy answers are the reference"
        if self.fitted is None:
            return f"{found}; no map of the confidence: {self.reason}"
        nll, brier = self.fitted.nll, self.fitted.brier
        return (
            f"{found}; {self.fitted.kind} map of the confidence: NLL of being correct {nll.before:.4f} -> {nll.after:.4f}, "
            f"Brier {brier.before:.4f} -> {brier.after:.4f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Lets an average answer held-out rows and fits the map of its confidence.

    Attributes:
        tokenizer: of the base model; decodes answers and references alike, without special tokens.
        examples: free-text rows whose reference has at most ``max_new_tokens`` tokens: no answer could equal a longer one.
        stop: tokens that end an answer.
        max_length: the model's context, tokens.
    """

    tokenizer: Any
    examples: Sequence[Example]
    stop: Collection[int]
    max_new_tokens: int
    max_length: int

    def fit_map(self, predictor: Predictor, draws: Sequence[Factors], temperature: float) -> MapResult:
        """Answers the rows with the average of ``draws`` and fits the map.

        Args:
            temperature: of the confidence that is served without a map, for comparison.
        """
        if not self.stop:
            reason = "the tokenizer and the model have no end-of-text token, so an answer has no end"
            return MapResult(rows=0, correct=0, reason=reason)
        if not self.examples:
            reason = f"no held-out reference has at most release.max_new_tokens = {self.max_new_tokens} tokens"
            return MapResult(rows=0, correct=0, reason=reason)
        texts = generate(
            predictor,
            [example.prompt for example in self.examples],
            draws,
            stop=self.stop,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            temperature=temperature,
        )
        correct = [
            text.stopped and self._text(text.tokens) == self._text(example.target)
            for text, example in zip(texts, self.examples, strict=True)
        ]
        without_map = np.exp([min(text.tempered_score, 0.0) for text in texts])
        return fit_map([text.score for text in texts], correct, without_map)

    def _text(self, tokens: Sequence[int]) -> str:
        return normalise_text(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def fit_map(scores: ArrayLike, correct: ArrayLike, without_map: ArrayLike) -> MapResult:
    """Fits P(correct) on a score: isotonic with enough rows of both classes, else Platt.

    NLL and Brier score are cross-fitted: each row's probability is that of a map fitted on the other four fifths. A map whose NLL is not
    below that of the confidence it would replace is not used.

    Args:
        scores: [N], nats.
        correct: [N], booleans.
        without_map: [N], the confidence that is served without a map, in [0, 1].

    Raises:
        MetricError: the lengths differ, there is no row, or a number is not finite.
    """
    s, p = np.asarray(scores, dtype=np.float64), np.asarray(without_map, dtype=np.float64)
    y = np.asarray(correct, dtype=bool)
    if not s.shape == y.shape == p.shape == (len(s),) or not len(s):
        raise MetricError(
            f"scores, correct and without_map must be lists of one length, got shapes {s.shape}, {y.shape} and {p.shape}"
        )
    if not (np.isfinite(s).all() and np.isfinite(p).all()):
        raise MetricError(f"{int((~np.isfinite(s) | ~np.isfinite(p)).sum())} of {len(s)} scores are not finite")
    rows, right = len(y), int(y.sum())
    fewest = min(right, rows - right)
    if fewest < FEWEST_OF_A_CLASS:
        reason = f"{FEWEST_OF_A_CLASS} right and {FEWEST_OF_A_CLASS} wrong answers are needed"
        return MapResult(rows=rows, correct=right, reason=reason)
    enough = rows >= ISOTONIC_ROWS and fewest >= ISOTONIC_OF_A_CLASS
    kind: Literal["isotonic", "platt"] = "isotonic" if enough else "platt"
    crossed = _cross_fitted(kind, s, y)
    nll = BeforeAfter(before=_nll(p, y), after=_nll(crossed, y))
    brier = BeforeAfter(before=float(((p - y) ** 2).mean()), after=float(((crossed - y) ** 2).mean()))
    if nll.after >= nll.before:
        reason = f"its NLL on rows it was not fitted on is {nll.after:.4f}, without it {nll.before:.4f}"
        return MapResult(rows=rows, correct=right, reason=reason)
    fields = {"rows": rows, "correct": right, "nll": nll, "brier": brier}
    return MapResult(rows=rows, correct=right, fitted=_fit(kind, s, y, fields))


def _cross_fitted(kind: Literal["isotonic", "platt"], s: Floats, y: NDArray[np.bool_]) -> Floats:
    """Each row's probability under a map fitted without its fold; every fold has its share of both classes."""
    fold = np.empty(len(y), dtype=np.int64)
    for members in (np.flatnonzero(y), np.flatnonzero(~y)):
        fold[members] = np.arange(len(members)) % FOLDS
    unknown = BeforeAfter(before=0.0, after=0.0)
    result = np.empty(len(y))
    for index in range(FOLDS):
        rest = fold != index
        fields = {"rows": int(rest.sum()), "correct": int(y[rest].sum()), "nll": unknown, "brier": unknown}
        fitted = _fit(kind, s[rest], y[rest], fields)
        result[~rest] = [probability_correct(fitted, score) for score in s[~rest].tolist()]
    return result


def _fit(kind: Literal["isotonic", "platt"], s: Floats, y: NDArray[np.bool_], fields: Mapping[str, Any]) -> Map:
    if kind == "isotonic":
        edge = 1 / (len(y) + 2)
        model = IsotonicRegression(y_min=edge, y_max=1 - edge).fit(s, y.astype(np.float64))
        knots = tuple(zip(model.X_thresholds_.tolist(), model.y_thresholds_.tolist(), strict=True))
        return IsotonicMap(knots=knots, **fields)
    slope, intercept = platt(s, y)
    return PlattMap(slope=slope, intercept=intercept, **fields)


def platt(s: Floats, y: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope >= 0 and intercept of the logistic regression on Platt's smoothed targets, which keep both finite.

    The targets are (N+ + 1) / (N+ + 2) and 1 / (N- + 2) (Platt, 1999). A falling line is none that a probability of being correct may
    follow; the objective is convex, so the best line that does not fall is then flat.
    """
    positive, negative = int(y.sum()), int((~y).sum())
    target = np.where(y, (positive + 1) / (positive + 2), 1 / (negative + 2))
    centre, scale = float(s.mean()), float(s.std())
    slope = 0.0
    if scale > 0:
        # A soft target is one row of each class, weighted; the standardised score makes the tolerance one of the probabilities.
        z = np.tile((s - centre) / scale, 2)[:, None]
        classes = np.repeat([1, 0], len(s))
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
        model.fit(z, classes, sample_weight=np.concatenate([target, 1 - target]))
        slope = float(model.coef_[0, 0]) / scale
    if slope <= 0:
        rate = float(target.mean())
        return 0.0, float(np.log(rate / (1 - rate)))
    return slope, float(model.intercept_[0]) - slope * centre


def _nll(probabilities: Floats, correct: NDArray[np.bool_]) -> float:
    p = np.clip(probabilities, CLIP, 1 - CLIP)
    return float(-np.where(correct, np.log(p), np.log1p(-p)).mean())
