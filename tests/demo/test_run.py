"""The runner's own part: the summary, the commands, and a server that always ends."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from credence.clients import Client
from credence.demo import run as demo
from credence.demo.ask import separate
from credence.demo.server import DemoError, Server, free_port, tail
from credence.training.config import TrainConfig, parse_section
from credence.training.methods import method_settings
from tests.demo.test_ask import case

SECONDS = {"setup": 100.0, "train": 60.5, "serve_ready": 30.0, "first_answer": 0.25, "ask": 40.0}
SLEEPS = "import time; print('started', flush=True); time.sleep(600)"
IGNORES_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS


def test_summary_has_exactly_the_agreed_form() -> None:
    cases = [case("known"), case("noisy"), case("unknown")]
    document = json.loads(json.dumps(demo.summary(SECONDS, cases, separate(cases)), allow_nan=False))
    assert set(document) == {"seconds", "cases", "auroc_unknown", "auroc_noisy_by_aleatoric"}
    assert set(document["seconds"]) == {"setup", "train", "serve_ready", "first_answer"}
    assert set(document["auroc_unknown"]) == {"epistemic", "total", "mean_entropy"}
    assert isinstance(document["auroc_noisy_by_aleatoric"], float)
    assert [one["kind"] for one in document["cases"]] == ["known", "noisy", "unknown"]
    for one in document["cases"]:
        assert set(one) == {"kind", "prompt", "text", "confidence", "total", "aleatoric", "epistemic"}


def test_training_settings_are_ones_the_trainer_takes() -> None:
    config = parse_section(TrainConfig, demo.TRAINING)
    method_settings(demo.METHOD, config.method)


def test_at_least_200_questions_of_each_kind_by_default() -> None:
    assert demo.QUESTIONS_PER_KIND >= 200


def test_setup_seconds_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(demo.SETUP_VARIABLE, "12.5")
    assert demo._setup_seconds() == 12.5
    monkeypatch.delenv(demo.SETUP_VARIABLE)
    assert demo._setup_seconds() == 0.0
    monkeypatch.setenv(demo.SETUP_VARIABLE, "soon")
    with pytest.raises(DemoError, match="DEMO_SETUP_SECONDS is 'soon'"):
        demo._setup_seconds()


def test_a_failed_training_is_one_sentence_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train_command", lambda folder, seed, base: [sys.executable, "-c", "raise SystemExit(3)"])
    assert demo.main(["--output", str(tmp_path)]) == 1
    assert "demo: the training failed with exit code 3" in capsys.readouterr().err
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) > 3000


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train_command", lambda folder, seed, base: [sys.executable, "-c", ""])
    monkeypatch.setattr(
        demo,
        "serve_command",
        lambda folder, port, base: [sys.executable, "-c", "print('no memory'); raise SystemExit(7)"],
    )
    assert demo.main(["--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "the server ended with exit code 7" in message
    assert "no memory" in message


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("program", [SLEEPS, IGNORES_SIGTERM])
def test_the_server_is_stopped_on_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr("credence.demo.server.STOP_TIMEOUT_S", 0.5)
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), Server([sys.executable, "-c", program], url="http://x", log=log) as server:
        assert server._process is not None
        pid = server._process.pid
        deadline = time.monotonic() + 20
        while "started" not in tail(log) and time.monotonic() < deadline:
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert gone(pid)


def test_a_server_that_never_gets_ready_is_reported(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    looks: list[int] = []
    with (
        Server([sys.executable, "-c", SLEEPS], url=url, log=tmp_path / "log") as server,
        Client(url, max_retries=0) as client,
        pytest.raises(DemoError, match="not ready within 0.6 s"),
    ):
        server.wait_ready(client, timeout_s=0.6, waiting=lambda: looks.append(1))
    assert looks


def test_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == "(the log is empty)"
    log.write_text("\n".join(str(number) for number in range(40)))
    assert tail(log, 2) == "38\n39"
