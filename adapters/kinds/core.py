"""Kind ``core``: a Gaussian on a small matrix before A (docs/equations.md, section 3.5; Me-LoRA, diagonal: ScalaBL and rank-wise gates).

With C_s = M + sqrt(tau) exp(log_sd) * E, E standard normal [r, r], and the factor A_0 that training adapts,

    A_s = C_s A_0,    B_s = B.

An artifact holds the mean as a plain LoRA, A = M A_0, and A_0 = M^-1 A is recovered from it, so that

    A_s = A + sqrt(tau) (exp(log_sd) * E) M^-1 A.

The solve and both products are taken in float64 and rounded once, so that machines agree on the sample. The rows of A_s are
independent, the entries of one row are not: Cov[(A_s)_ij, (A_s)_il] = tau sum_k exp(2 log_sd_ik) (A_0)_kj (A_0)_kl. Every sample
stays in the row space of A_0. The complexity terms of the training objective are at the end of this module.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise, check_scale, check_shape
from credence.adapters.sampling import NoiseSource

MAX_CONDITION = 1e6
"""Largest condition number of M: A is stored in float32, whose rounding M^-1 magnifies by as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorePosterior:
    """Gaussian on the entries of the core of one module; B is deterministic.

    Attributes:
        M: [r, r] float32, mean of the core, invertible.
        log_sd: [r, r] float32, log standard deviation of each of its entries.
    """

    kind: ClassVar[str] = "core"
    M: Tensor
    log_sd: Tensor

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, float]) -> "CorePosterior":
        """Builds the posterior from its stored tensors; ``settings`` must be empty."""
        if set(tensors) != {"M", "log_sd"} or settings:
            raise PosteriorError(
                f"kind core needs the tensors M and log_sd and no settings, got tensors {sorted(tensors)} and settings {sorted(settings)}"
            )
        return cls(M=tensors["M"], log_sd=tensors["log_sd"])

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """Standard normal ``core`` [r, r]."""
        return {"core": source.normal(module, "core", (mean.rank, mean.rank))}

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The draw above, in float64 and rounded once to the mean's dtype."""
        if tau == 0:
            return mean
        A, M = mean.A.double(), self.M.to(mean.A.device, torch.float64)
        start = torch.linalg.solve(M, A)
        A_s = core_sample(start, M, self.log_sd.to(M).exp(), noise["core"].to(M), tau)
        return LoraFactors(A=A_s.to(mean.A.dtype), B=mean.B)

    def tensors(self) -> dict[str, Tensor]:
        """``M`` and ``log_sd``."""
        return {"M": self.M, "log_sd": self.log_sd}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless both are [r, r], the scales are finite and M can be inverted."""
        for name, tensor in self.tensors().items():
            check_shape(name, module, tensor, (mean.rank, mean.rank))
        check_scale("log_sd", module, self.log_sd.exp())
        check_scale("M", module, self.M)
        condition = float(torch.linalg.cond(self.M.double()))
        if not condition <= MAX_CONDITION:
            raise PosteriorError(
                f"M for {module} has condition number {condition:.3g}, at most {MAX_CONDITION:g} is allowed: its samples need the inverse "
                "of M. Train again with a lower train.learning_rate or method.kl_weight, or with a smaller lora.r"
            )


def core_sample(start: Tensor, M: Tensor, sd: Tensor, noise: Tensor, tau: float = 1.0) -> Tensor:
    """(M + sqrt(tau) sd * noise) A_0, [r, n_in]; differentiable in A_0, M and sd.

    Args:
        start: A_0, [r, n_in].
        M, sd, noise: mean and standard deviation of the core, and standard normals, [r, r].
        tau: posterior temperature, multiplies the variance.
    """
    scale: float = tau**0.5
    return (M + scale * sd * noise) @ start


def kl_core(M: Tensor, sd: Tensor, prior_sd: float) -> Tensor:
    """KL of N(M, diag(sd^2)) from N(0, prior_sd^2) over the entries of the core, a scalar in nats.

    sum_ij ln(s_p / sd_ij) + (sd_ij^2 + M_ij^2) / (2 s_p^2) - 1/2. The prior is centred at 0, as that of the paper's eq. 8 is, so that
    a core without a task leaves no adapter behind. A does not enter: its scale is the business of weight decay.
    """
    return (sd.square() + M.square()).sum() / (2 * prior_sd**2) + (prior_sd / sd).log().sum() - 0.5 * sd.numel()


def kl_paper(start: Tensor, M: Tensor, sd: Tensor, prior_sd: float) -> Tensor:
    """Me-LoRA's complexity term, a scalar in nats up to a constant (paper eq. 8):

    (||M A_0||_F^2 + ||sd |A_0| ||_F^2) / (2 s_p^2) - sum_ij ln sd_ij, with s_p the prior's standard deviation with its noise.

    It is a Gaussian's divergence over the entries of C A_0, taken as independent, each with the standard deviation
    sum_k sd_ik |A_0|_kj. The true one is the root of sum_k sd_ik^2 A_0_kj^2, which is never larger, and the entries of a row are
    dependent: :func:`kl_core` is the exact divergence, over the core.
    """
    mean_term = (M @ start).square().sum() + (sd @ start.abs()).square().sum()
    return mean_term / (2 * prior_sd**2) - sd.log().sum()
