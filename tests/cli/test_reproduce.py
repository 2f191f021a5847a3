"""`credence data` and `credence reproduce` as commands; what they do is tested in tests/training."""

import json
from pathlib import Path

import pytest

from credence.training.errors import DataError
from credence.training.recipes import Reproduction, recipe_names
from tests.cli.conftest import Command
from tests.training.conftest import make_base


def export(folder: Path) -> Path:
    """Records of ARC as published."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        records = [
            {
                "id": f"{split}{number}",
                "question": f"{split} {number}?",
                "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
                "answerKey": "12"[number % 2],
            }
            for number in range(8)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_from_an_export_to_the_page(credence: Command, tmp_path: Path) -> None:
    source = export(tmp_path / "export")
    made = credence("data", "arc_easy", source, "--output", tmp_path / "data" / "arc_easy", "--json", "-")
    assert made.code == 0 and json.loads(made.out)["rows"] == {"train": 8, "validation": 8, "test": 8}
    assert "license: CC BY-SA 4.0" in made.err
    base = make_base(tmp_path / "tiny", context=256)
    arguments = ["reproduce", "ivon-table-1", "--base", base, "--data", tmp_path / "data", "--output", tmp_path / "out"]
    arguments += ["--steps", "1", "--seeds", "1", "--methods", "adamw"]
    done = credence(*arguments, "--json", tmp_path / "result.json")
    assert done.code == 0
    assert done.out.startswith("**A reduced run and no reproduction: 1 step a training.**")
    assert "run `credence data boolq SRC --output" in done.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reduced"] and result["tasks"] == ["arc_easy"] and "boolq" in result["missing"]
    again = credence(*arguments, "--rows", "8")
    assert again.code == 1 and "holds runs with other settings (rows None there and 8 now)" in again.err


def test_the_list_names_every_recipe(credence: Command) -> None:
    listed = credence("reproduce", "--list")
    assert listed.code == 0 and all(name in listed.out for name in recipe_names())
    assert set(json.loads(credence("reproduce", "--list", "--json", "-").out)["recipes"]) == set(recipe_names())


@pytest.mark.parametrize("options", [(), ("--allow-code-execution",)])
def test_programs_run_only_where_they_are_allowed(
    options: tuple[str, ...], credence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allowed(asked: Reproduction, say: object) -> None:
        raise DataError(f"programs: {asked.allow_code_execution}", file=asked.data)

    monkeypatch.setattr("credence.training.recipes.reproduce", allowed)
    arguments = ["monteclora-generation", "--base", "base", "--data", tmp_path, "--output", tmp_path / "out"]
    assert f"programs: {bool(options)}" in credence("reproduce", *arguments, *options).err


def test_wrong_use_is_said(credence: Command, tmp_path: Path) -> None:
    assert "NAME, --base, --data and --output are needed" in credence("reproduce", "ivon-table-1").err
    outcome = credence("data", "arc", tmp_path, "--output", tmp_path / "out")
    assert outcome.code == 1 and "unknown task 'arc'; allowed: winogrande_s" in outcome.err


def test_the_help_of_data_names_every_task(credence: Command) -> None:
    from credence.training.tasks import TASKS

    text = " ".join(credence("data", "--help").out.split())
    assert all(name in text for name in TASKS)
