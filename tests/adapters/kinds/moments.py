"""Sample moments of LoRA factors, for the tests of posterior kinds."""

from collections.abc import Iterator

import torch
from torch import Tensor

from credence.adapters.posterior import LoraFactors, Posterior, draw
from credence.adapters.sampling import NoiseSource

MODULE = "model.layers.3.self_attn.v_proj"


def mean_factors(rank: int = 3, n_in: int = 5, n_out: int = 7, dtype: torch.dtype = torch.float32) -> LoraFactors:
    """A mean adapter whose three sizes differ."""
    generator = torch.Generator().manual_seed(0)
    return LoraFactors(
        A=torch.randn(rank, n_in, generator=generator, dtype=dtype),
        B=torch.randn(n_out, rank, generator=generator, dtype=dtype),
    )


def draws(
    posterior: Posterior, mean: LoraFactors, count: int, tau: float = 1.0, seed: int = 0
) -> Iterator[LoraFactors]:
    """Samples 0, ..., count - 1 of a seed, as a server draws them."""
    for index in range(count):
        yield draw(posterior, mean, NoiseSource(seed, index), MODULE, tau)


def deviations(
    posterior: Posterior, mean: LoraFactors, count: int, tau: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Deviations from the mean, float64: [count, r, n_in] of A and [count, n_out, r] of B."""
    samples = list(draws(posterior, mean, count, tau, seed))
    A = torch.stack([sample.A for sample in samples]).double() - mean.A.double()
    B = torch.stack([sample.B for sample in samples]).double() - mean.B.double()
    return A, B
