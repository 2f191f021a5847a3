from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest

from credence.clients import (
    AuthenticationError,
    BadRequestError,
    ConflictError,
    CredenceError,
    GatewayTimeoutError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    ServiceUnavailableError,
    StatusError,
    UnprocessableError,
    errors,
)
from credence.clients.errors import error_from_answer, error_from_event, parse_retry_after
from tests.clients.answers import error


def error_from_response(response: httpx2.Response, **facts: str) -> StatusError:
    return error_from_answer(response.status_code, response.headers, response.content, **facts)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, PayloadTooLargeError),
        (422, UnprocessableError),
        (429, RateLimitError),
        (500, ServerError),
        (502, ServerError),
        (503, ServiceUnavailableError),
        (504, GatewayTimeoutError),
        (302, StatusError),
    ],
)
def test_one_class_per_status(status: int, expected: type[StatusError]) -> None:
    assert type(error_from_response(error(status))) is expected


def test_openai_envelope() -> None:
    body = {
        "error": {
            "message": "n_samples is 99, at most 32",
            "type": "invalid_request_error",
            "param": "uncertainty.n_samples",
            "code": 400,
        }
    }
    raised = error_from_response(error(400, body, x_request_id="r-1", retry_after="2"))
    assert raised.message == "n_samples is 99, at most 32"
    assert (raised.status, raised.type, raised.code) == (400, "invalid_request_error", "400")
    assert (raised.param, raised.request_id, raised.retry_after_s) == ("uncertainty.n_samples", "r-1", 2.0)
    assert str(raised) == ("n_samples is 99, at most 32 (status 400, param uncertainty.n_samples, request id r-1)")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"object": "error", "message": "flat", "code": 404}, "flat"),
        ({"error": "just words"}, "just words"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body"], "msg": "bad"}]}, '[{"loc": ["body"], "msg": "bad"}]'),
        ({"error": None}, "the server answered 404 without a readable error message"),
        ({}, "the server answered 404 without a readable error message"),
        ([1], "the server answered 404 without a readable error message"),
        (b"", "the server answered 404 without a readable error message"),
        ("<html>\n gone </html>", "the server answered 404: <html> gone </html>"),
        (b"\xff\xfe\x00", "the server answered 404: "),
    ],
)
def test_any_error_body_is_survived(body: object, message: str) -> None:
    raised = error_from_response(error(404, body), request_id="mine")
    assert raised.message.startswith(message)
    assert raised.request_id == "mine"


def test_a_long_page_is_cut() -> None:
    assert len(error_from_response(error(502, "x" * 10_000)).message) < 300


@pytest.mark.parametrize(
    ("event", "expected", "status"),
    [
        (b'{"error": {"message": "why", "type": "t", "param": "n", "code": 400}}', BadRequestError, 400),
        (b'{"error": {"message": "why", "code": "503"}}', ServiceUnavailableError, 503),
        (b'{"error": {"message": "why", "code": "engine_died"}}', ServerError, None),
        (b'{"error": {"message": "why", "code": 200}}', ServerError, None),
        (b'{"error": "why"}', ServerError, None),
        (b'{"object": "error", "message": "why", "code": 409}', ConflictError, 409),
    ],
)
def test_errors_in_a_stream(event: bytes, expected: type[StatusError], status: int | None) -> None:
    raised = error_from_event(event, request_id="r-1")
    assert raised is not None and type(raised) is expected
    assert (raised.message, raised.status, raised.request_id) == ("why", status, "r-1")


def test_an_error_in_a_stream_keeps_its_facts() -> None:
    raised = error_from_event(b'{"error": {"message": "", "type": "t", "param": "n", "code": "word"}}')
    assert raised is not None
    assert (raised.type, raised.param, raised.code) == ("t", "n", "word")
    assert raised.message == "the server reported an error without a readable error message"


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices": [], "error": null}',
        b'{"choices": [{"error": {"message": "no"}}]}',
        b'{"id": "error"}',
        b'{"error": null}',
        b'["error"]',
        b'{"error": ',
        b'"error" \xff',
    ],
)
def test_what_is_no_error_in_a_stream(event: bytes) -> None:
    assert error_from_event(event) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("2", 2.0), ("0.5", 0.5), ("-1", None), ("nan", None), ("inf", None), ("soon", None), ("", None)],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date() -> None:
    soon = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    assert soon is not None and 25.0 < soon <= 30.0
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_every_class_is_drawn_in_the_docstring() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, CredenceError)]
    assert len(classes) == 20
    for value in classes:
        assert value.__name__ in str(errors.__doc__)
