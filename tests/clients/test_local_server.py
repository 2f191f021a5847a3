"""The client over a real socket, against a small server in a thread."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from credence.clients import Client, ConnectionFailedError, NotFoundError, RequestTimeoutError, TransportError
from tests.clients.answers import UNCERTAINTY, chunk, completion, events

SLOW_S = 1.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    posts = 0
    connections = 0

    def setup(self) -> None:
        type(self).connections += 1
        super().setup()

    def send_stream(self, *pieces: bytes, end: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def answer(self, status: int, body: object, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Request-Id", str(self.headers["X-Request-Id"]))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/readyz":
            self.answer(503, {"status": "starting"})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": "triage"}]})
        else:
            self.answer(200, {})

    def do_POST(self) -> None:
        type(self).posts += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] == "slow":
            time.sleep(SLOW_S)
        if body["model"] == "nobody":
            self.answer(404, {"error": {"message": "no model nobody", "type": "NotFoundError", "code": 404}})
        elif body["model"] == "busy" and type(self).posts % 2:
            self.answer(429, {"error": {"message": "later"}}, Retry_After="0")
        elif body.get("stream"):
            data = events(chunk(" hé"), chunk("llo", finish_reason="stop", uncertainty=UNCERTAINTY), "[DONE]")
            cut = data.index("é".encode()) + 1
            if body["model"] == "broken":
                self.send_stream(events(chunk(" hé")), data[:cut], end=False)
            else:
                self.send_stream(data[:cut], data[cut:])
        else:
            self.answer(200, completion(UNCERTAINTY if body.get("uncertainty") else None))

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is part of the test."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    Handler.posts = Handler.connections = 0
    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_probes_and_errors(address: str) -> None:
    with Client(address) as client:
        answer = client.complete("hello", model="triage", uncertainty=True)
        assert answer.uncertainty is not None and answer.uncertainty.epistemic == 0.12
        assert answer.request_id and len(answer.request_id) == 32
        assert [model.id for model in client.models()] == ["triage"]
        assert client.health() is True
        assert client.ready() is False
        with pytest.raises(NotFoundError, match="no model nobody"):
            client.complete("hello", model="nobody")


def test_retries_over_the_socket(address: str) -> None:
    with Client(address, max_retries=1) as client:
        assert client.complete("hello", model="busy").text == " text 0"
    assert Handler.posts == 2


def test_read_timeout_is_not_repeated(address: str) -> None:
    started = time.monotonic()
    with Client(address, timeout_s=0.2, max_retries=3) as client, pytest.raises(RequestTimeoutError):
        client.complete("hello", model="slow")
    assert time.monotonic() - started < SLOW_S
    assert Handler.posts == 1


def test_streams_over_the_socket_use_one_connection(address: str) -> None:
    with Client(address) as client:
        for _ in range(3):
            with client.stream_complete("hello", model="triage", uncertainty=True) as stream:
                assert "".join(chunk.text for chunk in stream) == " héllo"
            assert stream.uncertainty is not None and stream.uncertainty.confidence == 0.83
    assert (Handler.posts, Handler.connections) == (3, 1)


def test_a_stream_left_early_does_not_disturb_the_next(address: str) -> None:
    with Client(address) as client:
        with client.stream_complete("hello", model="triage") as stream:
            assert next(stream).text == " hé"
        assert client.complete("hello", model="triage").text == " text 0"


def test_a_connection_broken_in_the_middle_of_a_stream_is_not_repeated(address: str) -> None:
    with Client(address, max_retries=3) as client, client.stream_complete("hello", model="broken") as stream:
        assert next(stream).text == " hé"
        with pytest.raises(TransportError, match="whether the server did the work is unknown"):
            next(stream)
    assert Handler.posts == 1


def test_nobody_listens() -> None:
    with Client("http://127.0.0.1:1", max_retries=0) as client:
        with pytest.raises(ConnectionFailedError):
            client.complete("hello", model="triage")
        with pytest.raises(ConnectionFailedError):
            client.health()
