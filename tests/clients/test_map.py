"""Many questions, some at once: order, concurrency, errors, progress."""

import asyncio
import json
import threading
from typing import Any

import httpx2
import pytest

from credence.clients import (
    AsyncClient,
    BadRequestError,
    ChatCompletion,
    Client,
    Completion,
    Score,
    UncertaintyMissingError,
)
from tests.clients.answers import UNCERTAINTY, chat_completion, completion, error, score
from tests.clients.conftest import Connect


class Echo:
    """Answers with the prompt as the text; every request waits until `together` of them are there. Counts those under way."""

    def __init__(self, together: int = 1) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most = 0
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(together)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self._barrier.wait(timeout=20)
        try:
            return self.answer(request)
        finally:
            with self._lock:
                self.under_way -= 1

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        with self._lock:
            self.bodies.append(body)
        if "completion" in body:
            return httpx2.Response(200, json=score(UNCERTAINTY | {"confidence": len(body["prompt"]) / 10}))
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if text.startswith("bad"):
            return error(400, {"error": {"message": text}})
        answer = completion(UNCERTAINTY if "uncertainty" in body else None)
        answer["choices"][0]["text"] = text
        if "messages" in body:
            answer = chat_completion(UNCERTAINTY)
            answer["choices"][0]["message"]["content"] = text
        return httpx2.Response(200, json=answer)


class AsyncEcho(Echo):
    """The same for tasks: a request is under way for some turns of the event loop, the first the longest."""

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:  # type: ignore[override]
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        for _ in range(20 - len(self.bodies)):
            await asyncio.sleep(0)
        self.under_way -= 1
        return self.answer(request)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_are_in_the_order_of_the_prompts(client: Connect) -> None:
    echo = Echo()
    prompts = [f"prompt {index}" for index in range(30)]
    answers = client(echo).map(iter(prompts), model="m", uncertainty=True, max_tokens=3, concurrency=7)
    assert [answer.text for answer in answers] == prompts
    assert all(isinstance(answer, Completion) and answer.uncertainty is not None for answer in answers)
    assert {body["model"] for body in echo.bodies} == {"m"} and echo.bodies[0]["uncertainty"] is True
    assert client(echo).map([], model="m") == []


def test_chat_and_score(client: Connect) -> None:
    answers = client(Echo()).map([user("a"), user("b")], ask="chat", model="m", uncertainty=True)
    assert [type(answer) for answer in answers] == [ChatCompletion] * 2
    assert [answer.text for answer in answers] == ["a", "b"]
    rows = [{"prompt": "x" * length, "completion": " y"} for length in (3, 1, 2)]
    scores = client(Echo()).map(rows, ask="score", model="m", n_samples=4)
    assert [type(answer) for answer in scores] == [Score] * 3
    assert [answer.uncertainty.confidence for answer in scores] == [0.3, 0.1, 0.2]


def test_a_dictionary_has_arguments_of_its_own(client: Connect) -> None:
    echo = Echo()
    rows = [{"prompt": "p", "choices": ["a", "b"]}, {"prompt": "q", "choices": ["c", "d"], "model": "other"}]
    client(echo).map(rows, model="m", uncertainty=True, mode="choices", concurrency=1)
    assert [body["uncertainty"]["choices"] for body in echo.bodies] == [["a", "b"], ["c", "d"]]
    assert [body["model"] for body in echo.bodies] == ["m", "other"]
    client(echo).map([{"messages": user("a"), "n": 2}], ask="chat", model="m")
    assert echo.bodies[-1]["n"] == 2


def test_threads_work_together_and_no_more_than_asked() -> None:
    echo = Echo(together=3)
    with Client("http://server", transport=httpx2.MockTransport(echo)) as client:
        assert len(client.map(["p"] * 9, model="m", concurrency=3)) == 9
    assert echo.most == 3


def test_tasks_work_together_and_no_more_than_asked() -> None:
    async def run() -> None:
        echo = AsyncEcho()
        async with AsyncClient("http://server", transport=httpx2.MockTransport(echo)) as client:
            prompts = [f"{index}" for index in range(12)]
            answers = await client.map(prompts, model="m", concurrency=5)
        assert echo.most == 5
        assert [answer.text for answer in answers] == prompts
        assert [body["prompt"] for body in echo.bodies] != prompts  # they did overtake each other

    asyncio.run(run())


def test_the_first_error_is_raised_and_ends_the_map(client: Connect) -> None:
    echo = Echo()
    with pytest.raises(BadRequestError, match="bad 1") as caught:
        client(echo).map(["a", "bad 1", *["b"] * 50], model="m", concurrency=1)
    assert caught.value.__notes__ == ["question 1 of 52"]
    assert len(echo.bodies) == 2


def test_an_error_may_come_before_the_last_question_is_handed_out(client: Connect) -> None:
    with pytest.raises(BadRequestError, match="bad"):
        client(Echo()).map(["bad"] * 3000, model="m", concurrency=8)


def test_errors_can_be_had_in_their_places(client: Connect) -> None:
    answers = client(Echo()).map(
        ["a", "bad 1", "b", "bad 3"], model="m", uncertainty=False, return_errors=True, concurrency=2
    )
    assert [getattr(answer, "text", None) for answer in answers] == ["a", None, "b", None]
    assert [str(answer) for answer in answers if isinstance(answer, BadRequestError)] != []
    assert isinstance(answers[1], BadRequestError) and answers[1].message == "bad 1"
    assert isinstance(answers[3], BadRequestError) and answers[3].__notes__ == ["question 3 of 4"]


def test_missing_uncertainty_is_an_error_here_too(client: Connect) -> None:
    def plain(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=completion(None))

    (answer,) = client(plain).map(["p"], model="m", uncertainty=True, return_errors=True)
    assert isinstance(answer, UncertaintyMissingError)


@pytest.mark.parametrize(
    ("items", "options", "message", "note"),
    [
        (["p", ""], {}, "^prompt: give a text", "item 1 of the map"),
        (["p", {"choices": ["a", "b"]}], {}, "no 'prompt', which complete needs", "item 1 of the map"),
        ([{"prompt": "p"}], {"ask": "chat"}, "no 'messages', which chat needs", "item 0 of the map"),
        (["p"], {"ask": "score"}, "dictionary with prompt and completion", "item 0 of the map"),
        (["p"], {"ask": "complet"}, "^ask is 'complet'; give 'complete', 'chat' or 'score'$", None),
        ("prompt", {}, "^items is a single one", None),
        ({"prompt": "p"}, {}, "^items is a single one", None),
        (["p"], {"concurrency": 0}, "^concurrency is 0; give a whole number of 1 or more", None),
        (["p"], {"concurrency": True}, "^concurrency is True", None),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    client: Connect, items: Any, options: dict[str, Any], message: str, note: str | None
) -> None:
    echo = Echo()
    with pytest.raises(ValueError, match=message) as caught:
        client(echo).map(items, **({"model": "m"} | options))
    assert getattr(caught.value, "__notes__", [None])[0] == note
    assert echo.bodies == []


@pytest.mark.parametrize("arguments", [{}, {"model": "m", "concurency": 3}, {"model": "m", "messages": user("a")}])
def test_missing_and_unknown_arguments(client: Connect, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="'model' is missing|no argument 'concurency'|no argument 'messages'"):
        client(Echo()).map(["p"], **arguments)


def test_nothing_is_printed_unless_there_is_a_terminal_or_it_is_asked_for(
    client: Connect, capfd: pytest.CaptureFixture[str]
) -> None:
    for progress in (None, False):
        client(Echo()).map(["p"] * 3, model="m", progress=progress)
        assert capfd.readouterr() == ("", "")
    client(Echo()).map(["p"] * 3, model="m", progress=True)
    printed = capfd.readouterr()
    assert printed.out == "" and "3/3" in printed.err


def test_a_terminal_shows_the_progress(
    client: Connect, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    client(Echo()).map(["p"] * 4, model="m")
    assert "4/4" in capfd.readouterr().err
    client(Echo()).map(["p"] * 4, model="m", progress=False)
    assert capfd.readouterr() == ("", "")


def test_errors_that_are_not_the_servers_are_never_returned(client: Connect) -> None:
    def broken(request: httpx2.Request) -> httpx2.Response:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        client(broken).map(["p"], model="m", return_errors=True)
