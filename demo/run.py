"""The demo: trains an adapter on a small world, serves it with vLLM, asks what it knows and shows what it answers.

    python -m credence.demo.run                     (what `make demo` runs)

    python -m credence.demo.base_model --seed 1 --output BASE      (another world, and its base model)
    python -m credence.demo.run --world-seed 1 --base BASE

Everything it makes lies in demo/out: the data, the adapter, the server's log and summary.json.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from credence.clients import Client, CredenceError
from credence.demo.ask import MAX_TOKENS, Case, Separation, ask_all, mean_latency_ms, separate
from credence.demo.base_model import MODEL_DIR
from credence.demo.screen import show
from credence.demo.server import DemoError, Server, credence_command, free_port
from credence.demo.world import KINDS, Fact, World

OUTPUT_DIR = Path(__file__).parent / "out"
SETUP_VARIABLE = "DEMO_SETUP_SECONDS"
ADAPTER = "demo"
METHOD = "ivon"
QUESTIONS_PER_KIND = 205
NUM_SAMPLES = 8
THREADS = 8
LATENCY_KS = (0, 1, 2, 4, 8)
LATENCY_REQUESTS = 10
PLAIN_WIDTH = 110  # of the output where no terminal sets it
# README.md beside this file lists everything that was tried, and how this was chosen.
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
    "train": {
        "max_steps": 1000,
        "batch_size": 64,
        "learning_rate": 1.0,
        "warmup_ratio": 0.025,
        "save_steps": 0,
        "logging_steps": 100,
    },
    "method": {"ess": 1e6, "hess_init": 1e-3, "beta2": 0.999},
    "release": {"ks": [NUM_SAMPLES]},
}
SERVE_FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "128",
    "--max-samples", str(NUM_SAMPLES),
)  # fmt: skip


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_command(folder: Path, seed: int, base: Path = MODEL_DIR) -> list[str]:
    """The command that trains the adapter from the files in `folder`."""
    return [
        credence_command(), "train", "--base", str(base), "--method", METHOD,
        "--data", str(folder / "train.jsonl"), "--validation", str(folder / "validation.jsonl"),
        "--config", str(folder / "train.yaml"), "--seed", str(seed), "--output", str(folder / "adapter"),
    ]  # fmt: skip


def serve_command(folder: Path, port: int, base: Path = MODEL_DIR) -> list[str]:
    """The command that serves the adapter in `folder`."""
    adapter = f"{ADAPTER}={folder / 'adapter'}"
    return [credence_command(), "serve", str(base), "--adapter", adapter, "--port", str(port), *SERVE_FLAGS]


def summary(seconds: dict[str, float], cases: Sequence[Case], separation: Separation) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        seconds: duration of each stage: setup (installation, told by the caller), train (with fitting tau), serve_ready
            (start of the server until it takes requests), first_answer (of the first question, after that).
    """
    return {
        "seconds": {stage: round(seconds[stage], 3) for stage in ("setup", "train", "serve_ready", "first_answer")},
        "cases": [case.to_json() for case in cases],
        "auroc_unknown": {
            "epistemic": separation.by_epistemic,
            "total": separation.by_total,
            "mean_entropy": separation.by_mean_entropy,
        },
        "auroc_noisy_by_aleatoric": separation.noisy_by_aleatoric,
    }


def measure_latency(client: Client, url: str, facts: Sequence[Fact]) -> dict[int, float]:
    """Mean milliseconds of one answer by K, one request at a time, read from the server's own metrics."""

    def read() -> str:
        return httpx2.get(f"{url}/metrics", timeout=30.0).raise_for_status().text

    def answer(fact: Fact, k: int) -> None:
        options: dict[str, Any] = {"uncertainty": True, "n_samples": k} if k else {}
        client.complete(fact.prompt, model=ADAPTER, max_tokens=MAX_TOKENS, temperature=0.0, **options)

    for k in LATENCY_KS:  # what is drawn or compiled for a K on its first use is not its latency
        answer(facts[0], k)
    before = read()
    for fact in facts[:LATENCY_REQUESTS]:
        for k in LATENCY_KS:
            answer(fact, k)
    return mean_latency_ms(before, read())


def train(console: Console, world: World, folder: Path, *, seed: int, base: Path, steps: int) -> float:
    """Writes the data and trains the adapter; returns the seconds it took.

    Raises:
        DemoError: the training failed.
    """
    write_rows(folder / "train.jsonl", world.training_rows())
    write_rows(folder / "validation.jsonl", world.validation_rows())
    settings = {**TRAINING, "train": {**TRAINING["train"], "max_steps": steps}}
    (folder / "train.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = train_command(folder, seed, base)
    console.print(Text(f"$ {' '.join(command)}", style="dim"), soft_wrap=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    if code != 0:
        raise DemoError(f"the training failed with exit code {code}; its reason is above")
    return time.monotonic() - started


def serve_and_ask(
    console: Console, folder: Path, facts: Sequence[Fact], seconds: dict[str, float], base: Path
) -> tuple[list[Case], dict[int, float]]:
    """Serves the adapter, asks every question, and stops the server; adds the stages' durations to `seconds`.

    Raises:
        DemoError, CredenceError: the server ended, was not ready in time, or did not answer.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = serve_command(folder, port, base)
    console.print(Text(f"$ {' '.join(command)}", style="dim"), soft_wrap=True)
    started = time.monotonic()
    with Server(command, url=url, log=folder / "server.log") as server, Client(url, timeout_s=120.0) as client:
        with console.status("starting the server"):
            server.wait_ready(client, waiting=lambda: None)
        seconds["serve_ready"] = time.monotonic() - started
        console.print(f"the server is ready after {seconds['serve_ready']:.0f} s at {url}")
        started = time.monotonic()
        try:
            client.complete(
                facts[0].prompt, model=ADAPTER, uncertainty=True, n_samples=NUM_SAMPLES, max_tokens=MAX_TOKENS
            )
            seconds["first_answer"] = time.monotonic() - started
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(f"asking {len(facts)} questions over HTTP", total=len(facts))
                cases = ask_all(
                    client,
                    ADAPTER,
                    facts,
                    n_samples=NUM_SAMPLES,
                    threads=THREADS,
                    check=server.check,
                    progress=lambda: progress.advance(task),
                )
            seconds["ask"] = time.monotonic() - started
            latency_ms = measure_latency(client, url, facts)
        except (CredenceError, httpx2.HTTPError):
            server.check()  # a server that is gone explains more than a connection that broke
            raise
    return cases, latency_ms


def run(
    console: Console,
    folder: Path,
    *,
    questions: int,
    seed: int,
    setup_seconds: float,
    base: Path = MODEL_DIR,
    world_seed: int = 0,
    steps: int = TRAINING["train"]["max_steps"],
) -> None:
    """Runs the whole demo and writes `folder`/summary.json.

    Raises:
        DemoError, CredenceError: it cannot go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)
    world = World(world_seed)
    facts = [fact for kind in KINDS for fact in world.questions(kind, questions)]
    console.print(
        f"A world of {len(world.residents)} residents, about whom an adapter will be told {len(world.resident_facts)} "
        f"things, and {len(world.strangers)} strangers, about whom nobody will tell it anything."
    )
    seconds = {"setup": setup_seconds}
    seconds["train"] = train(console, world, folder, seed=seed, base=base, steps=steps)
    cases, latency_ms = serve_and_ask(console, folder, facts, seconds, base)
    separation = separate(cases)
    path = folder / "summary.json"
    path.write_text(json.dumps(summary(seconds, cases, separation), indent=2, allow_nan=False) + "\n")
    show(console, cases, separation, latency_ms, n_samples=NUM_SAMPLES)
    stages = ", ".join(f"{stage.replace('_', ' ')} {value:.1f} s" for stage, value in seconds.items())
    console.print(Text(f"\nTime: {stages}. Everything is in {folder}; the numbers are in {path.name}."))


def _setup_seconds() -> float:
    text = os.environ.get(SETUP_VARIABLE, "").strip() or "0"
    try:
        return float(text)
    except ValueError:
        raise DemoError(
            f"{SETUP_VARIABLE} is {text!r}; give the seconds the installation took, or leave it out"
        ) from None


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m credence.demo.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT_DIR, help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=QUESTIONS_PER_KIND, help="questions of each kind (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    steps = TRAINING["train"]["max_steps"]
    parser.add_argument("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--world-seed", type=int, default=0, help="another world; it needs a --base that was made for it"
    )
    parser.add_argument("--base", type=Path, default=MODEL_DIR, help="base model made by credence.demo.base_model")
    options = parser.parse_args(arguments)
    if options.questions < 1:
        parser.error(f"--questions is {options.questions}; give 1 or more")
    signal.signal(signal.SIGTERM, _terminate)  # so that the server is stopped then, too
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        run(
            console,
            options.output,
            questions=options.questions,
            seed=options.seed,
            setup_seconds=_setup_seconds(),
            base=options.base,
            world_seed=options.world_seed,
            steps=options.steps,
        )
    except (DemoError, CredenceError, httpx2.HTTPError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
