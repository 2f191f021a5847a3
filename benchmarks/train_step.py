"""What does a training step of each method cost, against LoRA with AdamW?

    python benchmarks/train_step.py [--rounds 15] [--batch-size 4] [--length 128] [--targets q_proj,v_proj] [--write]

A random Llama of about 60 million parameters, float32, rank 8. Every method trains its own adapter on a copy of the same model; in each
round every method takes one optimiser step on the same rows (noise, forward and backward pass, regulariser, optimiser), in rotated
order. The ratio is the median over the rounds of method / map, with a 95 % bootstrap interval, in wall and CPU time of this process.
Peak memory is that of a process of its own which takes three steps of one method.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from credence.adapters import NoiseSource
from credence.benchmarks.measure import bootstrap_interval, interleave, machine
from credence.training.config import LoraSettings
from credence.training.methods import Plan, method_class, method_settings
from credence.training.modeling import add_lora, initialise
from credence.training.trainer import target_nll

METHODS: dict[str, dict[str, Any]] = {
    "map": {},
    "ivon": {},
    "monteclora": {},
    "melora": {},
    "blob": {},
    "swag": {"interval": 1, "start": 0.0},
}
GOALS = {"ivon": 1.05, "monteclora": 1.15, "melora": 1.15, "blob": 1.25}
VOCABULARY, HIDDEN, LAYERS = 4096, 640, 12
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one step."""

    wall_ms: float
    cpu_ms: float


def base_model() -> LlamaForCausalLM:
    """The random model, about 60 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=10 * HIDDEN // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 128,
        head_dim=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def stepper(name: str, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """A function that takes one optimiser step, and the number of trainable parameters."""
    model, sites = add_lora(base_model(), LoraSettings(r=8, alpha=16, target_modules=tuple(options.targets.split(","))))
    initialise(sites, 0)
    method = method_class(name)(method_settings(name, METHODS[name]), sites)
    method.begin_training(Plan(num_steps=10_000, steps_per_epoch=100, num_rows=400))
    defaults = method.defaults
    optimizer = method.optimizer(learning_rate=defaults.learning_rate, weight_decay=defaults.weight_decay)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    model.train()
    steps = 0

    def step() -> None:
        nonlocal steps
        tokens = torch.randint(3, VOCABULARY, (options.batch_size, options.length), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        method.begin_step(NoiseSource(0, steps, "train"))
        nll, count = target_nll(model, inputs)
        loss = (nll / count).sum()
        regulariser = method.regulariser()
        if regulariser is not None:
            loss = loss + regulariser
        loss.backward()
        if defaults.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(trainable, defaults.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        method.end_step(steps)

    return step, sum(parameter.numel() for parameter in trainable)


def measured(step: Callable[[], None]) -> Cost:
    """One step's cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Cost(wall_ms=1000 * (time.perf_counter() - wall), cpu_ms=1000 * (time.process_time() - cpu))


def peak_mib(name: str) -> float:
    """Largest resident memory of a process that takes three steps, MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])  # noqa: S603


def main() -> None:
    """Measures and prints; --write puts train_step.md and train_step.json into benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        step, _ = stepper(options.only, options)
        for _ in range(3):
            step()
        # Not getrusage: a child's peak there begins at the size of the process it was forked from.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)
        return
    made = {name: stepper(name, options) for name in METHODS}
    rows = {name: (lambda step=step: measured(step)) for name, (step, _) in made.items()}
    costs = interleave(rows, rounds=options.rounds, warmup=2, progress=lambda line: print(line, file=sys.stderr))
    result = document(costs, {name: count for name, (_, count) in made.items()}, options)
    print(markdown(result))
    print(json.dumps(result))
    if options.write:
        suffix = "" if options.targets == "q_proj,v_proj" else "_all"
        (RESULTS / f"train_step{suffix}.md").write_text(markdown(result))
        (RESULTS / f"train_step{suffix}.json").write_text(json.dumps(result, indent=1) + "\n")


def document(costs: dict[str, list[Cost]], parameters: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON."""
    rows = []
    for name, own in costs.items():
        row: dict[str, Any] = {"method": name, "parameters": parameters[name], "peak_mib": round(peak_mib(name))}
        for what in ("wall_ms", "cpu_ms"):
            ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(own, costs["map"], strict=True)]
            low, high = bootstrap_interval(ratios)
            row[what] = round(statistics.median(getattr(cost, what) for cost in own), 1)
            row[f"{what}_ratio"] = [round(number, 4) for number in (statistics.median(ratios), low, high)]
        rows.append(row)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    command = f"OMP_NUM_THREADS={threads} python benchmarks/train_step.py {' '.join(sys.argv[1:])}".strip()
    return {
        "command": command,
        "model_parameters": sum(parameter.numel() for parameter in base_model().parameters()),
        "batch_size": options.batch_size,
        "length": options.length,
        "targets": options.targets,
        "rounds": options.rounds,
        "machine": f"{machine()}, {torch.get_num_threads()} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("credence", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# A training step of each method against LoRA with AdamW",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}. Random Llama of {result['model_parameters'] / 1e6:.1f} M parameters, float32, rank 8 on {result['targets']}; "
        f"{result['batch_size']} rows of {result['length']} tokens; {result['machine']}; "
        f"{versions}. {result['rounds']} interleaved rounds; median of the rounds' ratios to `map` with a 95 % bootstrap interval. Swag "
        "collects an iterate after every step. Peak memory: the whole process.",
        "",
        "| method | trainable | wall ms | ratio | CPU ms | CPU ratio | goal | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        wall, cpu = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[f"{what}_ratio"]) for what in ("wall_ms", "cpu_ms"))
        goal = GOALS.get(row["method"])
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {row['wall_ms']:.0f} | {wall} | {row['cpu_ms']:.0f} | {cpu} | "
            f"{goal or '-'} | {row['peak_mib']:,} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
