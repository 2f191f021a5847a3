"""Errors the server answers with, in OpenAI's envelope.

ServeError
├── BadRequest         400  the request cannot be served as asked (``param`` names the field)
├── Unauthorized       401  no key, or one that does not open this route
├── Forbidden          403  the key or the server does not permit it (``param`` names the field)
├── NotFound           404  no such model or route, or none that the key may see
├── Conflict           409  a name is taken, or the server's layout cannot do it
├── PayloadTooLarge    413  the body is over the limit
├── ArtifactRefused    422  an artifact cannot be served (``code`` says why)
├── RateLimited        429  the key's rate is used up; retry after the time named
├── Unavailable        503  overloaded, draining, or a sample could not be loaded; retry later
├── EnsembleFailed     500  the engine did not deliver what an exact answer needs
└── ConfigurationError  --  the server cannot start like this
"""

import traceback
from typing import Any


class ServeError(Exception):
    """An error with an HTTP status.

    Attributes:
        status: HTTP status code.
        param: the request field concerned, e.g. ``uncertainty.n_samples``.
        reason: value of the ``reason`` label of ``credence_rejections_total`` (a closed set).
        retry_after_s: seconds for the Retry-After header.
    """

    status = 500
    kind = "InternalServerError"

    def __init__(
        self, message: str, *, param: str | None = None, reason: str = "internal", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.reason = reason
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}

    def headers(self) -> dict[str, str]:
        """Response headers of the error."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class BadRequest(ServeError):
    """400."""

    status = 400
    kind = "BadRequestError"

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message, param=param, reason="bad_request")


class Unauthorized(ServeError):
    """401."""

    status = 401
    kind = "AuthenticationError"

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is needed in the header `Authorization: Bearer KEY`", param=None, reason="unauthorized"
        )

    def headers(self) -> dict[str, str]:
        """Names the scheme."""
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ServeError):
    """403."""

    status = 403
    kind = "PermissionDeniedError"

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message, param=param, reason="forbidden")


class NotFound(ServeError):
    """404."""

    status = 404
    kind = "NotFoundError"

    def __init__(self, message: str, *, param: str | None, reason: str = "unknown_model") -> None:
        super().__init__(message, param=param, reason=reason)


class Conflict(ServeError):
    """409."""

    status = 409
    kind = "ConflictError"

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message, param=param, reason="conflict")


class ArtifactRefused(ServeError):
    """422; ``code`` is the reason of an ArtifactError, or what does not fit the server: rank, modules, classifier, base_model, engine."""

    status = 422
    kind = "ArtifactRefusedError"

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, param="path", reason="artifact_refused")
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's envelope."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class PayloadTooLarge(ServeError):
    """413."""

    status = 413
    kind = "PayloadTooLargeError"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="too_large")


class RateLimited(ServeError):
    """429."""

    status = 429
    kind = "RateLimitError"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, reason="rate_limit", retry_after_s=retry_after_s)


class Unavailable(ServeError):
    """503; ``reason`` is overload, draining or sample_failed."""

    status = 503
    kind = "ServiceUnavailableError"

    def __init__(self, message: str, *, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)

    def headers(self) -> dict[str, str]:
        """A server that ends also ends its connections, so that the next request finds another one."""
        return super().headers() | ({"Connection": "close"} if self.reason == "draining" else {})


class EnsembleFailed(ServeError):
    """500: members did not stay together or a record is missing. Better no number than a wrong one."""


class ConfigurationError(ServeError):
    """The server refuses to start; the message says what to change."""


def without_messages(error: BaseException) -> str:
    """Types and places of an exception and its causes, for the log; no message, which may quote the prompt of a request."""
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        places = "".join(f"\n  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
        parts.append(f"{type(cause).__module__}.{type(cause).__qualname__}{places}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\ncaused by ".join(parts)
