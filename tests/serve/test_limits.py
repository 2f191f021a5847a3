"""Bodies and their limits: nothing a client can send gets further than a 400, and what is let through is what was sent."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from credence.serve.body import MAX_DEPTH, parse_json
from credence.serve.errors import BadRequest
from credence.serve.limits import RequestLimits, Size, check, check_labels, check_sequences

LIMITS = RequestLimits()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(body=st.dictionaries(st.text(max_size=8), JSON, max_size=5), ascii_only=st.booleans())
def test_ordinary_json_is_read_as_it_is(body: dict[str, Any], ascii_only: bool) -> None:
    assert parse_json(json.dumps(body, ensure_ascii=ascii_only).encode()) == body


@settings(max_examples=500, deadline=None)
@given(
    raw=st.binary(max_size=200)
    | st.text(alphabet='{}[]":,0123456789eE+-.\\udD8aNInfity tru', max_size=60).map(str.encode)
)
@example(b'{"a":1e999}')
@example(b'{"a":-' + b"9" * 5000 + b"}")
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes_are_an_object_or_a_400(raw: bytes) -> None:
    try:
        body = parse_json(raw)
    except BadRequest:
        return
    assert isinstance(body, dict)
    assert json.loads(json.dumps(body, allow_nan=False).encode()) == body


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"uncertainty"', "must be a JSON object"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":[-Infinity]}', "-Infinity"),
        (b'{"a":1e400}', "too large"),
        (b'{"a":-1E+309}', "too large"),
        (b'{"a":' + b"9" * 400 + b".5}", "too large"),
        (b'{"a":9223372036854775808}', "64 bits"),
        (b'{"a":' + b"1" * 10_000 + b"}", "64 bits"),
        (b'{"a":1,"a":2}', "'a' twice"),
        (b'{"a":{"b":1,"\\u0062":2}}', "'b' twice"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\uDFFF":1}', "surrogate"),
        (b'{"a":"\\udc00\\ud800"}', "surrogate"),
        (b'{"a":"\xff"}', "UTF-8"),
        ('{"a":1}'.encode("utf-16"), "UTF-8"),
        (b'\xef\xbb\xbf{"a":1}', "not valid JSON"),
        (b'{"a":' * 100_000, "inside one another"),
        (b'{"a":' + b"[" * 100_000, "inside one another"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "inside one another"),
    ],
)
def test_what_json_readers_disagree_on_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_json(raw)
    assert said in caught.value.message
    assert len(caught.value.message) < 200


def test_the_edges_that_are_still_read() -> None:
    deep = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert parse_json(deep)
    assert parse_json(b'{"a":9223372036854775807,"b":-9223372036854775808,"c":1e308}')["a"] == 2**63 - 1
    assert parse_json(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    assert parse_json(b'{"a":"' + b"9" * 5000 + b'"}')["a"] == "9" * 5000
    wide = b'{"a":[' + b",".join([b"[1]"] * 5000) + b"]}"
    assert len(parse_json(wide)["a"]) == 5000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": True}, "n"),
        ({"n": "5"}, "n"),
        ({"n": 2.0}, "n"),
        ({"best_of": 1000}, "best_of"),
        ({"n": 128, "prompt": ["a"] * 17}, "n"),
        ({"best_of": 128, "prompt": ["a"] * 17}, "n"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
        ({"prompt": [[1, [2]]]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"messages": [{}] * 4097}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 513}, "stop"),
        ({"stop": [["a"]]}, "stop"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"stop_token_ids": [1] * 4097}, "stop_token_ids"),
        ({"allowed_token_ids": ["1"]}, "allowed_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"9" * 11: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0664": 1}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"tools": [{}] * 129}, "tools"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "16"}, "max_tokens"),
        ({"max_completion_tokens": False}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_limits_name_the_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check(body, LIMITS)
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({}, Size(prompts=1, n=1, prompt_tokens=0, max_tokens=16)),
        ({"prompt": "h\u00e9"}, Size(prompts=1, n=1, prompt_tokens=5, max_tokens=16)),
        ({"prompt": [1, 2, 3], "max_tokens": 7}, Size(prompts=1, n=1, prompt_tokens=3, max_tokens=7)),
        ({"prompt": [[1, 2], [3]], "n": 2, "max_tokens": None}, Size(prompts=2, n=2, prompt_tokens=3, max_tokens=None)),
        ({"prompt": [], "n": None}, Size(prompts=1, n=1, prompt_tokens=0, max_tokens=16)),
        ({"prompt": "ab", "completion": [1, 2]}, Size(prompts=1, n=1, prompt_tokens=6, max_tokens=16)),
        ({"prompt": "ab", "logprobs": 20, "stop": ["a"] * 16, "logit_bias": {"1": -1.5}, "top_k": 9, "x": [True]},
         Size(prompts=1, n=1, prompt_tokens=4, max_tokens=16)),
    ],
)  # fmt: skip
def test_the_size_of_what_is_let_through(body: dict[str, Any], size: Size) -> None:
    assert check(body, LIMITS) == size


def test_a_conversation_is_measured_from_above() -> None:
    message = {"role": "user", "content": "hello"}
    size = check({"messages": [message] * 3, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 3}, LIMITS)
    assert (size.prompts, size.max_tokens) == (1, 5)
    assert size.prompt_tokens >= 3 * len("user: hello")
    assert check({"messages": [message]}, LIMITS).max_tokens is None


@settings(max_examples=300, deadline=None)
@given(
    body=st.dictionaries(
        st.sampled_from(["n", "best_of", "prompt", "messages", "logprobs", "top_logprobs", "prompt_logprobs", "stop", "bad_words",
                         "logit_bias", "tools", "documents", "max_tokens", "max_completion_tokens", "stop_token_ids", "completion"]),
        JSON | st.lists(st.integers() | st.booleans() | st.text(max_size=3)),
    )
)  # fmt: skip
def test_whatever_the_fields_hold_it_is_a_size_or_a_400(body: dict[str, Any]) -> None:
    try:
        size = check(body, LIMITS)
    except BadRequest as error:
        assert error.param in body or error.param == "n"
        return
    assert 1 <= size.n <= LIMITS.max_n
    assert size.n * size.prompts <= LIMITS.max_sequences


def test_the_one_budget_counts_samples_too() -> None:
    limits = RequestLimits(max_sequences=36)
    size = Size(prompts=2, n=2, prompt_tokens=8, max_tokens=4)
    check_sequences(size, 8, limits)
    with pytest.raises(BadRequest, match="2 x 10 x 2 = 40, the server takes 36"):
        check_sequences(size, 9, limits)


def test_sample_tokens_are_bounded_by_the_models_length() -> None:
    size = Size(prompts=2, n=3, prompt_tokens=50, max_tokens=None)
    assert size.sample_tokens(4, 100) == 4 * 3 * (50 + 2 * 100)
    assert Size(prompts=1, n=1, prompt_tokens=10**6, max_tokens=10**6).sample_tokens(1, 100) == 200
    assert size.sample_tokens(0, 100) == 0


def test_labels_have_a_length() -> None:
    check_labels(["a" * 4096, "b"], LIMITS)
    with pytest.raises(BadRequest, match="4097"):
        check_labels(["a" * 4097], LIMITS)


def test_the_documented_limits_are_the_limits() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    table = {name: int(value) for name, value in re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE)}
    assert table == LIMITS.model_dump()
