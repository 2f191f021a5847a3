"""Answers that arrive in pieces: server-sent events decoded from bytes, and an iterator of typed chunks over them."""

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from credence.clients.errors import CredenceError, TransportError, UncertaintyMissingError, error_from_event
from credence.clients.transport import Reply, Transport
from credence.clients.types import (
    ChatChoiceIncrement,
    ChatCompletionChunk,
    ChoiceIncrement,
    CompletionChunk,
    Uncertainty,
    Usage,
)

_END = b"[DONE]"

_ChunkT = TypeVar("_ChunkT", CompletionChunk, ChatCompletionChunk)
_IncrementT = TypeVar("_IncrementT", ChoiceIncrement, ChatChoiceIncrement)


class EventDecoder:
    """Cuts a stream of bytes, split anywhere, into the data of server-sent events (WHATWG HTML, section 9.2.6).

    Lines end with LF, CR LF or CR and with nothing else: a text may hold U+2028 and its kind as they are, which Python's own
    line splitting of strings would cut. Fields other than `data`, and comments, are passed over.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Take the next bytes and yield the data of every event that is now complete, without its field name."""
        for line in self._lines(part):
            if line:
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value.removeprefix(b" "))
            elif self._data:
                yield b"\n".join(self._data)
                self._data.clear()

    def _lines(self, part: bytes) -> Iterator[bytes]:
        if not part:
            return
        if self._after_cr:
            # The second half of a CR LF that was split.
            part = part.removeprefix(b"\n")
        self._after_cr = part.endswith(b"\r")
        for line in part.splitlines(keepends=True):
            self._line += line
            if line.endswith((b"\n", b"\r")):
                yield bytes(self._line.rstrip(b"\r\n"))
                self._line.clear()


class Stream(Generic[_ChunkT]):
    """The chunks of one answer, as they arrive.

    Use it as a context manager, or call `close`, unless it is read to its end: leaving it early closes the connection, and
    the server stops working on the answer. What ends it other than the server's own end mark is raised by the iteration:
    TransportError where the connection broke (nothing is ever repeated), the StatusError that the server reports,
    UncertaintyMissingError where a choice ended without the uncertainty that was asked for.

    Attributes:
        request_id: Id of the request in the server's log.
        uncertainties: Uncertainty by index of the choice, as far as it has arrived.
        usage: Token counts, once they have arrived.
    """

    def __init__(
        self,
        reply: Reply,
        chunk: type[_ChunkT],
        *,
        transport: Transport,
        uncertainty: bool,
    ) -> None:
        """Take over an answer whose body is not read yet.

        Args:
            reply: The answer; it is closed with the stream.
            chunk: Type of the chunks.
            transport: What the answer came through.
            uncertainty: Whether uncertainty was asked for.

        Raises:
            InvalidResponseError: The answer is no stream of events.
        """
        self.request_id = reply.request_id
        self.uncertainties: dict[int, Uncertainty] = {}
        self.usage: Usage | None = None
        self._reply = reply
        self._chunk: type[_ChunkT] = chunk
        self._transport = transport
        self._uncertainty = uncertainty
        self._num_tokens: dict[int, int] = {}
        self._chunks: Generator[_ChunkT, None, None] = self._read()
        kind = reply.response.headers.get("content-type", "nothing named")
        if not kind.startswith("text/event-stream"):
            self.close()
            raise reply.invalid(f"the body is {kind}, not text/event-stream")

    @property
    def uncertainty(self) -> Uncertainty | None:
        """Uncertainty of the first choice; None while it has not arrived, or when it was not asked for."""
        return self.uncertainties.get(0)

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()

    def __iter__(self) -> Self:
        """Return the stream itself: it can be read once."""
        return self

    def __next__(self) -> _ChunkT:
        """Wait for the next chunk.

        Raises:
            StopIteration: The answer is complete, or the stream is closed.
            CredenceError: See the class.
        """
        try:
            return next(self._chunks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; harmless when repeated."""
        self._chunks.close()
        self._reply.response.close()

    def _read(self) -> Generator[_ChunkT, None, None]:
        events = self._events()
        for event in events:
            if event == _END:
                self._check_uncertainty()
                self._drain(events)
                return
            error = error_from_event(event, request_id=self.request_id)
            if error is not None:
                raise error
            yield self._noted(self._reply.parsed(self._chunk, event))
        raise TransportError(
            f"the stream from {self._transport.base_url} ended before the answer was complete; "
            "whether the server did the work is unknown",
            request_id=self.request_id,
        )

    def _events(self) -> Iterator[bytes]:
        decoder = EventDecoder()
        response = self._reply.response
        with self._transport.translated(response.request.url.path, self.request_id):
            for part in response.iter_bytes():
                yield from decoder.feed(part)

    @staticmethod
    def _drain(events: Iterator[bytes]) -> None:
        """Read what follows the end mark, nothing but the end of the body, so that the connection can be used again."""
        try:
            for _ in events:
                pass
        except CredenceError:
            pass  # the answer is complete, and a broken connection is not used again

    def _noted(self, chunk: _ChunkT) -> _ChunkT:
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return chunk
        return chunk.model_copy(update={"choices": tuple(self._with_new_tokens(choice) for choice in chunk.choices)})

    def _with_new_tokens(self, choice: _IncrementT) -> _IncrementT:
        """Note a choice's scores. The whole object lists all its tokens; those not seen in a chunk before are this chunk's own."""
        seen = self._num_tokens.setdefault(choice.index, 0)
        if choice.uncertainty is not None:
            self.uncertainties[choice.index] = choice.uncertainty
            if choice.uncertainty.tokens is not None:
                choice = choice.model_copy(update={"tokens": choice.uncertainty.tokens[seen:]})
        self._num_tokens[choice.index] = seen + len(choice.tokens)
        return choice

    def _check_uncertainty(self) -> None:
        missing = tuple(sorted((self._num_tokens.keys() or {0}) - self.uncertainties.keys()))
        if self._uncertainty and missing:
            raise UncertaintyMissingError.of_choices(missing, request_id=self.request_id)
