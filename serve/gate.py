"""The door of the server: an ASGI middleware in front of vLLM's untouched application.

A request without ``uncertainty`` passes through byte for byte and is only timed. A request with it never reaches vLLM's own routes: those
accept unknown fields, so they would answer 200 without any uncertainty. On :data:`UNCERTAINTY_PATHS` it goes to the backend; on another
route it is a 400 that says so. The door is also where routes outside the table of credence.serve.routes are a 404, bodies are bounded,
a draining server says 503, and keys are asked for (vLLM guards /v1 only). What the door learns of a request is noted in its RequestFacts.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs

from credence.serve.errors import BadRequest, NotFound, PayloadTooLarge, ServeError, Unavailable
from credence.serve.facts import CURRENT, RequestFacts
from credence.serve.metrics import Metrics, k_label, outcome_label
from credence.serve.routes import SCORE_PATH, UNCERTAINTY_PATHS, Access, Route, find
from credence.serve.schemas import UncertaintyOptions

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")


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
    max_body_bytes: int
    api_keys: tuple[str, ...]

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
        backend = self._backend(scope) if scope["type"] == "http" else None
        if backend is None:
            await self.app(scope, receive, send)
            return
        facts = RequestFacts.of(scope)
        CURRENT.set(facts)
        sent = _Sent(send, facts)
        try:
            await self._serve(backend, facts, scope, receive, sent)
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

    async def _serve(self, backend: Backend, facts: RequestFacts, scope: Scope, receive: Receive, sent: Send) -> None:
        path = scope["path"]
        route = find(path)
        if route is None:
            raise NotFound(f"there is no route {scope['method']} {path!r:.120}", param=None, reason="unknown_route")
        if not _authorised(scope, route, backend.api_keys):
            await _send_json(sent, 401, _unauthorised(), {"WWW-Authenticate": "Bearer"})
            return
        if scope["method"] != "POST" or not _is_json(scope):
            await self.app(scope, receive, sent)
            return
        if backend.draining:
            raise Unavailable("the server is shutting down; send the request to another replica", reason="draining")
        raw = await _read_body(receive, backend.max_body_bytes)
        body, options = _uncertainty(scope, raw)
        if options is None:
            await self.app(scope, _replay(raw, receive), sent)
            return
        facts.mode, facts.k = options.mode, options.n_samples if isinstance(options.n_samples, int) else 0
        if path not in UNCERTAINTY_PATHS:
            raise BadRequest(
                f"uncertainty is served on {', '.join(UNCERTAINTY_PATHS)}, not on {path}", param="uncertainty"
            )
        answer = await _unless_disconnected(self._answer(backend, path, body, options, scope), receive)
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
                logger.exception("An uncertainty request failed")
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


def _authorised(scope: Scope, route: Route, keys: tuple[str, ...]) -> bool:
    if route.access is Access.OPEN or scope["method"] == "OPTIONS":
        return True
    if not keys:
        return route.access is not Access.ADMIN
    scheme, _, token = _header(scope, b"authorization").partition(" ")
    given = token.strip().encode()
    return scheme.lower() == "bearer" and any([hmac.compare_digest(given, key.encode()) for key in keys])


def _unauthorised() -> dict[str, Any]:
    message = "a valid API key is needed in the header `Authorization: Bearer KEY`"
    return {"error": {"message": message, "type": "AuthenticationError", "param": None, "code": 401}}


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


def _uncertainty(scope: Scope, raw: bytes) -> tuple[dict[str, Any], UncertaintyOptions | None]:
    """Takes ``uncertainty`` out of the body or the query string.

    Plain requests are not parsed at all: a JSON key can only be spelled ``uncertainty`` or with \\u escapes.
    """
    query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("uncertainty", [])
    asked: object = None
    if query:
        if query[-1].lower() not in ("true", "false", "1", "0"):
            raise BadRequest(
                f"the query parameter uncertainty must be true or false, got {query[-1]!r}", param="uncertainty"
            )
        asked = query[-1].lower() in ("true", "1")
    score = scope["path"] == SCORE_PATH
    if not score and not asked and b"uncertainty" not in raw and b"\\u" not in raw:
        return {}, None
    try:
        body = json.loads(raw)
    except ValueError:
        if score:
            raise BadRequest("the body is not valid JSON", param=None) from None
        return {}, None  # vLLM's own answer to a body that is not JSON
    if not isinstance(body, dict):
        if score:
            raise BadRequest("the body must be a JSON object", param=None)
        return {}, None
    if "uncertainty" in body:
        asked = body.pop("uncertainty")
    return body, _score_options(asked) if score else UncertaintyOptions.parse(asked)


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
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _send_json(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    lines = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": data})
