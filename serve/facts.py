"""What is known of a request, noted where it becomes known and read by whoever reports on it: metrics, log, audit log, traces.

The facts travel in the ASGI scope, from the outermost middleware inwards, and in :data:`CURRENT` for code that has no scope.
"""

import time
import uuid
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from credence.serve.schemas import Uncertainty

SCOPE_KEY = "credence.facts"


@dataclass(frozen=True, slots=True)
class Event:
    """A moment of a request: a name, nanoseconds since the epoch, and numbers that belong to it."""

    name: str
    time_ns: int
    attributes: dict[str, int | float | bool]


@dataclass(slots=True, kw_only=True)
class RequestFacts:
    """One request. No prompt, answer text or API key is ever among the facts.

    Attributes:
        request_id: the client's X-Request-Id or one of ours.
        method, path: of the request line.
        route: its path in the table of routes, with ``{name}`` for what a client chose; None outside the table.
        started_s: ``time.perf_counter()`` at the request's arrival (seconds).
        key: name of the API key, None without.
        model: served name the request asks for, once its body was read; None if it could be no name.
        n_samples_asked: ``uncertainty.n_samples`` as it was asked for; None if it was left out.
        mode: of the uncertainty; ``mean`` without.
        k: posterior samples; 0 without uncertainty.
        status: HTTP status that was sent; 499 if the client went away before the end of its answer; None while none was.
        reason: why it was refused or failed (the label of ``credence_rejections_total``).
        first_event_s: ``time.perf_counter()`` at the first event of a streamed answer.
        sample_prompt_tokens, sample_completion_tokens: work done under posterior samples, also for an answer that was not finished.
        uncertainties: of the finished answers, one per choice.
        events: what happened on the way, for the request's span.
    """

    request_id: str
    method: str
    path: str
    started_s: float
    route: str | None = None
    key: str | None = None
    model: str | None = None
    n_samples_asked: int | str | None = None
    mode: str = "mean"
    k: int = 0
    status: int | None = None
    reason: str | None = None
    first_event_s: float | None = None
    sample_prompt_tokens: int = 0
    sample_completion_tokens: int = 0
    uncertainties: list[Uncertainty] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> "RequestFacts":
        """The facts of an HTTP scope; made and left there by whoever asks first."""
        facts = scope.get(SCOPE_KEY)
        if facts is None:
            given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
            facts = cls(
                request_id=_usable(given.decode("latin-1")) or uuid.uuid4().hex,
                method=scope["method"],
                path=scope["path"],
                started_s=time.perf_counter(),
            )
            scope[SCOPE_KEY] = facts
        assert isinstance(facts, cls)
        return facts


CURRENT: ContextVar[RequestFacts | None] = ContextVar("credence_request_facts", default=None)
"""Facts of the request that this task works for."""


def note(name: str, **attributes: int | float | bool) -> None:
    """Adds an event of now to the request that this task works for, if it works for one."""
    facts = CURRENT.get()
    if facts is not None:
        facts.events.append(Event(name, time.time_ns(), attributes))


def _usable(request_id: str) -> str:
    """A client's request id, or nothing if it could not stand in a log line as it is."""
    return request_id if len(request_id) <= 128 and request_id.isascii() and request_id.isprintable() else ""
