"""Does a running server find what the offline evaluation finds, and how much faster is it?

    python benchmarks/served_evaluation.py --models DIR --data DIR --work DIR [--rows 1000] [--rounds 3] [--write]

For a label task (clinc_domains) and a choice task (arc_easy) an adapter of stories260K is trained, released and evaluated twice over the
same rows at K = 0 and K = 10: in this process with transformers + PEFT, and by `credence serve` through the client. Compared are every
prediction and every metric. Then both answer the label rows at K = 10 in interleaved rounds. DIR of --models holds stories260K/, DIR of
--data the tasks' folders; --work keeps the adapters.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from credence.benchmarks.measure import Measurement, OtherWork, interleave, machine, timed, usable_cores, wait_idle
from credence.benchmarks.servers import ADAPTER, EngineSettings, Target, credence_server
from credence.benchmarks.workload import Workload, given_workload
from credence.cli.served import DEFAULT_CONCURRENCY, Server
from credence.clients import Client
from credence.training.config import load_config
from credence.training.evaluate import Evaluation, measure
from credence.training.loop import train
from credence.training.modeling import load_tokenizer
from credence.training.predict import Scores
from credence.training.prompts import choice_prompt

TASKS = ("clinc_domains", "arc_easy")
K = 10
CONTEXT = 512
ROWS = {"train": 300, "validation": 120, "ood": 100}
BATCH_SIZES = (64, 16)
"""Rows per forward pass of the offline loop; 64 is the default of `credence eval`."""
SETTINGS = [
    "train.max_steps=100",
    "train.batch_size=16",
    "train.learning_rate=0.01",
    "train.save_steps=0",
    "method.epsilon=5e-3",
    f"release.ks=[{K}]",
    "release.taus=[1, 10, 100]",
]
RESULTS = Path(__file__).parent / "results"


def prepare(task: str, rows: int, models: Path, data: Path, work: Path) -> tuple[Path, dict[str, Path]]:
    """Trains and releases the adapter unless --work has it; returns it and the files of its rows.

    Rows whose prompt does not fit the model's context are left out: an evaluation refuses them.
    """
    tokenizer = load_tokenizer(models / "stories260K")
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
        base = models / "stories260K"
        train(base, files["train"], files["validation"], "monteclora", adapter, load_config(None, SETTINGS), 0)
    return adapter, files


def _prompt(row: dict[str, Any]) -> str:
    return choice_prompt(row["prompt"], row["choices"]) if "choices" in row else f"Text: {row['text']}\nLabel:"


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


def throughput(
    adapter: Path, base: Path, rows: Path, target: Target, server: Server, rounds: int
) -> tuple[dict[str, list[Measurement]], float]:
    """Wall and processor time of both, in interleaved rounds, and the share of the machine that others used."""
    own, everything = [os.getpid()], [os.getpid(), *target.pids]

    def offline(batch_size: int) -> Callable[[], Measurement]:
        return lambda: timed(lambda: measure(adapter, base, rows, ks=(K,), batch_size=batch_size), own)

    work: dict[str, Callable[[], Measurement]] = {f"offline, batch {size}": offline(size) for size in BATCH_SIZES}
    work["served"] = lambda: timed(lambda: measure(adapter, base, rows, ks=(K,), server=server), everything)
    with OtherWork(everything) as others:
        found = interleave(work, rounds=rounds, between=lambda: wait_idle(target.pids), progress=print)
    return found, others.share


def page(command: str, agreement: Sequence[dict[str, Any]], speed: dict[str, Any]) -> str:
    """The two tables."""
    lines = [
        "# A running server evaluates as the offline loop does",
        "",
        f"`{command}`",
        "",
        f"stories260K, float32, MonteCLoRA adapters of {ROWS['train']} rows and 100 steps, {speed['machine']}. "
        f"Offline: transformers + PEFT in one process, {speed['threads']} threads. "
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
        f"## Speed: {speed['rows']} label rows at K = {K}",
        "",
        f"Medians of {speed['rounds']} interleaved rounds; other work took {speed['other_work']:.0%} of the machine's processors. "
        "Loading the model is in the offline times (seconds), starting the server is not in the served ones.",
        "",
        "| | wall, s | rows per second | processor time, s | wall against served |",
        "|---|---|---|---|---|",
    ]
    for name, row in speed["results"].items():
        lines.append(
            f"| {name} | {row['wall_s']:.1f} | {speed['rows'] / row['wall_s']:.0f} | {row['cpu_s']:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/served_evaluation.{json,md}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(usable_cores())
    base = options.models / "stories260K"
    settings = EngineSettings(dtype="float32", max_length=CONTEXT, max_samples=K, threads=1)
    agreement: list[dict[str, Any]] = []
    speed: dict[str, Any] = {}
    for task in TASKS:
        adapter, files = prepare(task, options.rows, options.models, options.data, options.work)
        workload: Workload = given_workload(base, adapter)
        with (
            tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch,
            credence_server(workload, settings, Path(scratch) / "log", print) as target,
        ):
            server = Server(connect=lambda url=target.url: Client(url, timeout_s=600), model=ADAPTER)  # type: ignore[misc]
            agreement += compare(task, adapter, files, base, server)
            print(json.dumps(agreement[-4:], indent=1))
            if task == TASKS[0]:
                found, share = throughput(adapter, base, files["test"], target, server, options.rounds)
                wall = {name: statistics.median(m.wall_ms for m in runs) / 1000 for name, runs in found.items()}
                speed = {
                    "machine": machine(),
                    "threads": usable_cores(),
                    "rows": len(files["test"].read_text().splitlines()),
                    "rounds": options.rounds,
                    "other_work": share,
                    "results": {
                        name: {
                            "wall_s": wall[name],
                            "cpu_s": statistics.median(m.cpu_ms for m in runs) / 1000,
                            "ratio": wall[name] / wall["served"],
                        }
                        for name, runs in found.items()
                    },
                }
                print(json.dumps(speed, indent=1))
    command = "python benchmarks/served_evaluation.py --models MODELS --data DATA --work WORK"
    command += f" --rows {options.rows} --rounds {options.rounds}"
    text = page(command, agreement, speed)
    print(text)
    if options.write:
        (RESULTS / "served_evaluation.md").write_text(text)
        document = {"command": command, "agreement": agreement, "speed": speed}
        (RESULTS / "served_evaluation.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
