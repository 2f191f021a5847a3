"""Real servers for all tests that need one: ours and stock vLLM's, each started once a session, on a tiny random model.

The fixtures are those of tests/conftest.py: were they imported in two folders, there would be two of each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import httpx
import pytest

# Not at the top: most tests need no torch.
if TYPE_CHECKING:
    from credence.adapters import Artifact

STARTUP_TIMEOUT_S = 240
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "CREDENCE_FORK_ENGINE": "1",
}
ENGINE_FLAGS = [
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "192", "--block-size", "32", "--served-model-name", "base",
    "--max-num-batched-tokens", "64",
]  # fmt: skip


@dataclass
class Server:
    """A running server process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def complete(self, **body: Any) -> httpx.Response:
        """POST /v1/completions."""
        return self.client.post("/v1/completions", json=body)

    def metric(self, line: str) -> float:
        """Value of one sample of /metrics, by its exact name and labels; 0 if absent."""
        for row in self.client.get("/metrics").text.splitlines():
            if row.startswith(line + " "):
                return float(row.rpartition(" ")[2])
        return 0.0

    def stop(self) -> int:
        """SIGTERM, then waits for the exit code."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start(command: list[str], log: Path, path: str = "/health", environment: dict[str, str] | None = None) -> Server:
    """Starts a server on a free port and waits until ``path`` answers 200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output: IO[bytes] = log.open("wb")
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
    )
    output.close()
    server = Server(process=process, url=f"http://127.0.0.1:{port}", log=log)
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.client.get(path).status_code == 200:
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    process.kill()
    process.wait()
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-6000:]}")


def credence_command(model: Path, adapters: dict[str, Path], *extra: str) -> list[str]:
    """Command line of our server."""
    named = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    return [
        str(Path(sys.executable).parent / "credence"),
        "serve",
        str(model),
        *named,
        "--max-samples",
        "8",
        *ENGINE_FLAGS,
        *extra,
    ]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its tokenizer."""
    from tests.tiny import make_model

    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Artifact"]:
    """One adapter of each kind."""
    from tests.tiny import make_artifact

    folder = tmp_path_factory.mktemp("artifacts")
    return {
        "diag": make_artifact(folder / "diag", form="diag"),
        "row": make_artifact(folder / "row", form="row", seed=6, tau={8: 2.0}, temperature={0: 0.8, 2: 1.3, 8: 1.7}),
        "point": make_artifact(folder / "point", form="point", seed=7),
    }


@pytest.fixture(scope="session")
def server(
    model_path: Path, artifacts: dict[str, "Artifact"], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Our server with the three adapters."""
    command = credence_command(model_path, {name: artifact.path for name, artifact in artifacts.items()})
    running = start(command, tmp_path_factory.mktemp("server") / "log", "/readyz")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def stock_server(
    model_path: Path, artifacts: dict[str, "Artifact"], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Stock vLLM with the mean adapter of ``diag`` as a plain LoRA and none of our plugins."""
    program = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "--model",
        str(model_path),
        "--host",
        "127.0.0.1",
        *ENGINE_FLAGS,
        "--enable-lora",
    ]
    command += ["--max-lora-rank", "16", "--lora-modules", f"diag={artifacts['diag'].path}"]
    running = start(command, tmp_path_factory.mktemp("stock") / "log", environment={"VLLM_PLUGINS": ""})
    yield running
    running.stop()
