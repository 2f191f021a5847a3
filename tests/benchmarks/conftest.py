"""Servers that answer from memory, and a workload that needs no files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from credence.benchmarks.servers import Target
from credence.benchmarks.workload import Workload

Fake = Callable[..., tuple[Target, list[dict[str, Any]]]]


@pytest.fixture
def workload() -> Workload:
    return Workload(base=Path("base"), adapter=Path("adapter"), name="fake", num_parameters=98_000_000, vocab_size=1000)


@pytest.fixture
def fake() -> Fake:
    """Builds a target that answers every request as it should be, and the list of the requests it gets."""

    def build(url: str = "http://fake", answer: Callable[[dict[str, Any]], httpx2.Response] | None = None) -> Any:
        asked: list[dict[str, Any]] = []

        def complete(request: httpx2.Request) -> httpx2.Response:
            assert request.url.path == "/v1/completions"
            body = json.loads(request.content)
            asked.append(body)
            if answer is not None:
                return answer(body)
            if body.get("stream"):
                chunks = [{"choices": [{"text": "w"}]}] * body["max_tokens"] + [{"choices": [], "usage": {}}]
                lines = [*map(json.dumps, chunks), "[DONE]"]
                return httpx2.Response(200, text="".join(f"data: {line}\n\n" for line in lines))
            count = body["max_tokens"] * body.get("n", 1)
            choice: dict[str, Any] = {"text": "", "token_ids": list(range(body["max_tokens"]))}
            if "uncertainty" in body:
                choice["uncertainty"] = {}
            return httpx2.Response(200, json={"choices": [choice], "usage": {"completion_tokens": count}})

        http = httpx2.Client(base_url=url, transport=httpx2.MockTransport(complete))
        return Target(url=url, pids=[], http=http), asked

    return build
