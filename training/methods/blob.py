"""BLoB: a diagonal Gaussian on A, trained by backpropagation (Wang et al., NeurIPS 2024; Blundell et al., ICML 2015).

    q(A) = N(M, diag(G^4)):   A_s = M + G^2 * E,   E standard normal [r, n_in];   B deterministic
    loss = NLL(A_s, B) + eta w_t (1/M') sum over the M' modules of KL(q(A) || N(0, s_p^2))

M is PEFT's A. M, G and B are ordinary leaves of one AdamW; r n_in numbers per module are added to a LoRA. The sample is that of kind
``diag``, which serving draws from. The weight w_t of step t is 1, or for the i-th of an epoch's S steps S pi_i with
pi_i = 2^(S - i) / (2^S - 1) (Blundell et al., section 3.4), whose mean over an epoch is 1: the complexity term acts in an epoch's
first steps and the likelihood in the others.

Flipout (Wen et al., ICLR 2018) gives every row of a batch its own signs of the noise, in training only: row n sees the deviation
G^2 * E * (t_n s_n^T) with s_n in {-1, 1}^n_in and t_n in {-1, 1}^r. Each row's deviation has the posterior's distribution, and those
of two rows are uncorrelated, so the gradient's variance falls with the size of the batch. Served samples have no signs.

Where we leave the paper: G starts at one value (the authors' code: uniform on [eps / sqrt(2), eps], a factor of 2 in the standard
deviation); KL is averaged over the modules, so that eta does not depend on how many there are (eta = M' / number of training rows makes
the loss an evidence lower bound); one AdamW minimises the whole loss; flipout is an option; signs are those of a row's place in its
batch, so micro-batches of one step share them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from credence.adapters.kinds import DiagPosterior
from credence.adapters.posterior import LoraFactors, Noise, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.methods.base import Method, Plan, factor_parameters
from credence.training.modeling import LoraSite

SMALLEST_SD = torch.finfo(torch.float32).tiny
"""G^2 is never below it: the logarithm of 0 cannot be stored."""


class BlobSettings(Section):
    """Settings of BLoB.

    Attributes:
        initial_sd: start of every entry of G^2.
        prior_sd: standard deviation of the prior on the entries of A, 0.2 in the paper.
        kl_weight: eta.
        kl_reweighting: ``uniform`` (w_t = 1) or ``blundell``.
        flipout: whether rows of a training batch get their own signs.
    """

    initial_sd: float = Field(default=0.01, gt=0)
    prior_sd: float = Field(default=0.2, gt=0)
    kl_weight: float = Field(default=1e-6, ge=0)
    kl_reweighting: Literal["uniform", "blundell"] = "uniform"
    flipout: bool = False


@dataclass(frozen=True, slots=True)
class TrainedDiagonal:
    """The posterior of a module under training; its log_sd_A is computed from G in every forward pass.

    Attributes:
        layer: holds the parameter ``credence_sd_root`` (G), [r, n_in].
    """

    kind: ClassVar[str] = "diag"
    layer: Any

    def current(self) -> DiagPosterior:
        """The posterior at the current G, differentiable."""
        return DiagPosterior(log_sd_A=self.layer.credence_sd_root.square().clamp_min(SMALLEST_SD).log())

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """The noise of kind ``diag``."""
        return self.current().noise(source, module, mean)

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """The sample of kind ``diag``; gradients reach M, B and G."""
        return self.current().sample(mean, noise, tau)

    def tensors(self) -> dict[str, Tensor]:
        """Those of :meth:`current`."""
        return self.current().tensors()

    def check(self, module: str, mean: LoraFactors) -> None:
        """That of :meth:`current`."""
        self.current().check(module, mean)


class RowSigns:
    """The signs of one module and optimiser step: a pure function of both and of the row's place in the batch.

    A forward pass that is repeated (gradient checkpointing) gets the same signs, and so does a resumed run.
    """

    def __init__(self, source: NoiseSource, module: str, mean: LoraFactors) -> None:
        self.source = source
        self.module = module
        self.sizes = {"input": mean.A.shape[1], "output": mean.rank}
        self.device = mean.A.device
        self._drawn: tuple[Tensor, Tensor] | None = None

    def __call__(self, rows: int) -> tuple[Tensor, Tensor]:
        """s [rows, n_in] and t [rows, r], entries -1 and 1."""
        if self._drawn is None or len(self._drawn[0]) < rows:
            # Drawn row by row, so that more rows only add to those there are.
            s, t = (
                (self.source.uniform(self.module, f"signs_{side}", (rows, size)) < 0.5).float().mul(2).sub(1)
                for side, size in self.sizes.items()
            )
            self._drawn = s.to(self.device), t.to(self.device)
        s, t = self._drawn
        return s[:rows], t[:rows]


class Blob(Method):
    """Trains A, B and G of every module by the loss above."""

    name: ClassVar[str] = "blob"
    kind: ClassVar[str] = "diag"
    settings_class: ClassVar[type[Section]] = BlobSettings

    def __init__(self, settings: BlobSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self._steps_per_epoch: int | None = None
        self._step_weight = 1.0
        self.posterior_of: dict[str, TrainedDiagonal] = {}
        for site in self.sites:
            root = torch.full_like(site.mean.A, settings.initial_sd**0.5, requires_grad=False)
            # Registered on the layer so that it moves and checkpoints with the model.
            site.layer.register_parameter("credence_sd_root", nn.Parameter(root))
            site.posterior = self.posterior_of[site.name] = TrainedDiagonal(site.layer)

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW over A, B and G at one learning rate; weight decay on A and B only."""
        groups = [
            {"params": factor_parameters(self.sites), "weight_decay": weight_decay},
            {"params": [site.layer.credence_sd_root for site in self.sites], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate)

    def begin_training(self, plan: Plan) -> None:
        """Keeps the length of an epoch."""
        self._steps_per_epoch = plan.steps_per_epoch

    def begin_step(self, source: NoiseSource) -> None:
        """Draws E of every module and, with flipout, its signs; finds the step's weight."""
        for site in self.sites:
            noise = self.posterior_of[site.name].noise(source, site.name, site.mean)
            site.noise = {name: tensor.to(site.mean.A.device) for name, tensor in noise.items()}
            site.row_signs = RowSigns(source, site.name, site.mean) if self.settings.flipout else None
        if self.settings.kl_reweighting == "blundell":
            if self._steps_per_epoch is None:
                raise RuntimeError("Blob.begin_training must be called before a step is taken")
            self._step_weight = blundell_weight(source.index, self._steps_per_epoch)

    def regulariser(self) -> Tensor:
        """eta w_t times the mean over modules of KL."""
        total = torch.zeros((), device=self.sites[0].mean.A.device)
        for site in self.sites:
            log_sd = self.posterior_of[site.name].current().log_sd_A
            assert log_sd is not None
            total = total + kl_diagonal(site.mean.A, log_sd, self.settings.prior_sd)
        weight: float = self.settings.kl_weight * self._step_weight / len(self.sites)
        return weight * total

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``diag`` with log_sd of A; B is deterministic."""
        return {
            name: DiagPosterior(log_sd_A=posterior.tensors()["log_sd_A"].detach().cpu().clone())
            for name, posterior in self.posterior_of.items()
        }


def kl_diagonal(mean: Tensor, log_sd: Tensor, prior_sd: float) -> Tensor:
    """KL of N(mean, diag(sd^2)) from N(0, prior_sd^2) over all entries, a scalar in nats.

    sum ln s_p - ln sd + (sd^2 + mean^2) / (2 s_p^2) - 1/2 (Wang et al., 2024, leave the constants out).
    """
    size = mean.numel()
    quadratic = ((2 * log_sd).exp() + mean.square()).sum() / (2 * prior_sd**2)
    return quadratic - log_sd.sum() + size * (math.log(prior_sd) - 0.5)


def blundell_weight(step: int, steps_per_epoch: int) -> float:
    """S pi_i for the i-th of S steps, i = 1 + step mod S: pi_i = 2^(S - i) / (2^S - 1) = 2^-i / (1 - 2^-S), which cannot overflow.

    Args:
        step: optimiser steps taken before this one.
        steps_per_epoch: S; the weights of S steps in a row add up to S.
    """
    i = 1 + step % steps_per_epoch
    return float(steps_per_epoch * 2.0**-i / (1 - 2.0**-steps_per_epoch))
