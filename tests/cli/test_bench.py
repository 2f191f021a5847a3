"""credence bench: its command line; and one small run of every benchmark against real servers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from credence.cli import main
from tests.cli.conftest import Command

SMALL = [
    "--hidden-size", "128", "--num-layers", "1", "--vocab-size", "64", "--dtype", "float32", "--new-tokens", "3",
    "--threads", "1",
]  # fmt: skip


def test_help_lists_the_benchmarks_with_examples() -> None:
    listed = CliRunner().invoke(main.app, ["bench", "--help"])
    assert listed.exit_code == 0
    for name in ("k-curve", "overhead", "prompts"):
        assert f"\n  {name} " in listed.output
        result = CliRunner().invoke(main.app, ["bench", name, "--help"])
        assert f"Example:\n    credence bench {name} " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["k-curve", "--k", "0,x"], "--k is '0,x'; give whole numbers, separated by commas"),
        (["k-curve", "--k", "1,2"], "the sample counts are [1, 2]; give rising whole numbers that begin with 0"),
        (["k-curve", "--k", "0,2"], "the PEFT loops' K are [1, 8]; choose from [2]"),
        (["k-curve", "--at-once-k", "5"], "8 at once for K = [5]"),
        (["k-curve", "--dtype", "int8"], "--dtype is 'int8'; choose from bfloat16, float32"),
        (["k-curve", "--base", "x"], "give --base and --adapter together"),
        (["overhead", "--hidden-size", "100"], "hidden_size is 100; give a positive multiple of 128"),
        (["prompts", "--lengths", "16"], "480 shared tokens; give fewer than the longest prompt's 16"),
        (["load"], "No such command 'load'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(credence: Command, arguments: list[str], message: str) -> None:
    outcome = credence("bench", *arguments)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err and outcome.err.count("\n") == 1 and outcome.out == ""


@pytest.mark.parametrize("hidden", ["torch", "matplotlib"])
def test_a_missing_extra_is_named(hidden: str, tmp_path: Path) -> None:
    program = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from credence.cli.main import run
sys.exit(run(["bench", "k-curve"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == (
        f"credence: this command needs the package '{hidden}', which is not installed; run `pip install 'credence[bench]'`\n"
    )


def test_a_run_writes_its_page_its_picture_and_its_json(
    credence: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def run(workload: Any, settings: Any, progress: Callable[[str], None]) -> dict[str, Any]:
        seen.append((workload, settings))
        progress("round 1 of 1")
        row = {"k": 0, "p50_ms": 10.0, "p95_ms": 11.0, "cpu_ms": 20.0, "ttft_ms": 1.0, "requests_per_s_8": None}
        for name in ("hf_loop", "hf_batched", "token_samples"):
            row |= {f"{name}_p50_ms": None, f"{name}_cpu_ms": None}
        row |= {"hf_loop_requests_per_s_8": None, "hf_same_tokens": None}
        return {
            "model": {"name": workload.name, "parameters": workload.num_parameters, "dtype": settings.dtype},
            "tokens": {"prompt": 32, "new": 3},
            "machine": "m",
            "other_work": 0.1,
            "threads": 1,
            "rounds": 1,
            "date": "d",
            "versions": {"torch": "1"},
            "rows": [row, row | {"k": 1, "p50_ms": 12.0, "cpu_ms": 30.0}],
            "stock_vllm": {name: row[name] for name in ("p50_ms", "p95_ms", "cpu_ms", "ttft_ms", "requests_per_s_8")},
        }

    monkeypatch.setattr("credence.benchmarks.k_curve.run_k_curve", run)
    page, picture, result = tmp_path / "page.md", tmp_path / "curve.png", tmp_path / "result.json"
    outcome = credence(
        "bench",
        "k-curve",
        *SMALL,
        "--k",
        "0,1",
        "--peft-k",
        "",
        "--markdown",
        page,
        "--plot",
        picture,
        "--json",
        result,
    )
    assert outcome.code == 0, outcome.err
    ((workload, settings),) = seen
    assert (settings.sample_counts, settings.peft_counts, settings.at_once_counts) == ((0, 1), (), (0, 1))
    assert (settings.new_tokens, settings.dtype, settings.threads) == (3, "float32", 1)
    assert workload.vocab_size == 64
    assert "round 1 of 1" in outcome.err and "| 1 | 12 | 11 | 30 | 1.50 |" in outcome.out
    assert page.read_text() in outcome.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(result.read_text())
    assert document["rows"][1]["cpu_ms"] == 30.0 and document["command"].startswith("credence")


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


on_request = pytest.mark.skipif(
    not os.environ.get("CREDENCE_TEST_BENCH"),
    reason="starts and loads several servers for minutes and needs a quiet machine; set CREDENCE_TEST_BENCH=1 to run it",
)


@on_request
@pytest.mark.engine
@pytest.mark.slow
def test_k_curve_against_real_servers(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [
        sys.executable, "-c", "from credence.cli.main import main; main()", "bench", "k-curve", *SMALL, "--k", "0,1,2",
        "--peft-k", "2", "--at-once-k", "0,2", "--rounds", "1", "--prompt-tokens", "5", "--json", str(result),
    ]  # fmt: skip
    environment = {**os.environ, "CREDENCE_FORK_ENGINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(result.read_text())
    assert [row["k"] for row in document["rows"]] == [0, 1, 2]
    for row in [*document["rows"], document["stock_vllm"]]:
        # An answer takes longer than its first token, and processes that answer use the processor.
        assert row["p50_ms"] > 0 and row["cpu_ms"] > 0 and row["ttft_ms"] > 0
    two = document["rows"][2]
    # Float32, greedy: the server and the loop are two implementations of one definition.
    assert two["hf_same_tokens"] == 1.0
    assert two["hf_loop_cpu_ms"] > 0 and two["token_samples_p50_ms"] > 0 and two["requests_per_s_8"] > 0


@on_request
@pytest.mark.engine
@pytest.mark.slow
def test_sigterm_stops_the_servers(tmp_path: Path) -> None:
    program = """
import os, sys
os.environ |= {"TMPDIR": sys.argv[1], "CREDENCE_FORK_ENGINE": "1"}
from credence.cli.main import run
sys.exit(run(["bench", "prompts", *sys.argv[2:]]))
"""
    arguments = [*SMALL, "--k", "0", "--lengths", "8", "--shared", "0", "--rounds", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    started: list[int] = []
    for line in process.stderr:
        if line.startswith("round 1 "):
            from credence.benchmarks.measure import process_tree

            started = process_tree(process.pid)[1:]
            process.send_signal(signal.SIGTERM)
            break
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stderr.close()
    assert len(started) >= 2
    deadline = time.monotonic() + 30
    while (alive := [pid for pid in started if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []
