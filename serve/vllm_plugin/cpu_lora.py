"""LoRA on CPU: grouped dense products instead of vLLM's gather per token, and correct for rows without an adapter.

vLLM 0.32's CPU path copies both factors of the adapter once per token and marks rows without an adapter by index
-1, which the torch ops read as the last slot: once every slot is full, base rows silently get another adapter's
weights. Here the rows of a step are split into runs of one adapter; rows with -1 are in no run and stay untouched, and
one adapter's numbers (NaN included) never meet another's rows. Short runs, as in every decoding step, go through the
compiled ``cpu_lora_kernel``; long ones, as in a prompt, through torch's batched product.

Shape suffixes: T rows (tokens), S slots, r rank, G runs of one group, C rows of each of them.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.layers import ColumnParallelLinearWithLoRA, ReplicatedLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from credence.serve.vllm_plugin import cpu_fixes, cpu_lora_kernel

FEW_ROWS = 8
"""Up to so many neighbouring rows of an adapter the compiled loop, which takes them one by one, is faster than torch's product."""

FEW_THREADS = 2
"""Up to so many compute threads that holds for any size: the loop runs on one thread, torch's product on all."""

LITTLE_WORK = 1 << 19
"""With more threads, up to so many numbers of A and B, which take less than the setup of torch's product."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunGroup:
    """Neighbouring runs of C rows each, every run of one adapter: one batched product without padding.

    Attributes:
        slots: [G], the adapters; a slice where they are consecutive.
        num_rows: C.
        span: the G * C rows of the step.
    """

    slots: slice | Tensor
    num_rows: int
    span: slice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRows:
    """The rows of a step that have an adapter.

    Attributes:
        short: groups with C <= FEW_ROWS.
        long: the others.
        rows: [R], the rows of ``short``.
        slots: [R], their adapters.
    """

    short: list[RunGroup]
    long: list[RunGroup]
    rows: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraProduct:
    """Factors of one product for all slots, and the columns it is added to.

    Attributes:
        start: first column.
        factors: matrices [S, 1, n, m] or [S, n, m], applied in order.
        arrays: A [S, r, n] and B transposed [S, r, m] as the compiled loop reads them, or None where it does not apply.
    """

    start: int
    factors: tuple[Tensor, ...]
    arrays: tuple[Any, Any] | None = None


def lora_product(start: int, lora_a: Tensor, lora_b: Tensor) -> LoraProduct:
    """The product x A^T B^T.

    Args:
        lora_a: [S, 1, r, n].
        lora_b: [S, 1, m, r]; its memory is laid out anew, its values stay.
    """
    lora_b = lay_out_for_expansion(lora_b)
    a, b_transposed = lora_a[:, 0], lora_b[:, 0].transpose(1, 2)
    arrays = None
    if a.dtype == b_transposed.dtype and a.dtype in cpu_lora_kernel.DTYPES:
        if a.is_contiguous() and b_transposed.is_contiguous():
            cpu_lora_kernel.prepare(a.dtype)
            arrays = (cpu_lora_kernel.as_array(a), cpu_lora_kernel.as_array(b_transposed))
    return LoraProduct(start, (lora_a, lora_b), arrays)


def split_rows(slots_T: Tensor) -> StepRows:
    """Splits the rows of a step into runs of one adapter.

    Args:
        slots_T: [T] int64, slot of each row; -1 = no adapter.
    """
    slots, counts = (values.tolist() for values in torch.unique_consecutive(slots_T, return_counts=True))
    groups: list[RunGroup] = []
    run, start = 0, 0
    while run < len(slots):
        last = run + 1
        if slots[run] >= 0:
            while last < len(slots) and slots[last] >= 0 and counts[last] == counts[run]:
                last += 1
            span = slice(start, start + (last - run) * counts[run])
            groups.append(RunGroup(slots=_indices(slots[run:last]), num_rows=counts[run], span=span))
        start += (last - run) * counts[run]
        run = last
    short = [group for group in groups if group.num_rows <= FEW_ROWS]
    rows = torch.cat([torch.arange(0), *(torch.arange(group.span.start, group.span.stop) for group in short)])
    return StepRows(
        short=short,
        long=[group for group in groups if group.num_rows > FEW_ROWS],
        rows=rows,
        slots=slots_T[rows],
    )


def _indices(slots: list[int]) -> slice | Tensor:
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots)


def add_products(y: Tensor, x: Tensor, products: Sequence[LoraProduct], scale: float, rows: StepRows) -> None:
    """Adds scale * x F_1^T F_2^T .. of each row's own adapter to columns of y, in place; rows without an adapter are not touched.

    Dot products accumulate in float32. Between the factors, numbers are rounded to the type of y, as in vLLM's path, but not
    in the compiled loop.

    Args:
        y: [T, n_out].
        x: [T, n_in].
        rows: ``split_rows`` of the T rows.
    """
    for product in products:
        compiled = _add_compiled(y, x, product, scale, rows)
        for group in rows.long if compiled else (*rows.short, *rows.long):
            _add_batched(y, x, product, scale, group)


def _add_compiled(y: Tensor, x: Tensor, product: LoraProduct, scale: float, rows: StepRows) -> bool:
    """Adds one product for the short runs by the compiled loop; False where torch's product is faster or the only one that can."""
    if product.arrays is None or not x.dtype == y.dtype == product.factors[0].dtype:
        return False
    if not (x.is_contiguous() and y.is_contiguous()):
        return False
    a, b = product.arrays
    if torch.get_num_threads() > FEW_THREADS and len(rows.rows) * (a[0].size + b[0].size) > LITTLE_WORK:
        return False
    if rows.short:
        y_array, x_array = cpu_lora_kernel.as_array(y), cpu_lora_kernel.as_array(x)
        indices = rows.rows.numpy(), rows.slots.numpy()
        cpu_lora_kernel.add_product(y_array, x_array, a, b, *indices, product.start, np.float32(scale))
    return True


def _add_batched(y: Tensor, x: Tensor, product: LoraProduct, scale: float, group: RunGroup) -> None:
    # Where vLLM keeps numbers of another type between the factors, float32 loses none of them.
    dtype = x.dtype if x.dtype == y.dtype else torch.float32
    part = x[group.span].to(dtype).view(-1, group.num_rows, x.shape[1])
    for factor in product.factors[:-1]:
        part = _times_transposed(part, _of_group(factor, group, dtype))
    # vLLM pads the vocabulary of base and adapter differently.
    last = _of_group(product.factors[-1], group, dtype)[:, : y.shape[1] - product.start]
    target = y[group.span, product.start : product.start + last.shape[1]]
    target = target.view(-1, group.num_rows, last.shape[1])
    if dtype == y.dtype:
        target.baddbmm_(part, last.transpose(1, 2), alpha=scale)
    else:
        target += (scale * _times_transposed(part, last)).to(y.dtype)


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


def _of_group(factor: Tensor, group: RunGroup, dtype: torch.dtype) -> Tensor:
    """The group's matrices, [G, n, m], in the layout they have."""
    matrices = factor[:, 0] if factor.ndim == 4 else factor
    if isinstance(group.slots, slice):
        return matrices[group.slots].to(dtype)
    if matrices.is_contiguous():
        return matrices.index_select(0, group.slots).to(dtype)
    return matrices.transpose(1, 2).index_select(0, group.slots).to(dtype).transpose(1, 2)


def _times_transposed(x_GCm: Tensor, matrix_Gnm: Tensor) -> Tensor:
    """x F^T, [G, C, n], in the order of operands that suits the matrix's layout."""
    if matrix_Gnm.stride(2) == 1:
        return torch.bmm(matrix_Gnm, x_GCm.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x_GCm, matrix_Gnm.transpose(1, 2))


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU LoRA layer interface on top of ``add_products``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows: dict[str, StepRows] = {}
        self._prompt_request: int | None = None
        self._products: dict[int, tuple[Any, list[LoraProduct]]] = {}
        self.no_lora = False
        """Whether no row of the step has an adapter."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._rows.clear()
        self.no_lora = bool((self.token_lora_indices < 0).all())

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
        products = self._products_of(lora_a_stacked, lora_b_stacked, output_slices)
        add_products(y, x, products, scale, self._token_rows(x.shape[0]))

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        x = x.view(-1, x.shape[-1])
        rows = self._token_rows(x.shape[0])
        for position, lora_a in enumerate(lora_a_stacked):
            part = y[position].view(-1, y[position].shape[-1])
            part.zero_()
            add_products(part, x, [LoraProduct(0, (lora_a,))], scale, rows)

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
        rows = self._token_rows(y.shape[0])
        start = offset_start
        for position, (lora_b, size) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            part = y[:, start : start + size]
            if not add_inputs:
                part.zero_()
            add_products(part, x[position], [LoraProduct(0, (lay_out_for_expansion(lora_b),))], 1.0, rows)
            start += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not add_inputs:
            y.zero_()
        add_products(y, x, [LoraProduct(0, (lora_b_stacked,))], 1.0, self._token_rows(x.shape[0]))

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
            rows = split_rows(self.sampler_indices[self._prompt_request].expand(x.shape[0]))
        else:
            rows = self._cached_rows("sampler", self.sampler_indices, x.shape[0])
        products = self._products_of((lora_a_stacked,), (lora_b_stacked,), (y.shape[1],))
        add_products(y, x, products, scale, rows)

    def _products_of(
        self, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...], output_slices: tuple[int, ...]
    ) -> list[LoraProduct]:
        """A layer's products; made once, as vLLM fills the same memory with every adapter."""
        made = self._products.get(id(lora_a_stacked[0]))
        if made is None or made[0] is not lora_a_stacked[0]:
            starts = itertools.accumulate(output_slices, initial=0)
            made = (lora_a_stacked[0], list(map(lora_product, starts, lora_a_stacked, lora_b_stacked)))
            self._products[id(lora_a_stacked[0])] = made
        return made[1]

    def _token_rows(self, num_rows: int) -> StepRows:
        return self._cached_rows("token", self.token_lora_indices, num_rows)

    def _cached_rows(self, kind: str, slots_T: Tensor, num_rows: int) -> StepRows:
        if num_rows != slots_T.shape[0]:
            raise RuntimeError(f"LoRA on CPU got {num_rows} {kind} rows, the step has {slots_T.shape[0]}")
        if kind not in self._rows:
            self._rows[kind] = split_rows(slots_T)
        return self._rows[kind]


def install() -> None:
    """Makes vLLM's CPU platform use ``GroupedPunicaWrapper``, and installs the fixes of ``cpu_fixes``. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's CPU platform does not choose its LoRA implementation by name.
    """
    from vllm.platforms.cpu import CpuPlatform

    if "get_punica_wrapper" not in vars(CpuPlatform):
        raise RuntimeError("this vLLM has no CpuPlatform.get_punica_wrapper: it is not a supported version")
    for layer in (ColumnParallelLinearWithLoRA, ReplicatedLinearWithLoRA, RowParallelLinearWithLoRA):
        _pass_plain_steps(layer)
    name = f"{GroupedPunicaWrapper.__module__}.{GroupedPunicaWrapper.__qualname__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: name)
    cpu_fixes.install()


def _pass_plain_steps(layer: Any) -> None:
    """Sends steps in which no row has an adapter straight to the base layer: vLLM's wrapper costs a small model 5 % of a step."""
    original = layer.forward
    if getattr(original, "credence_passes", False):
        return

    @functools.wraps(original)
    def forward(self: Any, input_: Tensor) -> Any:
        # Not by attribute: what vLLM's layers do not have themselves, they look for in the layer they wrap.
        punica = self.__dict__.get("punica_wrapper")
        if punica is not None and getattr(punica, "no_lora", False):
            return self.base_layer(input_)
        return original(self, input_)

    forward.credence_passes = True  # type: ignore[attr-defined]
    layer.forward = forward
