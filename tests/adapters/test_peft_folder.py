"""A PEFT folder is read exactly, and refused by name where it holds more than a plain LoRA."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from credence.adapters.errors import ArtifactError
from credence.adapters.peft_folder import read_peft_folder, read_peft_lora

RANK = 3


class Net(nn.Module):
    """Two layers of different shapes; PEFT asks for a configuration."""

    config = {"model_type": "custom"}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA that the installed PEFT wrote."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=RANK, lora_alpha=6, target_modules=["first", "second"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **changes}, path)


def refused(folder: Path, reason: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        read_peft_lora(folder)
    assert caught.value.reason == reason


def test_what_peft_wrote_is_read(folder: Path) -> None:
    config, factors = read_peft_lora(folder)
    assert (config["r"], config["lora_alpha"]) == (RANK, 6)
    assert sorted(factors) == ["first", "second"]
    stored = load_file(folder / "adapter_model.safetensors")
    for name, shapes in {"first": ((RANK, 5), (7, RANK)), "second": ((RANK, 7), (4, RANK))}.items():
        assert (tuple(factors[name].A.shape), tuple(factors[name].B.shape)) == shapes
        assert torch.equal(factors[name].A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(factors[name].B, stored[f"base_model.model.{name}.lora_B.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_exactly(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "adapter_model.safetensors"
    half = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(half, path)
    for name, pair in read_peft_lora(folder)[1].items():
        for side, factor in (("A", pair.A), ("B", pair.B)):
            assert factor.dtype == torch.float32
            assert torch.equal(factor.to(dtype), half[f"base_model.model.{name}.lora_{side}.weight"])


def test_the_digest_is_of_both_files(folder: Path) -> None:
    digests = {read_peft_folder(folder).digest}
    edit_config(folder, lora_alpha=12)
    digests.add(read_peft_folder(folder).digest)
    edit_tensors(folder, **{"base_model.model.first.lora_A.weight": torch.ones(RANK, 5)})
    digests.add(read_peft_folder(folder).digest)
    assert len(digests) == 3 and all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        ({"peft_type": "IA3"}, "unsupported", "peft_type is 'IA3', only LORA"),
        ({"use_dora": True}, "unsupported", "use_dora is True"),
        ({"use_rslora": True}, "unsupported", "use_rslora is True"),
        ({"rank_pattern": {"first": 2}}, "unsupported", "rank_pattern"),
        ({"modules_to_save": ["head"]}, "unsupported", "modules_to_save"),
        ({"monteclora_config": {"num_samples": 4}}, "unsupported", "monteclora_config"),
        ({"init_lora_weights": "pissa"}, "unsupported", "'pissa', a start that changes the base model's own weights"),
        ({"velora_config": {"x": 1}}, "unsupported", "velora_config is .*not understood"),
        ({"use_tomorrows_idea": True}, "unsupported", "use_tomorrows_idea is True, a setting that is not understood"),
        ({"r": 2}, "wrong_shape", "the rank is 2"),
        ({"r": 0}, "malformed", "r is 0"),
        ({"r": None}, "malformed", "r is None"),
        ({"lora_alpha": -1}, "malformed", "lora_alpha is -1"),
        ({"lora_alpha": "16"}, "malformed", "lora_alpha is '16'"),
    ],
)
def test_configurations_that_are_refused(folder: Path, changes: dict[str, Any], reason: str, message: str) -> None:
    edit_config(folder, **changes)
    refused(folder, reason, message)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_model_alone_are_read(folder: Path, start: object) -> None:
    edit_config(folder, init_lora_weights=start)
    assert len(read_peft_lora(folder)[1]) == 2


@pytest.mark.parametrize(
    ("name", "tensor", "reason", "message"),
    [
        ("first.lora_A", torch.full((RANK, 5), float("nan")), "not_finite", "not finite"),
        ("first.lora_A", torch.ones(RANK, 5, dtype=torch.float64), "unsupported", "is torch.float64"),
        ("first.lora_A", torch.ones(RANK), "wrong_shape", "needs two matrices"),
        ("third.lora_A", torch.ones(RANK, 5), "wrong_shape", "third needs two matrices"),
        ("first.lora_magnitude_vector", torch.ones(7), "unsupported", "is not a LoRA factor"),
    ],
)
def test_tensors_that_are_refused(folder: Path, name: str, tensor: torch.Tensor, reason: str, message: str) -> None:
    edit_tensors(folder, **{f"base_model.model.{name}.weight": tensor})
    refused(folder, reason, message)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "opened",))

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, "unsupported", r"adapter_model\.bin, a pickle.*safe_serialization")
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    refused(folder, "malformed", "not a safetensors file")
    assert not (folder / "opened").exists()


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "missing", "does not exist; give a folder with")
    refused(folder / "adapter_config.json", "not_a_folder", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "missing", "a PEFT LoRA folder needs adapter_config.json")
    with pytest.raises(ArtifactError, match="are left of the limit"):
        read_peft_lora(folder, max_bytes=500)
    target = folder / "adapter_model.safetensors"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    refused(folder, "symlink", "symbolic links are not followed")
