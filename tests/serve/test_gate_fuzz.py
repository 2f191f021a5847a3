"""Whatever stands in the uncertainty object, the gate answers 200 or a 400 that says why: it never fails, and never guesses."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Route

from credence.serve.gate import Gate
from credence.serve.schemas import UncertaintyOptions
from tests.serve.test_gate import FakeBackend, echo, post

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score")
ODD_NUMBERS = st.sampled_from(
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        1e308,
        -1e308,
        5e-324,
        -0.0,
        0,
        1,
        -1,
        2**31,
        2**63 - 1,
        2**63,
        10**400,
        True,
        False,
    ]
)
ODD_TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\ud800", "\x00", "\u202e", "🧨" * 40, "auto", "ensemble", "__class__", "NaN", "8"]
)
SCALARS = st.none() | ODD_NUMBERS | st.integers() | st.floats() | ODD_TEXTS
VALUES = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(ODD_TEXTS, part, max_size=3), max_leaves=6
)
OBJECTS = st.dictionaries(st.sampled_from(sorted(UncertaintyOptions.model_fields)) | ODD_TEXTS, VALUES, max_size=4)


def ask(content: bytes, path: str) -> tuple[int, Any, FakeBackend]:
    backend = FakeBackend()
    backend.security.max_body_bytes = 10**6
    app = Gate(Starlette(routes=[Route(each, echo, methods=["POST"]) for each in PATHS]), backend=lambda scope: backend)
    response = post(app, path, content)
    return response.status_code, response.json() if response.status_code != 200 or backend.calls else None, backend


@settings(max_examples=600, deadline=None)
@given(value=OBJECTS | VALUES, path=st.sampled_from(PATHS))
@example(value={"tau": float("nan")}, path=PATHS[0])
@example(value={"tau": 1e308}, path=PATHS[0])
@example(value={"tau": 10**400}, path=PATHS[0])
@example(value={"n_samples": True}, path=PATHS[0])
@example(value={"n_samples": 10**400}, path=PATHS[0])
@example(value={"seed": 2**63}, path=PATHS[1])
@example(value={"\ud800": 1}, path=PATHS[2])
@example(value={"mode": "\ud800"}, path=PATHS[2])
@example(value={"mode": "choices", "choices": ["\ud800", "\ud800"]}, path=PATHS[0])
def test_an_uncertainty_object_is_answered_or_refused(value: object, path: str) -> None:
    status, body, backend = ask(json.dumps({"model": "triage", "uncertainty": value}).encode(), path)
    assert status in (200, 400), body
    if status == 400:
        # What is no strict JSON (NaN, half a surrogate, 400 digits) has no field to name.
        assert (body["error"]["param"] or "uncertainty").split(".")[0] == "uncertainty" and body["error"]["message"]
        assert not backend.calls
        return
    for _, options in backend.calls:
        assert options.n_samples is None or options.n_samples == "auto" or type(options.n_samples) is int
        assert options.tau is None or 0 <= options.tau < float("inf")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "value",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"1" * 5000,
        b"-" + b"9" * 5000,
        b"1e999999",
        b'"\\ud800"',
    ],
    ids=["open lists", "open objects", "deep list", "long integer", "long negative", "overflow", "surrogate"],
)
def test_what_json_can_hardly_say(value: bytes, path: str) -> None:
    status, body, backend = ask(b'{"model":"triage","uncertainty":' + value + b"}", path)
    assert status == 400 and body["error"]["message"]
    assert not backend.calls
