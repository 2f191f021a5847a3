import io
import json
from typing import Any

import httpx
import pytest
from rich.console import Console

from credence.cli import complete as command
from credence.clients import TokenUncertainty
from credence.clients import client as client_module
from tests.cli.conftest import Command
from tests.clients.answers import UNCERTAINTY, Script, completion, error

TOKENS = [
    {"token": " yes", "logprob": -0.2, "total": 0.5, "epistemic": 0.0},
    {"token": " [b]\x1b[2J", "logprob": -1.5, "total": 1.4, "epistemic": 0.4},
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A scripted server behind every client the command opens."""
    script = Script()
    real = httpx.Client

    def connect(**options: Any) -> httpx.Client:
        return real(**(options | {"transport": httpx.MockTransport(script)}))

    monkeypatch.setattr(client_module.httpx, "Client", connect)
    monkeypatch.delenv("CREDENCE_API_KEY", raising=False)
    monkeypatch.delenv("CREDENCE_URL", raising=False)
    return script


def test_text_only(credence: Command, server: Script) -> None:
    server.steps.append(httpx.Response(200, json=completion()))
    outcome = credence("complete", "hello", "--model", "triage", "--max-tokens", 3, "--temperature", 0)
    assert (outcome.code, outcome.out, outcome.err) == (0, " text 0\n", "")
    assert server.body == {"model": "triage", "prompt": "hello", "max_tokens": 3, "temperature": 0.0}
    assert str(server.requests[0].url) == "http://localhost:8000/v1/completions"


def test_scores_are_shown(credence: Command, server: Script) -> None:
    server.steps.append(httpx.Response(200, json=completion(UNCERTAINTY)))
    outcome = credence(
        "complete", "hello", "--model", "triage", "--uncertainty", "--n-samples", 8, "--mode", "ensemble"
    )
    assert server.body["uncertainty"] == {"n_samples": 8, "mode": "ensemble"}
    assert outcome.out.splitlines() == [
        " text 0",
        "",
        "confidence  0.830 (calibrated, flag ok)",
        "total       0.4100 nats/token = aleatoric 0.2900 + epistemic 0.1200",
        "samples     8 of 8, mode ensemble, tau 1, seed 0",
        "adapter     triage sha256:ab",
    ]


def test_labels_are_shown_with_their_spread(credence: Command, server: Script) -> None:
    scores = UNCERTAINTY | {"choices": [{"label": "yes", "prob": 0.83, "std": 0.06}, {"label": "no", "prob": 0.17}]}
    server.steps.append(httpx.Response(200, json=completion(scores)))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty")
    assert "p(yes)      0.830 +- 0.060\np(no)       0.170\n" in outcome.out


def test_json_to_standard_output_is_only_json(credence: Command, server: Script) -> None:
    server.steps.append(httpx.Response(200, json=completion(UNCERTAINTY)))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty", "--json", "-")
    document = json.loads(outcome.out)
    assert document["choices"][0]["uncertainty"]["epistemic"] == 0.12 and document["request_id"]


def test_tokens_without_a_terminal_are_a_table(credence: Command, server: Script) -> None:
    server.steps.append(httpx.Response(200, json=completion(UNCERTAINTY | {"tokens": TOKENS})))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty", "--granularity", "token")
    lines = outcome.out.splitlines()
    assert lines[:4] == [" text 0", "", "logprob\ttotal\tepistemic\ttoken", "-0.2000\t0.5000\t0.0000\t' yes'"]
    assert lines[4] == "-1.5000\t1.4000\t0.4000\t' [b]\\x1b[2J'"


def test_tokens_on_a_terminal_are_coloured_and_cannot_drive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=80, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    tokens = tuple(TokenUncertainty.model_validate(token) for token in TOKENS)
    command._print_tokens(" yes [b]\x1b[2J.", tokens, 8)
    # The second token came without its space, as some tokenizers decode it alone; a token that is not in the text is passed over.
    command._print_tokens(" yes yes", (*tokens, tokens[0].model_copy(update={"token": "yes", "epistemic": 1.0})), 8)
    first, legend, second, _ = screen.getvalue().splitlines()
    assert first == " yes\x1b[4;31m [b]\\x1b[2J\x1b[0m."
    assert "\x1b[33mfrom 2% of ln K\x1b[0m" in legend
    assert second == " yes \x1b[31myes\x1b[0m"


@pytest.mark.parametrize(
    ("epistemic", "total", "style"),
    [(0.0, 0.0, ""), (0.05, 0.5, "yellow"), (0.3, 0.5, "red"), (0.0, 1.0, "underline"), (0.3, 2.0, "red underline")],
)
def test_styles(epistemic: float, total: float, style: str) -> None:
    token = TokenUncertainty(token="x", logprob=-1.0, total=total, epistemic=epistemic)
    assert command._style(token, 8) == style
    assert "red" not in command._style(token, 1)


def test_the_prompt_may_come_from_standard_input(
    credence: Command, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    server.steps.append(httpx.Response(200, json=completion()))
    assert credence("complete", "-", "--model", "triage").code == 0
    assert server.body["prompt"] == "two\nlines"


def test_the_key_comes_from_a_file_or_the_environment(
    credence: Command, server: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "key").write_text("k-1\n")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("CREDENCE_API_KEY", "k-2")
    monkeypatch.setenv("CREDENCE_URL", "http://elsewhere:1/v1")
    for arguments, key in ((("--api-key-file", tmp_path / "key"), "k-1"), ((), "k-2")):
        server.steps.append(httpx.Response(200, json=completion()))
        assert credence("complete", "p", "--model", "m", *arguments).code == 0
        assert server.requests[-1].headers["authorization"] == f"Bearer {key}"
        assert server.requests[-1].url.host == "elsewhere"
    outcome = credence("complete", "p", "--model", "m", "--api-key-file", tmp_path / "empty")
    assert outcome.code == 1 and "must hold one key on one line, it holds 0" in outcome.err


def test_errors(credence: Command, server: Script) -> None:
    body = {"error": {"message": "no model m", "type": "NotFoundError", "param": "model", "code": 404}}
    server.steps.append(error(404, body, x_request_id="r-1"))
    outcome = credence("complete", "p", "--model", "m")
    assert (outcome.code, outcome.err) == (1, "credence: no model m (status 404, param model, request id r-1)\n")
    server.steps.append(httpx.Response(200, json=completion()))
    outcome = credence("complete", "p", "--model", "m", "--uncertainty")
    assert outcome.code == 1 and "came back without it" in outcome.err
    for arguments in (("--n-samples", 4), ("--uncertainty", "--mode", "magic"), ("--url", "nowhere")):
        outcome = credence("complete", "p", "--model", "m", *arguments)
        assert outcome.code == 2 and outcome.err.count("\n") == 1
