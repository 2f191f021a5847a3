"""TFB, training-free Bayesianization (Shi et al., 2024): a posterior around an adapter that is already trained, with one number to find.

    B = U D V^T (thin SVD),   A' = V^T A,   B' = U D,   sd of the entries of row i of A' = sigma_q / d_i

B' A' = B A, so the mean predicts as before. Dividing by d_i gives every direction of the output the same noise: the deviation of B' A' is
U E sigma_q. Rows of a small d_i hardly reach the output, so d_i is clamped from below at 1e-3 d_1, which also serves a B of lower rank.

Where we leave the paper: sigma_q is by default the minimum of the anchor rows' negative log-likelihood under the K-sample average. The
paper's rule, the largest sigma_q that changes the likelihood by no more than a tolerance (here 1 %), misses on an over-confident adapter,
whose likelihood noise improves; it is ``criterion=paper``. The release then fits tau on held-out rows, which rescales sigma_q^2.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from credence.adapters.kinds import FixedRowPosterior
from credence.adapters.posterior import LoraFactors, Posterior, draw
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.errors import TrainingError
from credence.training.methods.base import Method, TrainingRows
from credence.training.modeling import LoraSite, get_factors, set_factors
from credence.training.release import evenly_spaced, nll_by_temperature

logger = logging.getLogger(__name__)

CLAMP = 1e-3
GRID_STEP = 10**0.5
BISECTION_RATIO = 1.02


class TfbSettings(Section):
    """Settings of TFB.

    Attributes:
        criterion: how sigma_q is chosen: ``nll``, the minimum of the anchor rows' NLL, or ``paper``, the largest whose relative change
            of the NLL is within ``tolerance``.
        samples: K, samples averaged in the search.
        max_rows: anchor rows, drawn evenly from the training rows.
        min_sigma, max_sigma: bounds of sigma_q.
    """

    criterion: Literal["nll", "paper"] = "nll"
    tolerance: float = Field(default=0.01, gt=0)
    samples: int = Field(default=10, ge=1)
    max_rows: int = Field(default=256, ge=1)
    min_sigma: float = Field(default=1e-4, gt=0)
    max_sigma: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "TfbSettings":
        if self.min_sigma >= self.max_sigma:
            raise ValueError(
                f"min_sigma is {self.min_sigma:g} and max_sigma {self.max_sigma:g}; the first must be smaller"
            )
        return self


class Tfb(Method):
    """Takes the adapter of ``lora.init``, or one it first trains like ``map``, and finds sigma_q."""

    name: ClassVar[str] = "tfb"
    can_be_member: ClassVar[bool] = False
    kind: ClassVar[str] = "row"
    settings_class: ClassVar[type[Section]] = TfbSettings
    needs_steps: ClassVar[bool] = False

    def __init__(self, settings: TfbSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self.sigma: float | None = None
        self._mean: dict[str, LoraFactors] = {}
        self._spectrum: dict[str, Tensor] = {}

    def fit_posterior(self, rows: TrainingRows) -> None:
        """Rotates the adapter and searches sigma_q on the anchor rows; the model keeps the factors it had.

        Raises:
            TrainingError: a B is zero, or no sigma_q within the bounds keeps the paper's tolerance.
        """
        for name, factors in get_factors(self.sites).items():
            self._mean[name], self._spectrum[name] = rotate(factors, name)
        before = get_factors(rows.sites)
        predictor, anchors = rows.predictor(), evenly_spaced(rows.examples, self.settings.max_rows)
        samples = self.settings.samples

        def nll(sigma: float) -> float:
            if sigma == 0:
                return nll_by_temperature(predictor, anchors, [self._mean], [1], (1.0,))[1][0]
            posteriors = self._at(sigma)
            draws = []
            for index in range(samples):
                source = NoiseSource(rows.seed, index, "train")
                draws.append({n: draw(posteriors[n], mean, source, n, 1.0) for n, mean in self._mean.items()})
            return nll_by_temperature(predictor, anchors, draws, [samples], (1.0,))[samples][0]

        search = best_sigma if self.settings.criterion == "nll" else largest_sigma
        try:
            self.sigma = search(nll, self.settings)
        finally:
            set_factors(rows.sites, before)
        logger.info("sigma_q %.4g by criterion %s on %d rows", self.sigma, self.settings.criterion, len(anchors))

    def mean(self) -> dict[str, LoraFactors]:
        """The rotated adapter (A', B')."""
        self._fitted()
        return dict(self._mean)

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``row``, fixed form, around the rotated adapter."""
        return self._at(self._fitted())

    def _at(self, sigma: float) -> dict[str, Posterior]:
        return {
            name: FixedRowPosterior(rho=(math.log(sigma) - spectrum.log()).float())
            for name, spectrum in self._spectrum.items()
        }

    def _fitted(self) -> float:
        if self.sigma is None:
            raise RuntimeError("Tfb.fit_posterior must be called before the posterior is read")
        return self.sigma


def rotate(factors: LoraFactors, module: str) -> tuple[LoraFactors, Tensor]:
    """A' = V^T A and B' = U D of the SVD B = U D V^T, in float64 and rounded once; and the clamped d, [r] float64.

    Of an n_out below r, rows of zeros complete B, so that the rank stays r.

    Raises:
        TrainingError: B is zero.
    """
    A, B = factors.A.double(), factors.B.double()
    missing = max(0, factors.rank - B.shape[0])
    U, d, Vt = torch.linalg.svd(F.pad(B, (0, 0, 0, missing)), full_matrices=False)
    if not float(d[0]) > 0:
        raise TrainingError(
            f"lora_B of {module} is zero: the adapter does nothing there, and tfb scales its noise by B's singular values; start from a "
            "trained adapter (lora.init), or train it first (train.max_steps)"
        )
    rotated = LoraFactors(A=(Vt @ A).float(), B=(U * d)[: B.shape[0]].float())
    return rotated, d.clamp_min(CLAMP * d[0])


def best_sigma(nll: Callable[[float], float], settings: TfbSettings) -> float:
    """The minimum of ``nll`` over a log grid between the bounds, refined by half a grid step beside the best.

    The grid is left after two values in a row that are worse than the best: noise only destroys from there on.
    """
    steps = max(1, round(math.log(settings.max_sigma / settings.min_sigma) / math.log(GRID_STEP)))
    ratio = (settings.max_sigma / settings.min_sigma) ** (1 / steps)
    measured: dict[float, float] = {}
    worse = 0
    for i in range(steps + 1):
        sigma = settings.min_sigma * ratio**i
        measured[sigma] = nll(sigma)
        worse = worse + 1 if measured[sigma] > min(measured.values()) else 0
        if worse == 2:
            break
    best = min(measured, key=lambda sigma: measured[sigma])
    for sigma in (best / ratio**0.5, best * ratio**0.5):
        if settings.min_sigma <= sigma <= settings.max_sigma:
            measured[sigma] = nll(sigma)
    return min(measured, key=lambda sigma: measured[sigma])


def largest_sigma(nll: Callable[[float], float], settings: TfbSettings) -> float:
    """The largest sigma between the bounds whose NLL differs from the mean's by at most ``tolerance`` of it, by bisection to 2 %.

    Raises:
        TrainingError: the smallest sigma does not keep the tolerance.
    """
    reference = nll(0.0)

    def keeps(sigma: float) -> bool:
        return abs(nll(sigma) - reference) <= settings.tolerance * reference

    low, high = settings.min_sigma, settings.max_sigma
    if keeps(high):
        return high
    if not keeps(low):
        raise TrainingError(
            f"sigma_q = {low:g} already changes the NLL of the anchor rows by more than {settings.tolerance:g} of it; lower "
            "method.min_sigma, raise method.tolerance, or use method.criterion=nll"
        )
    while high / low > BISECTION_RATIO:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
