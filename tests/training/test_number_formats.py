"""Base models in bfloat16, 8 and 4 bit: adapters and posteriors stay float32, and the loss is near that of a float32 base."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from credence.adapters.artifact import load_artifact
from credence.training import modeling
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError, ModelError
from credence.training.loop import TrainResult, train
from credence.training.methods import METHODS
from credence.training.modeling import add_lora, load_base
from tests.training.conftest import make_base, quick_config

STEPS = 8


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bitsandbytes stores 4 bits in blocks of 64 weights, and some of its kernels want whole blocks in a row."""
    return make_base(tmp_path_factory.mktemp("base") / "wide", hidden_size=64, intermediate_size=128)


def losses(result: TrainResult) -> torch.Tensor:
    return torch.tensor([point["loss"] for point in result.metrics["train"]["curve"]])


def trained(method: str, base: Path, data: Path, output: Path, *options: str) -> TrainResult:
    steps = [f"train.max_steps={STEPS}", "train.logging_steps=1"]
    return train(base, data, None, method, output, quick_config(method, *steps, *options), 3)


def assert_float32(folder: Path) -> None:
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_bfloat16_base(method: str, base: Path, train_file: Path, tmp_path: Path) -> None:
    full = trained(method, base, train_file, tmp_path / "full")
    half = trained(method, base, train_file, tmp_path / "half", "train.dtype=bfloat16")
    assert half.digest != full.digest
    assert_float32(half.path)
    # bfloat16 keeps 8 bits: 0.4 % an operation.
    assert torch.allclose(losses(half), losses(full), rtol=0.03)
    assert losses(full)[-1] < losses(full)[0] and len(losses(full)) == STEPS


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["map", "monteclora", "laplace", "ensemble"])
def test_a_quantised_base(method: str, bits: str, wide_base: Path, train_file: Path, tmp_path: Path) -> None:
    """Training runs on quantised linear layers; what is written is float32 and belongs to the base model itself."""
    pytest.importorskip("bitsandbytes", reason="run `make test-quantization`, which installs bitsandbytes")
    full = trained(method, wide_base, train_file, tmp_path / "full")
    quantised = trained(method, wide_base, train_file, tmp_path / "quantised", f"train.quantization={bits}")
    assert_float32(quantised.path)
    assert torch.allclose(losses(quantised), losses(full), rtol=0.1 if bits == "8bit" else 0.3)
    assert not torch.equal(losses(quantised), losses(full))
    config = load_artifact(quantised.path).config
    assert config.base_model == load_artifact(full.path).config.base_model
    assert config.training["config"]["train"]["quantization"] == bits


@pytest.mark.parametrize(
    ("bits", "layer", "bytes_each", "error"), [("8bit", "Linear8bitLt", 1, 0.01), ("4bit", "Linear4bit", 0.5, 0.11)]
)
def test_the_linear_layers_are_quantised(
    bits: str, layer: str, bytes_each: float, error: float, wide_base: Path
) -> None:
    """And only they: embeddings and output layer are not. The model predicts as a full one with the rounded weights."""
    pytest.importorskip("bitsandbytes", reason="run `make test-quantization`, which installs bitsandbytes")
    full, model = load_base(wide_base, "float32"), load_base(wide_base, "float32", bits)
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.float32
    found = {name: module for name, module in model.named_modules() if type(module).__name__ == layer}
    assert len(found) == 2 * 7
    for name, module in found.items():
        weight = full.get_submodule(name).weight.data
        assert module.weight.nbytes == bytes_each * weight.numel()
        rounded = dequantised(module)
        assert 0.1 * error < float((rounded - weight).norm() / weight.norm()) < error
        weight.copy_(rounded)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected, logits = full(input_ids=ids).logits, model(input_ids=ids).logits
    # Inputs are rounded as well: to 8 bits, or to bfloat16 by the kernel of some processors.
    assert float((logits - expected).norm() / expected.norm()) < 0.05
    _, sites = add_lora(model, LoraSettings(r=2))
    assert len(sites) == 4 and all(type(site.layer.get_base_layer()).__name__ == layer for site in sites)
    assert {site.mean.A.dtype for site in sites} == {torch.float32}


def dequantised(module: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if type(module).__name__ == "Linear4bit":
        return dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return int8_vectorwise_dequant(module.weight.CB, module.weight.SCB).float()


def test_quantisation_without_bitsandbytes_is_refused(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never silently plain LoRA on a full base."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"4bit and bitsandbytes is not installed.*pip install") as caught:
        trained("map", base, train_file, tmp_path / "out", "train.quantization=4bit")
    assert caught.value.key == "train.quantization"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_what_is_asked_of_bitsandbytes(bits: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package: the settings that transformers is given."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(
        modeling, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda _, **kw: given.update(kw))
    )
    load_base(base, "bfloat16", bits)
    settings = given["quantization_config"]
    assert (settings.load_in_8bit, settings.load_in_4bit) == (bits == "8bit", bits == "4bit")
    if bits == "4bit":
        assert settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
        assert settings.bnb_4bit_compute_dtype is torch.bfloat16
    assert given["dtype"] is torch.bfloat16 and list(given["device_map"]) == [""]


@pytest.mark.parametrize("bits", [None, "4bit"])
def test_a_quantised_checkpoint_is_refused(bits: str | None, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(base, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    if bits:
        pytest.importorskip("bitsandbytes", reason="run `make test-quantization`, which installs bitsandbytes")
    with pytest.raises(ModelError, match="is a quantised checkpoint; give the float32 or bfloat16 model"):
        load_base(folder, "float32", bits)
