"""`credence robustness`: how much a method's result depends on the learning rate and the batch size."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from credence.cli.output import CommandError, JsonOption, needs_extra, print_table, say, write_json
from credence.cli.training import BaseOption, SetOption

if TYPE_CHECKING:
    from credence.training.grid import Study
    from credence.training.robustness import Cells

PAGE = "robustness.md"
METRIC_NAMES = {"accuracy": "accuracy", "nll": "NLL"}

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with what has to be known to read it."""

    title: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]
    note: str


def robustness(
    base: BaseOption,
    data: Annotated[Path, typer.Option("--data", help="Training rows (JSON Lines).", show_default=False)],
    validation: Annotated[
        Path, typer.Option("--validation", help="Held-out rows: tau and T of every cell.", show_default=False)
    ],
    test: Annotated[Path, typer.Option("--test", help="Test rows.", show_default=False)],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="METHOD,...",
            help="The first is what the others are compared with.",
            show_default=False,
        ),
    ],
    learning_rates: Annotated[
        list[str],
        typer.Option(
            "--learning-rates",
            metavar="[METHOD:]R,R,...",
            help="Of all methods, or of one that needs others; repeatable, equally many for each.",
            show_default=False,
        ),
    ],
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", metavar="N,N,...", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Keeps every cell, and robustness.md.", show_default=False)
    ],
    seeds: Annotated[str, typer.Option("--seeds", metavar="S,S,...", help="Seeds of every setting.")] = "0",
    k: Annotated[str, typer.Option("--k", metavar="K,K,...", help="Numbers of samples; 0 is the mean.")] = "0,10",
    settings: SetOption = None,
    own_settings: Annotated[
        list[str] | None,
        typer.Option("--set-method", metavar="METHOD:KEY=VALUE", help="One setting of one method; repeatable."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes; each has its share of the threads.")] = 1,
    json_file: JsonOption = None,
) -> None:
    """Train and evaluate methods over learning rates and batch sizes.

    Every cell of the grid is trained, released on the validation rows and evaluated on the test rows. A second call
    with the same options runs only what is missing.

    \b
    Example:
      credence robustness --base models/base --data train.jsonl --validation validation.jsonl --test test.jsonl \\
        --methods map,monteclora,ivon --learning-rates 1e-4,3e-4,1e-3 --learning-rates ivon:0.3,1,3 \\
        --batch-sizes 8,16,32 --set train.max_steps=400 --set-method monteclora:method.epsilon=5e-3 --output out/grid
    """
    names = methods.split(",")
    with needs_extra("train"):
        from credence.training.grid import Grid, plan
        from credence.training.robustness import run, summarise
    study = plan(
        base,
        data,
        validation,
        test,
        Grid(
            learning_rates=_by_method(names, learning_rates),
            batch_sizes=_numbers("--batch-sizes", batch_sizes, int),
            seeds=_numbers("--seeds", seeds, int),
        ),
        ks=_numbers("--k", k, int),
        settings=settings or (),
        own_settings=_of_methods(own_settings or ()),
    )
    cells = run(study, output, jobs=jobs, say=lambda line: print(line, file=sys.stderr, flush=True))
    summary = summarise(study, cells)
    tables = [*_method_tables(summary), *_comparison_tables(summary), _cell_table(study, cells)]
    command = shlex.join(["credence", *sys.argv[1:]])
    try:
        (output / PAGE).write_text("\n".join(_page(command, study, cells, tables)))
    except OSError as error:
        raise CommandError(f"{output / PAGE} cannot be written: {error.strerror}") from error
    write_json(json_file, {"command": command, **_description(study, cells), **summary})
    if json_file != "-":
        for table in tables:
            print(table.title)
            print_table(table.header, table.body)
            print(f"{table.note}\n")
    say(json_file, f"wrote {output / PAGE}")


def _numbers(option: str, text: str, kind: type[N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{option} is {text!r}; give {what}, with commas between them") from None


def _by_method(methods: Sequence[str], options: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """The learning rates of every method: its own, or those of all."""
    given: dict[str | None, tuple[float, ...]] = {}
    for option in options:
        before, colon, rates = option.rpartition(":")
        name = before if colon else None
        if name in given:
            raise typer.BadParameter(f"--learning-rates of {name or 'all methods'} are given twice; give them once")
        if name is not None and name not in methods:
            raise typer.BadParameter(
                f"--learning-rates {option!r}: {name!r} is not one of --methods {','.join(methods)}"
            )
        given[name] = _numbers("--learning-rates", rates, float)
    lacking = [name for name in methods if name not in given and None not in given]
    if lacking:
        raise typer.BadParameter(
            f"--learning-rates of {', '.join(lacking)} are missing; give {lacking[0]}:R,R,... or, for all methods, R,R,..."
        )
    return {name: given[name] if name in given else given[None] for name in methods}


def _of_methods(options: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for option in options:
        name, colon, setting = option.partition(":")
        if not colon or "=" in name:
            raise typer.BadParameter(
                f"--set-method is {option!r}; give METHOD:KEY=VALUE, for example ivon:method.ess=1e6"
            )
        found.setdefault(name, []).append(setting)
    return found


def _prediction(entry: Mapping[str, Any]) -> str:
    """What a row of a table is about: the mean or K samples, at temperature 1 or the fitted T."""
    return (f"K = {entry['k']}" if entry["k"] else "mean") + (" + T" if entry["fitted"] else "")


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _method_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    for method in summary["methods"]:
        body = [
            [
                _prediction(entry),
                *(_number(entry["accuracy"][name]) for name in ("median", "best", "worst", "spread")),
                *(_number(entry["nll"][name]) for name in ("median", "best", "worst", "spread")),
                _number(entry["intrinsic"]),
                _number(entry["ece15"]["median"]),
            ]
            for entry in method["predictions"]
        ]
        yield Table(
            title=method["method"],
            header=(
                "prediction",
                "extrinsic: median accuracy",
                "best",
                "worst",
                "spread",
                "median NLL",
                "best",
                "worst",
                "spread",
                "intrinsic: 1 / median NLL",
                "median ECE15",
            ),  # fmt: skip
            body=body,
            note=f"{method['cells']} cells, {method['failed']} failed. In a median a failed cell is worse than every finished one; best, "
            "worst and spread are those of the finished cells.",
        )


def _comparison_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    for method in summary["methods"][1:]:
        entries = [entry for entry in summary["comparisons"] if entry["method"] == method["method"]]
        body = [
            [
                _prediction(entry),
                METRIC_NAMES[entry["metric"]],
                str(entry["pairs"]),
                f"{_number(entry['mean_difference'], '+.4f')} +- {_number(entry['standard_error'])}",
                _number(entry["p"], ".3g"),
                _number(entry["smallest_p"], ".3g"),
            ]
            for entry in entries
        ]
        left_out = max(entry["left_out"] for entry in entries)
        yield Table(
            title=f"{method['method']} minus {entries[0]['against']}, paired",
            header=("prediction", "metric", "pairs", "mean difference", "Wilcoxon p", "smallest possible p"),
            body=body,
            note="A pair is one setting: the same batch size, the learning rate at the same place of the methods' lists, the mean over the "
            f"seeds that both finished; {left_out} left out for failed cells. Mean +- standard error; two-sided signed-rank test, "
            "not corrected for the number of rows. The pairs share data, test rows and seeds: p is about these settings, not about "
            "other data.",
        )


def _cell_table(study: "Study", cells: "Cells") -> Table:
    columns = [_prediction({"k": k, "fitted": fitted}) for k in study.ks for fitted in (False, True)]
    body = []
    for cell, document in cells.items():
        results = [f"{entry['accuracy']:.4f} / {entry['nll']:.4f}" for entry in document["results"]]
        failed = [f"failed: {document['failed']}", *[""] * (len(columns) - 1)]
        where = [cell.method, f"{cell.learning_rate:g}", str(cell.batch_size), str(cell.seed)]
        body.append([*where, *(failed if document["failed"] else results)])
    body.sort(key=lambda row: study.grid.methods.index(row[0]))
    return Table(
        title="Cells",
        header=("method", "learning rate", "batch size", "seed", *columns),
        body=body,
        note="Accuracy / NLL of every cell on the test rows.",
    )


def _description(study: "Study", cells: "Cells") -> dict[str, Any]:
    return {
        "base": study.sources["base"],
        "data": {
            name: {"file": path.name, **study.sources[name]}
            for name, path in (("data", study.data), ("validation", study.validation), ("test", study.test))
        },
        "samples": list(study.ks),
        "cells": [
            {
                "method": cell.method,
                "learning_rate": cell.learning_rate,
                "batch_size": cell.batch_size,
                "seed": cell.seed,
                **{key: value for key, value in document.items() if key != "made_from"},
            }
            for cell, document in cells.items()
        ],
    }


def _page(command: str, study: "Study", cells: "Cells", tables: Sequence[Table]) -> Iterator[str]:
    versions = sorted({", ".join(f"{name} {v}" for name, v in cell["versions"].items()) for cell in cells.values()})
    files = (("data", study.data), ("validation", study.validation), ("test", study.test))
    rows = ", ".join(f"{study.sources[name]['rows']} of {path.name} ({name})" for name, path in files)
    yield "# Robustness to learning rate and batch size"
    yield ""
    yield f"`{command}`"
    yield ""
    yield f"Base {study.sources['base']['name']}; rows: {rows}; {'; '.join(versions)}."
    for table in tables:
        yield from ("", f"## {table.title}", "", table.note, "")
        yield f"| {' | '.join(table.header)} |"
        yield f"|{'---|' * len(table.header)}"
        yield from (f"| {' | '.join(row)} |" for row in table.body)
    yield ""
