"""Robustness to learning rate and batch size: runs the cells of a grid, keeps them, and measures what they say.

Seth et al. (MonteCLoRA, TMLR 2025) train over learning rates x batch sizes: the median accuracy over the grid is a method's extrinsic
robustness, 1 / median NLL its intrinsic one. A cell is one training run and its evaluation, kept as one JSON file.
"""

import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import wilcoxon

from credence.training.checkpoint import first_difference
from credence.training.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from credence.training.evaluate import evaluate
from credence.training.grid import Cell, Study
from credence.training.loop import train

REFUSALS = (ConfigError, DataError, ModelError, CheckpointError)
"""Errors that say nothing about a setting's robustness: such a cell has no result, and the next call tries it again."""
FAILURES = (TrainingError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""All other errors of training, release and metrics, mostly numbers that are not finite: they are the cell's result."""
LARGER_IS_BETTER = {"accuracy": True, "nll": False, "ece15": False}
COMPARED = ("accuracy", "nll")

Cells = Mapping[Cell, Mapping[str, Any]]
"""What :func:`read_cell` gives, by cell."""
Say = Callable[[str], None]


def run(study: Study, folder: Path, *, jobs: int = 1, say: Say) -> dict[Cell, dict[str, Any]]:
    """Runs the cells that ``folder`` does not hold yet, and returns all of them.

    A run whose numbers are not finite is a cell with a reason instead of results. Cells that end with another error are tried again by
    the next call, and so are those that were interrupted. Numbers depend on ``jobs`` by rounding at most: every process has its share of
    the threads.

    Args:
        folder: of this study; made if it is not there.
        jobs: processes.
        say: receives one line per cell.

    Returns:
        What :func:`read_cell` gives, by cell, in the grid's order.

    Raises:
        CheckpointError: ``folder`` holds a cell that was made otherwise, or another process works there; nothing was run.
        TrainingError: cells have no result; the others are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        cells = study.grid.cells()
        missing = [cell for cell in cells if read_cell(study, cell, folder) is None]
        if len(missing) < len(cells):
            say(f"{len(cells) - len(missing)} of {len(cells)} cells are there")
        errors: dict[Cell, str] = {}
        attempts = _one_by_one(study, missing, folder) if jobs == 1 else _in_processes(study, missing, folder, jobs)
        for count, (cell, error) in enumerate(attempts, start=1):
            document = read_cell(study, cell, folder)
            if document is None:
                errors[cell] = error or "no result"
            say(f"{count}/{len(missing)} {cell}: {errors[cell] if document is None else _in_short(document)}")
    if errors:
        first = next(cell for cell in cells if cell in errors)
        raise TrainingError(
            f"{len(errors)} of {len(cells)} cells have no result, the first: {first}: {errors[first]}; the others are kept in {folder}, "
            f"the same call runs what is missing ({folder / first.name}.log has the run's lines)"
        )
    found = {cell: read_cell(study, cell, folder) for cell in cells}
    return {cell: document for cell, document in found.items() if document is not None}


def read_cell(study: Study, cell: Cell, folder: Path) -> dict[str, Any] | None:
    """A finished cell: what it was made from, versions, seconds, ``results`` as of ``credence eval``, or the reason why it ``failed``.

    Returns:
        None if the cell is not there.

    Raises:
        CheckpointError: it was made from other settings or data, or cannot be read.
    """
    path = folder / f"{cell.name}.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        made_from = document["made_from"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} cannot be read; delete it to run {cell} again") from None
    difference = first_difference(made_from, study.made_from(cell))
    if difference is not None:
        key, before, now = difference
        raise CheckpointError(
            f"{path} was made otherwise: {key} was {before!r} and is now {now!r}; choose another --output, or delete the cells to run "
            "them again"
        )
    return document


def run_cell(study: Study, cell: Cell, folder: Path) -> None:
    """Trains, releases and evaluates one cell and writes its file; the run's own lines go to a file beside it."""
    scratch, started = folder / f".{cell.name}", time.perf_counter()
    shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted run
    scratch.mkdir()
    result: dict[str, Any]
    with (folder / f"{cell.name}.log").open("w") as log, redirect_stderr(log):
        try:
            output = scratch / "adapter"
            train(study.base, study.data, study.validation, cell.method, output, study.config(cell), cell.seed)
            result = {"failed": None, "results": evaluate(output, study.base, study.test, ks=study.ks)["results"]}
        except FAILURES as error:
            if isinstance(error, REFUSALS):
                raise
            result = {"failed": " ".join(str(error).split()), "results": []}
        except Exception:
            traceback.print_exc()
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    document = {
        "made_from": study.made_from(cell),
        "versions": {name: version(name) for name in ("credence", "torch", "transformers", "peft")},
        "seconds": time.perf_counter() - started,
        **result,
    }
    unfinished = folder / f".{cell.name}.json"
    unfinished.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, folder / f"{cell.name}.json")


def _attempt(study: Study, cell: Cell, folder: Path) -> str | None:
    """Runs a cell and returns the error as a sentence: not every exception can be sent from one process to another."""
    try:
        run_cell(study, cell, folder)
    except Exception as error:
        return str(error) if isinstance(error, REFUSALS) else f"{type(error).__name__}: {error}"
    return None


def _one_by_one(study: Study, cells: Sequence[Cell], folder: Path) -> Iterator[tuple[Cell, str | None]]:
    for cell in cells:
        yield cell, _attempt(study, cell, folder)


def _in_processes(study: Study, cells: Sequence[Cell], folder: Path, jobs: int) -> Iterator[tuple[Cell, str | None]]:
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(
        min(jobs, max(1, len(cells))), multiprocessing.get_context("spawn"), _begin_process, (threads,)
    ) as pool:
        futures = {pool.submit(_attempt, study, cell, folder): cell for cell in cells}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    yield futures[future], "a process ended abruptly while this cell ran or waited (out of memory?)"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin_process(threads: int) -> None:
    # Ctrl-C reaches every process of the terminal: these end at once and without a traceback each.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second call out of the folder; the lock goes with the process, however that ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another process works in {folder}; wait for it, or choose another --output"
            ) from None
        yield


def _in_short(document: Mapping[str, Any]) -> str:
    if document["failed"]:
        return f"failed: {document['failed']}"
    last = document["results"][-1]
    return f"accuracy {last['accuracy']:.4f}, NLL {last['nll']:.4f}, {document['seconds']:.1f} s"


def summarise(study: Study, cells: Cells) -> dict[str, Any]:
    """Robustness of every method, and its paired differences from the first one, for every K at temperature 1 and at the fitted one.

    A failed cell is worse than every finished one in the medians, which are None if they fall on it; best, worst and spread are those of
    the finished cells.

    Returns:
        ``methods``, each with ``cells``, ``failed`` and ``predictions``, and ``comparisons`` (see :func:`compare`); JSON without NaN.
    """
    predictions = [{"k": k, "fitted": fitted} for k in study.ks for fitted in (False, True)]
    methods = []
    for name in study.grid.methods:
        own = [cells[cell] for cell in study.grid.cells(name)]
        methods.append(
            {
                "method": name,
                "learning_rates": list(study.grid.learning_rates[name]),
                "cells": len(own),
                "failed": sum(bool(document["failed"]) for document in own),
                "predictions": [
                    {**prediction, **_robustness([_values(document, index) for document in own])}
                    for index, prediction in enumerate(predictions)
                ],
            }
        )
    first, *others = study.grid.methods
    comparisons = [
        {
            "method": name,
            "against": first,
            **prediction,
            "metric": metric,
            **_compared(study, cells, name, index, metric),
        }
        for name in others
        for index, prediction in enumerate(predictions)
        for metric in COMPARED
    ]
    return {"methods": methods, "comparisons": comparisons}


def spread(values: Sequence[float | None], *, larger_is_better: bool) -> dict[str, float | None]:
    """Median, best, worst and the distance between these two; None stands for a failed cell."""
    finished = [value for value in values if value is not None]
    lost = -math.inf if larger_is_better else math.inf
    median = statistics.median(lost if value is None else value for value in values)
    ends = (max, min) if larger_is_better else (min, max)
    best, worst = (end(finished) if finished else None for end in ends)
    return {
        "median": median if math.isfinite(median) else None,
        "best": best,
        "worst": worst,
        "spread": None if best is None or worst is None else abs(best - worst),
    }


def compare(differences: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of paired differences, its standard error, and the two-sided p-value of Wilcoxon's signed-rank test (Wilcoxon, 1945).

    Zeros are left out of the test, as in his paper. The p-value is exact up to 50 differences, or 13 if some are equal in size, and the
    normal approximation beyond (scipy). ``smallest_p`` is the smallest that so many differences can give, 2^(1 - n).

    Returns:
        None where a number is not defined: all of them without pairs, the standard error of one pair.
    """
    pairs = len(differences)
    # Accuracies are fractions of one number of rows: equal differences must not differ by their rounding.
    signed = [rounded for difference in differences if (rounded := round(difference, 12))]
    p = float(wilcoxon(signed).pvalue) if signed else 1.0
    return {
        "pairs": pairs,
        "mean_difference": statistics.fmean(differences) if pairs else None,
        "standard_error": statistics.stdev(differences) / math.sqrt(pairs) if pairs > 1 else None,
        "p": p if pairs else None,
        "smallest_p": min(1.0, 2.0 ** (1 - len(signed))) if pairs else None,
    }


def _values(document: Mapping[str, Any], index: int) -> dict[str, float | None]:
    """The metrics of one prediction of a cell, None if it failed."""
    entry: Mapping[str, float] = {} if document["failed"] else document["results"][index]
    return {metric: entry.get(metric) for metric in LARGER_IS_BETTER}


def _robustness(cells: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    found = {
        metric: spread([cell[metric] for cell in cells], larger_is_better=larger)
        for metric, larger in LARGER_IS_BETTER.items()
    }
    nll = found["nll"]["median"]
    return {**found, "extrinsic": found["accuracy"]["median"], "intrinsic": 1 / nll if nll else None}


def _compared(study: Study, cells: Cells, method: str, index: int, metric: str) -> dict[str, float | int | None]:
    """Differences from the first method, one a setting: the mean over the seeds that both methods finished."""
    pairs: dict[tuple[int, int], list[float]] = {}
    for own, other in zip(study.grid.cells(method), study.grid.cells(study.grid.methods[0]), strict=True):
        a, b = (_values(cells[cell], index)[metric] for cell in (own, other))
        found = pairs.setdefault((own.rate_index, own.batch_size), [])
        if a is not None and b is not None:
            found.append(a - b)
    differences = [statistics.fmean(found) for found in pairs.values() if found]
    return {**compare(differences), "left_out": len(pairs) - len(differences)}
