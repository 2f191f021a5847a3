"""The audit log: who asked which adapter for what, and how sure it was. JSON Lines; never a prompt, an answer or a key.

One line for each request with uncertainty and each call of /admin, refused ones too. Lines are written in order by a thread of their own,
so a slow disk delays nobody. If a line cannot be written the request is served all the same: the loss is counted, and told once a minute.
"""

import atexit
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from credence.serve.errors import ConfigurationError
from credence.serve.facts import RequestFacts
from credence.serve.routes import Route

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Lines that may wait for the disk; more are lost, and counted."""
COMPLAIN_EVERY_S = 60.0


class AuditLog:
    """An append-only file. It may be moved away at any time (logrotate): the next line opens a new one.

    Args:
        path: the file; its folder must exist.
        failed: called for each line that is lost.

    Raises (constructor):
        ConfigurationError: the file cannot be opened.
    """

    def __init__(self, path: Path, failed: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._failed = failed
        self._complained_s = -COMPLAIN_EVERY_S
        self._torn = False
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigurationError(f"--audit-log {path} cannot be opened: {error.strerror}") from error
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="credence-audit", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, record: dict[str, Any]) -> None:
        """Hands over one line; never waits and never raises."""
        try:
            self._lines.put_nowait(json.dumps(record, allow_nan=False).encode() + b"\n")
        except (queue.Full, ValueError) as error:
            self._lost(error)

    def close(self) -> None:
        """Writes what waits, for at most 5 s."""
        atexit.unregister(self.close)
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(timeout=5)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
            except OSError as error:
                self._lost(error)
        os.close(self._file)

    def _append(self, line: bytes) -> None:
        """Writes one line. What is left of one that was cut off by a full disk is ended first, so that only that line is lost."""
        here = os.fstat(self._file)
        try:
            there = os.stat(self._path)
            moved = (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)
        except FileNotFoundError:
            moved = True
        if moved:
            new = self._open()
            os.close(self._file)
            self._file, self._torn = new, False
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._torn = written < len(data)
        if self._torn:
            raise OSError("only a part of a line was written")

    def _lost(self, error: Exception) -> None:
        self._failed()
        now = time.monotonic()
        if now - self._complained_s >= COMPLAIN_EVERY_S:
            self._complained_s = now
            logger.error("Lines of the audit log %s are lost: %s", self._path, error)


def record_of(facts: RequestFacts, route: Route) -> dict[str, Any]:
    """The line of a request that has ended. Every text in it is of a closed set, of the key file, or was checked to be a name."""
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": facts.request_id,
        "key": facts.key,
        "method": facts.method,
        "route": route.path,
        "status": facts.status,
        "reason": facts.reason,
        "model": facts.model,
        "seconds": round(time.perf_counter() - facts.started_s, 6),
    }
    if facts.mode == "mean":
        return record
    record |= {"mode": facts.mode, "n_samples_asked": facts.n_samples_asked}
    if facts.uncertainties:
        first = facts.uncertainties[0]
        record |= {
            "adapter": first.adapter.name,
            "digest": first.adapter.digest,
            "n_samples": first.n_samples,
            "n_effective": first.n_effective,
            "tau": first.tau,
            "seed": first.seed,
            "answers": [
                {
                    "confidence": answer.confidence,
                    "total": answer.total,
                    "aleatoric": answer.aleatoric,
                    "epistemic": answer.epistemic,
                    "unit": answer.unit,
                    "flag": answer.flag,
                }
                for answer in facts.uncertainties
            ],
        }
    record["usage"] = {
        "sample_prompt_tokens": facts.sample_prompt_tokens,
        "sample_completion_tokens": facts.sample_completion_tokens,
    }
    return record
