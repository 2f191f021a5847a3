"""Kind ``lowrank``: Gaussians whose covariance has a low-rank part (docs/equations.md, section 3.6), in two forms.

SWAG (Maddox et al., NeurIPS 2019, eq. 1), with theta = (A, B) of a module row by row in one vector of P = r (n_in + n_out) numbers:

    theta_s = theta + sqrt(tau) (exp(log_sd) * e1 / sqrt(2) + D^T e2 / sqrt(2 (R - 1))),    e1 ~ N(0, I_P), e2 ~ N(0, I_R)

The low-rank covariance is that of the whole network, so all modules of a sample share one e2.

Kronecker (Ritter et al., ICLR 2018; for LoRA Yang et al., ICLR 2024), for each random factor W [m, n] of a module, vec row by row:

    precision of vec(W) = S_out (x) S_in + I / p^2,    S_in = U diag(s_in) U^T,  S_out = V diag(s_out) V^T

With U [n, R_in] and V [m, R_out] of orthonormal columns, which need not span the space: outside the span the prior's standard deviation p
is left. The draw below is exact, linear in standard normal noise Z [m, n], and costs O((R_in + R_out) m n), because
p I + (V (x) U) diag(S - p) (V (x) U)^T is the symmetric root of the covariance:

    W_s = W + sqrt(tau) (p Z + V ((S - p) * (V^T Z U)) U^T),    S_ij = (s_out_i s_in_j + 1 / p^2)^(-1/2)

Both are computed in float64 and rounded once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.posterior import LoraFactors, Noise, check_scale, check_shape
from credence.adapters.sampling import NoiseSource

SWAG_TENSORS = ("log_sd", "deviations")
SIDE_TENSORS = ("in_vectors", "in_values", "out_vectors", "out_values")
ORTHONORMAL_TOLERANCE = 1e-4
"""Largest entry of U^T U - I: eigenvectors rounded to float32 stay below 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPosterior:
    """SWAG's posterior of one module.

    Attributes:
        log_sd: log standard deviation of the diagonal part, [P] float32: A row by row, then B.
        deviations: D, rows are deviations of iterates from their mean, [R, P] float32, R >= 2.
    """

    kind: ClassVar[str] = "lowrank"
    log_sd: Tensor
    deviations: Tensor

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], settings: dict[str, float]
    ) -> "LowRankPosterior | KroneckerPosterior":
        """Builds the posterior of the form that the tensors belong to."""
        if set(tensors) == set(SWAG_TENSORS) and not settings:
            return cls(**tensors)
        sides = {name: _side(tensors, name) for name in ("A", "B")}
        complete = all(len(side) in (0, len(SIDE_TENSORS)) for side in sides.values()) and any(sides.values())
        if complete and len(tensors) == sum(map(len, sides.values())) and set(settings) == {"prior_log_sd"}:
            return KroneckerPosterior(
                A=KroneckerCurvature(**sides["A"]) if sides["A"] else None,
                B=KroneckerCurvature(**sides["B"]) if sides["B"] else None,
                prior_log_sd=settings["prior_log_sd"],
            )
        raise PosteriorError(
            f"kind lowrank needs the tensors {list(SWAG_TENSORS)} and no settings, or {list(SIDE_TENSORS)} with the prefix A_, B_ "
            f"or both and the setting prior_log_sd, got tensors {sorted(tensors)} and settings {sorted(settings)}"
        )

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """``diagonal`` [P], the module's own, and ``shared`` [R], the same in every module of a sample."""
        return {
            "diagonal": source.normal(module, "diagonal", (mean.A.numel() + mean.B.numel(),)),
            "shared": source.normal("", "shared", (self.deviations.shape[0],)),
        }

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The draw above; D^T e2 is summed row by row, so that no library chooses the order."""
        if tau == 0:
            return mean
        device = mean.A.device
        low_rank = torch.zeros_like(self.log_sd, dtype=torch.float64)
        for weight, row in zip(noise["shared"].to(device).double(), self.deviations, strict=True):
            low_rank = low_rank + weight * row.double()
        diagonal = self.log_sd.double().exp() * noise["diagonal"].to(device)
        shared_scale = (self.deviations.shape[0] - 1) ** -0.5
        deviation = (tau / 2) ** 0.5 * (diagonal + shared_scale * low_rank)
        in_A, in_B = deviation.split([mean.A.numel(), mean.B.numel()])
        return LoraFactors(A=_shifted(mean.A, in_A), B=_shifted(mean.B, in_B))

    def tensors(self) -> dict[str, Tensor]:
        """``log_sd`` and ``deviations``."""
        return {"log_sd": self.log_sd, "deviations": self.deviations}

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless the shapes fit, R >= 2 and the scales are finite."""
        size = mean.A.numel() + mean.B.numel()
        check_shape("log_sd", module, self.log_sd, (size,))
        rows = self.deviations.shape[0] if self.deviations.ndim else 0
        check_shape("deviations", module, self.deviations, (rows, size))
        if rows < 2:
            raise PosteriorError(
                f"deviations for {module} has {rows} rows; a covariance needs 2 or more iterates", reason="wrong_shape"
            )
        check_scale("log_sd", module, self.log_sd.exp())


@dataclass(frozen=True, slots=True, kw_only=True)
class KroneckerCurvature:
    """What the data say about one factor W [m, n]: S_out (x) S_in by its eigenvectors, float32.

    Attributes:
        in_vectors: U, orthonormal columns, [n, R_in].
        in_values: s_in >= 0, [R_in].
        out_vectors: V, orthonormal columns, [m, R_out].
        out_values: s_out >= 0, [R_out].
    """

    in_vectors: Tensor
    in_values: Tensor
    out_vectors: Tensor
    out_values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {name: getattr(self, name) for name in SIDE_TENSORS}

    def deviation(self, normal: Tensor, prior_log_sd: float) -> Tensor:
        """p Z + V ((S - p) * (V^T Z U)) U^T for standard normal Z [m, n], float64."""
        Z, U, V = normal.double(), self.in_vectors.double(), self.out_vectors.double()
        prior = torch.tensor(prior_log_sd, dtype=torch.float64, device=Z.device)
        curvature = self.out_values.double()[:, None] * self.in_values.double()
        S = (curvature + (-2 * prior).exp()).rsqrt()
        return prior.exp() * Z + V @ ((S - prior.exp()) * (V.T @ Z @ U)) @ U.T

    def check(self, name: str, module: str, shape: tuple[int, int]) -> None:
        """Raises PosteriorError unless this is a curvature of a factor of ``shape`` (m, n)."""
        for end, size in (("out", shape[0]), ("in", shape[1])):
            vectors, values = getattr(self, f"{end}_vectors"), getattr(self, f"{end}_values")
            known = values.shape[0] if values.ndim else 0
            check_shape(f"{name}_{end}_values", module, values, (known,))
            check_shape(f"{name}_{end}_vectors", module, vectors, (size, known))
            if not bool((values >= 0).all()):
                raise PosteriorError(
                    f"{name}_{end}_values for {module} has the entry {float(values.min()):g}; eigenvalues of a curvature are 0 or more"
                )
            gram = vectors.double().T @ vectors.double()
            error = (
                float((gram - torch.eye(known, dtype=torch.float64, device=gram.device)).abs().amax()) if known else 0.0
            )
            if not error <= ORTHONORMAL_TOLERANCE:
                raise PosteriorError(
                    f"the columns of {name}_{end}_vectors for {module} are not orthonormal: an entry of U^T U - I is {error:.2g}, "
                    f"{ORTHONORMAL_TOLERANCE:g} is allowed"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class KroneckerPosterior:
    """Kronecker-factored Gaussian posterior of one module, with an isotropic prior.

    Attributes:
        A, B: curvature of each factor; None where it is deterministic.
        prior_log_sd: log p, of the prior N(0, p^2) of every entry; one for all modules, a setting of the artifact.
    """

    kind: ClassVar[str] = "lowrank"
    A: KroneckerCurvature | None = None
    B: KroneckerCurvature | None = None
    prior_log_sd: float

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """Standard normals ``A`` and ``B`` of the factors' shapes, for the sides that are random."""
        factors = (("A", self.A, mean.A), ("B", self.B, mean.B))
        return {
            name: source.normal(module, name, tuple(factor.shape))
            for name, curvature, factor in factors
            if curvature is not None
        }

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """mean + sqrt(tau) times the exact draw above on each random side."""
        if tau == 0:
            return mean
        A, B = mean.A, mean.B
        if self.A is not None:
            A = _shifted(A, tau**0.5 * self.A.deviation(noise["A"].to(A.device), self.prior_log_sd))
        if self.B is not None:
            B = _shifted(B, tau**0.5 * self.B.deviation(noise["B"].to(B.device), self.prior_log_sd))
        return LoraFactors(A=A, B=B)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of each random side, with the prefix ``A_`` or ``B_``."""
        return {
            f"{side}_{name}": tensor
            for side, curvature in (("A", self.A), ("B", self.B))
            if curvature is not None
            for name, tensor in curvature.tensors().items()
        }

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError unless the shapes fit, the values are 0 or more, and the vectors orthonormal."""
        if self.A is None and self.B is None:
            raise PosteriorError(f"kind lowrank for {module} has no curvature of A or B; at least one is needed")
        check_scale("prior_log_sd", module, torch.tensor([self.prior_log_sd, -2 * self.prior_log_sd]).exp())
        for name, curvature, factor in (("A", self.A, mean.A), ("B", self.B, mean.B)):
            if curvature is not None:
                curvature.check(name, module, (factor.shape[0], factor.shape[1]))


def _side(tensors: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name: tensors[f"{side}_{name}"] for name in SIDE_TENSORS if f"{side}_{name}" in tensors}


def _shifted(mean: Tensor, deviation: Tensor) -> Tensor:
    return (mean.double() + deviation.reshape(mean.shape)).to(mean.dtype)
