"""Asking over HTTP (against a fake transport), the areas under the curve, and reading latencies."""

import json
from typing import Any

import httpx2
import pytest

from credence.clients import Client, CredenceError
from credence.demo.ask import Case, ask, ask_all, latencies, mean_latency_ms, separate
from credence.demo.server import DemoError
from credence.demo.world import KINDS, Kind, World

WORLD = World()


def case(kind: Kind, *, total: float = 1.0, aleatoric: float = 0.5, mean_entropy: float = 0.1) -> Case:
    return Case(
        fact=WORLD.facts(kind)[0],
        text=" in Harwick",
        confidence=0.5,
        total=total,
        aleatoric=aleatoric,
        epistemic=total - aleatoric,
        mean_entropy=mean_entropy,
        tokens=(),
    )


def answer(request: httpx2.Request, *, total: float | None = 0.6) -> httpx2.Response:
    """What the server sends: K = 8 or the mean (K = 1, tau = 0)."""
    body = json.loads(request.content)
    asked = body["uncertainty"]
    uncertainty: dict[str, Any] = {
        "mode": "ensemble",
        "n_samples": asked["n_samples"],
        "n_effective": asked["n_samples"],
        "tau": asked.get("tau", 1.0),
        "confidence": 0.8,
        "total": 0.2 if asked["n_samples"] == 1 else total,
        "aleatoric": 0.4,
        "epistemic": 0.2,
    }
    if asked.get("granularity") == "token":
        uncertainty["tokens"] = [{"token": " in", "logprob": -0.1, "total": 0.1, "epistemic": 0.0}]
    choice = {"index": 0, "text": " in Harwick", "finish_reason": "stop", "uncertainty": uncertainty}
    return httpx2.Response(200, json={"id": "x", "model": "demo", "choices": [choice]})


def client(handler: Any = answer) -> Client:
    return Client("http://test", transport=httpx2.MockTransport(handler), max_retries=0)


def test_ask_combines_the_ensemble_and_the_mean() -> None:
    seen = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.append(json.loads(request.content))
        return answer(request)

    result = ask(client(handler), "demo", WORLD.questions("known")[0], n_samples=8)
    assert (result.total, result.aleatoric, result.epistemic, result.mean_entropy) == (0.6, 0.4, 0.2, 0.2)
    assert result.tokens[0].token == " in"
    assert [body["uncertainty"] for body in seen] == [
        {"n_samples": 8, "granularity": "token"},
        {"n_samples": 1, "tau": 0.0},
    ]
    assert {body["temperature"] for body in seen} == {0.0}


def test_an_answer_without_scores_is_an_error() -> None:
    with client(lambda request: answer(request, total=None)) as connection, pytest.raises(DemoError, match="empty"):
        ask(connection, "demo", WORLD.questions("known")[0], n_samples=8)


def test_answers_come_in_the_order_of_the_questions() -> None:
    facts = [fact for kind in KINDS for fact in WORLD.questions(kind, 5)]
    steps: list[int] = []
    cases = ask_all(
        client(), "demo", facts, n_samples=8, threads=4, check=lambda: None, progress=lambda: steps.append(1)
    )
    assert [one.fact for one in cases] == facts
    assert len(steps) == len(facts)


def test_a_dead_server_is_named_before_the_broken_connection() -> None:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError("gone")

    def check() -> None:
        raise DemoError("the server ended with exit code 1")

    facts = WORLD.questions("known", 3)
    with pytest.raises(DemoError, match="exit code 1"):
        ask_all(client(handler), "demo", facts, n_samples=8, threads=2, check=check, progress=lambda: None)
    with pytest.raises(CredenceError):
        ask_all(client(handler), "demo", facts, n_samples=8, threads=2, check=lambda: None, progress=lambda: None)


def test_areas_against_counting_pairs() -> None:
    known = [case("known", total=t, aleatoric=a, mean_entropy=m) for t, a, m in ((1, 0.9, 3), (2, 1.5, 1), (4, 1, 2))]
    noisy = [case("noisy", total=t, aleatoric=a) for t, a in ((3, 1.2), (3, 2))]
    unknown = [case("unknown", total=t, aleatoric=a, mean_entropy=m) for t, a, m in ((3, 1, 2), (5, 1.5, 4))]
    result = separate([*unknown, *known, *noisy])
    # unknown totals 3, 5 against known 1, 2, 4: 3 beats two of three, 5 beats all.
    assert result.by_total == pytest.approx(5 / 6)
    # epistemic 2, 3.5 against 0.1, 0.5, 3.
    assert result.by_epistemic == pytest.approx(5 / 6)
    # mean entropies 2, 4 against 3, 1, 2: one tie counts half.
    assert result.by_mean_entropy == pytest.approx((1.5 + 3) / 6)
    # aleatoric 1.2, 2 against 0.9, 1.5, 1.
    assert result.noisy_by_aleatoric == pytest.approx(5 / 6)
    # epistemic shares 2/3, 0.7 against 0.6, 1/3.
    assert result.unknown_from_noisy == 1.0


def test_areas_need_every_kind() -> None:
    with pytest.raises(DemoError, match="ask some of each kind"):
        separate([case("known"), case("unknown")])


METRICS = """# TYPE credence_request_duration_seconds histogram
credence_request_duration_seconds_bucket{endpoint="/v1/completions",k="8",le="+Inf",mode="ensemble",outcome="ok"} %d
credence_request_duration_seconds_count{endpoint="/v1/completions",k="8",mode="ensemble",outcome="ok"} %d
credence_request_duration_seconds_sum{endpoint="/v1/completions",k="8",mode="ensemble",outcome="ok"} %f
credence_request_duration_seconds_count{endpoint="/v1/completions",k="0",mode="mean",outcome="ok"} 0
credence_request_duration_seconds_sum{endpoint="/v1/completions",k="0",mode="mean",outcome="ok"} 0
credence_request_duration_seconds_count{endpoint="/v1/completions",k="8",mode="ensemble",outcome="client_error"} 9
credence_request_duration_seconds_sum{endpoint="/v1/completions",k="8",mode="ensemble",outcome="client_error"} 9
"""


def test_latency_by_k_is_read_from_the_metrics() -> None:
    before, after = METRICS % (10, 10, 2.0), METRICS % (14, 14, 2.2)
    assert latencies(after) == {0: (0, 0), 8: (14, 2.2)}
    assert mean_latency_ms(before, after) == {8: pytest.approx(50.0)}
    assert mean_latency_ms("", before) == {8: pytest.approx(200.0)}
