"""Counter-based noise: a posterior sample is a pure function of (artifact, seed, index, tau); docs/equations.md, section 4.

Each tensor of noise has a generator of its own, Philox4x64 with the key SHA-256(purpose, seed, index, module, stream), so the
order of drawing, the device, the process and the tensor-parallel rank do not matter. Normals and gamma variates are numpy's
float32 ziggurat and Marsaglia-Tsang streams. They run on the CPU and use table look-ups, so they do not depend on the
machine's vector instructions as torch's own generators do. :data:`GENERATOR` names this convention in every artifact.
tests/adapters/test_sampling.py holds golden values: a numpy release that changes its streams fails there, not in production.
"""

import hashlib
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
        index: sample index s, or the optimiser step, or the epoch.
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

    def _generator(self, module: str, stream: str) -> np.random.Generator:
        name = "\x1f".join((GENERATOR, self.purpose, str(self.seed), str(self.index), module, stream))
        key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype="<u8")
        return np.random.Generator(np.random.Philox(key=key))
