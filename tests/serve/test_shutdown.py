"""How the server ends: SIGTERM under load, the engine killed, and refusals to start."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from credence.adapters import Artifact
from tests.servers import ENVIRONMENT, Server, credence_command, start

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BODY = {"model": "diag", "prompt": "w1 w2 w3", "max_tokens": 180, "ignore_eos": True}


class Load:
    """Requests in threads, whose statuses and bodies are kept."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]]) -> None:
        self.answers: list[tuple[int | str, float]] = []
        self._threads = [threading.Thread(target=self._ask, args=(server.url, body)) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, body: dict[str, Any]) -> None:
        try:
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert "error" in response.json() or "choices" in response.json()
            self.answers.append((response.status_code, time.monotonic()))
        except httpx.TransportError as error:
            self.answers.append((type(error).__name__, time.monotonic()))

    def wait(self) -> list[int | str]:
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a request hangs"
        return [status for status, _ in self.answers]


@pytest.fixture
def fresh_server(model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path) -> Any:
    running = start(credence_command(model_path, {"diag": artifacts["diag"].path}), tmp_path / "log", "/readyz")
    yield running
    running.client.close()
    running.process.kill()
    running.process.wait()


def test_sigterm_lets_running_ensembles_finish_and_refuses_new_ones(fresh_server: Server) -> None:
    load = Load(fresh_server, [{**BODY, "uncertainty": {"n_samples": 8}}] * 3 + [BODY] * 2)
    in_engine = 0
    while in_engine < 3 * 8 + 2:  # what reaches the engine after the signal is turned away
        rows = fresh_server.client.get("/metrics").text.splitlines()
        counts = [row for row in rows if row.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
        in_engine = sum(int(float(row.rpartition(" ")[2])) for row in counts)
        assert not load.answers, "answered before the signal: ask for more tokens"
    children = psutil.Process(fresh_server.process.pid).children(recursive=True)
    assert len(children) >= 2, "the engine and its worker"
    fresh_server.process.send_signal(signal.SIGTERM)
    refused: list[int] = []
    deadline = time.monotonic() + 10
    while fresh_server.process.poll() is None and len(refused) < 4 and time.monotonic() < deadline:
        for extra in ({}, {"uncertainty": True}):
            try:
                status = httpx.post(
                    f"{fresh_server.url}/v1/completions", json={**BODY, "max_tokens": 1, **extra}, timeout=10
                )
            except httpx.TransportError:
                break  # the socket is closed already
            # One that came before the signal was seen is still answered; after the first refusal all are refused.
            if status.status_code != 200 or refused:
                refused.append(status.status_code)
    assert load.wait() == [200] * 5
    assert set(refused) == {503}
    assert fresh_server.process.wait(timeout=30) == 0
    assert psutil.wait_procs(children, timeout=10)[1] == [], "processes left behind"
    assert not list(Path("/dev/shm").glob(f"credence-*{fresh_server.process.pid}*"))


def test_a_killed_engine_ends_every_request_and_the_process(fresh_server: Server) -> None:
    load = Load(fresh_server, [{**BODY, "uncertainty": {"n_samples": 8}}] * 2 + [BODY])
    time.sleep(0.5)
    children = psutil.Process(fresh_server.process.pid).children(recursive=True)
    engine = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))
    engine.kill()
    killed = time.monotonic()
    statuses = load.wait()
    assert all(status in (500, 503) for status in statuses), statuses
    assert max(when for _, when in load.answers) - killed < 5
    try:
        assert fresh_server.client.get("/readyz").status_code == 503
    except httpx.TransportError:
        pass  # it has left already
    assert fresh_server.process.wait(timeout=30) == 1
    assert psutil.wait_procs(children, timeout=10)[1] == [], "processes left behind"
    assert "exits with code 1" in fresh_server.log.read_text()


def test_slots_below_the_largest_ensemble_are_refused_at_start(
    model_path: Path, artifacts: dict[str, Artifact]
) -> None:
    command = credence_command(model_path, {"diag": artifacts["diag"].path}, "--max-loras", "4")
    result = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "needs --max-loras of at least 8" in result.stderr
    assert "Traceback" not in result.stderr
