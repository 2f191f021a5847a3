"""The numbers behind the figures of a report, from the scores and the entries that the table is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from credence.training import metrics
from credence.training.evaluate import Entry, Evaluation
from credence.training.predict import Scores

Pair = tuple[Entry, Mapping[str, Any]]
"""An entry and what ``Entry.document`` says about it."""

MAX_CURVE_POINTS = 240


@dataclass(frozen=True, slots=True)
class Results:
    """The entries that a report shows, each with its document.

    Attributes:
        main: the mean and every K, each at temperature 1 and then at the fitted one; every K at one tau: the fitted one if it was
            measured, else the first that was asked for.
        all: every K, tau and temperature.
        token_samples: K tokens of the mean, if measured.
    """

    main: tuple[Pair, ...]
    all: tuple[Pair, ...]
    token_samples: tuple[Pair, ...]

    @classmethod
    def of(cls, evaluation: Evaluation, document: Mapping[str, Any]) -> "Results":
        """Pairs the entries of an evaluation with those of its document."""
        pairs = tuple(zip(evaluation.entries, document["results"], strict=True))
        taus: dict[int, list[float]] = {}
        for entry in evaluation.entries:
            taus.setdefault(entry.k, []).append(entry.tau)
        config = evaluation.artifact.config
        chosen = {k: config.fitted_tau(k) if config.fitted_tau(k) in found else found[0] for k, found in taus.items()}
        main = [pair for pair in pairs if pair[0].tau == chosen[pair[0].k]]
        return cls(
            main=tuple(sorted(main, key=lambda pair: pair[0].k)),
            all=pairs,
            token_samples=tuple(zip(evaluation.token_samples, document.get("token_samples", ()), strict=True)),
        )

    @property
    def mean(self) -> tuple[Pair, ...]:
        """The mean at temperature 1 and at the fitted one; empty if it was not measured."""
        return tuple(pair for pair in self.main if pair[0].k == 0)

    @property
    def headline(self) -> Pair:
        """The largest K at the fitted temperature. A rule that looks at no result, so that nothing is picked on the test rows."""
        return self.main[-1]

    @property
    def sample_counts(self) -> tuple[int, ...]:
        """Every K > 0, in order."""
        return tuple(dict.fromkeys(entry.k for entry, _ in self.main if entry.k))

    def over_k(self, metric: str) -> list["Series"]:
        """A metric against K: at temperature 1, at the fitted one, and of token samples."""
        pairs = [pair for pair in self.main if pair[0].k]
        series = [
            Series("T = 1", [_point(entry.k, document, metric) for entry, document in pairs[::2]]),
            Series("fitted T", [_point(entry.k, document, metric) for entry, document in pairs[1::2]]),
            Series("tokens of the mean", [_point(entry.k, document, metric) for entry, document in self.token_samples]),
        ]
        return [line for line in series if any(point.value is not None for point in line.points)]

    def over_tau(self, metric: str) -> list["Series"]:
        """A metric against tau at the headline's K; at temperature 1, because the fitted temperature belongs to the fitted tau."""
        pairs = [pair for pair in self.all if pair[0].k == self.headline[0].k][::2]
        points = [
            _point(entry.tau, document, metric) for entry, document in sorted(pairs, key=lambda pair: pair[0].tau)
        ]
        return [Series("T = 1", points)] if any(point.value is not None for point in points) else []


@dataclass(frozen=True, slots=True)
class Point:
    """A metric at one K or tau, with the ends of its interval if there is one."""

    x: float
    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a figure."""

    name: str
    points: list[Point]


def _point(x: float, document: Mapping[str, Any], metric: str) -> Point:
    return Point(x, document[metric], document.get("intervals", {}).get(metric))


def bins(scores: Scores) -> list[metrics.CalibrationBin]:
    """The bins of ECE15."""
    return metrics.calibration_bins(scores.confidence.numpy(), scores.correct.numpy(), bins=15)


def risk_coverage(scores: Scores) -> tuple[metrics.Floats, metrics.Floats]:
    """Coverage and risk, at most ``MAX_CURVE_POINTS`` of their points evenly and always the last."""
    coverage, risk = metrics.risk_coverage(scores.confidence.numpy(), scores.correct.numpy())
    kept = np.unique(np.linspace(0, len(coverage) - 1, MAX_CURVE_POINTS).round().astype(int))
    return coverage[kept], risk[kept]


def histograms(parts: Sequence[Scores], name: str, count: int = 20) -> tuple[NDArray[np.float64], list[metrics.Floats]]:
    """Edges of ``count`` equal bins from 0 to the largest row score of all parts, and each part's share of rows in them."""
    rows = [part.by_row(name).numpy() for part in parts]
    edges = np.linspace(0, max(max(float(values.max()) for values in rows), 1e-9), count + 1)
    return edges, [np.histogram(np.clip(values, 0, edges[-1]), edges)[0] / len(values) for values in rows]
