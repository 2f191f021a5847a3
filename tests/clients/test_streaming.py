import json
import random
from typing import Any

import httpx2
import pytest

from credence.clients import (
    BadRequestError,
    CredenceError,
    InvalidResponseError,
    RequestTimeoutError,
    ServerError,
    ServiceUnavailableError,
    Stream,
    TransportError,
    UncertaintyMissingError,
)
from credence.clients.streaming import EventDecoder
from tests.clients.answers import UNCERTAINTY, Body, Script, chunk, error, events, stream
from tests.clients.conftest import Connect

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def body_of(response: httpx2.Response) -> Body:
    body: Body = response.extensions["body"]
    return body


def decoded(*parts: bytes) -> list[bytes]:
    decoder = EventDecoder()
    return [event for part in parts for event in decoder.feed(part)]


def token(text: str, epistemic: float) -> dict[str, Any]:
    return {"token": text, "logprob": -0.1, "total": 0.5, "epistemic": epistemic}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"data: one\n\n", [b"one"]),
        (b"data:one\r\n\r\ndata:  two\r\r", [b"one", b" two"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": ping\n\ndata: a\n: between\nevent: x\nid: 1\nretry\n\n", [b"a"]),
        (b"data: unfinished\n", []),
        (b"data\ndata: a\n\n", [b"\na"]),
        (b"\n\n\n", []),
        ("data: \u2028\x0b\x0c\x85\x1e\n\n".encode(), ["\u2028\x0b\x0c\x85\x1e".encode()]),
        (b"", []),
    ],
)
def test_events_of_a_stream(data: bytes, expected: list[bytes]) -> None:
    assert decoded(data) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_do_not_depend_on_where_the_bytes_are_cut(end: str) -> None:
    text = "".join(
        line + end
        for line in (": hello", "", "data: é\u2028漢🙂", "", "data: {", "data: }", "id: 7", "", "data: [DONE]", "")
    )
    data = text.encode()
    expected = ["é\u2028漢🙂".encode(), b"{\n}", b"[DONE]"]
    assert decoded(*[data[index : index + 1] for index in range(len(data))]) == expected
    for cut in range(len(data) + 1):
        assert decoded(data[:cut], b"", data[cut:]) == expected
    generator = random.Random(0)
    for _ in range(50):
        cuts = sorted(generator.choices(range(len(data) + 1), k=generator.randrange(1, 12)))
        assert decoded(*[data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]) == expected


def test_stream_complete_sends_a_stream_and_hands_out_chunks(client: Connect) -> None:
    response = stream(
        events(chunk(" Bé"), chunk("rne"), chunk("", finish_reason="stop"), chunk(usage=USAGE), "[DONE]"),
        x_request_id="r-5",
    )
    script = Script(response)
    with client(script).stream_complete("p", model="m", max_tokens=4, logprobs=1) as opened:
        chunks = list(opened)
    assert script.body == {
        "model": "m",
        "prompt": "p",
        "max_tokens": 4,
        "logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [part.text for part in chunks] == [" Bé", "rne", "", ""]
    assert [choice.finish_reason for part in chunks for choice in part.choices] == [None, None, "stop"]
    assert opened.usage is not None and opened.usage.total_tokens == 7
    assert (opened.request_id, opened.uncertainty, opened.uncertainties) == ("r-5", None, {})
    assert body_of(response).closed


def test_stream_chat(client: Connect) -> None:
    first = chunk("", chat=True)
    first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
    last = chunk("", chat=True, finish_reason="stop", uncertainty=UNCERTAINTY)
    last["choices"][0]["delta"] = {}
    response = stream(events(first, chunk("hé", chat=True), chunk("llo", chat=True), last, "[DONE]"))
    script = Script(response)
    messages = [{"role": "user", "content": "hi"}]
    with client(script).stream_chat(messages, model="m", uncertainty=True, mode="score", logprobs=True) as opened:
        assert body_of(response).taken == 0
        chunks = list(opened)
    assert script.body == {
        "model": "m",
        "messages": messages,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "uncertainty": {"mode": "score"},
    }
    assert str(script.requests[0].url) == "http://server:8000/v1/chat/completions"
    assert "".join(part.text for part in chunks) == "héllo"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert opened.uncertainty is not None and opened.uncertainty.epistemic == 0.12


def test_token_scores_arrive_with_their_chunks_and_the_whole_object_with_the_last(client: Connect) -> None:
    scores = [token(" a", 0.1), token(" b", 0.2), token(" c", 0.3)]
    other = [token(" z", 0.9)]
    pieces = (
        chunk(" a", uncertainty={"tokens": scores[:1]}),
        chunk(" z", index=1, finish_reason="stop", uncertainty=UNCERTAINTY | {"tokens": other}),
        chunk(" b", uncertainty={"tokens": scores[1:2]}),
        # The last chunk of a choice has text and a token of its own.
        chunk(" c", finish_reason="length", uncertainty=UNCERTAINTY | {"tokens": scores}),
    )
    opened = client(Script(stream(events(*pieces, "[DONE]")))).stream_complete(
        "p", model="m", uncertainty=True, granularity="token", n=2
    )
    arrived: dict[int, list[str]] = {0: [], 1: []}
    whole = []
    first = ""
    for part in opened:
        first += part.text
        for choice in part.choices:
            arrived[choice.index] += [item.token for item in choice.tokens]
            whole.append(choice.uncertainty is not None)
    assert arrived == {0: [" a", " b", " c"], 1: [" z"]}
    assert whole == [False, True, False, True]
    assert first == " a b c"
    assert {index: len(scores.tokens or ()) for index, scores in opened.uncertainties.items()} == {0: 3, 1: 1}


def test_scores_that_come_after_the_text(client: Connect) -> None:
    scores = UNCERTAINTY | {"mode": "score", "tokens": [token(" a", 0.1), token(" b", 0.2)]}
    pieces = (chunk(" a"), chunk(" b", finish_reason="length"), chunk("", uncertainty=scores), chunk(usage=USAGE))
    opened = client(Script(stream(events(*pieces, "[DONE]")))).stream_complete(
        "p", model="m", uncertainty=True, mode="score"
    )
    chunks = list(opened)
    assert "".join(part.text for part in chunks) == " a b"
    assert [item.token for item in chunks[2].choices[0].tokens] == [" a", " b"]
    assert opened.uncertainty is not None and opened.uncertainty.mode == "score"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_chunks_do_not_depend_on_where_the_bytes_are_cut(client: Connect, size: int) -> None:
    data = b": ping\r\n\r\n" + events(chunk("漢"), chunk("🙂\u2028é"), "[DONE]")
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    opened = client(Script(stream(*parts))).stream_complete("p", model="m")
    assert [part.text for part in opened] == ["漢", "🙂\u2028é"]


@pytest.mark.parametrize(
    ("document", "expected", "message"),
    [
        ({"error": {"message": "too long", "param": "prompt", "code": 400}}, BadRequestError, "too long"),
        ({"error": {"message": "draining", "code": 503}}, ServiceUnavailableError, "draining"),
        ({"error": {"message": "the ensemble failed", "code": 500}}, ServerError, "the ensemble failed"),
        ({"error": {"message": "engine", "code": "engine_died"}}, ServerError, "engine"),
    ],
)
def test_an_error_in_the_stream_is_raised_and_never_repeated(
    client: Connect, document: dict[str, Any], expected: type[CredenceError], message: str, sleeps: list[float]
) -> None:
    response = stream(events(chunk(" a"), document, "[DONE]"), x_request_id="r-6")
    script = Script(response)
    opened = client(script).stream_complete("p", model="m", uncertainty=True)
    assert next(opened).text == " a"
    with pytest.raises(expected, match=message) as caught:
        next(opened)
    assert type(caught.value) is expected and caught.value.request_id == "r-6"
    assert body_of(response).closed and len(script.requests) == 1 and sleeps == []
    assert list(opened) == []


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (httpx2.ReadError("reset"), TransportError, "reset; whether the server did the work is unknown"),
        (httpx2.RemoteProtocolError("gone"), TransportError, "gone"),
        (httpx2.ReadTimeout("slow"), RequestTimeoutError, "no answer from .*/v1/completions within 60 s"),
    ],
)
def test_a_stream_that_breaks_is_never_repeated(
    client: Connect, failure: Exception, expected: type[CredenceError], message: str, sleeps: list[float]
) -> None:
    response = stream(events(chunk(" a")), b"data: {", failure)
    script = Script(response)
    opened = client(script).stream_complete("p", model="m", uncertainty=True)
    assert next(opened).text == " a"
    with pytest.raises(expected, match=message):
        next(opened)
    assert body_of(response).closed and len(script.requests) == 1 and sleeps == []
    assert list(opened) == []


@pytest.mark.parametrize("rest", [b"", b"data: [DONE]", b"data: {"])
def test_a_stream_that_ends_early_is_no_answer(client: Connect, rest: bytes) -> None:
    last = chunk("", finish_reason="stop", uncertainty=UNCERTAINTY)
    opened = client(Script(stream(events(last), rest))).stream_complete("p", model="m", uncertainty=True)
    assert next(opened).choices[0].finish_reason == "stop"
    with pytest.raises(TransportError, match="broke before the answer was complete: the stream ended early"):
        next(opened)


@pytest.mark.parametrize(
    ("pieces", "missing"),
    [
        ((chunk(" a", finish_reason="stop"), chunk(usage=USAGE)), (0,)),
        ((chunk(" a", uncertainty={"tokens": [token(" a", 0.1)]}),), (0,)),
        ((chunk(" a", uncertainty=UNCERTAINTY), chunk(" b", index=1), chunk(" c", index=2)), (1, 2)),
        ((), (0,)),
    ],
)
def test_a_server_that_ignores_uncertainty_is_an_error(
    client: Connect, pieces: tuple[dict[str, Any], ...], missing: tuple[int]
) -> None:
    for uncertainty in (True, False):
        response = stream(events(*pieces, "[DONE]"), x_request_id="r-7")
        opened = client(Script(response)).stream_complete("p", model="m", uncertainty=uncertainty)
        for _ in pieces:
            next(opened)
        if uncertainty:
            with pytest.raises(UncertaintyMissingError, match="plain vLLM") as caught:
                next(opened)
            assert (caught.value.choice_indices, caught.value.request_id) == (missing, "r-7")
        else:
            assert list(opened) == []
        assert body_of(response).closed


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ('{"id": "x", "model": "m"}', "choices: field required"),
        ("nonsense", "the body"),
        (json.dumps(chunk(" a", uncertainty=UNCERTAINTY | {"total": "high"})), r"choices\.0\.uncertainty\.total"),
        (json.dumps(chunk(" a", uncertainty={"tokens": [{"token": "secret"}]})), r"choices\.0\.tokens\.0\.logprob"),
    ],
)
def test_an_unexpected_chunk_is_named_without_its_text(client: Connect, piece: str, message: str) -> None:
    opened = client(Script(stream(events(piece, "[DONE]")))).stream_complete("p", model="m")
    with pytest.raises(InvalidResponseError, match=message) as caught:
        next(opened)
    assert "secret" not in str(caught.value)


def test_bytes_that_are_no_text_are_an_invalid_answer(client: Connect) -> None:
    opened = client(Script(stream(b'data: {"id": "\xff"}\n\n'))).stream_complete("p", model="m")
    with pytest.raises(InvalidResponseError, match="the body"):
        next(opened)


def test_an_answer_that_is_no_stream_is_refused(client: Connect) -> None:
    response = stream(b"{}", Content_Type="application/json")
    with pytest.raises(InvalidResponseError, match="the body is application/json, not text/event-stream"):
        client(Script(response)).stream_complete("p", model="m")
    assert body_of(response).closed


def test_errors_before_the_stream_begins_are_raised_by_the_call_and_retried_where_safe(
    client: Connect, sleeps: list[float]
) -> None:
    refused = stream(b'{"error": {"message": "no ', b'such mode", "param": "uncertainty.mode"}}')
    refused.status_code = 400
    with pytest.raises(BadRequestError, match="no such mode") as caught:
        client(Script(refused)).stream_complete("p", model="m")
    assert caught.value.param == "uncertainty.mode" and body_of(refused).closed
    script = Script(error(503, Retry_After="3"), httpx2.ConnectError("refused"), stream(events("[DONE]")))
    assert list(client(script).stream_complete("p", model="m")) == []
    assert len(sleeps) == 2 and sleeps[0] == 3.0
    script = Script(httpx2.ReadTimeout("slow"))
    with pytest.raises(RequestTimeoutError):
        client(script).stream_complete("p", model="m")
    assert len(sleeps) == 2


def test_an_error_page_that_breaks_off_is_a_transport_error(client: Connect) -> None:
    refused = stream(b"<html>", httpx2.ReadError("reset"))
    refused.status_code = 500
    with pytest.raises(TransportError, match="reset"):
        client(Script(refused)).stream_complete("p", model="m")
    assert body_of(refused).closed


def test_leaving_a_stream_closes_the_connection_without_reading_on(client: Connect) -> None:
    response = stream(events(chunk(" a")), events(chunk(" b")), events("[DONE]"))
    with client(Script(response)).stream_complete("p", model="m", uncertainty=True) as opened:
        for part in opened:
            assert part.text == " a"
            break
    assert body_of(response).closed and body_of(response).taken == 1
    assert list(opened) == []
    opened.close()


def test_what_follows_the_end_mark_is_read_and_ignored(client: Connect) -> None:
    for rest in ((events(chunk(" b")), b""), (httpx2.ReadError("reset"),)):
        response = stream(events(chunk(" a"), "[DONE]"), *rest)
        opened: Stream[Any] = client(Script(response)).stream_complete("p", model="m")
        assert [part.text for part in opened] == [" a"]
        assert body_of(response).taken == 1 + len(rest)
