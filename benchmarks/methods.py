"""Which training method gives the most trustworthy adapter at equal data and equal steps?

Fine-tunes a 260-thousand-parameter Llama (stories260K) on 500 rows of a classification task with every method and compares, on test
rows and on queries that belong to no class: the mean adapter, the mean with a fitted temperature T, and averages of K = 10 and K = 32
samples at the fitted tau and T (an ensemble: all its members). tau and T are fitted on validation rows, for each K. The bars for a
posterior are its own mean with T and MAP's mean with T, paired by seed: the seed sets the training and validation rows, the start, the
order of rows and the noise. laplace and tfb put their posteriors around MAP's adapter of the same seed. LoRA+, DoRA and AdaLoRA are
PEFT's, have no samples and are evaluated offline only.

    python benchmarks/methods.py --models DIR --data DIR --work DIR --choose
    python benchmarks/methods.py --models DIR --data DIR --work DIR --seeds 10 [--methods ...] [--tasks ...] [--write]

--choose compares settings by the NLL of validation rows, on seeds of its own and the first task; what it found best stands in SETTINGS.
DIR of --models holds stories260K/, DIR of --data holds the tasks' folders. Runs are kept in --work and not repeated, and several processes
may share it; the page is made of the runs that are there.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from credence.benchmarks.peft_training import Comparator, Rows, evaluate_model, fit_temperature, train_comparator
from credence.training.config import ReleaseSettings, load_config
from credence.training.evaluate import evaluate
from credence.training.loop import train
from credence.training.release import ReleaseResult, release

ROWS = {"train": 500, "validation": 240, "test": 750, "ood": 250}
KS = (10, 32)
BATCH_SIZE = 32
"""Rows per forward pass of release and evaluation; larger batches of this small model fall out of the cache."""
COMMON = [
    "train.max_steps=400",
    "train.batch_size=16",
    "train.learning_rate=0.01",
    "train.warmup_ratio=0.05",
    "train.save_steps=0",
]
TASKS = ("clinc_domains", "clinc_travel_intents")
TAUS = {"laplace": (0.01, 0.1, 1.0, 10.0), "tfb": (10.0, 100.0, 1000.0, 10000.0), "ivon": (10.0, 100.0, 1000.0)}
"""Grids of tau of methods whose noise is of another size than that of the others, ``USUAL_TAUS``."""
USUAL_TAUS = (1.0, 10.0, 100.0)
IVON = ["train.weight_decay=1e-6", "method.ess=1e8", "method.hess_init=1e-3", "method.clip_radius=1e-3"]
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "map": ("map", []),
    "swa": ("swa", []),
    "mcdropout": ("mcdropout", ["lora.dropout=0.05"]),
    "swag": ("swag", []),
    "laplace": ("laplace", []),
    "tfb": ("tfb", []),
    "checkpoints": ("ensemble", ["method.source=checkpoints", "method.members=10"]),
    "ivon": ("ivon", ["train.learning_rate=3", *IVON]),
    "monteclora": ("monteclora", ["method.epsilon=5e-3"]),
    "melora": ("melora", ["method.initial_sd=0.08"]),
    "blob": ("blob", []),
    "ensemble": ("ensemble", ["method.members=5"]),
}
CANDIDATES: dict[str, list[list[str]]] = {
    "mcdropout": [[f"lora.dropout={rate}"] for rate in (0.05, 0.1, 0.2, 0.02)],
    "swag": [
        ["method.start=0.5", "train.lr_scheduler=constant_with_warmup"],
        ["method.start=0.75", "train.lr_scheduler=constant_with_warmup"],
        ["train.learning_rate=3e-3", "train.lr_scheduler=constant_with_warmup"],
        ["method.start=0.5"],
        ["method.start=0.75"],
    ],
    "laplace": [["method.structure=kron"], ["method.structure=diag"]],
    "ivon": [[f"train.learning_rate={rate}", *IVON] for rate in (1, 3)],
    "monteclora": [[f"method.epsilon={size}"] for size in (2e-3, 5e-3, 2e-2)],
    "melora": [[f"method.initial_sd={sd}"] for sd in (0.02, 0.04, 0.08)],
    "blob": [[f"method.initial_sd={sd}"] for sd in (0.005, 0.01, 0.02)],
}
"""Settings compared by --choose, at K = 10 with fitted tau and T."""
COMPARATORS = {
    "lora+": Comparator(adapter="lora+", learning_rate=3e-3, ratio=4),
    "dora": Comparator(adapter="dora"),
    "adalora": Comparator(adapter="adalora", learning_rate=3e-2),
}
COMPARATOR_CANDIDATES = {
    "lora+": [
        Comparator(adapter="lora+", learning_rate=rate, ratio=ratio)
        for rate, ratio in ((3e-3, 4), (1e-2, 4), (3e-3, 16))
    ],
    "adalora": [Comparator(adapter="adalora", learning_rate=rate) for rate in (1e-2, 3e-2)],
}
"""Compared by --choose at the mean with fitted T."""
CHOICE_SEEDS = (100, 101)
ON_MAP = ("laplace", "tfb")
"""Posteriors that are put around MAP's adapter; their training time is MAP's."""
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece15": "ECE15",
    "brier": "Brier",
    "error_auroc": "error AUROC",
    "ood_auroc_total": "OOD AUROC, total",
    "ood_auroc_epistemic": "OOD AUROC, epistemic",
}
LOWER_IS_BETTER = ("nll", "ece15", "brier")
CLEAR = 2.0
"""Standard errors from which a difference is called one."""
VARIANTS = {"mean": (0, 0), "mean + T": (0, 1), **{f"K = {k} + T": (k, 1) for k in KS}}
"""K and whether the fitted temperature is used."""


def subset(source: Path, count: int, seed: int, target: Path) -> Path:
    """Writes at most ``count`` rows of a file, drawn without replacement."""
    rows = source.read_text().splitlines()
    random.Random(seed).shuffle(rows)
    target.write_text("\n".join(rows[:count]) + "\n")
    return target


def fit(
    name: str,
    settings: list[str],
    task: str,
    seed: int,
    ks: tuple[int, ...],
    models: Path,
    data: Path,
    work: Path,
    scratch: Path,
) -> tuple[float, ReleaseResult]:
    """Trains an adapter into ``scratch``/adapter and fits its tau and T; returns the processor time of training, seconds."""
    for part in ("train", "validation"):
        subset(data / task / f"{part}.jsonl", ROWS[part], seed, scratch / f"{part}.jsonl")
    base, output = models / "stories260K", scratch / "adapter"
    config, before = [*COMMON, *settings], 0.0
    if name in ON_MAP:
        before = run("map", task, seed, models, data, work)["train_seconds"]
        config += [f"lora.init={work / f'{task}-map-{seed}-adapter'}", "train.max_steps=0"]
    started = time.process_time()
    train(base, scratch / "train.jsonl", None, SETTINGS[name][0], output, load_config(None, config), seed)
    seconds = before + time.process_time() - started
    grid = ReleaseSettings(ks=ks, taus=TAUS.get(name, USUAL_TAUS))
    return seconds, release(output, base, scratch / "validation.jsonl", grid, batch_size=BATCH_SIZE)


def empty(folder: Path) -> Path:
    """Makes an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(name: str, task: str, seed: int, models: Path, data: Path, work: Path) -> dict[str, Any]:
    """Trains, releases and evaluates one adapter; returns the kept result if there is one."""
    result_file = work / f"{task}-{name}-{seed}.json"
    if result_file.exists():
        kept: dict[str, Any] = json.loads(result_file.read_text())
        return kept
    scratch = empty(work / f"{task}-{name}-{seed}")
    if name in COMPARATORS:
        result = {
            "name": name,
            "task": task,
            "seed": seed,
            **compared(COMPARATORS[name], task, seed, models, data, scratch),
        }
        result_file.write_text(json.dumps(result) + "\n")
        shutil.rmtree(scratch)
        return result
    seconds, released = fit(name, SETTINGS[name][1], task, seed, KS, models, data, work, scratch)
    output = scratch / "adapter"
    # The test rows are the same for every seed; the rows an adapter may learn from are not.
    test, ood = (
        subset(data / task / f"{part}.jsonl", ROWS[part], 0, scratch / f"{part}.jsonl") for part in ("test", "ood")
    )
    report = evaluate(output, models / "stories260K", test, ood, ks=(0, *KS), batch_size=BATCH_SIZE)
    for index, entry in enumerate(report["results"]):
        entry["variant"] = index % 2  # evaluate reports temperature 1 first, then the fitted one
    result = {
        "name": name,
        "task": task,
        "seed": seed,
        "train_seconds": seconds,
        "bytes": sum(file.stat().st_size for file in output.iterdir()),
        "release": released.metrics(),
        "results": report["results"],
    }
    if name == "map":
        shutil.rmtree(work / f"{task}-map-{seed}-adapter", ignore_errors=True)
        shutil.move(output, work / f"{task}-map-{seed}-adapter")
    result_file.write_text(json.dumps(result) + "\n")
    shutil.rmtree(scratch)
    return result


def compared(comparator: Comparator, task: str, seed: int, models: Path, data: Path, scratch: Path) -> dict[str, Any]:
    """Trains one of PEFT's adapters, fits its temperature and evaluates it; the numbers of a run."""
    files = {
        part: subset(
            data / task / f"{part}.jsonl",
            count,
            seed if part in ("train", "validation") else 0,
            scratch / f"{part}.jsonl",
        )
        for part, count in ROWS.items()
    }
    rows = Rows.read(models / "stories260K", files)
    started = time.process_time()
    model = train_comparator(models / "stories260K", rows, comparator, seed)
    seconds = time.process_time() - started
    temperature, nll = fit_temperature(model, rows, BATCH_SIZE)
    results = evaluate_model(model, rows, temperature, BATCH_SIZE)
    model.save_pretrained(scratch / "peft")
    return {
        "train_seconds": seconds,
        "bytes": sum(file.stat().st_size for file in (scratch / "peft").iterdir()),
        "release": {"tau": {}, "temperature": {"0": temperature}, "nll": {"0": nll}},
        "results": [{**entry, "variant": index} for index, entry in enumerate(results)],
    }


def choose(methods: Iterable[str], models: Path, data: Path, work: Path) -> None:
    """Compares the candidates; keeps their validation NLL by seed in choice-*.json."""
    for name in methods:
        candidates: list[list[str] | Comparator] = [*CANDIDATES.get(name, []), *COMPARATOR_CANDIDATES.get(name, [])]
        for number, settings in enumerate(candidates):
            kept = work / f"choice-{name}-{number}.json"
            if kept.exists():
                continue
            scores = {}
            for seed in CHOICE_SEEDS:
                scratch = empty(work / f"choice-{name}-{number}")
                if isinstance(settings, Comparator):
                    scores[seed] = compared(settings, TASKS[0], seed, models, data, scratch)["release"]["nll"]["0"]
                else:
                    _, released = fit(name, settings, TASKS[0], seed, (KS[0],), models, data, work, scratch)
                    scores[seed] = released.calibration.temperature[KS[0]].nll
                shutil.rmtree(scratch)
            shown = str(settings) if isinstance(settings, Comparator) else " ".join(settings)
            kept.write_text(json.dumps({"name": name, "settings": shown, "nll": scores}) + "\n")
            print(f"{name} {shown}: {scores}", file=sys.stderr, flush=True)


def choice_lines(work: Path) -> list[str]:
    """The table of what --choose found, if it ran."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("choice-*.json"))]
    if not found:
        return []
    lines = [
        "## Settings",
        "",
        f"Validation NLL of {TASKS[0]}, K = {KS[0]} with fitted tau and T, "
        f"seeds {', '.join(map(str, CHOICE_SEEDS))} (none of the tables').",
        "",
    ]
    lines += ["| method | settings | NLL by seed | mean |", "|---|---|---|---|"]
    for entry in found:
        values = list(entry["nll"].values())
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {entry['name']} | `{entry['settings']}` | {by_seed} | {statistics.mean(values):.3f} |")
    return ["", *lines]


def value(result: dict[str, Any], variant: str, metric: str) -> float | None:
    """One number of one run."""
    k, tempered = VARIANTS[variant]
    (entry,) = (entry for entry in result["results"] if (entry["k"], entry["variant"]) == (k, tempered))
    number: float | None = entry[metric]
    return number


def mean_and_error(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard error of the mean (n - 1 in the variance); None if a value is missing."""
    numbers = list(values)
    present = [number for number in numbers if number is not None]
    if len(present) < len(numbers) or not present:
        return None
    error = statistics.stdev(present) / math.sqrt(len(present)) if len(present) > 1 else math.nan
    return statistics.mean(present), error


def differences(
    runs: Sequence[dict[str, Any]], variant: str, bar: dict[int, dict[str, Any]]
) -> dict[str, tuple[float, float] | None]:
    """Mean and standard error of ``variant`` minus the bar's mean + T, paired by seed."""
    result = {}
    for metric in METRICS:
        pairs = [
            (value(own, variant, metric), value(bar[own["seed"]], "mean + T", metric))
            for own in runs
            if own["seed"] in bar
        ]
        result[metric] = mean_and_error(None if a is None or b is None else a - b for a, b in pairs)
    return result


def task_lines(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The tables of one task."""
    best, by_seed = f"K = {KS[-1]} + T", {run["seed"]: run for run in results.get("map", [])}
    header = ["| adapter | seeds | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 2) + "|"]
    lines = list(header)
    for name, runs in results.items():
        for variant in VARIANTS if _has_samples(runs) else ("mean", "mean + T"):
            numbers = {metric: mean_and_error(value(run, variant, metric) for run in runs) for metric in METRICS}
            lines.append(_row(f"{name}, {variant}", len(runs), numbers, "{:.3f} +- {:.3f}"))
    lines += ["", f"### {best} minus the same adapter's mean + T, paired by seed", "", *header]
    for name, runs in results.items():
        if _has_samples(runs):
            own = {run["seed"]: run for run in runs}
            lines.append(_row(name, len(runs), differences(runs, best, own), "{:+.4f} +- {:.4f}"))
    lines += ["", f"### {best} (without samples: mean + T) minus MAP's mean + T, paired by seed", "", *header]
    for name, runs in results.items():
        paired = [run for run in runs if run["seed"] in by_seed]
        if name != "map" and paired:
            variant = best if _has_samples(runs) else "mean + T"
            lines.append(_row(name, len(paired), differences(paired, variant, by_seed), "{:+.3f} +- {:.3f}"))
    lines += [
        "",
        f"### What differs from MAP's mean + T by {CLEAR:g} standard errors or more",
        "",
        "In brackets the difference in standard errors. Of 14 adapters and ten seeds about one a row does so by chance (t distribution).",
        "",
        *verdict_lines(results),
    ]
    lines += ["", "### Cost and fitted values", ""]
    lines += [
        "| adapter | training time / map | artifact bytes | tau of K = 32 by seed | T of K = 32 by seed |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        ratios = [
            run["train_seconds"] / by_seed[run["seed"]]["train_seconds"] for run in runs if run["seed"] in by_seed
        ]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
        size = statistics.median(run["bytes"] for run in runs)
        taus = ", ".join(f"{_last(run['release']['tau']):.3g}" for run in runs if run["release"]["tau"]) or "-"
        temperatures = ", ".join(f"{_last(run['release']['temperature']):.2f}" for run in runs)
        lines.append(f"| {name} | {ratio} | {size:,.0f} | {taus} | {temperatures} |")
    return lines


def verdict_lines(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """For each metric the adapters that differ clearly from MAP's mean + T, with the difference in standard errors."""
    best, by_seed = f"K = {KS[-1]} + T", {run["seed"]: run for run in results.get("map", [])}
    found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for name, runs in results.items():
        if name == "map" or not any(run["seed"] in by_seed for run in runs):
            continue
        for metric, number in differences(runs, best if _has_samples(runs) else "mean + T", by_seed).items():
            if number is not None and number[1] > 0:
                sign = -1 if metric in LOWER_IS_BETTER else 1
                found[metric][name] = sign * number[0] / number[1]
    lines = ["| metric | better than MAP's mean + T | worse | not told apart |", "|---|---|---|---|"]
    for metric, scores in found.items():
        if not scores:
            continue
        ordered = sorted(scores, key=lambda name: -scores[name])
        cells = [
            ", ".join(f"{name} ({abs(scores[name]):.1f})" for name in ordered if inside(scores[name])) or "-"
            for inside in (lambda z: z >= CLEAR, lambda z: z <= -CLEAR, lambda z: abs(z) < CLEAR)
        ]
        lines.append(f"| {METRICS[metric]} | {' | '.join(cells)} |")
    return lines


def _has_samples(runs: Sequence[dict[str, Any]]) -> bool:
    return bool(runs[0]["release"]["tau"])


def _last(by_k: dict[str, float]) -> float:
    return by_k[max(by_k, key=int)]


def _row(name: str, count: int, numbers: dict[str, tuple[float, float] | None], form: str) -> str:
    cells = " | ".join(form.format(*number) if number else "-" for number in numbers.values())
    return f"| {name} | {count} | {cells} |"


def page(found: dict[str, dict[str, list[dict[str, Any]]]], command: str, choices: Sequence[str]) -> str:
    """The report of all runs, by task and adapter."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("credence", "torch", "transformers", "peft"))
    lines = [
        "# Methods on two classification tasks (stories260K)",
        "",
        f"`{command}`",
        "",
        f"Mean +- standard error over seeds. {datetime.now(UTC).date().isoformat()}; {versions}, Python {platform.python_version()}; "
        f"{platform.machine()} CPU.",
        "",
        f"Rows: {ROWS['train']} training, {ROWS['validation']} validation (tau, T), at most {ROWS['test']} test, {ROWS['ood']} out of "
        "scope. LoRA r = 8, alpha = 16 on q_proj and v_proj, 400 steps of batch 16, linear decay, 20 warm-up steps. "
        "An ensemble answers with all its members. Training time is processor time, without release. "
        "In differences negative is better for NLL, ECE and Brier, positive for the others.",
        "",
        f"Common: `{' '.join(COMMON)}`",
        "",
        *(f"- {name}: `--method {method} {' '.join(settings)}`" for name, (method, settings) in SETTINGS.items()),
        *(f"- {name} (PEFT {version('peft')}): {comparator}" for name, comparator in COMPARATORS.items()),
        *choices,
    ]
    for task, results in found.items():
        lines += ["", f"## {task}", "", *task_lines(results)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and prints the page; --write puts methods.md and methods.json into benchmarks/results/."""
    names = [*SETTINGS, *COMPARATORS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder holding stories260K/")
    parser.add_argument("--data", type=Path, required=True, help="folder holding the tasks")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps finished runs")
    parser.add_argument("--choose", action="store_true", help="compare settings on validation rows, and nothing else")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.choose:
        choose(options.methods, options.models, options.data, options.work)
        print("\n".join(choice_lines(options.work)))
        return
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for task in options.tasks:
            for name in options.methods:
                started = time.perf_counter()
                run(name, task, seed, options.models, options.data, options.work)
                print(
                    f"{task}, {name}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
                )
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in TASKS:
        for name in names:
            paths = {int(path.stem.rpartition("-")[2]): path for path in options.work.glob(f"{task}-{name}-*.json")}
            kept = [paths[seed] for seed in sorted(set(paths) - set(CHOICE_SEEDS))]
            if kept:
                found.setdefault(task, {})[name] = [json.loads(path.read_text()) for path in kept]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    command = f"OMP_NUM_THREADS={threads} python benchmarks/methods.py --models MODELS --data DATA --work WORK --seeds {options.seeds}"
    text = page(found, command, choice_lines(options.work))
    print(text)
    if options.write:
        results = Path(__file__).parent / "results"
        (results / "methods.md").write_text(text)
        choices = [json.loads(path.read_text()) for path in sorted(options.work.glob("choice-*.json"))]
        document = {"command": command, "runs": found, "choices": choices}
        (results / "methods.json").write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
