import io
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rich.console import Console

from credence.cli import scores as display
from credence.clients import TokenUncertainty
from tests.cli.conftest import Command, Outcome
from tests.clients.answers import UNCERTAINTY, Script, chat_completion, chunk, completion, error, events, serve, stream

TOKENS = [
    {"token": " yes", "logprob": -0.2, "total": 0.5, "epistemic": 0.0},
    {"token": " [b]\x1b[2J", "logprob": -1.5, "total": 1.4, "epistemic": 0.4},
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Script:
    return serve(monkeypatch)


def test_text_only(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=completion()))
    outcome = credence("complete", "hello", "--model", "triage", "--max-tokens", 3, "--temperature", 0)
    assert (outcome.code, outcome.out, outcome.err) == (0, " text 0\n", "")
    assert server.body == {"model": "triage", "prompt": "hello", "max_tokens": 3, "temperature": 0.0}
    assert str(server.requests[0].url) == "http://localhost:8000/v1/completions"


def test_scores_are_shown(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=completion(UNCERTAINTY)))
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


def cells(outcome: Outcome) -> list[list[str]]:
    """The cells of the tables, row by row."""
    table = [line for line in outcome.out.splitlines() if line[:1] in "┃│" and line]
    return [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in table]


def test_every_option_is_sent(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=completion(UNCERTAINTY)))
    outcome = credence(
        *("complete", "hello", "--model", "triage", "--uncertainty", "--n-samples", "auto", "--mode", "choices"),
        *(
            "--choice",
            " yes",
            "--choice",
            " no",
            "--length-normalized",
            "--tau",
            2,
            "--seed",
            3,
            "--granularity",
            "token",
        ),
        *("--return-samples", "--threshold", 0.5, "--uncalibrated", "--stop-confidence", 0.9),
    )
    assert outcome.code == 0
    assert server.body["uncertainty"] == {
        "n_samples": "auto",
        "mode": "choices",
        "choices": [" yes", " no"],
        "length_normalized": True,
        "tau": 2.0,
        "seed": 3,
        "granularity": "token",
        "return_samples": True,
        "threshold": 0.5,
        "calibrated": False,
        "stop_confidence": 0.9,
    }
    server.steps.append(httpx2.Response(200, json=completion(UNCERTAINTY)))
    assert credence("complete", "p", "--model", "m", "--uncertainty", "--n-samples", 4, "--min-samples", 2).code == 0
    assert server.body["uncertainty"] == {"n_samples": 4, "min_samples": 2}


def test_labels_are_a_table_with_their_spread(credence: Command, server: Script) -> None:
    scores = UNCERTAINTY | {
        "mode": "choices",
        "unit": "nats",
        "choices": [{"label": " yes", "prob": 0.83, "std": 0.06}, {"label": "no\x1b[2J\n", "prob": 0.17}],
        "choices_mass": 0.75,
        "samples": [{"index": 4, "probs": {" yes": 0.4, "no": 0.6}}],
        "auto": {"stages": [4, 8], "settled": False},
    }
    server.steps.append(httpx2.Response(200, json=completion(scores)))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty")
    assert "labels      0.750 of the model's probability is on them\n" in outcome.out
    assert "auto        not settled after 4, 8 samples\n" in outcome.out
    assert cells(outcome) == [
        ["label", "probability", "std over samples"],
        ["' yes'", "0.830", "0.060"],
        ["no\\x1b[2J\\n", "0.170", ""],
        ["sample", "mean logprob", "said"],
        ["4", "", "no (0.600)"],
    ]


def test_answers_are_a_table(credence: Command, server: Script) -> None:
    scores = UNCERTAINTY | {
        "mode": "generate",
        "agreement": 0.75,
        "answers": [{"answer": "[b]berne", "count": 6, "share": 0.75}, {"answer": "", "count": 2, "share": 0.25}],
        "samples": [{"index": 0, "text": " Berne\x07", "mean_logprob": -0.5}],
    }
    server.steps.append(httpx2.Response(200, json=completion(scores)))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty")
    assert "agreement   0.750 of the samples gave this answer\n" in outcome.out
    assert cells(outcome) == [
        ["answer", "count", "share"],
        ["[b]berne", "6", "0.750"],
        ["''", "2", "0.250"],
        ["sample", "mean logprob", "said"],
        ["0", "-0.5000", "' Berne\\\\x07'"],
    ]


def test_chat(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=chat_completion(UNCERTAINTY)))
    outcome = credence("complete", "hello", "--model", "triage", "--chat", "--uncertainty", "--mode", "score")
    assert server.requests[0].url.path == "/v1/chat/completions"
    assert server.body["messages"] == [{"role": "user", "content": "hello"}]
    assert server.body["uncertainty"] == {"mode": "score"}
    assert outcome.out.startswith(" text 0\n\nconfidence  0.830")


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_printed_and_its_scores_follow(credence: Command, server: Script, chat: bool) -> None:
    whole = UNCERTAINTY | {"tokens": TOKENS}
    pieces = (chunk(" yé", chat=chat), chunk("s\x1b[2J", chat=chat, finish_reason="stop", uncertainty=whole))
    server.steps.append(stream(events(*pieces, "[DONE]")))
    flag = ["--chat"] if chat else []
    outcome = credence("complete", "hello", "--model", "triage", "--stream", "--uncertainty", *flag)
    assert server.body["stream"] is True and ("messages" in server.body) == chat
    lines = outcome.out.splitlines()
    assert lines[:4] == [" yés\x1b[2J", "", "logprob\ttotal\tepistemic\ttoken", "-0.2000\t0.5000\t0.0000\t' yes'"]
    assert lines[5:7] == ["", "confidence  0.830 (calibrated, flag ok)"]


def test_a_stream_without_uncertainty_is_its_text(credence: Command, server: Script) -> None:
    server.steps.append(stream(events(chunk("a"), chunk("b"), "[DONE]")))
    outcome = credence("complete", "hello", "--model", "triage", "--stream")
    assert (outcome.code, outcome.out) == (0, "ab\n")


def test_a_stream_on_a_terminal_cannot_drive_it(
    credence: Command, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    server.steps.append(stream(events(chunk("a\x1b[2J"), "[DONE]")))
    assert credence("complete", "hello", "--model", "triage", "--stream").out == "a\\x1b[2J\n"


def test_a_stream_that_breaks_is_an_error_after_its_text(credence: Command, server: Script) -> None:
    server.steps.append(stream(events(chunk("a"), {"error": {"message": "the ensemble failed", "code": 500}})))
    outcome = credence("complete", "hello", "--model", "triage", "--stream")
    assert (outcome.code, outcome.out) == (1, "a\n")
    assert outcome.err.startswith("credence: the ensemble failed (status 500, request id ")


def test_json_to_standard_output_is_only_json(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=completion(UNCERTAINTY)))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty", "--json", "-")
    document = json.loads(outcome.out)
    assert document["choices"][0]["uncertainty"]["epistemic"] == 0.12 and document["request_id"]


def test_tokens_without_a_terminal_are_a_table(credence: Command, server: Script) -> None:
    server.steps.append(httpx2.Response(200, json=completion(UNCERTAINTY | {"tokens": TOKENS})))
    outcome = credence("complete", "hello", "--model", "triage", "--uncertainty", "--granularity", "token")
    lines = outcome.out.splitlines()
    assert lines[:4] == [" text 0", "", "logprob\ttotal\tepistemic\ttoken", "-0.2000\t0.5000\t0.0000\t' yes'"]
    assert lines[4] == "-1.5000\t1.4000\t0.4000\t' [b]\\x1b[2J'"


def test_tokens_on_a_terminal_are_coloured_and_cannot_drive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=80, highlight=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    tokens = tuple(TokenUncertainty.model_validate(token) for token in TOKENS)
    display._print_tokens(" yes [b]\x1b[2J.", tokens, 8)
    # The second token came without its space, as some tokenizers decode it alone; a token that is not in the text is passed over.
    display._print_tokens(" yes yes", (*tokens, tokens[0].model_copy(update={"token": "yes", "epistemic": 1.0})), 8)
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
    assert display._style(token, 8) == style
    assert "red" not in display._style(token, 1)


def test_the_prompt_may_come_from_standard_input(
    credence: Command, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    server.steps.append(httpx2.Response(200, json=completion()))
    assert credence("complete", "-", "--model", "triage").code == 0
    assert server.body["prompt"] == "two\nlines"


def test_the_prompt_may_come_from_a_file(credence: Command, server: Script, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes("é\r\n".encode())
    (tmp_path / "latin").write_bytes(b"\xe9")
    for argument, text in ((f"@{tmp_path / 'p'}", "é\r\n"), ("@@home", "@home"), ("a@b", "a@b")):
        server.steps.append(httpx2.Response(200, json=completion()))
        assert credence("complete", argument, "--model", "triage").code == 0
        assert server.body["prompt"] == text
    outcome = credence("complete", "@nowhere", "--model", "triage")
    assert outcome.code == 1
    assert outcome.err == (
        "credence: nowhere cannot be read: No such file or directory; a text that begins with @ is written @@nowhere\n"
    )
    outcome = credence("complete", f"@{tmp_path / 'latin'}", "--model", "triage")
    assert outcome.code == 1 and outcome.err.endswith("latin cannot be read: it is not UTF-8\n")


def test_the_key_comes_from_a_file_or_the_environment(
    credence: Command, server: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "key").write_text("k-1\n")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("CREDENCE_API_KEY", "k-2")
    monkeypatch.setenv("CREDENCE_URL", "http://elsewhere:1/v1")
    for arguments, key in ((("--api-key-file", tmp_path / "key"), "k-1"), ((), "k-2")):
        server.steps.append(httpx2.Response(200, json=completion()))
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
    server.steps.append(httpx2.Response(200, json=completion()))
    outcome = credence("complete", "p", "--model", "m", "--uncertainty")
    assert outcome.code == 1 and "came back without it" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n-samples", 4), "n_samples given without uncertainty=True"),
        (("--uncertainty", "--n-samples", "some"), "--n-samples is 'some'; give a whole number or auto"),
        (("--uncertainty", "--mode", "magic"), "mode is 'magic'"),
        (("--uncertainty", "--mode", "magic", "--stream"), "mode is 'magic'"),
        (("--uncertainty", "--mode", "choices"), "belong together"),
        (("--stream", "--json", "-"), "leave one out"),
        (("--url", "nowhere"), "base_url is 'nowhere'"),
    ],
)
def test_wrong_usage(credence: Command, server: Script, arguments: tuple[object, ...], message: str) -> None:
    outcome = credence("complete", "p", "--model", "m", *arguments)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err
    assert server.requests == []
