from collections.abc import Callable
from typing import Any

import pytest

from credence.clients import GenerationOptions, ScoringOptions, UncertaintyOptions
from credence.clients.requests import ChatRequest, CompletionRequest
from tests.clients.answers import Script
from tests.clients.conftest import Connect

CONVERSATION = [{"role": "user", "content": "hi"}]


def ask(client: Connect, method: str, **arguments: Any) -> None:
    """Call a method that must refuse its arguments before it sends anything."""
    defaults: dict[str, dict[str, Any]] = {
        "complete": {"prompt": "p"},
        "stream_complete": {"prompt": "p"},
        "chat": {"messages": CONVERSATION},
        "stream_chat": {"messages": CONVERSATION},
        "score": {"prompt": "p", "completion": "c"},
    }
    script = Script()
    call: Callable[..., object] = getattr(client(script), method)
    try:
        call(**({"model": "m"} | defaults[method] | arguments))
    finally:
        assert script.requests == []


@pytest.mark.parametrize("method", ["complete", "stream_complete", "chat", "stream_chat"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_samples": 4}, "^n_samples given without uncertainty=True"),
        ({"tau": 0.0, "seed": 1}, "seed given without uncertainty=True"),
        ({"uncertainty": {"n_samples": 4}}, "uncertainty is {'n_samples': 4}; give True or False"),
        ({"uncertainty": True, "n_samples": 0}, "n_samples is 0: give a whole number of 1 or more, or 'auto'$"),
        ({"uncertainty": True, "n_samples": True}, "n_samples is True: give a whole number"),
        ({"uncertainty": True, "n_samples": 2.0}, "n_samples is 2.0: give a whole number"),
        ({"uncertainty": True, "n_samples": "many"}, "n_samples is 'many': give a whole number"),
        ({"uncertainty": True, "mode": "magic"}, "mode is 'magic': .*'ensemble'"),
        ({"uncertainty": True, "tau": -1.0}, "tau is -1.0"),
        ({"uncertainty": True, "tau": float("nan")}, "tau is nan"),
        ({"uncertainty": True, "seed": -1}, "^seed is -1"),
        ({"uncertainty": True, "granularity": "word"}, "granularity is 'word'"),
        ({"uncertainty": True, "n_samples": 4, "min_samples": 5}, "min_samples is 5, n_samples is 4"),
        ({"uncertainty": True, "n_samples": "auto", "min_samples": 2}, "min_samples does not go with n_samples='auto'"),
        (
            {"uncertainty": True, "n_samples": "auto", "mode": "ensemble"},
            "is for the modes score, choices and generate",
        ),
        ({"uncertainty": True, "stop_confidence": 0.9}, "stop_confidence is for n_samples='auto'"),
        (
            {"uncertainty": True, "n_samples": "auto", "stop_confidence": 0.5},
            "stop_confidence is 0.5: .*greater than 0.5",
        ),
        ({"uncertainty": True, "mode": "choices"}, "belong together"),
        ({"uncertainty": True, "choices": ["a", "b"]}, "belong together"),
        ({"uncertainty": True, "mode": "score", "length_normalized": True}, "length_normalized is for mode='choices'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1, "top_p": 0.0}, "temperature is -0.1: .*; top_p is 0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5: .*less than or equal to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias is {'x': 1.0}"),
        ({"sampling_seed": "x"}, "sampling_seed is 'x'"),
        ({"model": ""}, "model is ''"),
        ({"extra_body": {"seed": 3, "min_p": 0.1}}, "its own: min_p .use min_p., seed .use sampling_seed.$"),
        ({"extra_body": {"stream": True}}, "stream .use stream_complete or stream_chat."),
        ({"extra_body": ["my words"]}, "^extra_body: give a dictionary of JSON values$"),
        ({"extra_body": {"words": object()}}, "^extra_body: give a dictionary of JSON values$"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    client: Connect, method: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(client, method, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": ["secret", ""]},
        {"prompt": ["secret", 3]},
        {"prompt": [["secret"]]},
        {"prompt": [[1], []]},
        {"prompt": [1, -2]},
        {"prompt": {"secret": 1}},
        {"stop": ["secret", 1]},
        {"uncertainty": True, "mode": "choices", "choices": ["secret"]},
        {"uncertainty": True, "mode": "choices", "choices": ["secret", ""]},
        {"uncertainty": True, "mode": "choices", "choices": ["secret", "secret"]},
    ],
)
def test_wrong_texts_are_named_but_never_shown(client: Connect, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(arguments)[-1]}.* give ") as caught:
        ask(client, "complete", **arguments)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "messages", [[], "secret", [{"content": "secret"}], [{"role": "", "content": "secret"}], [["secret"]]]
)
@pytest.mark.parametrize("method", ["chat", "score"])
def test_wrong_messages_are_named_but_never_shown(client: Connect, method: str, messages: object) -> None:
    arguments = {"messages": messages} | ({"prompt": None, "completion": None} if method == "score" else {})
    with pytest.raises(ValueError, match="^messages: give a list of messages such as") as caught:
        ask(client, method, **arguments)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"completion": None}, "either prompt and completion, or messages"),
        ({"prompt": None}, "either prompt and completion, or messages"),
        ({"prompt": None, "completion": None}, "either prompt and completion, or messages"),
        ({"messages": CONVERSATION}, "either prompt and completion, or messages"),
        ({"prompt": None, "completion": None, "messages": CONVERSATION}, "the last of messages is from 'user'"),
        ({"completion": ""}, "^completion: give a text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "^prompt: give"),
        ({"n_samples": "auto", "min_samples": 1}, "min_samples does not go"),
        ({"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_wrong_arguments_of_score(client: Connect, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(client, "score", **arguments)


@pytest.mark.parametrize("name", ["mode", "choices", "max_tokens", "uncertainty"])
def test_score_has_no_arguments_of_generation(client: Connect, name: str) -> None:
    with pytest.raises(TypeError, match=f"there is no argument '{name}'"):
        ask(client, "score", **{name: None})


def test_the_typed_options_are_those_that_are_checked() -> None:
    """A name in one of the two places alone would be refused, or silently typed as anything."""
    asked = set(UncertaintyOptions.model_fields)
    assert set(ScoringOptions.__optional_keys__) == asked - {"mode", "choices", "length_normalized"}
    shared = set(CompletionRequest.model_fields) & set(ChatRequest.model_fields)
    sampling = shared - {"model", "logprobs", "uncertainty", "stream", "stream_options", "seed"}
    assert set(GenerationOptions.__optional_keys__) == asked | sampling | {"sampling_seed", "extra_body"}
