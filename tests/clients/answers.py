"""Answers as a Credence server sends them, for a hand-written transport."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest

UNCERTAINTY: dict[str, Any] = {
    "mode": "ensemble",
    "n_samples": 8,
    "n_effective": 8,
    "tau": 1.0,
    "seed": 0,
    "confidence": 0.83,
    "calibrated": True,
    "flag": "ok",
    "total": 0.41,
    "aleatoric": 0.29,
    "epistemic": 0.12,
    "unit": "nats/token",
    "sequence": {"mean_logprob": -0.51, "logprob_std": 0.08, "variation_ratio": 0.125},
    "adapter": {"name": "triage", "digest": "sha256:ab"},
}


def completion(*uncertainties: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """A completion with one choice per argument; None leaves the uncertainty out."""
    choices = []
    for index, uncertainty in enumerate(uncertainties or (None,)):
        choice: dict[str, Any] = {"index": index, "text": f" text {index}", "finish_reason": "length", "logprobs": None}
        if uncertainty is not None:
            choice["uncertainty"] = uncertainty
        choices.append(choice)
    body = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "triage",
        "choices": choices,
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    return body | changes


def chat_completion(*uncertainties: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    """The same as a chat completion."""
    body = completion(*uncertainties)
    for choice in body["choices"]:
        choice["message"] = {"role": "assistant", "content": choice.pop("text")}
    return body | {"id": "chatcmpl-1", "object": "chat.completion"} | changes


def score(uncertainty: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An answer of the scoring route."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "uncertainty_details": {"n_samples": 8}}
    body = {"id": "score-1", "object": "uncertainty.score", "created": 1, "model": "triage", "usage": usage}
    return body | {"uncertainty": uncertainty} | changes


def chunk(text: str | None = None, *, index: int = 0, chat: bool = False, **changes: Any) -> dict[str, Any]:
    """One chunk of a stream with one choice; `text` None is a chunk without choices."""
    choices = []
    if text is not None:
        body = {"delta": {"content": text}} if chat else {"text": text}
        choices = [{"index": index, "logprobs": None, "finish_reason": None} | body | changes]
        changes = {}
    return {"id": "cmpl-1", "created": 1, "model": "triage", "choices": choices} | changes


def events(*documents: dict[str, Any] | str) -> bytes:
    """Server-sent events: documents as JSON, texts as they are."""
    texts = (text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in documents)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


class Body(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that arrives in the given pieces. An exception among them is raised in its place, a function called before the next.

    Remembers whether it was closed.
    """

    def __init__(self, *pieces: bytes | Exception | Callable[[], None]) -> None:
        self.pieces = pieces
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.taken += 1
            if isinstance(piece, Exception):
                raise piece
            if callable(piece):
                piece()
            else:
                yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def stream(*pieces: bytes | Exception | Callable[[], None], **headers: str) -> httpx2.Response:
    """An answer that streams `pieces`; `response.extensions` keeps the `body`, which httpx2 wraps."""
    named = {"Content-Type": "text/event-stream; charset=utf-8"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    body = Body(*pieces)
    return httpx2.Response(200, headers=named, stream=body, extensions={"body": body})


class Script:
    """Answers requests with the given responses, exceptions or functions that give one, in order, and remembers the requests."""

    def __init__(self, *steps: httpx2.Response | Exception | Callable[[], httpx2.Response | Exception]) -> None:
        self.steps = list(steps)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        step = self.steps.pop(0)
        if callable(step):
            step = step()
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def body(self) -> dict[str, Any]:
        """Body of the last request."""
        body: dict[str, Any] = json.loads(self.requests[-1].content)
        return body


def serve(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Put a scripted server behind every client that is opened, at any address."""
    script = Script()
    real = httpx2.Client

    def connect(**options: Any) -> httpx2.Client:
        return real(**(options | {"transport": httpx2.MockTransport(script)}))

    monkeypatch.setattr(httpx2, "Client", connect)
    monkeypatch.delenv("CREDENCE_API_KEY", raising=False)
    monkeypatch.delenv("CREDENCE_URL", raising=False)
    return script


def error(status: int, body: object = None, **headers: str) -> httpx2.Response:
    """An error answer; header names are given with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        body = {"error": {"message": "no", "type": "some_error", "param": None, "code": status}}
    if isinstance(body, str | bytes):
        return httpx2.Response(status, content=body, headers=named)
    return httpx2.Response(status, json=body, headers=named)
