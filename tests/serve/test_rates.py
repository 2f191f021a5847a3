"""Token buckets against a slow definition, and what a key's rates promise."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from credence.serve.errors import RateLimited
from credence.serve.keys import KeyRecord, hash_of
from credence.serve.rates import Rates, TokenBucket


class Clock:
    """A clock that a test moves, in whole milliseconds so that the slow definition can be exact."""

    def __init__(self) -> None:
        self.now_ms = 0

    def __call__(self) -> float:
        return self.now_ms / 1000


def level_by_definition(capacity: int, events: list[tuple[int, Fraction]], now_ms: int) -> Fraction:
    """The level at a time, from the whole history: it rises by capacity per minute of the clock's running maximum, never above capacity."""
    level, seen_ms = Fraction(capacity), 0
    for when_ms, amount in [*events, (now_ms, Fraction(0))]:
        if when_ms > seen_ms:
            level = min(Fraction(capacity), level + Fraction(capacity * (when_ms - seen_ms), 60_000))
            seen_ms = when_ms
        level = min(Fraction(capacity), level - amount)
    return level


@settings(max_examples=300, deadline=None)
@given(
    capacity=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.integers(-90_000, 90_000), st.integers(-500, 20_000)), max_size=30),
)
def test_the_level_is_that_of_the_definition_also_when_the_clock_jumps(
    capacity: int, steps: list[tuple[int, int]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(capacity, clock)
    events: list[tuple[int, Fraction]] = []
    for forward_ms, amount in steps:
        clock.now_ms = max(0, clock.now_ms + forward_ms)
        bucket.take(amount)
        events.append((clock.now_ms, Fraction(amount)))
        assert bucket.level() == pytest.approx(float(level_by_definition(capacity, events, clock.now_ms)), abs=1e-4)


def test_waiting_as_long_as_it_says_is_enough() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(100)
    assert bucket.wait_s(1) == pytest.approx(41)
    clock.now_ms += 41_000
    assert bucket.wait_s(1) == 0


def key(**changes: object) -> KeyRecord:
    return KeyRecord.model_validate({"name": "a", "hash": hash_of("a"), **changes})


@settings(max_examples=200, deadline=None)
@given(
    limit=st.integers(10, 1000),
    requests=st.lists(
        st.tuples(
            st.integers(0, 20_000),  # ms since the last arrival
            st.integers(1, 3000),  # most that it can cost
            st.floats(0, 1),  # share of it that it did cost
            st.integers(0, 40_000),  # ms until it ends
        ),
        max_size=40,
    ),
)
def test_no_key_passes_its_rate_by_more_than_one_request(
    limit: int, requests: list[tuple[int, int, float, int]]
) -> None:
    """With any overlap of requests: what was used until any time is at most a minute's worth, what flowed in, and one request."""
    clock = Clock()
    rates, who = Rates(clock), key(sample_tokens_per_minute=limit)
    running: list[tuple[int, int, object]] = []
    used, now = 0, 0
    largest = 0
    for gap, most, share, duration in requests:
        now += gap
        for end, actual, charge in sorted((r for r in running if r[0] <= now), key=lambda r: r[0]):
            clock.now_ms = end
            charge.settle(actual)  # type: ignore[attr-defined]
        running = [r for r in running if r[0] > now]
        clock.now_ms = now
        try:
            charge = rates.admit(who, most)
        except RateLimited as error:
            assert error.retry_after_s is not None and error.retry_after_s >= 1
            continue
        actual = int(most * share)
        used += actual
        largest = max(largest, most)
        running.append((now + duration, actual, charge))
        assert used <= limit + limit * now / 60_000 + largest + 1e-6


def test_requests_side_by_side_see_each_other() -> None:
    rates, who = Rates(Clock()), key(sample_tokens_per_minute=100)
    first = rates.admit(who, 100)
    with pytest.raises(RateLimited, match="100 sample tokens"):
        rates.admit(who, 1)
    first.settle(40)
    rates.admit(who, 60)


def test_a_request_larger_than_the_limit_is_served_and_paid_off() -> None:
    clock = Clock()
    rates, who = Rates(clock), key(sample_tokens_per_minute=60)
    rates.admit(who, 120).settle(120)
    with pytest.raises(RateLimited) as caught:
        rates.admit(who, 1)
    assert caught.value.retry_after_s == 61
    clock.now_ms += 61_000
    rates.admit(who, 1)


def test_a_refused_request_is_not_charged() -> None:
    clock = Clock()
    rates, who = Rates(clock), key(requests_per_minute=2, sample_tokens_per_minute=10)
    rates.admit(who, 10)
    for _ in range(5):
        with pytest.raises(RateLimited, match="sample tokens"):
            rates.admit(who, 10)
    rates.admit(who, 0)
    with pytest.raises(RateLimited, match="2 requests") as caught:
        rates.admit(who, 0)
    assert caught.value.retry_after_s == 30


def test_settling_twice_gives_back_once() -> None:
    rates, who = Rates(Clock()), key(sample_tokens_per_minute=100)
    rates.admit(who, 100)
    charge = rates.admit(key(name="b", hash=hash_of("b"), sample_tokens_per_minute=100), 100)
    charge.settle(0)
    charge.settle(0)
    with pytest.raises(RateLimited):
        rates.admit(who, 1)


def test_keys_do_not_share_and_a_changed_limit_counts_at_once() -> None:
    rates = Rates(Clock())
    rates.admit(key(requests_per_minute=1), 0)
    rates.admit(key(name="b", hash=hash_of("b"), requests_per_minute=1), 0)
    with pytest.raises(RateLimited):
        rates.admit(key(requests_per_minute=1), 0)
    rates.admit(key(requests_per_minute=5), 0)
    rates.admit(key(), 10**9)
