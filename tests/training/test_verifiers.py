"""Verifiers against hand-made cases, pass@k against enumeration, and programs that want to pass without passing."""

import itertools
import os
import random
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from credence.training import metrics, sandbox
from credence.training.errors import MetricError
from credence.training.sandbox import Limits, missing_protections, run_program
from credence.training.verifiers import VERIFIERS, function_body, number, reference, verifier

QUICK = Limits(seconds=1)
confined = pytest.mark.skipif(
    bool(missing_protections()), reason=f"this system lets programs {' and '.join(missing_protections())}"
)


def test_exact_and_squad_normalise_as_they_say() -> None:
    row = {"prompt": "?", "completion": "The  Eiffel-Tower.", "answer": "the eiffel-tower."}
    exact, squad = VERIFIERS["exact"], VERIFIERS["squad"]
    assert exact.is_right(" The Eiffel-Tower.\n", row) and not exact.is_right("The Eiffel-Tower", row)
    assert squad.is_right("an EiffelTower", row) and not squad.is_right("Eiffel Tower", row)
    assert exact.needs_end and squad.needs_end and not VERIFIERS["number"].needs_end
    assert reference({"prompt": "?", "completion": "c"}) == "c"
    assert reference({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}) == "a"


NUMBERS = {
    "so 3 + 4 = 7\n#### 18\nand then 5": "18",
    "#### $1,234.50.": "1234.50",
    "#### -5": "-5",
    "#### -$1,000": "-1000",
    "####\n7 and 8": "8",
    "#### none, 4": "4",
    "16-3": "3",
    "16 - 3": "3",
    "(5)-2": "2",
    "it is -3.": "-3",
    "$-5": "-5",
    "\N{MINUS SIGN}4": "-4",
    "x=-.5": "-0.5",
    "12,345,678.9 in all": "12345678.9",
    "2,3": "3",
    "50%": "50",
    "18.0": "18",
    "no number": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_are_read_as_gsm8k_writes_them(text: str) -> None:
    expected = NUMBERS[text]
    assert number(text) == (None if expected is None else Decimal(expected))


def test_number_compares_by_value() -> None:
    check = VERIFIERS["number"]
    row = {"prompt": "?", "completion": "5 + 5\n#### 1,010.0"}
    assert check.is_right("it makes $1010", row) and not check.is_right("1011", row) and not check.is_right("none", row)
    assert check.is_right("3", {**row, "answer": "3"})
    assert check.complaint(row) is None and "no number" in str(check.complaint({**row, "answer": "many"}))


def test_pass_at_k_equals_enumeration() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            chosen = list(itertools.combinations([index < c for index in range(n)], k))
            assert metrics.pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-15)
    assert metrics.pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(MetricError, match="pass@k needs"):
            metrics.pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased() -> None:
    """The mean over many draws of n = 5 samples is the probability that one of 2 passes."""
    draw, p = random.Random(0), 0.3
    found = [metrics.pass_at_k(5, sum(draw.random() < p for _ in range(5)), 2) for _ in range(20_000)]
    assert sum(found) / len(found) == pytest.approx(1 - (1 - p) ** 2, abs=0.01)


PROBLEM = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "completion": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}


def test_python_runs_the_rows_test() -> None:
    check = verifier("python", allow_code_execution=True)
    assert check.complaint(PROBLEM) is None
    assert check.is_right(PROBLEM["completion"], PROBLEM)
    assert check.is_right("    return a + b\n\nprint(add(1, 'x'))\ndef more(:", PROBLEM)
    for wrong in ("    return a - b\n", "    return a +\n", "", "    pass\n    assert False"):
        assert not check.is_right(wrong, PROBLEM)
    assert "test" in str(check.complaint({"prompt": "p", "completion": "c"}))
    assert "entry_point" in str(check.complaint({**PROBLEM, "entry_point": "f(); import os"}))
    assert function_body("    x\n# end\nif y:") == "    x" and function_body("    x\n    # on") == "    x\n    # on"


def test_programs_run_only_if_allowed() -> None:
    with pytest.raises(MetricError, match="allow it with --allow-code-execution"):
        verifier("python")
    with pytest.raises(MetricError, match="no verifier; there are exact, squad, number, python"):
        verifier("excat")


def test_ordinary_programs_pass() -> None:
    assert run_program(
        "import math, re, typing, collections, itertools, hashlib, heapq, random, json\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: 'int'\n"
        "assert typing.get_type_hints(Point) == {'x': int}\n"
        "assert __name__ == '__main__'\n"
        "print('x' * 10**6)\n"
        "open('note', 'w').write('x')\n"
        "import os\nassert os.listdir() == ['note'] and not os.environ.keys() - {'LC_CTYPE'}\n"
    )


HOSTILE = {
    "infinite loop": "while True: pass",
    "sleep": "import time\ntime.sleep(60)",
    "memory": "x = bytearray(2 * 10**9)",
    "exit 0": "import sys\nsys.exit(0)",
    "exit 0 at once": "import os\nos._exit(0)",
    "fake success": "print('ok')\nimport os\nfor fd in range(1, 4096):\n"
    "    try: os.write(fd, b'passed' * 9)\n    except OSError: pass\nos._exit(0)",
    "large file": "open('large', 'w').write('x' * 2**24)",
    "recursion": "def f(): f()\nf()",
    "exception at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "closed channel": "import os\nos.closerange(0, 64)\nwhile True: pass",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not run_program(HOSTILE[name], QUICK)
    assert not list(tmp_path.iterdir())


CONFINED = {
    "fork": "import os\nfor _ in range(4): os.fork()",
    "fork that survives": "import os\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        import time\n        time.sleep(30)\n"
    "except OSError: raise SystemExit",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/true'])",
    "network": "import socket\nsocket.socket()",
    "signal": "import os\nos.kill(os.getppid(), 0)",
    "write": "open({outside!r}, 'w').write('x')",
    "append": "open({kept!r}, 'a').write('x')",
    "remove": "import os\nos.remove({kept!r})",
    "rename": "import os\nos.rename({kept!r}, {outside!r})",
    "truncate": "import os\nos.truncate({kept!r}, 0)",
    "mode": "import os\nos.chmod({kept!r}, 0)",
    "link": "import os\nos.symlink('/', 'root')",
    "folder": "import os\nos.mkdir({outside!r})",
}


@confined
@pytest.mark.parametrize("name", CONFINED)
def test_programs_leave_nothing_behind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused by the system, so the program fails; what it aimed at is as it was, and no process of it is left."""
    programs, kept, outside = tmp_path / "programs", tmp_path / "kept", tmp_path / "outside"
    programs.mkdir()
    kept.write_text("mine")
    monkeypatch.setattr("tempfile.tempdir", str(programs))
    before = children()
    assert not run_program(CONFINED[name].format(outside=str(outside), kept=str(kept)), QUICK)
    assert kept.read_text() == "mine" and kept.stat().st_mode & 0o600 == 0o600
    assert not outside.exists() and not list(programs.iterdir())
    assert children() == before


def children() -> set[str]:
    """Processes that run the confined interpreter."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if sandbox.__file__.encode() in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


@confined
def test_a_program_cannot_read_the_secret_before_its_end() -> None:
    """The secret is in no file, argument or environment that the program can read; only in its interpreter's frames."""
    source = (
        "import os\nread = open('/proc/self/cmdline').read() + open('/proc/self/environ').read()\n"
        "assert 'secret' not in read and os.read(0, 9) == b''\nassert not os.listdir()"
    )
    assert run_program(source)


def test_one_program_does_not_wait_for_the_time_limit() -> None:
    start = time.monotonic()
    assert run_program("pass", Limits(seconds=600)) and not run_program("1 / 0", Limits(seconds=600))
    assert time.monotonic() - start < 300 and os.getpid() > 0


def test_rows_keep_what_a_verifier_needs(write: Any) -> None:
    from credence.training.data import read_data
    from credence.training.errors import DataError

    rows = read_data(
        write("rows.jsonl", [{**PROBLEM, "answer": "x", "task_id": 3}, {"prompt": "p", "completion": "c"}])
    ).rows
    assert dict(rows[0].fields) == {**PROBLEM, "answer": "x"} and set(rows[1].fields) == {"prompt", "completion"}
    with pytest.raises(DataError, match='bad.jsonl:1: "answer" is a JSON int'):
        read_data(write("bad.jsonl", [{"prompt": "p", "completion": "c", "answer": 3}]))
