"""Errors the server answers with, in OpenAI's envelope.

ServeError
├── BadRequest         400  the request cannot be served as asked (``param`` names the field)
├── NotFound           404  no such model or route
├── PayloadTooLarge    413  the body is over the limit
├── Unavailable        503  overloaded, draining, or a sample could not be loaded; retry later
├── EnsembleFailed     500  the engine did not deliver what an exact answer needs
└── ConfigurationError  --  the server cannot start like this
"""

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


class NotFound(ServeError):
    """404."""

    status = 404
    kind = "NotFoundError"

    def __init__(self, message: str, *, param: str | None, reason: str = "unknown_model") -> None:
        super().__init__(message, param=param, reason=reason)


class PayloadTooLarge(ServeError):
    """413."""

    status = 413
    kind = "PayloadTooLargeError"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="too_large")


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
