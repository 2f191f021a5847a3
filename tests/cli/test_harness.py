"""`credence lm-eval` hands its command line to the harness, with our model in its registry."""

import sys

import pytest

from tests.cli.conftest import Command


def test_the_harness_gets_the_arguments_and_the_model(credence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = pytest.importorskip("lm_eval.__main__", reason="lm-eval is not installed (requirements/dev.txt)")
    registry = pytest.importorskip("lm_eval.api.registry")
    given: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(harness, "cli_evaluate", lambda: given.append(sys.argv))
    assert credence("lm-eval", "run", "--model", "credence", "--help", "-x", "--limit", 3).code == 0
    assert given == [["lm-eval", "run", "--model", "credence", "--help", "-x", "--limit", "3"]]
    assert registry.get_model("credence").__module__ == "credence.cli.lm_eval"


def test_without_the_harness(credence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    outcome = credence("lm-eval", "run")
    assert outcome.code == 1 and "pip install 'credence[lm-eval]'" in outcome.err and outcome.err.count("\n") == 1
