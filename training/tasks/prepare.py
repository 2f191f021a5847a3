"""Writes a task's train, validation and test files in our format, from an export of the published data set or from our own rows.

    datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")[split].to_json(f"arc_easy/{split}.jsonl")

for every split, then ``credence data arc_easy arc_easy --output data/arc_easy``. The same source and seed give the same bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from credence.training.data import CHECKS, FIELDS
from credence.training.errors import DataError
from credence.training.tasks.base import HELD_OUT, BadRecord, Record, Task

PROVENANCE = "provenance.json"
SUFFIXES = (".jsonl", ".json")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What was written.

    Attributes:
        rows: of each file.
        provenance: what provenance.json holds.
    """

    path: Path
    rows: Mapping[str, int]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The rows of a source file as lines of our format.

    Attributes:
        left_out: records that are not the task's.
        sha256: of the file's bytes.
    """

    path: Path
    lines: list[str]
    left_out: int
    sha256: str


def prepare(task: Task, source: str | Path, output: str | Path, seed: int = 0) -> Prepared:
    """Writes the task's files and provenance.json into the new folder ``output``.

    Args:
        source: folder with a file for each split, ``train.jsonl`` and so on; of an evaluation task also the one file. Either all rows
            are records of the published data set or all rows have our format; the latter pass through as they are.
        seed: of the rows that are cut off training where there is no file of validation rows.

    Raises:
        DataError: names the file and the line, or what is missing.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError("exists; choose another --output or remove it first", file=output)
    own = _has_own_rows(task, _find(task, source, task.train or task.test))
    original = _splits(task, source, own)
    parts = {split: _read(task, _find(task, source, name), own) for split, name in original.items() if name}
    lines = {split: part.lines for split, part in parts.items()}
    cut = "train" in lines and "validation" not in lines
    if cut:
        lines["train"], lines["validation"] = cut_off(lines["train"], min(HELD_OUT, len(lines["train"]) // 5), seed)
        if not lines["validation"]:
            raise DataError(
                "has too few different rows to cut validation rows off (5 or more are needed)", file=parts["train"].path
            )
    written = {split: "".join(f"{line}\n" for line in lines[split]).encode() for split in task.files}
    document = {
        "task": task.name,
        "title": task.title,
        "source": task.source,
        "license": task.license,
        "citation": task.citation,
        "format": list(FIELDS[task.format]),
        "records": "rows of our format, passed through" if own else "records of the published data set",
        "split_rule": _rule(task, original, seed if cut else None),
        "text": task.prompt_note,
        "seed": seed,
        "read": {
            part.path.name: {"sha256": part.sha256, "rows": len(part.lines), "left_out": part.left_out}
            for part in parts.values()
        },
        "written": {
            f"{split}.jsonl": {"sha256": hashlib.sha256(data).hexdigest(), "rows": len(lines[split])}
            for split, data in written.items()
        },
        "credence": version("credence"),
    }
    output.mkdir(parents=True, exist_ok=True)
    for split, data in written.items():
        (output / f"{split}.jsonl").write_bytes(data)
    (output / PROVENANCE).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return Prepared(path=output, rows={split: len(lines[split]) for split in task.files}, provenance=document)


def cut_off(lines: Sequence[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Divides rows into what stays and what is cut off, each in the order of the file.

    Rows are ranked by the SHA-256 of the seed and the row, and the first ones are cut off, each with its duplicates, as long as they are
    no more than ``count`` rows: the parts have no row in common, and the order of the file does not matter.
    """
    copies, chosen, total = Counter(lines), set(), 0
    for line in sorted(copies, key=lambda line: hashlib.sha256(f"{seed}\n{line}".encode()).hexdigest()):
        if total + copies[line] <= count:
            chosen.add(line)
            total += copies[line]
    return [line for line in lines if line not in chosen], [line for line in lines if line in chosen]


def _splits(task: Task, source: Path, own: bool) -> dict[str, str | None]:
    """Name of the source's split for each of ours; None for what is cut off training."""
    if not task.train:
        return {"test": task.test}
    if not own:
        return {"train": task.train, "validation": task.validation, "test": task.test}
    has_validation = any((source / f"validation{suffix}").exists() for suffix in SUFFIXES)
    return {"train": "train", "validation": "validation" if has_validation else None, "test": "test"}


def _find(task: Task, source: Path, split: str) -> Path:
    if source.is_file():
        if task.train:
            raise DataError(f"is a file; {task.name} needs a folder with its splits {', '.join(SPLITS)}", file=source)
        return source
    for suffix in SUFFIXES:
        if (source / f"{split}{suffix}").exists():
            return source / f"{split}{suffix}"
    raise DataError(
        f"holds no {split}.jsonl; export every split of {task.source} there with `datasets`: "
        f"load_dataset(...)[split].to_json(f'{{split}}.jsonl')",
        file=source,
    )


def _has_own_rows(task: Task, path: Path) -> bool:
    """Whether the first row of a file has our format."""
    for _, document in _documents(path, _bytes(path)):
        return _is_own(task, document)
    raise DataError("holds no row; give a JSON Lines file with one object a line", file=path)


def _is_own(task: Task, document: Record) -> bool:
    return all(name in document for name in FIELDS[task.format]) and CHECKS[task.format](document) is None


def _read(task: Task, path: Path, own: bool) -> Part:
    data = _bytes(path)
    lines, left_out = [], 0
    for number, document in _documents(path, data):
        if own:
            if not _is_own(task, document):
                shape = ", ".join(f'"{name}"' for name in FIELDS[task.format])
                raise DataError(f"is no {{{shape}}} row as the first one is", file=path, line=number)
            lines.append(json.dumps(document, ensure_ascii=False))
            continue
        missing = [name for name in task.fields if name not in document]
        if missing:
            raise DataError(
                f"is no record of {task.title}: it has the fields {sorted(document)} and lacks {', '.join(missing)}",
                file=path,
                line=number,
            )
        if not task.keep(document):
            left_out += 1
            continue
        lines.append(json.dumps(_converted(task, document, path, number), ensure_ascii=False))
    if not lines:
        raise DataError(f"holds no row of {task.title}; {left_out} records are others'", file=path)
    return Part(path=path, lines=lines, left_out=left_out, sha256=hashlib.sha256(data).hexdigest())


def _converted(task: Task, document: Record, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = task.convert(document)
    except BadRecord as error:
        raise DataError(f"is no usable record of {task.title}: {error}", file=path, line=number) from None
    complaint = CHECKS[task.format](row)
    if complaint:
        raise DataError(f"is no usable record of {task.title}: {complaint}", file=path, line=number)
    return row


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=path) from None


def _documents(path: Path, data: bytes) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON ({error}); one object a line is needed", file=path, line=number) from None
        if not isinstance(document, dict):
            raise DataError(f"holds a JSON {type(document).__name__}; an object is needed", file=path, line=number)
        found.append((number, document))
    return found


def _rule(task: Task, original: Mapping[str, str | None], seed: int | None) -> str:
    parts = [f"{split} is the source's {name}" for split, name in original.items() if name]
    if seed is not None:
        parts.append(
            f"validation is cut off train: {HELD_OUT} rows, at most a fifth, by the SHA-256 of seed {seed} and the row"
        )
    return "; ".join([*parts, *([task.splits_note] if task.splits_note else [])])
