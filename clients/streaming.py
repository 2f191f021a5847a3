"""Answers that arrive in pieces: server-sent events decoded from bytes, and iterators of typed chunks over them."""

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx2

from credence.clients.calls import Call
from credence.clients.errors import TransportError, UncertaintyMissingError, error_from_event
from credence.clients.types import Chunk, Increment, Uncertainty, Usage

_END = b"[DONE]"

ChunkT = TypeVar("ChunkT", bound=Chunk[Any])
_IncrementT = TypeVar("_IncrementT", bound=Increment)


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


class _Chunks(Generic[ChunkT]):
    """What is known about a stream, and how parts of its body become chunks.

    Attributes:
        request_id: Id of the request in the server's log.
        uncertainties: Uncertainty by index of the choice, as far as it has arrived.
        usage: Token counts, once they have arrived.
    """

    def __init__(self, call: Call[ChunkT], response: httpx2.Response) -> None:
        self._call = call
        self._response = response
        self._reply = call.reply(response)
        self._decoder = EventDecoder()
        self._ended = False
        self._num_tokens: dict[int, int] = {}
        self.request_id = self._reply.request_id
        self.uncertainties: dict[int, Uncertainty] = {}
        self.usage: Usage | None = None

    @property
    def uncertainty(self) -> Uncertainty | None:
        """Uncertainty of the first choice; None while it has not arrived, or when it was not asked for."""
        return self.uncertainties.get(0)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Around the reading of the whole body. What breaks after the end mark no longer matters."""
        try:
            with self._call.translated():
                yield
        except TransportError:
            if not self._ended:
                raise
        if not self._ended:
            raise self._call.broken("the stream ended early")

    def _feed(self, part: bytes) -> Iterator[ChunkT]:
        """Yield the chunks that are complete with this part. What follows the end mark, the end of the body, is passed over."""
        for event in self._decoder.feed(self._call.in_time(part)):
            if self._ended:
                return
            if event == _END:
                self._ended = True
                self._check_uncertainty()
                return
            error = error_from_event(event, request_id=self.request_id)
            if error is not None:
                raise error
            yield self._noted(self._call.question.read(self._reply, event))

    def _noted(self, chunk: ChunkT) -> ChunkT:
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
        if self._call.question.uncertainty and missing:
            raise UncertaintyMissingError.of_choices(missing, request_id=self.request_id)


class Stream(_Chunks[ChunkT]):
    """The chunks of one answer, as they arrive.

    Use it as a context manager, or call `close`, unless it is read to its end: leaving it early closes the connection, and
    the server stops working on the answer. What ends it other than the server's own end mark is raised by the iteration:
    TransportError where the connection broke or the deadline passed (nothing is ever repeated), the StatusError that the
    server reports, UncertaintyMissingError where a choice ended without the uncertainty that was asked for.
    `request_id`, `usage`, `uncertainty` (of the first choice) and `uncertainties` (by index) are filled in as they arrive.
    """

    def __init__(self, call: Call[ChunkT], response: httpx2.Response) -> None:
        """Take over an answer whose body is not read yet; it is closed with the stream."""
        super().__init__(call, response)
        self._chunks = self._read()

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

    def __next__(self) -> ChunkT:
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
        self._response.close()

    def _read(self) -> Generator[ChunkT, None, None]:
        with self._reading():
            for part in self._response.iter_bytes():
                yield from self._feed(part)


class AsyncStream(_Chunks[ChunkT]):
    """`Stream` for `async with` and `async for`; cancelling the task that reads it closes the connection, too."""

    def __init__(self, call: Call[ChunkT], response: httpx2.Response) -> None:
        """Take over an answer whose body is not read yet; it is closed with the stream."""
        super().__init__(call, response)
        self._chunks = self._read()

    async def __aenter__(self) -> Self:
        """Return the stream."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        await self.close()

    def __aiter__(self) -> Self:
        """Return the stream itself: it can be read once."""
        return self

    async def __anext__(self) -> ChunkT:
        """Wait for the next chunk; raises StopAsyncIteration at the end, and what `Stream` raises."""
        try:
            return await anext(self._chunks)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connection; harmless when repeated."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def _read(self) -> AsyncGenerator[ChunkT, None]:
        with self._reading():
            async for part in self._response.aiter_bytes():
                for chunk in self._feed(part):
                    yield chunk
