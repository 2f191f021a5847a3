"""Kind ``mask``: MC-dropout on the input of the LoRA with the mask fixed per sample (docs/equations.md, section 3.7; Gal, 2016).

    m_i ~ Bernoulli(1 - p),   A_s[:,i] = A[:,i] (1 + sqrt(tau) (m_i / (1 - p) - 1)),   B_s = B

A dropped input is a column of A that is zero, so at tau = 1 a sample is A diag(m / (1 - p)), an ordinary LoRA. E[A_s] = A, and
Var A_s[j,i] = tau p / (1 - p) A[j,i]^2, the same mask for all rows. Where we leave the paper: tau scales the deviation from the mean as in
every kind, and a whole answer is read under one mask, where dropout at inference draws a new one for each token and layer call.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise
from credence.adapters.sampling import NoiseSource


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskPosterior:
    """Random columns of A dropped; it stores no tensors.

    Attributes:
        p: probability that an input is dropped, 0 < p < 1.
    """

    kind: ClassVar[str] = "mask"
    p: float

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, float]) -> "MaskPosterior":
        """Builds the posterior; there must be no tensors and the one setting p."""
        if tensors or set(settings) != {"p"}:
            raise PosteriorError(
                f"kind mask needs the setting p and no tensors, got tensors {sorted(tensors)} and settings {sorted(settings)}"
            )
        return cls(p=settings["p"])

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """``mask`` [n_in], uniform on [0, 1)."""
        return {"mask": source.uniform(module, "mask", (mean.A.shape[1],))}

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """Drops the inputs whose uniform is below p; gradients flow to the mean."""
        if tau == 0:
            return mean
        kept = (noise["mask"].to(mean.A.device) >= self.p).to(mean.A.dtype)
        return LoraFactors(A=mean.A * (1 + tau**0.5 * (kept / (1 - self.p) - 1)), B=mean.B)

    def tensors(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless 0 < p < 1."""
        if not 0 < self.p < 1:
            raise PosteriorError(
                f"kind mask for {module} has p = {self.p}, a probability between 0 and 1 (both excluded) is needed"
            )
