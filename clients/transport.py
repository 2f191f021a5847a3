"""How a request reaches the server: connections, retries, and what httpx raises turned into the client's errors.

Retried, with exponential backoff and at most `max_retries` times: a connection that could not be made, and a 429 or
503 that carries Retry-After. Never retried: a request whose outcome is unknown (it was sent, and no answer came),
because the server may have done the work; nor a stream that has begun. Logger: `credence.clients.transport`, retries at
INFO; no prompts, no keys.
"""

import logging
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from credence.clients.errors import (
    ConnectionFailedError,
    CredenceError,
    InvalidResponseError,
    RequestTimeoutError,
    StatusError,
    TransportError,
    error_from_response,
)

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 8.0
# A server that asks for more patience than this gets the error raised instead: the caller decides.
MAX_RETRY_AFTER_S = 60.0
# Below the five seconds after which uvicorn closes an idle connection: a request sent into a closing connection
# has an unknown outcome and could not be retried.
KEEPALIVE_EXPIRY_S = 3.0

_RETRIED_STATUSES = frozenset({429, 503})

_AnswerT = TypeVar("_AnswerT", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of the server, and the id under which its log knows the request; a stream's body is not read yet."""

    response: httpx.Response
    request_id: str

    def parsed(self, model: type[_AnswerT], content: bytes | None = None) -> _AnswerT:
        """Read the body, or a part of it, as `model`.

        Raises:
            InvalidResponseError: It is something else; the message names the fields at fault, never their values.
        """
        try:
            return model.model_validate_json(self.response.content if content is None else content)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'the body'}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
                for problem in error.errors(include_url=False, include_input=False)
            )
            raise self.invalid(problems) from None

    def invalid(self, problem: str) -> InvalidResponseError:
        """Build the error of an answer that breaks the contract."""
        return InvalidResponseError(
            f"the answer to {self.response.request.url.path} is not what this client expects ({problem}); "
            "check that base_url points at a Credence or vLLM server of a matching version",
            status=self.response.status_code,
            request_id=self.request_id,
        )


class Transport:
    """The connections to one server; threads may share them."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout_s: float,
        max_retries: int,
        transport: httpx.BaseTransport | None,
    ) -> None:
        """Check the arguments, which are those of `Client`; nothing is sent yet.

        Raises:
            ValueError: If an argument is not usable; the message never contains the key.
        """
        self.base_url = _checked_base_url(base_url)
        if isinstance(timeout_s, bool) or not 0.0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {timeout_s!r}; give a positive number of seconds")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"max_retries is {max_retries!r}; give a whole number, 0 or more")
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable() or not api_key.strip(" ")):
            raise ValueError("api_key is empty or has characters that no HTTP header may carry; give printable ASCII")
        self._max_retries = max_retries
        self._http = httpx.Client(
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key.strip(' ')}"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            limits=httpx.Limits(keepalive_expiry=KEEPALIVE_EXPIRY_S),
            transport=transport,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def alive(self, path: str) -> bool:
        """Ask a probe; False when it answers 503. Never retried.

        Raises:
            CredenceError: The server cannot be reached, or answers with another error.
        """
        reply = self._attempt("GET", path, uuid.uuid4().hex, None, stream=False)
        if reply.response.status_code == 503:
            return False
        if not reply.response.is_success:
            raise error_from_response(reply.response, request_id=reply.request_id)
        return True

    def send(self, method: str, path: str, body: dict[str, Any] | None = None, *, stream: bool = False) -> Reply:
        """Send a request, again where that is safe, and return the answer of success.

        Args:
            method: HTTP method.
            path: Path below the base URL.
            body: Sent as JSON.
            stream: Leave the body of a successful answer unread; the caller closes it.

        Raises:
            CredenceError: See `credence.clients.errors`.
        """
        request_id = uuid.uuid4().hex
        retries = 0
        while True:
            error: CredenceError
            try:
                reply = self._attempt(method, path, request_id, body, stream=stream)
            except ConnectionFailedError as failed:
                error = failed
            else:
                if reply.response.is_success:
                    return reply
                error = error_from_response(reply.response, request_id=request_id)
            delay_s = _delay_before_retry(error, retries)
            if delay_s is None or retries >= self._max_retries:
                raise error
            retries += 1
            logger.info(
                "retry %d of %d of %s %s in %.2f s (%s, request id %s)",
                retries,
                self._max_retries,
                method,
                path,
                delay_s,
                type(error).__name__,
                request_id,
            )
            time.sleep(delay_s)

    @contextmanager
    def translated(self, path: str, request_id: str) -> Iterator[None]:
        """Turn what httpx raises while a request is sent or an answer is read into the client's errors.

        Raises:
            TransportError: No usable answer arrived; the subclass says why.
        """
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionFailedError(
                f"no connection to {self.base_url}: {error or type(error).__name__}; "
                "check the address and that the server is up",
                request_id=request_id,
            ) from error
        except httpx.TimeoutException as error:
            raise RequestTimeoutError(
                f"no answer from {self.base_url}{path} within {self._http.timeout.read:g} s; "
                "the server may still be working on it: raise timeout_s, or ask for fewer samples or tokens",
                request_id=request_id,
            ) from error
        except httpx.RequestError as error:
            raise TransportError(
                f"the connection to {self.base_url} broke before the answer was complete: "
                f"{error or type(error).__name__}; whether the server did the work is unknown",
                request_id=request_id,
            ) from error

    def _attempt(self, method: str, path: str, request_id: str, body: dict[str, Any] | None, *, stream: bool) -> Reply:
        request = self._http.build_request(
            method, self.base_url + path, json=body, headers={"X-Request-Id": request_id}
        )
        with self.translated(path, request_id):
            response = self._http.send(request, stream=stream)
            if stream and not response.is_success:
                try:
                    response.read()
                finally:
                    response.close()
        return Reply(response=response, request_id=response.headers.get("x-request-id") or request_id)


def _delay_before_retry(error: CredenceError, retries: int) -> float | None:
    """Seconds to wait before the next attempt; None when this error must not be retried."""
    backoff_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2.0**retries) * random.uniform(0.75, 1.0)
    if isinstance(error, ConnectionFailedError):
        return backoff_s
    if not isinstance(error, StatusError) or error.status not in _RETRIED_STATUSES or error.retry_after_s is None:
        return None
    if error.retry_after_s > MAX_RETRY_AFTER_S:
        return None
    return max(error.retry_after_s, backoff_s)


def _checked_base_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000") from error
    if url.userinfo:
        raise ValueError("base_url carries a user name or password; give the key as api_key instead")
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")
