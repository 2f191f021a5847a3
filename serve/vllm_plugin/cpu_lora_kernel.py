# mypy: allow-untyped-calls, allow-untyped-defs
"""LoRA for single rows on CPU, compiled by numba: what a decoding step does, one row for each of K adapters.

torch's batched product takes a setup of some 30 microseconds for each matrix, converts bfloat16 factors to float32 in memory and
reads them again. Here every number of the factors is read once, converted in registers, and all sums are float32.

bfloat16 comes as the uint16 of its bits, as numpy has no such type.

Shape suffixes: T rows (tokens), S slots, r rank, n inputs, m outputs.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)


def as_array(tensor: Tensor) -> Any:
    """The tensor's memory as a numpy array; bfloat16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def prepare(dtype: torch.dtype) -> None:
    """Compiles for one of ``DTYPES``, some seconds unless numba finds its cache, so that no request has to wait for it."""
    empty = torch.empty(0, 1, dtype=dtype)
    indices = np.empty(0, np.int64)
    add_product(*map(as_array, (empty, empty, empty[:, None], empty[:, None])), indices, indices, 0, np.float32(1))


def _to_float(value):  # numba compares the signatures, annotations included
    """float32 of a number as stored. Compiled code only."""


def _to_type_of(example, value):
    """``value`` as stored where ``example`` comes from. Compiled code only."""


@overload(_to_float, inline="always")
def _to_float_for(value):
    if value == numba.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@overload(_to_type_of, inline="always")
def _to_type_of_for(example, value):
    if example == numba.uint16:
        return lambda example, value: _rounded(value)
    return lambda example, value: value


@numba.njit(inline="always")
def _rounded(value: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if value != value:  # noqa: PLR0124  # NaN: its payload must not round to infinity
        return np.uint16(0x7FC0)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def _compiled(function: Any) -> Any:
    options = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that numba may write its cache to
        return numba.njit(**options)(function)


@_compiled
def add_product(y_TN: Any, x_Tn: Any, a_Srn: Any, b_Srm: Any, rows: Any, slots: Any, start: int, scale: float) -> None:
    """Adds scale * B A x of each row's adapter to columns start.. of y, in place.

    Args:
        y_TN: [T, N] float32 or uint16; N - start columns are filled, at most m.
        x_Tn: [T, n], as all matrices of the type of y.
        a_Srn: [S, r, n].
        b_Srm: [S, r, m], B transposed.
        rows: [R] int64, rows to compute.
        slots: [R] int64, their adapters.
        start: first column of y.
        scale: float32.
    """
    num_inputs, rank = x_Tn.shape[1], a_Srn.shape[1]
    width = min(b_Srm.shape[2], y_TN.shape[1] - start)
    by_four = rank - rank % 4
    x, h, sums = np.empty(num_inputs, np.float32), np.empty(rank, np.float32), np.empty(width, np.float32)
    zero = np.float32(0)
    for position in range(rows.shape[0]):
        a, b = a_Srn[slots[position]], b_Srm[slots[position]]
        row = x_Tn[rows[position]]
        for i in range(num_inputs):
            x[i] = _to_float(row[i])
        # Four rows of a matrix at a time: enough sums side by side to keep the processor's multipliers busy.
        for j in range(0, by_four, 4):
            a0, a1, a2, a3 = a[j], a[j + 1], a[j + 2], a[j + 3]
            h0, h1, h2, h3 = zero, zero, zero, zero
            for i in range(num_inputs):
                h0 += _to_float(a0[i]) * x[i]
                h1 += _to_float(a1[i]) * x[i]
                h2 += _to_float(a2[i]) * x[i]
                h3 += _to_float(a3[i]) * x[i]
            h[j], h[j + 1], h[j + 2], h[j + 3] = scale * h0, scale * h1, scale * h2, scale * h3
        for j in range(by_four, rank):
            a0, h0 = a[j], zero
            for i in range(num_inputs):
                h0 += _to_float(a0[i]) * x[i]
            h[j] = scale * h0
        y = y_TN[rows[position], start : start + width]
        for i in range(width):
            sums[i] = _to_float(y[i])
        for j in range(0, by_four, 4):
            b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
            h0, h1, h2, h3 = h[j], h[j + 1], h[j + 2], h[j + 3]
            for i in range(width):
                sums[i] += h0 * _to_float(b0[i]) + h1 * _to_float(b1[i]) + h2 * _to_float(b2[i]) + h3 * _to_float(b3[i])
        for j in range(by_four, rank):
            b0, h0 = b[j], h[j]
            for i in range(width):
                sums[i] += h0 * _to_float(b0[i])
        for i in range(width):
            y[i] = _to_type_of(y[i], sums[i])
