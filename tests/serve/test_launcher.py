"""What the launcher checks and sets before vLLM is started."""

import json
import os
from pathlib import Path

import pytest

from credence.adapters import Artifact
from credence.serve import launcher
from credence.serve.config import CONFIG_VARIABLE, ServeConfig, from_environment
from credence.serve.errors import ConfigurationError
from tests.tiny import make_artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path / "adapter")


def config(**changes: object) -> ServeConfig:
    settings = {
        "adapters": {"a": "/x", "b": "/y"},
        "default_samples": 4,
        "max_samples": 16,
        "state_dir": "/s",
        "stats_dir": "/t",
    }
    return ServeConfig.model_validate({**settings, **changes})


def test_a_good_artifact_is_copied_to_the_private_store(artifact: Artifact, tmp_path: Path) -> None:
    stored, rank, modules = launcher.verify({"triage": str(artifact.path)}, tmp_path / "store")
    assert Path(stored["triage"]) == tmp_path / "store" / artifact.digest.removeprefix("sha256:")
    assert rank == 16
    assert modules == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_a_damaged_artifact_is_refused_with_the_reason_and_nothing_is_kept(artifact: Artifact, tmp_path: Path) -> None:
    weights = artifact.path / "posterior.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"triage=.*refused \(hash_mismatch\).*posterior.safetensors"):
        launcher.verify({"triage": str(artifact.path)}, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["Upper", "", "a/b", "..", "-a", "a" * 65, "a b"])
def test_names(artifact: Artifact, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="must match"):
        launcher.verify({name: str(artifact.path)}, tmp_path / "store")


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--adapter NAME=DIR"):
        launcher.verify({}, tmp_path / "store")


def test_flags_make_room_for_the_largest_ensemble() -> None:
    flags = launcher.defaults(config(), rank=16, modules=["k_proj", "q_proj"], scheduler="s", given=[])
    assert flags[flags.index("--max-loras") + 1] == "18", "16 samples and two means"
    assert flags[flags.index("--max-cpu-loras") + 1] == "26", "two resident sets of 4, 16 more, two means"
    assert flags[flags.index("--lora-target-modules") + 1 :][:2] == ["k_proj", "q_proj"]


@pytest.mark.parametrize("given", [["--max-loras", "3"], ["--max_loras=3"], ["--max-loras=3"]])
def test_flags_of_the_user_are_left_alone(given: list[str]) -> None:
    assert "--max-loras" not in launcher.defaults(config(), rank=16, modules=["q_proj"], scheduler="s", given=given)


def test_the_environment_carries_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_API_KEY", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    launcher.set_environment(config(), ["key"])
    assert from_environment() == config()
    assert os.environ["VLLM_PLUGINS"] == "mine,credence,credence_http"
    assert len(os.environ["CREDENCE_PLUGIN_TOKEN"]) == 32
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_API_KEY", "VLLM_USE_V2_MODEL_RUNNER"):
        os.environ.pop(name)


def test_plugin_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match="credence serve"):
        from_environment()
    monkeypatch.setenv(CONFIG_VARIABLE, json.dumps({"adapters": {}}))
    with pytest.raises(ConfigurationError, match="not valid"):
        from_environment()


def test_api_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret\n")
    assert launcher.api_keys(str(path)) == ["secret"]
    path.write_text("")
    with pytest.raises(ConfigurationError, match="one key"):
        launcher.api_keys(str(path))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        launcher.api_keys(str(tmp_path / "absent"))
    assert launcher.api_keys(None) == []
