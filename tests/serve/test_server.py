"""The server as a user meets it: real HTTP, real vLLM, and stock vLLM beside it."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from credence.adapters import Artifact
from credence.clients import BadRequestError, Client, NotFoundError, UncertaintyMissingError
from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "w1 w2 w3 w40 w5"
LONG = " ".join(f"w{number % 100}" for number in range(150))
"""Longer than an engine step of 64 tokens, so that it is prefilled in chunks."""


def running(server: Server) -> float:
    """Requests vLLM still holds."""
    lines = [
        line
        for line in server.client.get("/metrics").text.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def wait_until_idle(server: Server, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(server) == 0


def without_identity(document: Any) -> Any:
    """A response without ids, times and the fingerprint of the server's configuration."""
    if isinstance(document, dict):
        return {
            key: without_identity(value)
            for key, value in document.items()
            if key not in ("id", "created", "system_fingerprint")
        }
    return [without_identity(value) for value in document] if isinstance(document, list) else document


@pytest.mark.parametrize(
    "body",
    [
        {"model": "diag", "prompt": PROMPT, "max_tokens": 8, "temperature": 0},
        {"model": "base", "prompt": [PROMPT, "w7 w8"], "max_tokens": 4, "temperature": 0},
        {"model": "diag", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stop": ["w3"], "echo": True},
        {"model": "diag", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "uncertainty": False},
        {"model": "diag", "prompt": PROMPT, "max_tokens": 0},
        {"model": "diag", "prompt": PROMPT, "max_tokens": 100_000},
        {"model": "nobody", "prompt": PROMPT},
        {"model": "diag"},
        {"model": "diag", "prompt": PROMPT, "temperature": "hot"},
    ],
)
def test_without_uncertainty_the_answer_is_stock_vllms(
    server: Server, stock_server: Server, body: dict[str, Any]
) -> None:
    ours, stock = server.complete(**body), stock_server.complete(**body)
    assert ours.status_code == stock.status_code
    assert set(ours.headers) - {"x-request-id"} == set(stock.headers)
    # The bytes: the text with its identity blanked out, key order and spacing included.
    texts = []
    for response in (ours, stock):
        text, document = response.text, response.json()
        for key in ("id", "created", "system_fingerprint"):
            if key in document:
                text = text.replace(json.dumps(document[key]), '"-"', 1)
        texts.append(text)
    assert texts[0] == texts[1]


def test_a_stream_without_uncertainty_is_stock_vllms(server: Server, stock_server: Server) -> None:
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True}
    chunks = []
    for response in (server.complete(**body), stock_server.complete(**body)):
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        chunks.append([without_identity(json.loads(event)) for event in events])
    assert chunks[0] == chunks[1]
    assert len(chunks[0]) >= 5


def test_stock_vllm_ignores_uncertainty_and_our_client_says_so(server: Server, stock_server: Server) -> None:
    """The trap: an unknown field is accepted with 200."""
    response = stock_server.complete(model="diag", prompt=PROMPT, max_tokens=2, uncertainty=True)
    assert response.status_code == 200
    assert "uncertainty" not in response.json()["choices"][0]
    with Client(stock_server.url) as client, pytest.raises(UncertaintyMissingError):
        client.complete(PROMPT, model="diag", uncertainty=True, max_tokens=2)


def test_our_client(server: Server, artifacts: dict[str, Artifact]) -> None:
    with Client(server.url) as client:
        answer = client.complete(
            PROMPT, model="row", uncertainty=True, n_samples=8, granularity="token", max_tokens=5, temperature=0
        )
        assert answer.uncertainty is not None
        assert answer.uncertainty.tau == 2.0, "the artifact's fitted tau"
        assert answer.uncertainty.n_effective == 8
        assert "".join(token.token for token in answer.uncertainty.tokens or ()) == answer.text
        assert 0 < answer.uncertainty.confidence <= 1
        assert answer.uncertainty.total == pytest.approx(
            answer.uncertainty.aleatoric + answer.uncertainty.epistemic, abs=1e-6
        )
        posterior = {model.id: model.posterior for model in client.models()}
        assert posterior["base"] is None
        assert posterior["row"] is not None
        assert (posterior["row"].kind, posterior["row"].method) == ("row", "monteclora")
        assert posterior["row"].digest == artifacts["row"].digest
        assert (posterior["row"].default_n_samples, posterior["row"].max_n_samples) == (8, 8)
        assert posterior["point"] is not None and posterior["point"].max_n_samples == 1
        with pytest.raises(NotFoundError) as unknown:
            client.complete(PROMPT, model="nobody", uncertainty=True)
        assert unknown.value.param == "model"
        with pytest.raises(BadRequestError) as many:
            client.complete(PROMPT, model="row", uncertainty=True, n_samples=9)
        assert many.value.param == "uncertainty.n_samples"
        assert many.value.status == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"uncertainty": {"n_samples": 9}}, "uncertainty.n_samples"),
        ({"uncertainty": {"n_samples": 2, "min_samples": 3}}, "uncertainty.min_samples"),
        ({"uncertainty": {"samples": 2}}, "uncertainty.samples"),
        ({"model": "base"}, "model"),
        ({"model": "point", "uncertainty": {"n_samples": 2}}, "uncertainty.n_samples"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"vllm_xargs": {"credence_gang": "mine"}}, "vllm_xargs"),
        ({"logprobs": 1_000_000}, "logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
    ],
)
def test_bad_requests_name_the_field_and_the_server_survives(
    server: Server, change: dict[str, Any], param: str
) -> None:
    response = server.complete(**{"model": "diag", "prompt": PROMPT, "uncertainty": True, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert server.complete(model="diag", prompt=PROMPT, max_tokens=1, uncertainty=True).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"n": 10_000_000},
        {"n": 16_000},
        {"n": 100, "prompt": ["w1"] * 1000},
        {"prompt": ["w1"] * 100_000},
        {"logprobs": 1_000_000},
        {"prompt_logprobs": -1},
        {"uncertainty": {"n_samples": 10**9}},
        {"uncertainty": True, "n": 16_000},
    ],
)
def test_no_request_can_take_the_server_from_everybody(server: Server, change: dict[str, Any]) -> None:
    """Sequences are bounded as a product of n, prompts and samples, at the door."""
    response = server.complete(**{"model": "diag", "prompt": PROMPT, "max_tokens": 1, **change})
    assert response.status_code == 400, response.text[:300]
    assert server.complete(model="diag", prompt=PROMPT, max_tokens=1, uncertainty=True).status_code == 200
    wait_until_idle(server, within_s=10)


def test_nobody_can_forge_a_gang(server: Server) -> None:
    """Reserved keys cannot come in through vllm_xargs of an ordinary request either."""
    response = server.complete(model="diag", prompt=PROMPT, vllm_xargs={"credence_gang": "mine", "credence_k": 2})
    assert response.status_code == 400
    assert "reserved" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/tokenize", 400), ("/v1/embeddings", 404), ("/v1/responses", 404), ("/v1/messages", 404), ("/invocations", 404)],
)
def test_other_routes_do_not_ignore_uncertainty(server: Server, path: str, status: int) -> None:
    response = server.client.post(path, json={"model": "diag", "prompt": PROMPT, "input": PROMPT, "uncertainty": True})
    assert response.status_code == status
    assert response.json()["error"]["param"] == ("uncertainty" if status == 400 else None)


def test_sampling_is_reproducible_and_follows_the_request(server: Server) -> None:
    def texts(**options: Any) -> list[str]:
        common = {"model": "diag", "prompt": PROMPT, "max_tokens": 12, "uncertainty": {"n_samples": 4}}
        answers = [server.complete(**common, **options).json()["choices"][0]["text"] for _ in range(3)]
        return answers

    assert len(set(texts(temperature=1.0, seed=7))) == 1
    assert len(set(texts(temperature=1.0))) > 1
    greedy = texts(temperature=0)
    assert texts(temperature=1.0, top_k=1) == greedy
    assert texts(temperature=1.0, top_p=1e-6) == greedy


def test_seed_with_a_prompt_in_chunks(server: Server) -> None:
    """Per-request generators end vLLM's engine on CPU when a prompt is prefilled in chunks, with and without an ensemble."""
    for options in ({}, {"uncertainty": {"n_samples": 4}}):
        first, second = (
            server.complete(model="diag", prompt=LONG, max_tokens=4, temperature=1.0, seed=3, **options)
            for _ in range(2)
        )
        assert first.status_code == second.status_code == 200, first.text
        assert first.json()["choices"][0]["text"] == second.json()["choices"][0]["text"]


def test_prompt_logprobs_with_an_adapter(server: Server) -> None:
    """vLLM's CPU path crashes the engine here."""
    response = server.complete(model="diag", prompt=PROMPT, max_tokens=1, prompt_logprobs=1, temperature=0)
    assert response.status_code == 200
    assert len(response.json()["choices"][0]["prompt_logprobs"]) == 5
    assert server.complete(model="diag", prompt=PROMPT, max_tokens=1, uncertainty=True).status_code == 200


def test_a_stop_string_ends_every_member(server: Server) -> None:
    whole = server.complete(
        model="diag", prompt=PROMPT, max_tokens=10, temperature=0, uncertainty={"n_samples": 4}
    ).json()
    third = whole["choices"][0]["text"].split()[2]
    response = server.complete(
        model="diag", prompt=PROMPT, max_tokens=150, temperature=0, stop=[third], uncertainty={"n_samples": 4}
    )
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert third not in choice["text"].split()
    assert choice["uncertainty"]["n_effective"] == 4
    wait_until_idle(server, within_s=1)


def test_a_disconnect_ends_every_member(server: Server) -> None:
    before = server.metric("credence_client_disconnects_total")
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 180, "ignore_eos": True, "uncertainty": {"n_samples": 8}}
    for timeout in (0.05, 0.1, 0.2):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=timeout)
    wait_until_idle(server, within_s=5)
    assert server.metric("credence_client_disconnects_total") >= before + 1
    assert server.metric('credence_sample_slots{state="leased"}') == 0
    assert server.metric("credence_inflight_requests") == 0


def test_many_at_once_all_get_their_own_answer(server: Server) -> None:
    """Mixed K and adapters, twice: the second time under load, with identical answers."""
    bodies = [
        {
            "model": name,
            "prompt": f"w{number} w{number + 1}",
            "max_tokens": 6,
            "temperature": 0,
            "uncertainty": {"n_samples": k, "granularity": "token"},
        }
        for number in range(6)
        for name, k in (("diag", 1), ("diag", 8), ("row", 3), ("point", 1))
    ]

    def ask(body: dict[str, Any]) -> Any:
        response = server.complete(**body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(ask, bodies))
    for first, second in zip(alone, together, strict=True):
        assert first["text"] == second["text"]
        assert first["uncertainty"]["total"] == pytest.approx(second["uncertainty"]["total"], abs=1e-4)
    wait_until_idle(server, within_s=2)


def test_other_samples_displace_idle_ones_and_come_back(server: Server) -> None:
    """More sample sets than slots: answers do not depend on what was resident."""

    def ask(seed: int) -> Any:
        response = server.complete(
            model="diag", prompt=PROMPT, max_tokens=3, temperature=0, uncertainty={"n_samples": 8, "seed": seed}
        )
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["uncertainty"]["total"]

    first = [ask(seed) for seed in range(8)]
    assert [ask(seed) for seed in range(8)] == pytest.approx(first, abs=1e-6)
    assert len(set(first)) == 8


def test_latency_by_sample_count_in_prometheus(server: Server) -> None:
    for k in (1, 2, 4, 8):
        server.complete(model="diag", prompt=PROMPT, max_tokens=2, uncertainty={"n_samples": k})
        line = f'credence_request_duration_seconds_count{{endpoint="/v1/completions",k="{k}",mode="ensemble",outcome="ok"}}'
        assert server.metric(line) >= 1
        if k > 1:
            assert server.metric(f'credence_gang_wait_seconds_count{{k="{k}"}}') >= 1
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={"model": "diag", "prompt": PROMPT, "stream": True, "uncertainty": {"n_samples": 2}},
    ) as stream:
        stream.read()
    assert server.metric('credence_time_to_first_token_seconds_count{k="2",mode="ensemble"}') >= 1
    text = server.client.get("/metrics").text
    for name in (
        "credence_sample_slots",
        "credence_sample_materialize_seconds_count",
        "credence_sample_cache_requests_total",
        "credence_samples_requested_total",
        "credence_adapter_info",
        "credence_adapter_loads_total",
        "credence_engine_up 1.0",
        "credence_epistemic_nats_count",
        "credence_confidence_count",
        "vllm:e2e_request_latency_seconds_count",
    ):
        assert name in text, name


def test_low_confidence_is_flagged(server: Server) -> None:
    flags = []
    for threshold in (0.0, 1.0):
        options = {"n_samples": 2, "threshold": threshold}
        response = server.complete(model="diag", prompt=PROMPT, max_tokens=2, temperature=0, uncertainty=options)
        flags.append(response.json()["choices"][0]["uncertainty"]["flag"])
    assert flags == ["ok", "low_confidence"]


def test_ready_and_alive(server: Server) -> None:
    assert server.client.get("/readyz").json() == {"status": "ready"}
    assert server.client.get("/livez").status_code == 200


def test_the_log_has_a_line_of_ours_for_every_request_and_none_of_uvicorns(server: Server) -> None:
    body = {"model": "diag", "prompt": PROMPT, "max_tokens": 2, "uncertainty": {"n_samples": 2}}
    server.client.post("/v1/completions", json=body, headers={"x-request-id": "in-text"})
    line = r" INFO .*request_id=in-text method=POST path=/v1/completions status=200 mode=ensemble k=2 model=diag "
    deadline = time.monotonic() + 10  # the line is written once the answer is out
    while not re.search(line, log := server.log.read_text()):
        assert time.monotonic() < deadline, log[-2000:]
        time.sleep(0.05)
    assert '"POST /v1/completions HTTP/1.1" 200' not in log and "w40" not in log
