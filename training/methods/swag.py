"""SWA and SWAG: the average of late iterates, and a Gaussian with their moments (Izmailov et al., UAI 2018; Maddox et al., NeurIPS 2019).

AdamW trains as for ``map``. From a given step on every ``interval``-th iterate theta_i of A and B is collected, i = 1, ..., n
(Algorithm 1 of Maddox et al.):

    m_i = m_{i-1} + (theta_i - m_{i-1}) / i,    q_i = q_{i-1} + (theta_i^2 - q_{i-1}) / i,    D_i = theta_i - m_i

The mean is m_n; SWAG's variance is half q_n - m_n^2, entry by entry, and half the covariance of the last R deviations D_i
(kind ``lowrank``, credence.adapters.kinds.lowrank). D_i is the deviation from the running mean, so D_1 = 0.

A and B are averaged separately: the product of the averages is what is stored, and it is not the average of the products B A.
Where we leave the papers: the learning rate falls linearly as for ``map``, because iterates at a constant rate are worse here
(benchmarks/methods.py --choose); iterates are collected a number of steps apart, not once an epoch, because fine-tuning takes few
epochs; moments are kept in float64, and log standard deviations are stored, so that a variance of 0 becomes ``variance_floor``.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from credence.adapters.kinds import LowRankPosterior, PointPosterior
from credence.adapters.posterior import LoraFactors, Posterior
from credence.training.config import Section
from credence.training.errors import ConfigError
from credence.training.methods.base import Method, Plan
from credence.training.modeling import LoraSite, get_factors

DEFAULT_ITERATES = 40
"""Iterates collected, about, where no interval is given."""


class SwaSettings(Section):
    """Settings of SWA.

    Attributes:
        start: share of the optimiser steps after which iterates are collected.
        interval: optimiser steps from one collected iterate to the next; None collects about 40.
    """

    start: float = Field(default=0.5, ge=0, lt=1)
    interval: int | None = Field(default=None, ge=1)


class SwagSettings(SwaSettings):
    """Settings of SWAG.

    Attributes:
        rank: R, deviations kept for the low-rank part; all of them if fewer are collected.
        variance_floor: smallest variance of an entry in the diagonal part. 1e-16 is a standard deviation of 1e-8, below what float32
            resolves beside a weight of 0.1.
    """

    rank: int = Field(default=20, ge=2)
    variance_floor: float = Field(default=1e-16, gt=0)


class Swa(Method):
    """Averages late iterates of AdamW; the average has no posterior (kind ``point``)."""

    name: ClassVar[str] = "swa"
    kind: ClassVar[str] = "point"
    settings_class: ClassVar[type[Section]] = SwaSettings
    min_iterates: ClassVar[int] = 1

    def __init__(self, settings: SwaSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self.collected = 0
        self._first = 0
        self._interval = 1
        self._mean: dict[str, Tensor] = {}
        self._head: dict[str, Tensor] = {}

    def begin_training(self, plan: Plan) -> None:
        """Chooses the steps whose iterates are collected.

        Raises:
            ConfigError: they are fewer than the method needs.
        """
        self._first = int(self.settings.start * plan.num_steps)
        steps = plan.num_steps - self._first
        self._interval = self.settings.interval or max(1, steps // DEFAULT_ITERATES)
        if steps // self._interval < self.min_iterates:
            raise ConfigError(
                f"{self.name} needs {self.min_iterates} or more iterates; {plan.num_steps} steps with method.start = "
                f"{self.settings.start:g} and an interval of {self._interval} give {steps // self._interval}: lower method.start or "
                "method.interval, or train longer",
                key="method.interval",
            )

    def end_step(self, step: int) -> None:
        """Collects the iterate of every ``interval``-th step after the start."""
        after = step - self._first
        if after <= 0 or after % self._interval:
            return
        self.collected += 1
        for site in self.sites:
            self._collect(site.name, flat(site.mean))
        for name, tensor in self.head.tensors().items():
            average = self._head.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64))
            average += (tensor.double() - average) / self.collected

    def _collect(self, module: str, theta: Tensor) -> None:
        """Takes the iterate [P] of one module into its running moments; ``collected`` counts it already."""
        mean = self._mean.setdefault(module, torch.zeros_like(theta))
        mean += (theta - mean) / self.collected

    def state(self) -> dict[str, Tensor]:
        """The number of iterates and their mean by module, and that of the classification head, float64."""
        return {
            "collected": torch.tensor(self.collected),
            **{f"mean.{name}": mean for name, mean in self._mean.items()},
            **{f"head.{name}": average for name, average in self._head.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the moments bit for bit."""
        self.collected = int(state["collected"])
        self._mean, self._head = part(state, "mean"), part(state, "head")

    def final_head(self) -> dict[str, Tensor]:
        """The average of the same iterates; until one is collected the head itself."""
        return {name: average.float() for name, average in self._head.items()} or super().final_head()

    def mean(self) -> dict[str, LoraFactors]:
        """Averages of A and of B."""
        return {site.name: self._average(site) for site in self.sites}

    def _average(self, site: LoraSite) -> LoraFactors:
        shape_A, shape_B = site.mean.A.shape, site.mean.B.shape
        flat = self._mean[site.name].float()
        A, B = flat[: shape_A.numel()], flat[shape_A.numel() :]
        return LoraFactors(A=A.reshape(shape_A).clone(), B=B.reshape(shape_B).clone())

    def current(self, *, posterior: bool) -> tuple[dict[str, LoraFactors], dict[str, Posterior] | None]:
        """The average so far; until an iterate is collected A and B themselves."""
        mean = self.mean() if self.collected else get_factors(self.sites)
        return mean, self.posteriors() if posterior and self.collected >= self.min_iterates else None

    def posteriors(self) -> dict[str, Posterior]:
        """Point masses."""
        return {site.name: PointPosterior() for site in self.sites}


class Swag(Swa):
    """Fits a Gaussian with a diagonal and a low-rank part to late iterates of AdamW."""

    name: ClassVar[str] = "swag"
    kind: ClassVar[str] = "lowrank"
    settings_class: ClassVar[type[Section]] = SwagSettings
    min_iterates: ClassVar[int] = 2

    def __init__(self, settings: SwagSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self._square: dict[str, Tensor] = {}
        self._deviations: dict[str, Tensor] = {}

    def _collect(self, module: str, theta: Tensor) -> None:
        super()._collect(module, theta)
        square = self._square.setdefault(module, torch.zeros_like(theta))
        square += (theta.square() - square) / self.collected
        earlier = self._deviations.get(module, torch.empty(0, len(theta)))[1 - self.settings.rank :]
        self._deviations[module] = torch.cat([earlier, (theta - self._mean[module]).float()[None]])

    def state(self) -> dict[str, Tensor]:
        """Beside SWA's the mean of the squares, float64, and the deviations, float32."""
        return {
            **super().state(),
            **{f"square.{name}": square for name, square in self._square.items()},
            **{f"deviations.{name}": deviations for name, deviations in self._deviations.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the moments bit for bit."""
        super().load_state(state)
        self._square, self._deviations = part(state, "square"), part(state, "deviations")

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``lowrank``, SWAG's form: (1 + R) P numbers a module."""
        result: dict[str, Posterior] = {}
        for site in self.sites:
            variance = self._square[site.name] - self._mean[site.name].square()
            log_sd = 0.5 * variance.clamp_min(self.settings.variance_floor).log()
            result[site.name] = LowRankPosterior(log_sd=log_sd.float(), deviations=self._deviations[site.name])
        return result


def flat(factors: LoraFactors) -> Tensor:
    """A row by row, then B, in one vector [P], float64 on the CPU."""
    return torch.cat([factors.A.detach().flatten(), factors.B.detach().flatten()]).cpu().double()


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a state whose names start with ``name.``, by the rest of their names."""
    return {key.removeprefix(f"{name}."): tensor.clone() for key, tensor in state.items() if key.startswith(f"{name}.")}
