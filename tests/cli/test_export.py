"""`credence export`: values by their definitions, names only where the definition is theirs, and rows that are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command

LOGPROBS = [[-0.1, -0.7, -0.2], [-1.5, -0.3]]
TOTALS = [[0.4, 1.1, 0.3], [1.6, 0.5]]
EPISTEMIC = [[0.05, 0.3, 0.01], [0.6, 0.1]]


def answered(index: int, **changes: Any) -> dict[str, Any]:
    """A row as the uncertainty_file of `credence lm-eval` has it, K = 4."""
    tokens = [
        {"token": f" t{i}", "logprob": lp, "total": h, "epistemic": mi, "aleatoric": h - mi}
        for i, (lp, h, mi) in enumerate(zip(LOGPROBS[index], TOTALS[index], EPISTEMIC[index], strict=True))
    ]
    uncertainty = {
        "mode": "ensemble",
        "n_samples": 4,
        "n_effective": 4,
        "tau": 1.0,
        "confidence": 0.6 + index / 10,
        "total": sum(TOTALS[index]) / len(tokens),
        "epistemic": sum(EPISTEMIC[index]) / len(tokens),
        "aleatoric": (sum(TOTALS[index]) - sum(EPISTEMIC[index])) / len(tokens),
        "unit": "nats/token",
        "sequence": {"mean_logprob": sum(LOGPROBS[index]) / len(tokens)},
        "tokens": tokens,
    }
    row = {"task": "t", "doc_id": index, "prompt": f"q{index}", "answer": f"a{index}", "uncertainty": uncertainty}
    return row | changes


def evaluated(line: int, k: int, temperature: float, **changes: Any) -> dict[str, Any]:
    """A label row as `credence eval --rows` writes it."""
    row = {"file": "test.jsonl", "line": line, "ood": False, "k": k, "tau": 2.0, "temperature": temperature}
    scores = {"confidence": 0.9, "log_prob": -0.1, "total": 0.3, "epistemic": 0.1}
    aleatoric = 0.2 if temperature == 1 else None
    return {**row, "answer": "yes", "predicted": "no", "correct": False, **scores, "aleatoric": aleatoric, **changes}


@pytest.fixture
def export(credence: Command, tmp_path: Path) -> Any:
    def run(rows: list[Any], format: str, *options: object) -> Any:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        outcome = credence("export", source, "--format", format, "--output", "-", *options)
        return json.loads(outcome.out) if outcome.code == 0 else outcome

    return run


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_lm_polygraph(export: Any) -> None:
    document = export([answered(0, correct=True, target="a0"), answered(1)], "lm-polygraph")
    assert list(document) == ["state", "metrics", "gen_metrics", "estimations", "stats"]
    aleatoric = [mean(h) - mean(mi) for h, mi in zip(TOTALS, EPISTEMIC, strict=True)]
    expected = {
        "MaximumSequenceProbability": [1.0, 1.8],
        "Perplexity": [1.0 / 3, 0.9],
        "MeanTokenEntropy": [0.6, 1.05],
        "PETtu": [0.6, 1.05],
        "PETdu": aleatoric,
        "PETmi": [0.12, 0.35],
        "CredenceTotal": [0.6, 1.05],
        "CredenceAleatoric": aleatoric,
        "CredenceEpistemic": [0.12, 0.35],
        "CredenceOneMinusConfidence": [0.4, 0.3],
    }
    found = document["estimations"]["sequence"]
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name
    assert document["estimations"]["token"] == {
        "MaximumTokenProbability": [[0.1, 0.7], [1.5]],
        "TokenEntropy": [[0.4, 1.1], [1.6]],
    }
    assert document["gen_metrics"] == {"sequence": {"Accuracy": [1.0, None]}}
    assert document["stats"] == {
        "input_texts": ["q0", "q1"],
        "target_texts": ["a0", ""],
        "greedy_texts": ["a0", "a1"],
        "greedy_log_likelihoods": LOGPROBS,
        "entropy": TOTALS,
    }


def test_uqlm(export: Any) -> None:
    document = export([answered(0, correct=True), answered(1, correct=False)], "uqlm")
    data = document["data"]
    assert data["prompts"] == ["q0", "q1"] and data["responses"] == ["a0", "a1"]
    assert data["sequence_probability"] == pytest.approx([math.exp(-1.0 / 3), math.exp(-0.9)])
    assert data["min_probability"] == pytest.approx([math.exp(-0.7), math.exp(-1.5)])
    assert data["credence_confidence"] == pytest.approx([0.6, 0.7])
    assert data["credence_epistemic_certainty"] == pytest.approx([1 - 0.12 / math.log(4), 1 - 0.35 / math.log(4)])
    assert data["logprob"][1] == [{"token": " t0", "logprob": -1.5}, {"token": " t1", "logprob": -0.3}]
    assert document["metadata"] == {"temperature": None, "correct_indicators": [True, False]}
    for name in list(data)[3:]:
        assert len(data[name]) == 2 and all(0 <= value <= 1 for value in data[name])


def test_a_label_has_no_score_of_a_text(export: Any) -> None:
    """Its entropy is over the labels, not over the vocabulary: none of their names fits."""
    rows = [evaluated(1, 4, 1.0), evaluated(2, 4, 1.0, correct=True, predicted="yes")]
    document = export(rows, "lm-polygraph")
    assert document["estimations"] == {
        "sequence": {
            "CredenceTotal": [0.3, 0.3],
            "CredenceAleatoric": [0.2, 0.2],
            "CredenceEpistemic": [0.1, 0.1],
            "CredenceOneMinusConfidence": pytest.approx([0.1, 0.1]),
        }
    }
    assert document["gen_metrics"] == {"sequence": {"Accuracy": [0.0, 1.0]}}
    assert document["stats"]["input_texts"] == ["test.jsonl:1", "test.jsonl:2"]
    assert document["stats"]["greedy_texts"] == ["no", "yes"] and document["stats"]["target_texts"] == ["yes", "yes"]
    label = answered(0)
    label["uncertainty"] |= {"mode": "choices", "unit": "nats", "sequence": None, "tokens": None}
    assert set(export([label], "lm-polygraph")["estimations"]["sequence"]) == set(document["estimations"]["sequence"])
    assert set(export(rows, "uqlm")["data"]) == {
        "prompts",
        "responses",
        "credence_confidence",
        "credence_epistemic_certainty",
    }


def test_one_setting_is_chosen(export: Any) -> None:
    rows = [evaluated(1, k, t, confidence=0.5 + k / 10) for k in (0, 4) for t in (1.0, 1.3)]
    outcome = export(rows, "uqlm", "--k", 4)
    assert outcome.code == 1 and "choose rows of one setting, 2 are chosen" in outcome.err
    assert "--k 0 --tau 2 --temperature 1; --k 0 --tau 2 --temperature 1.3; --k 4" in outcome.err
    assert export(rows, "uqlm", "--k", 9).err.endswith("0 are chosen\n")
    assert export(rows, "uqlm", "--k", 4, "--temperature", 1.3)["data"]["credence_confidence"] == [0.9]
    mean_adapter = export(rows, "uqlm", "--k", 0, "--temperature", 1, "--tau", 2)["data"]
    assert "credence_epistemic_certainty" not in mean_adapter
    assert "leave out --k, --tau, --temperature" in export([answered(0)], "uqlm", "--k", 4).err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "line 2 is neither a row of"),
        ("{", "JSONDecodeError"),
        (evaluated(1, 4, 1.0, correct="yes"), "correct is 'yes'; it may be true, false or null"),
        ({"answer": "a"}, "KeyError"),
        ({"uncertainty": {"mode": "score"}}, "n_samples"),
    ],
)
def test_wrong_rows(export: Any, row: Any, message: str) -> None:
    outcome = export([answered(0), row], "uqlm")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and message in outcome.err


def test_an_empty_or_missing_file(export: Any, credence: Command, tmp_path: Path) -> None:
    assert "holds no rows" in export([], "uqlm").err
    outcome = credence("export", tmp_path / "none", "--format", "uqlm", "--output", "-")
    assert outcome.code == 1 and "cannot be read" in outcome.err
