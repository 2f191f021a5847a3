"""Whether the server should get traffic: the answer of /readyz, proved by an answer of the engine.

A probe must neither load the server nor fail because users do. So a finished ensemble answer, a user's or the probe's own, is proof for
:data:`FRESH_S`; only after that the probe asks a question of its own, one for all who wait, with a time limit. Where that one does not come
back in time, but the engine has delivered something else meanwhile, the engine is busy and not broken.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from credence.serve.errors import ServeError
from credence.serve.metrics import Metrics

logger = logging.getLogger(__name__)

ASIDE: ContextVar[Metrics | None] = ContextVar("credence_metrics_aside", default=None)
"""Where a probe's own question is counted, so that it is no user's."""
FRESH_S = 5.0
"""How long an ensemble answer, or a failed probe, counts (seconds)."""


class Readiness:
    """Proof that the server answers.

    Args:
        ask: asks one small ensemble question through the whole path and raises what goes wrong.
        limit_s: how long it may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[None]], *, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._limit_s = limit_s
        self._clock = clock
        self._answered_s = float("-inf")
        self._delivered_s = float("-inf")
        self._problem: str | None = None
        self._problem_s = float("-inf")
        self._running: asyncio.Task[str | None] | None = None

    def answered(self) -> None:
        """Notes a finished ensemble answer."""
        self._answered_s = self._clock()

    def delivered(self) -> None:
        """Notes that the engine has delivered something, to whomever."""
        self._delivered_s = self._clock()

    async def problem(self) -> str | None:
        """Why the server should get no traffic, or None; known after at most the time limit."""
        now = self._clock()
        if self._answered_s >= max(now - FRESH_S, self._problem_s):
            return None
        if self._problem_s > now - min(FRESH_S, self._limit_s):
            return self._problem
        if self._running is None:
            # In a context of its own: the question belongs to no request.
            self._running = asyncio.create_task(self._probe(), context=contextvars.Context())
            self._running.add_done_callback(self._ended)
        return await asyncio.shield(self._running)

    async def _probe(self) -> str | None:
        started = self._clock()
        work = asyncio.ensure_future(self._ask())
        work.add_done_callback(_forget)
        # Not wait_for: a question whose clean-up hangs must not hold the probe.
        await asyncio.wait({work}, timeout=self._limit_s)
        problem: str | None = f"an ensemble request was not answered within {self._limit_s:g} s"
        if work.done() and not work.cancelled():
            error = work.exception()
            if error is None:
                self.answered()
                return None
            problem = error.message if isinstance(error, ServeError) else f"{type(error).__name__} in the engine"
            busy = isinstance(error, ServeError) and error.reason == "overload"
        else:
            work.cancel()
            busy = True
        if busy and self._delivered_s > started:
            self.answered()  # by an engine that has more to do than to answer probes
            return None
        logger.warning("The server is not ready: %s", problem)
        self._problem, self._problem_s = problem, self._clock()
        return problem

    def _ended(self, task: "asyncio.Task[str | None]") -> None:
        self._running = None


def _forget(question: "asyncio.Future[None]") -> None:
    """A question that is given up may fail later; nobody waits for it any more."""
    if not question.cancelled():
        question.exception()
