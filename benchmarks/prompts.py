"""What do samples cost on long prompts, and what does a shared beginning save?

Every sample has its own keys and values, so K samples compute a new prompt K times. vLLM's prefix cache keeps them
for each sample, so a system prompt is computed once for each sample and then costs nothing.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from credence.benchmarks.k_curve import versions
from credence.benchmarks.measure import Measurement, OtherWork, interleave, machine, wait_idle
from credence.benchmarks.servers import EngineSettings, Target, credence_server, request_body
from credence.benchmarks.workload import Workload

Key = tuple[int, int, int]
"""K, tokens of the prompt, tokens it shares with the other prompts of its row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """What to measure.

    Attributes:
        sample_counts: K, 0 is the mean adapter.
        lengths: tokens of the prompts.
        shared: tokens that prompts of the longest length share in a row of their own; 0 for no such row.
        new_tokens: tokens of every answer.
        rounds: interleaved rounds.
        dtype: of weights and activations.
        threads: compute threads of the server.
    """

    sample_counts: tuple[int, ...] = (0, 1, 8)
    lengths: tuple[int, ...] = (32, 128, 512)
    shared: int = 480
    new_tokens: int = 32
    rounds: int = 5
    dtype: str = "bfloat16"
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.sample_counts or min(self.sample_counts) < 0:
            raise ValueError(f"the sample counts are {list(self.sample_counts)}; give numbers of 0 or more")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"the lengths are {list(self.lengths)}; give numbers of 1 or more")
        if not 0 <= self.shared < max(self.lengths):
            raise ValueError(f"{self.shared} shared tokens; give fewer than the longest prompt's {max(self.lengths)}")


def run_prompts(workload: Workload, settings: PromptSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Starts our server, runs all rows in interleaved rounds and returns the result document.

    Raises:
        BenchError: the server answered something else than it was asked for.
        DemoError: it did not start.
    """
    engine = EngineSettings(
        dtype=settings.dtype,
        max_length=max(settings.lengths) + settings.new_tokens,
        max_samples=max(1, *settings.sample_counts),
        threads=settings.threads,
    )
    with (
        tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch,
        credence_server(workload, engine, Path(scratch) / "credence.log", progress) as ours,
    ):
        rows = _rows(ours, workload, settings)
        with OtherWork([os.getpid(), *ours.pids]) as other_work:
            measured = interleave(
                {str(key): row for key, row in rows.items()},
                rounds=settings.rounds,
                between=lambda: wait_idle(ours.pids),
                progress=progress,
            )
    return document({key: measured[str(key)] for key in rows}, workload, settings, other_work.share)


def document(
    results: Mapping[Key, Sequence[Measurement]], workload: Workload, settings: PromptSettings, other_work: float
) -> dict[str, Any]:
    """The result as JSON: milliseconds, medians over the rounds.

    Args:
        results: measurements by row.
        other_work: share of the machine that others used meanwhile, 0..1.
    """
    rows = [
        {
            "k": k,
            "prompt": length,
            "shared": shared,
            "p50_ms": round(statistics.median(m.wall_ms for m in measured), 1),
            "cpu_ms": round(statistics.median(m.cpu_ms for m in measured), 1),
        }
        for (k, length, shared), measured in results.items()
    ]
    return {
        "model": {"name": workload.name, "parameters": workload.num_parameters, "dtype": settings.dtype},
        "tokens": {"new": settings.new_tokens},
        "machine": machine(),
        "other_work": round(other_work, 3),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "rows": rows,
    }


def markdown(result: Mapping[str, Any], command: str) -> str:
    """A page with the table of a result document.

    Args:
        command: the command line that made it.
    """
    model = result["model"]
    lines = [
        f"# Samples and long prompts: {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}",
        "",
        f"`{command}`",
        "",
        f"{result['date']}. {model['name']}; {result['tokens']['new']} new tokens; {result['machine']}, "
        f"{result['threads']} compute threads; {', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
        f"Medians of {result['rounds']} interleaved rounds. Shared: tokens at the beginning of the prompt that earlier ones had,",
        "too; the prefix cache holds them for every sample, in whole blocks of 128. "
        f"Other work took {result['other_work']:.0%} of the machine's processors meanwhile.",
        "",
        "| prompt tokens | shared | K | p50 ms | CPU ms | CPU against the smallest K |",
        "|---|---|---|---|---|---|",
    ]
    ordered = sorted(result["rows"], key=lambda row: (row["prompt"], row["shared"], row["k"]))
    first: dict[tuple[int, int], float] = {}
    for row in ordered:
        least = first.setdefault((row["prompt"], row["shared"]), row["cpu_ms"])
        lines.append(
            f"| {row['prompt']} | {row['shared']} | {row['k']} | {row['p50_ms']:.0f} | {row['cpu_ms']:.0f} | {row['cpu_ms'] / least:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _rows(target: Target, workload: Workload, settings: PromptSettings) -> dict[Key, Callable[[], Measurement]]:
    numbers = itertools.count(1)
    longest = max(settings.lengths)
    cases = [(length, 0) for length in settings.lengths]
    if settings.shared:
        cases.append((longest, settings.shared))
    beginning = workload.prompt(settings.shared, 0)

    def row(k: int, length: int, shared: int) -> Callable[[], Measurement]:
        body = request_body(new_tokens=settings.new_tokens, num_samples=k)
        return lambda: target.measure([beginning[:shared] + workload.prompt(length - shared, next(numbers))], body)

    return {(k, length, shared): row(k, length, shared) for length, shared in cases for k in settings.sample_counts}
