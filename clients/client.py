"""The synchronous client: one method per question a caller has for a Credence server.

What is retried, and what never is, stands in `credence.clients.transport`.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from credence.clients.errors import UncertaintyMissingError
from credence.clients.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationOptions,
    Messages,
    Prompt,
    ScoringOptions,
    generation_body,
    score_body,
)
from credence.clients.streaming import Stream
from credence.clients.transport import Reply, Transport
from credence.clients.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Model,
    ModelList,
    Score,
)

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_RETRIES = 2

_COMPLETIONS = "/v1/completions"
_CHAT_COMPLETIONS = "/v1/chat/completions"
_SCORE = "/v1/uncertainty/score"

_AnswerT = TypeVar("_AnswerT", Completion, ChatCompletion)


class Client:
    """A connection to one Credence (or plain vLLM) server.

    Usable as a context manager; otherwise call `close`. Threads may share one client.

    Example:
        >>> with Client("http://localhost:8000") as client:
        ...     answer = client.complete("Text: hello\\nLabel:", model="triage", uncertainty=True, max_tokens=1)
        ...     print(answer.text, answer.uncertainty.confidence)
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            base_url: Address of the server, with or without `/v1`.
            api_key: Sent as a bearer token.
            timeout_s: Longest wait for the answer, in seconds, for each attempt; of a stream, for each piece of it.
            max_retries: Attempts after the first.
            transport: An httpx transport, to test without a network.

        Raises:
            ValueError: If an argument is not usable; the message never contains the key.
        """
        self._transport = Transport(
            base_url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries, transport=transport
        )

    def __repr__(self) -> str:
        """Return the address only: the key stays out of logs."""
        return f"Client({self._transport.base_url!r})"

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

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        model: str,
        uncertainty: bool = False,
        logprobs: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion:
        """Complete a prompt or several, with the uncertainty of each completion when asked for.

        Args:
            prompt: Text or token ids, or a list of texts or of lists of token ids.
            model: Name of an adapter (or of the base model, without uncertainty).
            uncertainty: Ask for the uncertainty of every choice.
            logprobs: Number of most likely tokens to report at each position.
            options: See `GenerationOptions`; what is left out or None is the server's default.

        Returns:
            The completion; with `uncertainty=True` every choice has its `uncertainty`.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            UncertaintyMissingError: The server ignored the question for uncertainty.
            CredenceError: Anything else that goes wrong; see `credence.clients.errors`.
        """
        body = generation_body(
            CompletionRequest,
            uncertainty=uncertainty,
            options=options,
            stream=False,
            model=model,
            prompt=prompt,
            logprobs=logprobs,
        )
        reply = self._transport.send("POST", _COMPLETIONS, body)
        return _checked(reply.parsed(Completion), reply, uncertainty)

    def stream_complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        model: str,
        uncertainty: bool = False,
        logprobs: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream[CompletionChunk]:
        """Complete a prompt or several, and hand out the text as it is generated.

        The request is sent by the call; its errors are raised here, those of the answer's course by the iteration. With mode
        `ensemble` and granularity `token` every chunk has the scores of its tokens; the other modes send them with the end.

        Args:
            prompt: Text or token ids, or a list of texts or of lists of token ids.
            model: Name of an adapter (or of the base model, without uncertainty).
            uncertainty: Ask for the uncertainty of every choice.
            logprobs: Number of most likely tokens to report at each position.
            options: See `GenerationOptions`; what is left out or None is the server's default.

        Returns:
            An iterator of chunks, to be closed (it is a context manager) unless it is read to its end.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            CredenceError: See `credence.clients.errors`, and `Stream` for what the iteration raises.
        """
        body = generation_body(
            CompletionRequest,
            uncertainty=uncertainty,
            options=options,
            stream=True,
            model=model,
            prompt=prompt,
            logprobs=logprobs,
        )
        reply = self._transport.send("POST", _COMPLETIONS, body, stream=True)
        return Stream(reply, CompletionChunk, transport=self._transport, uncertainty=uncertainty)

    def chat(
        self,
        messages: Messages,
        *,
        model: str,
        uncertainty: bool = False,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> ChatCompletion:
        """Answer a conversation, with the uncertainty of each answer when asked for.

        Args:
            messages: The conversation, oldest first: OpenAI's messages, for example `{"role": "user", "content": "hello"}`.
            model: Name of an adapter (or of the base model, without uncertainty).
            uncertainty: Ask for the uncertainty of every choice.
            logprobs: Report the log-probabilities of the answer's tokens.
            top_logprobs: Number of most likely tokens to report at each position.
            options: See `GenerationOptions`; what is left out or None is the server's default.

        Returns:
            The answer; with `uncertainty=True` every choice has its `uncertainty`.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            UncertaintyMissingError: The server ignored the question for uncertainty.
            CredenceError: Anything else that goes wrong; see `credence.clients.errors`.
        """
        body = generation_body(
            ChatRequest,
            uncertainty=uncertainty,
            options=options,
            stream=False,
            model=model,
            messages=messages,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
        )
        reply = self._transport.send("POST", _CHAT_COMPLETIONS, body)
        return _checked(reply.parsed(ChatCompletion), reply, uncertainty)

    def stream_chat(
        self,
        messages: Messages,
        *,
        model: str,
        uncertainty: bool = False,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream[ChatCompletionChunk]:
        """Answer a conversation, and hand out the text as it is generated; see `chat` and `stream_complete`.

        Returns:
            An iterator of chunks, to be closed (it is a context manager) unless it is read to its end.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            CredenceError: See `credence.clients.errors`, and `Stream` for what the iteration raises.
        """
        body = generation_body(
            ChatRequest,
            uncertainty=uncertainty,
            options=options,
            stream=True,
            model=model,
            messages=messages,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
        )
        reply = self._transport.send("POST", _CHAT_COMPLETIONS, body, stream=True)
        return Stream(reply, ChatCompletionChunk, transport=self._transport, uncertainty=uncertainty)

    def score(
        self,
        *,
        model: str,
        prompt: Prompt | None = None,
        completion: Prompt | None = None,
        messages: Messages | None = None,
        **options: Unpack[ScoringOptions],
    ) -> Score:
        """Compute the uncertainty of a completion that exists already; nothing is generated.

        Give `prompt` and `completion`, or `messages`.

        Args:
            model: Name of an adapter.
            prompt: Text, or token ids.
            completion: Text, or token ids, that continues the prompt.
            messages: A conversation whose last message, the assistant's, is scored.
            options: See `ScoringOptions`; what is left out or None is the server's default.

        Returns:
            The scores of the completion.

        Raises:
            ValueError: An argument is wrong; nothing was sent.
            CredenceError: See `credence.clients.errors`; NotFoundError also where the server is a plain vLLM.
        """
        body = score_body(model=model, prompt=prompt, completion=completion, messages=messages, options=options)
        reply = self._transport.send("POST", _SCORE, body)
        return reply.parsed(Score).model_copy(update={"request_id": reply.request_id})

    def models(self) -> tuple[Model, ...]:
        """List what the server serves: the base model and every adapter, with its posterior where it has one.

        Raises:
            CredenceError: See `credence.clients.errors`.
        """
        return self._transport.send("GET", "/v1/models").parsed(ModelList).data

    def health(self) -> bool:
        """Ask whether the server process is alive (GET /livez); False when it answers 503.

        Raises:
            CredenceError: The server cannot be reached, or answers with another error.
        """
        return self._transport.alive("/livez")

    def ready(self) -> bool:
        """Ask whether the server takes requests (GET /readyz); False when it answers 503.

        Raises:
            CredenceError: The server cannot be reached, or answers with another error.
        """
        return self._transport.alive("/readyz")


def _checked(answer: _AnswerT, reply: Reply, uncertainty: bool) -> _AnswerT:
    """Add the request id; refuse an answer without the uncertainty that was asked for."""
    missing = tuple(choice.index for choice in answer.choices if choice.uncertainty is None)
    if uncertainty and missing:
        raise UncertaintyMissingError.of_choices(missing, request_id=reply.request_id)
    return answer.model_copy(update={"request_id": reply.request_id})
