"""What is verified before an engine is started."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from credence.adapters import Artifact
from credence.serve import preflight
from credence.serve.errors import ConfigurationError
from credence.serve.preflight import GIB, BaseModel, Checks, Memory
from tests.servers import ENVIRONMENT, credence_command
from tests.tiny import LAYERS, SHAPES, make_artifact, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def base(model: Path) -> BaseModel:
    found = preflight.read_base(str(model), dtype="float32")
    assert found is not None
    return found


def test_the_base_model_is_read_without_its_weights(model: Path, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert preflight.read_base(str(tmp_path), dtype="float32") == base
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            assert base.modules[f"model.layers.{layer}.{name}"] == shape
    weights = (model / "model.safetensors").stat().st_size
    assert abs(base.weights_bytes - weights) < 8192, "the file has a header beside the numbers"
    assert base.kv_bytes_per_token == 2 * LAYERS * 2 * 32 * 4, "keys and values of 2 heads of 32 numbers"


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_vllm_serves_float32_weights_in_half_precision_unless_told(model: Path, dtype: str, size: int) -> None:
    found = preflight.read_base(str(model), dtype=dtype)
    assert found is not None and found.item_bytes == size


def test_what_is_not_on_this_machine_is_not_known(tmp_path: Path) -> None:
    assert preflight.read_base(str(tmp_path)) is None
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert preflight.read_base(str(tmp_path)) is None
    assert preflight.read_base("nobody/nothing-of-this-name") is None


def test_layers_of_an_artifact(base: BaseModel, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a")
    shapes = {name: (pair.B.shape[0], pair.A.shape[1]) for name, pair in artifact.mean.items()}
    assert preflight.lora_shapes(artifact.path) == shapes
    assert (
        preflight.check_modules("a", str(artifact.path), base)
        == f"{len(shapes)} layers of the base model, shapes equal"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            None,
            "adapter a changes model.layers.0.self_attn.q_proj, and the base model has no linear layer of that name",
        ),
        ((7, 9), "is for a model.layers.0.self_attn.q_proj of 128 x 96, the base model's is 7 x 9"),
    ],
)
def test_an_adapter_of_another_model(
    base: BaseModel, tmp_path: Path, change: tuple[int, int] | None, said: str
) -> None:
    artifact = make_artifact(tmp_path / "a")
    modules = dict(base.modules)
    modules.pop("model.layers.0.self_attn.q_proj")
    if change is not None:
        modules["model.layers.0.self_attn.q_proj"] = change
    other = BaseModel(modules=modules, weights_bytes=1, kv_bytes_per_token=1, item_bytes=1, max_model_len=1)
    with pytest.raises(ConfigurationError, match=said):
        preflight.check_modules("a", str(artifact.path), other)


SIMPLE = BaseModel(
    modules={"l.0.q_proj": (30, 20), "l.1.q_proj": (30, 20), "l.0.up_proj": (1000, 1000)},
    weights_bytes=4 * GIB,
    kv_bytes_per_token=1024,
    item_bytes=2,
    max_model_len=4096,
)


def estimate(memory: Memory, **changes: int) -> str:
    values = {"rank": 2**20, "slots": 4, "samples": 6, "k": 8, "max_len": 4096} | changes
    return preflight.check_memory(SIMPLE, memory, modules=["q_proj"], **values)


def test_memory_is_weights_slots_samples_and_cache() -> None:
    """A slot is rank 2**20 times (30 + 20) twice in 2 bytes: 200 MiB."""
    cpu = Memory(total=16 * GIB, available=16 * GIB, share=0.9, kv_bytes=2 * GIB, holds_samples=True)
    assert estimate(cpu) == (
        "weights 4.00 GiB + 4 LoRA slots 0.78 GiB + 6 kept samples 1.17 GiB + KV cache 2.00 GiB "
        "(2097152 tokens: 8 samples of up to 4096) = 7.95 GiB of 16.00 GiB"
    )
    gpu = Memory(total=16 * GIB, available=16 * GIB, share=0.5, kv_bytes=None, holds_samples=False)
    assert "kept samples" not in estimate(gpu)
    assert "KV cache 3.22 GiB" in estimate(gpu), "what half of the device leaves"


@pytest.mark.parametrize(
    ("memory", "needed"),
    [
        (Memory(total=16 * GIB, available=7 * GIB, share=0.9, kv_bytes=2 * GIB, holds_samples=True), "7.95 GiB"),
        (Memory(total=16 * GIB, available=16 * GIB, share=0.29, kv_bytes=None, holds_samples=False), "4.78 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(memory: Memory, needed: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"needs about {needed} \(weights 4.00 GiB \+ 4 LoRA slots"):
        estimate(memory)


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--port {port} cannot be listened on: Address already in use"):
            preflight.check_port("127.0.0.1", port)
    assert preflight.check_port("127.0.0.1", port) == f"127.0.0.1:{port} is free"


def test_host_memory() -> None:
    total, available = preflight.host_memory()
    assert 0 < available <= total


def test_a_start_ends_at_the_first_problem_and_a_check_notes_it() -> None:
    with pytest.raises(ConfigurationError), Checks().step("x"):
        raise ConfigurationError("no")
    checks = Checks(keep_going=True)
    with checks.step("x"):
        raise ConfigurationError("no")
    with checks.step("y") as row:
        row.found = "fine"
    assert checks.refused and [(row.name, row.problem) for row in checks.rows] == [("x", "no"), ("y", None)]


@pytest.mark.engine
@pytest.mark.slow
def test_the_whole_check(model: Path, tmp_path: Path) -> None:
    """Real vLLM flags; everything that is wrong is listed at once."""
    good, broken = make_artifact(tmp_path / "good"), make_artifact(tmp_path / "broken")
    (broken.path / "posterior.safetensors").write_bytes(b"nothing")

    def check(adapters: dict[str, Artifact], *extra: str) -> subprocess.CompletedProcess[str]:
        paths = {name: artifact.path for name, artifact in adapters.items()}
        command = [*credence_command(model, paths), "--check", "--port", "0", *extra]
        return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200)

    result = check({"good": good})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "layers of good" in result.stdout and "KV cache 1.00 GiB" in result.stdout and "REFUSED" not in result.stdout
    result = check({"good": good, "broken": broken}, "--no-such-flag", "3", "--api-key-file", str(tmp_path / "none"))
    assert result.returncode == 2
    refused = [line for line in result.stdout.splitlines() if "REFUSED" in line]
    expected = ("adapter broken", "cannot be read", "--no-such-flag")
    assert all(part in line for part, line in zip(expected, refused, strict=True)), result.stdout
    assert "Traceback" not in result.stderr and "usage:" not in result.stderr
