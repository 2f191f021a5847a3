"""IVON: variational online Newton for a diagonal Gaussian over every entry of A and B (Shen et al., ICML 2024, Algorithm 1).

With lambda = ess, delta = weight decay, h the Hessian estimate, m the mean, g the momentum and one noise sample a step:

    theta = m + e,   e ~ N(0, 1 / (lambda (h + delta)));   G = gradient of the mean loss at theta
    g <- b1 g + (1 - b1) G
    f  = lambda (h + delta) e G                                                     (reparametrised Hessian estimate)
    h <- b2 h + (1 - b2) f + 1/2 (1 - b2)^2 (h - f)^2 / (h + delta)                 (keeps h + delta > 0)
    m <- m - lr clip((g / (1 - b1^t) + delta m) / (h + delta), -xi, xi)

The sample is drawn by the posterior class that serving draws from, inside the forward pass: the mean's parameters never hold a
sample, so an exception in a step leaves them as they were, bit for bit.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from credence.adapters.kinds import DiagPosterior
from credence.adapters.posterior import LoraFactors, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.methods.base import Method, MethodDefaults, factor_parameters
from credence.training.modeling import LoraSite


class IvonSettings(Section):
    """Settings of IVON.

    Attributes:
        ess: effective sample size lambda, of the order of the number of training rows or (cold) much more.
        hess_init: first value of h.
        clip_radius: xi, bound of one entry's update before the learning rate.
    """

    ess: float = Field(default=1e7, gt=0)
    hess_init: float = Field(default=1e-3, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=1 - 1e-5, ge=0, lt=1)
    clip_radius: float = Field(default=1e-3, gt=0)


class IvonOptimizer(torch.optim.Optimizer):
    """The update above for parameters whose noise was set with :meth:`set_noise`.

    A parameter without a gradient (not used in the step) is left alone, with its state. State per parameter: ``step`` (int),
    ``momentum`` and ``hess``, so ``state_dict`` is enough to resume exactly.

    Args:
        lr: learning rate; a weight moves at most lr * clip_radius a step.
        weight_decay: delta, the prior's precision over lambda.
    """

    def __init__(self, params: Any, *, lr: float, weight_decay: float, settings: IvonSettings) -> None:
        if not (lr > 0 and weight_decay >= 0):
            raise ValueError(
                f"IVON needs a learning rate above 0 and a weight decay of 0 or more, got {lr} and {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings.model_dump()})
        self._noise: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": 0,
                    "momentum": torch.zeros_like(parameter),
                    "hess": torch.full_like(parameter, group["hess_init"]),
                }

    def log_sd(self, parameter: Tensor) -> Tensor:
        """Log of the posterior standard deviation of each entry, -1/2 ln(lambda (h + delta))."""
        group = self._group_of(parameter)
        log_sd: Tensor = -0.5 * (group["ess"] * (self.state[parameter]["hess"] + group["weight_decay"])).log()
        return log_sd

    def set_noise(self, parameter: Tensor, noise: Tensor) -> None:
        """Tells the deviation e from the mean at which this step's gradient is taken."""
        self._noise[parameter] = noise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; forgets the noise.

        Raises:
            RuntimeError: a parameter has a gradient and no noise.
        """
        if closure is not None:
            raise ValueError("IVON takes no closure: the noise of a step is drawn by the trainer")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self._noise:
                    raise RuntimeError(
                        "IVON has a gradient for a parameter whose noise was not drawn; call set_noise first"
                    )
                self._update(parameter, self._noise[parameter], group)
        self._noise = {}

    def _update(self, parameter: Tensor, noise: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient, hess, momentum = parameter.grad, state["hess"], state["momentum"]
        assert gradient is not None
        beta1, beta2, decay = group["beta1"], group["beta2"], group["weight_decay"]
        state["step"] += 1
        momentum.mul_(beta1).add_(gradient, alpha=1 - beta1)
        precision = hess + decay
        estimate = group["ess"] * precision * noise * gradient
        correction = 0.5 * (1 - beta2) ** 2 * (hess - estimate).square() / precision
        hess.mul_(beta2).add_(estimate, alpha=1 - beta2).add_(correction)
        direction = (momentum / (1 - beta1 ** state["step"]) + decay * parameter) / (hess + decay)
        parameter.sub_(group["lr"] * direction.clamp_(-group["clip_radius"], group["clip_radius"]))

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(parameter is other for other in group["params"]):
                return group
        raise KeyError("the parameter is not one of this optimiser's")


class Ivon(Method):
    """Trains A and B with IVON and keeps a Gaussian over each of their entries."""

    name: ClassVar[str] = "ivon"
    kind: ClassVar[str] = "diag"
    settings_class: ClassVar[type[Section]] = IvonSettings
    # There is no regulariser: the prior acts through the weight decay.
    # max_grad_norm 0: clipping a norm after the gradient was taken would bias the Hessian estimate; IVON clips its own update.
    defaults: ClassVar[MethodDefaults] = MethodDefaults(
        learning_rate=0.03, head_learning_rate=2e-4, weight_decay=1e-6, max_grad_norm=0.0
    )

    def __init__(self, settings: IvonSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        self._optimizer: IvonOptimizer | None = None

    def optimizer(self, *, learning_rate: float, weight_decay: float) -> IvonOptimizer:
        """IVON over A and B."""
        self._optimizer = IvonOptimizer(
            factor_parameters(self.sites), lr=learning_rate, weight_decay=weight_decay, settings=self.settings
        )
        return self._optimizer

    def begin_step(self, source: NoiseSource) -> None:
        """Draws this step's deviation of every entry from the current posterior."""
        optimizer = self._built()
        for site in self.sites:
            mean = site.mean
            posterior = self._posterior(site)
            noise = posterior.noise(source, site.name, mean)
            site.posterior, site.noise = posterior, {name: tensor.to(mean.A.device) for name, tensor in noise.items()}
            zero = LoraFactors(A=torch.zeros_like(mean.A), B=torch.zeros_like(mean.B))
            deviation = posterior.sample(zero, site.noise)
            optimizer.set_noise(mean.A, deviation.A)
            optimizer.set_noise(mean.B, deviation.B)

    def posteriors(self) -> dict[str, Posterior]:
        """Kind ``diag`` with log_sd of A and B."""
        result: dict[str, Posterior] = {}
        for site in self.sites:
            posterior = self._posterior(site)
            assert posterior.log_sd_A is not None and posterior.log_sd_B is not None
            result[site.name] = DiagPosterior(log_sd_A=posterior.log_sd_A.cpu(), log_sd_B=posterior.log_sd_B.cpu())
        return result

    def _posterior(self, site: LoraSite) -> DiagPosterior:
        optimizer = self._built()
        return DiagPosterior(log_sd_A=optimizer.log_sd(site.mean.A), log_sd_B=optimizer.log_sd(site.mean.B))

    def _built(self) -> IvonOptimizer:
        if self._optimizer is None:
            raise RuntimeError("Ivon.optimizer must be called before a step is taken")
        return self._optimizer
