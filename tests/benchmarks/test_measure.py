"""credence.benchmarks.measure: clocks against what processes say of themselves, statistics against closed forms."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from credence.benchmarks.measure import (
    BenchError,
    OtherWork,
    bootstrap_interval,
    cpu_seconds,
    default_threads,
    interleave,
    machine,
    machine_seconds,
    process_tree,
    quantile,
    timed,
    usable_cores,
    wait_idle,
)

# Burns processor time in two threads, in the C library, then says how much it has used and rests.
BURNER = """
import hashlib, json, os, subprocess, sys, threading, time
def burn():
    while time.thread_time() < 0.15:
        hashlib.sha256(bytes(1 << 20))
threads = [threading.Thread(target=burn) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
below, depth = [], int(sys.argv[1])
if depth:
    child = subprocess.Popen([sys.executable, __file__, str(depth - 1)], stdout=subprocess.PIPE, text=True)
    below = json.loads(child.stdout.readline())
print(json.dumps([[os.getpid(), time.process_time()], *below]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def burned(tmp_path: Path) -> Iterator[tuple[int, list[list[float]]]]:
    """A resting process with a child and a grandchild: its id, and what each says it has used, in seconds."""
    script = tmp_path / "burner.py"
    script.write_text(BURNER)
    process = subprocess.Popen(
        [sys.executable, str(script), "2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.pid, json.loads(process.stdout.readline())
    finally:
        process.communicate()


def test_cpu_time_of_a_tree_is_what_its_processes_report(burned: tuple[int, list[list[float]]]) -> None:
    pid, reported = burned
    tree = process_tree(pid)
    assert tree == [int(member) for member, _ in reported] and len(tree) == 3
    for member, seconds in reported:
        # Between its own reading and ours, a process only prints a line and waits.
        assert seconds <= cpu_seconds([int(member)]) <= seconds + 0.1
        assert seconds >= 0.3
    assert cpu_seconds(tree) == pytest.approx(sum(cpu_seconds([member]) for member in tree))
    wait_idle(tree)


def test_a_process_that_has_ended_is_an_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(BenchError, match=f"a process of \\[{process.pid}\\] ended"):
        cpu_seconds([process.pid])
    with pytest.raises(BenchError, match=f"process {process.pid} is not in /proc"):
        process_tree(process.pid)


def test_a_process_that_never_rests_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    monkeypatch.setattr("credence.benchmarks.measure.IDLE_TIMEOUT_S", 0.3)
    monkeypatch.setattr("credence.benchmarks.measure.IDLE_SHARE", 0.0)
    try:
        with pytest.raises(BenchError, match="work although nobody asks"):
            wait_idle([process.pid])
    finally:
        process.kill()
        process.wait()


def test_timed_counts_the_work_of_the_named_processes_only() -> None:
    def burn() -> None:
        start = os.times().user
        while os.times().user - start < 0.05:
            sum(range(1000))

    own = timed(burn, [os.getpid()])
    assert own.cpu_ms >= 40 and own.wall_ms >= 40
    assert timed(burn, []).cpu_ms == 0


def test_work_of_others_is_told_from_our_own() -> None:
    program = "import time\nwhile time.process_time() < 0.6: pass"

    def burn() -> float:
        start, before = time.monotonic(), os.times()
        subprocess.run([sys.executable, "-c", program], check=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return used / ((time.monotonic() - start) * (os.cpu_count() or 1))

    with OtherWork([os.getpid()]) as others:
        share = burn()
    assert others.share >= 0.9 * share
    own, busy = cpu_seconds([os.getpid()]), machine_seconds()
    while cpu_seconds([os.getpid()]) - own < 0.3:
        pass
    assert machine_seconds() - busy >= 0.2
    # With the burning process among ours, nothing of it is left for others.
    child = subprocess.Popen([sys.executable, "-c", program + "\ninput()"], stdin=subprocess.PIPE)
    with OtherWork([os.getpid()]) as foreign, OtherWork([os.getpid(), child.pid]) as ours:
        while cpu_seconds([child.pid]) < 0.5:
            time.sleep(0.01)
    child.communicate()
    assert ours.share < foreign.share


def test_rows_are_interleaved_and_rotated() -> None:
    calls: list[str] = []
    counts = iter(range(100))

    def row(name: str) -> int:
        calls.append(name)
        return next(counts)

    lines: list[str] = []
    results = interleave(
        {name: (lambda name=name: row(name)) for name in "abc"},  # type: ignore[misc]
        rounds=3,
        between=lambda: calls.append("-"),
        progress=lines.append,
    )
    assert "".join(calls) == "-a-b-c" + "-b-c-a" + "-c-a-b" + "-a-b-c"
    assert results == {"a": [5, 7, 9], "b": [3, 8, 10], "c": [4, 6, 11]}
    assert lines == ["warm-up round", "round 1 of 3", "round 2 of 3", "round 3 of 3"]


@pytest.mark.parametrize(
    ("rows", "rounds", "warmup"), [({}, 1, 1), ({"a": lambda: 1}, 0, 1), ({"a": lambda: 1}, 1, -1)]
)
def test_nothing_to_interleave_is_an_error(rows: dict[str, object], rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="at least 1 round"):
        interleave(rows, rounds=rounds, warmup=warmup)  # type: ignore[arg-type]


def test_quantiles() -> None:
    generator = random.Random(3)
    values = [generator.random() for _ in range(21)]
    assert quantile(values, 0.5) == statistics.median(values)
    assert (quantile(values, 0), quantile(values, 1)) == (min(values), max(values))
    inclusive = statistics.quantiles(values, n=20, method="inclusive")
    assert quantile(values, 0.95) == pytest.approx(inclusive[-1])
    assert quantile([7.0], 0.95) == 7.0
    for q in (-0.1, 1.1):
        with pytest.raises(ValueError, match="0 <= q <= 1"):
            quantile(values, q)
    with pytest.raises(ValueError, match="0 values"):
        quantile([], 0.5)


def test_the_bootstrap_interval_is_that_of_the_exact_bootstrap() -> None:
    n = 401
    values = random.Random(5).sample([float(rank) for rank in range(1, n + 1)], n)

    def at_most(rank: int) -> float:
        """P(median of n draws with replacement <= rank): at least 201 of them are."""
        p = rank / n
        return sum(math.comb(n, m) * p**m * (1 - p) ** (n - m) for m in range((n + 1) // 2, n + 1))

    for level in (0.5, 0.95):
        tail = (1 - level) / 2
        low, high = bootstrap_interval(values, level=level)
        # 4000 resamples leave about one rank of noise; the two levels' ends are 13 ranks apart.
        assert low == pytest.approx(next(rank for rank in range(1, n) if at_most(rank) >= tail), abs=2)
        assert high == pytest.approx(next(rank for rank in range(1, n) if at_most(rank) >= 1 - tail), abs=2)


def test_the_bootstrap_interval_is_reproducible() -> None:
    assert bootstrap_interval([2.0] * 9) == (2.0, 2.0)
    values = [random.Random(1).random() for _ in range(20)]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_the_machine_is_named() -> None:
    assert machine().endswith(f", {usable_cores()} cores")
    assert 1 <= default_threads() <= usable_cores()
