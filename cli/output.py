"""What every command prints: results as JSON, lines for people, and the sentence about a missing extra."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE, or - for standard output."),
]

_UNLIMITED_WIDTH = 10_000


class CommandError(Exception):
    """A command cannot do what was asked; the message is the sentence the user reads."""


def write_json(target: str | None, document: Mapping[str, Any]) -> None:
    """Write `document` to a file, to standard output for `-`, nowhere for None.

    Raises:
        CommandError: The file cannot be written.
    """
    if target is None:
        return
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise CommandError(f"--json {target} cannot be written: {error.strerror}") from error


def write_lines(target: Path, option: str, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines to a file.

    Raises:
        CommandError: The file cannot be written; `option` names it.
    """
    try:
        with target.open("w") as file:
            file.writelines(json.dumps(document, allow_nan=False) + "\n" for document in documents)
    except OSError as error:
        raise CommandError(f"{option} {target} cannot be written: {error.strerror}") from error


def make_folder(target: Path, option: str) -> None:
    """Make a folder for results, if it is not there.

    Raises:
        CommandError: The folder cannot be made; `option` names it.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"{option} {target} is no folder and cannot be made: {error.strerror}; name another one"
        ) from error


def say(target: str | None, line: str = "") -> None:
    """Print a line for people; to standard error while standard output carries the JSON (`--json -`)."""
    print(line, file=sys.stderr if target == "-" else sys.stdout)


def warn(line: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {line}", file=sys.stderr)


def rows(pairs: Mapping[str, str]) -> str:
    """Lay out names and values in two aligned columns."""
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs.items())


def print_table(header: Sequence[str], body: Sequence[Sequence[str]], *, footer: Sequence[str] = ()) -> None:
    """Print a table; its columns keep their full width where no terminal limits it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for index, row in enumerate(body):
        table.add_row(*row, end_section=bool(footer) and index == len(body) - 1)
    if footer:
        table.add_row(*footer)
    width = None if sys.stdout.isatty() else _UNLIMITED_WIDTH
    Console(markup=False, highlight=False, width=width).print(table)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a package that is not installed into one sentence naming the extra that brings it.

    Raises:
        CommandError: An import inside the block failed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "credence":
            raise
        raise CommandError(
            f"this command needs the package {error.name!r}, which is not installed; run `pip install 'credence[{extra}]'`"
        ) from error
