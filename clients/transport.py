"""How a call reaches the server: connections for threads and for asyncio. What is decided about a call, both take from `Call`."""

import asyncio
import time
from typing import Any, TypeVar

import httpx2

from credence.clients.calls import Call, Question
from credence.clients.errors import ServiceUnavailableError
from credence.clients.settings import Settings
from credence.clients.streaming import AsyncStream, ChunkT, Stream

_AnswerT = TypeVar("_AnswerT")


class Transport:
    """The connections to one server; threads may share them."""

    def __init__(self, settings: Settings, transport: httpx2.BaseTransport | None) -> None:
        """Send nothing yet."""
        self.settings = settings
        self._http = httpx2.Client(**settings.http_options(), transport=transport)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(self, question: Question[_AnswerT]) -> _AnswerT:
        """Return the answer; see `credence.clients.errors` for what is raised."""
        call = Call(self.settings, question)
        response = self._open(call)
        try:
            with call.translated():
                content = b"".join(map(call.in_time, response.iter_bytes()))
        finally:
            response.close()
        return question.read(call.reply(response), content)

    def stream(self, question: Question[ChunkT]) -> Stream[ChunkT]:
        """Return the answer of a streamed question, unread."""
        call = Call(self.settings, question)
        return Stream(call, self._open(call))

    def alive(self, probe: Question[bool]) -> bool:
        """Ask a probe; False when it answers 503."""
        try:
            return self.ask(probe)
        except ServiceUnavailableError:
            return False

    def _open(self, call: Call[Any]) -> httpx2.Response:
        while True:
            with call.attempt():
                response = self._http.send(self._http.build_request(**call.request), stream=True)
                if call.accepts(response):
                    return response
                try:
                    content = b"".join(map(call.in_time, response.iter_bytes()))
                finally:
                    response.close()
                raise call.refusal(response, content)
            time.sleep(call.delay_s)


class AsyncTransport:
    """The connections to one server, for the tasks of one event loop; see `Transport`."""

    def __init__(self, settings: Settings, transport: httpx2.AsyncBaseTransport | None) -> None:
        """Send nothing yet."""
        self.settings = settings
        self._http = httpx2.AsyncClient(**settings.http_options(), transport=transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, question: Question[_AnswerT]) -> _AnswerT:
        """Return the answer; see `credence.clients.errors` for what is raised. Cancelling it closes the connection."""
        call = Call(self.settings, question)
        response = await self._open(call)
        try:
            with call.translated():
                content = b"".join([call.in_time(part) async for part in response.aiter_bytes()])
        finally:
            await response.aclose()
        return question.read(call.reply(response), content)

    async def stream(self, question: Question[ChunkT]) -> AsyncStream[ChunkT]:
        """Return the answer of a streamed question, unread."""
        call = Call(self.settings, question)
        return AsyncStream(call, await self._open(call))

    async def alive(self, probe: Question[bool]) -> bool:
        """Ask a probe; False when it answers 503."""
        try:
            return await self.ask(probe)
        except ServiceUnavailableError:
            return False

    async def _open(self, call: Call[Any]) -> httpx2.Response:
        while True:
            with call.attempt():
                response = await self._http.send(self._http.build_request(**call.request), stream=True)
                if call.accepts(response):
                    return response
                try:
                    content = b"".join([call.in_time(part) async for part in response.aiter_bytes()])
                finally:
                    await response.aclose()
                raise call.refusal(response, content)
            await asyncio.sleep(call.delay_s)
