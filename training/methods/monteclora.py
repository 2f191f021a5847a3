"""MonteCLoRA (Seth et al., TMLR 2025): a row-scaled Gaussian scale mixture on A, trained through its samples.

    loss = NLL(A_s, B) + eta (KL_D + KL_W + KL_N) / M + (1/M) sum_modules sum_k pi_k^2

with M modules, A_s drawn by the posterior that serving draws from (credence.adapters.kinds.row), KL_D, KL_W and KL_N the paper's
eqs. 12, 11 and 10 and the last term its cooperative loss, eq. 13. A, B, rho and beta are ordinary leaves of one AdamW optimiser
and all receive the gradient of the task. (The authors' public code makes lora_A.weight a new leaf in every forward pass, so the
optimiser never updates A, and applies epsilon twice; we follow the paper.)
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from credence.adapters.kinds import RowPosterior
from credence.adapters.kinds.row import (
    cooperative,
    kl_dirichlet,
    kl_normal,
    kl_wishart,
    mixture_weights,
    row_variances,
)
from credence.adapters.posterior import Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.methods.base import MethodDefaults, factor_parameters
from credence.training.modeling import LoraSite


class MonteCLoraSettings(Section):
    """Settings of MonteCLoRA; the defaults are the paper's.

    Attributes:
        epsilon: sample scaler.
        components: N, number of mixture components.
        kl_weight: eta.
        dirichlet_prior: concentration of the symmetric Dirichlet prior.
        dof: degrees of freedom of the Wishart distribution; None is r (the authors' code; the text says n_in).
        floor: smallest variance of a row before epsilon.
        cooperative_weight: factor of the cooperative loss, 1 in the paper.
        initial_rho: start of rho; 0 puts V at the prior's identity. (PEFT starts at random values in [0, 1].)
    """

    epsilon: float = Field(default=5e-3, gt=0)
    components: int = Field(default=4, ge=1)
    kl_weight: float = Field(default=1e-5, ge=0)
    dirichlet_prior: float = Field(default=1.0, gt=0)
    dof: float | None = Field(default=None, gt=0)
    floor: float = Field(default=1e-3, gt=0)
    cooperative_weight: float = Field(default=1.0, ge=0)
    initial_rho: float = 0.0


class MonteCLora:
    """Trains A, B, rho and beta of every module by the objective above."""

    name: ClassVar[str] = "monteclora"
    kind: ClassVar[str] = "row"
    settings_class: ClassVar[type[Section]] = MonteCLoraSettings
    defaults: ClassVar[MethodDefaults] = MethodDefaults(learning_rate=2e-4, weight_decay=0.0, max_grad_norm=1.0)

    def __init__(self, settings: MonteCLoraSettings, sites: Sequence[LoraSite]) -> None:
        self.settings = settings
        self.sites = list(sites)
        self.dof = float(settings.dof if settings.dof is not None else self.sites[0].mean.rank)
        self.posterior_of: dict[str, RowPosterior] = {}
        for site in self.sites:
            A = site.mean.A
            rho = nn.Parameter(torch.full((A.shape[0],), settings.initial_rho, dtype=torch.float32, device=A.device))
            beta = nn.Parameter(torch.zeros(settings.components, dtype=torch.float32, device=A.device))
            # With one component pi is 1 whatever beta is, and the square root in its draw has no gradient there.
            beta.requires_grad_(settings.components > 1)
            # Registered on PEFT's layer so that they move and checkpoint with the model.
            site.layer.register_parameter("credence_rho", rho)
            site.layer.register_parameter("credence_beta", beta)
            site.posterior = self._posterior(site)

    def _posterior(self, site: LoraSite) -> RowPosterior:
        posterior = RowPosterior(
            rho=site.layer.credence_rho,
            beta=site.layer.credence_beta,
            epsilon=self.settings.epsilon,
            dof=self.dof,
            floor=self.settings.floor,
        )
        self.posterior_of[site.name] = posterior
        return posterior

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over A, B, rho and beta at one learning rate; weight decay on A and B only."""
        variational = [
            parameter
            for posterior in self.posterior_of.values()
            for parameter in (posterior.rho, posterior.beta)
            if parameter.requires_grad
        ]
        groups = [
            {"params": factor_parameters(self.sites), "weight_decay": weight_decay},
            {"params": variational, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate)

    def begin_step(self, source: NoiseSource) -> None:
        """Draws z, the chi-squares and the mixture's Gaussian of every module, on the parameters' device."""
        for site in self.sites:
            # Rebuilt because moving the model to a device replaces parameter objects' storage, or the objects.
            posterior = site.posterior = self._posterior(site)
            noise = posterior.noise(source, site.name, site.mean)
            site.noise = {name: tensor.to(site.mean.A.device) for name, tensor in noise.items()}

    def regulariser(self) -> Tensor:
        """eta (KL_D + KL_W + KL_N) / M + mean over modules of sum_k pi_k^2, at the pi and Sigma of the current noise."""
        settings = self.settings
        kl = cooperation = torch.zeros((), device=self.sites[0].mean.A.device)
        for site in self.sites:
            assert site.noise is not None
            posterior = self.posterior_of[site.name]
            kl = (
                kl
                + kl_dirichlet(posterior.beta, settings.dirichlet_prior)
                + kl_wishart(posterior.rho, self.dof)
                + kl_normal(row_variances(posterior.rho, site.noise["chi2"], settings.floor))
            )
            cooperation = cooperation + cooperative(mixture_weights(posterior.beta, site.noise["mixture"]))
        return (settings.kl_weight * kl + settings.cooperative_weight * cooperation) / len(self.sites)

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``row`` with copies of rho and beta."""
        return {
            site.name: RowPosterior(
                rho=site.layer.credence_rho.detach().cpu().clone(),
                beta=site.layer.credence_beta.detach().cpu().clone(),
                epsilon=self.settings.epsilon,
                dof=self.dof,
                floor=self.settings.floor,
            )
            for site in self.sites
        }

    def posterior_settings(self) -> dict[str, float]:
        """epsilon, dof and floor."""
        return {"epsilon": self.settings.epsilon, "dof": self.dof, "floor": self.settings.floor}
