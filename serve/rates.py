"""Rates of a key: one bucket of requests and one of tokens under posterior samples.

What a request costs in sample tokens is known when it is over. At the door it is charged with the most that it can cost, so that requests
that run side by side see each other, and at the end the difference is given back. A request is let in while there is anything left in the
bucket, however much it asks for: so a limit may be smaller than one request, and a key passes its limit by at most the one request that
emptied the bucket; the debt is paid off before the next.
"""

import math
import time
from collections.abc import Callable

from credence.serve.errors import RateLimited
from credence.serve.keys import KeyRecord


class TokenBucket:
    """Holds what may be spent; fills up at a steady rate. A minute's worth can be spent at once.

    Args:
        per_minute: capacity, and what flows in each minute.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = float(per_minute)
        self._clock = clock
        self._level = self.capacity
        self._seen_s = clock()

    def level(self) -> float:
        """What is left; negative after a request that took more than there was. A clock that goes back adds nothing."""
        now = self._clock()
        if now > self._seen_s:
            self._add((now - self._seen_s) * self.capacity / 60)
            self._seen_s = now
        return self._level

    def wait_s(self, least: float) -> float:
        """Seconds until the level is ``least``; 0 if it is."""
        return max(0.0, (least - self.level()) * 60 / self.capacity)

    def take(self, amount: float) -> None:
        """Takes, below zero too; a negative amount is given back."""
        self.level()
        self._add(-amount)

    def _add(self, amount: float) -> None:
        self._level = min(self.capacity, self._level + amount)


class Rates:
    """The buckets of all keys. They are of this process: two servers do not know of one another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[KeyRecord, TokenBucket | None, TokenBucket | None]] = {}

    def admit(self, key: KeyRecord, sample_tokens: int) -> "Charge":
        """Charges a request with itself and with the sample tokens that it can cost at most.

        Raises:
            RateLimited: a bucket is empty; nothing was charged.
        """
        requests, tokens = self._of(key)
        if requests is not None and (wait_s := requests.wait_s(1)):
            raise _limited(f"{key.requests_per_minute} requests per minute", wait_s)
        # From the smallest level above zero on; 1 where a request without samples costs nothing.
        if tokens is not None and sample_tokens and (wait_s := tokens.wait_s(1)):
            raise _limited(f"{key.sample_tokens_per_minute} sample tokens per minute", wait_s)
        if requests is not None:
            requests.take(1)
        if tokens is not None:
            tokens.take(sample_tokens)
        return Charge(tokens, sample_tokens)

    def _of(self, key: KeyRecord) -> tuple[TokenBucket | None, TokenBucket | None]:
        record, requests, tokens = self._buckets.get(key.name, (None, None, None))
        if record is None or record != key:
            requests, tokens = (
                TokenBucket(per_minute, self._clock) if per_minute is not None else None
                for per_minute in (key.requests_per_minute, key.sample_tokens_per_minute)
            )
            self._buckets[key.name] = key, requests, tokens
        return requests, tokens


class Charge:
    """What a request was charged with, until it is known what it did."""

    def __init__(self, bucket: TokenBucket | None, sample_tokens: int) -> None:
        self._bucket = bucket
        self._sample_tokens = sample_tokens

    def settle(self, used: int) -> None:
        """Gives back what was not used; once."""
        if self._bucket is not None:
            self._bucket.take(used - self._sample_tokens)
        self._bucket = None


def _limited(limit: str, wait_s: float) -> RateLimited:
    return RateLimited(f"this key has used up its {limit}; retry later", retry_after_s=max(1, math.ceil(wait_s)))
