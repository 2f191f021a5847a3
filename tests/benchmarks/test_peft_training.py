"""The comparators are trained as our trainer trains: LoRA+ whose two learning rates are equal is our map."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from credence.adapters import load_artifact
from credence.benchmarks import peft_training
from credence.benchmarks.peft_training import (
    BATCH,
    Comparator,
    Rows,
    evaluate_model,
    fit_temperature,
    train_comparator,
)
from credence.training.config import load_config
from credence.training.loop import train
from credence.training.modeling import load_base
from credence.training.predict import Predictor
from credence.training.release import TEMPERATURES, nll_by_temperature
from tests.training.conftest import make_base

STEPS = 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    words = {"fruit": ("plum", "pear", "fig"), "metal": ("iron", "zinc", "tin"), "bird": ("owl", "hen", "jay")}
    rows = [
        {"text": f"{word} {index}", "label": label}
        for label, found in words.items()
        for word in found
        for index in range(4)
    ]
    found = {}
    for part in ("train", "validation", "test", "ood"):
        found[part] = folder / f"{part}.jsonl"
        found[part].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def test_dora_trains_on_a_base_with_rows_of_zeros(
    base: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT divides by the norm of every row of the weight; without care everything becomes NaN at the first step."""

    def padded(*arguments: Any) -> Any:
        model = load_base(*arguments)
        for layer in model.model.layers:
            with torch.no_grad():
                layer.self_attn.q_proj.weight[-4:] = 0
        return model

    monkeypatch.setattr(peft_training, "load_base", padded)
    rows = Rows.read(base, files)
    model = train_comparator(base, rows, Comparator(adapter="dora"), 0, steps=3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    monkeypatch.setattr(peft_training, "lift_zero_rows", lambda model: None)
    model = train_comparator(base, rows, Comparator(adapter="dora"), 0, steps=3)
    assert not all(bool(p.isfinite().all()) for p in model.parameters())


def test_lora_plus_with_equal_rates_is_map(base: Path, files: dict[str, Path], tmp_path: Path) -> None:
    rows = Rows.read(base, files)
    model = train_comparator(base, rows, Comparator(adapter="lora+", learning_rate=3e-3, ratio=1), 5, steps=STEPS)
    config = load_config(
        None,
        [
            f"train.max_steps={STEPS}",
            f"train.batch_size={BATCH}",
            "train.learning_rate=3e-3",
            "train.warmup_ratio=0.5",
            "train.weight_decay=0",
            "train.save_steps=0",
        ],
    )
    train(base, files["train"], None, "map", tmp_path / "map", config, 5)
    for name, factors in load_artifact(tmp_path / "map").mean.items():
        module = model.base_model.model.get_submodule(name)
        assert torch.allclose(module.lora_A["default"].weight, factors.A, atol=1e-5)
        assert torch.allclose(module.lora_B["default"].weight, factors.B, atol=1e-5)
        assert float(factors.B.abs().max()) > 1e-3


@pytest.mark.parametrize("adapter", ["dora", "adalora"])
def test_a_comparator_learns_and_is_evaluated(adapter: str, base: Path, files: dict[str, Path]) -> None:
    rows = Rows.read(base, files)
    untrained = train_comparator(base, rows, Comparator(adapter=adapter, learning_rate=1e-9), 0, steps=4)
    before = nll_by_temperature(Predictor(untrained, [], rows.pad_token), rows.parts["test"], [{}], [1], [1.0])[1][0]
    model = train_comparator(base, rows, Comparator(adapter=adapter), 0, steps=STEPS)
    temperature, nll = fit_temperature(model, rows, 8)
    assert temperature in TEMPERATURES
    plain, tempered = evaluate_model(model, rows, temperature, 8)
    assert tempered["nll"] == pytest.approx(nll)
    assert tempered["nll"] <= plain["nll"] < before
    assert plain["ood_auroc_total"] == pytest.approx(0.5)
    assert plain["accuracy"] == tempered["accuracy"]
