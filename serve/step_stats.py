"""Per-step statistics of one gang, handed from the worker to the API process through a file.

The API process creates the file (in a tmpfs folder of this server), passes its path with the member requests and
unlinks it at the end. The worker opens it and writes one record per decoding step before the token of that step
leaves the engine; so a reader that has seen token t finds record t.

Both sides use positioned reads and writes, never a memory map: a page of a map that cannot be backed (tmpfs full,
file truncated) is a SIGBUS and kills the engine, while a failed write is an OSError of one request. Creation
reserves every block, so a full tmpfs is noticed there, before any work has been done.

Layout: a 32-byte header (with the seconds the gang waited, NaN until they are known), then ``max_steps`` records of
7 + 3 K + 2 M float64: token_id + 1, log_prob, total, aleatoric, epistemic, variation_ratio, calibrated_log_prob, K member
log-probabilities, M most likely token ids + 1, their M log-probabilities, each member's own most likely token id + 1, and the K
log-probabilities that the members give them. A record of zeros is a step that was never written.
"""

import errno
import math
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

MAX_TOP = 1000
"""Largest M: how many of the most likely tokens of a step can be recorded."""

# Magic, num_samples, num_top, max_steps, wait_s.
_HEADER = struct.Struct("<8sIIQd")
_WAIT_OFFSET = 24
_MAGIC = b"CRDSTEP3"
_SCALARS = 7


class StepStatsError(OSError):
    """A statistics file cannot be created, opened, written or read; ``strerror`` says why, ``filename`` is the file.

    ``errno`` is the system's (ENOSPC: tmpfs full), or EBADMSG where the content of the file is wrong.
    """

    def __init__(self, message: str, path: str, cause: OSError | None = None) -> None:
        reason = f"{message} ({cause.strerror})" if cause is not None else message
        super().__init__(errno.EBADMSG if cause is None else cause.errno, reason, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """Records of T consecutive decoding steps under K samples (token level, nats).

    Attributes:
        token_id: [T] int64, the token chosen for the gang; -1 where the step was never written (its other columns are 0, not a score).
        log_prob: [T], log of the averaged probability of that token, at temperature 1.
        total, aleatoric, epistemic: [T], total = aleatoric + epistemic.
        variation_ratio: [T], in [0, 1].
        calibrated_log_prob: [T], log-probability of the token at the calibration's temperature; NaN where there is none.
        member_log_probs: [T, K], log-probability of the token under each sample.
        top_tokens: [T, M] int64, the most likely tokens of the average, most likely first; -1 where the step was never written, or the
            vocabulary has fewer tokens.
        top_log_probs: [T, M], their log-probabilities under the average, at temperature 1.
        member_tokens: [T, K] int64, the most likely token of each sample; -1 where it was not recorded.
        member_token_log_probs: [T, K], its log-probability under that sample.
    """

    token_id: NDArray[np.int64]
    log_prob: NDArray[np.float64]
    total: NDArray[np.float64]
    aleatoric: NDArray[np.float64]
    epistemic: NDArray[np.float64]
    variation_ratio: NDArray[np.float64]
    calibrated_log_prob: NDArray[np.float64]
    member_log_probs: NDArray[np.float64]
    top_tokens: NDArray[np.int64]
    top_log_probs: NDArray[np.float64]
    member_tokens: NDArray[np.int64]
    member_token_log_probs: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.token_id)

    @property
    def missing(self) -> NDArray[np.int64]:
        """Positions in this table of the steps that were never written (the gang was not averaged there)."""
        return np.flatnonzero(self.token_id < 0)


class StepStats:
    """One gang's statistics file, held open. Use ``create`` (API process) or ``open`` (worker), and ``close`` or a ``with`` block."""

    def __init__(self, path: str, descriptor: int, num_samples: int, max_steps: int, num_top: int) -> None:
        self.path = path
        self.num_samples = num_samples
        self.max_steps = max_steps
        self.num_top = num_top
        self._descriptor: int | None = descriptor
        self._record = struct.Struct(f"<{_SCALARS + 3 * num_samples + 2 * num_top}d")

    @classmethod
    def create(cls, path: str | Path, num_samples: int, max_steps: int, num_top: int = 0) -> Self:
        """Creates the file (it must not exist), readable by this user only, with all its blocks reserved.

        Args:
            num_samples: K >= 1.
            max_steps: largest number of output tokens of the gang, or its number of targets, >= 1. The file has 8 (7 + 3 K + 2 M) bytes
                a step.
            num_top: M, 0..1000: how many of the most likely tokens each record has.

        Raises:
            ValueError: if a number is out of its range.
            StepStatsError: if the file exists or cannot be created or reserved (folder missing, tmpfs full); nothing is left behind.
        """
        if num_samples < 1 or max_steps < 1:
            raise ValueError(f"num_samples and max_steps must be at least 1, got {num_samples} and {max_steps}")
        if not 0 <= num_top <= MAX_TOP:
            raise ValueError(f"num_top must be in 0..{MAX_TOP}, got {num_top}")
        name = os.fspath(path)
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StepStatsError("cannot create the statistics file", name, error) from error
        try:
            os.posix_fallocate(descriptor, 0, _size(num_samples, max_steps, num_top))
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, num_samples, num_top, max_steps, math.nan), 0)
        except OSError as error:
            os.close(descriptor)
            os.unlink(name)
            size = _size(num_samples, max_steps, num_top)
            raise StepStatsError(f"cannot reserve {size} bytes for the statistics file", name, error) from error
        return cls(name, descriptor, num_samples, max_steps, num_top)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens an existing file for reading and writing.

        Raises:
            StepStatsError: if it is not there, or is not a complete statistics file.
        """
        name = os.fspath(path)
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise StepStatsError("cannot open the statistics file", name, error) from error
        try:
            status = os.fstat(descriptor)
            header = os.pread(descriptor, _HEADER.size, 0) if stat.S_ISREG(status.st_mode) else b""
            if len(header) != _HEADER.size:
                raise StepStatsError("not a statistics file", name)
            magic, num_samples, num_top, max_steps, _ = _HEADER.unpack(header)
            if magic != _MAGIC or num_samples < 1 or status.st_size != _size(num_samples, max_steps, num_top):
                raise StepStatsError("not a complete statistics file of this version", name)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(name, descriptor, num_samples, max_steps, num_top)

    def write(
        self,
        step: int,
        token_id: int,
        log_prob: float,
        total: float,
        aleatoric: float,
        epistemic: float,
        variation_ratio: float,
        member_log_probs: Sequence[float],
        calibrated_log_prob: float = math.nan,
        top_tokens: Sequence[int] = (),
        top_log_probs: Sequence[float] = (),
        member_tokens: Sequence[float] = (),
        member_token_log_probs: Sequence[float] = (),
    ) -> None:
        """Writes the record of one step; writing it again replaces it. The arguments are the columns of StepTable.

        The members' own tokens may be left out.

        Raises:
            ValueError: if the step is outside 0..max_steps - 1, the token is negative, or there are not K member values or M top values.
            StepStatsError: if the write fails.
        """
        if not 0 <= step < self.max_steps:
            raise ValueError(f"step {step} is outside the 0..{self.max_steps - 1} of {self.path}")
        if token_id < 0 or len(member_log_probs) != self.num_samples:
            raise ValueError(
                f"a record needs a token id >= 0 and {self.num_samples} member values, got {token_id} and {len(member_log_probs)}"
            )
        if len(top_tokens) != self.num_top or len(top_log_probs) != self.num_top:
            raise ValueError(
                f"a record of {self.path} needs {self.num_top} top tokens and log-probabilities, "
                f"got {len(top_tokens)} and {len(top_log_probs)}"
            )
        favourites = [token + 1 for token in member_tokens] or [0.0] * self.num_samples
        theirs = list(map(float, member_token_log_probs)) or [0.0] * self.num_samples
        if len(favourites) != self.num_samples or len(theirs) != self.num_samples:
            raise ValueError(
                f"a record of {self.path} needs {self.num_samples} member tokens and log-probabilities or none, "
                f"got {len(member_tokens)} and {len(member_token_log_probs)}"
            )
        scalars = (token_id + 1, log_prob, total, aleatoric, epistemic, variation_ratio, calibrated_log_prob)
        record = self._record.pack(
            *scalars,
            *map(float, member_log_probs),
            *(token + 1 for token in top_tokens),
            *map(float, top_log_probs),
            *favourites,
            *theirs,
        )
        self._write(record, _HEADER.size + step * self._record.size, f"step {step}")

    def read(self, num_steps: int, start: int = 0) -> StepTable:
        """Reads the records start..num_steps - 1.

        Raises:
            ValueError: if the range is not within 0..max_steps.
            StepStatsError: if the file is shorter than it was, or cannot be read.
        """
        if not 0 <= start <= num_steps <= self.max_steps:
            raise ValueError(f"steps {start}..{num_steps} are not within the 0..{self.max_steps} of {self.path}")
        size = (num_steps - start) * self._record.size
        data = bytearray()
        descriptor = self._open_descriptor()
        while len(data) < size:
            offset = _HEADER.size + start * self._record.size + len(data)
            try:
                part = os.pread(descriptor, size - len(data), offset)
            except OSError as error:
                raise StepStatsError("cannot read the statistics file", self.path, error) from error
            if not part:
                raise StepStatsError("the statistics file has been truncated", self.path)
            data += part
        rows = np.frombuffer(data, dtype="<f8").reshape(num_steps - start, self._record.size // 8)
        first_top = _SCALARS + self.num_samples
        after_top = first_top + 2 * self.num_top
        return StepTable(
            token_id=rows[:, 0].astype(np.int64) - 1,
            log_prob=rows[:, 1],
            total=rows[:, 2],
            aleatoric=rows[:, 3],
            epistemic=rows[:, 4],
            variation_ratio=rows[:, 5],
            calibrated_log_prob=rows[:, 6],
            member_log_probs=rows[:, _SCALARS:first_top],
            top_tokens=rows[:, first_top : first_top + self.num_top].astype(np.int64) - 1,
            top_log_probs=rows[:, first_top + self.num_top : after_top],
            member_tokens=rows[:, after_top : after_top + self.num_samples].astype(np.int64) - 1,
            member_token_log_probs=rows[:, after_top + self.num_samples :],
        )

    def write_wait(self, seconds: float) -> None:
        """Writes how long the gang waited from the arrival of its last member until its members ran together, in seconds.

        Raises:
            StepStatsError: if the write fails.
        """
        self._write(struct.pack("<d", seconds), _WAIT_OFFSET, "the waiting time")

    def read_wait(self) -> float | None:
        """Returns the seconds of ``write_wait``; None if they have not been written.

        Raises:
            StepStatsError: if the file is shorter than it was, or cannot be read.
        """
        descriptor = self._open_descriptor()
        try:
            data = os.pread(descriptor, 8, _WAIT_OFFSET)
        except OSError as error:
            raise StepStatsError("cannot read the statistics file", self.path, error) from error
        if len(data) != 8:
            raise StepStatsError("the statistics file has been truncated", self.path)
        seconds: float = struct.unpack("<d", data)[0]
        return None if math.isnan(seconds) else seconds

    def close(self) -> None:
        """Closes the descriptor; the file stays. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def unlink(self) -> None:
        """Closes and removes the file; a file that is already gone is fine."""
        self.close()
        Path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes, offset: int, what: str) -> None:
        descriptor = self._open_descriptor()
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            raise StepStatsError(f"cannot write {what}", self.path, error) from error
        if written != len(data):
            raise StepStatsError(f"cannot write {what} (only {written} of {len(data)} bytes)", self.path)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise StepStatsError("the statistics file has been closed", self.path)
        return self._descriptor


def _size(num_samples: int, max_steps: int, num_top: int) -> int:
    """Size of a file in bytes."""
    return _HEADER.size + 8 * (_SCALARS + 3 * num_samples + 2 * num_top) * max_steps
