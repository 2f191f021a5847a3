"""`credence eval --generate`: texts, verdicts, confidences and the comparator of token samples, against slow recomputation."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from credence.adapters import load_artifact, probability_correct
from credence.cli.main import run as credence
from credence.training import metrics
from credence.training.errors import DataError, MetricError
from credence.training.generation import Written, _Judge, _most_frequent, measure_generation
from credence.training.loop import train
from credence.training.verifiers import VERIFIERS
from tests.training.conftest import quick_config

Write = Callable[..., Path]
SUMS = [{"prompt": f"{i % 7}+{i % 3}=", "completion": f"{i % 7 + i % 3}"} for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter that has learned some sums, released with the maps of its confidence where they help, and test rows."""
    folder = tmp_path_factory.mktemp("generation")
    for name, rows in (
        ("train", SUMS),
        ("test", [{**row, "answer": f"#### {row['completion']}"} for row in SUMS[:14]]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = quick_config("melora", "train.max_steps=90", "train.learning_rate=0.03", "release.map_rows=24")
    train(base, folder / "train.jsonl", folder / "train.jsonl", "melora", folder / "sums", config, 0)
    return folder


def test_every_number_is_that_of_a_slow_recomputation(folder: Path, base: Path) -> None:
    artifact = load_artifact(folder / "sums")
    found = measure_generation(
        folder / "sums", base, folder / "test.jsonl", "number", [0, 3], 10.0, max_new_tokens=4, token_samples=True
    )
    document = found.document()
    assert document["data"] == {"file": "test.jsonl", "rows": 14}
    assert document["generate"] == {"verifier": "number", "max_new_tokens": 4}
    for entry, result in zip(found.entries, document["results"], strict=True):
        right = [str(VERIFIERS["number"].answer(t.text)) == SUMS[i]["completion"] for i, t in enumerate(entry.texts)]
        assert list(entry.correct) == right
        fitted = artifact.calibration.fitted_map(entry.k if entry.tau else 0)
        assert entry.calibrated == (fitted is not None) == result["calibrated"]
        confidence = [
            probability_correct(fitted, text.score) if fitted else math.exp(text.score) for text in entry.texts
        ]
        assert list(entry.confidence) == pytest.approx(confidence)
        wrong = ~np.array(right)
        assert result["accuracy"] == pytest.approx(np.mean(right))
        assert result["error_auroc"] == metrics.auroc(1 - np.array(confidence), wrong)
        assert result["error_aupr_total"] == metrics.aupr([text.total for text in entry.texts], wrong)
        assert result["aurc"] == pytest.approx(metrics.aurc(confidence, right))
        assert result["ece15"] == pytest.approx(metrics.ece(confidence, right, bins=15))
        assert result["brier"] == pytest.approx(np.mean((np.array(confidence) - right) ** 2))
        assert result["mean_tokens"] == pytest.approx(np.mean([len(text.tokens) for text in entry.texts]))
        assert result["stopped"] == pytest.approx(np.mean([text.stopped for text in entry.texts]))
        assert (result["error_auroc_epistemic"] is None) == (entry.k == 0)
    assert any(found.entries[0].correct) and not all(found.entries[0].correct)
    assert found.entries[1].epistemic != (0.0,) * 14
    (sampled,) = found.token_samples
    for row, texts in enumerate(sampled.samples):
        answers = [VERIFIERS["number"].answer(text.text) for text in texts]
        counts = Counter(answer for answer in answers if answer is not None)
        most = max(counts.values(), default=0)
        assert sampled.confidence[row] == pytest.approx(most / 3)
        assert not counts or counts[VERIFIERS["number"].answer(sampled.texts[row].text)] == most
    assert len({texts for texts in sampled.samples if len({text.tokens for text in texts}) > 1}) > 3
    assert document["token_samples"][0]["pass_at"].keys() == {"1", "3"}
    again = measure_generation(
        folder / "sums", base, folder / "test.jsonl", "number", [2], max_new_tokens=4, token_samples=True
    )
    assert again.token_samples[0].samples == tuple(texts[:2] for texts in sampled.samples)


def written(text: str, score: float = -1.0, stopped: bool = True) -> Written:
    return Written(tokens=(1, 2), text=text, stopped=stopped, score=score, total=0.1, epistemic=0.0)


def test_the_most_frequent_answer_counts(write: Write) -> None:
    from credence.training.data import read_data

    data = read_data(write("rows.jsonl", [{"prompt": "p", "completion": answer} for answer in ("7", "1", "2", "3")]))
    texts = [
        [written("7"), written("is 7."), written("8", -0.1), written("7.0", -0.5)],
        [written("1", -4), written("2", -3), written("2", -2), written("1", -0.5)],  # a tie: the likeliest text
        [written("none"), written("nothing"), written("3"), written("no")],  # one vote of four
        [written("x"), written("y"), written("z"), written("w")],
    ]
    entry = _most_frequent(_Judge(VERIFIERS["number"], data), list(zip(*texts, strict=True)))
    assert entry.confidence == (0.75, 0.5, 0.25, 0.0) and entry.correct == (True, True, False, False)
    assert [text.text for text in entry.texts[:3]] == ["7.0", "1", "3"]
    assert entry.total == pytest.approx((0.5623351446, math.log(2), math.log(4), math.log(4)))
    assert entry.pass_at == pytest.approx({1: (3 / 4 + 2 / 4 + 0 + 0) / 4, 4: 0.5})
    exact = _most_frequent(
        _Judge(VERIFIERS["exact"], data), [[written(r.fields["completion"], stopped=False) for r in data.rows]]
    )
    assert exact.correct == (False,) * 4 and exact.confidence == (0.0,) * 4


def test_metrics_that_are_not_defined_are_null(folder: Path, base: Path, write: Write) -> None:
    rows = write(
        "wrong.jsonl",
        [{"prompt": "1+1=", "completion": "no", "answer": "77777"}, {"prompt": "2=", "completion": "88888"}],
    )
    (result,) = measure_generation(folder / "sums", base, rows, "number", [0], max_new_tokens=3).document(20)["results"]
    assert result["accuracy"] == 0 and result["error_auroc"] is None and result["error_aupr_total"] is None
    assert result["intervals"]["accuracy"] == (0.0, 0.0) and not any(name.startswith("ood") for name in result)


def test_the_command_writes_result_and_rows(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(folder / "sums"), "--base", str(base), "--data", str(folder / "test.jsonl"), "--k", "0,2"]
    options = ["--generate", "number", "--max-new-tokens", "4", "--token-samples"]
    files = ["--json", str(tmp_path / "result.json"), "--rows", str(tmp_path / "rows.jsonl")]
    assert credence([*command, *options, *files]) == 0
    assert "2 texts" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert [entry["k"] for entry in result["results"]] == [0, 2] and len(result["token_samples"]) == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 14 and np.mean([row["correct"] for row in rows[:14]]) == result["results"][0]["accuracy"]
    assert all(len(row["token_samples"]) == 2 for row in rows[28:]) and "token_samples" not in rows[0]
    assert credence([*command, "--generate", "python"]) == 1
    assert "--allow-code-execution" in capsys.readouterr().err
    assert credence([*command, "--generate", "number", "--ood", "x.jsonl"]) == 2


def test_bad_requests_get_one_sentence(folder: Path, base: Path, write: Write) -> None:
    with pytest.raises(MetricError, match="one K is needed"):
        measure_generation(folder / "sums", base, folder / "test.jsonl", "exact", [])
    with pytest.raises(DataError, match='test.jsonl:1: has no "test" and "entry_point".*verifier python needs it'):
        measure_generation(folder / "sums", base, folder / "test.jsonl", "python", allow_code_execution=True)
    long = write("long.jsonl", [{"prompt": "1" * 128, "completion": "1"}])
    with pytest.raises(DataError, match="long.jsonl:1: has a prompt of 128 tokens; the model reads 128"):
        measure_generation(folder / "sums", base, long, "exact", [0])


def test_a_reference_longer_than_the_context_does_not_matter(folder: Path, base: Path, write: Write) -> None:
    rows = write("long-answer.jsonl", [{"prompt": "1+1=", "completion": "1" * 500}] * 2)
    found = measure_generation(folder / "sums", base, rows, "exact", [0], max_new_tokens=2)
    assert found.entries[0].correct == (False, False)
