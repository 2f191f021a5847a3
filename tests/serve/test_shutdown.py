"""How the server ends: SIGTERM under load, once and twice, and refusals to start."""

import json
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
    """Requests in threads, whose statuses and ends are kept. A stream counts as answered (200) only with all its events."""

    def __init__(self, server: Server, bodies: list[dict[str, Any]]) -> None:
        self.answers: list[tuple[int | str, float]] = []
        self._threads = [threading.Thread(target=self._ask, args=(server.url, body)) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, body: dict[str, Any]) -> None:
        try:
            response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            status: int | str = response.status_code
            if response.headers["content-type"].startswith("text/event-stream"):
                events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
                failed = [json.loads(event)["error"]["code"] for event in events[:-1] if '"error"' in event]
                status = failed[0] if failed else 200 if events[-1] == "[DONE]" else "cut off"
            else:
                assert "error" in response.json() or "choices" in response.json()
            self.answers.append((status, time.monotonic()))
        except httpx.TransportError as error:
            self.answers.append((type(error).__name__, time.monotonic()))

    def wait(self) -> list[int | str]:
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a request hangs"
        return [status for status, _ in self.answers]


def in_engine(server: Server) -> int:
    """Rows that the engine has."""
    rows = server.client.get("/metrics").text.splitlines()
    counts = [row for row in rows if row.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
    return sum(int(float(row.rpartition(" ")[2])) for row in counts)


@pytest.fixture
def fresh_server(model_path: Path, artifacts: dict[str, Artifact], tmp_path: Path) -> Any:
    running = start(credence_command(model_path, {"diag": artifacts["diag"].path}), tmp_path / "log", "/readyz")
    yield running
    running.client.close()
    running.process.kill()
    running.process.wait()


def test_sigterm_lets_everything_accepted_finish_and_refuses_new_requests(fresh_server: Server) -> None:
    """Also a score, whose text is read again after the signal, and streams."""
    ensemble, score = {"n_samples": 8}, {"n_samples": 4, "mode": "score"}
    bodies = [{**BODY, "uncertainty": ensemble}] * 2 + [{**BODY, "uncertainty": score}] + [BODY]
    load = Load(fresh_server, [{**body, "stream": stream} for body in bodies for stream in (False, True)])
    while in_engine(fresh_server) < 4 * 8 + 2 + 2:
        assert not load.answers, "answered before the signal: ask for more tokens"
    children = psutil.Process(fresh_server.process.pid).children(recursive=True)
    assert len(children) >= 2, "the engine and its worker"
    fresh_server.process.send_signal(signal.SIGTERM)
    refused: list[httpx.Response] = []
    ready: list[int] = []
    deadline = time.monotonic() + 10
    while fresh_server.process.poll() is None and len(refused) < 4 and time.monotonic() < deadline:
        try:
            ready.append(httpx.get(f"{fresh_server.url}/readyz", timeout=10).status_code)
            for extra in ({}, {"uncertainty": True}):
                body = {**BODY, "max_tokens": 1, **extra}
                response = httpx.post(f"{fresh_server.url}/v1/completions", json=body, timeout=10)
                # One that came before the signal was seen is still answered; after the first refusal all are refused.
                if response.status_code != 200 or refused:
                    refused.append(response)
        except httpx.TransportError:
            break  # the socket is closed already
    assert load.wait() == [200] * len(bodies) * 2
    assert refused and {response.status_code for response in refused} == {503}
    assert all((r.headers["retry-after"], r.headers["connection"]) == ("1", "close") for r in refused)
    assert ready[-1] == 503 and ready == sorted(ready), "not ready from the signal on"
    assert fresh_server.process.wait(timeout=30) == 0
    assert psutil.wait_procs(children, timeout=10)[1] == [], "processes left behind"
    assert not list(Path("/dev/shm").glob(f"credence-*{fresh_server.process.pid}*"))


def test_a_second_sigterm_ends_the_wait(fresh_server: Server) -> None:
    load = Load(
        fresh_server, [{**BODY, "uncertainty": {"n_samples": 8}, "stream": stream} for stream in (True, False)] * 8
    )
    while in_engine(fresh_server) < 16:
        assert not load.answers
    fresh_server.process.send_signal(signal.SIGTERM)
    while fresh_server.client.get("/readyz").status_code == 200:
        pass
    fresh_server.process.send_signal(signal.SIGTERM)
    statuses = load.wait()
    assert fresh_server.process.wait(timeout=30) == 1, "answers were cut off"
    assert set(statuses) - {200}, "nothing was cut off: ask for more tokens"
    assert all(status == 503 or isinstance(status, str) or status == 200 for status in statuses), statuses
    assert "Requests were cut off" in fresh_server.log.read_text()


def test_slots_below_the_largest_ensemble_are_refused_at_start(
    model_path: Path, artifacts: dict[str, Artifact]
) -> None:
    command = credence_command(model_path, {"diag": artifacts["diag"].path}, "--max-loras", "4")
    result = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert "needs --max-loras of at least 8" in result.stderr
    assert "Traceback" not in result.stderr
