"""What a task is: how a record of a published data set becomes our row, and which of its splits is used for what."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from credence.training.data import DataFormat

Record = Mapping[str, Any]
Fields = dict[str, Any]

HELD_OUT = 300
"""Rows cut off training for validation where a data set has no labelled split to spare; at most a fifth of them."""


class BadRecord(ValueError):
    """A record is not one of the task's data set; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set as we use it.

    Attributes:
        name: what ``credence data`` and the recipes call it, and the folder's name.
        title: its own name.
        source: id on the Hugging Face hub, with the configuration.
        fields: of an original record; others are ignored.
        convert: makes a row of ``format`` of an original record; raises :class:`BadRecord`.
        train, validation, test: the original split that ours is made of. Without ``train`` the task is for evaluation only; without
            ``validation`` rows are cut off training (:data:`HELD_OUT`).
        keep: whether an original record belongs to the task, where a file holds more than it.
        splits_note: why these splits.
        prompt_note: how the row's text is made, and where that leaves the papers.
        license: of the data, as their authors or the hub state it.
    """

    name: str
    title: str
    source: str
    format: DataFormat
    fields: tuple[str, ...]
    convert: Callable[[Record], Fields]
    license: str
    citation: str
    train: str | None = "train"
    validation: str | None = None
    test: str
    keep: Callable[[Record], bool] = lambda _: True
    splits_note: str = ""
    prompt_note: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of a prepared folder."""
        return ("train", "validation", "test") if self.train else ("test",)


def text(record: Record, name: str) -> str:
    """A text of the record.

    Raises:
        BadRecord: it is no text, or empty.
    """
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f'"{name}" is {value!r}; a text is needed')
    return value


def one_of(record: Record, name: str, allowed: Mapping[Any, Any]) -> Any:
    """What a value of the record stands for.

    Raises:
        BadRecord: the value is not one of ``allowed``; hidden test labels are such.
    """
    value = record[name]
    for key, meaning in allowed.items():
        if value == key and type(value) is type(key):  # True is 1 for ==
            return meaning
    raise BadRecord(
        f'"{name}" is {value!r}; one of {", ".join(map(repr, allowed))} is needed (test labels may be hidden)'
    )
