"""The asynchronous client: the methods of `Client`, which describes them, to be awaited."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx2

from credence.clients import questions
from credence.clients.admin import AsyncAdapters
from credence.clients.mapping import map_in_tasks
from credence.clients.questions import Items, Method
from credence.clients.requests import (
    ChatArguments,
    CompletionArguments,
    MapArguments,
    Messages,
    Prompt,
    ScoreArguments,
)
from credence.clients.settings import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT_S, Settings
from credence.clients.streaming import AsyncStream
from credence.clients.transport import AsyncTransport
from credence.clients.types import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Model, Score

_No = Literal[False]


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors. One client belongs to one event loop.

    Cancelling a task closes its connection, and the server stops working on the answer.

    Example:
        >>> async with AsyncClient("http://localhost:8000") as client:
        ...     answer = await client.complete("Text: hello\\nLabel:", model="triage", uncertainty=True, max_tokens=1)
        ...     async with await client.stream_complete("Once", model="triage") as stream:
        ...         async for chunk in stream:
        ...             print(chunk.text)
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        """Prepare the client; see `Client`. `transport` is an asynchronous one of httpx2."""
        settings = Settings(base_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries)
        self._transport = AsyncTransport(settings, transport)
        self.adapters = AsyncAdapters(self._transport)

    def __repr__(self) -> str:
        """Return the address only: the key stays out of logs."""
        return f"AsyncClient({self._transport.settings.base_url!r})"

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        await self._transport.close()

    async def complete(self, prompt: Prompt | Sequence[Prompt], **arguments: Unpack[CompletionArguments]) -> Completion:
        """See `Client.complete`."""
        return await self._transport.ask(questions.completion(prompt, arguments))

    async def stream_complete(
        self, prompt: Prompt | Sequence[Prompt], **arguments: Unpack[CompletionArguments]
    ) -> AsyncStream[CompletionChunk]:
        """See `Client.stream_complete`; a stream is awaited, and then read with `async for`."""
        return await self._transport.stream(questions.completion_stream(prompt, arguments))

    async def chat(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> ChatCompletion:
        """See `Client.chat`."""
        return await self._transport.ask(questions.chat(messages, arguments))

    async def stream_chat(
        self, messages: Messages, **arguments: Unpack[ChatArguments]
    ) -> AsyncStream[ChatCompletionChunk]:
        """See `Client.stream_chat`."""
        return await self._transport.stream(questions.chat_stream(messages, arguments))

    async def score(self, **arguments: Unpack[ScoreArguments]) -> Score:
        """See `Client.score`."""
        return await self._transport.ask(questions.score(arguments))

    @overload
    async def map(
        self,
        items: Items,
        *,
        ask: Literal["complete"] = ...,
        return_errors: _No = ...,
        **arguments: Unpack[MapArguments],
    ) -> list[Completion]: ...

    @overload
    async def map(
        self, items: Items, *, ask: Literal["chat"], return_errors: _No = ..., **arguments: Unpack[MapArguments]
    ) -> list[ChatCompletion]: ...

    @overload
    async def map(
        self, items: Items, *, ask: Literal["score"], return_errors: _No = ..., **arguments: Unpack[MapArguments]
    ) -> list[Score]: ...

    @overload
    async def map(
        self, items: Items, *, ask: Method = ..., return_errors: bool, **arguments: Unpack[MapArguments]
    ) -> list[Any]: ...

    async def map(
        self,
        items: Items,
        *,
        ask: Method = "complete",
        return_errors: bool = False,
        **arguments: Unpack[MapArguments],
    ) -> list[Any]:
        """See `Client.map`; in tasks. After the first error, those under way are cancelled."""
        asked = questions.of_items(items, ask, arguments)
        return await map_in_tasks(self._transport.ask, asked, arguments, return_errors=return_errors)

    async def models(self) -> tuple[Model, ...]:
        """See `Client.models`."""
        return await self._transport.ask(questions.MODELS)

    async def health(self) -> bool:
        """See `Client.health`."""
        return await self._transport.alive(questions.LIVENESS)

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._transport.alive(questions.READINESS)
