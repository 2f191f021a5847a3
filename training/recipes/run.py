"""Runs a recipe: trains, releases and evaluates what is missing, and keeps every finished run as a file.

OUTPUT/settings.json               what all runs of the folder share
OUTPUT/data/TASK/SPLIT.jsonl       the rows used, where some are left out
OUTPUT/adapters/TASK-ADAPTER-SEED  the artifacts
OUTPUT/runs/TASK-ADAPTER-SEED.json their results, written last

In a grid every name ends with -RATE-SIZE, the cell's learning rate and batch size.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModel

from credence.adapters.artifact import load_artifact
from credence.training.config import TrainConfig
from credence.training.data import DataFile, DataFormat, read_data
from credence.training.errors import CheckpointError, ConfigError, DataError, ModelError
from credence.training.evaluate import evaluate
from credence.training.generation import measure_generation
from credence.training.loop import train
from credence.training.modeling import context_length, is_encoder, load_tokenizer
from credence.training.prompts import Encoder, class_space, label_space
from credence.training.recipes.recipe import METRIC, ROBUSTNESS, VERIFIER, Line, Recipe
from credence.training.robustness import FAILURES, REFUSALS, spread
from credence.training.tasks import TASKS
from credence.training.tasks.prepare import cut_off
from credence.training.verifiers import VERIFIERS

SETTINGS = "settings.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What is asked for.

    Attributes:
        data: folder of the tasks' folders, as ``credence data`` writes them.
        rows: most rows of a file; steps: of a training; seeds: number of seeds. None takes the recipe's.
        adapters, tasks: some of the recipe's; None takes all.
        drop_long: leave out rows that are longer than the base model or ``train.max_length`` takes; otherwise they are an error.
        allow_code_execution: whether tasks are evaluated whose verifier runs generated programs; otherwise they are left out.
    """

    name: str
    recipe: Recipe
    text: str
    base: str
    data: Path
    output: Path
    rows: int | None = None
    steps: int | None = None
    seeds: int | None = None
    adapters: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    drop_long: bool = False
    allow_code_execution: bool = False

    @property
    def shared(self) -> dict[str, Any]:
        """What must be equal for two runs to stand in one table."""
        base = Path(self.base)
        return {
            "recipe": self.name,
            "recipe_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "base": base.resolve().name if base.is_dir() else self.base,
            "rows": self.rows,
            "steps": self.steps,
            "drop_long": self.drop_long,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What there is to print.

    Attributes:
        tasks, adapters, seeds: that were run.
        results: metrics by line's label, task and seed.
        missing: tasks that were left out, and what to do.
        failed: runs of a grid whose training or evaluation failed, and why; in the median they are worse than every other.
        left_out: rows left out of each file, and rows in it before: ``{"arc_easy/train": (3, 1951)}``.
    """

    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    seeds: int
    results: Mapping[tuple[str, str, int], Mapping[str, float | None]]
    missing: Mapping[str, str]
    failed: Mapping[str, str]
    left_out: Mapping[str, tuple[int, int]]
    max_length: int


def reproduce(asked: Reproduction, say: Callable[[str], None] = lambda line: None) -> Outcome:
    """Runs what is missing.

    Args:
        say: told of every finished run.

    Raises:
        ConfigError: an adapter or task is not the recipe's.
        CheckpointError: the output holds runs with other settings.
        DataError: there is no data at all, or a row is too long and ``drop_long`` is not set.
        ModelError: the recipe is one of encoders and the base is none, or the other way round.
    """
    recipe = asked.recipe
    if recipe.encoder != is_encoder(asked.base):
        needed, given = ("an encoder", "none") if recipe.encoder else ("a causal language model", "an encoder")
        raise ModelError(
            f"{asked.name} needs {needed} such as {recipe.base}, and {asked.base} is {given}; give another --base"
        )
    adapters = _chosen("--methods", asked.adapters, tuple(recipe.adapters))
    tasks = _chosen("--tasks", asked.tasks, recipe.tasks)
    missing = {name: problem for name in tasks if (problem := _problem(asked, name, recipe.train_on is None))}
    present = tuple(name for name in tasks if name not in missing)
    if recipe.train_on and (problem := _problem(asked, recipe.train_on, True)):
        raise DataError(problem, file=asked.data)
    if not present:
        raise DataError(f"has none of the tasks of {asked.name}: {'; '.join(missing.values())}", file=asked.data)
    _check_shared(asked)
    rows = _Rows(asked)
    files = {name: rows.files(name) for name in dict.fromkeys((*present, *(recipe.trained if recipe.train_on else ())))}
    results: dict[tuple[str, str, int], Mapping[str, float | None]] = {}
    failed: dict[str, str] = {}
    seeds = asked.seeds or recipe.seeds
    for seed in range(seeds):
        for trained in (recipe.train_on,) if recipe.train_on else present:
            evaluated = present if recipe.train_on else (trained,)
            for adapter in adapters:
                runs = []
                for cell in recipe.cells:
                    name = f"{trained}-{adapter}-{seed}{cell}"
                    run = _run(asked, adapter, str(trained), seed, cell, files, evaluated, say)
                    runs.append(run)
                    for entry in run.values():
                        if "failed" in entry:
                            failed[name] = entry["failed"]
                for line in (line for line in recipe.lines if line.adapter == adapter):
                    for task in evaluated:
                        entries = [run[task]["lines"][line.label] for run in runs]
                        results[line.label, task, seed] = over_cells(line.over, entries) if line.over else entries[0]
    return Outcome(
        tasks=present,
        adapters=adapters,
        seeds=seeds,
        results=results,
        missing=missing,
        failed=failed,
        left_out=rows.left_out,
        max_length=rows.max_length,
    )


def over_cells(
    over: Literal["median", "best", "worst"], entries: Sequence[Mapping[str, float | None]]
) -> dict[str, float | None]:
    """One value of each metric from those of a grid's cells.

    Each metric is taken by itself: the best accuracy and the best (smallest) NLL may be of two cells. A cell that failed has no metrics; it
    is worse than every other in the median and does not count in best and worst.

    Returns:
        also ``extrinsic`` and ``intrinsic`` where ``over`` is the median (see :data:`ROBUSTNESS`); None where the median is a failed cell.
    """
    found = {
        metric: spread([entry.get(metric) for entry in entries], larger_is_better=metric == "accuracy")[over]
        for metric in METRIC
        if metric not in ROBUSTNESS
    }
    if over == "median":
        nll = found["nll"]
        found |= dict(zip(ROBUSTNESS, (found["accuracy"], 1 / nll if nll else None), strict=True))
    return found


def _chosen(option: str, asked: tuple[str, ...] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    for name in asked or ():
        if name not in allowed:
            raise ConfigError(f"{option} names {name!r}; the recipe has {', '.join(allowed)}", key=option)
    return tuple(name for name in allowed if asked is None or name in asked)


def _problem(asked: Reproduction, task: str, trains: bool) -> str | None:
    """What to do to have a task in the table; None if it can be."""
    if task in VERIFIER and VERIFIERS[VERIFIER[task]].runs_code and not asked.allow_code_execution:
        return f"{task} runs generated programs on this machine: allow it with --allow-code-execution"
    folder = asked.data / task
    lacking = [
        split for split in (TASKS[task].files if trains else ("test",)) if not (folder / f"{split}.jsonl").exists()
    ]
    if not lacking:
        return None
    return (
        f"{task} lacks {', '.join(f'{split}.jsonl' for split in lacking)}: export {TASKS[task].source} with `datasets` and run "
        f"`credence data {task} SRC --output {folder}`"
    )


def _check_shared(asked: Reproduction) -> None:
    path = asked.output / SETTINGS
    if path.exists():
        _refuse_other(asked.output, json.loads(path.read_text()), asked.shared)
        return
    if asked.output.exists() and any(asked.output.iterdir()):
        raise CheckpointError(f"{asked.output} exists and holds no reproduction; choose another --output")
    asked.output.mkdir(parents=True, exist_ok=True)
    _write(path, asked.shared)


def _refuse_other(place: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [name for name in now if kept.get(name) != now[name]]
    if differing:
        said = ", ".join(f"{name} {kept.get(name)!r} there and {now[name]!r} now" for name in differing)
        raise CheckpointError(
            f"{place} holds runs with other settings ({said}); runs are not mixed: choose another --output, or the same settings"
        )


class _Rows:
    """The files a reproduction uses: those of the data folder, or copies without rows that are too long or too many."""

    def __init__(self, asked: Reproduction) -> None:
        self.asked = asked
        self.left_out: dict[str, tuple[int, int]] = {}
        config = asked.recipe.config(next(iter(asked.recipe.adapters)), asked.recipe.trained[0])
        self.template = config.data.template
        self.tokenizer = load_tokenizer(asked.base)
        with torch.device("meta"):  # its shape only
            model = AutoModel.from_config(AutoConfig.from_pretrained(asked.base, trust_remote_code=False))
        self.max_length = min(config.train.max_length or sys.maxsize, context_length(model))

    def files(self, task: str) -> dict[str, Path]:
        """The file of each split that is there."""
        folder = self.asked.data / task
        names = [split for split in TASKS[task].files if (folder / f"{split}.jsonl").exists()]
        return {split: self._file(task, split, folder / f"{split}.jsonl") for split in names}

    def _file(self, task: str, split: str, path: Path) -> Path:
        data = read_data(path, expected=TASKS[task].format)
        long = self._long_lines(data)
        if long and not self.asked.drop_long:
            line, length = next(iter(long.items()))
            raise DataError(
                f"has {length} tokens, {self.max_length} are allowed ({len(long)} of {len(data.rows)} rows are too long); "
                "give --drop-long to leave them out (the page counts them), or a base model with a longer context",
                file=path,
                line=line,
            )
        if long:
            self.left_out[f"{task}/{split}"] = (len(long), len(data.rows))
        if not long and (self.asked.rows is None or len(data.rows) <= self.asked.rows):
            return path
        raw = path.read_text().split("\n")
        lines = [raw[row.line - 1] for row in data.rows if row.line not in long]
        if not lines:
            raise DataError(f"has no row of at most {self.max_length} tokens", file=path)
        if self.asked.rows is not None and len(lines) > self.asked.rows:
            _, lines = cut_off(lines, self.asked.rows, seed=0)
        target = self.asked.output / "data" / task / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{line}\n" for line in lines))
        return target

    def _long_lines(self, data: DataFile) -> dict[int, int]:
        """Line and length in tokens of the rows that are too long."""
        space = None
        if self.asked.recipe.encoder:
            space = class_space(data.labels, has_pairs=data.has_pairs)
        elif data.format is DataFormat.LABEL:
            space = label_space(self.tokenizer, data.labels, self.template)
        encoder = Encoder(self.tokenizer, data.format, space=space, max_length=sys.maxsize)
        lengths = {example.line: len(example.prompt) + len(example.target) for example in encoder.encode(data)}
        return {line: length for line, length in lengths.items() if length > self.max_length}


def _run(
    asked: Reproduction,
    adapter: str,
    task: str,
    seed: int,
    cell: str,
    files: Mapping[str, Mapping[str, Path]],
    evaluated: tuple[str, ...],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """By task ``lines``, the metrics of every line, and why the run ``failed``; a finished run is read. What is kept of other tasks'
    evaluations stays.
    """
    name = f"{task}-{adapter}-{seed}{cell}"
    path = asked.output / "runs" / f"{name}.json"
    around = asked.recipe.adapters[adapter].around
    config = _config(asked, adapter, task, seed, cell)
    now = {
        "config": config.model_dump(mode="json", exclude={"lora": {"init"}}),
        "train": _digest(files[task]["train"]),
        "validation": _digest(files[task]["validation"]),
    }
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**now, "results": {}}
    _refuse_other(path, kept, now)
    results: dict[str, dict[str, Any]] = kept["results"]
    lines = [line for line in asked.recipe.lines if line.adapter == adapter]
    tests = {name: _digest(files[name]["test"]) for name in evaluated}
    for other, digest in tests.items():
        if other in results and results[other]["test"] != digest:
            raise CheckpointError(f"{path} evaluated another test file of {other}; choose another --output")
    lacking = [other for other in evaluated if other not in results]
    if lacking:
        artifact = asked.output / "adapters" / name
        try:
            if around is not None:
                _train(asked, around, task, seed, cell, files)
            _train(asked, adapter, task, seed, cell, files)
            for other in lacking:
                found = _evaluate(asked, artifact, other, files[other]["test"], lines)
                results[other] = {"test": tests[other], "lines": found}
        except FAILURES as error:  # of a grid that is a result
            if isinstance(error, REFUSALS) or asked.recipe.grid is None:
                raise
            nothing: dict[str, Any] = {"failed": str(error), "lines": {line.label: {} for line in lines}}
            results.update({other: {"test": tests[other], **nothing} for other in lacking if other not in results})
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {**now, "results": results})
        say(f"{name}: done")
    return {other: results[other] for other in evaluated}


def _config(asked: Reproduction, adapter: str, task: str, seed: int, cell: str) -> TrainConfig:
    around = asked.recipe.adapters[adapter].around
    overrides: dict[str, dict[str, Any]] = {}
    if around is not None:
        overrides["lora"] = {"init": str(asked.output / "adapters" / f"{task}-{around}-{seed}{cell}")}
        overrides["train"] = {"max_steps": 0, "epochs": None}
    elif asked.steps is not None:
        overrides["train"] = {"max_steps": asked.steps, "epochs": None}
    return asked.recipe.config(adapter, task, asked.recipe.cells[cell], overrides)


def _train(
    asked: Reproduction, adapter: str, task: str, seed: int, cell: str, files: Mapping[str, Mapping[str, Path]]
) -> None:
    """Trains and releases an adapter if it is not there; an interrupted training goes on from its last checkpoint."""
    output = asked.output / "adapters" / f"{task}-{adapter}-{seed}{cell}"
    if output.exists():  # it appears in one step, when it is complete
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    method, config = asked.recipe.adapters[adapter].method, _config(asked, adapter, task, seed, cell)
    data = files[task]
    train(asked.base, data["train"], data["validation"], method, output, config, seed, resume=True)


def _evaluate(
    asked: Reproduction, path: Path, task: str, test: Path, lines: list[Line]
) -> dict[str, dict[str, float | None]]:
    """Metrics of each line; all lines of an artifact in one evaluation."""
    artifact = load_artifact(path)
    ks, taus = sorted({line.k for line in lines}), list(dict.fromkeys(line.tau for line in lines))
    if asked.recipe.generate is None:
        results = evaluate(path, asked.base, test, ks=ks, tau=taus)["results"]
    else:
        results = measure_generation(
            path,
            asked.base,
            test,
            VERIFIER[task],
            ks,
            taus,
            max_new_tokens=asked.recipe.generate.max_new_tokens,
            allow_code_execution=asked.allow_code_execution,
        ).document()["results"]
    found = {}
    for line in lines:
        tau = artifact.config.fitted_tau(line.k) if line.tau == "fitted" else line.tau
        at = (line.k, tau if line.k > 0 and artifact.has_posterior else 0.0)
        # At temperature 1, then at T, which texts do not have.
        matching = [entry for entry in results if (entry["k"], entry["tau"]) == at]
        found[line.label] = matching[int(line.tempered)]
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a file in one step: a run that is there is complete."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)
