from typing import Any

import pytest

from credence.serve import launcher
from credence.serve.preflight import Checks
from tests.cli.conftest import Command


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def main(base: str, adapters: dict[str, str], checks: Checks, **options: Any) -> int:
        calls.append({"base": base, "adapters": adapters, **options})
        return 3

    monkeypatch.setattr(launcher, "main", main)
    return calls


def test_unknown_flags_go_to_vllm_in_order(credence: Command, started: list[dict[str, Any]]) -> None:
    outcome = credence(
        "serve", "base", "--max-model-len", 512, "--adapter", "a=x", "-tp", 2, "--port", 9000, "--adapter=b=y=z",
        "--enforce-eager", "--max-samples", 16, "--api-key-file", "k", "--dtype=float32",
    )  # fmt: skip
    assert outcome.code == 3
    assert started == [
        {
            "base": "base",
            "adapters": {"a": "x", "b": "y=z"},
            "host": "127.0.0.1",
            "port": 9000,
            "api_key_file": "k",
            "admin_key_file": None,
            "extra_routes": [],
            "return_samples": True,
            "max_sequences": None,
            "audit_log": None,
            "extra_args": ["--max-model-len", "512", "-tp", "2", "--enforce-eager", "--dtype=float32"],
            "default_samples": 8,
            "max_samples": 16,
            "sample_slots": None,
            "max_adapters": None,
            "adapter_roots": [],
            "adapter_dir": None,
            "trust": None,
            "max_inflight_rows": 1024,
            "readiness_timeout_s": 5.0,
            "log_format": "text",
        }
    ]


def test_a_trust_file_by_option_or_environment(
    credence: Command, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENCE_TRUST", "keys")
    credence("serve", "base", "--adapter", "a=x")
    credence("serve", "base", "--adapter", "a=x", "--trust", "other")
    assert [call["trust"] for call in started] == ["keys", "other"]


def test_host_and_port_before_base_can_be_given_again(credence: Command, started: list[dict[str, Any]]) -> None:
    """The container's entry point puts them first."""
    outcome = credence(
        "serve", "--host", "0.0.0.0", "--port", 8000, "base", "--adapter", "a=x", "--port", 1, "--seed=0"
    )
    assert outcome.code == 3
    (call,) = started
    assert (call["base"], call["host"], call["port"], call["extra_args"]) == ("base", "0.0.0.0", 1, ["--seed=0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "no --adapter given"),
        (["base", "--adapter", "x"], "--adapter is 'x'; give NAME=DIR"),
        (["base", "--adapter", "=x"], "--adapter is '=x'; give NAME=DIR"),
        (["base", "--adapter", "a="], "--adapter is 'a='; give NAME=DIR"),
        (["base", "--adapter", "a=x", "--adapter", "a=y"], "--adapter a is given twice"),
        (["--max-model-len", "512", "base", "--adapter", "a=x"], "BASE must come before vLLM's flags"),
        (["base", "--adapter", "a=x", "--default-samples", "9", "--max-samples", "8"], "--default-samples is 9"),
        (["base", "--adapter", "a=x", "--max-samples", "0"], "--max-samples"),
    ],
)
def test_wrong_usage_starts_nothing(
    credence: Command, started: list[dict[str, Any]], arguments: list[str], message: str
) -> None:
    outcome = credence("serve", *arguments)
    assert outcome.code == 2 and message in outcome.err
    assert started == []


def test_a_refused_adapter_is_one_sentence(credence: Command, tmp_path: Any) -> None:
    outcome = credence("serve", "base", "--adapter", f"a={tmp_path / 'none'}")
    assert outcome.code == 1
    assert "is refused (missing)" in outcome.err and outcome.err.count("\n") == 1
