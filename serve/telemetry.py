"""The outermost ASGI layer: a request's id, its log line and its span.

It stands outside every other middleware, so that an error page of theirs carries the request id too. What the layers inside note in the
request's :class:`~credence.serve.facts.RequestFacts` is written down here once the answer has been sent. No prompt, text or key is ever
among it; a query string, which a client may have put anything into, is not read.
"""

import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from credence.serve.facts import CURRENT, RequestFacts
from credence.serve.routes import UNCERTAINTY_PATHS, Access, find

access_logger = logging.getLogger("credence.access")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MODEL_NAME = re.compile(r"[A-Za-z0-9._:/@-]{1,128}")
"""What a name of a model may look like; anything else that came in its place is not logged."""


class Telemetry:
    """ASGI middleware.

    Args:
        tracer: gives the server's OpenTelemetry tracer, or None while traces go nowhere; asked for at each request.
    """

    def __init__(self, app: App, tracer: Callable[[Scope], Any]) -> None:
        self.app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts = RequestFacts.of(scope)
        CURRENT.set(facts)
        # vLLM makes its own ids of this header, in answers, logs and spans.
        _set_headers(scope, {"x-request-id": facts.request_id})
        tracer = self._tracer(scope)
        span = None
        if tracer is not None and facts.path in UNCERTAINTY_PATHS and facts.method == "POST":
            span = _start_span(tracer, facts, scope)
        exchange = _Exchange(facts, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:
            facts.status = facts.status or 500
            raise
        finally:
            fields = describe(facts)
            _log(facts, fields)
            if span is not None:
                _end_span(span, facts, fields)


class _Exchange:
    """The two channels of one request: puts the id on the response, and notes a client that goes away before its end."""

    def __init__(self, facts: RequestFacts, receive: Receive, send: Send) -> None:
        self._facts = facts
        self._receive = receive
        self._send = send
        self._complete = False

    async def receive(self) -> Message:
        """The next message from the client."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._facts.status = 499
        return message

    async def send(self, message: Message) -> None:
        """Sends a message to the client."""
        if message["type"] == "http.response.start":
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message["headers"] = [*headers, (b"x-request-id", self._facts.request_id.encode())]
            if self._facts.status is None:
                self._facts.status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
        await self._send(message)


UNLISTED = "unlisted"
"""Path of a request outside the table of routes: what it asked for may be anything, a prompt or a key too."""


def describe(facts: RequestFacts) -> dict[str, Any]:
    """The fields of a request's log line; of several answers, those of the least certain one."""
    answers = facts.uncertainties
    confidences = [answer.confidence for answer in answers if answer.confidence is not None]
    epistemics = [answer.epistemic for answer in answers if answer.epistemic is not None]
    now = time.perf_counter()
    model = answers[0].adapter.name if answers else facts.model
    return {
        "request_id": facts.request_id,
        "key": facts.key,
        "method": facts.method,
        "path": facts.route or UNLISTED,
        "status": facts.status,
        "mode": facts.mode,
        "k": facts.k,
        "model": model if model is not None and MODEL_NAME.fullmatch(model) else None,
        "digest8": answers[0].adapter.digest.removeprefix("sha256:")[:8] if answers else None,
        "confidence": min(confidences, default=None),
        "epistemic": max(epistemics, default=None),
        "flag": next((answer.flag for answer in answers if answer.flag != "ok"), "ok") if answers else None,
        "duration_s": round(now - facts.started_s, 6),
        "ttft_s": None if facts.first_event_s is None else round(facts.first_event_s - facts.started_s, 6),
        "reason": facts.reason,
    }


def _log(facts: RequestFacts, fields: dict[str, Any]) -> None:
    """One line per request; probes that are answered well are for the level DEBUG."""
    status = facts.status or 0
    route = find(facts.path)
    probe = route is not None and route.access is Access.OPEN and status < 400
    level = logging.WARNING if status >= 500 else logging.DEBUG if probe else logging.INFO
    shown = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
    access_logger.log(level, "%s", shown, extra={"fields": fields})


def _set_headers(scope: Scope, new: dict[str, str]) -> None:
    kept = [pair for pair in scope["headers"] if pair[0].decode("latin-1") not in new]
    scope["headers"] = [*kept, *((name.encode(), value.encode("latin-1")) for name, value in new.items())]


# --- OpenTelemetry ---------------------------------------------------------------------------------------------------


def _start_span(tracer: Any, facts: RequestFacts, scope: Scope) -> Any:
    """Starts the request's span below the caller's, and makes it the parent of vLLM's, which reads the same headers."""
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    span = tracer.start_span(f"POST {facts.path}", context=propagator.extract(given), kind=SpanKind.SERVER)
    headers: dict[str, str] = {}
    propagator.inject(headers, set_span_in_context(span))
    _set_headers(scope, headers)
    return span


def _end_span(span: Any, facts: RequestFacts, fields: dict[str, Any]) -> None:
    from opentelemetry.trace import StatusCode

    names = {"method": "http.request.method", "path": "http.route", "status": "http.response.status_code"}
    attributes = {names.get(name, f"credence.{name}"): value for name, value in fields.items() if value is not None}
    if facts.uncertainties:
        first = facts.uncertainties[0]
        attributes |= {
            "credence.tau": first.tau,
            "credence.digest": first.adapter.digest,
            "credence.n_effective": min(answer.n_effective for answer in facts.uncertainties),
        }
    span.set_attributes(attributes)
    for event in facts.events:
        span.add_event(event.name, event.attributes, event.time_ns)
    if (facts.status or 0) >= 500:
        span.set_status(StatusCode.ERROR, facts.reason)
    span.end()


# --- JSON lines ------------------------------------------------------------------------------------------------------


class JsonFormatter(logging.Formatter):
    """One JSON object per record, with the id of the request that the task works for; of an access record, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        facts = CURRENT.get()
        if fields is not None:
            line |= fields
        else:
            line |= {"message": record.getMessage(), "request_id": facts.request_id if facts is not None else None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def json_logging(level: str = "INFO") -> dict[str, Any]:
    """A ``logging.config`` dictionary: everything the server says, vLLM and uvicorn too, as JSON lines on stdout."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{JsonFormatter.__module__}.{JsonFormatter.__qualname__}"}},
        "handlers": {"json": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
        "loggers": {
            name: {"handlers": ["json"], "level": level, "propagate": False} for name in ("credence", "vllm", "uvicorn")
        },
    }
