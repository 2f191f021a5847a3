"""Kind ``point``: no posterior. A MAP adapter in the same artifact format, so that every tool reads it; every draw is the mean."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise
from credence.adapters.sampling import NoiseSource


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPosterior:
    """A point mass at the mean adapter: it has no epistemic uncertainty to report."""

    kind: ClassVar[str] = "point"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, float]) -> "PointPosterior":
        """Builds the point mass; there must be no tensors and no settings."""
        if tensors or settings:
            raise PosteriorError(f"kind point stores nothing, got {sorted(tensors) + sorted(settings)}")
        return cls()

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """No noise."""
        return {}

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The mean itself."""
        return mean

    def tensors(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Fits every mean."""
