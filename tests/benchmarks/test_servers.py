import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from credence.benchmarks.measure import BenchError
from credence.benchmarks.servers import EngineSettings, request_body
from credence.benchmarks.workload import TAU
from tests.benchmarks.conftest import Fake


def test_requests_ask_for_what_their_row_says() -> None:
    mean = {"model": "bench", "max_tokens": 5, "ignore_eos": True, "temperature": 0.0}
    assert request_body(new_tokens=5) == mean
    assert request_body(new_tokens=5, num_samples=8) == mean | {"uncertainty": {"n_samples": 8, "tau": TAU}}
    assert request_body(new_tokens=5, completions=4) == mean | {"n": 4, "temperature": 1.0}
    assert request_body(new_tokens=5, model="base") == mean | {"model": "base"}


def test_each_prompt_is_one_request(fake: Fake) -> None:
    target, asked = fake()
    answers = target.complete([[3, 4], [5, 6], [7, 8]], request_body(new_tokens=2))
    assert len(answers) == 3
    assert sorted(body["prompt"] for body in asked) == [[3, 4], [5, 6], [7, 8]]


def test_requests_are_sent_at_once(fake: Fake) -> None:
    # Nobody gets past the barrier unless all eight are there together.
    barrier = threading.Barrier(8, timeout=30)

    def answer(body: dict[str, Any]) -> httpx2.Response:
        barrier.wait()
        return httpx2.Response(200, json={"choices": [{}], "usage": {"completion_tokens": 1}})

    target, _ = fake(answer=answer)
    assert len(target.complete([[3]] * 8, request_body(new_tokens=1))) == 8


def test_an_error_of_the_server_is_not_measured(fake: Fake) -> None:
    target, _ = fake(answer=lambda body: httpx2.Response(503, text="queue full"))
    with pytest.raises(BenchError, match="http://fake answered 503: queue full"):
        target.measure([[3]], request_body(new_tokens=1))


def test_an_answer_of_another_length_is_not_measured(fake: Fake) -> None:
    target, _ = fake(answer=lambda body: httpx2.Response(200, json={"usage": {"completion_tokens": 7}}))
    with pytest.raises(BenchError, match="generated 7 tokens, 8 were asked for"):
        target.measure([[3]], request_body(new_tokens=2, completions=4))


def test_the_first_token_of_a_stream_is_timed(fake: Fake) -> None:
    arrived: list[float] = []

    class Stream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'data: {"choices": []}\n\n'
            time.sleep(0.05)
            for _ in range(2):
                arrived.append(time.perf_counter())
                yield b'data: {"choices": [{"text": "w"}]}\n\n'
            time.sleep(0.2)
            yield b"data: [DONE]\n\n"

    target, asked = fake(answer=lambda body: httpx2.Response(200, stream=Stream()))
    start = time.perf_counter()
    measured = target.measure_first_token([3], request_body(new_tokens=2))
    assert asked[0]["stream"] is True
    # Before the second token was even sent, so neither it nor the end of the stream is waited for.
    assert 50 <= measured.wall_ms <= 1000 * (arrived[1] - start)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx2.Response(400, text="no streams here"), "answered 400: no streams here"),
        (httpx2.Response(200, text='data: {"error": {"message": "died"}}\n\n'), "broke off its stream: .*died"),
        (httpx2.Response(200, text="data: [DONE]\n\n"), "an answer without a token"),
    ],
)
def test_streams_without_a_token_are_not_measured(fake: Fake, response: httpx2.Response, message: str) -> None:
    target, _ = fake(answer=lambda body: response)
    with pytest.raises(BenchError, match=message):
        target.measure_first_token([3], request_body(new_tokens=2))


def test_both_servers_get_the_same_threads_and_flags() -> None:
    settings = EngineSettings(dtype="float32", max_length=64, max_samples=32, threads=3)
    flags = settings.flags()
    assert dict(zip(flags, flags[1:], strict=False))["--dtype"] == "float32"
    assert dict(zip(flags, flags[1:], strict=False))["--max-model-len"] == "64"
    # vLLM's own binding would give the worker another number of threads than was asked for.
    assert settings.environment()["OMP_NUM_THREADS"] == "3"
    assert settings.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
