"""Evaluations of a trained artifact: several tau, token samples of the mean, and the rows one by one, against slow references."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from credence.adapters import load_artifact
from credence.training.errors import MetricError
from credence.training.evaluate import evaluate, measure, token_shares
from credence.training.loop import train
from credence.training.metrics import accuracy, nll
from credence.training.predict import Prediction, score
from credence.training.rows import row_documents
from tests.training.conftest import label_rows, quick_config

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released Me-LoRA adapter of three labels."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, start in (("train", 0), ("validation", 24)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, label_rows(24, start=start))) + "\n")
    files = (folder / "train.jsonl", folder / "validation.jsonl")
    train(base, *files, "melora", folder / "adapter", quick_config("melora"), 0)
    return folder / "adapter"


@pytest.fixture
def test_rows(write: Write) -> Path:
    """30 label rows that the adapter has not seen."""
    return write("test.jsonl", label_rows(30, start=60))


@pytest.fixture
def ood_rows(write: Write) -> Path:
    """Rows with a label that the adapter does not know."""
    return write("ood.jsonl", [{"text": f"stone {index}", "label": "stone"} for index in range(7)])


def test_each_tau_is_measured_with_its_own_samples(artifact: Path, base: Path, test_rows: Path) -> None:
    fitted = load_artifact(artifact).config.fitted_tau(3)
    found = evaluate(artifact, base, test_rows, ks=[0, 3], tau=[0.0, 0.5, "fitted", fitted])["results"]
    assert [(entry["k"], entry["tau"]) for entry in found[::2]] == [(0, 0), (3, 0), (3, 0.5), (3, fitted)]
    assert [entry["temperature"] for entry in found[::2]] == [1.0] * 4
    # tau = 0 is the mean; every other tau is what an evaluation of it alone finds.
    assert found[2]["nll"] == found[0]["nll"] != found[4]["nll"] != found[6]["nll"]
    for position, tau in ((4, 0.5), (6, fitted)):
        assert evaluate(artifact, base, test_rows, ks=[3], tau=tau)["results"] == found[position : position + 2]


def test_rows_are_those_of_the_metrics(artifact: Path, base: Path, test_rows: Path, ood_rows: Path) -> None:
    evaluation = measure(artifact, base, test_rows, ood_rows, ks=[0, 2])
    rows, results = list(row_documents(evaluation)), evaluation.document()["results"]
    assert len(rows) == len(results) * (30 + 7)
    labels = [json.loads(line)["label"] for line in test_rows.read_text().splitlines()]
    for result in results:
        own = [row for row in rows if all(row[key] == result[key] for key in ("k", "tau", "temperature"))]
        inside, outside = own[:30], own[30:]
        assert [row["line"] for row in inside] == list(range(1, 31)) and not any(row["ood"] for row in inside)
        assert [row["answer"] for row in inside] == labels
        assert accuracy([row["predicted"] == row["answer"] for row in inside]) == result["accuracy"]
        assert [row["correct"] for row in inside] == [row["predicted"] == row["answer"] for row in inside]
        assert nll([row["log_prob"] for row in inside]) == pytest.approx(result["nll"], abs=1e-12)
        assert [(row["ood"], row["correct"], row["log_prob"]) for row in outside] == [(True, None, None)] * 7
        for row in own:
            plain = row["temperature"] == 1
            assert row["aleatoric"] == (row["total"] - row["epistemic"] if plain else None)
    json.dumps(rows, allow_nan=False)


def test_rows_of_free_text_have_their_tokens(base: Path, write: Write, tmp_path: Path) -> None:
    rows = [{"prompt": f"count {index}", "completion": " one" * (1 + index % 2)} for index in range(8)]
    data = write("text.jsonl", rows)
    train(base, data, None, "melora", tmp_path / "text", quick_config("melora"), 0)
    evaluation = measure(tmp_path / "text", base, data, ks=[2])
    (found, *_), result = list(row_documents(evaluation)), evaluation.document()["results"][0]
    assert (found["answer"], found["predicted"]) == (" one", None)
    assert [token["token"] for token in found["tokens"]] == [" ", "o", "n", "e", "</s>"]
    assert found["log_prob"] == pytest.approx(sum(token["log_prob"] for token in found["tokens"]))
    assert found["total"] == pytest.approx(sum(token["total"] for token in found["tokens"]) / 5)
    every = [token["log_prob"] for row in list(row_documents(evaluation))[:8] for token in row["tokens"]]
    assert result["nll"] == pytest.approx(-sum(every) / len(every))
    with pytest.raises(MetricError, match="token samples are shares of answers .* completion rows"):
        measure(tmp_path / "text", base, data, ks=[2], token_samples=True)


def prediction(probs: list[list[float]]) -> Prediction:
    table = torch.tensor(probs, dtype=torch.float64)
    rows = torch.arange(len(table))
    return Prediction(k=1, row=rows, target=rows * 0, log_mean_PC=table.log(), expected_entropy=rows * 0.0)


def test_token_shares_equal_a_loop_over_tokens() -> None:
    """Rows of two and three answers; the inverse of the distribution function, written out. The last row's sum is short of 1."""
    probs = [[0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.0, 0.25, 0.75], [0.5, 0.4, 0.0]]
    uniforms = torch.rand((4, 9), generator=torch.Generator().manual_seed(0))
    uniforms[0, :3] = torch.tensor([0.0, 1 - 2.0**-24, 0.2])
    uniforms[1, 0], uniforms[2, 0], uniforms[3, 0] = 1 - 2.0**-24, 0.0, 0.95
    found = token_shares(prediction(probs), uniforms)
    for row, p in enumerate(probs):
        counts, answers = [0] * 3, [index for index in range(3) if p[index] > 0]
        for u in uniforms[row].double().tolist():
            counts[next(index for index in answers if sum(p[: index + 1]) > u * sum(p))] += 1
        expected = [(counts[index] + (1 / len(answers) if index in answers else 0)) / 10 for index in range(3)]
        assert found.log_mean_PC[row].exp().tolist() == pytest.approx(expected, abs=1e-15)
        entropy = -sum(q * math.log(q) for q in expected if q)
        scores = score(found)
        assert (scores.total[row].item(), scores.epistemic[row].item()) == (pytest.approx(entropy), 0.0)


def test_many_token_shares_approach_the_mean() -> None:
    probs = [[0.2, 0.5, 0.3]]
    uniforms = torch.rand((1, 200_000), generator=torch.Generator().manual_seed(1))
    found = token_shares(prediction(probs), uniforms).log_mean_PC.exp()
    assert found[0].tolist() == pytest.approx(probs[0], abs=0.005)


def test_token_samples_stand_beside_the_averages(artifact: Path, base: Path, test_rows: Path, ood_rows: Path) -> None:
    plain = evaluate(artifact, base, test_rows, ood_rows, ks=[1, 4])
    both = evaluate(artifact, base, test_rows, ood_rows, ks=[1, 4], token_samples=True)
    drawn = both.pop("token_samples")
    assert both == plain
    assert [(entry["k"], entry["tau"], entry["temperature"]) for entry in drawn] == [(1, 0, 1), (4, 0, 1)]
    assert all(entry["ood_auroc_total"] is not None and entry["ood_auroc_epistemic"] is None for entry in drawn)
    # One token of three answers: (1 + 1/3) / 2 for the one drawn, (1/3) / 2 for each other.
    right = drawn[0]["accuracy"]
    assert 0 < right < 1 and drawn[0]["mean_confidence"] == pytest.approx(2 / 3)
    assert drawn[0]["nll"] == pytest.approx(-right * math.log(2 / 3) - (1 - right) * math.log(1 / 6))
    assert drawn[1]["nll"] != drawn[0]["nll"]
