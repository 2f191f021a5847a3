import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from credence.adapters import errors as adapter_errors
from credence.cli import main
from credence.serve import errors as serve_errors
from tests.cli.conftest import Command, write

COMMANDS = (
    "train",
    "release",
    "import",
    "inspect",
    "draw",
    "merge",
    "eval",
    "data",
    "reproduce",
    "robustness",
    "serve",
    "openapi",
    "complete",
    "score",
)


def console(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from credence.cli.main import main; main()", *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(main.app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(main.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n    credence {command} " in result.output


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "vllm", "transformers", "numpy", "pydantic", "httpx2", "yaml", "credence.adapters")
    program = f"""
import sys
from credence.cli.main import run
code = run(["--help"])
print([name for name in {heavy!r} if name in sys.modules], code)
"""
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[] 0"
    assert time.monotonic() - started < 5


def test_exit_codes_of_the_console_script(tmp_path: Path) -> None:
    write(tmp_path / "a")
    done = console("inspect", str(tmp_path / "a"), "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    failed = console("inspect", str(tmp_path / "b"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"credence: {tmp_path / 'b'} does not exist\n"
    usage = console("inspect")
    assert usage.returncode == 2
    assert usage.stderr == "credence: Missing argument 'DIR'; see `credence inspect --help`\n"


@pytest.mark.parametrize(
    "arguments",
    [["--debug", "inspect", "/nowhere"], ["inspect", "--debug", "/nowhere"], ["inspect", "/nowhere", "--debug"]],
)
def test_debug_prints_the_traceback_wherever_it_stands(credence: Command, arguments: list[str]) -> None:
    outcome = credence(*arguments)
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "ArtifactError" in outcome.err
    assert outcome.err.endswith("credence: /nowhere does not exist\n")


def test_debug_after_two_dashes_is_an_argument(credence: Command) -> None:
    outcome = credence("inspect", "--", "--debug")
    assert outcome.err == "credence: --debug does not exist\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see `credence --help`"),
        (["inspekt"], "No such command 'inspekt'"),
        (["draw", "x", "--k", "two", "--output", "y"], "--k"),
        (["train", "--bogus"], "No such option"),
        (["eval", "x", "--base", "b", "--data", "d", "--k", "0,x"], "--k is '0,x'; give whole numbers of 0 or more"),
        (["eval", "x", "--base", "b", "--data", "d", "--tau", "-1"], "--tau is '-1'; give `fitted` or numbers"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(credence: Command, arguments: list[str], message: str) -> None:
    outcome = credence(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1 and outcome.out == ""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (adapter_errors.PosteriorError("two\n lines"), "two lines"),
        (serve_errors.ConfigurationError("cannot start"), "cannot start"),
        (ValueError("k is 0"), "k is 0"),
        (FileNotFoundError(2, "No such file or directory", "x.jsonl"), "x.jsonl: No such file or directory"),
        (KeyError("z"), "unexpected KeyError: 'z'; run again with --debug to see where"),
    ],
)
def test_errors_are_one_sentence(
    credence: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("credence.adapters.load_artifact", fail)
    outcome = credence("inspect", "x")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", f"credence: {sentence}\n")


def test_an_interrupt_has_its_own_code(credence: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("credence.adapters.load_artifact", interrupt)
    outcome = credence("inspect", "x")
    assert (outcome.code, outcome.err) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["inspect", "x"], "adapters"),
        (["draw", "x", "--k", "1", "--output", "y"], "adapters"),
        (["train", "--base", "b", "--data", "d", "--method", "map", "--output", "o"], "train"),
        (["release", "x", "--base", "b", "--validation", "v"], "train"),
        (["eval", "x", "--base", "b", "--data", "d"], "train"),
        (["serve", "b", "--adapter", "a=x"], "serve"),
    ],
)
def test_a_missing_extra_is_named(tmp_path: Path, arguments: list[str], extra: str) -> None:
    # A finder in front of all others hides what the base install does not have.
    program = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "safetensors", "transformers", "peft", "vllm", "yaml"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from credence.cli.main import run
sys.exit(run({arguments!r}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("credence: this command needs the package ")
    assert result.stderr.endswith(f"run `pip install 'credence[{extra}]'`\n")


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    write(tmp_path / "a")
    read, written = os.pipe()
    os.close(read)
    program = [sys.executable, "-c", "from credence.cli.main import main; main()", "inspect", str(tmp_path / "a")]
    result = subprocess.run(program, stdout=written, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(written)
    assert result.returncode == 1 and "Traceback" not in result.stderr


def test_version(credence: Command) -> None:
    outcome = credence("--version")
    assert outcome.code == 0 and outcome.out.startswith("credence 0.")
