"""What the server sees of a client that gives up: a disconnect, in a real ASGI server, over a socket."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from credence.clients import AsyncClient, BadRequestError, Client, DeadlineExceeded, RequestTimeoutError
from tests.clients.answers import chunk, events

PATIENCE_S = 20.0


class Application:
    """Answers no request to its end; says when one has arrived, and when its client has gone."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.gone = threading.Semaphore(0)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.arrived.release()
        if body["model"] == "refused":
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            return
        if body.get("stream") or body["model"] == "trickle":
            kind = b"text/event-stream" if body.get("stream") else b"application/json"
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
            part = events(chunk(" a")) if body.get("stream") else b" "
            await send({"type": "http.response.body", "body": part, "more_body": True})
        gone = asyncio.ensure_future(receive())
        while not (await asyncio.wait([gone], timeout=0.05))[0]:
            if body["model"] == "trickle":
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
        assert gone.result()["type"] == "http.disconnect"
        self.gone.release()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Application, str]]:
    application = Application()
    config = uvicorn.Config(application, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield application, f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def application(running: tuple[Application, str]) -> Iterator[Application]:
    """No test leaves a request behind."""
    application = running[0]
    yield application
    assert not application.arrived.acquire(blocking=False) and not application.gone.acquire(blocking=False)


@pytest.fixture
def address(running: tuple[Application, str]) -> str:
    return running[1]


async def happens(what: threading.Semaphore) -> bool:
    return await asyncio.to_thread(what.acquire, timeout=PATIENCE_S)


def test_cancelling_a_task_reaches_the_server(application: Application, address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.complete("p", model="m"))
            assert await happens(application.arrived)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await happens(application.gone)

    asyncio.run(run())


def test_cancelling_the_reader_of_a_stream_reaches_the_server(application: Application, address: str) -> None:
    async def run() -> None:
        read = asyncio.Event()

        async def reader(client: AsyncClient) -> None:
            async for _ in await client.stream_complete("p", model="m"):
                read.set()

        async with AsyncClient(address) as client:
            task = asyncio.create_task(reader(client))
            await asyncio.wait_for(read.wait(), PATIENCE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await happens(application.arrived) and await happens(application.gone)

    asyncio.run(run())


def test_leaving_a_stream_reaches_the_server(application: Application, address: str) -> None:
    with Client(address) as client:
        with client.stream_complete("p", model="m") as stream:
            assert next(stream).text == " a"
        assert application.arrived.acquire(timeout=PATIENCE_S) and application.gone.acquire(timeout=PATIENCE_S)

    async def run() -> None:
        async with AsyncClient(address) as client:
            async with await client.stream_complete("p", model="m") as stream:
                assert (await anext(stream)).text == " a"
            assert await happens(application.arrived) and await happens(application.gone)

    asyncio.run(run())


@pytest.mark.parametrize("model", ["silent", "trickle"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_reaches_the_server(application: Application, address: str, model: str, stream: bool) -> None:
    """Also where the answer keeps arriving: no read of it takes long."""

    def spend(client: Client) -> None:
        if stream:
            list(client.stream_complete("p", model=model, deadline_s=0.3))
        else:
            client.complete("p", model=model, deadline_s=0.3)

    async def spend_async() -> None:
        async with AsyncClient(address) as client:
            if stream:
                [_ async for _ in await client.stream_complete("p", model=model, deadline_s=0.3)]
            else:
                await client.complete("p", model=model, deadline_s=0.3)

    with Client(address) as client, pytest.raises(DeadlineExceeded, match="deadline_s = 0.3 s: 1 attempt"):
        spend(client)
    assert application.arrived.acquire(timeout=PATIENCE_S) and application.gone.acquire(timeout=PATIENCE_S)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(spend_async())
    assert application.arrived.acquire(timeout=PATIENCE_S) and application.gone.acquire(timeout=PATIENCE_S)


def test_a_timeout_reaches_the_server(application: Application, address: str) -> None:
    with Client(address, timeout_s=0.2) as client, pytest.raises(RequestTimeoutError):
        client.complete("p", model="m")
    assert application.arrived.acquire(timeout=PATIENCE_S) and application.gone.acquire(timeout=PATIENCE_S)


def test_the_first_error_of_a_map_of_tasks_cancels_those_under_way(application: Application, address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            rows = [{"prompt": "p", "model": model} for model in ("slow", "slow", "refused", "never")]
            with pytest.raises(BadRequestError) as caught:
                await client.map(rows, concurrency=3)
            assert caught.value.__notes__ == ["question 2 of 4"]
            assert [await happens(application.arrived) for _ in range(3)] == [True] * 3
            assert [await happens(application.gone) for _ in range(2)] == [True] * 2

    asyncio.run(run())


def test_cancelling_a_map_cancels_all_of_it(application: Application, address: str) -> None:
    async def run() -> None:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.map(["p"] * 5, model="m", concurrency=2))
            assert await happens(application.arrived) and await happens(application.arrived)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await happens(application.gone) and await happens(application.gone)

    asyncio.run(run())
