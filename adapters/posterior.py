"""The posterior protocol: one LoRA module, one class per kind of posterior.

A posterior is parameters beside a mean LoRA. Drawing from it gives ordinary LoRA factors of the same rank (docs/equations.md, section 3).
The draw has two halves. ``noise`` asks a :class:`NoiseSource` for standard noise that depends on shapes only;
``sample`` turns (mean, parameters, noise) into factors, and is differentiable. Training keeps the noise of one
optimiser step and calls ``sample`` in every forward pass; evaluation and serving call both halves once, in :func:`draw`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from credence.adapters.errors import PosteriorError
from credence.adapters.sampling import NoiseSource

Noise = Mapping[str, Tensor]
"""Standard noise by stream name, float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """The factors of one LoRA module: W = W0 + (lora_alpha / r) B A.

    Attributes:
        A: [r, n_in], float32.
        B: [n_out, r], float32.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]


class Posterior(Protocol):
    """A distribution over the factors of one LoRA module, centred on its mean adapter."""

    kind: ClassVar[str]

    def noise(self, source: NoiseSource, module: str, mean: LoraFactors) -> Noise:
        """Draws the standard noise of one sample. Only the shapes of ``mean`` are used."""
        ...

    def sample(self, mean: LoraFactors, noise: Noise, tau: float = 1.0) -> LoraFactors:
        """Returns the sample with these deviations, the variance scaled by ``tau``; tau = 0 returns ``mean`` itself."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored parameters by name (posterior.safetensors holds them as ``<module>.<name>``)."""
        ...

    def check(self, module: str, mean: LoraFactors) -> None:
        """Raises PosteriorError if the parameters do not fit ``mean``."""
        ...


def draw(posterior: Posterior, mean: LoraFactors, source: NoiseSource, module: str, tau: float) -> LoraFactors:
    """Draws one sample of one module.

    Args:
        tau: posterior temperature, multiplies the variance; 0 gives ``mean`` bit for bit.

    Raises:
        PosteriorError: if tau is negative or not finite.
    """
    check_tau(tau)
    if tau == 0:
        return mean
    return posterior.sample(mean, posterior.noise(source, module, mean), tau)


def check_tau(tau: float) -> None:
    """Raises PosteriorError unless 0 <= tau < infinity."""
    if not 0 <= tau < float("inf"):
        raise PosteriorError(f"tau must be a finite number of 0 or more (it scales the posterior variance), got {tau}")


def check_shape(name: str, module: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises PosteriorError unless ``tensor`` has shape ``expected``."""
    if tuple(tensor.shape) != expected:
        raise PosteriorError(
            f"{name} for {module} has shape {tuple(tensor.shape)}, its mean adapter needs {expected}: "
            "the posterior and the mean were not written together",
            reason="wrong_shape",
        )


def check_scale(name: str, module: str, scale: Tensor) -> None:
    """Raises PosteriorError unless ``scale``, computed from the parameter ``name``, is finite."""
    if not bool(torch.isfinite(scale).all()):
        raise PosteriorError(
            f"{name} for {module} has entries so large in size that no sample would be finite in float32",
            reason="not_finite",
        )
