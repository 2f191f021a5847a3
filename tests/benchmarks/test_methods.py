"""The table of all methods: pairing by seed, standard errors, and which runs count."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from credence.benchmarks import methods


def made_run(name: str, seed: int, nll: dict[str, float]) -> dict[str, Any]:
    """A kept result whose metrics all are the NLL given for each variant."""
    results = []
    for variant, value in nll.items():
        k, tempered = methods.VARIANTS[variant]
        results.append({"k": k, "variant": tempered, **dict.fromkeys(methods.METRICS, value)})
    release = {"tau": {"10": 3.0, "32": 4.0} if len(nll) > 2 else {}, "temperature": {"0": 1.5, "10": 1.2, "32": 1.1}}
    return {
        "name": name,
        "task": methods.TASKS[0],
        "seed": seed,
        "train_seconds": 10.0 + seed,
        "bytes": 100,
        "release": release,
        "results": results,
    }


def test_differences_are_paired_by_seed() -> None:
    bar = {seed: made_run("map", seed, {"mean": 9.0, "mean + T": 2.0 + seed}) for seed in (0, 1, 2)}
    runs = [
        made_run("ivon", seed, {"mean": 9.0, "mean + T": 9.0, "K = 10 + T": 9.0, "K = 32 + T": 2.0 + seed + change})
        for seed, change in ((0, 0.1), (1, 0.3), (2, -0.1), (7, 50.0))
    ]
    found = methods.differences(runs, "K = 32 + T", bar)["nll"]
    assert found is not None
    assert found[0] == pytest.approx(0.1)
    assert found[1] == pytest.approx(0.2 / math.sqrt(3))


def test_a_missing_value_is_a_dash_and_one_run_has_no_error() -> None:
    assert methods.mean_and_error([1.0, None]) is None
    assert methods.mean_and_error([]) is None
    only = methods.mean_and_error([2.5])
    assert only is not None
    assert only[0] == 2.5
    assert math.isnan(only[1])


def test_the_page_compares_with_the_own_mean_and_with_map() -> None:
    runs = {
        "map": [made_run("map", seed, {"mean": 2.0, "mean + T": 1.5}) for seed in (0, 1)],
        "blob": [
            made_run("blob", seed, {"mean": 1.9, "mean + T": 1.4, "K = 10 + T": 1.3, "K = 32 + T": 1.2})
            for seed in (0, 1)
        ],
    }
    text = methods.page({methods.TASKS[0]: runs}, "command", ["", "## Settings"])
    own, against_map = text.split("### K = 32 + T minus the same")[1].split("### K = 32 + T (without")
    assert "| blob | 2 | -0.2000 +- 0.0000" in own
    assert "| map |" not in own
    assert "| blob | 2 | -0.300 +- 0.000" in against_map.split("### Cost")[0]
    assert "## Settings" in text


def test_a_clear_difference_is_named_with_its_standard_errors_and_its_direction() -> None:
    def runs(name: str, changes: list[float]) -> list[dict[str, Any]]:
        return [made_run(name, seed, {"mean": 0.0, "mean + T": 2.0 + seed + c}) for seed, c in enumerate(changes)]

    lines = methods.verdict_lines(
        {"map": runs("map", [0.0] * 4), "swa": runs("swa", [-0.2, -0.4] * 2), "dora": runs("dora", [-0.1, 0.2] * 2)}
    )
    # Mean -0.3, standard deviation 0.2 / sqrt(3), over 2: 5.2 standard errors. Every metric has the NLL's values here.
    by_metric = {line.split(" | ")[0]: line for line in lines}
    assert by_metric["| NLL"] == "| NLL | swa (5.2) | - | dora (0.6) |"
    assert by_metric["| accuracy"] == "| accuracy | - | swa (5.2) | dora (0.6) |"


def test_rows_of_a_seed_are_a_subset_and_repeat(tmp_path: Path) -> None:
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(json.dumps({"text": str(i), "label": "a"}) for i in range(50)) + "\n")
    first, again, other = (
        methods.subset(source, 20, seed, tmp_path / f"{n}.jsonl").read_text() for n, seed in enumerate((3, 3, 4))
    )
    assert first == again != other
    assert len(set(first.splitlines())) == 20
    assert set(first.splitlines()) <= set(source.read_text().splitlines())


def test_candidates_are_of_known_methods_and_hold_the_chosen_settings() -> None:
    for name, candidates in methods.CANDIDATES.items():
        assert name in methods.SETTINGS
        assert len({tuple(candidate) for candidate in candidates}) == len(candidates) > 1
