"""Measuring on a machine that is never quiet: CPU time of process trees, interleaved rounds, medians with intervals.

Wall time suffers from whatever else runs on the machine; the CPU time of a server's own processes hardly does. Rows
that are to be compared run in the same rounds, in rotated order, so that the machine's moods hit all of them alike.
"""

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

SETTLE_S = 0.05
"""Pause after an answer before CPU time is read, so that what a request leaves behind is counted as its own."""

IDLE_SHARE = 0.05
"""A process tree is idle when it uses less than this share of one core."""
IDLE_LOOK_S = 0.1
IDLE_TIMEOUT_S = 5.0

_T = TypeVar("_T")


class BenchError(Exception):
    """A benchmark cannot be run, or measured something else than it should; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one row.

    Attributes:
        wall_ms: milliseconds from the question to the complete answer.
        cpu_ms: milliseconds of processor time, user and system, of all processes that worked on it.
    """

    wall_ms: float
    cpu_ms: float


def process_tree(pid: int) -> list[int]:
    """Returns the process and all its descendants, from /proc.

    Raises:
        BenchError: the process does not exist, or this system has no /proc.
    """
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a program's name in parentheses, which may hold anything.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    if pid not in parents:
        raise BenchError(f"process {pid} is not in /proc: it has ended, or this is not Linux, which CPU times need")
    tree = [pid]
    for member in tree:
        tree += [child for child, parent in parents.items() if parent == member]
    return tree


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time, user and system, that these processes and all their threads have used, in seconds.

    Read from each process's CPU clock (nanoseconds), because /proc/PID/stat counts in ticks of 10 ms.

    Raises:
        BenchError: one of the processes has ended.
    """
    try:
        # The id of another process's clock, as clock_getcpuclockid(3) makes it: ~pid << 3 | CPUCLOCK_SCHED.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
    except OSError as error:
        raise BenchError(f"a process of {list(pids)} ended during the measurement; see its log") from error


def timed(work: Callable[[], object], pids: Sequence[int]) -> Measurement:
    """Runs ``work`` and measures its wall time, and the CPU time of the processes that do it."""
    cpu, start = cpu_seconds(pids), time.perf_counter()
    work()
    wall = time.perf_counter() - start
    time.sleep(SETTLE_S)
    return Measurement(wall_ms=1000 * wall, cpu_ms=1000 * (cpu_seconds(pids) - cpu))


def resident_mib(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def wait_idle(pids: Sequence[int]) -> None:
    """Waits until these processes rest: vLLM's worker polls for a second after its last step, at the next competitor's expense.

    Raises:
        BenchError: they do not come to rest in time, or one has ended.
    """
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        used, start = cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_LOOK_S)
        if cpu_seconds(pids) - used < IDLE_SHARE * (time.monotonic() - start):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the processes {list(pids)} work although nobody asks them to; measure when they rest")


class OtherWork:
    """How much of the machine's processors others used while a block ran, from /proc/stat.

    Args:
        pids: the processes of the benchmark, which are not others.

    Attributes:
        share: after the block, 0..1 of all cores' time.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)
        self.share = 0.0

    def __enter__(self) -> Self:
        self._start = time.monotonic(), machine_seconds(), cpu_seconds(self._pids)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None:
            return
        start, busy, own = self._start
        used = machine_seconds() - busy - (cpu_seconds(self._pids) - own)
        self.share = min(1.0, max(0.0, used / ((time.monotonic() - start) * (os.cpu_count() or 1))))


def machine_seconds() -> float:
    """Time that all cores of the machine together have spent working since it started, in seconds.

    Raises:
        BenchError: this system has no /proc/stat.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError as error:
        raise BenchError("there is no /proc/stat: this is not Linux, which CPU times need") from error
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def interleave(
    rows: Mapping[str, Callable[[], _T]],
    *,
    rounds: int,
    warmup: int = 1,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[_T]]:
    """Runs every row once a round, each round beginning one row later; returns the results of each row.

    Args:
        rows: what to run, by name.
        rounds: rounds that count.
        warmup: rounds before them whose results are dropped.
        between: called before every row.
        progress: called once a round.

    Raises:
        ValueError: there is no row, or no round that counts.
    """
    if not rows or rounds < 1 or warmup < 0:
        raise ValueError(
            f"give rows, at least 1 round and 0 or more warm-up rounds, got {len(rows)}, {rounds}, {warmup}"
        )
    names = list(rows)
    results: dict[str, list[_T]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        progress(f"round {number - warmup + 1} of {rounds}" if number >= warmup else "warm-up round")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            between()
            result = rows[name]()
            if number >= warmup:
                results[name].append(result)
    return results


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1, with linear interpolation between order statistics.

    Raises:
        ValueError: there are no values, or q is outside [0, 1].
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"a quantile needs values and 0 <= q <= 1, got {len(values)} values and q = {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the median.

    Args:
        level: the probability it should cover.
        seed: of the resampling; equal values give equal intervals.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a bootstrap interval needs at least one value")
    generator = random.Random(seed)
    medians = [statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples)]
    return quantile(medians, (1 - level) / 2), quantile(medians, (1 + level) / 2)


def machine() -> str:
    """Processor model, and the number of cores this process may use."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {usable_cores()} cores"


def default_threads() -> int:
    """Compute threads of a competitor: all cores but one, which vLLM too leaves to its scheduler's process."""
    return max(1, usable_cores() - 1)


def usable_cores() -> int:
    """Number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
