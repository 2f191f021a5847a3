"""What can go wrong between a caller and a Credence server.

```
CredenceError
+-- TransportError               no usable answer arrived
|   +-- ConnectionFailedError    no connection (also a ConnectionError); the request was never sent
|   +-- RequestTimeoutError      no answer in time (also a TimeoutError); the server may still have done the work
|   +-- DeadlineExceeded         no answer within the call's deadline_s, retries and waits included (also a TimeoutError)
+-- InvalidResponseError         an answer arrived, but it breaks the contract
|   +-- UncertaintyMissingError  uncertainty was asked for, and a choice came back without it
+-- Abstained                    an answer is less sure than `require_trust` was told to accept
+-- StatusError                  the server answered with an error; subclasses by HTTP status:
    +-- BadRequestError 400       +-- PayloadTooLargeError 413
    +-- AuthenticationError 401   +-- UnprocessableError 422
    +-- PermissionDeniedError 403 +-- RateLimitError 429
    +-- NotFoundError 404         +-- ServerError 5xx
    +-- ConflictError 409             +-- ServiceUnavailableError 503
                                      +-- GatewayTimeoutError 504
```

Catch `CredenceError` to catch all. Every error carries `message`, `status`, `type`, `code`, `param`, `request_id` and
`retry_after_s`; what is not known is None. A wrong argument is a plain ValueError, raised before anything is sent. An error
that the server reports in the middle of a stream is the StatusError of the status it names.
"""

import json
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

_SHOWN_BODY_CHARS = 200


class CredenceError(Exception):
    """Base of everything the client raises about a request.

    Attributes:
        message: One sentence.
        status: HTTP status of the answer.
        type: The server's error type, for example `invalid_request_error`.
        code: The server's error code as text (vLLM sends the HTTP status as a number, OpenAI a word).
        param: Name of the request field at fault.
        request_id: The id under which the server's log knows the request.
        retry_after_s: Seconds after which the server wants to be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """Return the message, followed by the status, field and request id that are known."""
        facts = (("status", self.status), ("param", self.param), ("request id", self.request_id))
        known = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
        return f"{self.message} ({known})" if known else self.message


class TransportError(CredenceError):
    """No usable answer arrived: the connection broke, and whether the server did the work is unknown."""


class ConnectionFailedError(TransportError, ConnectionError):
    """No connection could be made, so the request was never sent and is safe to repeat."""


class RequestTimeoutError(TransportError, TimeoutError):
    """The request was sent, or was being sent, and no answer came in time; the server may still have done the work."""


class DeadlineExceeded(TransportError, TimeoutError):
    """The call's own deadline passed, or would have passed before the server wants to be asked again.

    `status`, `code`, `retry_after_s` and `__cause__` are those of the last attempt, where it ended in an error.

    Attributes:
        deadline_s: What the call was given, in seconds.
        spent_s: What it took until it was given up, in seconds.
        waited_s: The part of it between attempts, in seconds.
        attempts: Requests that were begun.
    """

    def __init__(
        self, message: str, *, deadline_s: float, spent_s: float, waited_s: float, attempts: int, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.deadline_s = deadline_s
        self.spent_s = spent_s
        self.waited_s = waited_s
        self.attempts = attempts


class InvalidResponseError(CredenceError):
    """The server answered with success, but the body is not what the contract promises."""


class UncertaintyMissingError(InvalidResponseError):
    """Uncertainty was asked for and is absent, which is how a server without Credence answers.

    Attributes:
        choice_indices: The choices that came back without uncertainty.
    """

    def __init__(self, message: str, *, choice_indices: tuple[int, ...], request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.choice_indices = choice_indices

    @classmethod
    def of_choices(cls, indices: tuple[int, ...], *, request_id: str | None) -> "UncertaintyMissingError":
        """Build the error of an answer in which these choices have no uncertainty."""
        return cls(
            f"uncertainty was asked for, but choices {list(indices)} came back without it; "
            "the server is probably a plain vLLM: start it with `credence serve`",
            choice_indices=indices,
            request_id=request_id,
        )


class Abstained(CredenceError):
    """An answer is not to be trusted: a confidence is missing, too low or (where that was required) not calibrated.

    Attributes:
        answer: The answer, all of it.
        confidence: Its confidence, of several choices the lowest; None where one has none.
        threshold: The confidence that was asked for.
        choice_indices: The choices that fail.
    """

    def __init__(
        self,
        message: str,
        *,
        answer: Any,
        confidence: float | None,
        threshold: float,
        choice_indices: tuple[int, ...],
    ) -> None:
        super().__init__(message, request_id=getattr(answer, "request_id", None))
        self.answer = answer
        self.confidence = confidence
        self.threshold = threshold
        self.choice_indices = choice_indices


class StatusError(CredenceError):
    """The server answered with an error status; this class itself stands for statuses without a class of their own."""


class BadRequestError(StatusError):
    """400: a field of the request is wrong; `param` names it."""


class AuthenticationError(StatusError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(StatusError):
    """403: the API key may not do this."""


class NotFoundError(StatusError):
    """404: no such model, adapter or route."""


class ConflictError(StatusError):
    """409: what is to be made exists already."""


class PayloadTooLargeError(StatusError):
    """413: the request is larger than the server takes."""


class UnprocessableError(StatusError):
    """422: an adapter's artifact was refused; `code` is the reason."""


class RateLimitError(StatusError):
    """429: this key is over its limit."""


class ServerError(StatusError):
    """5xx: the server failed."""


class ServiceUnavailableError(ServerError):
    """503: the server is full, draining or not ready."""


class GatewayTimeoutError(ServerError):
    """504: the server gave up at its own deadline."""


_BY_STATUS: dict[int, type[StatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: UnprocessableError,
    429: RateLimitError,
    503: ServiceUnavailableError,
    504: GatewayTimeoutError,
}


def error_from_answer(
    status: int, headers: Mapping[str, str], content: bytes, *, request_id: str | None = None
) -> StatusError:
    """Build the error of an answer with an error status, whatever its body looks like.

    Reads OpenAI's envelope `{"error": {"message", "type", "param", "code"}}`, the flat form of it, FastAPI's
    `{"detail": ...}`, and falls back to the start of the text (a proxy's page).

    Args:
        status: HTTP status.
        headers: Headers of the answer, whose names do not depend on case.
        content: The body.
        request_id: Id the request was sent with, used when the answer names none.

    Returns:
        The error, of the class its status has in the tree.
    """
    return _status_error(
        status,
        _error_fields(status, content),
        request_id=headers.get("x-request-id") or request_id,
        retry_after_s=parse_retry_after(headers.get("retry-after")),
    )


def error_from_event(event: bytes, *, request_id: str | None = None) -> StatusError | None:
    """Build the error that an event of a stream carries in place of a chunk; None when it is no error.

    Reads OpenAI's envelope and the flat form of it. The status is the `code` where that is an HTTP status, as vLLM sends
    it; any other code is a failure of the server, because it had already begun to answer.

    Args:
        event: Data of one server-sent event.
        request_id: Id of the request.
    """
    # Nearly all events are chunks: they are not parsed a second time for this.
    if b'"error"' not in event:
        return None
    try:
        body = json.loads(event)
    except ValueError:
        return None
    if not isinstance(body, dict) or not (body.get("error") or body.get("object") == "error"):
        return None
    fields = _envelope_fields(body)
    code = _text(fields.get("code")) or ""
    return _status_error(int(code) if re.fullmatch("[45][0-9]{2}", code) else None, fields, request_id=request_id)


def _status_error(
    status: int | None, fields: dict[str, Any], *, request_id: str | None, retry_after_s: float | None = None
) -> StatusError:
    default = ServerError if status is None or status >= 500 else StatusError
    answered = "reported an error" if status is None else f"answered {status}"
    message = _text(fields.get("message")) or f"the server {answered} without a readable error message"
    return _BY_STATUS.get(status or 0, default)(
        message,
        status=status,
        type=_text(fields.get("type")),
        code=_text(fields.get("code")),
        param=_text(fields.get("param")),
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def parse_retry_after(value: str | None) -> float | None:
    """Seconds to wait according to a Retry-After header (a number or an HTTP date); None when absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
        return max(0.0, seconds)
    # Also false for NaN.
    return seconds if 0.0 <= seconds < float("inf") else None


def _error_fields(status: int, content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
    except ValueError:  # bad JSON, and bytes that are not text
        shown = " ".join(content.decode(errors="replace").split())[:_SHOWN_BODY_CHARS]
        return {"message": f"the server answered {status}: {shown}" if shown else None}
    return _envelope_fields(body) if isinstance(body, dict) else {}


def _envelope_fields(body: dict[str, Any]) -> dict[str, Any]:
    error = body.get("error", body)
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    if error.get("message") is None and body.get("detail") is not None:
        detail = body["detail"]
        return {"message": detail if isinstance(detail, str) else json.dumps(detail)[:_SHOWN_BODY_CHARS]}
    return error


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)
