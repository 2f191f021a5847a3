"""One call of a client: everything that is decided about it, the same for threads and for asyncio.

Retried, with exponential backoff and at most `max_retries` times: a connection that could not be made, and a 429 or
503 that carries Retry-After. Never retried: a request whose outcome is unknown (it was sent, and no answer came),
because the server may have done the work; nor a stream that has begun. `timeout_s` limits each attempt (of a stream, the wait for
each piece), `deadline_s` the call. Logger: `credence.clients.calls`, retries at INFO; no prompts, no keys.
"""

import logging
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from credence.clients.errors import (
    ConnectionFailedError,
    CredenceError,
    DeadlineExceeded,
    InvalidResponseError,
    RequestTimeoutError,
    StatusError,
    TransportError,
    error_from_answer,
)
from credence.clients.settings import CONNECT_TIMEOUT_S, Settings

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
# A server that asks for more patience than this gets the error raised instead: the caller decides.
MAX_RETRY_AFTER_S = 60.0

_RETRIED_STATUSES = frozenset({429, 503})
# Shortest time that is still waited for, since 0 means "do not wait" to a socket; also how early a timer may go off.
_LEAST_S = 0.01

_ModelT = TypeVar("_ModelT", bound=BaseModel)
_AnswerT = TypeVar("_AnswerT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The head of an answer of success.

    Attributes:
        path: What was asked for.
        status: HTTP status.
        request_id: The id under which the server's log knows the request.
    """

    path: str
    status: int
    request_id: str

    def parsed(self, model: type[_ModelT], content: bytes) -> _ModelT:
        """Read the body, or one event of it, as `model`.

        Raises:
            InvalidResponseError: It is something else; the message names the fields at fault, never their values.
        """
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'the body'}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
                for problem in error.errors(include_url=False, include_input=False)
            )
            raise self.invalid(problems) from None

    def invalid(self, problem: str) -> InvalidResponseError:
        """Build the error of an answer that breaks the contract."""
        return InvalidResponseError(
            f"the answer to {self.path} is not what this client expects ({problem}); "
            "check that base_url points at a Credence or vLLM server of a matching version",
            status=self.status,
            request_id=self.request_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(Generic[_AnswerT]):
    """One request, and how its answer is read.

    Attributes:
        path: Path below the base URL.
        read: Turns the body of success (of a stream, one event) into what the caller gets; raises InvalidResponseError.
        body: Sent as JSON.
        method: HTTP method.
        streamed: The answer is a stream of events.
        uncertainty: Every choice of a stream must end with its uncertainty.
        retried: Repeat the request where that is safe.
        deadline_s: Seconds for the whole call.
        timeout_s: Seconds for each attempt where that must be longer than the client's.
    """

    path: str
    read: Callable[[Reply, bytes], _AnswerT]
    body: dict[str, Any] | None = None
    method: str = "POST"
    streamed: bool = False
    uncertainty: bool = False
    retried: bool = True
    deadline_s: float | None = None
    timeout_s: float = 0.0


class Call(Generic[_AnswerT]):
    """The attempts to get one question answered.

    A transport performs them: it sends `request` within `attempt`, gives up or waits `delay_s` and begins again as `attempt`
    decides, and reads the body within `translated`, part by part through `in_time`.
    """

    def __init__(self, settings: Settings, question: Question[_AnswerT]) -> None:
        """Start the clock of the deadline."""
        self.question = question
        self.base_url = settings.base_url
        self.delay_s = 0.0
        self._timeout_s = max(settings.timeout_s, question.timeout_s)
        self._max_retries = settings.max_retries if question.retried else 0
        self._request_id = uuid.uuid4().hex
        self._attempts = 0
        self._waited_s = 0.0
        self._started = monotonic()

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of httpx2's `build_request`."""
        return {
            "method": self.question.method,
            "url": self.base_url + self.question.path,
            "json": self.question.body,
            "headers": {"X-Request-Id": self._request_id},
            "extensions": {"timeout": _Limits(self._timeout_s, self._remaining_s)},
        }

    def reply(self, response: httpx2.Response) -> Reply:
        """Return the head of an answer."""
        return Reply(
            path=self.question.path,
            status=response.status_code,
            request_id=response.headers.get("x-request-id") or self._request_id,
        )

    def accepts(self, response: httpx2.Response) -> bool:
        """Whether the answer is what was asked for, going by its head; if not, it is to be read and `refusal` raised."""
        return response.is_success and (not self.question.streamed or _kind(response).startswith("text/event-stream"))

    def refusal(self, response: httpx2.Response, content: bytes) -> CredenceError:
        """Build the error of an answer that is not accepted."""
        if response.is_success:
            return self.reply(response).invalid(f"the body is {_kind(response)}, not text/event-stream")
        return error_from_answer(response.status_code, response.headers, content, request_id=self._request_id)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One attempt. An error after which it is safe to ask again ends here, and `delay_s` is to be waited.

        Raises:
            CredenceError: Any other error.
        """
        self._attempts += 1
        try:
            with self.translated():
                yield
        except (ConnectionFailedError, StatusError) as error:
            delay_s = _delay_before_retry(error, self._attempts - 1)
            if delay_s is None or self._attempts > self._max_retries:
                raise
            remaining_s = self._remaining_s()
            if delay_s >= remaining_s:
                raise self._deadline_exceeded(f"none is left to wait {delay_s:.3g} s and ask again", error) from error
            logger.info(
                "retry %d of %d of %s %s in %.2f s (%s, request id %s)",
                self._attempts,
                self._max_retries,
                self.question.method,
                self.question.path,
                delay_s,
                type(error).__name__,
                self._request_id,
            )
            self.delay_s = delay_s
            self._waited_s += delay_s

    def in_time(self, part: bytes) -> bytes:
        """Return a part of a body that has just arrived.

        Raises:
            DeadlineExceeded: It arrived too late.
        """
        if self._remaining_s() <= 0.0:
            raise self._deadline_exceeded("the answer was still arriving")
        return part

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what httpx2 raises while a request is sent or an answer is read into the client's errors.

        Raises:
            TransportError: No usable answer arrived; the subclass says why.
        """
        try:
            yield
        except httpx2.TimeoutException as error:
            if self._remaining_s() <= _LEAST_S:
                raise self._deadline_exceeded("the server may still be working on it") from error
            if isinstance(error, httpx2.ConnectTimeout):
                raise self._unreachable(error) from error
            raise RequestTimeoutError(
                f"no answer from {self.base_url}{self.question.path} within {self._timeout_s:g} s; "
                "the server may still be working on it: raise timeout_s, or ask for fewer samples or tokens",
                request_id=self._request_id,
            ) from error
        except httpx2.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx2.RequestError as error:
            raise self.broken(str(error) or type(error).__name__) from error

    def broken(self, why: str) -> TransportError:
        """Build the error of an answer that broke off."""
        return TransportError(
            f"the connection to {self.base_url} broke before the answer was complete: {why}; "
            "whether the server did the work is unknown",
            request_id=self._request_id,
        )

    def _unreachable(self, error: httpx2.RequestError) -> ConnectionFailedError:
        return ConnectionFailedError(
            f"no connection to {self.base_url}: {error or type(error).__name__}; "
            "check the address and that the server is up",
            request_id=self._request_id,
        )

    def _remaining_s(self) -> float:
        deadline_s = self.question.deadline_s
        return float("inf") if deadline_s is None else self._started + deadline_s - monotonic()

    def _deadline_exceeded(self, why: str, last: CredenceError | None = None) -> DeadlineExceeded:
        deadline_s = self.question.deadline_s
        assert deadline_s is not None
        spent_s = monotonic() - self._started
        attempts = f"{self._attempts} attempt{'s' * (self._attempts != 1)}"
        facts = {} if last is None else {"status": last.status, "code": last.code, "retry_after_s": last.retry_after_s}
        return DeadlineExceeded(
            f"no answer from {self.base_url}{self.question.path} within deadline_s = {deadline_s:g} s: {attempts} took "
            f"{spent_s:.3g} s, {self._waited_s:.3g} s of them between attempts; {why}",
            deadline_s=deadline_s,
            spent_s=spent_s,
            waited_s=self._waited_s,
            attempts=self._attempts,
            request_id=self._request_id,
            **facts,
        )


class _Limits(Mapping[str, float]):
    """httpx2's limits in seconds for each phase of a request; each is cut to what is left of the deadline when it begins."""

    def __init__(self, timeout_s: float, remaining_s: Callable[[], float]) -> None:
        self._limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)
        self._limits["connect"] = min(timeout_s, CONNECT_TIMEOUT_S)
        self._remaining_s = remaining_s

    def __getitem__(self, phase: str) -> float:
        return min(self._limits[phase], max(self._remaining_s(), _LEAST_S))

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)


def _kind(response: httpx2.Response) -> str:
    kind: str = response.headers.get("content-type", "nothing named")
    return kind


def _delay_before_retry(error: CredenceError, retries: int) -> float | None:
    """Seconds to wait before the next attempt; None when this error must not be retried."""
    backoff_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**retries) * random.uniform(0.75, 1.0)
    if isinstance(error, ConnectionFailedError):
        return backoff_s
    if error.status not in _RETRIED_STATUSES or error.retry_after_s is None:
        return None
    if error.retry_after_s > MAX_RETRY_AFTER_S:
        return None
    return max(error.retry_after_s, backoff_s)
