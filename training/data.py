"""Reads training and evaluation data: JSON Lines, recognised by their fields.

    {"text", "label"}               classification; with "text_b" of a pair of texts
    {"prompt", "choices", "answer"} multiple choice; answer is the index of the right choice
    {"prompt", "completion"}        fine-tuning on the completion
    {"messages"}                    chat; the last message is the assistant's and is what is learned

Free text may have an "answer", which generated texts are compared with instead of the reference, and {"prompt", "completion"} rows "test"
and "entry_point", a program's test and the function it calls. Other fields are ignored. Every row of a file has the same format, and all
or none have a "text_b". A bad row is named by file and line.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from credence.training.errors import DataError

MAX_CHOICES = 26
ROLES = ("system", "user", "assistant", "tool", "developer")


class DataFormat(StrEnum):
    """What the rows of a file are."""

    LABEL = "label"
    """{"text", "label"}, or {"text", "text_b", "label"}: one of a fixed set of labels."""
    CHOICES = "choices"
    """{"prompt", "choices", "answer"}: choices that differ from row to row."""
    COMPLETION = "completion"
    """{"prompt", "completion"}: free text."""
    MESSAGES = "messages"
    """{"messages"}: a conversation."""

    @property
    def has_candidates(self) -> bool:
        """Whether a row is answered with one token out of a known set."""
        return self in (DataFormat.LABEL, DataFormat.CHOICES)


FIELDS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.LABEL: ("text", "label"),
    DataFormat.CHOICES: ("prompt", "choices", "answer"),
    DataFormat.COMPLETION: ("prompt", "completion"),
    DataFormat.MESSAGES: ("messages",),
}
PAIR = "text_b"
"""Second text of a {"text", "label"} row, if it classifies a pair."""

OPTIONAL_FIELDS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.COMPLETION: ("answer", "test", "entry_point"),
    DataFormat.MESSAGES: ("answer",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One validated row: its line number, and the fields of its format with the optional ones that it has."""

    line: int
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A validated file.

    Attributes:
        sha256: of the file's bytes.
    """

    path: Path
    format: DataFormat
    rows: tuple[Row, ...]
    sha256: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Sorted distinct labels of a {"text", "label"} file, else empty."""
        if self.format is not DataFormat.LABEL:
            return ()
        return tuple(sorted({row.fields["label"] for row in self.rows}))

    @property
    def has_pairs(self) -> bool:
        """Whether the rows hold two texts."""
        return PAIR in self.rows[0].fields


def read_data(path: str | Path, *, expected: DataFormat | None = None) -> DataFile:
    """Reads and checks every row.

    Args:
        expected: the format the file must have, for example that of the training file.

    Raises:
        DataError: the file cannot be read, is empty, or has a bad row.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; give a JSON Lines file", file=path) from None
    rows: list[Row] = []
    found: DataFormat | None = None
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        document = _object(raw, path, number)
        row_format = _recognise(document, path, number)
        if found is not None and row_format is not found:
            raise DataError(
                f"is a {_shape(row_format)} row, the rows before it are {_shape(found)}; put one format in one file",
                file=path,
                line=number,
            )
        if expected is not None and row_format is not expected:
            raise DataError(
                f"is a {_shape(row_format)} row, {_shape(expected)} is needed: it must match the training data",
                file=path,
                line=number,
            )
        found = row_format
        optional = [name for name in OPTIONAL_FIELDS.get(row_format, ()) if document.get(name) is not None]
        complaint = CHECKS[row_format](document) or _text_complaint(document, *optional)
        if complaint:
            raise DataError(complaint, file=path, line=number)
        names = (*FIELDS[row_format], *([PAIR] if row_format is DataFormat.LABEL and PAIR in document else []))
        if rows and (PAIR in names) != (PAIR in rows[0].fields):
            with_it, without = (number, rows[0].line) if PAIR in names else (rows[0].line, number)
            raise DataError(
                f'line {with_it} has a "{PAIR}" and line {without} has none; put pairs and single texts in files of their own',
                file=path,
                line=number,
            )
        rows.append(Row(number, {name: document[name] for name in (*names, *optional)}))
    if found is None:
        raise DataError("holds no row; give a JSON Lines file with one object a line", file=path)
    return DataFile(path=path, format=found, rows=tuple(rows), sha256=hashlib.sha256(data).hexdigest())


def _object(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})", file=path, line=number) from None
    if not isinstance(document, dict):
        raise DataError(f"holds a JSON {type(document).__name__}; an object is needed", file=path, line=number)
    return document


def _recognise(document: Mapping[str, Any], path: Path, number: int) -> DataFormat:
    for row_format in (DataFormat.MESSAGES, DataFormat.LABEL, DataFormat.CHOICES, DataFormat.COMPLETION):
        if all(name in document for name in FIELDS[row_format]):
            return row_format
    raise DataError(
        f"has the fields {sorted(document)}; a row needs one of {', '.join(_shape(f) for f in DataFormat)}",
        file=path,
        line=number,
    )


def _shape(row_format: DataFormat) -> str:
    return "{" + ", ".join(f'"{name}"' for name in FIELDS[row_format]) + "}"


def _text_complaint(document: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        value = document[name]
        if not isinstance(value, str):
            return f'"{name}" is a JSON {type(value).__name__} ({value!r}); a string is needed'
        if not value.strip():
            return f'"{name}" is empty; a text is needed'
    return None


def _check_label(document: Mapping[str, Any]) -> str | None:
    return _text_complaint(document, "text", *([PAIR] if PAIR in document else []), "label")


def _check_completion(document: Mapping[str, Any]) -> str | None:
    return _text_complaint(document, "prompt", "completion")


def _check_choices(document: Mapping[str, Any]) -> str | None:
    choices, answer = document["choices"], document["answer"]
    complaint = _text_complaint(document, "prompt")
    if complaint:
        return complaint
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return f'"choices" is {choices!r}; a list of texts is needed'
    if not 2 <= len(choices) <= MAX_CHOICES:
        return f'"choices" has {len(choices)} entries; 2 to {MAX_CHOICES} are allowed'
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return f'"answer" is {answer!r}; the index of the right choice is needed, 0 to {len(choices) - 1}'
    return None


def _check_messages(document: Mapping[str, Any]) -> str | None:
    messages = document["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        return '"messages" needs a list of two or more messages, the last one the assistant\'s'
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"message {index} is {message!r}; an object with a role of {', '.join(ROLES)} is needed"
        if not isinstance(message.get("content"), str):
            return f'message {index} has no text in "content"'
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return f"the last message is the {messages[-1]['role']}'s; it must be a text of the assistant's (that is what is learned)"
    return None


CHECKS: dict[DataFormat, Callable[[Mapping[str, Any]], str | None]] = {
    DataFormat.LABEL: _check_label,
    DataFormat.CHOICES: _check_choices,
    DataFormat.COMPLETION: _check_completion,
    DataFormat.MESSAGES: _check_messages,
}
