"""Configuration: unknown keys, bad values and overrides."""

from pathlib import Path

import pytest

from credence.training.config import TrainConfig, load_config
from credence.training.errors import ConfigError
from credence.training.methods import method_settings


def test_defaults_are_valid() -> None:
    config = load_config()
    assert config == TrainConfig()
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.release.ks == (8, 10, 32)


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora: {r: 4, target_modules: all-linear}\ntrain:\n  max_steps: 7\nmethod: {ess: 100}\n")
    config = load_config(
        path, ["train.learning_rate=1e-2", "lora.r=16", "lora.target_modules=[k_proj]", "method.clip_radius=2"]
    )
    assert config.lora.r == 16
    assert config.lora.target_modules == ("k_proj",)
    assert config.train.max_steps == 7
    assert config.train.learning_rate == 0.01
    assert config.method == {"ess": 100, "clip_radius": 2}


def test_a_comma_list_of_modules() -> None:
    assert load_config(None, ["lora.target_modules=q_proj,k_proj"]).lora.target_modules == ("q_proj", "k_proj")


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        (
            "train.lr=1",
            "train.lr",
            r"unknown configuration key train\.lr; allowed in train: .*learning_rate.*warmup_ratio",
        ),
        (
            "optimizer.lr=1",
            "optimizer",
            r"unknown configuration key optimizer; allowed: lora, train, method, data, release",
        ),
        ("lora.r=0", "lora.r", r"lora\.r: .*greater than or equal to 1 \(got 0\)"),
        ("lora.r=ten", "lora.r", r"lora\.r: .*\(got 'ten'\)"),
        ("train.dtype=float16", "train.dtype", r"train\.dtype: .*'float32' or 'bfloat16'"),
        ("data.template=hello", "data.template", r"must hold \{text\} exactly once"),
        ("release.ks=[0]", "release.ks", r"1 or more"),
        ("train.learning_rate=.nan", "train.learning_rate", r"finite"),
    ],
)
def test_bad_overrides_name_the_key(override: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, [override])
    assert caught.value.key == key


def test_max_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config(None, ["train.max_steps=3", "train.epochs=1"])


@pytest.mark.parametrize("override", ["max_steps=3", "train.max_steps", "=3", "train..x=3"])
def test_overrides_need_section_key_and_value(override: str) -> None:
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(None, [override])


def test_files_that_are_not_configurations(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(path)
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)
    path.write_text("train: 3\n")
    with pytest.raises(ConfigError, match="a value, not a section"):
        load_config(path, ["train.max_steps=1"])


def test_method_settings_are_the_methods_own() -> None:
    assert method_settings("ivon", {"ess": 5}).model_dump()["ess"] == 5
    with pytest.raises(
        ConfigError, match=r"unknown configuration key method\.ess; allowed in method: epsilon, components"
    ):
        method_settings("monteclora", {"ess": 5})
    with pytest.raises(ConfigError, match=r"unknown configuration key method\.epsilon"):
        method_settings("map", {"epsilon": 5})
    with pytest.raises(ConfigError, match=r"method\.beta1: .*less than 1"):
        method_settings("ivon", {"beta1": 1})
    with pytest.raises(ConfigError, match="unknown method 'sgd'; allowed: map, monteclora, ivon"):
        method_settings("sgd", {})
