"""Kind ``row``: one standard deviation per row of A, in two forms that are told apart by their tensors; B_s = B in both.

Fixed (training-free Bayesianization, Shi et al., 2024), with rho in R^r:

    A_s[j,:] = A[j,:] + sqrt(tau) exp(rho_j) z_j,    z_j ~ N(0, I)

A scale mixture (MonteCLoRA, Seth et al., TMLR 2025). With rho in R^r and beta in R^N trainable, c_j ~ chi2(dof) and pi ~ Dir(exp(beta)) in
its logistic-normal form:

    Sigma_jj = max(exp(2 rho_j) c_j, floor)                       the diagonal of a Wishart draw, clipped
    A_s[j,:] = A[j,:] + sqrt(tau) epsilon sqrt(Sigma_jj) sqrt(sum_k pi_k^2) z_j,    z_j ~ N(0, I)

The paper draws N component matrices S^(k) with columns ~ N(0, Sigma) and adds epsilon sum_k pi_k S^(k). Because pi and Sigma are
shared by all columns, the sum is one Gaussian with variance sum_k pi_k^2 Sigma: the collapse is exact, costs O(r n_in) and keeps no
buffer. In the paper's sparse mixture only the component with the largest pi_k is active: sum_k pi_k^2 becomes max_k pi_k^2.

Where we leave the paper: the floor (authors' code) keeps the chi-square's lower tail from underflowing; dof is a setting, r by default as
in the authors' code, n_in in the text (docs/equations.md, section 3.3). The complexity terms of the training objective (section 5) are at
the end of this module.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise, check_scale, check_shape
from credence.adapters.sampling import NoiseSource

SETTINGS = ("epsilon", "dof", "floor")
DOF_IS_N_IN, SPARSE = "dof_is_n_in", "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPosterior:
    """Row-scaled Gaussian scale mixture on A; B is deterministic.

    Attributes:
        rho: [r], log scale of each row.
        beta: [N], log concentrations of the Dirichlet over the N components.
        epsilon: sample scaler (> 0).
        dof: degrees of freedom of the Wishart distribution (> 0); None is the module's own n_in.
        floor: smallest value of Sigma_jj (>= 0).
        sparse: whether only the component with the largest pi is active.
    """

    kind: ClassVar[str] = "row"
    rho: Tensor
    beta: Tensor
    epsilon: float
    dof: float | None
    floor: float = 1e-3
    sparse: bool = False

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], settings: dict[str, float]) -> "RowPosterior | FixedRowPosterior":
        """Builds the posterior of the form that the tensors belong to, with the artifact's settings."""
        if set(tensors) == {"rho"} and not settings:
            return FixedRowPosterior(rho=tensors["rho"])
        own_dof = settings.get(DOF_IS_N_IN) == 1
        needed = {"epsilon", "floor", DOF_IS_N_IN if own_dof else "dof"}
        if (
            set(tensors) != {"rho", "beta"}
            or set(settings) - {SPARSE} != needed
            or settings.get(SPARSE, 0) not in (0, 1)
        ):
            raise PosteriorError(
                f"kind row needs the tensors rho and beta and the settings {list(SETTINGS)} ({DOF_IS_N_IN} = 1 may stand for dof, and "
                f"{SPARSE} = 0 or 1 be added), or the tensor rho alone and no settings, got tensors {sorted(tensors)} and settings "
                f"{dict(sorted(settings.items()))}"
            )
        return cls(
            rho=tensors["rho"],
            beta=tensors["beta"],
            epsilon=settings["epsilon"],
            dof=None if own_dof else settings["dof"],
            floor=settings["floor"],
            sparse=settings.get(SPARSE) == 1,
        )

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """``z`` [r, n_in] and ``mixture`` [N] standard normal, ``chi2`` [r]."""
        return {
            "z": source.normal(module, "z", tuple(mean.A.shape)),
            "chi2": source.chi2(module, "chi2", self.degrees(mean), self.rho.shape[0]),
            "mixture": source.normal(module, "mixture", (self.beta.shape[0],)),
        }

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The collapsed draw above; gradients flow to the mean, rho and beta."""
        if tau == 0:
            return mean
        device = mean.A.device
        variances = row_variances(self.rho, noise["chi2"].to(device), self.floor)
        weights = mixture_weights(self.beta, noise["mixture"].to(device))
        share = weights.max().square() if self.sparse else weights.square().sum()
        row_sd = tau**0.5 * self.epsilon * (variances * share).sqrt()
        return LoraFactors(A=mean.A + row_sd[:, None] * noise["z"].to(device), B=mean.B)

    def degrees(self, mean: LoraFactors) -> float:
        """The degrees of freedom of this module's Wishart distribution."""
        return float(mean.A.shape[1]) if self.dof is None else self.dof

    def tensors(self) -> dict[str, Tensor]:
        """``rho`` and ``beta``."""
        return {"rho": self.rho, "beta": self.beta}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless rho and beta have the right shape, finite scales and settings in range."""
        check_shape("rho", module, self.rho, (mean.rank,))
        if self.beta.ndim != 1 or self.beta.shape[0] < 1:
            raise PosteriorError(
                f"beta for {module} has shape {tuple(self.beta.shape)}; it must be a vector of N >= 1",
                reason="wrong_shape",
            )
        dof_fits = self.dof is None or 0 < self.dof < float("inf")
        if not (0 < self.epsilon < float("inf") and dof_fits and 0 <= self.floor < float("inf")):
            raise PosteriorError(
                f"kind row needs epsilon > 0, dof > 0 and floor >= 0, got epsilon={self.epsilon}, dof={self.dof}, "
                f"floor={self.floor}"
            )
        check_scale("rho", module, (2 * self.rho).exp())
        check_scale("beta", module, (-self.beta).exp())


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRowPosterior:
    """Gaussian with one standard deviation per row of A; B is deterministic.

    Attributes:
        rho: log standard deviation of each row's entries, [r] float32.
    """

    kind: ClassVar[str] = "row"
    rho: Tensor

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """``z`` [r, n_in] standard normal."""
        return {"z": source.normal(module, "z", tuple(mean.A.shape))}

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """A + sqrt(tau) exp(rho) z; gradients flow to the mean and rho."""
        if tau == 0:
            return mean
        row_sd = tau**0.5 * self.rho.exp()
        return LoraFactors(A=mean.A + row_sd[:, None] * noise["z"].to(mean.A.device), B=mean.B)

    def tensors(self) -> dict[str, Tensor]:
        """``rho``."""
        return {"rho": self.rho}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless rho has one entry per row and finite scales."""
        check_shape("rho", module, self.rho, (mean.rank,))
        check_scale("rho", module, self.rho.exp())


def row_variances(rho: Tensor, chi2: Tensor, floor: float) -> Tensor:
    """Diagonal of the Wishart draw, Sigma_jj = max(exp(2 rho_j) c_j, floor), shape [r]."""
    return ((2 * rho).exp() * chi2).clamp_min(floor)


def mixture_weights(beta: Tensor, gaussian: Tensor) -> Tensor:
    """Logistic-normal form of pi ~ Dir(exp(beta)), shape [N], differentiable in beta.

    softmax(m + sqrt(v) g) with m_k = log a_k - mean_j log a_j and v_k = (1/a_k)(1 - 2/N) + (1/N^2) sum_j 1/a_j, a = exp(beta)
    (the Laplace approximation of a Dirichlet in the softmax basis; docs/equations.md, section 3.3). N = 1 gives pi = 1.
    """
    n = beta.shape[0]
    if n == 1:  # v is 0, where the square root has no gradient
        return torch.softmax(beta, dim=0)
    inverse = (-beta).exp()
    variance = inverse * (1 - 2 / n) + inverse.sum() / n**2
    return torch.softmax(beta - beta.mean() + variance.sqrt() * gaussian, dim=0)


def kl_normal(variances: Tensor) -> Tensor:
    """KL of N(0, diag(variances)) from N(0, I): 1/2 (tr Sigma - ln|Sigma| - r), a scalar in nats (paper eq. 10)."""
    return 0.5 * (variances - variances.log() - 1).sum()


def kl_wishart(rho: Tensor, dof: float) -> Tensor:
    """KL of W_r(V, dof) from W_r(I, dof), V = diag(exp(2 rho)): dof/2 (tr V - ln|V| - r), in nats (paper eq. 11)."""
    return 0.5 * dof * ((2 * rho).exp() - 2 * rho - 1).sum()


def kl_dirichlet(beta: Tensor, prior: float) -> Tensor:
    """KL of Dir(exp(beta)) from the symmetric Dir(prior), a scalar in nats (the textbook form of paper eq. 12).

    ln G(a0) - sum ln G(a_k) - ln G(b0) + sum ln G(b_k) + sum (a_k - b_k)(psi(a_k) - psi(a0)). The authors' code and PEFT 0.21 have a
    wrong sign here and exponentiate lgamma; we use differences of lgamma only, so no concentration overflows. The differences cancel,
    so they are taken in float64: at N = 24 and a = 3e3 float32 is off by 0.2 nats, at 6e4 by 15.
    """
    a = beta.double().exp()
    b = torch.full_like(a, prior)
    total = a.sum()
    log_normaliser = torch.lgamma(total) - torch.lgamma(a).sum() - torch.lgamma(b.sum()) + torch.lgamma(b).sum()
    kl = log_normaliser + ((a - b) * (torch.digamma(a) - torch.digamma(total))).sum()
    return kl.to(beta.dtype)


def cooperative(weights: Tensor) -> Tensor:
    """Cooperative loss sum_k pi_k^2 of one module, between 1/N and 1 (paper eq. 13)."""
    return weights.square().sum()
