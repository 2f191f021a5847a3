"""The training commands hand their options over and show what comes back; the work itself has its own tests."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from credence.adapters import Calibration, Fit
from credence.adapters.errors import ArtifactError
from credence.training import evaluate as evaluation
from credence.training import loop
from credence.training import release as releasing
from credence.training.config import TrainConfig
from credence.training.errors import DataError
from credence.training.loop import TrainResult
from credence.training.report import write as writing
from tests.cli.conftest import Command

RESULT = {
    "k": 10,
    "tau": 4.0,
    "temperature": 1.0,
    "accuracy": 0.9,
    "nll": 0.31,
    "ece10": 0.02,
    "ece15": 0.03,
    "ece_equal_mass": 0.03,
    "brier": 0.1,
    "error_auroc": 0.8,
    "aurc": 0.05,
    "ood_auroc_total": None,
    "ood_auroc_epistemic": None,
    "ood_fpr95": None,
    "mean_confidence": 0.88,
}


def test_train(credence: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def train(*arguments: Any, progress: bool) -> TrainResult:
        calls.extend([*arguments, progress])
        return TrainResult(digest="sha256:ab", path=tmp_path, seconds=1.5, metrics={"train": {"steps": 2}})

    monkeypatch.setattr(loop, "train", train)
    (tmp_path / "c.yaml").write_text("lora: {r: 4}\n")
    outcome = credence(
        "train", "--base", "b", "--data", "t.jsonl", "--method", "ivon", "--output", "out", "--config", tmp_path / "c.yaml",
        "--set", "train.max_steps=7", "--set", "method.ess=1e6", "--seed", 3, "--resume", "--json", "-",
    )  # fmt: skip
    assert outcome.code == 0
    assert json.loads(outcome.out) == {
        "path": "out",
        "digest": "sha256:ab",
        "seconds": 1.5,
        "metrics": {"train": {"steps": 2}},
    }
    assert "wrote out, sha256:ab" in outcome.err and "not released" in outcome.err
    base, data, validation, method, output, config, seed, resume, progress = calls
    assert (base, data, validation, method, output) == ("b", Path("t.jsonl"), None, "ivon", Path("out"))
    assert (seed, resume, progress) == (3, True, False)
    assert isinstance(config, TrainConfig)
    assert (config.lora.r, config.train.max_steps, config.method) == (4, 7, {"ess": "1e6"})


def test_a_wrong_setting_is_named(credence: Command) -> None:
    outcome = credence(
        "train", "--base", "b", "--data", "t", "--method", "map", "--output", "o", "--set", "train.steps=7"
    )
    assert outcome.code == 1
    assert "unknown configuration key train.steps; allowed in train: max_steps" in outcome.err


def test_release(credence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        digest = "sha256:cd"
        tau = {8: Fit(value=40.0, nll=0.5)}
        calibration = Calibration(temperature={0: Fit(value=1.5, nll=0.6), 8: Fit(value=1.1, nll=0.4)})

        def metrics(self) -> dict[str, Any]:
            return {"rows": 9}

    def fit(path: Path, base: str, validation: Path, settings: Any, *, batch_size: int, say: Any) -> Result:
        assert (path, base, validation, batch_size) == (Path("a"), "b", Path("v.jsonl"), 64)
        assert settings.ks == (4, 8)
        say("tau 1: working")
        return Result()

    monkeypatch.setattr(releasing, "release", fit)
    arguments = ("release", "a", "--base", "b", "--validation", "v.jsonl", "--set", "release.ks=[4,8]")
    outcome = credence(*arguments)
    assert outcome.code == 0 and outcome.err == "tau 1: working\n"
    assert outcome.out.splitlines() == [
        "released a, sha256:cd",
        "mean: T 1.500, held-out NLL 0.6000",
        "K = 8: tau 40, T 1.100, held-out NLL 0.4000",
    ]
    assert json.loads(credence(*arguments, "--json", "-").out) == {"path": "a", "digest": "sha256:cd", "rows": 9}


class Measured:
    """An evaluation that knows its document."""

    def __init__(self, document: dict[str, Any], *, resamples: int = 0) -> None:
        self.found = document
        self.resamples = resamples

    def document(self, resamples: int) -> dict[str, Any]:
        assert resamples == self.resamples
        return self.found


@pytest.mark.parametrize(
    ("given", "taus"),
    [
        ((), ["fitted"]),
        (("--tau", "fitted"), ["fitted"]),
        (("--tau", "0.5,2,fitted"), [0.5, 2.0, "fitted"]),
        (("--bootstrap", "50"), ["fitted"]),
        (("--token-samples",), ["fitted"]),
    ],
)
def test_eval(credence: Command, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], taus: list[object]) -> None:
    calls: list[Any] = []
    document = {"adapter": {}, "data": {}, "results": [RESULT | {"k": 0, "tau": 0.0}, RESULT]}
    if "--token-samples" in given:
        document["token_samples"] = [RESULT]

    def measure(*arguments: Any, batch_size: int, token_samples: bool, server: Any) -> Measured:
        assert server is None and token_samples is ("--token-samples" in given)
        calls.append(arguments)
        return Measured(document, resamples=50 if "--bootstrap" in given else 0)

    monkeypatch.setattr(evaluation, "measure", measure)
    command = ("eval", "a", "--base", "b", "--data", "t.jsonl", "--k", "0,10", *given)
    outcome = credence(*command)
    assert outcome.code == 0
    assert calls == [(Path("a"), "b", Path("t.jsonl"), None, [0, 10], taus)]
    assert "accuracy" in outcome.out and "OOD" not in outcome.out
    shown = [line for line in outcome.out.splitlines() if "0.31" in line]
    assert len(shown) == (3 if "--token-samples" in given else 2)
    assert ("10 tokens" in outcome.out) == ("--token-samples" in given)
    assert json.loads(credence(*command, "--json", "-").out) == document


@pytest.mark.parametrize(
    "error", [DataError("no label", file="t.jsonl", line=3), ArtifactError("gone", reason="missing", path="a")]
)
def test_errors_of_the_packages_are_one_sentence(
    credence: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(evaluation, "measure", fail)
    outcome = credence("eval", "a", "--base", "b", "--data", "t")
    assert (outcome.code, outcome.err) == (1, f"credence: {error}\n")


def test_eval_writes_a_report(credence: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = Measured({"results": [RESULT]})
    calls: list[Any] = []

    def write(folder: Path, evaluation: Any, document: Any, *, name: str, command: str) -> Path:
        calls.append((folder, evaluation, document, name))
        assert folder.is_dir() and command == "credence eval 'a folder'"
        return folder / "report.html"

    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(writing, "write_report", write)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/credence", "eval", "a folder"])
    ask = ("eval", tmp_path / "triage", "--base", "b", "--data", "t", "--report")
    outcome = credence(*ask, tmp_path / "new" / "out")
    assert outcome.code == 0 and f"wrote {tmp_path}/new/out/report.html" in outcome.out
    assert calls == [(tmp_path / "new" / "out", measured, measured.found, "triage")]


def test_a_report_that_cannot_be_written_costs_no_evaluation(
    credence: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("the evaluation started")

    monkeypatch.setattr(evaluation, "measure", measure)
    (tmp_path / "file").touch()
    ask = ("eval", "a", "--base", "b", "--data", "t", "--report", tmp_path / "file")
    outcome = credence(*ask)
    assert (outcome.code, "is no folder and cannot be made" in outcome.err) == (1, True)
    for name in [name for name in sys.modules if name.startswith("credence.training.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = credence(*ask)
    assert outcome.code == 1 and "pip install 'credence[report]'" in outcome.err


def test_eval_on_a_server_needs_its_address_and_a_name(credence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[Any] = []

    def measure(*_: Any, server: Any, **__: Any) -> Measured:
        servers.append(server)
        return Measured({"results": [RESULT]})

    monkeypatch.setattr(evaluation, "measure", measure)
    ask = ("eval", "a", "--base", "b", "--data", "t")
    assert credence(*ask, "--engine", "http://h:1", "--model", "m", "--concurrency", "3").code == 0
    (server,) = servers
    assert (server.model, server.concurrency) == ("m", 3)
    for half in (("--engine", "http://h:1"), ("--model", "m")):
        outcome = credence(*ask, *half)
        assert outcome.code == 2 and "belong together" in outcome.err
    assert len(servers) == 1
