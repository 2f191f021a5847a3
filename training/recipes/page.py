"""The page of a reproduction: published numbers, ours, and their differences, as Markdown; and the same as JSON."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from credence.training.recipes.recipe import AVERAGE, METRIC, ROBUSTNESS, Line
from credence.training.recipes.run import Outcome, Reproduction


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of the table, in the printed unit.

    Attributes:
        paper: the published number, None if it was not at hand.
        ours: mean over the seeds; None if it was not run, or the metric is not defined.
        standard_error: of the mean over the seeds; None for one seed.
        difference: ours minus the published number.
    """

    line: str
    task: str
    metric: str
    paper: float | None
    ours: float | None
    standard_error: float | None
    difference: float | None


def cells(asked: Reproduction, outcome: Outcome) -> list[Cell]:
    """All numbers, in the order of the page. Averages need every task of the recipe."""
    return [
        _cell(outcome, line, task, metric, asked.recipe.tasks)
        for metric in asked.recipe.metrics
        for line in _lines(asked, outcome, metric)
        for task in _columns(asked, outcome)
    ]


def document(asked: Reproduction, outcome: Outcome) -> dict[str, Any]:
    """What ``credence reproduce --json`` writes."""
    return {
        **asked.shared,
        "title": asked.recipe.title,
        "paper": asked.recipe.paper.model_dump(),
        "reduced": asked.rows is not None or asked.steps is not None,
        "seeds": outcome.seeds,
        "tasks": list(outcome.tasks),
        "missing": dict(outcome.missing),
        "failed": dict(outcome.failed),
        "left_out": {file: {"rows": count, "of": total} for file, (count, total) in outcome.left_out.items()},
        "cells": [asdict(cell) for cell in cells(asked, outcome)],
    }


def page(asked: Reproduction, outcome: Outcome) -> str:
    """The page; its first line says of a reduced run that it is one."""
    recipe, paper = asked.recipe, asked.recipe.paper
    where = ", ".join(filter(None, [paper.authors, paper.venue, paper.arxiv and f"arXiv:{paper.arxiv}", paper.table]))
    lines = [
        *_reduced(asked),
        f"# {asked.name}: {recipe.title}",
        "",
        f"{paper.title} ({where}). Base of the paper: {recipe.base}; ours: {asked.shared['base']}.",
        f"Ours: mean +- standard error over {outcome.seeds} seed{'s' if outcome.seeds > 1 else ''}. A dash: not published as far as we "
        "know, or not run.",
        *(f"Left out: {problem}." for problem in outcome.missing.values()),
        *_left_out(outcome),
        *(
            f"Failed, and in the median worse than every other cell: {name} ({why})."
            for name, why in outcome.failed.items()
        ),
    ]
    found = {(cell.line, cell.task, cell.metric): cell for cell in cells(asked, outcome)}
    for metric in recipe.metrics:
        columns = _columns(asked, outcome)
        lines += [
            "",
            f"## {METRIC[metric].title}",
            "",
            f"| | | {' | '.join(columns)} |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for line in _lines(asked, outcome, metric):
            row = [found[line.label, task, metric] for task in columns]
            published = any(cell.paper is not None for cell in row)
            if published:
                lines.append(_row(line.label, "paper", (_number(cell.paper, metric) for cell in row)))
            lines.append(_row("" if published else line.label, "ours", (_ours(cell) for cell in row)))
            if any(cell.difference is not None for cell in row):
                lines.append(_row("", "ours - paper", (_number(cell.difference, metric, "+") for cell in row)))
    notes = [*recipe.notes, *(f"{line.label}: {line.note}." for line in _lines(asked, outcome) if line.note)]
    lines += ["", "## Notes", "", *(f"- {note}" for note in notes), f"- The full run: {recipe.scaling.strip()}"]
    return "\n".join(lines) + "\n"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean (n - 1 in the variance); no error of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _columns(asked: Reproduction, outcome: Outcome) -> tuple[str, ...]:
    return (*outcome.tasks, AVERAGE) if len(asked.recipe.tasks) > 1 else outcome.tasks


def _lines(asked: Reproduction, outcome: Outcome, metric: str | None = None) -> list[Line]:
    """The lines that are printed, of all metrics or one: robustness is that of a whole grid, and printed once."""
    lines = [line for line in asked.recipe.lines if line.adapter in outcome.adapters]
    return [line for line in lines if metric not in ROBUSTNESS or line.over == "median"]


def _cell(outcome: Outcome, line: Line, task: str, metric: str, all_tasks: Sequence[str]) -> Cell:
    scale = METRIC[metric].scale
    paper = line.published.get(task, {}).get(metric)
    averaged = all_tasks if task == AVERAGE else (task,)
    ours, error = None, None
    values = [
        [outcome.results.get((line.label, name, seed), {}).get(metric) for name in averaged]
        for seed in range(outcome.seeds)
    ]
    by_seed = [statistics.fmean(numbers) for seed in values if None not in seed and (numbers := _present(seed))]
    if len(by_seed) == outcome.seeds:
        ours, error = mean_and_error([scale * number for number in by_seed])
    return Cell(
        line=line.label,
        task=task,
        metric=metric,
        paper=paper,
        ours=ours,
        standard_error=error,
        difference=None if ours is None or paper is None else ours - paper,
    )


def _present(numbers: Sequence[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def _reduced(asked: Reproduction) -> list[str]:
    parts = [f"at most {asked.rows} rows a file"] if asked.rows is not None else []
    parts += [f"{asked.steps} step{'s' if asked.steps > 1 else ''} a training"] if asked.steps is not None else []
    return [f"**A reduced run and no reproduction: {', '.join(parts)}.**", ""] if parts else []


def _left_out(outcome: Outcome) -> Iterator[str]:
    if outcome.left_out:
        files = ", ".join(f"{count} of {total} of {file}" for file, (count, total) in outcome.left_out.items())
        yield f"Rows left out because they are longer than {outcome.max_length} tokens (--drop-long): {files}."


def _row(label: str, kind: str, numbers: Iterator[str]) -> str:
    return f"| {label} | {kind} | {' | '.join(numbers)} |"


def _number(value: float | None, metric: str, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{METRIC[metric].digits}f}"


def _ours(cell: Cell) -> str:
    if cell.ours is None:
        return "-"
    error = "" if cell.standard_error is None else f" +- {_number(cell.standard_error, cell.metric)}"
    return _number(cell.ours, cell.metric) + error
