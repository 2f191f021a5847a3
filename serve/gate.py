"""The door of the server: an ASGI middleware in front of vLLM's untouched application.

A request without ``uncertainty`` passes through byte for byte, but for the cache salt that its tenant gets where keys are asked for. A
request with it never reaches vLLM's own routes: those accept unknown fields, so they would answer 200 without any uncertainty. On
:data:`UNCERTAINTY_PATHS` it goes to the backend; on another route it is a 400 that says so. The door is also where routes outside the
table of credence.serve.routes are a 404, a draining server says 503, and where keys, rates and limits are checked
(credence.serve.security). What the door learns of a request is noted in its RequestFacts.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs

from credence.serve.audit import record_of
from credence.serve.body import parse_json
from credence.serve.errors import BadRequest, NotFound, PayloadTooLarge, ServeError, Unavailable, without_messages
from credence.serve.facts import CURRENT, RequestFacts
from credence.serve.in_flight import InFlight
from credence.serve.limits import Size, check, check_labels, check_sequences
from credence.serve.metrics import Metrics, k_label, outcome_label
from credence.serve.routes import SCORE_PATH, UNCERTAINTY_PATHS, Access, Route, find
from credence.serve.schemas import UncertaintyOptions
from credence.serve.security import Security, key_of

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

_MODEL_NAME = re.compile(r"[\w./@:+-]{1,128}", re.ASCII)
STALLED_S = 60.0
"""How long a stream with uncertainty waits for a reader that reads nothing (seconds)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished answer and what the metrics need of it."""

    body: dict[str, Any]
    num_samples: int


class EventStream(Protocol):
    """A running answer. It holds samples until it is closed, which is the gate's to do, started or not."""

    @property
    def num_samples(self) -> int:
        """K so far; final at the end of the stream."""
        ...

    def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; errors are events too."""
        ...

    async def close(self) -> None:
        """Ends what still runs and gives everything back."""
        ...


class Backend(Protocol):
    """Answers uncertainty requests; the vLLM plugin's or a test's."""

    metrics: Metrics
    draining: bool
    security: Security
    in_flight: InFlight

    def most_samples(self, model: object, options: UncertaintyOptions) -> int:
        """The largest K that a request can take if it is served."""
        ...

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        """Answers a body, of one of :data:`UNCERTAINTY_PATHS`, whose ``uncertainty`` field was taken out; raises ServeError."""
        ...

    def error_of(self, error: Exception) -> ServeError:
        """Translates an exception of the engine's own layers."""
        ...


class Gate:
    """ASGI middleware. ``backend`` is asked for at each request, since it exists only once the engine is up."""

    def __init__(self, app: App, backend: Callable[[Scope], Backend | None]) -> None:
        self.app = app
        self._backend = backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        backend = self._backend(scope)
        if backend is None:
            await self._while_starting(scope, receive, send)
            return
        facts = RequestFacts.of(scope)
        CURRENT.set(facts)
        route = find(facts.path, backend.security.routes)
        facts.route = None if route is None else route.path
        sent = _Sent(send, facts)
        try:
            await self._serve(backend, route, facts, scope, receive, sent)
        except _Disconnected:
            facts.status = 499
        except ServeError as error:
            facts.reason = error.reason
            backend.metrics.rejections.labels(error.reason).inc()
            if facts.status is None:
                await _send_json(sent, error.status, error.body(), error.headers())
        except Exception:
            facts.status = facts.status or 500
            raise
        finally:
            _measure(facts, backend.metrics)
            audit = backend.security.audit
            if audit is not None and route is not None and (route.access is Access.ADMIN or facts.mode != "mean"):
                audit.write(record_of(facts, route))

    async def _while_starting(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = find(scope["path"])
        RequestFacts.of(scope).route = None if route is None else route.path
        if route is not None and route.access is Access.OPEN:
            await self.app(scope, receive, send)
            return
        error = Unavailable("the server is starting; retry later", reason="draining")
        await _send_json(send, error.status, error.body(), error.headers())

    async def _serve(
        self, backend: Backend, route: Route | None, facts: RequestFacts, scope: Scope, receive: Receive, sent: Send
    ) -> None:
        if route is None:
            raise NotFound(
                f"there is no route {scope['method']} {facts.path!r:.120}", param=None, reason="unknown_route"
            )
        security = backend.security
        key = security.authenticate(scope, route)
        facts.key = None if key is None else key.name
        if route.access is Access.ADMIN:
            facts.model = _name(facts.path.split("/")[4:5])
        is_json = _is_json(scope)
        if scope["method"] != "POST" or route.access is Access.OPEN or (route.extra and not is_json):
            if route.extra and key is not None:
                security.rates.admit(key, 0)
            await self.app(scope, receive, sent)
            return
        if not is_json:
            raise BadRequest("the header Content-Type must be application/json", param=None)
        if backend.draining:
            raise Unavailable("the server is shutting down; send the request to another replica", reason="draining")
        if route.access is not Access.ADMIN and len(backend.in_flight) >= security.max_inflight:
            raise Unavailable(
                f"{security.max_inflight} requests are being answered, the most this server takes; retry later",
                reason="overload",
            )
        raw = await _read_body(receive, security.max_body_bytes)
        if route.access is Access.ADMIN:
            await self.app(scope, _replay(raw, receive), sent)
            return
        with backend.in_flight.entered(facts):
            await self._serve_body(backend, facts, raw, scope, receive, sent)

    async def _serve_body(
        self, backend: Backend, facts: RequestFacts, raw: bytes, scope: Scope, receive: Receive, sent: Send
    ) -> None:
        """Serves a user's POST: checks what it asks for, charges its key, and settles the charge at the end, however it ends."""
        security, key = backend.security, key_of(scope)
        body = parse_json(raw)
        options = _uncertainty(scope, body)
        facts.model = _name([body.get("model")])
        if options is not None:
            facts.mode, facts.n_samples_asked = options.mode, options.n_samples
            facts.k = options.n_samples if isinstance(options.n_samples, int) else 0
        security.permit_model(key, body.get("model"))
        if options is not None and facts.path not in UNCERTAINTY_PATHS:
            raise BadRequest(
                f"uncertainty is served on {', '.join(UNCERTAINTY_PATHS)}, not on {facts.path}", param="uncertainty"
            )
        sample_tokens = 0
        if facts.path in UNCERTAINTY_PATHS:
            size = check(body, security.limits)
            if options is not None:
                sample_tokens = _most_sample_tokens(backend, scope, size, options, body)
        charge = None if key is None else security.rates.admit(key, sample_tokens)
        try:
            if security.salt(key, facts.path, body):
                raw = json.dumps(body, separators=(",", ":")).encode()
                _resize(scope, raw)
            if options is None:
                await self.app(scope, _replay(raw, receive), sent)
            else:
                await self._serve_uncertainty(backend, facts, body, options, scope, receive, sent)
        finally:
            if charge is not None:
                charge.settle(facts.sample_prompt_tokens + facts.sample_completion_tokens)

    async def _serve_uncertainty(
        self,
        backend: Backend,
        facts: RequestFacts,
        body: dict[str, Any],
        options: UncertaintyOptions,
        scope: Scope,
        receive: Receive,
        sent: Send,
    ) -> None:
        answer = await _unless_disconnected(self._answer(backend, facts.path, body, options, scope), receive)
        if isinstance(answer, Answer):
            facts.k = answer.num_samples
            await _send_json(sent, 200, answer.body, {})
            return
        try:
            await _unless_disconnected(_send_events(sent, answer.events()), receive)
        finally:
            facts.k = answer.num_samples
            await answer.close()

    async def _answer(
        self, backend: Backend, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        try:
            return await backend.answer(path, body, options, scope)
        except Exception as error:
            translated = backend.error_of(error)
            if translated.status >= 500 and isinstance(error, ServeError):
                logger.warning("An uncertainty request failed: %s", error.message)
            elif translated.status >= 500:
                logger.error("An uncertainty request failed: %s", without_messages(error))
            raise translated from error


class _Disconnected(Exception):
    pass


class _Sent:
    """Notes the status that was sent, and when the first event of a stream was."""

    def __init__(self, send: Send, facts: RequestFacts) -> None:
        self._send = send
        self._facts = facts
        self._streaming = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._facts.status = self._facts.status or message["status"]
            if message["status"] in (429, 503) and all(
                name.lower() != b"retry-after" for name, _ in message["headers"]
            ):
                message["headers"] = [*message["headers"], (b"retry-after", b"1")]  # vLLM's own refusals have none
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._streaming = kind.startswith(b"text/event-stream")
        elif self._streaming and self._facts.first_event_s is None and message.get("body"):
            self._facts.first_event_s = time.perf_counter()
        await self._send(message)


def _measure(facts: RequestFacts, metrics: Metrics) -> None:
    """Counts a request on a path that uncertainty is served on; ``k`` is the number of samples that were used."""
    if facts.status in (None, 499):
        metrics.client_disconnects.inc()
    if facts.path not in UNCERTAINTY_PATHS or facts.method != "POST":
        return
    outcome = "disconnected" if facts.status in (None, 499) else outcome_label(facts.status or 0)
    k = k_label(facts.k)
    elapsed = time.perf_counter() - facts.started_s
    metrics.request_duration_seconds.labels(facts.path, facts.mode, k, outcome).observe(elapsed)
    if facts.first_event_s is not None:
        metrics.time_to_first_token_seconds.labels(facts.mode, k).observe(facts.first_event_s - facts.started_s)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _is_json(scope: Scope) -> bool:
    kind = _header(scope, b"content-type").partition(";")[0].strip().lower()
    return kind in ("", "application/json") or kind.endswith("+json")


async def _read_body(receive: Receive, max_bytes: int) -> bytes:
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLarge(f"the request body is over the limit of {max_bytes} bytes")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that delivers ``body`` and then whatever comes next."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _resize(scope: Scope, raw: bytes) -> None:
    """Puts the length of the body that is passed on into the headers."""
    kept = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]
    scope["headers"] = [*kept, (b"content-length", str(len(raw)).encode())]


def _name(given: list[Any]) -> str | None:
    """A model's name for log and audit; nothing if it could be a text of another kind."""
    return given[0] if given and isinstance(given[0], str) and _MODEL_NAME.fullmatch(given[0]) else None


def _most_sample_tokens(
    backend: Backend, scope: Scope, size: Size, options: UncertaintyOptions, body: dict[str, Any]
) -> int:
    """Checks the options against key and limits; returns how many tokens the samples can take at most.

    Raises:
        Forbidden, BadRequest: name the field.
    """
    security, key = backend.security, key_of(scope)
    security.permit_options(key, options)
    k = backend.most_samples(body.get("model"), options)
    if key is not None and key.max_samples is not None:
        k = min(k, key.max_samples)
    check_sequences(size, k, security.limits)
    labels = options.choices or []
    check_labels(labels, security.limits)
    once = size.sample_tokens(k, security.max_model_len)
    if labels:
        return once * (1 + len(labels)) + k * size.n * size.prompts * sum(len(label.encode()) for label in labels)
    # generate writes and reads; an adaptive score reads again at each stage, and the stages double.
    return once * (2 if options.mode == "generate" or options.n_samples == "auto" else 1)


def _uncertainty(scope: Scope, body: dict[str, Any]) -> UncertaintyOptions | None:
    """Takes ``uncertainty`` out of the body, or reads it from the query string."""
    query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("uncertainty", [])
    asked: object = None
    if query:
        if query[-1].lower() not in ("true", "false", "1", "0"):
            raise BadRequest(
                f"the query parameter uncertainty must be true or false, got {query[-1]!r:.80}", param="uncertainty"
            )
        asked = query[-1].lower() in ("true", "1")
    if "uncertainty" in body:
        asked = body.pop("uncertainty")
    return _score_options(asked) if scope["path"] == SCORE_PATH else UncertaintyOptions.parse(asked)


def _score_options(asked: object) -> UncertaintyOptions:
    """Options of the score route, whose only mode is ``score``."""
    if asked is None or asked is True:
        asked = {}
    if isinstance(asked, dict):
        if asked.get("mode", "score") != "score":
            raise BadRequest(
                f"{SCORE_PATH} has one mode, 'score'; got uncertainty.mode {asked['mode']!r:.80}",
                param="uncertainty.mode",
            )
        asked = {**asked, "mode": "score"}
    options = UncertaintyOptions.parse(asked)
    if options is None:
        raise BadRequest(
            f"{SCORE_PATH} always answers with uncertainty; leave uncertainty out or give its options",
            param="uncertainty",
        )
    return options


async def _unless_disconnected(work: Awaitable[T], receive: Receive) -> T:
    """Awaits ``work``; cancels it when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Disconnected
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_events(send: Send, events: AsyncIterator[bytes]) -> None:
    """Sends events as fast as they are read. A reader that stops is treated as gone: its answer holds samples that others wait for."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        try:
            async with asyncio.timeout(STALLED_S):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise _Disconnected from None
    await send({"type": "http.response.body", "body": b""})


async def _send_json(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = text.encode(
        errors="backslashreplace"
    )  # half of a surrogate pair, as the client sent it, is an escape of JSON
    lines = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})
