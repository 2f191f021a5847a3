"""The synchronous client: one method per question a caller has for a Credence server.

What is retried, and what never is, stands in `credence.clients.calls`.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

import httpx2

from credence.clients import questions
from credence.clients.admin import Adapters
from credence.clients.mapping import map_in_threads
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
from credence.clients.streaming import Stream
from credence.clients.transport import Transport
from credence.clients.types import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Model, Score

_No = Literal[False]


class Client:
    """A connection to one Credence (or plain vLLM) server.

    Usable as a context manager; otherwise call `close`. Threads may share one client.

    Every method raises ValueError (TypeError where its name is unknown or missing) for a wrong argument, before anything is sent,
    and CredenceError for anything else that goes wrong: see `credence.clients.errors`.

    Example:
        >>> with Client("http://localhost:8000") as client:
        ...     answer = client.complete("Text: hello\\nLabel:", model="triage", uncertainty=True, max_tokens=1)
        ...     print(answer.text, answer.uncertainty.confidence)

    Attributes:
        adapters: Administration of the server's adapters.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            base_url: Address of the server, with or without `/v1`.
            api_key: Sent as a bearer token.
            timeout_s: Longest wait for the answer, in seconds, for each attempt; of a stream, for each piece of it.
            max_retries: Attempts after the first.
            transport: An httpx2 transport, to test without a network.

        Raises:
            ValueError: If an argument is not usable; the message never contains the key.
        """
        settings = Settings(base_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries)
        self._transport = Transport(settings, transport)
        self.adapters = Adapters(self._transport)

    def __repr__(self) -> str:
        """Return the address only: the key stays out of logs."""
        return f"Client({self._transport.settings.base_url!r})"

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._transport.close()

    def complete(self, prompt: Prompt | Sequence[Prompt], **arguments: Unpack[CompletionArguments]) -> Completion:
        """Complete a prompt or several, with the uncertainty of each completion when asked for.

        Args:
            prompt: Text or token ids, or a list of texts or of lists of token ids.
            arguments: See `CompletionArguments`; what is left out or None is the server's default.

        Returns:
            The completion; with `uncertainty=True` every choice has its `uncertainty`.

        Raises:
            UncertaintyMissingError: The server ignored the question for uncertainty.
        """
        return self._transport.ask(questions.completion(prompt, arguments))

    def stream_complete(
        self, prompt: Prompt | Sequence[Prompt], **arguments: Unpack[CompletionArguments]
    ) -> Stream[CompletionChunk]:
        """Complete a prompt or several, and hand out the text as it is generated; arguments as for `complete`.

        The request is sent by the call; its errors are raised here, those of the answer's course by the iteration. With mode
        `ensemble` and granularity `token` every chunk has the scores of its tokens; the other modes send them with the end.

        Returns:
            An iterator of chunks, to be closed (it is a context manager) unless it is read to its end.
        """
        return self._transport.stream(questions.completion_stream(prompt, arguments))

    def chat(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> ChatCompletion:
        """Answer a conversation, with the uncertainty of each answer when asked for.

        Args:
            messages: The conversation, oldest first: OpenAI's messages, for example `{"role": "user", "content": "hello"}`.
            arguments: See `ChatArguments`; what is left out or None is the server's default.

        Returns:
            The answer; with `uncertainty=True` every choice has its `uncertainty`.

        Raises:
            UncertaintyMissingError: The server ignored the question for uncertainty.
        """
        return self._transport.ask(questions.chat(messages, arguments))

    def stream_chat(self, messages: Messages, **arguments: Unpack[ChatArguments]) -> Stream[ChatCompletionChunk]:
        """Answer a conversation, and hand out the text as it is generated; see `chat` and `stream_complete`."""
        return self._transport.stream(questions.chat_stream(messages, arguments))

    def score(self, **arguments: Unpack[ScoreArguments]) -> Score:
        """Compute the uncertainty of a completion that exists already; nothing is generated.

        Args:
            arguments: See `ScoreArguments`: `prompt` and `completion`, or `messages`, and options.

        Raises:
            NotFoundError: There is no such model, or the server is a plain vLLM.
        """
        return self._transport.ask(questions.score(arguments))

    @overload
    def map(
        self,
        items: Items,
        *,
        ask: Literal["complete"] = ...,
        return_errors: _No = ...,
        **arguments: Unpack[MapArguments],
    ) -> list[Completion]: ...

    @overload
    def map(
        self, items: Items, *, ask: Literal["chat"], return_errors: _No = ..., **arguments: Unpack[MapArguments]
    ) -> list[ChatCompletion]: ...

    @overload
    def map(
        self, items: Items, *, ask: Literal["score"], return_errors: _No = ..., **arguments: Unpack[MapArguments]
    ) -> list[Score]: ...

    @overload
    def map(
        self, items: Items, *, ask: Method = ..., return_errors: bool, **arguments: Unpack[MapArguments]
    ) -> list[Any]: ...

    def map(
        self,
        items: Items,
        *,
        ask: Method = "complete",
        return_errors: bool = False,
        **arguments: Unpack[MapArguments],
    ) -> list[Any]:
        """Ask one question for each item, several at once, in threads.

        All questions are checked before the first is sent. After the first error no further one is begun, and those under way
        are waited for.

        Args:
            items: Prompts for `complete`, conversations for `chat`; or dictionaries of the method's arguments, which come before
                those given for all. `score` takes dictionaries only (`prompt` and `completion`, or `messages`).
            ask: The method.
            return_errors: Put a CredenceError in its answer's place, and go on.
            arguments: `concurrency`, `progress` (see `MapOptions`) and arguments of the method, for all items.

        Returns:
            The answers, in the order of the items.
        """
        asked = questions.of_items(items, ask, arguments)
        return map_in_threads(self._transport.ask, asked, arguments, return_errors=return_errors)

    def models(self) -> tuple[Model, ...]:
        """List what the server serves: the base model and every adapter, with its posterior where it has one."""
        return self._transport.ask(questions.MODELS)

    def health(self) -> bool:
        """Ask whether the server process is alive (GET /livez); False when it answers 503. Never retried."""
        return self._transport.alive(questions.LIVENESS)

    def ready(self) -> bool:
        """Ask whether the server takes requests (GET /readyz); False when it answers 503. Never retried."""
        return self._transport.alive(questions.READINESS)
