"""Me-LoRA: a Gaussian on an r x r core between the factors, W = W0 + (alpha / r) B C A with C = M + Omega * E.

    loss = NLL(C_s A, B) + eta (1/M') sum over the M' modules of KL,    Omega = H^2 entry by entry, E standard normal

A, B, M and H are ordinary leaves; 2 r^2 numbers per module are added to a LoRA. The sample is that of kind ``core``, written with the
A that is trained here; the artifact's mean is M A, from which kind ``core`` recovers A. ``KL`` is the paper's eq. 8 or the exact
divergence of the core from N(0, s_p^2), both in credence.adapters.kinds.core, and the prior's standard deviation is s_p = prior_sd + u
with one u ~ U(0, 1) a step (the paper's noise prior) or u = 0.

Where we leave the paper: it takes the gradient of KL with SGD beside AdamW, which makes the balance of the two terms a matter of two
step sizes and needs a second backward pass; one AdamW over the whole loss minimises what is written above. KL is averaged over the
modules, so that eta does not depend on how many there are; eta = M' / number of training rows makes the loss an evidence lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from credence.adapters.kinds import CorePosterior
from credence.adapters.kinds.core import core_sample, kl_core, kl_paper
from credence.adapters.posterior import LoraFactors, Noise, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.methods.base import Method, factor_parameters
from credence.training.modeling import LoraSite

SMALLEST_SD = torch.finfo(torch.float32).tiny
"""Omega is never below it: the logarithm of 0 cannot be stored."""


class MeLoraSettings(Section):
    """Settings of Me-LoRA.

    Attributes:
        initial_sd: start of every entry of Omega.
        kl_weight: eta.
        kl: ``paper`` (eq. 8) or ``core`` (exact divergence over the core). Held-out likelihood does not tell them apart
            (docs/methods/melora.md); ``core`` is exact and costs O(r^2).
        prior_sd: standard deviation of the prior without its noise, 0.2 in the paper.
        noise_prior: whether u is drawn; otherwise it is 0.
    """

    initial_sd: float = Field(default=0.04, gt=0)
    kl_weight: float = Field(default=1e-5, ge=0)
    kl: Literal["paper", "core"] = "core"
    prior_sd: float = Field(default=0.2, gt=0)
    noise_prior: bool = True


@dataclass(frozen=True, slots=True)
class TrainedCore:
    """The posterior of a module under training, around the trained A instead of M A.

    Attributes:
        layer: holds the parameters ``credence_core_mean`` (M) and ``credence_core_root`` (H), both [r, r].
    """

    kind: ClassVar[str] = "core"
    layer: Any

    @property
    def M(self) -> Tensor:
        """Mean of the core, the parameter itself."""
        parameter: Tensor = self.layer.credence_core_mean
        return parameter

    @property
    def sd(self) -> Tensor:
        """Omega = H^2, differentiable."""
        square: Tensor = self.layer.credence_core_root.square()
        return square.clamp_min(SMALLEST_SD)

    def stored(self) -> CorePosterior:
        """What the artifact holds: copies on the CPU."""
        M, log_sd = self.M.detach(), self.sd.detach().log()
        return CorePosterior(M=M.cpu().clone(), log_sd=log_sd.cpu().clone())

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """The noise of kind ``core``."""
        return self.stored().noise(source, module, mean)

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """(C_s A, B), in the dtype of A; gradients reach A, B, M and H."""
        return LoraFactors(A=core_sample(mean.A, self.M, self.sd, noise["core"].to(mean.A.device), tau), B=mean.B)

    def tensors(self) -> dict[str, Tensor]:
        """Those of :meth:`stored`."""
        return self.stored().tensors()

    def check(self, module: str, mean: LoraFactors) -> None:
        """That of :meth:`stored`."""
        self.stored().check(module, mean)


class MeLora(Method):
    """Trains A, B, M and H of every module by the loss above."""

    name: ClassVar[str] = "melora"
    kind: ClassVar[str] = "core"
    settings_class: ClassVar[type[Section]] = MeLoraSettings

    def __init__(self, settings: MeLoraSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self.prior_sd = settings.prior_sd
        self.posterior_of: dict[str, TrainedCore] = {}
        for site in self.sites:
            r, device = site.mean.rank, site.mean.A.device
            root = torch.full((r, r), settings.initial_sd**0.5, dtype=torch.float32, device=device)
            # Registered on the layer so that they move and checkpoint with the model.
            site.layer.register_parameter("credence_core_mean", nn.Parameter(torch.eye(r, device=device)))
            site.layer.register_parameter("credence_core_root", nn.Parameter(root))
            site.posterior = self.posterior_of[site.name] = TrainedCore(site.layer)

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over A, B, M and H at one learning rate; weight decay on A and B only."""
        cores = [
            parameter
            for site in self.sites
            for parameter in (site.layer.credence_core_mean, site.layer.credence_core_root)
        ]
        groups = [
            {"params": factor_parameters(self.sites), "weight_decay": weight_decay},
            {"params": cores, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate)

    def begin_step(self, source: NoiseSource) -> None:
        """Draws E of every module, and u, which all modules share."""
        for site in self.sites:
            noise = self.posterior_of[site.name].noise(source, site.name, site.mean)
            site.noise = {name: tensor.to(site.mean.A.device) for name, tensor in noise.items()}
        if self.settings.noise_prior:
            self.prior_sd = self.settings.prior_sd + float(source.uniform("", "prior", (1,)))

    def regulariser(self) -> Tensor:
        """eta times the mean over modules of KL, at the prior of the current step."""
        total = torch.zeros((), device=self.sites[0].mean.A.device)
        for site in self.sites:
            core = self.posterior_of[site.name]
            if self.settings.kl == "paper":
                total = total + kl_paper(site.mean.A, core.M, core.sd, self.prior_sd)
            else:
                total = total + kl_core(core.M, core.sd, self.prior_sd)
        weight: float = self.settings.kl_weight / len(self.sites)
        return weight * total

    def mean(self) -> dict[str, LoraFactors]:
        """(M A, B) of every module, the product in float64 and rounded once."""
        return {
            name: LoraFactors(A=(self.posterior_of[name].M.detach().cpu().double() @ pair.A.double()).float(), B=pair.B)
            for name, pair in super().mean().items()
        }

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``core`` with copies of M and log Omega.

        Raises:
            PosteriorError: training has made an M that cannot be inverted.
        """
        result: dict[str, Posterior] = {}
        for site in self.sites:
            posterior = self.posterior_of[site.name].stored()
            posterior.check(site.name, site.mean)
            result[site.name] = posterior
        return result
