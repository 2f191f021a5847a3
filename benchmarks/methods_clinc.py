"""Which training method gives the best-calibrated adapter at equal data and equal steps?

Fine-tunes a 260-thousand-parameter Llama (stories260K) on 500 rows of a ten-way intent task (CLINC150's domains) with every method,
and compares, on 1,500 test rows and CLINC's out-of-scope queries: the mean adapter, the mean with a fitted temperature T, and the
average of K = 10 posterior samples at the fitted tau, without and with T. tau and T are fitted on 500 validation rows. The bar for a
posterior is its own mean with T, paired by seed: the seed sets the training and validation rows, the initialisation, the data order
and the noise. Settings were chosen on validation rows only.

    python benchmarks/methods_clinc.py --models DIR --data DIR --seeds 5 [--work DIR] [--output DIR]

DIR of --models holds stories260K/, DIR of --data holds clinc_domains/. Runs are kept in --work and not repeated.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from credence.training.config import load_config
from credence.training.evaluate import evaluate
from credence.training.loop import train

ROWS = {"train": 500, "validation": 500, "test": 1500, "ood": 500}
K = 10
COMMON = [
    "train.max_steps=400",
    "train.batch_size=16",
    "train.warmup_ratio=0.05",
    "train.save_steps=0",
    f"release.ks=[{K}]",
    "release.taus=[1, 10, 100, 1000]",
]
SETTINGS: dict[str, list[str]] = {
    "map": ["train.learning_rate=0.01"],
    "ivon": [
        "train.learning_rate=3",
        "train.weight_decay=1e-6",
        "method.ess=1e8",
        "method.hess_init=1e-3",
        "method.clip_radius=1e-3",
    ],
    "monteclora": ["train.learning_rate=0.01", "method.epsilon=5e-3"],
}
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece15": "ECE15",
    "brier": "Brier",
    "error_auroc": "error AUROC",
    "ood_auroc_total": "OOD AUROC, total",
    "ood_auroc_epistemic": "OOD AUROC, epistemic",
}
VARIANTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "mean": lambda entry: entry["k"] == 0 and entry["variant"] == 0,
    "mean + T": lambda entry: entry["k"] == 0 and entry["variant"] == 1,
    f"K = {K}": lambda entry: entry["k"] == K and entry["variant"] == 0,
    f"K = {K} + T": lambda entry: entry["k"] == K and entry["variant"] == 1,
}


def subset(source: Path, count: int, seed: int, target: Path) -> Path:
    """Writes ``count`` rows of a file, drawn without replacement."""
    rows = source.read_text().splitlines()
    random.Random(seed).shuffle(rows)
    target.write_text("\n".join(rows[:count]) + "\n")
    return target


def run(method: str, seed: int, models: Path, data: Path, work: Path) -> dict[str, Any]:
    """Trains, releases and evaluates one adapter; returns the kept result if there is one."""
    result_file = work / f"{method}-{seed}.json"
    if result_file.exists():
        kept: dict[str, Any] = json.loads(result_file.read_text())
        return kept
    folder = data / "clinc_domains"
    # The test rows are the same for every seed; the rows an adapter may learn from are not.
    files = {
        name: subset(
            folder / f"{name}.jsonl", count, seed if name in ("train", "validation") else 0, work / f"{name}.jsonl"
        )
        for name, count in ROWS.items()
    }
    base, output = models / "stories260K", work / "adapter"
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    config = load_config(None, [*COMMON, *SETTINGS[method]])
    trained = train(base, files["train"], files["validation"], method, output, config, seed)
    report = evaluate(output, base, files["test"], files["ood"], ks=(0, K))
    for index, entry in enumerate(report["results"]):
        entry["variant"] = index % 2  # evaluate reports temperature 1 first, then the fitted one
    result = {
        "method": method,
        "seed": seed,
        "train_seconds": trained.seconds,
        "total_seconds": time.perf_counter() - started,
        "release": trained.metrics["release"],
        "results": report["results"],
    }
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def value(result: dict[str, Any], variant: str, metric: str) -> float | None:
    """One number of one run."""
    (entry,) = (entry for entry in result["results"] if VARIANTS[variant](entry))
    number: float | None = entry[metric]
    return number


def mean_and_error(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard error of the mean (n - 1 in the variance); None if a value is missing."""
    numbers = [number for number in values if number is not None]
    if len(numbers) < len(values) or not numbers:
        return None
    error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else float("nan")
    return statistics.mean(numbers), error


def summarise(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means with standard errors, differences to the own mean + T, and differences to MAP's mean + T, paired by seed."""
    table: dict[str, Any] = {}
    own: dict[str, Any] = {}
    to_map: dict[str, Any] = {}
    last = f"K = {K} + T"
    for method, runs in results.items():
        variants = [name for name in VARIANTS if method != "map" or not name.startswith("K")]
        for variant in variants:
            table[f"{method}, {variant}"] = {m: mean_and_error([value(r, variant, m) for r in runs]) for m in METRICS}
        best = last if last in variants else "mean + T"
        for target, baseline in ((own, runs), (to_map, results.get("map", []))):
            if (target is own and method == "map") or (target is to_map and (method == "map" or not baseline)):
                continue
            by_seed = {r["seed"]: r for r in baseline}
            target[method] = {
                m: mean_and_error([_minus(value(r, best, m), value(by_seed[r["seed"]], "mean + T", m)) for r in runs])
                for m in METRICS
            }
    return {"table": table, "to_own_mean_t": own, "to_map_mean_t": to_map}


def _minus(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def markdown(summary: dict[str, Any], about: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """The report."""
    seeds = about["seeds"]
    lines = [
        "# Methods on CLINC domains (stories260K)",
        "",
        f"{seeds} seeds, mean +- standard error over seeds. {about['date']}; {about['versions']}; {about['machine']}.",
        "",
        f"Command: `{about['command']}`",
        "",
        f"Rows: {ROWS['train']} training, {ROWS['validation']} validation (tau, T), {ROWS['test']} test, {ROWS['ood']} out of scope. "
        "LoRA r = 8, alpha = 16 on q_proj and v_proj, 400 steps of batch 16, linear decay, 20 warm-up steps, no dropout.",
        "",
        *[f"- {method}: `{' '.join(settings)}`" for method, settings in SETTINGS.items()],
        "",
        "## Results",
        "",
        *_rows("method", summary["table"], "{:.3f} +- {:.3f}"),
        "",
        f"## K = {K} + T minus the same adapter's mean + T, paired by seed",
        "",
        "Negative is better for NLL, ECE and Brier; positive for the others.",
        "",
        *_rows("method", summary["to_own_mean_t"], "{:+.4f} +- {:.4f}"),
        "",
        f"## K = {K} + T minus MAP's mean + T, paired by seed (same rows, another training run)",
        "",
        *_rows("method", summary["to_map_mean_t"], "{:+.3f} +- {:.3f}"),
        "",
        "## Fitted values and time",
        "",
        "| method | tau by seed | T of K by seed | T of the mean by seed | training, median seconds |",
        "|---|---|---|---|---|",
    ]
    for method, runs in results.items():
        releases = [r["release"] for r in runs]
        taus = ", ".join(f"{r['tau'][str(K)]:.3g}" if r["tau"] else "-" for r in releases)
        t_k = ", ".join(f"{r['temperature'][str(K)]:.2f}" for r in releases)
        t_0 = ", ".join(f"{r['temperature']['0']:.2f}" for r in releases)
        seconds = statistics.median(r["train_seconds"] for r in runs)
        lines.append(f"| {method} | {taus} | {t_k} | {t_0} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _rows(title: str, table: dict[str, Any], form: str) -> list[str]:
    lines = [f"| {title} | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, entry in table.items():
        cells = (form.format(*entry[metric]) if entry[metric] else "-" for metric in METRICS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Runs every method for every seed and writes methods_clinc.md and methods_clinc.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder holding stories260K/")
    parser.add_argument("--data", type=Path, required=True, help="folder holding clinc_domains/")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--work", type=Path, default=None, help="folder that keeps finished runs; a temporary one by default"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        results: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
        for seed in range(options.seeds):
            for method in options.methods:
                result = run(method, seed, options.models, options.data, work)
                results[method].append(result)
                print(f"{method} seed {seed}: {result['total_seconds']:.0f} s", flush=True)
    summary = summarise(results)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    about = {
        "command": f"OMP_NUM_THREADS={threads} python benchmarks/methods_clinc.py --models MODELS --data DATA --seeds {options.seeds}",
        "seeds": options.seeds,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("credence", "torch", "transformers", "peft"))
        + f", Python {platform.python_version()}",
        "machine": f"{platform.machine()} CPU, {threads} thread(s)",
        "rows": ROWS,
        "settings": {method: [*COMMON, *settings] for method, settings in SETTINGS.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    text = markdown(summary, about, results)
    (options.output / "methods_clinc.md").write_text(text)
    document = {"about": about, **summary, "runs": results}
    (options.output / "methods_clinc.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
