"""The requests that are being answered now.

A replaced adapter may be taken out of the engine once every request that was running when it was replaced has ended: later ones cannot
have come to it. So nothing is counted per adapter on the way of a request.
"""

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from credence.serve.errors import Unavailable
from credence.serve.facts import RequestFacts


@dataclass(eq=False, slots=True)
class Running:
    """One request.

    Attributes:
        facts: its model is set once its body was read.
        task: the task that answers it.
        aborted: the reason its task was cancelled with, if it was aborted.
    """

    facts: RequestFacts
    task: "asyncio.Task[Any]"
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: str | None = None


class InFlight:
    """The set of running requests."""

    def __init__(self) -> None:
        self._running: set[Running] = set()

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def entered(self, facts: RequestFacts) -> Iterator[None]:
        """Holds a request for as long as the current task answers it.

        Raises:
            Unavailable: it was aborted.
        """
        task = asyncio.current_task()
        assert task is not None
        running = Running(facts, task)
        self._running.add(running)
        try:
            yield
        except asyncio.CancelledError:
            if running.aborted is None:
                raise
            task.uncancel()
            raise Unavailable(running.aborted, reason="draining") from None
        finally:
            self._running.discard(running)
            running.ended.set()

    def count(self, model: str) -> int:
        """Running requests for a served name."""
        return sum(running.facts.model == model for running in self._running)

    def now(self) -> "Snapshot":
        """The requests that run now."""
        return Snapshot(frozenset(self._running))


@dataclass(frozen=True)
class Snapshot:
    """The requests that ran at one moment."""

    requests: frozenset[Running]

    def count(self, models: Collection[str]) -> int:
        """How many of them still run, for served names."""
        return sum(not one.ended.is_set() and one.facts.model in models for one in self.requests)

    async def ended(self) -> None:
        """Waits until none of them runs."""
        for one in self.requests:
            await one.ended.wait()

    def abort(self, models: Collection[str], reason: str) -> None:
        """Ends those for some served names; their clients get ``reason`` as an error where no answer has begun."""
        for one in self.requests:
            if not one.ended.is_set() and one.facts.model in models:
                one.aborted = reason
                one.task.cancel()
