"""Server-sent events with uncertainty: vLLM's own stream, completed event by event."""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Protocol

from credence.serve.ensemble import Plan
from credence.serve.errors import ServeError, without_messages
from credence.serve.schemas import Uncertainty
from credence.serve.vllm_plugin.modes import Run

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


class Observer(Protocol):
    """Who hears of finished answers and knows vLLM's errors."""

    def observe(self, plan: Plan, uncertainty: Uncertainty) -> None:
        """Hears of a finished answer."""
        ...

    def error_of(self, error: Exception) -> ServeError:
        """Translates an exception."""
        ...


class AnswerStream:
    """A running answer (credence.serve.gate.EventStream).

    A choice's chunks carry the scores of their new tokens where the request asks for them (mode ensemble, granularity token); its last
    chunk carries the whole object. What is known only later (mode score) follows in a chunk of its own, before usage and the end.

    Args:
        events: vLLM's events.
        stack: what is to be given back when the stream is closed.
    """

    def __init__(
        self, *, events: AsyncGenerator[str, None], run: Run, model: str, stack: AsyncExitStack, backend: Observer
    ) -> None:
        self._vllm = events
        self._run = run
        self._model = model
        self._stack = stack
        self._backend = backend
        self._told: set[int] = set()
        self._skeleton: dict[str, Any] = {}

    @property
    def num_samples(self) -> int:
        """K so far."""
        return self._run.num_samples

    async def events(self) -> AsyncIterator[bytes]:
        """The events; an error is an event, after which the stream ends."""
        try:
            async for event in self._vllm:
                if event == DONE:
                    break
                for completed in self._completed(json.loads(event.removeprefix("data: "))):
                    yield completed
            for late in self._late():
                yield late
        except Exception as error:
            failure = self._backend.error_of(error)
            if failure.status >= 500:
                logger.error("An uncertainty stream failed: %s", without_messages(error))
            yield _event(failure.body())
        yield DONE.encode()

    async def close(self) -> None:
        """Ends what still runs and gives the samples back."""
        try:
            await self._vllm.aclose()
        finally:
            await self._stack.aclose()

    def _completed(self, chunk: dict[str, Any]) -> list[bytes]:
        if "error" in chunk:
            # vLLM's handler has put the exception's text into an error of its own.
            raise self._run.error or _failure(chunk["error"])
        events = [] if chunk["choices"] else self._late()
        chunk["model"] = self._model
        self._skeleton = self._skeleton or {key: chunk[key] for key in ("id", "object", "created", "model")}
        for choice in chunk["choices"]:
            index = choice["index"]
            if choice.get("finish_reason") is not None and index in self._run.uncertainty:
                choice["uncertainty"] = self._tell(index)
            elif self._run.plan.options.granularity == "token" and "role" not in choice.get("delta", {}):
                tokens = [token.model_dump(exclude_none=True) for token in self._run.new_tokens(index)]
                if tokens:
                    choice["uncertainty"] = {"tokens": tokens}
        if chunk.get("usage"):
            chunk["usage"]["uncertainty_details"] = self._run.usage()
        return [*events, _event(chunk)]

    def _late(self) -> list[bytes]:
        """Chunks for what has become known after the choice's own last chunk."""
        events = []
        for index in sorted(self._run.uncertainty.keys() - self._told):
            text: dict[str, Any] = {"delta": {}} if "chat" in self._skeleton.get("object", "") else {"text": ""}
            choice = {"index": index, **text, "logprobs": None, "finish_reason": None, "uncertainty": self._tell(index)}
            events.append(_event({**self._skeleton, "choices": [choice]}))
        return events

    def _tell(self, index: int) -> dict[str, Any]:
        uncertainty = self._run.uncertainty[index]
        self._told.add(index)
        self._backend.observe(self._run.plan, uncertainty)
        return uncertainty.to_json()


def _event(document: dict[str, Any]) -> bytes:
    return (
        b"data: " + json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
    )


def _failure(error: dict[str, Any]) -> ServeError:
    failure = ServeError(str(error.get("message")), param=error.get("param"))
    failure.status, failure.kind = int(error.get("code") or 500), str(error.get("type"))
    return failure
