"""What each method of a client asks: its request, and how the answer is read. Both clients take them from here.

Raises of all of them: ValueError where an argument is wrong, TypeError where one is unknown or missing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from credence.clients.calls import Question, Reply
from credence.clients.errors import UncertaintyMissingError
from credence.clients.requests import (
    ChatRequest,
    CompletionRequest,
    MapOptions,
    Messages,
    Prompt,
    generation_body,
    score_body,
)
from credence.clients.settings import checked_seconds
from credence.clients.types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ModelList,
    Score,
)

_COMPLETIONS = "/v1/completions"
_CHAT_COMPLETIONS = "/v1/chat/completions"
_SCORE = "/v1/uncertainty/score"

Method = Literal["complete", "chat", "score"]
Items = Iterable[Prompt | Messages | Mapping[str, object]]

_GenerationT = TypeVar("_GenerationT", Completion, ChatCompletion)

MODELS = Question(path="/v1/models", method="GET", read=lambda reply, content: reply.parsed(ModelList, content).data)
LIVENESS = Question(path="/livez", method="GET", retried=False, read=lambda reply, content: True)
READINESS = Question(path="/readyz", method="GET", retried=False, read=lambda reply, content: True)


def completion(prompt: Prompt | Sequence[Prompt], arguments: Mapping[str, Any]) -> Question[Completion]:
    """The question of `complete`."""
    body = generation_body(CompletionRequest, arguments, stream=False, prompt=prompt)

    def read(reply: Reply, content: bytes) -> Completion:
        return _checked(reply.parsed(Completion, content), reply, "uncertainty" in body)

    return Question(path=_COMPLETIONS, body=body, read=read, deadline_s=_deadline_s(arguments))


def completion_stream(prompt: Prompt | Sequence[Prompt], arguments: Mapping[str, Any]) -> Question[CompletionChunk]:
    """The question of `stream_complete`."""
    body = generation_body(CompletionRequest, arguments, stream=True, prompt=prompt)
    return Question(
        path=_COMPLETIONS,
        body=body,
        read=lambda reply, event: reply.parsed(CompletionChunk, event),
        streamed=True,
        uncertainty="uncertainty" in body,
        deadline_s=_deadline_s(arguments),
    )


def chat(messages: Messages, arguments: Mapping[str, Any]) -> Question[ChatCompletion]:
    """The question of `chat`."""
    body = generation_body(ChatRequest, arguments, stream=False, messages=messages)

    def read(reply: Reply, content: bytes) -> ChatCompletion:
        return _checked(reply.parsed(ChatCompletion, content), reply, "uncertainty" in body)

    return Question(path=_CHAT_COMPLETIONS, body=body, read=read, deadline_s=_deadline_s(arguments))


def chat_stream(messages: Messages, arguments: Mapping[str, Any]) -> Question[ChatCompletionChunk]:
    """The question of `stream_chat`."""
    body = generation_body(ChatRequest, arguments, stream=True, messages=messages)
    return Question(
        path=_CHAT_COMPLETIONS,
        body=body,
        read=lambda reply, event: reply.parsed(ChatCompletionChunk, event),
        streamed=True,
        uncertainty="uncertainty" in body,
        deadline_s=_deadline_s(arguments),
    )


def score(arguments: Mapping[str, Any]) -> Question[Score]:
    """The question of `score`."""

    def read(reply: Reply, content: bytes) -> Score:
        return reply.parsed(Score, content).model_copy(update={"request_id": reply.request_id})

    return Question(path=_SCORE, body=score_body(arguments), read=read, deadline_s=_deadline_s(arguments))


def of_items(items: Items, ask: Method, arguments: Mapping[str, Any]) -> list[Question[Any]]:
    """The questions of `map`: one for each item, all of them checked before the first is sent.

    Args:
        items: Prompts, or conversations, or dictionaries of arguments that are added to (and come before) those for all.
        ask: Name of the method.
        arguments: Those for all, and the map's own.
    """
    shared = {name: value for name, value in arguments.items() if name not in MapOptions.__annotations__}
    if ask not in ("complete", "chat", "score"):
        raise ValueError(f"ask is {ask!r}; give 'complete', 'chat' or 'score'")
    if isinstance(items, str | bytes | Mapping):
        raise ValueError("items is a single one; give a list of prompts, of conversations or of dictionaries")
    questions = []
    for index, item in enumerate(items):
        try:
            questions.append(_of_item(item, ask, shared))
        except (TypeError, ValueError) as error:
            error.add_note(f"item {index} of the map")
            raise
    return questions


def _of_item(item: object, ask: Method, shared: dict[str, Any]) -> Question[Any]:
    if ask == "score":
        if not isinstance(item, Mapping):
            raise ValueError("what is scored is a dictionary with prompt and completion, or with messages")
        return score({**shared, **item})
    subject = "prompt" if ask == "complete" else "messages"
    given = {**shared, **item} if isinstance(item, Mapping) else {**shared, subject: item}
    if subject not in given:
        raise ValueError(f"the dictionary has no {subject!r}, which {ask} needs")
    of: Any = completion if ask == "complete" else chat
    question: Question[Any] = of(given.pop(subject), given)
    return question


def _checked(answer: _GenerationT, reply: Reply, uncertainty: bool) -> _GenerationT:
    """Add the request id; refuse an answer without the uncertainty that was asked for."""
    missing = tuple(choice.index for choice in answer.choices if choice.uncertainty is None)
    if uncertainty and missing:
        raise UncertaintyMissingError.of_choices(missing, request_id=reply.request_id)
    return answer.model_copy(update={"request_id": reply.request_id})


def _deadline_s(arguments: Mapping[str, Any]) -> float | None:
    deadline_s = arguments.get("deadline_s")
    return None if deadline_s is None else checked_seconds("deadline_s", deadline_s)
