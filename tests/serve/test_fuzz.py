"""Generated requests of every route of docs/openapi.json against a real server: no 5xx, no answer that the document does not describe.

Needs requirements/fuzz.txt: `make test-fuzz`, with CREDENCE_FUZZ_REQUESTS for a longer run (benchmarks/results/fuzz.md has one).
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.servers import Server

schemathesis = pytest.importorskip("schemathesis", reason="needs requirements/fuzz.txt: make test-fuzz")

pytestmark = [pytest.mark.engine, pytest.mark.slow]

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"
REQUESTS = int(os.environ.get("CREDENCE_FUZZ_REQUESTS", "500"))
SEED = int(os.environ.get("CREDENCE_FUZZ_SEED", "1"))
ASKED_MORE = {
    "/v1/completions": 6,
    "/v1/chat/completions": 6,
    "/v1/uncertainty/score": 6,
    "/tokenize": 2,
    "/detokenize": 2,
}
"""Shares of the requests; the other operations have one each."""
LIKELY: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "w1 w2 w3"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "w1 w2"}]},
    "/v1/uncertainty/score": {"prompt": "w1 w2", "completion": "w3 w4"},
}
MODELS = ("diag", "row", "point", "base")
MOST_TOKENS = 4
GRAMMARS = ("response_format", "structured_outputs")


def operations() -> list[Any]:
    return [result.ok() for result in schemathesis.openapi.from_path(DOCUMENT).get_all_operations()]


OPERATIONS = operations()


def checks() -> list[Any]:
    from schemathesis.specs.openapi import checks as of_documents

    return [
        schemathesis.checks.not_a_server_error,
        of_documents.status_code_conformance,
        of_documents.content_type_conformance,
        of_documents.response_schema_conformance,
    ]


def make_cheap(body: Any) -> Any:
    """Bounds the work of a request; everything else stays as it was generated."""
    if not isinstance(body, dict):
        return body
    # The tiny model's words cannot continue any grammar, which ends a request with an error (docs/roadmap.md).
    body = {name: value for name, value in body.items() if name not in GRAMMARS or not isinstance(value, dict)}
    if "prompt" in body or "messages" in body:
        for name in ("max_tokens", "max_completion_tokens", "min_tokens", "n"):
            if isinstance(body.get(name), int) and body[name] > MOST_TOKENS:
                body[name] = MOST_TOKENS
        if "messages" in body and "completion" not in body:
            body.setdefault("max_tokens", MOST_TOKENS)
    return body


def make_likely(body: Any, path: str, number: int) -> Any:
    """Two of three requests get a served model, a text and few other fields: of fifty at random, one is always refused."""
    if not isinstance(body, dict) or number % 3 == 0 or path not in LIKELY:
        return body
    chance = random.Random(number)
    others = [name for name in body if name not in LIKELY[path] and name != "model"]
    kept = {name: body[name] for name in chance.sample(others, min(len(others), chance.randrange(4)))}
    return {**kept, **LIKELY[path], "model": chance.choice(MODELS)}


class Tally:
    """What was sent and what came back."""

    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()

    def total(self) -> int:
        return sum(self.statuses.values())

    def table(self) -> str:
        lines = [f"{operation:45s} {status} {count:6d}" for (operation, status), count in sorted(self.statuses.items())]
        return "\n".join([*lines, f"{self.total()} requests"])


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    counted = Tally()
    yield counted
    print("\n" + counted.table())
    if "CREDENCE_FUZZ_REPORT" in os.environ:
        Path(os.environ["CREDENCE_FUZZ_REPORT"]).write_text(counted.table() + "\n")


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_generated_requests(server: Server, tally: Tally, operation: Any, valid: bool) -> None:
    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE
    if not valid and not operation.body:
        pytest.skip("nothing in this request can be wrong")
    shares = sum(ASKED_MORE.get(each.path, 1) for each in OPERATIONS)
    examples = max(REQUESTS * ASKED_MORE.get(operation.path, 1) // (2 * shares), 1)
    number = 0

    @seed(SEED)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal number
        number += 1
        case.body = make_cheap(make_likely(case.body, operation.path, number))
        response = case.call(base_url=server.url, timeout=120)
        tally.statuses[operation.label, response.status_code] += 1
        case.validate_response(response, checks=checks())

    ask()


def test_enough_was_asked(server: Server, tally: Tally) -> None:
    """Most of the requests were sent, and some of every kind were answered; the server is as it was."""
    assert tally.total() >= 0.6 * REQUESTS, tally.table()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score"):
        assert tally.statuses[f"POST {path}", 200] > 0, tally.table()
    assert server.client.get("/readyz").status_code == 200
    assert server.metric("credence_inflight_requests") == 0
    assert json.loads(DOCUMENT.read_text()) == server.client.get("/openapi.json").json()
