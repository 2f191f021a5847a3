"""Does a running server find what the offline evaluation finds, and how much faster is it?

    python benchmarks/served_evaluation.py --models DIR --data DIR --work DIR [--rows 1000] [--rounds 3] [--write]

For a label task (clinc_domains) and a choice task (arc_easy) an adapter of stories260K is trained, released and evaluated twice over the
same rows at K = 0 and K = 10: in this process with transformers + PEFT, and by `credence serve` through the client. Compared are every
prediction and every metric. Then both answer label rows at K = 10 in interleaved rounds, with stories260K and with a random model of
95 million parameters that has its tokenizer (--large-rows of them). DIR of --models holds stories260K/, DIR of --data the tasks' folders;
--work keeps the adapters.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from credence.benchmarks.measure import Measurement, OtherWork, interleave, machine, timed, usable_cores, wait_idle
from credence.benchmarks.servers import ADAPTER, EngineSettings, Target, credence_server
from credence.benchmarks.workload import ModelShape, given_workload, random_workload
from credence.clients import Client
from credence.training.config import load_config
from credence.training.evaluate import Evaluation, measure
from credence.training.loop import train
from credence.training.modeling import load_tokenizer
from credence.training.predict import Scores
from credence.training.prompts import choice_prompt
from credence.training.served import DEFAULT_CONCURRENCY, Server

TASKS = ("clinc_domains", "arc_easy")
K = 10
CONTEXT = 512
ROWS = {"train": 300, "validation": 120, "ood": 100}
BATCH_SIZES = (64, 16, 1)
"""Rows per forward pass of the offline loop; 64 is the default of `credence eval`, 1 is a loop over the rows."""
LARGE = ModelShape(vocab_size=512)
SETTINGS = [
    "train.max_steps=100",
    "train.batch_size=16",
    "train.learning_rate=0.01",
    "train.save_steps=0",
    "method.epsilon=5e-3",
    f"release.ks=[{K}]",
    "release.taus=[1, 10, 100]",
]
LARGE_SETTINGS = [*SETTINGS, "train.max_steps=2", "train.batch_size=4", "release.max_rows=8", "release.taus=[1]"]
RESULTS = Path(__file__).parent / "results"


def prepare(
    task: str, rows: int, base: Path, data: Path, work: Path, settings: Sequence[str]
) -> tuple[Path, dict[str, Path]]:
    """Trains and releases the adapter unless ``work`` has it; returns it and the files of its rows.

    Rows whose prompt does not fit the model's context are left out: an evaluation refuses them.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(base)
    files = {}
    for part, count in {**ROWS, "test": rows}.items():
        source = data / task / f"{part}.jsonl"
        if not source.exists():
            continue
        documents = [json.loads(line) for line in source.read_text().splitlines()]
        random.Random(0).shuffle(documents)
        fitting = [row for row in documents if len(tokenizer(_prompt(row))["input_ids"]) < CONTEXT - 1]
        files[part] = work / f"{task}-{part}.jsonl"
        files[part].write_text("\n".join(map(json.dumps, fitting[:count])) + "\n")
    adapter = work / task
    if not adapter.exists():
        train(base, files["train"], files["validation"], "monteclora", adapter, load_config(None, settings), 0)
    return adapter, files


def _prompt(row: dict[str, Any]) -> str:
    return choice_prompt(row["prompt"], row["choices"]) if "choices" in row else f"Text: {row['text']}\nLabel:"


def large_base(tokenizer_of: Path, folder: Path) -> Path:
    """A random model with a tokenizer that has one-token answer letters; speed does not depend on the weights."""
    if not folder.exists():
        made = random_workload(folder.parent / "random", LARGE, max_length=CONTEXT).base
        load_tokenizer(tokenizer_of).save_pretrained(made)
        made.rename(folder)
    return folder


def differences(offline: Evaluation, served: Evaluation) -> list[dict[str, Any]]:
    """For every K and temperature: rows predicted differently, and the largest difference of a score and of a metric."""
    found = []
    documents = zip(offline.document()["results"], served.document()["results"], strict=True)
    for here, there, (mine, theirs) in zip(offline.entries, served.entries, documents, strict=True):
        a, b = _ordered(here.scores), _ordered(there.scores)
        gaps = {name: abs(mine[name] - theirs[name]) for name in mine if mine[name] is not None}
        worst = max(gaps, key=lambda name: gaps[name])
        found.append(
            {
                "k": here.k,
                "temperature": here.temperature,
                "rows": len(a.row),
                "other_predictions": int((a.choice != b.choice).sum()),
                "log_prob": float((a.log_prob - b.log_prob).abs().max()),
                "epistemic": float((a.epistemic - b.epistemic).abs().max()),
                "metric": worst,
                "metric_difference": gaps[worst],
                "accuracy": mine["accuracy"],
                "nll": mine["nll"],
            }
        )
        assert [name for name in mine if mine[name] is None] == [name for name in theirs if theirs[name] is None]
    return found


def _ordered(scores: Scores) -> Scores:
    order = scores.row.argsort(stable=True)
    return Scores(**{name: getattr(scores, name)[order] for name in Scores.__dataclass_fields__})


def compare(task: str, adapter: Path, files: dict[str, Path], base: Path, server: Server) -> list[dict[str, Any]]:
    """Both evaluations of one task."""
    arguments = (adapter, base, files["test"], files.get("ood"), (0, K))
    rows = differences(measure(*arguments, batch_size=BATCH_SIZES[0]), measure(*arguments, server=server))
    return [{"task": task, **row} for row in rows]


def throughput(adapter: Path, base: Path, rows: Path, target: Target, server: Server, rounds: int) -> dict[str, Any]:
    """Wall and processor time of both, medians of interleaved rounds, and the share of the machine that others used."""
    own, everything = [os.getpid()], [os.getpid(), *target.pids]

    def offline(batch_size: int) -> Callable[[], Measurement]:
        return lambda: timed(lambda: measure(adapter, base, rows, ks=(K,), batch_size=batch_size), own)

    work: dict[str, Callable[[], Measurement]] = {f"offline, batch {size}": offline(size) for size in BATCH_SIZES}
    work["served"] = lambda: timed(lambda: measure(adapter, base, rows, ks=(K,), server=server), everything)
    with OtherWork(everything) as others:
        found = interleave(work, rounds=rounds, between=lambda: wait_idle(target.pids), progress=print)
    wall = {name: statistics.median(m.wall_ms for m in runs) / 1000 for name, runs in found.items()}
    cpu = {name: statistics.median(m.cpu_ms for m in runs) / 1000 for name, runs in found.items()}
    return {
        "rows": len(rows.read_text().splitlines()),
        "other_work": others.share,
        "results": {
            name: {"wall_s": wall[name], "cpu_s": cpu[name], "ratio": wall[name] / wall["served"]} for name in work
        },
    }


def page(command: str, agreement: Sequence[dict[str, Any]], speeds: dict[str, dict[str, Any]], rounds: int) -> str:
    """The tables of agreement and of speed."""
    lines = [
        "# A running server evaluates as the offline loop does",
        "",
        f"`{command}`",
        "",
        f"{datetime.now(UTC).date().isoformat()}; stories260K, float32, MonteCLoRA adapters of {ROWS['train']} rows and 100 steps, "
        f"{machine()}. "
        f"Offline: transformers + PEFT in one process, {usable_cores()} threads. "
        f"Served: `credence serve` with one compute thread, {DEFAULT_CONCURRENCY} requests under way.",
        "",
        "## Agreement",
        "",
        "| task | K | T | rows | accuracy | NLL | rows predicted otherwise | largest difference of a log-probability "
        "| of an epistemic score | of a metric |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in agreement:
        lines.append(
            f"| {row['task']} | {row['k']} | {row['temperature']:.2f} | {row['rows']} | {row['accuracy']:.3f} | {row['nll']:.4f} "
            f"| {row['other_predictions']} | {row['log_prob']:.1e} | {row['epistemic']:.1e} "
            f"| {row['metric_difference']:.1e} ({row['metric']}) |"
        )
    lines += [
        "",
        "## Speed",
        "",
        f"Label rows of {TASKS[0]} at K = {K}, medians of {rounds} interleaved rounds. Loading the model (seconds) is in the offline "
        "times, starting the server is not in the served ones.",
    ]
    for name, speed in speeds.items():
        lines += [
            "",
            f"{name}, {speed['rows']} rows; other work took {speed['other_work']:.0%} of the machine's processors meanwhile.",
            "",
            "| | wall, s | rows per second | processor time, s | wall against served |",
            "|---|---|---|---|---|",
        ]
        for how, row in speed["results"].items():
            rate = speed["rows"] / row["wall_s"]
            lines.append(f"| {how} | {row['wall_s']:.1f} | {rate:.1f} | {row['cpu_s']:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--large-rows", type=int, default=100, help="rows of the large model; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/served_evaluation.{json,md}")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    base = options.models / "stories260K"
    agreement: list[dict[str, Any]] = []
    speeds: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        adapter, files = prepare(task, options.rows, base, options.data, options.work, SETTINGS)
        with served(base, adapter) as (target, server):
            agreement += compare(task, adapter, files, base, server)
            print(json.dumps(agreement[-4:], indent=1))
            if task == TASKS[0]:
                speeds["stories260K"] = throughput(adapter, base, files["test"], target, server, options.rounds)
    if options.large_rows:
        base = large_base(base, options.work / "large")
        adapter, files = prepare(
            TASKS[0], options.large_rows, base, options.data, options.work / "of-large", LARGE_SETTINGS
        )
        with served(base, adapter) as (target, server):
            millions = given_workload(base, adapter).num_parameters / 1e6
            speeds[f"Random model of {millions:.0f} million parameters"] = throughput(
                adapter, base, files["test"], target, server, options.rounds
            )
    command = "python benchmarks/served_evaluation.py --models MODELS --data DATA --work WORK"
    command += f" --rows {options.rows} --large-rows {options.large_rows} --rounds {options.rounds}"
    text = page(command, agreement, speeds, options.rounds)
    print(text)
    if options.write:
        (RESULTS / "served_evaluation.md").write_text(text)
        document = {"command": command, "machine": machine(), "agreement": agreement, "speed": speeds}
        (RESULTS / "served_evaluation.json").write_text(json.dumps(document, indent=1) + "\n")


@contextmanager
def served(base: Path, adapter: Path) -> Iterator[tuple[Target, Server]]:
    """Our server with this adapter."""
    settings = EngineSettings(dtype="float32", max_length=CONTEXT, max_samples=K, threads=1)
    with (
        tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch,
        credence_server(given_workload(base, adapter), settings, Path(scratch) / "log", print) as target,
    ):
        yield target, Server(connect=lambda: Client(target.url, timeout_s=600), model=ADAPTER)


if __name__ == "__main__":
    main()
