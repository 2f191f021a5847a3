import logging
from typing import Any

import httpx2
import pytest

from credence.clients import (
    ConnectionFailedError,
    CredenceError,
    InvalidResponseError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    ServiceUnavailableError,
    TransportError,
    UncertaintyMissingError,
)
from tests.clients.answers import UNCERTAINTY, Script, chat_completion, completion, error, score
from tests.clients.conftest import Connect


def test_complete_without_uncertainty_sends_only_what_was_given(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=completion()))
    answer = client(script).complete("hello", model="base")
    assert script.body == {"model": "base", "prompt": "hello"}
    assert str(script.requests[0].url) == "http://server:8000/v1/completions"
    assert (answer.text, answer.uncertainty, answer.choices[0].finish_reason) == (" text 0", None, "length")
    assert answer.usage is not None and answer.usage.total_tokens == 7


def test_uncertainty_is_true_without_options_and_an_object_with_them(client: Connect) -> None:
    script = Script(*[httpx2.Response(200, json=completion(UNCERTAINTY)) for _ in range(2)])
    with client(script) as opened:
        opened.complete("p", model="triage", uncertainty=True)
        assert script.body["uncertainty"] is True
        opened.complete(
            [1, 2, 3],
            model="triage",
            uncertainty=True,
            n_samples=4,
            mode="choices",
            choices=("yes", "no"),
            tau=0,
            seed=7,
            granularity="token",
            return_samples=True,
            min_samples=2,
            threshold=0.5,
            calibrated=False,
            max_tokens=5,
            temperature=0,
            top_p=1,
            top_k=3,
            min_p=0.1,
            stop=("a", "b"),
            logprobs=0,
            n=1,
            sampling_seed=11,
        )
    assert script.body == {
        "model": "triage",
        "prompt": [1, 2, 3],
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 3,
        "min_p": 0.1,
        "stop": ["a", "b"],
        "logprobs": 0,
        "n": 1,
        "seed": 11,
        "uncertainty": {
            "n_samples": 4,
            "mode": "choices",
            "choices": ["yes", "no"],
            "tau": 0.0,
            "seed": 7,
            "granularity": "token",
            "return_samples": True,
            "min_samples": 2,
            "threshold": 0.5,
            "calibrated": False,
        },
    }


def test_uncertainty_of_the_answer(client: Connect) -> None:
    full = UNCERTAINTY | {
        "tokens": [{"token": " yes", "logprob": -0.2, "total": 0.5, "epistemic": 0.1}],
        "choices": [{"label": "yes", "prob": 0.83, "std": 0.06}],
    }
    script = Script(httpx2.Response(200, json=completion(full), headers={"X-Request-Id": "r-9"}))
    answer = client(script).complete("p", model="triage", uncertainty=True)
    scores = answer.uncertainty
    assert scores is not None and answer.request_id == "r-9"
    assert (scores.n_effective, scores.confidence, scores.flag, scores.unit) == (8, 0.83, "ok", "nats/token")
    assert (scores.total, scores.aleatoric, scores.epistemic) == (0.41, 0.29, 0.12)
    assert scores.sequence is not None and scores.sequence.variation_ratio == 0.125
    assert scores.tokens is not None and scores.tokens[0].token == " yes"
    assert scores.choices is not None and scores.choices[0].std == 0.06
    assert scores.adapter is not None and scores.adapter.digest == "sha256:ab"


def test_unknown_fields_of_an_answer_are_kept_and_answers_are_frozen(client: Connect) -> None:
    body = completion(UNCERTAINTY | {"novel": 3}, brand_new={"x": 1})
    answer = client(Script(httpx2.Response(200, json=body))).complete("p", model="m", uncertainty=True)
    assert answer.uncertainty is not None
    assert answer.uncertainty.model_extra == {"novel": 3}
    assert answer.model_dump()["brand_new"] == {"x": 1}
    with pytest.raises(ValueError, match="frozen"):
        answer.id = "other"  # type: ignore[misc]


def test_a_server_that_ignores_uncertainty_is_an_error(client: Connect) -> None:
    body = completion(UNCERTAINTY, None, UNCERTAINTY)
    with pytest.raises(UncertaintyMissingError, match=r"choices \[1\] came back.*plain vLLM") as caught:
        client(Script(httpx2.Response(200, json=body))).complete("p", model="m", uncertainty=True, n=3)
    assert caught.value.choice_indices == (1,)
    assert caught.value.request_id


def test_a_misspelt_argument_is_refused(client: Connect) -> None:
    with pytest.raises(TypeError, match="max_token'; did you mean 'max_tokens'"):
        client(Script()).complete("p", model="m", max_token=3)  # type: ignore[call-arg]


def test_lists_of_prompts(client: Connect) -> None:
    script = Script(*[httpx2.Response(200, json=completion(UNCERTAINTY, UNCERTAINTY)) for _ in range(2)])
    opened = client(script)
    answer = opened.complete(("one", "two"), model="m", uncertainty=True)
    assert script.body["prompt"] == ["one", "two"]
    assert [choice.text for choice in answer.choices] == [" text 0", " text 1"]
    opened.complete([(1, 2), [3]], model="m")
    assert script.body["prompt"] == [[1, 2], [3]]


def test_every_generation_option_has_its_place(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=completion()))
    client(script).complete(
        "p",
        model="m",
        min_tokens=0,
        presence_penalty=-1,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={7: -100},
        stop_token_ids=(5, 6),
        temperature=None,
        extra_body={"bad_words": ["no"], "structured_outputs": {"choice": ["a", "b"]}},
    )
    assert script.body == {
        "model": "m",
        "prompt": "p",
        "min_tokens": 0,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100.0},
        "stop_token_ids": [5, 6],
        "bad_words": ["no"],
        "structured_outputs": {"choice": ["a", "b"]},
    }


def test_answers_of_the_modes(client: Connect) -> None:
    choices = UNCERTAINTY | {
        "mode": "choices",
        "unit": "nats",
        "choices": [{"label": "yes", "prob": 0.9, "std": 0.1}, {"label": "no", "prob": 0.1, "std": 0.1}],
        "choices_mass": 0.7,
        "samples": [{"index": 3, "probs": {"yes": 0.8, "no": 0.2}}],
        "auto": {"stages": [4, 8], "settled": True},
    }
    generate = UNCERTAINTY | {
        "mode": "generate",
        "agreement": 0.75,
        "answers": [{"answer": "berne", "count": 3, "share": 0.75}, {"answer": "", "count": 1, "share": 0.25}],
        "samples": [{"index": 0, "text": " Berne.", "mean_logprob": -0.4}],
    }
    script = Script(httpx2.Response(200, json=completion(choices, generate)))
    first, second = (choice.uncertainty for choice in client(script).complete("p", model="m", uncertainty=True).choices)
    assert first is not None and first.choices is not None and first.samples is not None and first.auto is not None
    assert first.model_extra == {}
    assert (first.choices[0].prob, first.choices_mass, first.unit) == (0.9, 0.7, "nats")
    assert first.samples[0].probs == {"yes": 0.8, "no": 0.2} and first.samples[0].text is None
    assert (first.auto.stages, first.auto.settled) == ((4, 8), True)
    assert second is not None and second.answers is not None and second.samples is not None
    assert (second.agreement, second.answers[1].answer, second.answers[0].count) == (0.75, "", 3)
    assert (second.samples[0].text, second.samples[0].mean_logprob) == (" Berne.", -0.4)


def test_chat(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=chat_completion(UNCERTAINTY), headers={"X-Request-Id": "r-3"}))
    messages = (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    )
    answer = client(script).chat(
        messages, model="m", uncertainty=True, n_samples="auto", mode="generate", logprobs=True, top_logprobs=2, n=1
    )
    assert str(script.requests[0].url) == "http://server:8000/v1/chat/completions"
    assert script.body == {
        "model": "m",
        "messages": list(messages),
        "logprobs": True,
        "top_logprobs": 2,
        "n": 1,
        "uncertainty": {"n_samples": "auto", "mode": "generate"},
    }
    assert (answer.text, answer.choices[0].message.role, answer.request_id) == (" text 0", "assistant", "r-3")
    assert answer.uncertainty is not None and answer.uncertainty.confidence == 0.83


def test_a_chat_answer_may_have_no_content_and_further_fields(client: Connect) -> None:
    body = chat_completion()
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}
    answer = client(Script(httpx2.Response(200, json=body))).chat([{"role": "user", "content": "hi"}], model="m")
    assert answer.text == ""
    assert answer.choices[0].message.model_extra == {"tool_calls": [{"id": "t"}]}


def test_chat_without_uncertainty_in_the_answer_is_an_error(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=chat_completion(None)))
    with pytest.raises(UncertaintyMissingError) as caught:
        client(script).chat([{"role": "user", "content": "hi"}], model="m", uncertainty=True)
    assert caught.value.choice_indices == (0,)


def test_score_of_a_prompt_and_its_completion(client: Connect) -> None:
    body = score(UNCERTAINTY | {"mode": "score"})
    script = Script(*[httpx2.Response(200, json=body, headers={"X-Request-Id": "r-4"}) for _ in range(2)])
    opened = client(script)
    answer = opened.score(model="m", prompt="a", completion=" b")
    assert str(script.requests[0].url) == "http://server:8000/v1/uncertainty/score"
    assert script.body == {"model": "m", "prompt": "a", "completion": " b"}
    assert (answer.uncertainty.mode, answer.uncertainty.epistemic, answer.request_id) == ("score", 0.12, "r-4")
    assert answer.usage is not None and answer.usage.uncertainty_details == {"n_samples": 8}
    opened.score(model="m", prompt=(1, 2), completion=[3], n_samples=4, granularity="token", threshold=0.5)
    assert script.body == {
        "model": "m",
        "prompt": [1, 2],
        "completion": [3],
        "uncertainty": {"n_samples": 4, "granularity": "token", "threshold": 0.5},
    }


def test_score_of_a_conversation(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=score(UNCERTAINTY)))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    client(script).score(model="m", messages=messages)
    assert script.body == {"model": "m", "messages": messages}


def test_a_score_without_uncertainty_breaks_the_contract(client: Connect) -> None:
    body = score(UNCERTAINTY)
    del body["uncertainty"]
    with pytest.raises(InvalidResponseError, match="uncertainty: field required"):
        client(Script(httpx2.Response(200, json=body))).score(model="m", prompt="a", completion="b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "server:8000"}, "base_url is 'server:8000'"),
        ({"base_url": "ftp://server"}, "base_url is 'ftp://server'"),
        ({"base_url": "http://"}, "base_url is 'http://'"),
        ({"base_url": "http://me:hunter2@server"}, "carries a user name"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"max_retries": -1}, "max_retries is -1"),
        ({"api_key": "abc\ndef"}, "api_key is empty or has characters"),
        ({"api_key": ""}, "api_key is empty"),
    ],
)
def test_wrong_constructor_arguments(connect: Connect, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        connect(**({"base_url": "http://server"} | options))
    assert "hunter2" not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize("base_url", ["http://server:8000/v1", "http://server:8000/v1/", "http://server:8000/"])
def test_base_url_may_end_in_v1(connect: Connect, base_url: str) -> None:
    script = Script(httpx2.Response(200, json={"data": []}))
    assert connect(base_url, transport=httpx2.MockTransport(script)).models() == ()
    assert str(script.requests[0].url) == "http://server:8000/v1/models"


def test_the_key_is_sent_and_never_shown(client: Connect, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(httpx2.Response(200, json=completion()))
    with caplog.at_level(logging.DEBUG):
        opened = client(script, api_key="k-123")
        opened.complete("private words", model="m")
    assert script.requests[0].headers["authorization"] == "Bearer k-123"
    assert repr(opened) == "Client('http://server:8000')"
    assert "k-123" not in caplog.text and "private words" not in caplog.text


def test_models_with_their_posterior(client: Connect) -> None:
    posterior = {
        "kind": "diag",
        "method": "ivon",
        "digest": "sha256:ab",
        "tau": 100.0,
        "default_n_samples": 8,
        "max_n_samples": 32,
    }
    entries = [{"id": "base", "object": "model"}, {"id": "triage", "parent": "base", "posterior": posterior}]
    base, triage = client(Script(httpx2.Response(200, json={"object": "list", "data": entries}))).models()
    assert base.posterior is None
    assert triage.posterior is not None
    assert triage.posterior.model_dump() == posterior


def test_health_and_ready_read_503_as_no_and_are_not_retried(client: Connect, sleeps: list[float]) -> None:
    script = Script(httpx2.Response(200), httpx2.Response(503, headers={"Retry-After": "1"}), error(500))
    opened = client(script)
    assert opened.health() is True
    assert opened.ready() is False
    with pytest.raises(ServerError):
        opened.ready()
    assert [request.url.path for request in script.requests] == ["/livez", "/readyz", "/readyz"]
    assert sleeps == []


@pytest.mark.parametrize("status", [429, 503])
def test_retries_what_the_server_says_to_retry(client: Connect, status: int, sleeps: list[float]) -> None:
    script = Script(error(status, Retry_After="3"), httpx2.Response(200, json=completion()))
    assert client(script).complete("p", model="m").text == " text 0"
    assert sleeps == [3.0]
    first, second = (request.headers["x-request-id"] for request in script.requests)
    assert first == second


def test_retry_after_of_zero_still_backs_off(client: Connect, sleeps: list[float]) -> None:
    script = Script(*[error(503, Retry_After="0") for _ in range(7)])
    with pytest.raises(ServiceUnavailableError):
        client(script, max_retries=6).complete("p", model="m")
    assert len(sleeps) == 6
    for waited, most in zip(sleeps, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0], strict=True):
        assert 0.75 * most <= waited <= most


def test_gives_up_after_max_retries_with_the_last_error(client: Connect, sleeps: list[float]) -> None:
    script = Script(*[error(429, Retry_After="1") for _ in range(3)])
    with pytest.raises(RateLimitError) as caught:
        client(script, max_retries=2).complete("p", model="m")
    assert len(script.requests) == 3 and len(sleeps) == 2
    assert caught.value.retry_after_s == 1.0


@pytest.mark.parametrize(
    ("status", "retry_after"), [(503, None), (429, None), (500, "1"), (504, "1"), (503, "3600"), (502, "0")]
)
def test_does_not_retry_other_errors(
    client: Connect, status: int, retry_after: str | None, sleeps: list[float]
) -> None:
    script = Script(error(status, **({} if retry_after is None else {"Retry_After": retry_after})))
    with pytest.raises(CredenceError):
        client(script).complete("p", model="m")
    assert len(script.requests) == 1 and sleeps == []


@pytest.mark.parametrize("failure", [httpx2.ConnectError("refused"), httpx2.ConnectTimeout("slow")])
def test_retries_when_no_connection_could_be_made(client: Connect, failure: Exception, sleeps: list[float]) -> None:
    script = Script(failure, httpx2.Response(200, json=completion()))
    assert client(script).complete("p", model="m").id == "cmpl-1"
    assert len(sleeps) == 1
    with pytest.raises(ConnectionFailedError, match="no connection to http://server:8000") as caught:
        client(Script(failure), max_retries=0).complete("p", model="m")
    assert isinstance(caught.value, ConnectionError) and caught.value.request_id


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (httpx2.ReadTimeout("slow"), RequestTimeoutError, "no answer from .*within 60 s"),
        (httpx2.WriteTimeout("slow"), RequestTimeoutError, "no answer"),
        (httpx2.ReadError("reset"), TransportError, "whether the server did the work is unknown"),
        (httpx2.RemoteProtocolError("gone"), TransportError, "gone"),
    ],
)
def test_never_repeats_a_request_whose_outcome_is_unknown(
    client: Connect, failure: Exception, expected: type[CredenceError], message: str, sleeps: list[float]
) -> None:
    script = Script(failure)
    with pytest.raises(expected, match=message):
        client(script).complete("p", model="m")
    assert len(script.requests) == 1 and sleeps == []


def test_request_timeout_is_a_timeout_error(client: Connect) -> None:
    with pytest.raises(TimeoutError):
        client(Script(httpx2.ReadTimeout("slow"))).complete("p", model="m")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>hello</html>", "the body"),
        (b"\xff\xfe", "the body"),
        (b"[]", "the body"),
        (b'{"id":"x","model":"m","choices":[]}', "choices"),
        (b'{"id":"x","model":"m","choices":[{"index":0,"text":null}]}', r"choices\.0\.text"),
    ],
)
def test_an_unexpected_body_is_named(client: Connect, body: bytes, message: str) -> None:
    with pytest.raises(InvalidResponseError, match=message):
        client(Script(httpx2.Response(200, content=body))).complete("p", model="m")


def test_an_answer_without_tokens_has_no_scores(client: Connect) -> None:
    empty = UNCERTAINTY | {"total": None, "aleatoric": None, "epistemic": None, "confidence": None, "sequence": None}
    answer = client(Script(httpx2.Response(200, json=completion(empty)))).complete("p", model="m", uncertainty=True)
    assert answer.uncertainty is not None and answer.uncertainty.total is None


@pytest.mark.parametrize("total", ["high", [1.0]])
def test_scores_that_are_not_numbers_are_refused(client: Connect, total: object) -> None:
    body = completion(UNCERTAINTY | {"total": total})
    with pytest.raises(InvalidResponseError, match=r"choices\.0\.uncertainty\.total"):
        client(Script(httpx2.Response(200, json=body))).complete("p", model="m", uncertainty=True)
