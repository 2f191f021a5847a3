"""What the contract tests share; the server is that of tests/servers.py, one for all folders."""

import httpx2
import pytest

from tests.clients.conftest import connect

__all__ = ["connect"]


class Busy(httpx2.HTTPTransport):
    """The way to the server, which refuses the first requests as an overloaded server does."""

    def __init__(self, *statuses: int) -> None:
        super().__init__()
        self.statuses = list(statuses)
        self.requests = 0

    def _refusal(self) -> httpx2.Response | None:
        self.requests += 1
        if not self.statuses:
            return None
        envelope = {"error": {"message": "later", "type": "overloaded", "code": self.statuses[0]}}
        return httpx2.Response(self.statuses.pop(0), json=envelope, headers={"Retry-After": "0"})

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._refusal() or super().handle_request(request)


class AsyncBusy(httpx2.AsyncHTTPTransport):
    """The same for asyncio."""

    def __init__(self, *statuses: int) -> None:
        super().__init__()
        self.busy = Busy(*statuses)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.busy._refusal() or await super().handle_async_request(request)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is on this machine."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
