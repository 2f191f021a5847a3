"""How long a call may take in all: `deadline_s`, with a clock that the tests move."""

from typing import Any

import httpx2
import pytest

from credence.clients import (
    ConnectionFailedError,
    DeadlineExceeded,
    RequestTimeoutError,
    ServiceUnavailableError,
    TransportError,
)
from tests.clients.answers import UNCERTAINTY, Script, chunk, completion, error, events, score, stream
from tests.clients.conftest import Connect


class Clock:
    """Moves with the client's waits between attempts, and by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def sleep(self, seconds: float) -> None:
        self.wait(seconds)

    def later(self, seconds: float, step: Any) -> Any:
        def answer() -> Any:
            self.now += seconds
            return step

        return answer

    def move(self, seconds: float) -> Any:
        return self.later(seconds, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("credence.clients.transport.time.sleep", clock.wait)
    monkeypatch.setattr("credence.clients.transport.asyncio.sleep", clock.sleep)
    monkeypatch.setattr("credence.clients.calls.monotonic", lambda: clock.now)
    monkeypatch.setattr("credence.clients.calls.random.uniform", lambda low, high: high)
    return clock


def test_a_wait_that_would_pass_the_deadline_is_not_begun(client: Connect, clock: Clock) -> None:
    script = Script(clock.later(0.5, error(503, Retry_After="30", x_request_id="r-1")))
    with pytest.raises(DeadlineExceeded) as caught:
        client(script).complete("p", model="m", deadline_s=5)
    raised = caught.value
    assert (raised.deadline_s, raised.spent_s, raised.waited_s, raised.attempts) == (5.0, 0.5, 0.0, 1)
    assert (raised.status, raised.retry_after_s) == (503, 30.0)
    assert isinstance(raised, TransportError) and isinstance(raised, TimeoutError)
    assert isinstance(raised.__cause__, ServiceUnavailableError) and clock.waits == []
    assert str(raised).startswith(
        "no answer from http://server:8000/v1/completions within deadline_s = 5 s: 1 attempt took 0.5 s, "
        "0 s of them between attempts; none is left to wait 30 s and ask again (status 503, request id "
    )


def test_waits_and_attempts_are_spent_from_one_budget(client: Connect, clock: Clock) -> None:
    script = Script(*[clock.later(0.25, error(429, Retry_After="2")) for _ in range(9)])
    with pytest.raises(DeadlineExceeded, match="3 attempts took 4.75 s, 4 s of them between attempts") as caught:
        client(script, max_retries=8).score(model="m", prompt="a", completion="b", deadline_s=6.5)
    assert (caught.value.attempts, caught.value.waited_s, caught.value.spent_s) == (3, 4.0, 4.75)
    assert clock.waits == [2.0, 2.0]


def test_a_deadline_that_is_far_away_changes_nothing(client: Connect, clock: Clock) -> None:
    refused = [error(503, Retry_After="2"), httpx2.ConnectError("refused")]
    assert (
        client(Script(*refused, httpx2.Response(200, json=completion()))).complete("p", model="m", deadline_s=100).text
    )
    assert clock.waits == [2.0, 1.0]
    with pytest.raises(ConnectionFailedError):
        client(Script(httpx2.ConnectError("refused")), max_retries=0).complete("p", model="m", deadline_s=100)


def test_each_phase_of_an_attempt_is_given_what_is_left(client: Connect, clock: Clock) -> None:
    def limits(**options: Any) -> Any:
        script = Script(error(503, Retry_After="2"), httpx2.Response(200, json=completion()))
        client(script, timeout_s=20).complete("p", model="m", **options)
        assert "deadline_s" not in script.body
        return script.requests[1].extensions["timeout"]

    assert dict(limits()) == {"connect": 5.0, "read": 20.0, "write": 20.0, "pool": 20.0}
    cut = limits(deadline_s=6)
    assert dict(cut) == {"connect": 4.0, "read": 4.0, "write": 4.0, "pool": 4.0}
    clock.now += 3.5
    assert cut.get("read") == 0.5
    clock.now += 3.5
    assert 0.0 < cut.get("read") < 0.1  # 0 would mean "do not wait" to a socket


@pytest.mark.parametrize("failure", [httpx2.ReadTimeout, httpx2.WriteTimeout, httpx2.ConnectTimeout])
def test_a_timeout_is_the_deadline_only_if_that_has_passed(client: Connect, clock: Clock, failure: Any) -> None:
    with pytest.raises(DeadlineExceeded, match="1 attempt took 5 s") as caught:
        client(Script(clock.later(5.0, failure("slow")))).complete("p", model="m", deadline_s=5)
    assert isinstance(caught.value.__cause__, failure)
    expected = ConnectionFailedError if failure is httpx2.ConnectTimeout else RequestTimeoutError
    with pytest.raises(expected):
        client(Script(clock.later(4.0, failure("slow"))), max_retries=0).complete("p", model="m", deadline_s=5)


def test_a_body_that_trickles_in_does_not_stretch_the_deadline(client: Connect, clock: Clock) -> None:
    for status in (200, 503):
        slow = stream(b"{", clock.move(3.0), b" ", clock.move(3.0), b" ", b"}")
        slow.status_code = status
        with pytest.raises(DeadlineExceeded, match="the answer was still arriving"):
            client(Script(slow)).complete("p", model="m", deadline_s=5)
        assert slow.extensions["body"].closed and slow.extensions["body"].taken == 5


def test_a_stream_has_one_deadline_until_its_end(client: Connect, clock: Clock) -> None:
    response = stream(events(chunk(" a")), clock.move(3.0), events(chunk(" b")), clock.move(3.0), events(chunk(" c")))
    opened = client(Script(response)).stream_complete("p", model="m", deadline_s=5)
    assert [next(opened).text, next(opened).text] == [" a", " b"]
    with pytest.raises(DeadlineExceeded, match="still arriving"):
        next(opened)
    assert response.extensions["body"].closed and list(opened) == []
    response = stream(events(chunk(" a"), "[DONE]"), clock.move(9.0), b"\n")
    assert len(list(client(Script(response)).stream_chat([{"role": "user"}], model="m", deadline_s=5))) == 1


@pytest.mark.parametrize("deadline_s", [0, -1.0, float("nan"), float("inf"), True, "5"])
def test_wrong_deadlines(client: Connect, deadline_s: Any) -> None:
    for ask in (
        lambda opened: opened.complete("p", model="m", deadline_s=deadline_s),
        lambda opened: opened.stream_chat([{"role": "user"}], model="m", deadline_s=deadline_s),
        lambda opened: opened.score(model="m", prompt="a", completion="b", deadline_s=deadline_s),
        lambda opened: opened.map(["p"], model="m", deadline_s=deadline_s),
    ):
        with pytest.raises(ValueError, match="deadline_s is .*; give a positive number of seconds"):
            ask(client(Script()))


def test_a_deadline_of_none_is_no_deadline(client: Connect) -> None:
    script = Script(httpx2.Response(200, json=score(UNCERTAINTY)))
    assert client(script).score(model="m", prompt="a", completion="b", deadline_s=None).id == "score-1"
