"""Our two clients against the real server, and against stock vLLM."""

import asyncio
import time
from typing import Any

import pytest

from credence.clients import (
    Abstained,
    AsyncClient,
    BadRequestError,
    Client,
    DeadlineExceeded,
    NotFoundError,
    UncertaintyMissingError,
)
from tests.clients.conftest import Connect
from tests.contracts.conftest import AsyncBusy, Busy
from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "w1 w2 w3 w40 w5"
USER = [{"role": "user", "content": "w3 w40 w5"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 3}


@pytest.mark.parametrize("mode", ["ensemble", "score", "choices", "generate"])
@pytest.mark.parametrize("chat", [False, True])
def test_every_mode_whole_and_as_a_stream(connect: Connect, server: Server, mode: Any, chat: bool) -> None:
    options: dict[str, Any] = {
        "model": "diag",
        "uncertainty": True,
        "n_samples": 2,
        "mode": mode,
        "granularity": "token",
    }
    options |= GREEDY | ({"choices": [" w7", " w8"]} if mode == "choices" else {})
    with connect(server.url) as client:
        answer = client.chat(USER, **options) if chat else client.complete(PROMPT, **options)
        opened = client.stream_chat(USER, **options) if chat else client.stream_complete(PROMPT, **options)
        with opened as stream:
            chunks = list(stream)
    assert answer.request_id and stream.request_id and answer.request_id != stream.request_id
    assert "".join(chunk.text for chunk in chunks) == answer.text != ""
    assert answer.uncertainty is not None and stream.uncertainty is not None
    assert (answer.uncertainty.mode, answer.uncertainty.n_effective, answer.uncertainty.model_extra) == (mode, 2, {})
    assert stream.uncertainty.confidence == pytest.approx(answer.uncertainty.confidence, rel=1e-4)
    assert stream.usage is not None and answer.usage is not None
    assert stream.usage.total_tokens == answer.usage.total_tokens
    if mode != "choices":
        tokens = [token.token for chunk in chunks for choice in chunk.choices for token in choice.tokens]
        assert answer.uncertainty.tokens is not None
        assert tokens == [token.token for token in answer.uncertainty.tokens] and len(tokens) == 3
        assert answer._repr_html_().count("<span") == 3


def test_several_choices_and_prompts(connect: Connect, server: Server) -> None:
    with connect(server.url) as client:
        answer = client.complete([PROMPT, "w7"], model="diag", uncertainty=True, n_samples=2, n=2, max_tokens=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        confidences = [choice.uncertainty.confidence for choice in answer.choices if choice.uncertainty]
        lowest = min(confidence for confidence in confidences if confidence is not None)
        assert answer.trust(lowest) and not answer.trust(1.0)
        with pytest.raises(Abstained) as caught:
            answer.require_trust(1.0)
        assert caught.value.confidence == lowest and caught.value.answer is answer


def test_score_of_texts_and_conversations(connect: Connect, server: Server) -> None:
    with connect(server.url) as client:
        score = client.score(model="diag", prompt=PROMPT, completion=" w7 w8", n_samples=2, granularity="token")
        spoken = client.score(model="diag", messages=[*USER, {"role": "assistant", "content": "w7"}], n_samples=2)
    assert score.uncertainty.tokens is not None and len(score.uncertainty.tokens) == 2
    assert score.uncertainty.epistemic is not None and score.uncertainty.epistemic > 0
    assert spoken.uncertainty.n_effective == 2 and spoken.request_id


def test_map_is_what_single_questions_are(connect: Connect, server: Server) -> None:
    prompts = [f"w{number} w2 w3" for number in range(6)]
    options: dict[str, Any] = {"model": "diag", "uncertainty": True, "n_samples": 2} | GREEDY
    with connect(server.url) as client:
        answers = client.map(
            [*prompts, {"prompt": "w1", "model": "nobody"}], return_errors=True, concurrency=4, **options
        )
        single = [client.complete(prompt, **options) for prompt in prompts]
        assert [answer.text for answer in answers[:-1]] == [answer.text for answer in single]
        assert isinstance(answers[-1], NotFoundError)
        chats = client.map([USER, USER], ask="chat", **options)
        assert chats[0].text == chats[1].text
        rows = [{"prompt": PROMPT, "completion": f" w{number}"} for number in (7, 8)]
        scores = client.map(rows, ask="score", model="diag", n_samples=2)
        assert scores[0].uncertainty.confidence != scores[1].uncertainty.confidence


def test_models_and_probes(connect: Connect, server: Server) -> None:
    with connect(server.url) as client:
        models = {model.id: model for model in client.models()}
        assert {"base", "diag", "row", "point"} <= models.keys()
        posterior = models["diag"].posterior
        assert posterior is not None and posterior.digest.startswith("sha256:") and models["base"].posterior is None
        assert client.health() and client.ready()


def test_errors_name_the_field(connect: Connect, server: Server) -> None:
    with connect(server.url) as client:
        with pytest.raises(NotFoundError, match="nobody") as missing:
            client.complete(PROMPT, model="nobody", uncertainty=True)
        assert missing.value.status == 404 and missing.value.request_id
        for ask in (client.complete, client.stream_complete):
            with pytest.raises(BadRequestError) as bad:
                ask(PROMPT, model="diag", uncertainty=True, n_samples=1000)
            assert (bad.value.status, bad.value.param) == (400, "uncertainty.n_samples")


def wait_for(server: Server, metric: str, value: float) -> None:
    deadline = time.monotonic() + 30
    while (found := server.metric(metric)) != value:
        assert time.monotonic() < deadline, f"{metric} is {found}, not {value}"
        time.sleep(0.02)


def test_what_is_given_up_ends_on_the_server(server: Server) -> None:
    """A cancelled task, a stream that is left, a deadline: the server notes a disconnect and works on nothing any more."""
    long: dict[str, Any] = {"model": "diag", "uncertainty": True, "n_samples": 8, "max_tokens": 180, "min_tokens": 180}
    before = server.metric("credence_client_disconnects_total")

    async def cancel() -> None:
        async with AsyncClient(server.url) as client:
            task = asyncio.create_task(client.complete("w1", **long))
            await asyncio.to_thread(wait_for, server, "credence_inflight_requests", 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    wait_for(server, "credence_client_disconnects_total", before + 1)
    with Client(server.url) as client:
        with client.stream_complete("w1", **long) as stream:
            next(stream)
        wait_for(server, "credence_client_disconnects_total", before + 2)
        with pytest.raises(DeadlineExceeded):
            client.complete("w1", deadline_s=0.1, **long)
        wait_for(server, "credence_client_disconnects_total", before + 3)
    wait_for(server, "credence_inflight_requests", 0)


def test_an_overloaded_server_is_asked_again(server: Server) -> None:
    busy = Busy(503, 429)
    with Client(server.url, transport=busy) as client:
        assert client.complete(PROMPT, model="diag", **GREEDY).text and busy.requests == 3

    async def run() -> None:
        busy = AsyncBusy(429)
        async with AsyncClient(server.url, transport=busy) as client:
            async with await client.stream_complete(PROMPT, model="diag", **GREEDY) as stream:
                assert [chunk.text async for chunk in stream] and busy.busy.requests == 2

    asyncio.run(run())


def test_plain_vllm_answers_all_but_uncertainty(connect: Connect, stock_server: Server) -> None:
    with connect(stock_server.url) as client:
        answer = client.complete(PROMPT, model="diag", logprobs=1, **GREEDY)
        assert answer.text and answer.uncertainty is None and not answer.trust(0.0)
        assert client.chat(USER, model="diag", **GREEDY).text
        for opened in (
            client.stream_complete(PROMPT, model="diag", **GREEDY),
            client.stream_chat(USER, model="diag", **GREEDY),
        ):
            with opened as stream:
                assert "".join(chunk.text for chunk in stream) and stream.uncertainties == {}
        assert [each.text for each in client.map([PROMPT, PROMPT], model="diag", **GREEDY)] == [answer.text] * 2
        assert {model.id for model in client.models()} == {"base", "diag"}
        for ask in (
            lambda: client.complete(PROMPT, model="diag", uncertainty=True, **GREEDY),
            lambda: client.chat(USER, model="diag", uncertainty=True, **GREEDY),
            lambda: client.map([PROMPT], model="diag", uncertainty=True, **GREEDY),
            lambda: list(client.stream_complete(PROMPT, model="diag", uncertainty=True, **GREEDY)),
            lambda: list(client.stream_chat(USER, model="diag", uncertainty=True, **GREEDY)),
        ):
            with pytest.raises(UncertaintyMissingError, match="plain vLLM"):
                ask()
        with pytest.raises(NotFoundError):
            client.score(model="diag", prompt=PROMPT, completion=" w7")
