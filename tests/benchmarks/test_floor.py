"""credence.benchmarks.floor: the products are the model's, and packed weights give the product."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from credence.benchmarks import floor
from credence.benchmarks.workload import ModelShape, random_workload

SHAPE = ModelShape(hidden_size=128, intermediate_size=96, num_layers=3, vocab_size=64)


def test_the_products_are_all_the_matrices_of_the_random_model(tmp_path: Path) -> None:
    weights = load_file(random_workload(tmp_path, SHAPE, max_length=16).base / "model.safetensors")
    # Query, key and value, and gate and up, are merged: the same numbers in fewer matrices.
    expected = sum(weight.numel() for name, weight in weights.items() if name.endswith("_proj.weight"))
    assert SHAPE.num_layers * sum(n * m for n, m in floor.layers(SHAPE)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_weight_gives_the_product_for_any_number_of_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 32).to(dtype)
    for rows in (1, 5, 64):
        x = torch.randn(rows, 32).to(dtype)
        product = floor.product(x, floor.pack(weight)).double()
        torch.testing.assert_close(product, x.double() @ weight.double().T, rtol=1e-2, atol=0.1)


def test_a_step_runs_every_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    original = floor.product

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result = original(x, weight)
        shapes.append((result.shape[0], result.shape[1]))
        return result

    monkeypatch.setattr(floor, "product", product)
    assert floor.Products(SHAPE, torch.float32).run(rows=6, requests=2) > 0
    step = [(6, m) for _ in range(SHAPE.num_layers) for _, m in floor.layers(SHAPE)] + [(2, SHAPE.vocab_size)]
    assert shapes == step * (1 + floor.REPEATS)
