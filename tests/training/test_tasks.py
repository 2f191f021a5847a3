"""Every task on handwritten records with the published field names, the splits, and rows that have our format already."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from credence.training.data import read_data
from credence.training.errors import ConfigError, DataError
from credence.training.tasks import TASKS, prepare, task
from credence.training.tasks.base import HELD_OUT
from credence.training.tasks.prepare import cut_off

HEAT = {"question": "What warms a pot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
COLD = {
    "question": "What is coldest?",
    "choices": {"text": ["ice", "fire", "lava", "soup", "tea"], "label": ["1", "2", "3", "4", "5"]},
    "answerKey": "1",
}
STEM = {"question_stem": "Magnets pull", "choices": {"text": ["wood", "iron"], "label": ["A", "B"]}, "answerKey": "B"}
CUP = {"sentence": "The cup did not fit the box as the _ was small.", "option1": "cup", "option2": "box", "answer": "2"}
PAIR = {"sentence1": "It rains.", "sentence2": "The street is wet.", "label": 1, "idx": 0}
MOLE = {"question": "What is a mole?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "college_chemistry"}
SKY = {"question": "is the sky blue", "passage": "It scatters blue light. ", "answer": True}
WATER = {"question": "Is water dry?", "passage": "Water is wet.", "answer": False}
BANK = {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank robbed.", "label": 0}
APPLES = {"question": "2 boxes of 600 apples?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}
CODE = {
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(f): assert f() == 1",
    "entry_point": "one",
}

RECORDS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "arc": [
        (HEAT, {"prompt": "What warms a pot?", "choices": ["ice", "fire"], "answer": 1}),
        (COLD, {"prompt": "What is coldest?", "choices": ["ice", "fire", "lava", "soup", "tea"], "answer": 0}),
    ],
    "openbookqa": [(STEM, {"prompt": "Magnets pull", "choices": ["wood", "iron"], "answer": 1})],
    "winogrande": [
        (CUP, {"prompt": CUP["sentence"], "choices": ["cup", "box"], "answer": 1}),
        ({**CUP, "answer": "1"}, {"prompt": CUP["sentence"], "choices": ["cup", "box"], "answer": 0}),
    ],
    "boolq": [
        (
            SKY,
            {
                "prompt": "is the sky blue? Context: It scatters blue light.",
                "choices": ["True", "False"],
                "answer": 0,
            },
        ),
        (WATER, {"prompt": "Is water dry? Context: Water is wet.", "choices": ["True", "False"], "answer": 1}),
    ],
    "mmlu_chemistry": [(MOLE, {"prompt": "What is a mole?", "choices": ["a", "b", "c", "d"], "answer": 2})],
    "mmlu_physics": [
        (
            {**MOLE, "answer": 0, "subject": "conceptual_physics"},
            {"prompt": "What is a mole?", "choices": ["a", "b", "c", "d"], "answer": 0},
        )
    ],
    "mrpc": [(PAIR, {"text": "It rains.", "text_b": "The street is wet.", "label": "equivalent"})],
    "rte": [
        (PAIR, {"text": "It rains.", "text_b": "The street is wet.", "label": "not_entailment"}),
        ({**PAIR, "label": 0}, {"text": "It rains.", "text_b": "The street is wet.", "label": "entailment"}),
    ],
    "cola": [
        ({"sentence": "Him went.", "label": 0}, {"text": "Him went.", "label": "unacceptable"}),
        ({"sentence": "He went.", "label": 1}, {"text": "He went.", "label": "acceptable"}),
    ],
    "wic": [(BANK, {"text": "bank: A river bank.", "text_b": "A bank robbed.", "label": "False"})],
    "boolq_pairs": [(WATER, {"text": "Is water dry?", "text_b": "Water is wet.", "label": "False"})],
    "gsm8k": [(APPLES, {"prompt": APPLES["question"], "completion": APPLES["answer"], "answer": "1,200"})],
    "humaneval": [
        (
            CODE,
            {
                "prompt": "def one():\n",
                "completion": "    return 1\n",
                "test": CODE["test"],
                "entry_point": "one",
            },
        )
    ],
}
for name in ("arc_easy", "arc_challenge"):
    RECORDS[name] = RECORDS["arc"]
for name in ("winogrande_s", "winogrande_m"):
    RECORDS[name] = RECORDS["winogrande"]
del RECORDS["arc"], RECORDS["winogrande"]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("arc_easy", {**HEAT, "answerKey": "C"}, r'"answerKey" is \'C\'; one of the labels'),
    ("arc_easy", {**HEAT, "choices": ["ice", "fire"]}, 'an object with the lists "text" and "label"'),
    ("arc_easy", {**HEAT, "choices": {"text": ["ice"], "label": ["A", "B"]}}, "1 texts and 2 labels"),
    ("arc_challenge", {**HEAT, "choices": {"text": ["ice", ""], "label": ["A", "B"]}}, "a list of texts is needed"),
    ("openbookqa", HEAT, "lacks question_stem"),
    ("winogrande_s", {**CUP, "answer": ""}, "test labels may be hidden"),
    ("winogrande_m", {**CUP, "answer": 2}, r"one of '1', '2' is needed"),
    ("boolq", {**SKY, "answer": 1}, "one of True, False is needed"),
    ("boolq_pairs", {**SKY, "passage": ""}, "\"passage\" is ''; a text is needed"),
    ("mmlu_chemistry", {**MOLE, "answer": True}, '"answer" is True'),
    ("mmlu_chemistry", {**MOLE, "choices": ["a", "b"]}, "a list of four texts"),
    ("mmlu_physics", MOLE, "holds no row of MMLU physics; 1 records are others'"),
    ("mrpc", {**PAIR, "label": -1}, "test labels may be hidden"),
    ("rte", {"premise": "a", "hypothesis": "b", "label": 0}, "lacks sentence1, sentence2"),
    ("cola", {"sentence": 3, "label": 0}, '"sentence" is 3; a text is needed'),
    ("wic", {**BANK, "label": "no"}, "one of 0, 1 is needed"),
    ("gsm8k", {**APPLES, "answer": "1200"}, "a solution that ends with ####"),
    ("humaneval", {**CODE, "test": None}, '"test" is None'),
]


def fill(folder: Path, splits: dict[str, Iterable[object]]) -> Path:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def source(folder: Path, records: list[dict[str, Any]]) -> Path:
    """An export: the same few records in every split of the data set."""
    return fill(folder, dict.fromkeys(("train", "validation", "test"), records))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_task_has_records_here() -> None:
    assert set(RECORDS) == set(TASKS) and {name for name, _, _ in BAD} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_records_become_our_rows(name: str, tmp_path: Path) -> None:
    for number, (record, expected) in enumerate(RECORDS[name]):
        folder = fill(tmp_path / str(number), {TASKS[name].test: [record]})
        if TASKS[name].train is None:
            prepare(task(name), folder, tmp_path / f"out{number}")
            assert rows(tmp_path / f"out{number}" / "test.jsonl") == [expected]
        else:
            assert TASKS[name].convert(record) == expected


@pytest.mark.parametrize("name", TASKS)
def test_the_files_are_read_back_in_the_tasks_format(name: str, tmp_path: Path) -> None:
    # Different texts in every row: equal rows stay together when validation is cut off.
    numbered = [
        {**record, **{key: f"{record[key]} {copy}" for key in TASKS[name].fields[:1]}}
        for copy in range(10)
        for record, _ in RECORDS[name]
    ]
    prepared = prepare(task(name), source(tmp_path / "source", numbered), tmp_path / "out")
    assert set(prepared.rows) == set(TASKS[name].files)
    for split, count in prepared.rows.items():
        data = read_data(tmp_path / "out" / f"{split}.jsonl", expected=TASKS[name].format)
        assert len(data.rows) == count > 0
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["license"] and provenance["citation"] and str(tmp_path) not in json.dumps(provenance)
    assert set(provenance["written"]) == {f"{split}.jsonl" for split in TASKS[name].files}


@pytest.mark.parametrize(("name", "record", "message"), BAD)
def test_a_bad_record_is_named_by_file_and_line(
    name: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = [] if "holds no row" in message else [RECORDS[name][0][0]]
    folder = fill(tmp_path / "in", {split: [*good, record] for split in ("train", "validation", "test")})
    with pytest.raises(DataError, match=message) as caught:
        prepare(task(name), folder, tmp_path / "out")
    assert caught.value.file.startswith(str(folder))
    assert caught.value.line == (2 if good else None)
    assert not (tmp_path / "out").exists()


def test_original_splits_with_labels_are_used_as_they_are(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", {split: [{**HEAT, "question": split}] for split in ("train", "validation", "test")})
    prepared = prepare(task("arc_easy"), folder, tmp_path / "out")
    for split in ("train", "validation", "test"):
        assert [row["prompt"] for row in rows(tmp_path / "out" / f"{split}.jsonl")] == [split]
    assert "cut off" not in prepared.provenance["split_rule"]


def test_hidden_test_labels_validation_is_the_test_and_training_is_cut(tmp_path: Path) -> None:
    records = [{**CUP, "sentence": f"sentence {number}"} for number in range(50)]
    folder = fill(
        tmp_path / "in",
        {"train": records, "validation": [{**CUP, "sentence": "held"}], "test": [{**CUP, "answer": ""}]},
    )
    outputs = [
        prepare(task("winogrande_s"), folder, tmp_path / f"{seed}-{copy}", seed=seed)
        for seed, copy in ((0, 0), (0, 1), (1, 0))
    ]
    first = {split: (outputs[0].path / f"{split}.jsonl").read_bytes() for split in ("train", "validation", "test")}
    assert [json.loads(line)["prompt"] for line in first["test"].splitlines()] == ["held"]
    parts = [{json.loads(line)["prompt"] for line in first[split].splitlines()} for split in ("train", "validation")]
    assert (len(parts[0]), len(parts[1])) == (40, 10)  # a fifth of 50
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {record["sentence"] for record in records}
    assert all((outputs[1].path / f"{split}.jsonl").read_bytes() == data for split, data in first.items())
    assert (outputs[0].path / "provenance.json").read_bytes() == (outputs[1].path / "provenance.json").read_bytes()
    assert (outputs[2].path / "validation.jsonl").read_bytes() != first["validation"]


def test_cut_off_keeps_duplicates_together_and_does_not_depend_on_the_order() -> None:
    lines = [f"row {number % 40}" for number in range(120)]
    kept, cut = cut_off(lines, 31, seed=0)
    assert not set(kept) & set(cut) and len(set(cut)) == 10 and len(cut) == 30 and len(kept) == 90
    assert set(cut_off(lines[::-1], 31, seed=0)[1]) == set(cut)


def test_no_more_than_the_usual_rows_are_cut_off(tmp_path: Path) -> None:
    records = [{"sentence": f"s{number}", "label": number % 2} for number in range(5 * HELD_OUT + 500)]
    folder = fill(tmp_path / "in", {"train": records, "validation": records[:2]})
    assert prepare(task("cola"), folder, tmp_path / "out").rows["validation"] == HELD_OUT


@pytest.mark.parametrize("name", ["arc_easy", "gsm8k", "mrpc"])
def test_rows_of_our_format_pass_through(name: str, tmp_path: Path) -> None:
    own = [{**RECORDS[name][0][1], "extra": number} for number in range(6)]
    splits = {"train": own[:3], "validation": own[3:4], "test": own[4:]}
    prepare(task(name), fill(tmp_path / "in", splits), tmp_path / "out")
    prepare(task(name), tmp_path / "out", tmp_path / "again")
    for split, expected in splits.items():
        assert rows(tmp_path / "out" / f"{split}.jsonl") == expected
        assert (tmp_path / "out" / f"{split}.jsonl").read_bytes() == (
            tmp_path / "again" / f"{split}.jsonl"
        ).read_bytes()


def test_own_rows_and_records_are_not_mixed(tmp_path: Path) -> None:
    row = RECORDS["arc_easy"][0][1]
    folder = fill(tmp_path / "in", {"train": [row, HEAT], "validation": [row], "test": [row]})
    with pytest.raises(
        DataError, match=r'train.jsonl:2: is no {"prompt", "choices", "answer"} row as the first one is'
    ):
        prepare(task("arc_easy"), folder, tmp_path / "out")


def test_records_of_other_subjects_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "mmlu.jsonl"
    file.write_text(
        "".join(json.dumps({**MOLE, "subject": name}) + "\n" for name in ("law", "college_chemistry", "law"))
    )
    prepared = prepare(task("mmlu_chemistry"), file, tmp_path / "out")
    assert prepared.rows == {"test": 1} and prepared.provenance["read"]["mmlu.jsonl"]["left_out"] == 2


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", {"train": [HEAT] * 5})
    with pytest.raises(DataError, match=r"holds no validation.jsonl; export every split of allenai/ai2_arc, ARC-Easy"):
        prepare(task("arc_easy"), folder, tmp_path / "out")
    with pytest.raises(DataError, match="is a file; arc_easy needs a folder"):
        prepare(task("arc_easy"), folder / "train.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown task 'arc'; allowed: winogrande_s"):
        task("arc")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(DataError, match="exists; choose another --output"):
        prepare(task("arc_easy"), folder, tmp_path / "out")
