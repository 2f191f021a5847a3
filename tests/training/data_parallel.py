"""One process of several that run training jobs together: ``python -m tests.training.data_parallel JOBS.json RANK COUNT``.

Every job opens connections of its own at its own port, so that one that fails leaves the next one alone. What a process saw of a job goes
to ``<output>.rank<R>.pt``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from credence.training.config import load_config
from credence.training.loop import train


class Seen(TrainerCallback):  # type: ignore[misc]
    """Keeps random numbers of the first step, and everything trained at the end."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "random" not in self.record:
            with torch.random.fork_rng():
                self.record["random"] = torch.rand(4)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record["parameters"] = {
            n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad
        }
        self.record["optimizer"] = kwargs["optimizer"].state_dict()


class Fault(TrainerCallback):  # type: ignore[misc]
    """Goes wrong in one process, or in all: ``raise:STEP:RANK``, or ``change:STEP:RANK`` of a parameter."""

    def __init__(self, text: str, rank: int) -> None:
        what, step, where = text.split(":")
        self.what, self.step, self.is_here = what, int(step), where in ("all", str(rank))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_here or state.global_step != self.step:
            return
        if self.what == "raise":
            raise RuntimeError("out of memory here")
        next(p for p in kwargs["model"].parameters() if p.requires_grad).data.add_(1e-3)


def run(job: dict[str, Any], rank: int) -> None:
    """Runs one job and writes what this process saw."""
    torch.manual_seed(rank)  # processes start in different states
    seen = Seen()
    callbacks = [seen, *([Fault(job["fault"], rank)] if job.get("fault") else [])]
    try:
        result = train(
            job["base"],
            job["data"],
            job.get("validation"),
            job["method"],
            job["output"],
            load_config(None, job["options"]),
            5,
            job.get("resume", False),
            callbacks=callbacks,
        )
        seen.record["digest"], seen.record["metrics"] = result.digest, result.metrics
    except Exception as error:
        seen.record["error"] = f"{type(error).__name__}: {error}"
    torch.save(seen.record, f"{job['output']}.{job['name']}.rank{rank}.pt")


def main(jobs: Path, rank: int, count: int) -> None:
    """Runs all jobs."""
    torch.set_num_threads(1)
    for job in json.loads(jobs.read_text()):
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]),
        )
        print(f"job {job['name']}", file=sys.stderr, flush=True)
        run(job, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
