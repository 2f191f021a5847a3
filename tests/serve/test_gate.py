"""The gate in front of an application that, like vLLM, accepts any field: a fake backend, real HTTP semantics, no engine."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from credence.serve.errors import BadRequest, ServeError, Unavailable
from credence.serve.gate import Answer, EventStream, Gate, Scope
from credence.serve.in_flight import InFlight
from credence.serve.keys import KeyRing, plain_key
from credence.serve.metrics import Metrics
from credence.serve.schemas import UncertaintyOptions
from credence.serve.security import Security


class FakeBackend:
    """Records what reaches it and answers at once, after ``delay_s``, or with ``failure``."""

    max_body_bytes = 4096

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, [("triage", "ivon", "sha256:" + "a" * 64)])
        self.draining = False
        self.security = Security(max_body_bytes=4096)
        self.in_flight = InFlight()
        self.calls: list[tuple[dict[str, Any], UncertaintyOptions]] = []
        self.failure: Exception | None = None
        self.delay_s = 0.0
        self.cancelled = False
        self.stream: FakeStream | None = None

    def most_samples(self, model: object, options: UncertaintyOptions) -> int:
        return options.n_samples if isinstance(options.n_samples, int) else 8

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        self.calls.append((body, options))
        if self.stream is not None:
            return self.stream
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.failure is not None:
            raise self.failure
        k = options.n_samples if isinstance(options.n_samples, int) else 8
        return Answer(body={"id": "cmpl-1", "choices": [{"uncertainty": {"total": 0.5}}]}, num_samples=k)

    def error_of(self, error: Exception) -> ServeError:
        return error if isinstance(error, ServeError) else ServeError(f"translated {error}")

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class FakeStream:
    """A stream of two events, the second after ``delay_s``."""

    num_samples = 8

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.closed = 0

    async def events(self) -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        await asyncio.sleep(self.delay_s)
        yield b"data: 2\n\n"

    async def close(self) -> None:
        self.closed += 1


async def echo(request: Request) -> Response:
    """What an application behind the gate sees: the exact bytes."""
    return Response(await request.body(), media_type="application/octet-stream")


async def stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        for number in range(3):
            yield f"data: {number}\n\n".encode()

    return StreamingResponse(chunks(), media_type="text/event-stream")


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def app(backend: FakeBackend) -> Gate:
    paths = ["/v1/completions", "/tokenize", "/v1/responses", "/v1/messages", "/invocations", "/pause"]
    routes = [Route(path, echo, methods=["POST"]) for path in paths]
    routes += [Route("/v1/chat/completions", stream, methods=["POST"]), Route("/livez", lambda _: JSONResponse({}))]
    return Gate(Starlette(routes=routes), backend=lambda scope: backend)


def post(app: Gate, path: str, content: bytes | dict, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            headers = {"content-type": "application/json", **options.pop("headers", {})}
            return await client.post(path, content=data, headers=headers, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "content",
    [
        b'{ "model":"triage",  "prompt":"hello" }',
        b'{"model":"triage","prompt":"the word uncertainty in a prompt"}',
        b'{"model":"triage","uncertainty":false}',
        b'{"model":"triage","uncertainty":null}',
        b'{"prompt":"\\u00e9"}',
    ],
)
def test_requests_without_uncertainty_pass_byte_for_byte(app: Gate, backend: FakeBackend, content: bytes) -> None:
    response = post(app, "/v1/completions", content)
    assert response.content == content
    assert not backend.calls
    labels = {"endpoint": "/v1/completions", "mode": "mean", "k": "0", "outcome": "ok"}
    assert backend.count("credence_request_duration_seconds_count", **labels) == 1


def test_a_stream_passes_the_gate(app: Gate) -> None:
    assert post(app, "/v1/chat/completions", b"{}").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize(
    ("content", "path", "n_samples"),
    [
        (b'{"model":"triage","uncertainty":true}', "/v1/completions", None),
        (b'{"model":"triage","uncertainty":{"n_samples":3}}', "/v1/completions", 3),
        (b'{"model":"triage","\\u0075ncertainty":{"n_samples":3}}', "/v1/completions", 3),
        (b'{"model":"triage"}', "/v1/completions?uncertainty=true", None),
    ],
)
def test_uncertainty_goes_to_the_backend(
    app: Gate, backend: FakeBackend, content: bytes, path: str, n_samples: int | None
) -> None:
    response = post(app, path, content)
    assert response.status_code == 200
    assert response.json()["choices"][0]["uncertainty"] == {"total": 0.5}
    [(body, options)] = backend.calls
    assert body == {"model": "triage"}
    assert options.n_samples == n_samples
    labels = {"endpoint": "/v1/completions", "mode": "ensemble", "k": "4" if n_samples else "8", "outcome": "ok"}
    assert backend.count("credence_request_duration_seconds_count", **labels) == 1


@pytest.mark.parametrize("query", ["", "?uncertainty=true"])
def test_uncertainty_is_never_ignored_on_other_routes(app: Gate, backend: FakeBackend, query: str) -> None:
    content = {"model": "triage"} if query else {"model": "triage", "uncertainty": True}
    response = post(app, "/tokenize" + query, content)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "uncertainty"
    assert "/v1/completions" in response.json()["error"]["message"]
    assert not backend.calls


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/invocations", "/pause", "/v1/completions/", "//v1/completions", "/"]
)
def test_routes_outside_the_table_do_not_exist(app: Gate, path: str) -> None:
    """The application behind the gate answers several of these."""
    response = post(app, path, {"model": "triage"})
    assert response.status_code == 404
    assert "no route" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("value", "param", "said"),
    [
        ({"n_sampels": 3}, "uncertainty.n_sampels", "n_samples"),
        ({"n_samples": 0}, "uncertainty.n_samples", "greater than or equal to 1"),
        ({"n_samples": "8"}, "uncertainty.n_samples", "'8'"),
        ({"n_samples": True}, "uncertainty.n_samples", "True"),
        ({"mode": "mean"}, "uncertainty.mode", "ensemble"),
        ({"mode": "choices"}, "uncertainty.choices", "belong together"),
        ({"choices": ["a", "b"]}, "uncertainty.choices", "belong together"),
        ({"mode": "choices", "choices": ["a"]}, "uncertainty.choices", "at least 2"),
        ({"mode": "choices", "choices": ["a", "a"]}, "uncertainty.choices", "twice"),
        ({"mode": "choices", "choices": ["a", ""]}, "uncertainty.choices", "at least 1 character"),
        ({"mode": "score", "length_normalized": True}, "uncertainty.length_normalized", "mode 'choices'"),
        ({"n_samples": "auto"}, "uncertainty.n_samples", "give a number"),
        ({"n_samples": "all"}, "uncertainty.n_samples", "'all'"),
        ({"n_samples": "auto", "mode": "score"}, "uncertainty.threshold", "give a threshold"),
        ({"n_samples": "auto", "mode": "generate", "min_samples": 2}, "uncertainty.min_samples", "leave one out"),
        ({"stop_confidence": 1.0}, "uncertainty.stop_confidence", "less than 1"),
        ({"tau": -1}, "uncertainty.tau", "greater than or equal to 0"),
        ({"threshold": 2}, "uncertainty.threshold", "less than or equal to 1"),
        ({"granularity": "word"}, "uncertainty.granularity", "token"),
        ("yes", "uncertainty", "str"),
        (8, "uncertainty", "int"),
    ],
)
def test_bad_options_name_the_key(app: Gate, backend: FakeBackend, value: object, param: str, said: str) -> None:
    response = post(app, "/v1/completions", {"model": "triage", "uncertainty": value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert said in response.json()["error"]["message"]
    assert backend.count("credence_rejections_total", reason="bad_request") == 1


def test_not_a_number_is_refused(app: Gate) -> None:
    response = post(app, "/v1/completions", b'{"model":"triage","uncertainty":{"tau":NaN}}')
    assert response.status_code == 400
    assert "NaN" in response.json()["error"]["message"]


def test_bad_query_value(app: Gate) -> None:
    assert post(app, "/v1/completions?uncertainty=maybe", {"model": "triage"}).status_code == 400


def test_large_bodies_are_refused(app: Gate, backend: FakeBackend) -> None:
    response = post(app, "/v1/completions", b'{"prompt":"' + b"x" * 5000 + b'"}')
    assert response.status_code == 413
    assert backend.count("credence_rejections_total", reason="too_large") == 1


def test_a_full_server_refuses_before_it_reads(app: Gate, backend: FakeBackend) -> None:
    backend.security.max_inflight = 0
    for content in ({"model": "triage"}, b"no JSON"):
        response = post(app, "/v1/completions", content)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert backend.count("credence_rejections_total", reason="overload") == 2 and not backend.calls
    backend.security.max_inflight = 1
    assert post(app, "/v1/completions", {"model": "triage"}).status_code == 200
    assert len(backend.in_flight) == 0


def test_draining_server_says_so(app: Gate, backend: FakeBackend) -> None:
    backend.draining = True
    for content in ({"model": "triage"}, {"model": "triage", "uncertainty": True}):
        response = post(app, "/v1/completions", content)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (BadRequest("no", param="prompt"), 400, "no"),
        (Unavailable("full", reason="overload"), 503, "full"),
        (RuntimeError("boom"), 500, "translated boom"),
    ],
)
def test_failures_keep_the_envelope(
    app: Gate, backend: FakeBackend, failure: Exception, status: int, message: str
) -> None:
    backend.failure = failure
    response = post(app, "/v1/completions", {"model": "triage", "uncertainty": True})
    assert response.status_code == status
    assert response.json()["error"]["message"] == message
    assert response.json()["error"]["code"] == status


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v1/completions", {}, 401),
        ("/tokenize", {}, 401),
        ("/tokenize", {"authorization": "Bearer wrong"}, 401),
        ("/tokenize", {"authorization": "secret"}, 401),
        ("/tokenize", {"authorization": "Bearer secret"}, 200),
    ],
)
def test_every_route_needs_the_key(
    app: Gate, backend: FakeBackend, path: str, header: dict[str, str], status: int
) -> None:
    """vLLM guards /v1 only."""
    backend.security.users = KeyRing(None, [plain_key("secret", name="default")])
    assert post(app, path, b"{}", headers=header).status_code == status


def test_health_needs_no_key(app: Gate, backend: FakeBackend) -> None:
    backend.security.users = KeyRing(None, [plain_key("secret", name="default")])

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/livez")

    assert asyncio.run(ask()).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_events_are_sent_as_they_come_and_timed(app: Gate, backend: FakeBackend, path: str) -> None:
    backend.stream = FakeStream()
    response = post(app, path, {"model": "triage", "stream": True, "uncertainty": {"mode": "score"}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text == "data: 1\n\ndata: 2\n\n"
    assert backend.stream.closed == 1
    labels = {"endpoint": path, "mode": "score", "k": "8", "outcome": "ok"}
    assert backend.count("credence_request_duration_seconds_count", **labels) == 1
    assert backend.count("credence_time_to_first_token_seconds_count", mode="score", k="8") == 1


def test_the_first_event_of_a_plain_stream_is_timed(backend: FakeBackend) -> None:
    app = Gate(
        Starlette(routes=[Route("/v1/completions", stream, methods=["POST"])]),
        backend=lambda scope: backend,
    )
    post(app, "/v1/completions", {"model": "triage", "stream": True})
    assert backend.count("credence_time_to_first_token_seconds_count", mode="mean", k="0") == 1


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        ({"model": "triage"}, 200, None),
        ({"model": "triage", "uncertainty": True}, 200, None),
        ({"model": "triage", "uncertainty": {"n_samples": 3, "mode": "score"}}, 200, None),
        ({"model": "triage", "uncertainty": {"mode": "ensemble"}}, 400, "uncertainty.mode"),
        ({"model": "triage", "uncertainty": {"n_sampels": 3}}, 400, "uncertainty.n_sampels"),
        ({"model": "triage", "uncertainty": False}, 400, "uncertainty"),
        (b"[]", 400, None),
        (b"{", 400, None),
    ],
)
def test_the_score_route_has_one_mode(
    app: Gate, backend: FakeBackend, content: dict | bytes, status: int, param: str | None
) -> None:
    response = post(app, "/v1/uncertainty/score", content)
    assert response.status_code == status
    assert [options.mode for _, options in backend.calls] == (["score"] if status == 200 else [])
    if status == 400:
        assert response.json()["error"]["param"] == param


def test_a_reader_that_goes_away_closes_the_stream(app: Gate, backend: FakeBackend) -> None:
    backend.stream = FakeStream(delay_s=60)
    sent = disconnecting(app, backend)
    assert [message.get("body") for message in sent[1:]] == [b"data: 1\n\n"]
    assert backend.stream.closed == 1
    labels = {"endpoint": "/v1/completions", "mode": "ensemble", "k": "8", "outcome": "disconnected"}
    assert backend.count("credence_request_duration_seconds_count", **labels) == 1


def test_a_reader_that_stops_reading_loses_its_stream(
    app: Gate, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("credence.serve.gate.STALLED_S", 0.02)
    backend.stream = FakeStream()
    request = {"type": "http.request", "body": b'{"model":"triage","uncertainty":true}', "more_body": False}

    async def receive() -> dict[str, Any]:
        if request:
            message = dict(request)
            request.clear()
            return message
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    asyncio.run(asyncio.wait_for(app(scope_of("/v1/completions"), receive, send), timeout=5))
    assert backend.stream.closed == 1 and backend.count("credence_client_disconnects_total") == 1


@pytest.mark.parametrize("status", [429, 503])
def test_the_applications_refusals_say_when_to_come_back(backend: FakeBackend, status: int) -> None:
    refusing = Starlette(
        routes=[Route("/v1/completions", lambda _: JSONResponse({}, status_code=status), methods=["POST"])]
    )
    response = post(Gate(refusing, backend=lambda scope: backend), "/v1/completions", {"model": "base"})
    assert (response.status_code, response.headers["retry-after"]) == (status, "1")


def test_a_clock_that_jumps_changes_no_measurement(
    app: Gate, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes back an hour with every look at it."""
    now = itertools.count(1e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    backend.stream = FakeStream(delay_s=0.01)
    assert post(app, "/v1/completions", {"model": "triage", "stream": True, "uncertainty": True}).status_code == 200
    labels = {"endpoint": "/v1/completions", "mode": "ensemble", "k": "8", "outcome": "ok"}
    assert 0 < backend.count("credence_request_duration_seconds_sum", **labels) < 60
    assert 0 < backend.count("credence_time_to_first_token_seconds_sum", mode="ensemble", k="8") < 60


def test_nothing_but_the_date_of_an_answer_is_read_from_the_wall_clock() -> None:
    """Deadlines, waits and measurements are monotonic, so a clock jump reaches none of them.

    The clock dates answers, lines of the audit log, and when an adapter was loaded.
    """
    found = []
    for path in (Path(__file__).parents[2] / "serve").rglob("*.py"):
        lines = path.read_text().splitlines()
        found += [line.strip() for line in lines if re.search(r"\btime\.time\(|datetime\.(now|utcnow)\(", line)]
    assert all(re.search(r'"created"|loaded_at=|^now = datetime', line) for line in found), found


def test_a_client_that_goes_away_cancels_its_request(app: Gate, backend: FakeBackend) -> None:
    backend.delay_s = 60
    assert not disconnecting(app, backend)
    assert backend.cancelled
    labels = {"endpoint": "/v1/completions", "mode": "ensemble", "k": "0", "outcome": "disconnected"}
    assert backend.count("credence_request_duration_seconds_count", **labels) == 1


def disconnecting(app: Gate, backend: FakeBackend) -> list[Any]:
    """What is sent to a client that sends a request and goes away."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"model":"triage","uncertainty":true}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope_of("/v1/completions"), receive, send), timeout=5))
    assert backend.count("credence_client_disconnects_total") == 1
    return sent


def scope_of(path: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
