"""MAP: ordinary LoRA with AdamW. The baseline; its artifact has no posterior (kind ``point``)."""

from typing import ClassVar

from credence.adapters.kinds import PointPosterior
from credence.adapters.posterior import Posterior
from credence.training.methods.base import Method


class Map(Method):
    """Maximum a posteriori: minimises the negative log-likelihood with decoupled weight decay."""

    name: ClassVar[str] = "map"
    kind: ClassVar[str] = "point"

    def posteriors(self) -> dict[str, Posterior]:
        """Point masses."""
        return {site.name: PointPosterior() for site in self.sites}
