"""/readyz: what counts as proof, how often the engine is asked, and what a question that does not come back means."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from credence.serve.drain import CountRequests, Drain
from credence.serve.errors import EnsembleFailed, Unavailable
from credence.serve.readiness import FRESH_S, Readiness

LIMIT_S = 0.05


class Clock:
    """Seconds that pass when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Answers at once, with a failure, or never."""

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = 0
        self.failure: Exception | None = None
        self.stopped = False
        self.while_waiting: Callable[[], None] = lambda: None

    async def ask(self) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        self.while_waiting()
        if self.failure is not None:
            raise self.failure
        if self.stopped:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise


@pytest.fixture
def engine() -> Engine:
    return Engine()


def run(engine: Engine, story: Callable[[Readiness, Clock], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        clock = Clock()
        await story(Readiness(engine.ask, limit_s=LIMIT_S, clock=clock), clock)

    asyncio.run(asyncio.wait_for(main(), timeout=10))


def test_the_engine_is_asked_once_for_all_who_wait_and_not_again_while_the_answer_is_fresh(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        assert await asyncio.gather(*(readiness.problem() for _ in range(20))) == [None] * 20
        assert engine.asked == 1
        clock.now += FRESH_S - 0.1
        assert await readiness.problem() is None and engine.asked == 1
        clock.now += 0.2
        assert await readiness.problem() is None and engine.asked == 2

    run(engine, story)


def test_answers_of_users_are_proof(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        for _ in range(10):
            readiness.answered()
            clock.now += FRESH_S - 0.1
            assert await readiness.problem() is None
        assert engine.asked == 0

    run(engine, story)


def test_an_engine_that_hangs_is_a_problem_and_is_asked_again(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        engine.stopped = True
        assert await readiness.problem() == f"an ensemble request was not answered within {LIMIT_S:g} s"
        await asyncio.sleep(0)
        assert engine.cancelled == 1, "the question is not left in the engine"
        assert await readiness.problem() is not None and engine.asked == 1, "the failure is remembered for a moment"
        engine.stopped = False
        clock.now += LIMIT_S + 0.01
        assert await readiness.problem() is None and engine.asked == 2

    run(engine, story)


def test_a_users_answer_ends_a_remembered_failure(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        engine.stopped = True
        assert await readiness.problem() is not None
        clock.now += 0.01
        readiness.answered()
        assert await readiness.problem() is None

    run(engine, story)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (EnsembleFailed("the members did not stay together"), "did not stay together"),
        (RuntimeError("secret detail"), "RuntimeError in the engine"),
        (Unavailable("full", reason="overload"), "full"),
    ],
)
def test_a_failed_question_is_a_problem_with_its_reason(engine: Engine, failure: Exception, said: str) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        engine.failure = failure
        problem = await readiness.problem()
        assert problem is not None and said in problem and "secret" not in problem

    run(engine, story)


@pytest.mark.parametrize("failure", [None, Unavailable("full", reason="overload")])
def test_an_engine_that_delivers_to_others_is_busy_and_not_broken(engine: Engine, failure: Exception | None) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        def deliver() -> None:
            clock.now += 0.01
            readiness.delivered()

        engine.stopped, engine.failure, engine.while_waiting = True, failure, deliver
        assert await readiness.problem() is None

    run(engine, story)


def test_broken_ensembles_are_a_problem_however_busy_the_engine_is(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        engine.failure = EnsembleFailed("apart")
        engine.while_waiting = readiness.delivered
        assert await readiness.problem() == "apart"

    run(engine, story)


def test_a_probe_that_goes_away_leaves_the_question_to_the_others(engine: Engine) -> None:
    async def story(readiness: Readiness, clock: Clock) -> None:
        first, second = (asyncio.ensure_future(readiness.problem()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert await second is None and engine.asked == 1

    run(engine, story)


# Drain


def waiting(drain: Drain, timeout_s: float = 10) -> tuple[threading.Thread, list[bool]]:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(drain.wait(timeout_s)))
    thread.start()
    return thread, results


def test_the_drain_waits_for_what_was_accepted_and_for_nothing_else() -> None:
    drain = Drain()
    assert drain.enter() and drain.enter()
    drain.begin()
    assert not drain.enter(), "comes too late to be waited for"
    thread, results = waiting(drain)
    drain.leave()
    time.sleep(0.02)
    assert not results
    drain.leave()
    thread.join(timeout=10)
    assert results == [True] and not drain.cut_off


@pytest.mark.parametrize("forced", [True, False])
def test_the_drain_ends_at_its_time_or_when_forced(forced: bool) -> None:
    drain = Drain()
    drain.enter()
    drain.begin()
    thread, results = waiting(drain, 10 if forced else 0.02)
    if forced:
        drain.force()
    thread.join(timeout=10)
    assert results == [False] and drain.cut_off


def test_requests_are_counted_until_their_end_also_when_they_fail() -> None:
    drain = Drain()
    seen: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(drain.wait(0))
        raise RuntimeError

    for kind in ("http", "lifespan"):
        with pytest.raises(RuntimeError):
            asyncio.run(CountRequests(app, drain)({"type": kind}, None, None))
    assert seen == [False, True] and drain.wait(0)
