"""What K rows cost at least on this machine: the base model's matrix products alone, beside the measured K-curve.

    python benchmarks/floor.py [--dtype bfloat16] [--threads 1] [--write]

No LoRA, attention, norms, scheduling or HTTP: only the products of every layer and of the output layer, with weights packed by oneDNN,
one after the other as a model runs them, so that no weight is still in a cache. A decoding step reads all weights once for K
rows; the prompts of K samples are K times the arithmetic of one, as their hidden states differ from the first layer on.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from credence.benchmarks.measure import machine
from credence.benchmarks.workload import ModelShape

COUNTS = (0, 1, 2, 4, 8, 16, 32)
TOKENS = 32
REPEATS = 7
PACKED_FOR = 32
"""Rows that oneDNN chooses the layout for; vLLM takes as many."""
RESULTS = Path(__file__).parent / "results"


def layers(shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of one decoder layer's products as vLLM merges them: query-key-value, output, gate-up, down."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    return [(hidden, 2 * hidden), (hidden, hidden), (hidden, 2 * wide), (wide, hidden)]


class Products:
    """All products of the model with packed weights.

    Args:
        dtype: of weights and activations.
    """

    def __init__(self, shape: ModelShape, dtype: torch.dtype) -> None:
        self._decoder = [size for _ in range(shape.num_layers) for size in layers(shape)]
        self._output = (shape.hidden_size, shape.vocab_size)
        self._dtype = dtype
        self._packed = [pack((torch.randn(m, n) * 0.02).to(dtype)) for n, m in (*self._decoder, self._output)]

    def run(self, rows: int, requests: int) -> float:
        """Shortest of some runs, in milliseconds.

        Args:
            rows: tokens of the step.
            requests: rows that reach the output layer.
        """
        inputs = {n: torch.randn(rows, n).to(self._dtype) for n, _ in self._decoder}
        last = torch.randn(requests, self._output[0]).to(self._dtype)
        given = [*(inputs[n] for n, _ in self._decoder), last]

        def step() -> None:
            for x, weight in zip(given, self._packed, strict=True):
                product(x, weight)

        return _shortest(step)


def pack(weight: Tensor) -> Tensor:
    """The weight [m, n] in the layout that oneDNN multiplies fastest."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
    return packed


def product(x: Tensor, packed: Tensor) -> Tensor:
    """x [T, n] times the packed weight's transpose, [T, m]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return result


def _shortest(step: Callable[[], None]) -> float:
    step()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/floor_bf16.md or floor_f32.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    short = {"bfloat16": "bf16", "float32": "f32"}[arguments.dtype]
    curve = RESULTS / f"k_curve_{short}.json"
    measured = {row["k"]: row for row in json.loads(curve.read_text())["rows"]} if curve.is_file() else {}
    products = Products(ModelShape(), getattr(torch, arguments.dtype))
    lines = [
        f"# The floor under the cost of samples: base products alone, {arguments.dtype}",
        "",
        f"`python benchmarks/floor.py --dtype {arguments.dtype} --threads {arguments.threads} --write`",
        "",
        f"{machine()}, {arguments.threads} thread(s), torch {torch.__version__}; {TOKENS} + {TOKENS} tokens; shortest of {REPEATS} runs. "
        f"Right: the medians of [{curve.name}]({curve.name}), another run; its machine may have been slower or faster.",
        "",
        "| K | prompts ms | a decoding step ms | request ms | against K = 0 | measured ms | measured CPU against K = 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    first: float | None = None
    for k in COUNTS:
        rows = max(k, 1)
        prompts, step = products.run(rows * TOKENS, rows), products.run(rows, rows)
        total = prompts + (TOKENS - 1) * step
        first = total if first is None else first
        row = measured.get(k)
        beside = "- | -" if row is None else f"{row['p50_ms']:.0f} | {row['cpu_ms'] / measured[0]['cpu_ms']:.2f}"
        lines.append(f"| {k} | {prompts:.0f} | {step:.1f} | {total:.0f} | {total / first:.2f} | {beside} |")
    print("\n".join(lines))
    if arguments.write:
        (RESULTS / f"floor_{short}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
