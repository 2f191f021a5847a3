"""The stock openai client against the real server: what a user of it gets, with `extra_body` and nothing else."""

import asyncio
from typing import Any

import httpx2
import openai
import pytest

from tests.contracts.conftest import AsyncBusy, Busy
from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "w1 w2 w3 w40 w5"
USER: Any = [{"role": "user", "content": "w3 w40 w5"}]
ASKED = {"uncertainty": {"n_samples": 2, "granularity": "token"}}
OPTIONS: dict[str, Any] = {"model": "diag", "max_tokens": 3, "temperature": 0, "extra_body": ASKED}


def check_whole(answer: Any) -> None:
    uncertainty = answer.choices[0].uncertainty
    assert uncertainty["n_effective"] == 2 and len(uncertainty["tokens"]) == 3
    assert uncertainty["total"] == pytest.approx(uncertainty["aleatoric"] + uncertainty["epistemic"], abs=1e-6)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.uncertainty_details["sample_completion_tokens"] == 6


def check_stream(chunks: list[Any], text: str) -> None:
    """Every chunk with a token has its scores, one has the whole object, the last has the usage."""
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join((p.delta.content if hasattr(p, "delta") else p.text) or "" for p in pieces) == text
    scores = [piece.uncertainty for piece in pieces if getattr(piece, "uncertainty", None)]
    assert [len(each["tokens"]) for each in scores if "mode" not in each] == [1, 1]
    (whole,) = (each for each in scores if "mode" in each)
    assert len(whole["tokens"]) == 3 and 0 <= whole["confidence"] <= 1
    assert chunks[-1].usage.uncertainty_details["n_samples"] == 2


@pytest.fixture
def url(server: Server) -> str:
    return f"{server.url}/v1"


def test_completions_and_chat(url: str) -> None:
    streamed: dict[str, Any] = OPTIONS | {"stream": True, "stream_options": {"include_usage": True}}
    with openai.OpenAI(base_url=url, api_key="none") as client:
        completion = client.completions.create(prompt=PROMPT, **OPTIONS)
        check_whole(completion)
        check_stream(list(client.completions.create(prompt=PROMPT, **streamed)), completion.choices[0].text)
        chat = client.chat.completions.create(messages=USER, **OPTIONS)
        check_whole(chat)
        check_stream(list(client.chat.completions.create(messages=USER, **streamed)), chat.choices[0].message.content)
        plain = client.completions.create(model="diag", prompt=PROMPT, max_tokens=3, temperature=0)
        assert plain.choices[0].text and "uncertainty" not in (plain.choices[0].model_extra or {})


def test_completions_and_chat_of_the_asynchronous_client(url: str) -> None:
    streamed: dict[str, Any] = OPTIONS | {"stream": True, "stream_options": {"include_usage": True}}

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            completion, chat = await asyncio.gather(
                client.completions.create(prompt=PROMPT, **OPTIONS),
                client.chat.completions.create(messages=USER, **OPTIONS),
            )
            check_whole(completion)
            check_whole(chat)
            chunks = [chunk async for chunk in await client.completions.create(prompt=PROMPT, **streamed)]
            check_stream(chunks, completion.choices[0].text)
            chunks = [chunk async for chunk in await client.chat.completions.create(messages=USER, **streamed)]
            check_stream(chunks, chat.choices[0].message.content)

    asyncio.run(run())


def test_several_choices_and_labels(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        answer = client.completions.create(
            model="diag", prompt=[PROMPT, "w7"], n=2, max_tokens=2, extra_body={"uncertainty": {"n_samples": 2}}
        )
        assert [choice.index for choice in answer.choices if choice.uncertainty["confidence"] > 0] == [0, 1, 2, 3]
        labels = {"uncertainty": {"n_samples": 2, "mode": "choices", "choices": [" w7", " w8"]}}
        chosen = client.chat.completions.create(model="diag", messages=USER, extra_body=labels).choices[0]
        assert sum(each["prob"] for each in chosen.uncertainty["choices"]) == pytest.approx(1.0)
        models = {model.id: model for model in client.models.list()}
        assert models["diag"].posterior["kind"] == "diag"


def test_errors(url: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="diag", messages=USER, extra_body={"uncertainty": {"k": 4}})
            assert caught.value.param == "uncertainty.k"

    with openai.OpenAI(base_url=url, api_key="none") as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.completions.create(
                    model="diag", prompt=PROMPT, stream=stream, extra_body={"uncertainty": {"samples": 4}}
                )
            assert (caught.value.status_code, caught.value.param) == (400, "uncertainty.samples")
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="nobody", prompt=PROMPT, extra_body={"uncertainty": True})
        assert missing.value.status_code == 404
        with pytest.raises(openai.NotFoundError, match="no route"):
            client.responses.create(model="diag", input="w1", extra_body={"uncertainty": True})
    asyncio.run(run())


def test_an_overloaded_server_is_asked_again(url: str) -> None:
    busy = Busy(503, 429)
    with openai.OpenAI(base_url=url, api_key="none", http_client=httpx2.Client(transport=busy)) as client:
        check_whole(client.completions.create(prompt=PROMPT, **OPTIONS))
    assert busy.requests == 3

    async def run() -> None:
        busy = AsyncBusy(429, 503)
        http = httpx2.AsyncClient(transport=busy)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
            check_whole(await client.chat.completions.create(messages=USER, **OPTIONS))
        assert busy.busy.requests == 3

    asyncio.run(run())
