"""MonteCLoRA (Seth et al., TMLR 2025): a row-scaled Gaussian scale mixture on A, trained through its samples.

    loss = NLL(A_s, B) + eta (KL_D + KL_W + KL_N) / M + (1/M) sum_modules sum_k pi_k^2

with M modules, A_s drawn by the posterior that serving draws from (credence.adapters.kinds.row), KL_D, KL_W and KL_N the paper's
eqs. 12, 11 and 10 and the last term its cooperative loss, eq. 13. A, B, rho and beta are ordinary leaves of one AdamW optimiser
and all receive the gradient of the task. (The authors' public code makes lora_A.weight a new leaf in every forward pass, so the
optimiser never updates A, and applies epsilon twice; we follow the paper.)

Two of the paper's variants are settings. Post hoc: A and B are a given adapter's (``lora.init``) and stay as they are; only rho and beta
train. Sparse mixture: only the component with the largest pi acts in the draw, and the gradient reaches beta through that maximum; the
cooperative loss stays sum_k pi_k^2.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from credence.adapters.kinds import RowPosterior
from credence.adapters.kinds.row import (
    DOF_IS_N_IN,
    SPARSE,
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
from credence.training.errors import ConfigError
from credence.training.methods.base import Method, Plan, factor_parameters
from credence.training.modeling import LoraSite


class MonteCLoraSettings(Section):
    """Settings of MonteCLoRA; the defaults are the paper's.

    Attributes:
        epsilon: sample scaler.
        components: N, number of mixture components.
        kl_weight: eta.
        dirichlet_prior: concentration of the symmetric Dirichlet prior.
        dof: degrees of freedom of the Wishart distribution; None is r (the authors' code), ``n_in`` each module's own (the text).
        floor: smallest variance of a row before epsilon.
        cooperative_weight: factor of the cooperative loss, 1 in the paper.
        initial_rho: start of rho; 0 puts V at the prior's identity. (PEFT starts at random values in [0, 1].)
        posthoc: A and B of ``lora.init`` are kept, and only rho and beta train.
        sparse: only the component with the largest pi is active in a draw.
    """

    epsilon: float = Field(default=5e-3, gt=0)
    components: int = Field(default=4, ge=1)
    kl_weight: float = Field(default=1e-5, ge=0)
    dirichlet_prior: float = Field(default=1.0, gt=0)
    dof: Annotated[float, Field(gt=0)] | Literal["n_in"] | None = None
    floor: float = Field(default=1e-3, gt=0)
    cooperative_weight: float = Field(default=1.0, ge=0)
    initial_rho: float = 0.0
    posthoc: bool = False
    sparse: bool = False


class MonteCLora(Method):
    """Trains A, B, rho and beta of every module by the objective above."""

    name: ClassVar[str] = "monteclora"
    kind: ClassVar[str] = "row"
    settings_class: ClassVar[type[Section]] = MonteCLoraSettings

    def __init__(self, settings: MonteCLoraSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self.dof = _degrees(settings, self.sites[0])
        self.posterior_of: dict[str, RowPosterior] = {}
        for site in self.sites:
            A = site.mean.A
            if settings.posthoc:
                site.mean.A.requires_grad_(False)
                site.mean.B.requires_grad_(False)
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
            sparse=self.settings.sparse,
        )
        self.posterior_of[site.name] = posterior
        return posterior

    @property
    def trains_head(self) -> bool:
        """Not post hoc: rho and beta alone train."""
        return not self.settings.posthoc

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over A, B, rho and beta at one learning rate, post hoc over rho and beta alone; weight decay on A and B only."""
        variational = [
            parameter
            for posterior in self.posterior_of.values()
            for parameter in (posterior.rho, posterior.beta)
            if parameter.requires_grad
        ]
        groups = [{"params": variational, "weight_decay": 0.0}]
        if not self.settings.posthoc:
            groups.insert(0, {"params": factor_parameters(self.sites), "weight_decay": weight_decay})
        return torch.optim.AdamW(groups, lr=learning_rate)

    def begin_training(self, plan: Plan) -> None:
        """Refuses the post-hoc mode without an adapter to stand on.

        Raises:
            ConfigError: ``posthoc`` is set and ``lora.init`` is not.
        """
        if self.settings.posthoc and not plan.from_init:
            raise ConfigError(
                "method.posthoc keeps A and B of a trained adapter; set lora.init to an artifact or a PEFT LoRA folder",
                key="lora.init",
            )

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
                + kl_wishart(posterior.rho, posterior.degrees(site.mean))
                + kl_normal(row_variances(posterior.rho, site.noise["chi2"], settings.floor))
            )
            cooperation = cooperation + cooperative(mixture_weights(posterior.beta, site.noise["mixture"]))
        total: Tensor = (settings.kl_weight * kl + settings.cooperative_weight * cooperation) / len(self.sites)
        return total

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``row`` with copies of rho and beta."""
        return {
            site.name: RowPosterior(
                rho=site.layer.credence_rho.detach().cpu().clone(),
                beta=site.layer.credence_beta.detach().cpu().clone(),
                epsilon=self.settings.epsilon,
                dof=self.dof,
                floor=self.settings.floor,
                sparse=self.settings.sparse,
            )
            for site in self.sites
        }

    def posterior_settings(self) -> dict[str, float]:
        """epsilon, floor, dof (or the mark that it is n_in), and sparse where it is set."""
        return {
            "epsilon": self.settings.epsilon,
            "floor": self.settings.floor,
            **({DOF_IS_N_IN: 1.0} if self.dof is None else {"dof": self.dof}),
            **({SPARSE: 1.0} if self.settings.sparse else {}),
        }


def _degrees(settings: MonteCLoraSettings, site: LoraSite) -> float | None:
    if settings.dof == "n_in":
        return None
    return float(site.mean.rank if settings.dof is None else settings.dof)
