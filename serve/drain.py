"""The orderly end of a server: what was accepted is answered, what comes later is sent elsewhere.

vLLM's engine turns away whatever reaches it after the signal. An answer with uncertainty asks the engine several times (mode
``score`` reads its text again), so the engine may only be told to end once all accepted requests have been answered.
"""

import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Any]


class Drain:
    """Counts the requests that were accepted before the drain began. Begun in the event loop or a thread, awaited in a thread.

    Attributes:
        begun: whether new requests are refused.
        cut_off: whether the end was forced while accepted requests were still being answered.
    """

    def __init__(self) -> None:
        self.begun = False
        self.cut_off = False
        self._running = 0
        self._changed = threading.Condition()
        self._forced = False

    def enter(self) -> bool:
        """Notes a request; False if the drain has begun, and then it is not counted."""
        with self._changed:
            if not self.begun:
                self._running += 1
            return not self.begun

    def leave(self) -> None:
        """Notes the end of a counted request."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def begin(self) -> None:
        """From here on requests are not counted."""
        with self._changed:
            self.begun = True

    def force(self) -> None:
        """Ends the wait at once."""
        with self._changed:
            self._forced = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Waits until every counted request has ended; False if the time was over or the end was forced before."""
        with self._changed:
            self._changed.wait_for(lambda: self._forced or self._running == 0, timeout_s)
            self.cut_off = self._running > 0
            return not self.cut_off


class CountRequests:
    """ASGI middleware that counts the requests under way, outside everything that may answer one."""

    def __init__(self, app: App, drain: Drain) -> None:
        self.app = app
        self._drain = drain

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Handles one connection."""
        counted = scope["type"] == "http" and self._drain.enter()
        try:
            await self.app(scope, receive, send)
        finally:
            if counted:
                self._drain.leave()
