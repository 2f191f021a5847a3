"""LoRA on CPU: a grouped dense product instead of vLLM's gather per token, and correct for rows without an adapter.

vLLM 0.32's CPU path copies both factors of the adapter once per token and marks rows without an adapter by index
-1, which the torch ops read as the last slot: once every slot is full, base rows silently get another adapter's
weights. Here the rows of a step are sorted by adapter once; rows with -1 are in no group and stay untouched, and
one adapter's numbers (NaN included) never meet another's rows.

Shape suffixes: T rows (tokens), S slots, r rank, G adapters of one group, C rows of each of them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from credence.serve.vllm_plugin import cpu_fixes

FEW_ROWS = 4
"""Up to so many rows of an adapter, converting bfloat16 to float32 is cheaper than the setup of a bfloat16 product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroup:
    """Adapters in consecutive slots that have equally many rows: one batched product without padding.

    Attributes:
        slots: the slots first_slot..first_slot + G - 1.
        num_rows: C.
        rows: [G * C], rows of the step, adapter by adapter.
        span: the same rows as a slice where they are consecutive, else None.
    """

    slots: slice
    num_rows: int
    rows: Tensor
    span: slice | None


def group_rows(slots_T: Tensor) -> list[RowGroup]:
    """Sorts the rows of a step by adapter.

    Args:
        slots_T: [T] int64, slot of each row; -1 = no adapter.
    """
    with_adapter = torch.nonzero(slots_T >= 0).squeeze(1)
    slots, counts = torch.unique(slots_T[with_adapter], return_counts=True)
    order = with_adapter[torch.argsort(slots_T[with_adapter], stable=True)]
    groups: list[RowGroup] = []
    slot_list, count_list = slots.tolist(), counts.tolist()
    first, offset = 0, 0
    while first < len(slot_list):
        last = first + 1
        while last < len(slot_list) and (slot_list[last], count_list[last]) == (
            slot_list[last - 1] + 1,
            count_list[first],
        ):
            last += 1
        size = (last - first) * count_list[first]
        rows = order[offset : offset + size]
        start = int(rows[0])
        consecutive = torch.equal(rows, torch.arange(start, start + size))
        groups.append(
            RowGroup(
                slots=slice(slot_list[first], slot_list[last - 1] + 1),
                num_rows=count_list[first],
                rows=rows,
                span=slice(start, start + size) if consecutive else None,
            )
        )
        first, offset = last, offset + size
    return groups


def add_products(
    y: Tensor, x: Tensor, products: Sequence[tuple[int, Sequence[Tensor]]], scale: float, groups: Sequence[RowGroup]
) -> None:
    """Adds scale * x F_1^T F_2^T .. of each row's own adapter to columns of y, in place; rows without an adapter are not touched.

    Dot products accumulate in float32. Between the factors, results are rounded to the type of y, as in vLLM's path, but not
    where an adapter has few rows: those are computed in float32 altogether.

    Args:
        y: [T, n_out].
        x: [T, n_in].
        products: first column, and matrices [S, 1, n, m] or [S, n, m] of all slots, applied in order.
        groups: ``group_rows`` of the T rows.
    """
    for group in groups:
        rows = x[group.span] if group.span is not None else x.index_select(0, group.rows)
        if x.dtype != torch.float32 and (group.num_rows <= FEW_ROWS or x.dtype != y.dtype):
            rows = rows.float()
        rows = rows.view(-1, group.num_rows, x.shape[1])
        for start, factors in products:
            part = rows
            for factor in factors[:-1]:
                part = _times_transposed(part, _of_group(factor, group, part.dtype))
            # vLLM pads the vocabulary of base and adapter differently.
            last = _of_group(factors[-1], group, part.dtype)[:, : y.shape[1] - start]
            end = start + last.shape[1]
            if group.span is not None and part.dtype == y.dtype:
                target = y[group.span, start:end].view(-1, group.num_rows, last.shape[1])
                target.baddbmm_(part, last.transpose(1, 2), alpha=scale)
                continue
            delta = _times_transposed(part, last).reshape(-1, last.shape[1])
            if scale != 1.0:
                delta = delta * scale
            if group.span is not None:
                y[group.span, start:end] += delta.to(y.dtype)
            else:
                y[:, start:end].index_add_(0, group.rows, delta.to(y.dtype))


def lay_out_for_expansion(factor: Tensor) -> Tensor:
    """Turns the memory of B [.., n_out, r], in place, so that neighbours along n_out are neighbours in memory; returns it.

    Shape and values stay, so whoever fills the slots notices nothing, and the product with r numbers runs along n_out instead of
    gathering r at a time (float32, 32 adapters of rank 8: 1.6 times faster).
    """
    if factor.stride(-1) == 1 and factor.shape[-1] > 1:
        # A tensor made in inference mode, where the first step runs, could not be filled with the next adapter outside it.
        with torch.inference_mode(False):
            factor.data = factor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return factor


def _of_group(factor: Tensor, group: RowGroup, dtype: torch.dtype) -> Tensor:
    """The group's matrices, [G, n, m]."""
    return (factor[group.slots, 0] if factor.ndim == 4 else factor[group.slots]).to(dtype)


def _times_transposed(x_GCm: Tensor, matrix_Gnm: Tensor) -> Tensor:
    """x F^T, [G, C, n], in the order of operands that suits the matrix's layout."""
    if matrix_Gnm.stride(2) == 1:
        return torch.bmm(matrix_Gnm, x_GCm.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x_GCm, matrix_Gnm.transpose(1, 2))


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU LoRA layer interface on top of ``add_products``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: dict[str, list[RowGroup]] = {}
        self._prompt_request: int | None = None

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._groups.clear()

    @contextlib.contextmanager
    def prompt_rows_of(self, request: int) -> Iterator[None]:
        """While active, rows of the output layer are prompt positions of this one request (a batch row), not one row per request."""
        self._prompt_request = request
        try:
            yield
        finally:
            self._prompt_request = None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        groups = self._token_groups(x.shape[0])
        products, start = [], 0
        for lora_a, lora_b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            products.append((start, (lora_a, lay_out_for_expansion(lora_b))))
            start += size
        add_products(y, x, products, scale, groups)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        groups = self._token_groups(x.shape[0])
        for position, lora_a in enumerate(lora_a_stacked):
            part = y[position].view(-1, y[position].shape[-1])
            part.zero_()
            add_products(part, x, [(0, (lora_a,))], scale, groups)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        groups = self._token_groups(y.shape[0])
        start = offset_start
        for position, (lora_b, size) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            part = y[:, start : start + size]
            if not add_inputs:
                part.zero_()
            add_products(part, x[position], [(0, (lay_out_for_expansion(lora_b),))], 1.0, groups)
            start += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not add_inputs:
            y.zero_()
        add_products(y, x, [(0, (lora_b_stacked,))], 1.0, self._token_groups(x.shape[0]))

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self._prompt_request is not None:
            groups = group_rows(self.sampler_indices[self._prompt_request].expand(x.shape[0]))
        else:
            groups = self._cached_groups("sampler", self.sampler_indices, x.shape[0])
        add_products(y, x, [(0, (lora_a_stacked, lora_b_stacked))], scale, groups)

    def _token_groups(self, num_rows: int) -> list[RowGroup]:
        return self._cached_groups("token", self.token_lora_indices, num_rows)

    def _cached_groups(self, kind: str, slots_T: Tensor, num_rows: int) -> list[RowGroup]:
        if num_rows != slots_T.shape[0]:
            raise RuntimeError(f"LoRA on CPU got {num_rows} {kind} rows, the step has {slots_T.shape[0]}")
        if kind not in self._groups:
            self._groups[kind] = group_rows(slots_T)
        return self._groups[kind]


def install() -> None:
    """Makes vLLM's CPU platform use ``GroupedPunicaWrapper``, and installs the fixes of ``cpu_fixes``. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's CPU platform does not choose its LoRA implementation by name.
    """
    from vllm.platforms.cpu import CpuPlatform

    if "get_punica_wrapper" not in vars(CpuPlatform):
        raise RuntimeError("this vLLM has no CpuPlatform.get_punica_wrapper: it is not a supported version")
    name = f"{GroupedPunicaWrapper.__module__}.{GroupedPunicaWrapper.__qualname__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: name)
    cpu_fixes.install()
