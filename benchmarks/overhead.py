"""What does our server cost a request that does not ask for uncertainty?

Pairs of identical requests, one to our server and one to stock vLLM, in alternating order; the median of the pairs'
ratios with a bootstrap interval, by wall and by CPU time. The adapter's requests also compare our CPU product of LoRA
factors with vLLM's, which it replaces; the base model's requests see only that the product finds nothing to do. Of the merged
layout the mean is measured, which has no LoRA on either side.
"""

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from credence.adapters import load_artifact
from credence.benchmarks.k_curve import versions
from credence.benchmarks.measure import Measurement, OtherWork, bootstrap_interval, machine, wait_idle
from credence.benchmarks.servers import (
    ADAPTER,
    BASE,
    EngineSettings,
    Target,
    credence_server,
    request_body,
    stock_server,
)
from credence.benchmarks.workload import Workload

WARMUP_PAIRS = 3
MODELS = ((ADAPTER, "mean adapter"), (BASE, "base model"))
MERGED_MODELS = ((BASE, "merged mean"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadSettings:
    """What to measure.

    Attributes:
        pairs: pairs of requests for each of the two models.
        prompt_tokens, new_tokens: tokens of every prompt and of every answer.
        dtype: of weights and activations.
        threads: compute threads of each server.
    """

    pairs: int = 60
    prompt_tokens: int = 32
    new_tokens: int = 32
    dtype: str = "bfloat16"
    threads: int = 1


def run_overhead(workload: Workload, settings: OverheadSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Starts both servers, sends the pairs and returns the result document.

    Raises:
        BenchError: a server answered something else than it was asked for.
        DemoError: a server did not start.
    """
    engine = EngineSettings(
        dtype=settings.dtype,
        max_length=settings.prompt_tokens + settings.new_tokens,
        max_samples=32,
        threads=settings.threads,
    )
    rank = load_artifact(workload.adapter).config.rank
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as scratch, ExitStack() as servers:
        folder = Path(scratch)
        ours = servers.enter_context(credence_server(workload, engine, folder / "credence.log", progress))
        stock = servers.enter_context(stock_server(workload, engine, folder / "stock.log", rank, progress))
        with OtherWork([os.getpid(), *ours.pids, *stock.pids]) as other_work:
            pairs = _pairs(ours, stock, workload, settings, progress)
    return document(pairs, workload, settings, other_work.share)


def document(
    pairs: Mapping[str, Sequence[tuple[Measurement, Measurement]]],
    workload: Workload,
    settings: OverheadSettings,
    other_work: float,
) -> dict[str, Any]:
    """The result as JSON.

    Args:
        pairs: (ours, stock) by name of the model.
        other_work: share of the machine that others used meanwhile, 0..1.
    """
    rows = []
    for model, measured in pairs.items():
        row: dict[str, Any] = {"requests": model, "pairs": len(measured)}
        for what in ("wall_ms", "cpu_ms"):
            ours, stock = ([getattr(pair[side], what) for pair in measured] for side in (0, 1))
            ratios = [ours_ms / stock_ms for ours_ms, stock_ms in zip(ours, stock, strict=True)]
            low, high = bootstrap_interval(ratios)
            row[what] = {
                "ours": round(statistics.median(ours), 1),
                "stock": round(statistics.median(stock), 1),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_low": round(low, 4),
                "ratio_high": round(high, 4),
                # In the order they were taken; of an odd pair ours came second.
                "pairs": [[round(a, 1), round(b, 1)] for a, b in zip(ours, stock, strict=True)],
            }
        rows.append(row)
    return {
        "model": {
            "name": workload.name,
            "parameters": workload.num_parameters,
            "dtype": settings.dtype,
            "merged": workload.merged is not None,
        },
        "tokens": {"prompt": settings.prompt_tokens, "new": settings.new_tokens},
        "machine": machine(),
        "other_work": round(other_work, 3),
        "threads": settings.threads,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "rows": rows,
    }


def markdown(result: Mapping[str, Any], command: str) -> str:
    """A page with the table of a result document.

    Args:
        command: the command line that made it.
    """
    model, tokens = result["model"], result["tokens"]
    stock = "the merged model" if model["merged"] else "`--enable-lora --lora-modules`"
    lines = [
        f"# Without `uncertainty`: our server against stock vLLM, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}",
        "",
        f"`{command}`",
        "",
        f"{result['date']}. {model['name']}; {tokens['prompt']} + {tokens['new']} tokens; {result['machine']}, "
        f"{result['threads']} compute threads; {', '.join(f'{name} {number}' for name, number in result['versions'].items())}.",
        "Pairs of identical greedy requests in alternating order; the median of the pairs' ratios (ours / stock) with a 95 % bootstrap "
        f"interval. Stock: {stock}, no plugins, the same engine flags. "
        f"Other work took {result['other_work']:.0%} of the machine's processors meanwhile.",
        "",
        "| requests | pairs | ours ms | stock ms | ratio | ours CPU ms | stock CPU ms | CPU ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = []
        for what in ("wall_ms", "cpu_ms"):
            part = row[what]
            ratio = f"{part['ratio']:.3f} [{part['ratio_low']:.3f}, {part['ratio_high']:.3f}]"
            cells += [f"{part['ours']:.0f}", f"{part['stock']:.0f}", ratio]
        lines.append(f"| {row['requests']} | {row['pairs']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pairs(
    ours: Target, stock: Target, workload: Workload, settings: OverheadSettings, progress: Callable[[str], None]
) -> dict[str, list[tuple[Measurement, Measurement]]]:
    numbers = itertools.count(1)
    models = MODELS if workload.merged is None else MERGED_MODELS
    pairs: dict[str, list[tuple[Measurement, Measurement]]] = {title: [] for _, title in models}
    for number in range(-WARMUP_PAIRS, settings.pairs):
        if number % 10 == 0:
            progress(f"pair {number + 1} of {settings.pairs}")
        for model, title in models:
            prompt = workload.prompt(settings.prompt_tokens, next(numbers))
            body = request_body(new_tokens=settings.new_tokens, model=model)
            sides = {}
            for server in (stock, ours) if number % 2 else (ours, stock):
                wait_idle(ours.pids + stock.pids)
                sides[server.url] = server.measure([prompt], body)
            own, theirs = sides[ours.url], sides[stock.url]
            if number >= 0:
                pairs[title].append((own, theirs))
    return pairs
