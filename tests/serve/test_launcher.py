"""What the launcher checks and sets before vLLM is started."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from credence.adapters import Artifact, BaseModelRef, generate_key, merge, save_key, sign
from credence.adapters.merged import MODEL_NAME
from credence.serve import launcher
from credence.serve.config import CONFIG_VARIABLE, ServeConfig, from_environment
from credence.serve.errors import ConfigurationError
from credence.serve.preflight import GIB, Memory
from tests.tiny import LAYERS, SHAPES, make_artifact, make_model


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


def test_a_trust_file_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--trust: the trust file .*nothing cannot be read"):
        launcher.main("base", {}, trust=str(tmp_path / "nothing"))


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
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    launcher.set_environment(config())
    assert from_environment() == config()
    assert os.environ["VLLM_PLUGINS"] == "mine,credence,credence_http"
    assert len(os.environ["CREDENCE_PLUGIN_TOKEN"]) == 32
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_USE_V2_MODEL_RUNNER"):
        os.environ.pop(name)


def test_json_logs_give_way_to_a_configuration_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "DEBUG"})
    launcher.log_json(tmp_path / "ours")
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == str(tmp_path / "ours")
    loggers = json.loads((tmp_path / "ours").read_text())["loggers"]
    assert set(loggers) == {"credence", "vllm", "uvicorn"} and loggers["credence"]["level"] == "DEBUG"
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = "theirs"
    launcher.log_json(tmp_path / "ours")
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == "theirs"


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("", "0"), ("0", "0"), ("1", "1")])
def test_the_second_model_runner_has_to_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.setenv(name, "")
    if given is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", given)
    launcher.set_environment(config())
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == used


def test_plugin_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match="credence serve"):
        from_environment()
    monkeypatch.setenv(CONFIG_VARIABLE, json.dumps({"adapters": {}}))
    with pytest.raises(ConfigurationError, match="not valid"):
        from_environment()


# Merged models

MODULES = sorted(name.rpartition(".")[2] for name in SHAPES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny")


def merged_model(base: Path, folder: Path, kind: str = "diag") -> Path:
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    artifact = make_artifact(folder / kind, form=kind)
    reference = BaseModelRef(name="tiny")
    merge(artifact.path, base, folder / "merged", linear_modules=shapes, base_model=reference, name="triage")
    return folder / "merged"


@pytest.mark.parametrize(("kind", "rank"), [("diag", 32), ("row", 16), ("point", 16)])
def test_a_merged_model_brings_its_adapter(base: Path, tmp_path: Path, kind: str, rank: int) -> None:
    model = merged_model(base, tmp_path, kind)
    stored, found, modules, dtype = launcher.verify_merged(str(model), {}, tmp_path / "store", [])
    digest = json.loads((model / "credence_merged.json").read_text())["digest"]
    assert stored == {"triage": str(tmp_path / "store" / digest.removeprefix("sha256:"))}
    assert (found, modules, dtype) == (rank, MODULES, "float32")


def test_changed_weights_of_a_merged_model_are_refused(base: Path, tmp_path: Path) -> None:
    model = merged_model(base, tmp_path)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"refused \(hash_mismatch\).*weights were changed.*merge again"):
        launcher.verify_merged(str(model), {}, tmp_path / "store", [])


def test_a_merged_model_takes_no_other_adapter(base: Path, artifact: Artifact, tmp_path: Path) -> None:
    model = merged_model(base, tmp_path)
    with pytest.raises(
        ConfigurationError, match="is a merged model and serves its own adapter alone; remove --adapter x"
    ):
        launcher.verify_merged(str(model), {"x": str(artifact.path)}, tmp_path / "store", [])


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--served-model-name", "other", "--dtype", "float32"], "other"),
        (["--max-model-len", "64", "--served_model_name=other"], "other"),
        (["--served-model-name", "first", "--served-model-name=other"], "other"),
        (["--model-name", "other"], "triage"),
    ],
)
def test_a_name_of_the_user_is_the_adapters_name(base: Path, tmp_path: Path, given: list[str], name: str) -> None:
    stored, *_ = launcher.verify_merged(str(merged_model(base, tmp_path)), {}, tmp_path / "store", given)
    assert list(stored) == [name]


@pytest.mark.parametrize("given", [["a", "b"], [], ["A"], ["a/b"]])
def test_a_merged_model_has_one_valid_name(base: Path, tmp_path: Path, given: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="a merged model has one name"):
        launcher.verify_merged(
            str(merged_model(base, tmp_path)), {}, tmp_path / "store", ["--served-model-name", *given]
        )


def test_the_name_of_a_merged_model_is_a_name_of_an_adapter() -> None:
    assert launcher.ADAPTER_NAME.pattern == f"^{MODEL_NAME.pattern}$"


def test_flags_of_a_merged_model() -> None:
    """Its mean takes no slot, and its dtype is kept: vLLM would round float32 weights."""
    merged = config(adapters={"triage": "/x"}, merged=True)
    flags = launcher.defaults(merged, rank=32, modules=["q_proj"], scheduler="s", given=[], dtype="float32")
    values = {flag: flags[flags.index(flag) + 1] for flag in ("--max-loras", "--max-cpu-loras", "--dtype")}
    assert values == {"--max-loras": "16", "--max-cpu-loras": "20", "--dtype": "float32"}
    assert flags[flags.index("--served-model-name") + 1] == "triage"
    given = ["--served-model-name", "triage", "--dtype=bfloat16"]
    flags = launcher.defaults(merged, rank=32, modules=["q_proj"], scheduler="s", given=given, dtype="float32")
    assert "--served-model-name" not in flags and "--dtype" not in flags
    assert "--dtype" not in launcher.defaults(config(), rank=16, modules=["q_proj"], scheduler="s", given=[])


def test_a_merged_configuration_has_one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not config().merged
    text = config().model_dump_json().replace('"merged":false', '"merged":true')
    monkeypatch.setenv(CONFIG_VARIABLE, text)
    with pytest.raises(ConfigurationError, match="a merged model serves one adapter"):
        from_environment()


@pytest.mark.parametrize("merged", [True, False])
def test_the_whole_command_line(
    base: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    """What vLLM would be started with; the server itself is replaced."""
    started: list[tuple[list[str], ServeConfig]] = []

    def parse(argv: Sequence[str]) -> SimpleNamespace:
        values = {
            "max_lora_rank": rank,
            "max_loras": 33,
            "max_cpu_loras": 41,
            "max_num_seqs": None,
            "max_model_len": 64,
        }
        return SimpleNamespace(argv=list(argv), model=str(model), revision=None, dtype="float32", **values)

    def run(args: SimpleNamespace) -> int:
        started.append((args.argv, from_environment()))
        assert Path(next(iter(from_environment().adapters.values())), "manifest.json").exists()
        return 7

    rank = 32 if merged else 16
    memory = Memory(total=8 * GIB, available=8 * GIB, share=0.9, kv_bytes=GIB, holds_samples=True)
    server = SimpleNamespace(
        parse=parse, run=run, memory=lambda args: memory, smallest_lora_rank=lambda rank: rank, SCHEDULER="s"
    )
    monkeypatch.setitem(sys.modules, "credence.serve.vllm_plugin.server", server)
    monkeypatch.setattr("credence.serve.vllm_plugin.server", server, raising=False)
    for name in (CONFIG_VARIABLE, "CREDENCE_PLUGIN_TOKEN", "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.setenv(name, "")
    model = merged_model(base, tmp_path) if merged else base
    adapters = {} if merged else {"triage": str(artifact.path)}
    key = generate_key()
    trust = save_key(tmp_path / "key", key)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"refused \(unsigned\)"):
        launcher.main(str(model), adapters, trust=trust.name)
    sign(model if merged else artifact.path, key)
    assert launcher.main(str(model), adapters, extra_args=["--seed", "1"], trust=trust.name) == 7
    [(argv, seen)] = started
    assert seen.trust == str(trust), "absolute, because adapters are loaded while the server runs"
    assert argv[:2] == ["--model", str(model)] and argv[-2:] == ["--seed", "1"]
    assert (list(seen.adapters), seen.merged) == (["triage"], merged)
    assert argv[argv.index("--max-lora-rank") + 1] == ("32" if merged else "16")
    assert ("--served-model-name" in argv, "--dtype" in argv) == (merged, merged)
