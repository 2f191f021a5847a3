"""Data files: recognition by fields, and errors that name file and line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from credence.training.data import DataFormat, read_data
from credence.training.errors import DataError

Write = Callable[..., Path]

GOOD = {
    DataFormat.LABEL: {"text": "a", "label": "x"},
    DataFormat.CHOICES: {"prompt": "a", "choices": ["x", "y"], "answer": 1},
    DataFormat.COMPLETION: {"prompt": "a", "completion": "b"},
    DataFormat.MESSAGES: {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


@pytest.mark.parametrize("data_format", list(DataFormat))
def test_formats_are_recognised_by_their_fields(write: Write, data_format: DataFormat) -> None:
    data = read_data(write("d.jsonl", [GOOD[data_format], "", {**GOOD[data_format], "id": 7}]))
    assert data.format is data_format
    assert [row.line for row in data.rows] == [1, 3]
    assert "id" not in data.rows[1].fields
    assert len(data.sha256) == 64


def test_a_completion_row_may_carry_an_answer(write: Write) -> None:
    row = {"prompt": "1 + 1?", "completion": "It is 2.", "answer": "2"}
    assert read_data(write("d.jsonl", [row])).format is DataFormat.COMPLETION


def test_labels_are_sorted_and_distinct(write: Write) -> None:
    data = read_data(write("d.jsonl", [{"text": "t", "label": name} for name in "baba"]))
    assert data.labels == ("a", "b")


BAD_ROWS = [
    ("{", r"is not JSON"),
    ("[1]", r"holds a JSON list; an object is needed"),
    ({"text": "a"}, r"has the fields \['text'\]; a row needs one of \{\"text\", \"label\"\}, .*\{\"messages\"\}"),
    ({"text": 3, "label": "x"}, r'"text" is a JSON int \(3\); a string is needed'),
    ({"text": "a", "label": " "}, r'"label" is empty'),
    ({"prompt": "a", "completion": "b"}, r"is a \{\"prompt\", \"completion\"\} row, the rows before it are"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_are_named_by_file_and_line(write: Write, row: object, message: str) -> None:
    path = write("d.jsonl", [GOOD[DataFormat.LABEL], "", row])
    with pytest.raises(DataError, match=rf"d\.jsonl:3: .*{message}") as caught:
        read_data(path)
    assert caught.value.line == 3
    assert caught.value.file == str(path)


BAD_CHOICES = [
    ({"choices": ["x"]}, r"has 1 entries; 2 to 26"),
    ({"choices": ["x", 3]}, r"a list of texts"),
    ({"answer": 2}, r'"answer" is 2; .*0 to 1'),
    ({"answer": True}, r'"answer" is True'),
    ({"answer": "A"}, r'"answer" is .A.'),
    ({"prompt": ""}, r'"prompt" is empty'),
]


@pytest.mark.parametrize(("change", "message"), BAD_CHOICES)
def test_bad_choice_rows(write: Write, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:1: {message}|d\.jsonl:1: .*{message}"):
        read_data(write("d.jsonl", [{**GOOD[DataFormat.CHOICES], **change}]))


BAD_MESSAGES = [
    ([], r"two or more messages"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], r"the last message is the user's"),
    (
        [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}],
        r"message 0 is .*a role of system, user",
    ),
    ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], r"message 0 has no text"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_message_rows(write: Write, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        read_data(write("d.jsonl", [{"messages": messages}]))


def test_whole_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file") as caught:
        read_data(tmp_path / "none.jsonl")
    assert caught.value.line is None
    with pytest.raises(DataError, match="holds no row"):
        read_data(write("d.jsonl", ["", " "]))
    with pytest.raises(DataError, match=r"d\.jsonl:1: is a .*label.* row, .*completion.* is needed"):
        read_data(write("d.jsonl", [GOOD[DataFormat.LABEL]]), expected=DataFormat.COMPLETION)


def test_invalid_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "\xff", "label": "x"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:1: is not JSON"):
        read_data(path)
