"""Counter-based noise: a posterior sample is a pure function of (artifact, seed, index, tau); docs/equations.md, section 4.

Each tensor of noise has a generator of its own, Philox4x64 with the key SHA-256(purpose, seed, index, module, stream), so the
order of drawing, the device, the process and the tensor-parallel rank do not matter. Normals and gamma variates are numpy's
float32 ziggurat and Marsaglia-Tsang streams. They run on the CPU and use table look-ups, so they do not depend on the
machine's vector instructions as torch's own generators do. :data:`GENERATOR` names this convention in every artifact.
tests/adapters/test_sampling.py holds golden values: a numpy release that changes its streams fails there, not in production.

Tokens are drawn from the average by inverse CDF, with one uniform number that is a pure function of (token seed, step): the server and
the offline evaluation draw the same text from the same seed.
"""

import hashlib
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

GENERATOR = "philox4x64-sha256-numpy-v1"
"""Identifier of the noise convention, stored in posterior.json."""

Purpose = Literal["sample", "train", "init", "tokens"]


class NoiseSource:
    """Noise for one posterior sample (``purpose="sample"``), one optimiser step (``"train"``), what a training run draws beside noise
    (``"init"``: start values and orders of rows), or tokens that an evaluation draws (``"tokens"``).

    Args:
        seed: posterior seed, any non-negative integer.
        index: sample index s, or the optimiser step, or the epoch, or the number of a row's text.
        purpose: keeps the noise of training apart from the noise of serving under equal seeds.

    Raises:
        ValueError: if seed or index is negative.
    """

    def __init__(self, seed: int, index: int, purpose: Purpose = "sample") -> None:
        if seed < 0 or index < 0:
            raise ValueError(f"seed and index must be 0 or more, got seed={seed}, index={index}")
        self.seed = seed
        self.index = index
        self.purpose: Purpose = purpose

    def normal(self, module: str, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Draws standard normals, float32 on the CPU, for one named tensor of one module."""
        return torch.from_numpy(self._generator(module, stream).standard_normal(shape, dtype=np.float32))

    def uniform(self, module: str, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Draws uniforms on [0, 1), float32 on the CPU, for one named tensor of one module."""
        return torch.from_numpy(self._generator(module, stream).random(shape, dtype=np.float32))

    def chi2(self, module: str, stream: str, dof: float, size: int) -> Tensor:
        """Draws ``size`` chi-square variates with ``dof`` degrees of freedom, float32 on the CPU: 2 Gamma(dof / 2)."""
        return torch.from_numpy(2.0 * self._generator(module, stream).standard_gamma(dof / 2, size, dtype=np.float32))

    def permutation(self, stream: str, size: int) -> list[int]:
        """Draws an order of 0, ..., size - 1."""
        return [int(number) for number in self._generator("", stream).permutation(size)]

    def token_seed(self, stream: str) -> int:
        """Seed of one text's tokens for :func:`token_uniform`, in [0, 2**63): what a server takes as a request's ``seed``."""
        return int.from_bytes(self._digest("", stream)[:8], "little") >> 1

    def _generator(self, module: str, stream: str) -> np.random.Generator:
        key = np.frombuffer(self._digest(module, stream)[:16], dtype="<u8")
        return np.random.Generator(np.random.Philox(key=key))

    def _digest(self, module: str, stream: str) -> bytes:
        name = "\x1f".join((GENERATOR, self.purpose, str(self.seed), str(self.index), module, stream))
        return hashlib.sha256(name.encode()).digest()


def token_uniform(seed: int, step: int) -> float:
    """Returns a uniform number in [0, 1) with 53 bits for one token: a counter-based generator, SHA-256 of (seed, step)."""
    if not 0 <= seed < 2**64 or step < 0:
        raise ValueError(f"seed must be in 0..2**64 - 1 and step 0 or more, got {seed} and {step}")
    digest = hashlib.sha256(b"credence.token\0" + seed.to_bytes(8, "little") + step.to_bytes(8, "little")).digest()
    return math.ldexp(int.from_bytes(digest[:8], "little") >> 11, -53)


def inverse_cdf(weights: Tensor, u: float | Tensor) -> Tensor:
    """Returns the first position whose cumulative weight exceeds u times the sum; its weight is positive.

    Args:
        weights: [..., V], 0 or more, some positive in each row.
        u: in [0, 1): one number for one row, or [..., 1].

    Returns:
        [...] int64, on the device of the weights; the host does not wait for it.
    """
    cumulative = weights.cumsum(-1)
    position = torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True).clamp_max(weights.shape[-1] - 1)
    # A parallel prefix sum may round a token of weight 0 above its neighbour; never return such a token.
    possible = weights.gather(-1, position) > 0
    return torch.where(possible, position, weights.argmax(-1, keepdim=True)).squeeze(-1)
