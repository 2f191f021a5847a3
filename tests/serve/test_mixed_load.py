"""Two hundred requests of all modes at once, some of them abandoned: every answer is that of a quiet server, and nothing is left behind."""

import asyncio
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REQUESTS, DISTINCT, ABANDONED = 200, 40, 0.2
MODES = ("mean", "base", "ensemble", "ensemble", "score", "choices", "generate", "auto", "chat", "route")
NUMBERS = ("total", "aleatoric", "epistemic", "confidence")


def make_request(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A random request with one possible answer (greedy or seeded)."""
    mode = generator.choice(MODES)
    model = generator.choice(("diag", "row"))
    prompt = [generator.randrange(3, 128) for _ in range(generator.choice((2, 9, 40, 70, 100)))]
    k = generator.randint(1, 8)
    options: dict[str, Any] = {"n_samples": k, "granularity": "token"}
    body: dict[str, Any] = {"model": model, "max_tokens": generator.randint(1, 12), "ignore_eos": True}
    body |= {"temperature": 0} if generator.random() < 0.7 else {"temperature": 0.7, "seed": generator.randrange(100)}
    if mode == "route":
        completion = [generator.randrange(3, 128) for _ in range(generator.randint(1, 20))]
        return "/v1/uncertainty/score", {
            "model": model, "prompt": prompt, "completion": completion, "uncertainty": {"n_samples": k}
        }  # fmt: skip
    body["stream"] = generator.random() < 0.4
    if mode in ("mean", "base"):
        body["temperature"] = 0
        return "/v1/completions", {**body, "prompt": prompt, "model": model if mode == "mean" else "base"}
    if mode == "chat":
        words = " ".join(f"w{token}" for token in prompt)
        messages = [{"role": "user", "content": words}]
        return "/v1/chat/completions", {**body, "messages": messages, "uncertainty": options}
    if generator.random() < 0.2:
        options["seed"] = generator.randrange(3)
    if mode == "score":
        body["temperature"] = 0
        options["mode"] = "score"
    elif mode == "choices":
        options |= {"mode": "choices", "choices": [" w20", " w21 w22", " w50 w51 w52"]}
    elif mode == "generate":
        options["mode"] = "generate"
    elif mode == "auto":
        options |= {"mode": "choices", "choices": [" w20", " w50", " w70"], "n_samples": "auto"}
    return "/v1/completions", {**body, "prompt": prompt, "uncertainty": options}


def parsed(content: bytes, stream: bool) -> list[dict[str, Any]]:
    """The documents of an answer."""
    if not stream:
        return [json.loads(content)]
    lines = [line[6:] for line in content.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def gist(documents: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Text and the last uncertainty of an answer."""
    text, uncertainty = "", {}
    for document in documents:
        assert "error" not in document, document
        for choice in document.get("choices", [document]):
            text += choice.get("text") or ""
            text += (choice.get("delta") or choice.get("message") or {}).get("content") or ""
            uncertainty = choice.get("uncertainty", uncertainty)
    return text, uncertainty


def same(answer: tuple[str, dict[str, Any]], expected: tuple[str, dict[str, Any]]) -> None:
    assert answer[0] == expected[0]
    assert answer[1].keys() == expected[1].keys()
    for number in NUMBERS:
        if expected[1].get(number) is not None:
            assert math.isclose(answer[1][number], expected[1][number], abs_tol=1e-4), number
    assert answer[1].get("n_effective") == expected[1].get("n_effective")


async def storm(server: Server, requests: list[tuple[str, dict[str, Any]]], generator: random.Random) -> list[Any]:
    """All at once; some callers go away at a random moment (their answer is None)."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def one(path: str, body: dict[str, Any], patience_s: float | None) -> Any:
            try:
                async with asyncio.timeout(patience_s):
                    response = await client.post(path, json=body)
                    while response.status_code == 503:  # full: 1024 rows, or no slot for other samples
                        await asyncio.sleep(generator.uniform(0.2, 1) * int(response.headers["retry-after"]))
                        response = await client.post(path, json=body)
            except TimeoutError:
                return None
            assert response.status_code == 200, response.text
            return gist(parsed(response.content, body.get("stream", False)))

        patience = [generator.uniform(0, 10) if generator.random() < ABANDONED else None for _ in requests]
        return await asyncio.gather(*(one(*r, p) for r, p in zip(requests, patience, strict=True)))


def resident_bytes(server: Server) -> int:
    """Resident memory of the server and its children."""
    pids, total = [server.process.pid], 0
    while pids:
        pid = pids.pop()
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return total


def settle(server: Server) -> None:
    """Waits until the engine has heard of everybody who went away."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        rows = server.client.get("/metrics").text.splitlines()
        busy = [row for row in rows if row.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
        if all(row.endswith(" 0.0") for row in busy):
            return
        time.sleep(0.1)
    raise AssertionError(f"still busy: {busy}")


def test_two_hundred_at_once_with_some_going_away(server: Server) -> None:
    generator = random.Random(7)
    distinct = [make_request(generator) for _ in range(DISTINCT)]
    expected = []
    for path, body in distinct:
        response = server.client.post(path, json=body)
        assert response.status_code == 200, (body, response.text)
        expected.append(gist(parsed(response.content, body.get("stream", False))))
    memory = []
    for round_number in range(3):
        order = [generator.randrange(DISTINCT) for _ in range(REQUESTS)]
        answers = asyncio.run(storm(server, [distinct[number] for number in order], generator))
        outcomes = Counter("gone" if answer is None else "answered" for answer in answers)
        assert outcomes["gone"] > 0 and outcomes["answered"] > REQUESTS // 2
        for number, answer in zip(order, answers, strict=True):
            if answer is not None:
                same(answer, expected[number])
        settle(server)
        memory.append(resident_bytes(server))
        assert server.metric('credence_sample_slots{state="leased"}') == 0, round_number
        assert server.metric("credence_inflight_requests") == 0
        usage = [row for row in server.client.get("/metrics").text.splitlines() if "kv_cache_usage_perc{" in row]
        assert usage and all(row.endswith(" 0.0") for row in usage)
    # The first round fills pools; what a round leaves behind for good would be there again in the third.
    assert memory[2] - memory[1] < 30 * 2**20, memory
    for (path, body), answer in list(zip(distinct, expected, strict=True))[:10]:
        response = server.client.post(path, json=body)
        same(gist(parsed(response.content, body.get("stream", False))), answer)
