"""`credence serve`: configuration file, environment and command line."""

from pathlib import Path
from typing import Any

import pytest
import typer

from credence.cli.main import app
from credence.serve import launcher
from credence.serve.preflight import Checks, Row
from tests.cli.conftest import Command

COMMAND: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
PARAMETERS = [parameter for parameter in COMMAND.params if parameter.name != "help"]
SETTINGS = [parameter for parameter in PARAMETERS if parameter.name not in ("config", "check")]
ARGUMENTS = {
    "readiness_timeout": "readiness_timeout_s",
    "adapter": "adapters",
    "adapter_root": "adapter_roots",
    "extra_route": "extra_routes",
}
"""Parameters that the launcher calls otherwise."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the launcher was started with. The environment holds no option at first."""
    calls: list[dict[str, Any]] = []

    def main(base: str, adapters: dict[str, str], checks: Checks, **options: Any) -> int:
        calls.append({"base": base, "adapters": adapters, **options})
        checks.rows.append(Row(name="adapter a", found="rank 8"))
        return 2 if checks.keep_going else 0

    monkeypatch.setattr(launcher, "main", main)
    for parameter in PARAMETERS:
        monkeypatch.delenv(parameter.envvar or "", raising=False) if parameter.envvar else None
    return calls


def value(parameter: Any, number: int) -> str:
    """A valid value of a parameter, another one for each number."""
    if parameter.name == "adapter":
        return f"a=folder-{number}"
    if getattr(parameter, "is_flag", False):
        return str(number != 2)
    if parameter.name == "log_format":
        return "json" if number == 2 else "text"
    return {int: str(40 + number), float: f"{number}.5"}.get(parameter.type_descriptor.annotation, f"text-{number}")


def write(path: Path, **values: str) -> Path:
    path.write_text("".join(f"{key.replace('_', '-')}: {text}\n" for key, text in values.items()))
    return path


def test_every_parameter_has_an_environment_variable() -> None:
    for parameter in PARAMETERS:
        assert parameter.envvar == f"CREDENCE_{parameter.name.upper()}", parameter.name


def test_the_documentation_names_every_variable() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for parameter in PARAMETERS:
        assert f"`{parameter.envvar}`" in text, f"docs/serving.md does not name {parameter.envvar}"


@pytest.mark.parametrize("parameter", SETTINGS, ids=lambda parameter: parameter.name)
def test_command_line_beats_environment_beats_file(
    credence: Command, started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameter: Any
) -> None:
    """The other settings come from the file; the launcher sees the winner's value."""
    name = parameter.name
    rest = {"base": "base", "default_samples": "1", "max_samples": "60"}
    file = {key: text for key, text in rest.items() if key != name}
    adapters = "" if name == "adapter" else "adapters: {a: folder}\n"

    def run(*, in_file: bool, in_environment: bool, on_command_line: bool) -> str:
        text = (
            f"adapters: {{a: {value(parameter, 1)[2:]}}}\n"
            if name == "adapter"
            else f"{name.replace('_', '-')}: {f'[{value(parameter, 1)}]' if parameter.multiple else value(parameter, 1)}\n"
        )
        path = write(tmp_path / "serve.yaml", **file)
        path.write_text(path.read_text() + adapters + (text if in_file else ""))
        if in_environment:
            monkeypatch.setenv(parameter.envvar, value(parameter, 2))
        else:
            monkeypatch.delenv(parameter.envvar, raising=False)
        given = [value(parameter, 3)] if name == "base" else [f"--{name.replace('_', '-')}", value(parameter, 3)]
        outcome = credence("serve", "--config", path, *(given if on_command_line else []))
        assert outcome.code == 0, outcome.err
        seen = started.pop()[ARGUMENTS.get(name, name)]
        return f"a={seen['a']}" if name == "adapter" else seen[0] if isinstance(seen, list) else str(seen)

    assert run(in_file=True, in_environment=False, on_command_line=False) == value(parameter, 1)
    assert run(in_file=True, in_environment=True, on_command_line=False) == value(parameter, 2)
    assert run(in_file=True, in_environment=True, on_command_line=True) == value(parameter, 3)
    assert run(in_file=False, in_environment=True, on_command_line=False) == value(parameter, 2)


def test_the_file_may_be_named_by_the_environment(
    credence: Command, started: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("base: base\nadapters: {a: x, b: y}\nport: 9000\n")
    monkeypatch.setenv("CREDENCE_CONFIG", str(path))
    assert credence("serve").code == 0
    assert (started[0]["base"], started[0]["adapters"], started[0]["port"]) == ("base", {"a": "x", "b": "y"}, 9000)


def test_flags_of_vllm_in_the_file(credence: Command, started: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "base: base\nadapters: {a: x}\n"
        "vllm: {max_model_len: 4096, enforce-eager: true, enable-prefix-caching: false, allowed-origins: [x, z], "
        "compilation-config: {mode: 0}, dtype: float32}\n"
    )
    assert credence("serve", "--config", path).code == 0
    assert started.pop()["extra_args"] == [
        "--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching", "--allowed-origins", "x", "z",
        "--compilation-config", '{"mode": 0}', "--dtype", "float32",
    ]  # fmt: skip
    given = ["--max_model_len=8", "--enable-prefix-caching", "--allowed-origins", "w", "--no-enforce-eager"]
    assert credence("serve", "--config", path, *given).code == 0
    call = started.pop()
    assert call["extra_args"] == ["--compilation-config", '{"mode": 0}', "--dtype", "float32", *given]
    assert call["base"] == "base", "the first flag is not taken for the base model"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "prot: 8000",
            "has the unknown key 'prot'; allowed are adapter-dir, adapter-root, adapters, admin-key-file,",
        ),
        ("port: eight", "has port: 'eight': Input should be a valid integer"),
        ("port: 70000", "has port: 70000: Input should be less than or equal to 65535"),
        ("max-samples: 1.5", "has max-samples: 1.5"),
        ("max-samples: true", "has max-samples: True; give a text or a number"),
        ("port: [1, 2]", "has port: [1, 2]; give one value"),
        ("host: {a: b}", "has host: {'a': 'b'}; give one value"),
        ("adapters: [a=x]", "has adapters: ['a=x']; give a mapping of names to folders"),
        ("adapters: {a: 3}", "give a mapping of names to folders"),
        ("vllm: --max-model-len 3", "give a mapping of vLLM's flags to their values"),
        ("vllm: {--seed: 3}", "has vllm.--seed; name a flag without its dashes"),
        ("vllm: {seed: 2026-01-01}", "has vllm.seed: datetime.date(2026, 1, 1); give a text or a number"),
        ("- port", "must be a mapping of keys to values, it is a list"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    credence: Command, started: list[dict[str, Any]], tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    outcome = credence("serve", "--config", path, "base", "--adapter", "a=x")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"the configuration file {path} " in outcome.err and said in outcome.err
    assert not started


def test_a_missing_file(credence: Command, started: list[dict[str, Any]], tmp_path: Path) -> None:
    outcome = credence("serve", "--config", tmp_path / "none.yaml")
    assert outcome.code == 2 and "none.yaml cannot be read: No such file" in outcome.err


def test_without_base(credence: Command, started: list[dict[str, Any]]) -> None:
    outcome = credence("serve")
    assert outcome.code == 2 and "no base model given" in outcome.err
    outcome = credence("serve", "--seed", "3", "--adapter", "a=x")
    assert outcome.code == 2 and "BASE must come before vLLM's flags" in outcome.err


def test_check_prints_the_table(
    credence: Command, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    outcome = credence("serve", "base", "--adapter", "a=x", "--check")
    assert outcome.code == 2 and len(started) == 1
    assert "adapter a" in outcome.out and "rank 8" in outcome.out
