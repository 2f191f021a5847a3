"""The two servers that are compared, and the requests sent to them.

Both run vLLM with the same engine flags and threads: `credence serve` with the adapter, and stock vLLM without any of
our plugins, with the adapter's mean as a plain LoRA module. Both name it ``bench``, and the base model ``base``; of a merged
workload both load the merged model alone, and name it ``base``.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from credence.benchmarks.measure import BenchError, Measurement, process_tree, timed
from credence.benchmarks.workload import TAU, Workload
from credence.demo.server import Server, credence_command, free_port

ADAPTER, BASE = "bench", "base"
STOCK_PROGRAM = "from vllm.entrypoints.launchers.api_server.entry import main; main()"
READY_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 600.0
POLL_S = 0.25
MAX_NUM_SEQS = 256
"""Rows of one engine step: eight requests of K = 32 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What both servers are started with.

    Attributes:
        dtype: of weights and activations.
        max_length: most tokens of prompt and answer together.
        max_samples: largest K of our server.
        threads: OpenMP threads of each server's worker.
        kv_cache_gib: memory for keys and values, GiB.
    """

    dtype: str
    max_length: int
    max_samples: int
    threads: int
    kv_cache_gib: int = 2

    def flags(self) -> list[str]:
        """vLLM's flags."""
        return [
            "--dtype", self.dtype, "--enforce-eager", "--max-model-len", str(self.max_length),
            "--served-model-name", BASE, "--max-num-seqs", str(MAX_NUM_SEQS),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Environment variables. Left to itself vLLM would overrule the number of threads and bind them to cores."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
        }


@dataclass(frozen=True, slots=True)
class Target:
    """A running server.

    Attributes:
        url: its address.
        pids: its processes.
        http: connections to it.
    """

    url: str
    pids: list[int]
    http: httpx2.Client

    def complete(self, prompts: Sequence[Sequence[int]], body: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends one completion request for each prompt, all at once, and returns the answers.

        Raises:
            BenchError: an answer is an error, or has another number of tokens than was asked for.
        """
        if len(prompts) == 1:
            return [self._complete(prompts[0], body)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._complete(prompt, body), prompts))

    def measure(self, prompts: Sequence[Sequence[int]], body: dict[str, Any]) -> Measurement:
        """Wall and CPU time of ``complete``."""
        return timed(lambda: self.complete(prompts, body), self.pids)

    def measure_first_token(self, prompt: Sequence[int], body: dict[str, Any]) -> Measurement:
        """Wall time from a streamed request to its first token, and CPU time of the whole request.

        Raises:
            BenchError: the answer is an error, or holds no token.
        """
        first_ms, whole = self.measure_stream(prompt, body)
        return Measurement(wall_ms=first_ms, cpu_ms=whole.cpu_ms)

    def measure_stream(self, prompt: Sequence[int], body: dict[str, Any]) -> tuple[float, Measurement]:
        """Milliseconds from a streamed request to its first token, and wall and CPU time of the whole request.

        Raises:
            BenchError: the answer is an error, or holds no token.
        """
        first: list[float] = []
        start = time.perf_counter()
        whole = timed(lambda: first.extend(self._token_times(prompt, body)), self.pids)
        if not first:
            raise BenchError(f"{self.url} streamed an answer without a token")
        return 1000 * (first[0] - start), whole

    def _token_times(self, prompt: Sequence[int], body: dict[str, Any]) -> list[float]:
        times = []
        request = {**body, "prompt": list(prompt), "stream": True}
        with self.http.stream("POST", "/v1/completions", json=request) as response:
            if response.status_code != httpx2.codes.OK:
                raise BenchError(f"{self.url} answered {response.status_code}: {response.read().decode()[:500]}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise BenchError(f"{self.url} broke off its stream: {json.dumps(chunk)[:500]}")
                    if chunk.get("choices"):
                        times.append(time.perf_counter())
        return times

    def _complete(self, prompt: Sequence[int], body: dict[str, Any]) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json={**body, "prompt": list(prompt)})
        if response.status_code != httpx2.codes.OK:
            raise BenchError(f"{self.url} answered {response.status_code}: {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        expected, got = body["max_tokens"] * body.get("n", 1), answer["usage"]["completion_tokens"]
        if got != expected:
            raise BenchError(f"{self.url} generated {got} tokens, {expected} were asked for")
        return answer


def request_body(
    *, new_tokens: int, num_samples: int = 0, completions: int = 1, model: str = ADAPTER
) -> dict[str, Any]:
    """A completion request that generates exactly ``new_tokens``, without its prompt.

    Args:
        num_samples: K; 0 asks the mean adapter, without uncertainty.
        completions: n; more than one are sampled at temperature 1, one is greedy.
    """
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "temperature": 0.0 if completions == 1 else 1.0,
    }
    if completions > 1:
        body["n"] = completions
    if num_samples:
        body["uncertainty"] = {"n_samples": num_samples, "tau": TAU}
    return body


@contextmanager
def credence_server(
    workload: Workload,
    settings: EngineSettings,
    log: Path,
    progress: Callable[[str], None],
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Target]:
    """Our server, stopped when the block ends.

    Args:
        flags: more of `credence serve`.
        environment: more variables.

    Raises:
        DemoError: it did not start; the message holds the end of its log.
    """
    model = (
        [str(workload.base), "--adapter", f"{ADAPTER}={workload.adapter}"]
        if workload.merged is None
        else [str(workload.merged)]
    )
    command = [
        credence_command(), "serve", *model,
        "--max-samples", str(settings.max_samples), "--default-samples", str(min(8, settings.max_samples)), *flags,
    ]  # fmt: skip
    with _running(command, settings, dict(environment or {}), log, "/readyz", progress) as target:
        yield target


@contextmanager
def stock_server(
    workload: Workload, settings: EngineSettings, log: Path, rank: int, progress: Callable[[str], None]
) -> Iterator[Target]:
    """Stock vLLM with the mean adapter and none of our plugins, stopped when the block ends.

    Args:
        rank: of the adapter; vLLM's own ``--max-lora-rank`` must allow it.

    Raises:
        DemoError: it did not start; the message holds the end of its log.
    """
    command = [sys.executable, "-c", STOCK_PROGRAM, "--host", "127.0.0.1", "--model"]
    if workload.merged is None:
        command += [str(workload.base), "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--lora-modules", f"{ADAPTER}={workload.adapter}"]
    else:
        command.append(str(workload.merged))
    with _running(command, settings, {"VLLM_PLUGINS": ""}, log, "/health", progress) as target:
        yield target


@contextmanager
def _running(
    command: list[str],
    settings: EngineSettings,
    environment: dict[str, str],
    log: Path,
    health: str,
    progress: Callable[[str], None],
) -> Iterator[Target]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = [f"{name}={value}" for name, value in {**settings.environment(), **environment}.items()]
    full = ["env", *variables, *command, *settings.flags(), "--port", str(port)]
    limits = httpx2.Limits(keepalive_expiry=3.0)
    with (
        Server(full, url=url, log=log) as server,
        httpx2.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits) as http,
    ):
        progress(f"starting {'stock vLLM' if 'VLLM_PLUGINS' in environment else 'credence serve'}")
        _wait(server, http, health)
        assert server._process is not None
        yield Target(url=url, pids=process_tree(server._process.pid), http=http)


def _wait(server: Server, http: httpx2.Client, health: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        server.check()
        try:
            if http.get(health).status_code == httpx2.codes.OK:
                return
        except httpx2.TransportError:
            pass  # not listening yet
        time.sleep(POLL_S)
    raise BenchError(f"the server was not ready within {READY_TIMEOUT_S:g} s; its log is {server.log}")
