"""Request ids, the access log and spans, around the gate with a fake backend."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from credence.serve.errors import Unavailable
from credence.serve.facts import CURRENT, note
from credence.serve.gate import Answer, EventStream, Gate, Scope
from credence.serve.schemas import AdapterIdentity, Uncertainty, UncertaintyOptions
from credence.serve.telemetry import JsonFormatter, Telemetry
from tests.serve.test_gate import FakeBackend

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
DIGEST = "sha256:" + "ab12cd34" * 8
SECRETS = ("my secret prompt", "sk-secret-key", "hidden-in-the-query")


def uncertainty(confidence: float, epistemic: float, flag: Any = "ok") -> Uncertainty:
    return Uncertainty(
        mode="ensemble", n_samples=8, n_effective=7, tau=0.5, seed=0, confidence=confidence, calibrated=True, flag=flag,
        total=0.4, aleatoric=0.4 - epistemic, epistemic=epistemic, sequence=None,
        adapter=AdapterIdentity(name="triage", digest=DIGEST),
    )  # fmt: skip


class NotingBackend(FakeBackend):
    """Notes what the real one notes."""

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        facts = CURRENT.get()
        assert facts is not None
        note("gang start", members=8)
        logging.getLogger("credence.test").info("at work")
        facts.uncertainties += [uncertainty(0.9, 0.1), uncertainty(0.4, 0.3, "low_confidence")]
        note("gang end", members=8, complete=True)
        return await super().answer(path, body, options, scope)


class Served:
    """The whole stack: telemetry, Starlette's own error page, the gate, and an application that answers plain requests."""

    def __init__(self) -> None:
        self.backend = NotingBackend()
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer: Any = provider.get_tracer("test")
        self.seen: list[dict[str, str]] = []
        routes = [
            Route("/v1/completions", self._plain, methods=["POST"]),
            Route("/v1/chat/completions", self._stream, methods=["POST"]),
            Route("/v1/models", self._broken),
            Route("/livez", lambda _: JSONResponse({})),
        ]
        inner = Starlette(routes=routes)
        inner.add_middleware(Gate, backend=lambda scope: self.backend)  # type: ignore[arg-type]
        self.app = Telemetry(inner, tracer=lambda scope: self.tracer)

    async def _plain(self, request: Request) -> Response:
        self.seen.append(dict(request.headers))
        return JSONResponse({}, headers={"X-Request-Id": "of somebody inside"})

    async def _stream(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await asyncio.sleep(0.2)
            yield b"data: 2\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def _broken(self, request: Request) -> Response:
        raise RuntimeError("a fault of the application")

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                names = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, json=body, headers=names)

        return asyncio.run(ask())

    def span(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        return span


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The log so far, as the JSON formatter writes it, each record formatted when it was made."""
    written: list[str] = []

    class Writer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    writer = Writer()
    writer.setFormatter(JsonFormatter())
    logger = logging.getLogger("credence")
    level = logger.level
    logger.addHandler(writer)
    logger.setLevel(logging.INFO)
    yield written
    logger.removeHandler(writer)
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", {"model": "triage"}, 200),
        ("POST", "/v1/completions", {"model": "triage", "uncertainty": True}, 200),
        ("POST", "/v1/completions", {"model": "triage", "uncertainty": {"nonsense": 1}}, 400),
        ("POST", "/v1/chat/completions", {"model": "triage"}, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/models", None, 500),
        ("DELETE", "/livez", None, 405),
    ],
)
def test_every_answer_carries_the_request_id(served: Served, method: str, path: str, body: object, status: int) -> None:
    given = served.ask(method, path, body, x_request_id="given-1")
    assert (given.status_code, given.headers.get_list("x-request-id")) == (status, ["given-1"])
    made, again = (served.ask(method, path, body).headers["x-request-id"] for _ in range(2))
    assert len(made) == len(again) == 32 and made != again


def test_an_id_that_cannot_stand_in_a_line_is_replaced_and_told_to_the_application(served: Served) -> None:
    for given in ("x" * 129, "caf\u00e9"):
        headers = [(b"x-request-id", given.encode("latin-1")), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        sent = run(served, scope, [{"type": "http.request", "body": b"{}"}])
        made = dict(sent[0]["headers"])[b"x-request-id"].decode()
        assert len(made) == 32 and served.seen[-1]["x-request-id"] == made


def run(served: Served, scope: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs one connection by hand; after the given messages the client says nothing more."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(served.app(scope, receive, send))
    return sent


def test_one_line_per_request_says_what_is_known_and_nothing_else(served: Served, lines: list[str]) -> None:
    served.ask(
        "POST", f"/v1/completions?note={SECRETS[2]}", {"model": "triage", "prompt": SECRETS[0], "uncertainty": {"n_samples": 8}},
        authorization=f"Bearer {SECRETS[1]}", x_request_id="given-1",
    )  # fmt: skip
    work, access = map(json.loads, lines)
    assert (work["message"], work["request_id"], work["logger"]) == ("at work", "given-1", "credence.test")
    assert list(access) == [
        "time", "level", "logger", "request_id", "key", "method", "path", "status", "mode", "k", "model", "digest8", "confidence",
        "epistemic", "flag", "duration_s", "ttft_s", "reason",
    ]  # fmt: skip
    expected = {
        "level": "info", "request_id": "given-1", "key": None, "method": "POST", "path": "/v1/completions", "status": 200,
        "mode": "ensemble", "k": 8, "model": "triage", "digest8": "ab12cd34", "confidence": 0.4, "epistemic": 0.3,
        "flag": "low_confidence", "ttft_s": None, "reason": None,
    }  # fmt: skip
    assert {name: access[name] for name in expected} == expected
    assert not any(secret in line for secret in SECRETS for line in lines)


def test_refusals_and_faults_say_why(served: Served, lines: list[str]) -> None:
    served.backend.failure = Unavailable("full", reason="overload")
    served.ask("POST", "/v1/completions", {"model": "triage", "uncertainty": True})
    served.ask("GET", "/v1/models")
    full, fault = (json.loads(line) for line in lines if '"credence.access"' in line)
    assert (full["level"], full["status"], full["reason"]) == ("warning", 503, "overload")
    assert (fault["level"], fault["status"]) == ("warning", 500)


@pytest.mark.parametrize(
    ("path", "logged"),
    [("/nowhere%0Alevel=critical%22", "unlisted"), ("/admin/v1/adapters/my%20secret", "/admin/v1/adapters/{name}")],
)
def test_a_path_brings_nothing_of_its_own_into_a_line(
    served: Served, lines: list[str], caplog: pytest.LogCaptureFixture, path: str, logged: str
) -> None:
    served.ask("GET", path)
    (line,) = lines
    assert "\n" not in line and json.loads(line)["path"] == logged
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_probes_that_are_well_are_not_logged(served: Served, lines: list[str]) -> None:
    assert served.ask("GET", "/livez").status_code == 200
    assert not lines


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_of_a_plain_request_that_goes_away_is_counted(served: Served, lines: list[str], path: str) -> None:
    async def waiting(request: Request) -> Response:
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return Response()

    if path == "/v1/completions":
        inner = Starlette(routes=[Route(path, waiting, methods=["POST"])])
        inner.add_middleware(Gate, backend=lambda scope: served.backend)  # type: ignore[arg-type]
        served.app.app = inner
    scope = {
        "type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")], "query_string": b"",
        "asgi": {"spec_version": "2.0"},
    }  # fmt: skip
    run(served, scope, [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}])
    labels = {"endpoint": path, "mode": "mean", "k": "0", "outcome": "disconnected"}
    assert served.backend.count("credence_request_duration_seconds_count", **labels) == 1
    assert served.backend.count("credence_client_disconnects_total") == 1
    assert json.loads(lines[-1])["status"] == 499


def test_a_fault_of_the_application_is_a_failure_and_no_client_that_left(served: Served) -> None:
    inner = Starlette(routes=[Route("/v1/completions", served._broken, methods=["POST"])])
    inner.add_middleware(Gate, backend=lambda scope: served.backend)  # type: ignore[arg-type]
    served.app.app = inner
    assert served.ask("POST", "/v1/completions", {"model": "triage"}).status_code == 500
    labels = {"endpoint": "/v1/completions", "mode": "mean", "k": "0", "outcome": "server_error"}
    assert served.backend.count("credence_request_duration_seconds_count", **labels) == 1
    assert served.backend.count("credence_client_disconnects_total") == 0
    assert served.span().status.status_code is StatusCode.ERROR


def test_a_client_that_hears_the_end_did_not_go_away(served: Served) -> None:
    served.ask("POST", "/v1/chat/completions", {"model": "triage"})
    assert served.backend.count("credence_client_disconnects_total") == 0


def test_the_span_continues_the_callers_trace_and_is_the_parent_of_what_is_inside(served: Served) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    served.ask("POST", "/v1/completions", {"model": "triage"}, **headers)
    span = served.span()
    assert span.context is not None and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert served.seen[0]["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert served.seen[0]["tracestate"] == "vendor=1"


def test_the_span_says_what_was_served(served: Served) -> None:
    body = {"model": "triage", "prompt": SECRETS[0], "uncertainty": {"n_samples": 8}}
    served.ask("POST", "/v1/completions", body, authorization=f"Bearer {SECRETS[1]}")
    span = served.span()
    assert span.attributes is not None
    expected = {
        "credence.mode": "ensemble", "credence.k": 8, "credence.tau": 0.5, "credence.model": "triage", "credence.digest": DIGEST,
        "credence.confidence": 0.4, "credence.epistemic": 0.3, "credence.flag": "low_confidence", "credence.n_effective": 7,
        "http.request.method": "POST", "http.route": "/v1/completions", "http.response.status_code": 200,
    }  # fmt: skip
    assert {name: span.attributes[name] for name in expected} == expected
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        ("gang start", {"members": 8}),
        ("gang end", {"members": 8, "complete": True}),
    ]
    assert span.start_time is not None and span.start_time <= span.events[0].timestamp <= span.events[1].timestamp
    assert not any(secret in str(span.to_json()) for secret in SECRETS)


def test_failures_are_errors_of_the_span_and_refusals_are_not(served: Served) -> None:
    served.ask("POST", "/v1/completions", {"model": "triage", "uncertainty": {"nonsense": 1}})
    assert served.span().status.is_unset
    served.exporter.clear()
    served.backend.failure = Unavailable("full", reason="overload")
    served.ask("POST", "/v1/completions", {"model": "triage", "uncertainty": True})
    status = served.span().status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "overload")


def test_a_traceparent_of_nonsense_starts_a_new_trace(served: Served) -> None:
    served.ask("POST", "/v1/completions", {"model": "triage"}, traceparent="nonsense")
    assert served.span().parent is None
    assert served.seen[0]["traceparent"] != "nonsense"


def test_without_a_tracer_the_headers_pass_untouched(served: Served) -> None:
    served.tracer = None
    traceparent = f"00-{TRACE}-{PARENT}-01"
    served.ask("POST", "/v1/completions", {"model": "triage"}, traceparent=traceparent)
    assert served.seen[0]["traceparent"] == traceparent
    assert not served.exporter.get_finished_spans()


def test_opentelemetry_is_not_needed() -> None:
    program = "import credence.serve.telemetry, sys; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
