"""Both clients behind one set of tests: what is tested of the synchronous one holds, word for word, for the asynchronous one."""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Self

import httpx2
import pytest

from credence.clients import AsyncAdapters, AsyncClient, AsyncStream, Client

Connect = Callable[..., Client]


class Awaited:
    """An asynchronous client, its adapters or a stream of it, with the methods of the synchronous one."""

    def __init__(self, inner: AsyncClient | AsyncAdapters | AsyncStream[Any], runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def _settled(self, value: Any) -> Any:
        if inspect.isawaitable(value):

            async def wait() -> Any:
                return await value

            value = self._runner.run(wait())
        return Awaited(value, self._runner) if isinstance(value, AsyncAdapters | AsyncStream) else value

    def __getattr__(self, name: str) -> Any:
        value = self._settled(getattr(self._inner, name))
        if not inspect.ismethod(value):
            return value
        return lambda *args, **kwargs: self._settled(value(*args, **kwargs))

    def __repr__(self) -> str:
        return repr(self._inner).removeprefix("Async")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        assert isinstance(self._inner, AsyncStream)
        try:
            return self._settled(anext(self._inner))
        except StopAsyncIteration:
            raise StopIteration from None


@pytest.fixture(params=["threads", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Opens a client at an address."""
    if request.param == "threads":
        yield Client
        return
    with asyncio.Runner() as runner:
        yield lambda *args, **options: Awaited(AsyncClient(*args, **options), runner)  # type: ignore[return-value]


@pytest.fixture
def client(connect: Connect) -> Connect:
    """Opens a client of a scripted server."""
    return lambda script, **options: connect("http://server:8000", transport=httpx2.MockTransport(script), **options)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, in seconds, which are not waited for."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("credence.clients.transport.time.sleep", waited.append)
    monkeypatch.setattr("credence.clients.transport.asyncio.sleep", sleep)
    return waited
