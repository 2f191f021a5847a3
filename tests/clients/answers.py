"""Answers as a Credence server sends them, for a hand-written transport."""

import json
from typing import Any

import httpx

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


class Script:
    """Answers requests with the given responses or exceptions, in order, and remembers the requests."""

    def __init__(self, *steps: httpx.Response | Exception) -> None:
        self.steps = list(steps)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def body(self) -> dict[str, Any]:
        """Body of the last request."""
        body: dict[str, Any] = json.loads(self.requests[-1].content)
        return body


def error(status: int, body: object = None, **headers: str) -> httpx.Response:
    """An error answer; header names are given with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        body = {"error": {"message": "no", "type": "some_error", "param": None, "code": status}}
    if isinstance(body, str | bytes):
        return httpx.Response(status, content=body, headers=named)
    return httpx.Response(status, json=body, headers=named)
