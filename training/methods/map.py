"""MAP: ordinary LoRA with AdamW. The baseline; its artifact has no posterior (kind ``point``)."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from credence.adapters.kinds import PointPosterior
from credence.adapters.posterior import Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.methods.base import MethodDefaults, factor_parameters
from credence.training.modeling import LoraSite


class MapSettings(Section):
    """MAP has no settings of its own."""


class Map:
    """Maximum a posteriori: minimises the negative log-likelihood with decoupled weight decay."""

    name: ClassVar[str] = "map"
    kind: ClassVar[str] = "point"
    settings_class: ClassVar[type[Section]] = MapSettings
    defaults: ClassVar[MethodDefaults] = MethodDefaults(learning_rate=2e-4, weight_decay=0.0, max_grad_norm=1.0)

    def __init__(self, settings: MapSettings, sites: Sequence[LoraSite]) -> None:
        self.sites = list(sites)

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over A and B."""
        return torch.optim.AdamW(factor_parameters(self.sites), lr=learning_rate, weight_decay=weight_decay)

    def begin_step(self, source: NoiseSource) -> None:
        """No noise."""

    def regulariser(self) -> None:
        """No term."""
        return None

    def posteriors(self) -> dict[str, Posterior]:
        """Point masses."""
        return {site.name: PointPosterior() for site in self.sites}

    def posterior_settings(self) -> dict[str, float]:
        """None."""
        return {}
