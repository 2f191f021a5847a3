"""credence.serve.vllm_plugin.cpu_lora and cpu_fixes: against a slow loop over rows, vLLM's own ops, and a real engine."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from credence.adapters.artifact import write_sample
from tests.serve.vllm_plugin.conftest import (
    CHUNK,
    MAX_LORAS,
    VOCABULARY,
    Engine,
    Reference,
    generate,
    logprob_matrix,
    prompt,
)

pytestmark = pytest.mark.filterwarnings("ignore")

SLOTS, N_IN, MAX_RANK = 5, 24, 8
SLICES = (40, 12, 12)
"""Query, key and value of grouped heads: unequal outputs."""


def wrapper(kind: str, token_slots: list[int], request_slots: list[int] | None = None) -> Any:
    """A LoRA wrapper after update_metadata: all SLOTS slots hold an adapter, each row has a slot (-1 = none)."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from credence.serve.vllm_plugin.cpu_lora import GroupedPunicaWrapper

    made = {"ours": GroupedPunicaWrapper, "stock": PunicaWrapperCPU}[kind](256, 64, "cpu")

    def ids(slots: list[int]) -> tuple[int, ...]:
        return tuple(slot + 1 for slot in slots)

    mapping = LoRAMapping(ids(token_slots), ids(request_slots or token_slots), is_prefill=True)
    made.update_metadata(mapping, [slot + 1 for slot in range(SLOTS)], SLOTS, 64)
    return made


def weights(dtype: torch.dtype, slices: tuple[int, ...] = SLICES) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stacked factors of all slots; slot s has rank s + 2, the rest of its rows is zero, as vLLM pads them."""
    generator = torch.Generator().manual_seed(1)
    a = [torch.randn(SLOTS, 1, MAX_RANK, N_IN, generator=generator) for _ in slices]
    b = [torch.randn(SLOTS, 1, size, MAX_RANK, generator=generator) for size in slices]
    for slot in range(SLOTS):
        for pair in (*a, *b):
            padded = pair[slot, 0, slot + 2 :] if pair.shape[-1] == N_IN else pair[slot, 0, :, slot + 2 :]
            padded.zero_()
    return tuple(t.to(dtype) for t in a), tuple(t.to(dtype) for t in b)


def slow(y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], scale: float, slots: list[int]) -> Tensor:
    """One row at a time in float64; rows with slot -1 get nothing."""
    result = y.double().clone()
    for row, slot in enumerate(slots):
        start = 0
        for factor_a, factor_b in zip(a, b, strict=True):
            size = factor_b.shape[-2]
            if slot >= 0:
                delta = factor_b[slot, 0].double() @ (factor_a[slot, 0].double() @ x[row].double())
                result[row, start : start + size] += scale * delta
            start += size
    return result


def inputs(rows: int, dtype: torch.dtype, width: int = sum(SLICES)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, width, generator=generator).to(dtype), torch.randn(rows, N_IN, generator=generator).to(
        dtype
    )


MAPPINGS = {
    "lock-step decode": [0, 1, 2, 3, 4] * 3,
    "prefill": [0] * 7 + [1] * 7 + [2] * 7,
    "uneven, with base rows": [-1, 3, 3, -1, 0, 3, 4, 0, -1, 1, 3, 3, 3, 4],
    "slots out of order": [4, 4, 2, 2, 0, 0, -1, 3, 1],
    "one row": [2],
    "one base row": [-1],
    "only base rows": [-1] * 6,
    "one adapter": [3] * 9,
    "prompts, slots out of order": [3] * 9 + [0] * 9 + [4] * 9 + [-1] * 9 + [1] * 11 + [2] * 9,
    "prompts beside decoding": [0, 1, 2, 4, 4] + [3] * 12 + [1] * 12 + [-1] * 2 + [2] * 5,
}


@pytest.mark.parametrize("slots", MAPPINGS.values(), ids=MAPPINGS.keys())
@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_linear_layers_match_the_slow_reference(slots: list[int], scale: float) -> None:
    (y, x), (a, b) = inputs(len(slots), torch.float32), weights(torch.float32)
    expected = slow(y, x, a, b, scale, slots)
    wrapper("ours", slots).add_lora_linear(y, x, a, b, scale, SLICES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MAPPINGS if "only" not in name and "one base" not in name])
def test_bfloat16_is_no_less_accurate_than_vllms_ops(name: str) -> None:
    slots = MAPPINGS[name]
    (y, x), (a, b) = inputs(len(slots), torch.bfloat16), weights(torch.bfloat16)
    expected = slow(y, x, a, b, 1.0, slots)
    ours, stock = y.clone(), y.clone()
    wrapper("ours", slots).add_lora_linear(ours, x, a, b, 1.0, SLICES)
    wrapper("stock", slots).add_lora_linear(stock, x, a, b, 1.0, SLICES)
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    error, stock_error = (((t.double() - expected)[rows] ** 2).mean().sqrt() for t in (ours, stock))
    assert error <= 1.05 * stock_error
    # Two roundings to 8 bits (the intermediate and the sum) on numbers of a few units.
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=0.25)
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(ours[base], y[base])


@pytest.mark.parametrize(
    "name", ["lock-step decode", "prefill", "uneven, with base rows", "prompts, slots out of order"]
)
@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_few_and_many_rows_give_the_same_bfloat16(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of computing low precision differ by their roundings only."""
    from credence.serve.vllm_plugin import cpu_lora

    slots = MAPPINGS[name]
    (y, x), (a, b) = inputs(len(slots), torch.bfloat16), weights(torch.bfloat16)
    results = []
    for few in (0, 1000):
        monkeypatch.setattr(cpu_lora, "FEW_ROWS", few)
        result = y.clone()
        wrapper("ours", slots).add_lora_linear(result, x, a, b, scale, SLICES)
        results.append(result)
    torch.testing.assert_close(*results, rtol=2e-2, atol=0.25)


@pytest.mark.parametrize("slots", MAPPINGS.values(), ids=MAPPINGS.keys())
def test_runs_cover_every_row_with_an_adapter_once(slots: list[int]) -> None:
    from credence.serve.vllm_plugin.cpu_lora import FEW_ROWS, split_rows

    rows = split_rows(torch.tensor(slots))
    found = {}
    for group in (*rows.short, *rows.long):
        group_slots = list(range(SLOTS))[group.slots] if isinstance(group.slots, slice) else group.slots.tolist()
        covered = list(range(len(slots)))[group.span]
        assert len(covered) == group.num_rows * len(group_slots)
        assert (group.num_rows <= FEW_ROWS) == (group in rows.short)
        for position, row in enumerate(covered):
            assert row not in found
            found[row] = group_slots[position // group.num_rows]
    assert found == {row: slot for row, slot in enumerate(slots) if slot >= 0}
    short = dict(zip(rows.rows.tolist(), rows.slots.tolist(), strict=True))
    assert short == {row: slots[row] for group in rows.short for row in range(group.span.start, group.span.stop)}


def test_many_threads_take_big_products_to_torch_and_small_ones_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    from credence.serve.vllm_plugin import cpu_lora, cpu_lora_kernel

    slots = MAPPINGS["lock-step decode"]
    (y, x), (a, b) = inputs(len(slots), torch.float32), weights(torch.float32)
    expected = slow(y, x, a, b, 1.0, slots)
    calls: list[int] = []
    loop = cpu_lora_kernel.add_product
    monkeypatch.setattr(cpu_lora_kernel, "add_product", lambda *args: (calls.append(args[6]), loop(*args)))
    monkeypatch.setattr(cpu_lora, "FEW_THREADS", 0)
    # Work of the slices: 15 rows x 8 x (24 + 40) numbers, and twice 15 x 8 x (24 + 12).
    monkeypatch.setattr(cpu_lora, "LITTLE_WORK", 15 * 8 * (24 + 40) - 1)
    wrapper("ours", slots).add_lora_linear(y, x, a, b, 1.0, SLICES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    # prepare compiles with column 0, by the loop it looks up in its own module.
    assert [start for start in calls if start] == [40, 52]


def test_columns_of_a_wider_tensor_are_filled_in_place() -> None:
    slots = MAPPINGS["prompts beside decoding"]
    (wide, x), (a, b) = inputs(len(slots), torch.float32, 100), weights(torch.float32)
    y = wide[:, 20:84]
    expected, before = slow(y, x, a, b, 0.5, slots), wide.clone()
    from credence.serve.vllm_plugin.cpu_lora import add_products, lora_product, split_rows

    starts = (0, 40, 52)
    products = [lora_product(start, *factors) for start, *factors in zip(starts, a, b, strict=True)]
    add_products(y, x, products, 0.5, split_rows(torch.tensor(slots)))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, :20], before[:, :20]) and torch.equal(wide[:, 84:], before[:, 84:])


@pytest.mark.parametrize("rank", [1, 2, 4, 7, 8, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_loop_is_correctly_rounded_for_every_rank(rank: int, dtype: torch.dtype) -> None:
    """float64 is the reference; bfloat16 results are its nearest numbers but where float32 sums fall on the other side of a tie."""
    from credence.serve.vllm_plugin.cpu_lora_kernel import add_product, as_array

    generator = torch.Generator().manual_seed(rank)
    rows, slots = torch.tensor([5, 0, 3]), torch.tensor([2, 0, 2])
    y, x, a, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((6, 50), (6, N_IN), (3, rank, N_IN), (3, rank, 30))
    )
    for start, width in ((0, 30), (13, 30), (35, 15)):
        result, expected = y.clone(), y.double()
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            delta = b[slot].double().T @ (a[slot].double() @ x[row].double())
            expected[row, start : start + width] += 0.375 * delta[:width]
        arrays = (as_array(tensor) for tensor in (result, x, a, b))
        add_product(*arrays, rows.numpy(), slots.numpy(), start, np.float32(0.375))
        if dtype == torch.float32:
            torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-5)
        else:
            assert (result == expected.bfloat16()).float().mean() > 0.99
            torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=1e-4)
        untouched = [1, 2, 4]
        assert torch.equal(result[untouched], y[untouched])


def test_the_compiled_loop_keeps_infinities_and_nan_in_bfloat16() -> None:
    from credence.serve.vllm_plugin.cpu_lora_kernel import add_product, as_array

    x, a = torch.ones(1, 1).bfloat16(), torch.ones(1, 1, 1).bfloat16()
    numbers = [torch.inf, -torch.inf, torch.nan, 3.3895e38, -3.3895e38, 0.0]
    b, y = torch.tensor(numbers).bfloat16().view(1, 1, -1), torch.zeros(1, 6).bfloat16()
    row = np.zeros(1, np.int64)
    add_product(*map(as_array, (y, x, a, b)), row, row, 0, np.float32(1))
    assert torch.equal(y.isnan(), b[0].isnan()) and torch.equal(y.nan_to_num(), b[0].nan_to_num())


def test_waiting_for_a_message_leaves_the_processor_alone() -> None:
    """Without the repair the reader spins: all of the wait is processor time."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from credence.serve.vllm_plugin import cpu_lora

    cpu_lora.install()
    queue = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(queue.export_handle(), 0)
    queue.enqueue("first")
    assert reader.dequeue() == "first"
    before = time.thread_time()
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.8)
    assert time.thread_time() - before < 0.4
    queue.enqueue("second")
    assert reader.dequeue() == "second"


def test_llvmlite_answers_no_special_names_after_the_repair() -> None:
    from llvmlite.binding import ffi

    from credence.serve.vllm_plugin import cpu_lora

    cpu_lora.install()
    assert not hasattr(ffi.lib, "__dict__")
    assert ffi.lib.LLVMPY_GetVersionInfo is not None


def test_rows_of_another_type_than_the_output() -> None:
    """vLLM keeps a float32 buffer between the factors of sharded layers."""
    slots = MAPPINGS["prefill"]
    (y, x), (a, b) = inputs(len(slots), torch.bfloat16), weights(torch.bfloat16)
    ours = wrapper("ours", slots)
    buffers, start = torch.zeros((len(SLICES), len(slots), MAX_RANK)), y.clone()
    ours.add_shrink(buffers, x, a, 1.0)
    expected = slow(y, x, a, b, 1.0, slots)
    ours.add_expand(y, buffers, b, SLICES)
    # The delta and the sum are rounded to 8 bits, the numbers between the factors are not.
    error, delta = (y.double() - expected).abs(), (expected - start.double()).abs()
    assert (error <= 2**-8 * 1.01 * (delta + expected.abs()) + 1e-4).all()


def test_the_layout_of_b_changes_and_nothing_else() -> None:
    from credence.serve.vllm_plugin.cpu_lora import lay_out_for_expansion

    b = torch.randn(SLOTS, 1, 10, 3)
    original, before = b, b.clone()
    assert lay_out_for_expansion(b) is original
    assert torch.equal(b, before) and b.shape == before.shape and b.stride()[2:] == (1, 10)
    memory = b.data_ptr()
    assert lay_out_for_expansion(b).data_ptr() == memory
    # What vLLM does to load an adapter of rank 2 into slot 3, and to empty slot 0.
    loaded = torch.randn(10, 2)
    b[3, 0, : loaded.shape[0], : loaded.shape[1]].copy_(loaded)
    b[0] = 0
    before[3, 0, :, :2] = loaded
    before[0] = 0
    assert torch.equal(b, before)
    assert lay_out_for_expansion(torch.randn(SLOTS, 1, 10, 1)).is_contiguous()


def test_without_the_patch_base_rows_get_another_adapters_weights() -> None:
    """vLLM's op is wrong here; if this fails, vLLM has been repaired and the patch may go."""
    slots = [0, -1, 2, -1]
    (y, x), (a, b) = inputs(4, torch.float32), weights(torch.float32)
    expected = slow(y, x, a, b, 1.0, slots)
    ours, stock = y.clone(), y.clone()
    wrapper("ours", slots).add_lora_linear(ours, x, a, b, 1.0, SLICES)
    wrapper("stock", slots).add_lora_linear(stock, x, a, b, 1.0, SLICES)
    assert torch.equal(ours[[1, 3]], y[[1, 3]])
    torch.testing.assert_close(stock[[0, 2]].double(), expected[[0, 2]], rtol=1e-5, atol=1e-5)
    last_slot = slow(y, x, a, b, 1.0, [0, SLOTS - 1, 2, SLOTS - 1])
    torch.testing.assert_close(stock[[1, 3]].double(), last_slot[[1, 3]], rtol=1e-5, atol=1e-5)


def test_numbers_that_overflow_in_one_adapter_do_not_reach_other_rows() -> None:
    slots = [0, 1, -1, 0, 1, 2]
    (y, x), (a, b) = inputs(6, torch.float32), weights(torch.float32)
    a[0][1], b[1][1] = torch.inf, torch.nan
    wrapper("ours", slots).add_lora_linear(y, x, a, b, 1.0, SLICES)
    assert torch.isfinite(y[[0, 2, 3, 5]]).all() and not torch.isfinite(y[[1, 4]]).all()


@pytest.mark.parametrize("slots", [MAPPINGS["uneven, with base rows"], MAPPINGS["prefill"]])
def test_shrink_and_expand_of_sharded_layers(slots: list[int]) -> None:
    (y, x), (a, b) = inputs(len(slots), torch.float32), weights(torch.float32)
    expected = slow(y, x, a, b, 0.5, slots)
    ours = wrapper("ours", slots)
    buffers = torch.full((len(SLICES), len(slots), MAX_RANK), 7.0)
    ours.add_shrink(buffers, x, a, 0.5)
    ours.add_expand(y, buffers, b, SLICES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    ours.add_expand(y, buffers, b, SLICES, add_inputs=False)
    torch.testing.assert_close(y.double(), slow(torch.zeros_like(y), x, a, b, 0.5, slots), rtol=1e-5, atol=1e-5)


def test_embedding_layers() -> None:
    slots = [1, -1, 4, 1]
    generator = torch.Generator().manual_seed(3)
    y, hidden = torch.randn(4, 10, generator=generator), torch.randn(4, MAX_RANK, generator=generator)
    b = torch.randn(SLOTS, 1, 10, MAX_RANK, generator=generator)
    expected = y.clone()
    for row in (0, 2, 3):
        expected[row] += b[slots[row], 0] @ hidden[row]
    wrapper("ours", slots).add_lora_embedding(y, hidden, b, add_input=True)
    torch.testing.assert_close(y, expected)


def test_the_output_layer_maps_requests_and_the_prompt_rows_of_one_request() -> None:
    a, b = weights(torch.float32, (VOCABULARY,))
    requests = [2, -1, 0]
    ours = wrapper("ours", [2, 2, -1, 0], requests)
    y, x = inputs(3, torch.float32, VOCABULARY)
    expected = slow(y, x, a, b, 1.0, requests)
    ours.add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    # Three prompt positions of request 0, as many as there are requests: the count alone would not show the mistake.
    for request, slot in enumerate(requests):
        y, x = inputs(3, torch.float32, VOCABULARY)
        expected = slow(y, x, a, b, 1.0, [slot] * 3)
        with ours.prompt_rows_of(request):
            ours.add_lora_logits(y, x, a[0], b[0], 1.0)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="7 sampler rows, the step has 3"):
        ours.add_lora_logits(*inputs(7, torch.float32, VOCABULARY), a[0], b[0], 1.0)


def test_a_new_step_forgets_the_groups_of_the_old_one() -> None:
    from vllm.lora.layers import LoRAMapping

    (y, x), (a, b) = inputs(2, torch.float32), weights(torch.float32)
    ours = wrapper("ours", [0, 1])
    ours.add_lora_linear(y.clone(), x, a, b, 1.0, SLICES)
    ours.update_metadata(LoRAMapping((4, 0), (4, 0), is_prefill=True), list(range(1, SLOTS + 1)), SLOTS, 64)
    expected = slow(y, x, a, b, 1.0, [3, -1])
    ours.add_lora_linear(y, x, a, b, 1.0, SLICES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_install_can_be_repeated_and_is_what_vllm_will_use() -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from credence.serve.vllm_plugin import cpu_lora

    cpu_lora.install()
    methods = (GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync, GPUModelRunner._get_prompt_logprobs_dict)
    cpu_lora.install()
    assert methods == (
        GPUModelRunner._sample,
        GPUModelRunner._bookkeeping_sync,
        GPUModelRunner._get_prompt_logprobs_dict,
    )
    assert resolve_obj_by_qualname(CpuPlatform.get_punica_wrapper()) is cpu_lora.GroupedPunicaWrapper


@pytest.fixture(scope="module")
def adapters(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Path]]:
    """As many plain LoRA folders as there are slots, with the requests that name them."""
    from vllm.lora.request import LoRARequest

    made = []
    for index in range(MAX_LORAS):
        folder = tmp_path_factory.mktemp("plain") / f"sample{index}"
        write_sample(folder, engine.artifact, seed=50, index=index, tau=1.0)
        made.append((LoRARequest(f"plain{index}", 100 + index, str(folder)), folder))
    return made


def fill_all_slots(engine: Engine, adapters: list[tuple[Any, Path]], seed: int) -> None:
    from vllm import SamplingParams

    requests = [request for request, _ in adapters]
    generate(engine, [prompt(4, seed + n) for n in range(MAX_LORAS)], SamplingParams(max_tokens=3), requests)


@pytest.mark.engine
def test_base_rows_are_the_base_model_although_every_slot_is_full(
    engine: Engine, adapters: list[tuple[Any, Path]]
) -> None:
    from vllm import SamplingParams

    fill_all_slots(engine, adapters, seed=1000)
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=VOCABULARY, ignore_eos=True)
    prompts = [prompt(9, 1100), prompt(9, 1101), prompt(9, 1102)]
    # All three fit into one step, so that base and adapter rows are mixed in prompts and in decoding.
    assert sum(map(len, prompts)) <= CHUNK
    outputs = generate(engine, prompts, sampling, [None, adapters[0][0], None])
    for number, folder in ((0, None), (1, adapters[0][1]), (2, None)):
        completion = outputs[number].outputs[0]
        expected = Reference(engine.model_path, folder).log_probs(prompts[number] + list(completion.token_ids))
        torch.testing.assert_close(
            logprob_matrix(completion), expected[len(prompts[number]) - 1 : -1], rtol=0, atol=1e-4
        )


@pytest.mark.engine
def test_steps_without_an_adapter_do_not_touch_the_lora_layers(
    engine: Engine, adapters: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    from credence.serve.vllm_plugin import cpu_lora

    fill_all_slots(engine, adapters, seed=1500)
    products: list[int] = []
    original = cpu_lora.GroupedPunicaWrapper.add_lora_linear

    def count(self: Any, y: torch.Tensor, *rest: Any, **options: Any) -> None:
        products.append(y.shape[0])
        original(self, y, *rest, **options)

    monkeypatch.setattr(cpu_lora.GroupedPunicaWrapper, "add_lora_linear", count)
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=VOCABULARY, ignore_eos=True)
    tokens = prompt(9, 1600)
    for user, folder in ((None, None), adapters[1], (None, None)):
        products.clear()
        completion = generate(engine, [tokens], sampling, [user])[0].outputs[0]
        assert bool(products) == (user is not None)
        expected = Reference(engine.model_path, folder).log_probs(tokens + list(completion.token_ids))
        torch.testing.assert_close(logprob_matrix(completion), expected[len(tokens) - 1 : -1], rtol=0, atol=1e-4)


@pytest.mark.engine
def test_prompt_logprobs_of_several_adapters_at_once(engine: Engine, adapters: list[tuple[Any, Path]]) -> None:
    from vllm import SamplingParams

    fill_all_slots(engine, adapters, seed=2000)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    prompts = [prompt(7, 2100), prompt(11, 2101), prompt(5, 2102), prompt(CHUNK + 20, 2103)]
    users = [adapters[2], adapters[0], None, adapters[1]]
    outputs = generate(engine, prompts, sampling, [None if user is None else user[0] for user in users])
    for tokens, user, output in zip(prompts, users, outputs, strict=True):
        expected = Reference(engine.model_path, None if user is None else user[1]).log_probs(tokens)
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]
        wanted = [expected[t, token].item() for t, token in enumerate(tokens[1:])]
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.engine
def test_a_seeded_request_gives_the_same_tokens_with_and_without_chunked_prefill(engine: Engine) -> None:
    """Without the repair the first chunk of the long prompt ends the engine (CPU Generator does not use offset)."""
    from vllm import SamplingParams

    with pytest.raises(RuntimeError, match="offset"):
        torch.Generator().get_offset()
    tokens, neighbour = prompt(CHUNK - 4, 3000), prompt(20, 3001)
    sampling = SamplingParams(max_tokens=8, temperature=2.0, seed=4, ignore_eos=True)
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def texts(prompts: list[list[int]], rules: list[Any]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in generate(engine, prompts, rules)]

    [whole] = texts([tokens], [sampling])
    # The neighbour takes most of the first step, so the same prompt now comes in two chunks.
    _, chunked = texts([neighbour, tokens], [greedy, sampling])
    assert chunked == whole
    # Two seeded prompts, each longer than a step.
    pair = [prompt(CHUNK + 30, 3002), prompt(2 * CHUNK + 1, 3003)]
    together = texts(pair, [sampling, sampling])
    assert together == [*texts(pair[:1], [sampling]), *texts(pair[1:], [sampling])]
    assert texts(pair[:1], [SamplingParams(max_tokens=8, temperature=2.0, seed=5, ignore_eos=True)]) != together[:1]
