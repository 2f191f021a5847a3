"""`credence robustness`: its options, and one small grid through to the tables, the page and the JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from credence.cli.robustness import _by_method
from credence.training import robustness
from tests.cli.conftest import Command
from tests.training.conftest import label_rows, make_base


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., list[object]]:
    """The arguments of a small call."""
    for name, rows in (
        ("train", label_rows(12)),
        ("validation", label_rows(9, start=20)),
        ("test", label_rows(9, start=40)),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_base(tmp_path / "tiny")

    def call(*more: object, methods: str = "map,monteclora", rates: str = "0.01") -> list[object]:
        files = [part for name in ("train", "validation", "test") for part in (f"--{name}", tmp_path / f"{name}.jsonl")]
        files[0] = "--data"
        grid = ["--methods", methods, "--learning-rates", rates, "--batch-sizes", "4", "--k", "0,2"]
        quick = [part for setting in ("train.max_steps=2", "release.taus=[1]") for part in ("--set", setting)]
        return ["robustness", "--base", base, *files, *grid, *quick, "--output", tmp_path / "grid", *more]

    return call


def test_a_grid(credence: Command, options: Callable[..., list[object]], tmp_path: Path) -> None:
    outcome = credence(
        *options(
            "--learning-rates",
            "monteclora:1e10",
            "--set-method",
            "monteclora:train.max_steps=4",
            "--json",
            tmp_path / "r.json",
        )
    )
    assert outcome.code == 0, outcome.err
    assert "1/2 map, learning rate 0.01, batch size 4, seed 0: accuracy" in outcome.err
    assert "2/2 monteclora, learning rate 1e+10, batch size 4, seed 0: failed: the loss is nan" in outcome.err
    document = json.loads((tmp_path / "r.json").read_text())
    assert [method["failed"] for method in document["methods"]] == [0, 1]
    assert [cell["learning_rate"] for cell in document["cells"]] == [0.01, 1e10]
    assert document["data"]["test"]["file"] == "test.jsonl" and document["data"]["test"]["rows"] == 9
    page = (tmp_path / "grid/robustness.md").read_text()
    shown = document["methods"][0]["predictions"][0]
    for text in (outcome.out, page):
        assert f"{shown['accuracy']['median']:.4f}" in text and f"{shown['intrinsic']:.4f}" in text
        assert "1 cells, 1 failed" in text and "monteclora minus map, paired" in text
        assert "1 left out for failed cells" in text and "failed: the loss is nan" in text
    assert "| mean + T | NLL | 0 | - +- - | - | - |" in page
    again = credence(
        *options("--learning-rates", "monteclora:1e10", "--set-method", "monteclora:train.max_steps=4", "--json", "-")
    )
    assert "2 of 2 cells are there" in again.err
    assert json.loads(again.out)["methods"] == document["methods"]
    changed = credence(*options("--set", "lora.r=4", methods="map"))
    assert changed.code == 1 and "settings.lora.r was 8 and is now 4" in changed.err


def test_options_reach_the_grid(
    credence: Command, options: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def run(study: Any, folder: Path, *, jobs: int, say: Any) -> Any:
        calls.append((study, jobs))
        raise ValueError("enough")

    monkeypatch.setattr(robustness, "run", run)
    credence(*options("--seeds", "0,3", "--jobs", 2, "--learning-rates", "ivon:3", methods="map,ivon"))
    ((study, jobs),) = calls
    assert jobs == 2 and study.ks == (0, 2)
    assert study.grid.learning_rates == {"map": (0.01,), "ivon": (3.0,)}
    assert (study.grid.batch_sizes, study.grid.seeds) == ((4,), (0, 3))
    assert study.configs["map"].release.ks == (2,) and study.configs["map"].train.save_steps == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--learning-rates", "0.1"), "of all methods are given twice"),
        (("--learning-rates", "ivon:3"), "'ivon' is not one of --methods map,monteclora"),
        (("--learning-rates", "map:fast"), "--learning-rates is 'fast'; give numbers"),
        (("--seeds", "0.5"), "--seeds is '0.5'; give whole numbers"),
        (("--set-method", "method.epsilon=1"), "give METHOD:KEY=VALUE"),
    ],
)
def test_wrong_usage(
    credence: Command, options: Callable[..., list[object]], more: tuple[str, ...], message: str
) -> None:
    outcome = credence(*options(*more))
    assert outcome.code == 2 and message in outcome.err


def test_learning_rates_are_a_methods_own_or_those_of_all() -> None:
    assert _by_method(["map", "ivon"], ["1e-4,3e-4", "ivon:0.3,1"]) == {"map": (1e-4, 3e-4), "ivon": (0.3, 1.0)}
    with pytest.raises(Exception, match="--learning-rates of map are missing"):
        _by_method(["map", "ivon"], ["ivon:0.3,1"])
