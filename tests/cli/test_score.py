import io
import json
from pathlib import Path

import httpx2
import pytest

from tests.cli.conftest import Command
from tests.clients.answers import UNCERTAINTY, Script, error, score, serve

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yes"}]
TOKENS = [{"token": " yes", "logprob": -0.2, "total": 0.5, "epistemic": 0.0}]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Script:
    return serve(monkeypatch)


def test_scores_are_shown(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY | {"mode": "score"})))
    outcome = credence("score", "--prompt", "hello", "--completion", " yes", "--model", "triage")
    assert server.requests[0].url.path == "/v1/uncertainty/score"
    assert server.body == {"model": "triage", "prompt": "hello", "completion": " yes"}
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "confidence  0.830 (calibrated, flag ok)",
        "total       0.4100 nats/token = aleatoric 0.2900 + epistemic 0.1200",
        "samples     8 of 8, mode score, tau 1, seed 0",
        "adapter     triage sha256:ab",
    ]


def test_every_option_is_sent(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY)))
    outcome = credence(
        *(
            "score",
            "--prompt",
            "p",
            "--completion",
            "c",
            "--model",
            "m",
            "--n-samples",
            "auto",
            "--tau",
            2,
            "--seed",
            3,
        ),
        *("--granularity", "token", "--return-samples", "--threshold", 0.5, "--uncalibrated", "--stop-confidence", 0.9),
    )
    assert outcome.code == 0
    assert server.body["uncertainty"] == {
        "n_samples": "auto",
        "tau": 2.0,
        "seed": 3,
        "granularity": "token",
        "return_samples": True,
        "threshold": 0.5,
        "calibrated": False,
        "stop_confidence": 0.9,
    }


def test_tokens_are_a_table_below_the_text(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY | {"tokens": TOKENS})))
    outcome = credence("score", "--prompt", "hello", "--completion", " yes", "--model", "m", "--granularity", "token")
    lines = outcome.out.splitlines()
    assert lines[:4] == [" yes", "", "logprob\ttotal\tepistemic\ttoken", "-0.2000\t0.5000\t0.0000\t' yes'"]
    assert lines[4:6] == ["", "confidence  0.830 (calibrated, flag ok)"]


@pytest.mark.parametrize("prefix", ["", "@"])
def test_a_conversation_comes_from_a_file(credence: Command, server: Script, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(CONVERSATION))
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY | {"tokens": TOKENS})))
    outcome = credence("score", "--messages", f"{prefix}{tmp_path / 'chat.json'}", "--model", "m")
    assert server.body == {"model": "m", "messages": CONVERSATION}
    assert outcome.out.startswith(" yes\n\nlogprob")


def test_texts_come_from_files_and_standard_input(
    credence: Command, server: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").write_text(" yes\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY)))
    assert credence("score", "--prompt", "-", "--completion", f"@{tmp_path / 'c'}", "--model", "m").code == 0
    assert (server.body["prompt"], server.body["completion"]) == ("two\nlines", " yes\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(CONVERSATION)))
    server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY)))
    assert credence("score", "--messages", "-", "--model", "m").code == 0
    assert server.body["messages"] == CONVERSATION


def test_json(credence: Command, server: Script, tmp_path: Path) -> None:
    for target in ("-", str(tmp_path / "out.json")):
        server.steps.append(httpx2.Response(200, json=score(UNCERTAINTY)))
        outcome = credence("score", "--prompt", "p", "--completion", "c", "--model", "m", "--json", target)
        document = json.loads(outcome.out if target == "-" else Path(target).read_text())
        assert document["uncertainty"]["epistemic"] == 0.12 and document["request_id"]


def test_errors_of_the_server(credence: Command, server: Script) -> None:
    server.steps.append(error(404, {"detail": "Not Found"}, x_request_id="r-1"))
    outcome = credence("score", "--prompt", "p", "--completion", "c", "--model", "m")
    assert (outcome.code, outcome.err) == (1, "credence: Not Found (status 404, request id r-1)\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either prompt and completion, or messages"),
        (("--prompt", "p"), "either prompt and completion, or messages"),
        (("--prompt", "-", "--completion", "-"), "standard input can be only one of"),
        (("--prompt", "p", "--completion", "c", "--n-samples", "some"), "--n-samples is 'some'"),
        (("--prompt", "p", "--completion", "c", "--threshold", 2), "threshold is 2.0"),
    ],
)
def test_wrong_usage(credence: Command, server: Script, arguments: tuple[object, ...], message: str) -> None:
    outcome = credence("score", "--model", "m", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert server.requests == []


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("[", 1, "is not JSON: Expecting value in line 1; give a list of"),
        ("{}", 2, "messages: give a list of messages"),
        ('[{"role": "user", "content": "hi"}]', 2, "the last of messages is from 'user'"),
        (None, 1, "cannot be read: No such file or directory\n"),
    ],
)
def test_wrong_conversations(
    credence: Command, server: Script, tmp_path: Path, content: str | None, code: int, message: str
) -> None:
    if content is not None:
        (tmp_path / "chat.json").write_text(content)
    outcome = credence("score", "--messages", str(tmp_path / "chat.json"), "--model", "m")
    assert outcome.code == code and message in outcome.err
    assert server.requests == []
