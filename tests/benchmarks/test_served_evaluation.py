"""The comparison of two evaluations: what it calls equal, and what it would have found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from credence.benchmarks.served_evaluation import differences, page, prepare
from credence.training.evaluate import Evaluation, measure
from credence.training.loop import train
from tests.training.conftest import label_rows, make_base, quick_config


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("served")
    base = make_base(folder / "base")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, label_rows(12))) + "\n")
    train(base, rows, None, "melora", folder / "adapter", quick_config("melora"), 0)
    return measure(folder / "adapter", base, rows, ks=[0, 2])


def test_equal_evaluations_have_no_difference(evaluation: Evaluation) -> None:
    for row in differences(evaluation, evaluation):
        assert (row["other_predictions"], row["log_prob"], row["epistemic"], row["metric_difference"]) == (0, 0, 0, 0)
        assert row["rows"] == 12


def test_another_prediction_and_another_order_of_rows(evaluation: Evaluation) -> None:
    order = list(range(11, -1, -1))
    entries = []
    for entry in evaluation.entries:
        scores = replace(
            entry.scores,
            **{name: getattr(entry.scores, name)[order] for name in entry.scores.__dataclass_fields__},
        )
        scores.choice[3] += 1
        scores.log_prob[5] -= 0.25
        entries.append(replace(entry, scores=scores))
    found = differences(evaluation, replace(evaluation, entries=tuple(entries)))
    for row in found:
        assert row["other_predictions"] == 1
        assert row["log_prob"] == pytest.approx(0.25)
        assert (row["metric"], row["metric_difference"]) == ("nll", pytest.approx(0.25 / 12))
    speed = {"rows": 12, "other_work": 0.0, "results": {"served": {"wall_s": 2.0, "cpu_s": 1.0, "ratio": 1.0}}}
    text = page("command", [{"task": "t", **row} for row in found], {"small": speed}, 3)
    assert "| t | 2 | 1.00 | 12 |" in text and "| served | 2.0 | 6.0 | 1.0 | 1.00 |" in text


def test_rows_that_do_not_fit_the_context_are_left_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", context=1024)
    (tmp_path / "data" / "task").mkdir(parents=True)
    rows = [*label_rows(8), {"text": "dog " * 200, "label": "dog"}]
    for part in ("train", "validation", "test"):
        (tmp_path / "data" / "task" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = ["train.max_steps=1", "release.ks=[2]", "release.taus=[1]", "method.epsilon=5e-3"]
    adapter, files = prepare("task", 50, base, tmp_path / "data", tmp_path / "work", settings)
    assert (adapter / "manifest.json").exists() and set(files) == {"train", "validation", "test"}
    assert len(files["test"].read_text().splitlines()) == 8
