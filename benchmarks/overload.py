"""Five times as many clients as the server admits: are the others refused properly, and do the admitted keep their latency?

    python benchmarks/overload.py [--rounds 6] [--seconds 8] [--write]

Clients ask in closed loops. Rounds alternate between as many clients as the limit admits and five times as many, whose refused requests
wait as long as Retry-After says and come again. Two limits are tried: ``--max-inflight-rows`` with ensembles, and vLLM's own
``--max-num-queued-reqs`` with plain requests. Any status but 200, 429 and 503, a refusal without Retry-After, or a server that is not empty
afterwards ends the program with an error.
"""

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from credence.benchmarks.measure import (
    BenchError,
    OtherWork,
    bootstrap_interval,
    interleave,
    machine,
    quantile,
    resident_mib,
)
from credence.benchmarks.servers import EngineSettings, Target, credence_server, request_body
from credence.benchmarks.workload import ModelShape, Workload, random_workload

K, TOKENS, PROMPT_TOKENS = 4, 32, 8
INFLIGHT_ROWS = 32
QUEUED_REQUESTS = 2 * INFLIGHT_ROWS
"""What `credence serve` gives vLLM as ``--max-num-queued-reqs``."""
OVERLOAD = 5
MOST_WAIT_S = 2.0
EMPTY_TIMEOUT_S = 10.0
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MEMORY = "memory of the server's processes, MiB"
RESULTS = Path(__file__).parent / "results"


@dataclass(slots=True)
class Load:
    """What the clients of one round saw.

    Attributes:
        clients: how many asked.
        admitted_ms: latency of each answer with status 200.
        refused_ms: latency of each refusal.
        statuses: answers by status.
        served: clients that were admitted at least once.
        server_ms: mean time of admitted requests inside the server, from its own metrics.
        client_cpu: processor time of this program, as a share of one core.
        others: share of the machine that neither this program nor the server used.
    """

    clients: int
    admitted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    served: int = 0
    server_ms: float = 0.0
    client_cpu: float = 0.0
    others: float = 0.0

    def note(self, status: int, retry_after: str | None, elapsed_ms: float, text: str) -> float:
        """Notes an answer; returns how long its client waits before it asks again, in seconds.

        Raises:
            BenchError: no answer of a server that is merely busy.
        """
        self.statuses[status] += 1
        if status == httpx2.codes.OK:
            self.admitted_ms.append(elapsed_ms)
            return 0.0
        if status not in (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE):
            raise BenchError(f"only 200, 429 and 503 are allowed under overload, got {status}: {text[:300]}")
        if retry_after is None or not retry_after.isdigit():
            raise BenchError(f"a {status} has Retry-After {retry_after!r}, it must say seconds: {text[:300]}")
        self.refused_ms.append(elapsed_ms)
        return min(float(retry_after), MOST_WAIT_S)


def ratio_lines(normal: Sequence[Load], overloaded: Sequence[Load]) -> list[str]:
    """Latencies of all rounds together, and the median over rounds of overloaded / normal with its 95 % interval."""
    lines = ["| admitted | without overload, ms | with, ms | with / without, median of rounds |", "|---|---|---|---|"]
    for name, q in QUANTILES.items():
        pooled = [
            quantile([value for load in loads for value in load.admitted_ms], q) for loads in (normal, overloaded)
        ]
        pairs = zip(normal, overloaded, strict=True)
        ratios = [quantile(after.admitted_ms, q) / quantile(before.admitted_ms, q) for before, after in pairs]
        low, high = bootstrap_interval(ratios)
        lines.append(
            f"| {name} | {pooled[0]:.0f} | {pooled[1]:.0f} | {quantile(ratios, 0.5):.2f} [{low:.2f}, {high:.2f}] |"
        )
    return lines


def load(server: Target, workload: Workload, body: dict[str, Any], clients: int, seconds: float) -> Load:
    """Lets so many clients ask for so long, and waits for the answers that are under way then."""
    before, own, started = _served(server), time.process_time(), time.monotonic()
    with OtherWork([*server.pids, os.getpid()]) as other:
        seen = asyncio.run(_clients(server.url, workload, body, clients, seconds))
    seen.client_cpu = (time.process_time() - own) / (time.monotonic() - started)
    seen.others = other.share
    _check_empty(server)
    after = _served(server)
    seen.server_ms = 1000 * (after[0] - before[0]) / max(after[1] - before[1], 1.0)
    return seen


async def _clients(url: str, workload: Workload, body: dict[str, Any], clients: int, seconds: float) -> Load:
    seen, end = Load(clients), 0.0

    async def ask(http: httpx2.AsyncClient, number: int) -> None:
        turn, admitted = 0, False
        while time.monotonic() < end:
            prompt = workload.prompt(PROMPT_TOKENS, number * 1000 + turn)
            start = time.perf_counter()
            response = await http.post("/v1/completions", json={**body, "prompt": prompt})
            elapsed = 1000 * (time.perf_counter() - start)
            wait = seen.note(response.status_code, response.headers.get("retry-after"), elapsed, response.text)
            admitted |= response.status_code == httpx2.codes.OK
            turn += 1
            await asyncio.sleep(wait)
        seen.served += admitted

    # One connection each: a pool that hundreds of clients share delays them itself.
    async with contextlib.AsyncExitStack() as stack:
        own = [
            await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=60.0, verify=False))
            for _ in range(clients)
        ]
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number, http in enumerate(own):
                group.create_task(ask(http, number))
    return seen


def _metric(server: Target, prefix: str, *parts: str) -> float:
    """Sum of a metric's lines that hold all ``parts``."""
    lines = server.http.get("/metrics").text.splitlines()
    chosen = [line for line in lines if line.startswith(prefix) and all(part in line for part in parts)]
    if not chosen:
        raise BenchError(f"/metrics has no line {prefix} with {parts}")
    return sum(float(line.rpartition(" ")[2]) for line in chosen)


def _served(server: Target) -> tuple[float, float]:
    """Seconds and number of the requests that the server has answered with 200."""
    name = "credence_request_duration_seconds"
    parts = ('outcome="ok"',)
    return _metric(server, f"{name}_sum", *parts), _metric(server, f"{name}_count", *parts)


def _check_empty(server: Target) -> None:
    """Waits until nothing runs, waits or holds a slot; raises BenchError when that does not come."""
    deadline = time.monotonic() + EMPTY_TIMEOUT_S
    names = {
        "credence_inflight_requests": (),
        "credence_sample_slots": ('state="leased"',),
        "vllm:num_requests_running": (),
        "vllm:num_requests_waiting{": (),
    }
    while any(left := {name: _metric(server, name, *parts) for name, parts in names.items()}.values()):
        if time.monotonic() > deadline:
            raise BenchError(f"the server is not empty {EMPTY_TIMEOUT_S:g} s after its last answer: {list(left)}")
        time.sleep(0.1)


def main() -> None:
    """Runs both parts and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/overload.md")
    arguments = parser.parse_args()
    shape = ModelShape(hidden_size=128, intermediate_size=256, num_layers=2, vocab_size=512)
    settings = EngineSettings(dtype="float32", max_length=64, max_samples=K, threads=1, kv_cache_gib=1)
    parts = {
        f"Ensembles of K = {K}, `--max-inflight-rows {INFLIGHT_ROWS}`": (K, INFLIGHT_ROWS // K),
        f"Plain requests, `--max-num-queued-reqs {QUEUED_REQUESTS}`": (0, QUEUED_REQUESTS),
    }
    lines = [
        f"# {OVERLOAD} times as many clients as the server admits",
        "",
        f"`python benchmarks/overload.py --rounds {arguments.rounds} --seconds {arguments.seconds:g} --write`",
    ]
    with tempfile.TemporaryDirectory(prefix="credence-bench-") as name:
        workload = random_workload(Path(name), shape, max_length=64)
        flags = ["--max-inflight-rows", str(INFLIGHT_ROWS)]
        start_load = os.getloadavg()[0]
        lines += [
            "",
            f"{workload.name}, {machine()}, 1 thread; clients on the same machine. {TOKENS} tokens an answer. Rounds of "
            f"{arguments.seconds:g} s after one of warm-up, the two loads in turns. Refused requests "
            f"come again after Retry-After (at most {MOST_WAIT_S:g} s). "
            "After every round no request ran or waited and no slot was leased.",
        ]
        with credence_server(workload, settings, Path(name) / "log", print, flags) as server:
            for title, (num_samples, limit) in parts.items():
                body = request_body(new_tokens=TOKENS, num_samples=num_samples)
                memory = [resident_mib(pid) for pid in server.pids]
                rows = {
                    str(clients): lambda clients=clients, body=body: load(
                        server, workload, body, clients, arguments.seconds
                    )
                    for clients in (limit, OVERLOAD * limit)
                }
                normal, overloaded = interleave(rows, rounds=arguments.rounds, progress=print).values()
                lines += ["", f"## {title}", "", *ratio_lines(normal, overloaded), ""]
                lines += _facts(normal, overloaded)
                after = [resident_mib(pid) for pid in server.pids]
                lines += ["", f"{MEMORY}: {_mib(memory)} before the part (and its warm-up), {_mib(after)} after it."]
        lines += [
            "",
            f"Load average of the machine: {start_load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.",
        ]
    print("\n".join(lines))
    if arguments.write:
        (RESULTS / "overload.md").write_text("\n".join(lines) + "\n")


def _facts(*both: Sequence[Load]) -> list[str]:
    lines = [
        "| clients | admitted | refused | share refused | statuses | refusals, p50 / p99 ms | clients served, mean of rounds "
        "| in the server, mean ms | CPU of clients | CPU of others |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loads in both:
        count = len(loads)
        statuses = sum((seen.statuses for seen in loads), Counter[int]())
        refused = [value for seen in loads for value in seen.refused_ms]
        admitted = statuses.total() - len(refused)
        latency = f"{quantile(refused, 0.5):.1f} / {quantile(refused, 0.99):.1f}" if refused else "-"
        cells = [
            str(loads[0].clients),
            str(admitted),
            f"{len(refused)}, all with Retry-After" if refused else "0",
            f"{len(refused) / statuses.total():.1%}",
            json.dumps(statuses, sort_keys=True).strip("{}").replace('"', ""),
            latency,
            f"{sum(seen.served for seen in loads) / count:.1f}",
            f"{sum(seen.server_ms for seen in loads) / count:.0f}",
            f"{sum(seen.client_cpu for seen in loads) / count:.0%} of a core",
            f"{sum(seen.others for seen in loads) / count:.0%} of the machine",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mib(values: Sequence[float]) -> str:
    return " + ".join(f"{value:.0f}" for value in values)


if __name__ == "__main__":
    main()
