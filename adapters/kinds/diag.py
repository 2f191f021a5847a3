"""Kind ``diag``: independent Gaussians on the entries of A and B (docs/equations.md, section 3.2; IVON, BLoB, diagonal Laplace).

    A_s = A + sqrt(tau) exp(log_sd_A) * E,    B_s = B + sqrt(tau) exp(log_sd_B) * E',    E, E' standard normal.

Either side may be deterministic. With independent noise on A and B the mean of B_s A_s is B A.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise, check_scale, check_shape
from credence.adapters.sampling import NoiseSource


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagPosterior:
    """Diagonal Gaussian posterior of one module.

    Attributes:
        log_sd_A: log standard deviation of A, [r, n_in] float32, or None where A is deterministic.
        log_sd_B: log standard deviation of B, [n_out, r] float32, or None where B is deterministic.

    Log standard deviations are stored, never variances: half precision cannot hold the variance of a LoRA weight.
    """

    kind: ClassVar[str] = "diag"
    log_sd_A: Tensor | None = None
    log_sd_B: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, float]) -> "DiagPosterior":
        """Builds the posterior from its stored tensors; ``settings`` must be empty."""
        unknown = (set(tensors) - {"log_sd_A", "log_sd_B"}) | set(settings)
        if unknown:
            raise PosteriorError(f"kind diag has no {sorted(unknown)}; its tensors are log_sd_A and log_sd_B")
        return cls(log_sd_A=tensors.get("log_sd_A"), log_sd_B=tensors.get("log_sd_B"))

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """Standard normals ``A`` and ``B`` of the factors' shapes, for the sides that are random."""
        noise = {}
        if self.log_sd_A is not None:
            noise["A"] = source.normal(module, "A", tuple(mean.A.shape))
        if self.log_sd_B is not None:
            noise["B"] = source.normal(module, "B", tuple(mean.B.shape))
        return noise

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """mean + sqrt(tau) exp(log_sd) * noise on each random side."""
        if tau == 0:
            return mean
        scale = tau**0.5
        A, B = mean.A, mean.B
        if self.log_sd_A is not None:
            A = A + scale * self.log_sd_A.exp() * noise["A"].to(A.device)
        if self.log_sd_B is not None:
            B = B + scale * self.log_sd_B.exp() * noise["B"].to(B.device)
        return LoraFactors(A=A, B=B)

    def tensors(self) -> dict[str, Tensor]:
        """``log_sd_A`` and ``log_sd_B``, those that exist."""
        return {
            name: tensor
            for name, tensor in (("log_sd_A", self.log_sd_A), ("log_sd_B", self.log_sd_B))
            if tensor is not None
        }

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless one log_sd exists and each has the shape of its factor and finite scales."""
        if self.log_sd_A is None and self.log_sd_B is None:
            raise PosteriorError(f"kind diag for {module} has neither log_sd_A nor log_sd_B; at least one is needed")
        if self.log_sd_A is not None:
            check_shape("log_sd_A", module, self.log_sd_A, tuple(mean.A.shape))
            check_scale("log_sd_A", module, self.log_sd_A.exp())
        if self.log_sd_B is not None:
            check_shape("log_sd_B", module, self.log_sd_B, tuple(mean.B.shape))
            check_scale("log_sd_B", module, self.log_sd_B.exp())
