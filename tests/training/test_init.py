"""Runs that start from a given adapter: an artifact's mean or a PEFT folder, its shape, its digest, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from credence.adapters import BaseModelRef, LoraFactors, PointPosterior, PosteriorConfig, write_artifact
from credence.adapters.artifact import load_artifact, write_sample
from credence.adapters.errors import ArtifactError
from credence.training.checkpoint import RUN_FILE, checkpoint_folder
from credence.training.config import TrainConfig, load_config
from credence.training.errors import CheckpointError, ConfigError, ModelError
from credence.training.init import read_start
from credence.training.loop import train
from tests.training.conftest import quick_config
from tests.training.test_loop import StopAfter

RANK, ALPHA = 3, 7


def write_start(path: Path, *, seed: int = 0, modules: tuple[str, ...] = ("k_proj", "q_proj"), layers: int = 2) -> Path:
    """A random adapter of the tiny base model (hidden 32, one key-value head of 16)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    mean = {
        f"model.layers.{layer}.self_attn.{name}": LoraFactors(
            A=0.3 * torch.randn(RANK, 32, generator=generator),
            B=0.3 * torch.randn(sizes[name], RANK, generator=generator),
        )
        for layer in range(layers)
        for name in modules
    }
    config = PosteriorConfig(
        kind="point",
        method="map",
        credence_version="0",
        base_model=BaseModelRef(name="tiny"),
        rank=RANK,
        lora_alpha=ALPHA,
        target_modules=modules,
    )
    adapter_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(modules)}
    posteriors = {name: PointPosterior() for name in mean}
    write_artifact(path, adapter_config=adapter_config, mean=mean, posteriors=posteriors, config=config)
    return path


def settings(method: str, start: Path, *overrides: str) -> TrainConfig:
    """As quick_config, without r, alpha and targets."""
    given = quick_config(method, *overrides).model_dump(exclude_unset=True)
    given["lora"] = {"init": str(start), "dropout": given["lora"].get("dropout", 0.0)}
    return TrainConfig.model_validate(given)


@pytest.mark.parametrize("source", ["artifact", "peft"])
def test_training_starts_from_the_given_factors(source: str, base: Path, train_file: Path, tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    artifact = load_artifact(start)
    if source == "peft":
        start = tmp_path / "lora"
        write_sample(start, artifact, seed=0, index=0, tau=0.0)
    config = settings("map", start, "train.max_steps=1", "train.learning_rate=1e-9")
    result = load_artifact(train(base, train_file, None, "map", tmp_path / "out", config).path)
    assert (result.config.rank, result.config.lora_alpha) == (RANK, ALPHA)
    assert result.config.target_modules == ("k_proj", "q_proj")
    assert result.adapter_config["lora_alpha"] == ALPHA
    for name, factors in artifact.mean.items():
        torch.testing.assert_close(result.mean[name].A, factors.A, rtol=0, atol=1e-7)
        torch.testing.assert_close(result.mean[name].B, factors.B, rtol=0, atol=1e-7)
    expected = artifact.digest if source == "artifact" else read_start(start).digest
    assert result.config.training["init"] == {"folder": start.name, "digest": expected}
    assert result.config.training["config"]["lora"]["init"] == start.name
    for file in result.path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} holds a path of this machine"


def test_modules_of_one_layer_are_named_in_full(base: Path, train_file: Path, tmp_path: Path) -> None:
    start = write_start(tmp_path / "start", layers=1)
    config = settings("map", start, "train.max_steps=1")
    result = load_artifact(train(base, train_file, None, "map", tmp_path / "out", config).path)
    assert sorted(result.mean) == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.path)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == 2


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("lora.r=4", "lora.r", "lora.r is 4; .* has 3, .* leave lora.r out"),
        ("lora.alpha=16", "lora.alpha", "lora.alpha is 16; .* has 7"),
        ("lora.target_modules=[q_proj]", "lora.target_modules", r"has \['k_proj', 'q_proj'\]"),
        ("lora.target_modules=all-linear", "lora.target_modules", "'all-linear'"),
    ],
)
def test_other_shapes_are_refused(
    override: str, key: str, message: str, base: Path, train_file: Path, tmp_path: Path
) -> None:
    start = write_start(tmp_path / "start")
    config = load_config(None, [f"lora.init={start}", "train.max_steps=1", override])
    with pytest.raises(ConfigError, match=message) as caught:
        train(base, train_file, None, "map", tmp_path / "out", config)
    assert caught.value.key == key


def test_the_same_shapes_may_be_said(base: Path, train_file: Path, tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    said = ["lora.r=3", "lora.alpha=7", "lora.target_modules=[q_proj, k_proj]"]
    config = load_config(None, [f"lora.init={start}", "train.max_steps=1", *said])
    train(base, train_file, None, "map", tmp_path / "out", config)


def test_an_adapter_of_another_model_is_refused(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = settings("map", write_start(tmp_path / "start", layers=3))
    with pytest.raises(ModelError, match=r"2 modules that the base model does not have, e.g. model\.layers\.2"):
        train(base, train_file, None, "map", tmp_path / "out", config)
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        train(base, train_file, None, "map", tmp_path / "out", settings("map", tmp_path / "nowhere"))


def test_a_run_resumes_with_its_own_start_only(base: Path, train_file: Path, tmp_path: Path) -> None:
    start = write_start(tmp_path / "start")
    config = settings("map", start, "train.save_steps=2")
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, None, "map", tmp_path / "out", config, callbacks=[StopAfter(3)])
    record = json.loads((checkpoint_folder(tmp_path / "out") / RUN_FILE).read_text())
    assert record["init"] == {"folder": "start", "digest": load_artifact(start).digest}
    (tmp_path / "start").rename(tmp_path / "kept")
    write_start(tmp_path / "start", seed=1)
    with pytest.raises(CheckpointError, match="init.digest was"):
        train(base, train_file, None, "map", tmp_path / "out", config, 0, True)
    (tmp_path / "start").rename(tmp_path / "wrong")
    (tmp_path / "kept").rename(tmp_path / "start")
    resumed = train(base, train_file, None, "map", tmp_path / "out", config, 0, True)
    whole = train(base, train_file, None, "map", tmp_path / "whole", config)
    assert resumed.digest == whole.digest


@pytest.mark.parametrize("method", ["tfb", "laplace", "mcdropout"])
def test_no_steps_need_an_adapter(method: str, base: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps is 0 and lora.init is not set") as caught:
        train(base, train_file, None, method, tmp_path / "out", quick_config(method, "train.max_steps=0"))
    assert caught.value.key == "lora.init"
    config = settings(method, write_start(tmp_path / "start"), "train.max_steps=0")
    result = load_artifact(train(base, train_file, None, method, tmp_path / "out", config).path)
    assert result.has_posterior and result.metrics["train"]["steps"] == 0
    start = load_artifact(tmp_path / "start")
    for name, factors in start.mean.items():
        torch.testing.assert_close(result.mean[name].B @ result.mean[name].A, factors.B @ factors.A)


def test_methods_with_steps_refuse_none(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = settings("ivon", write_start(tmp_path / "start"), "train.max_steps=0")
    with pytest.raises(ConfigError, match="ivon is trained by steps, .* without: .*tfb"):
        train(base, train_file, None, "ivon", tmp_path / "out", config)
