"""`credence serve` as a child process: started, waited for, and always stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from credence.clients import Client, CredenceError

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.25
LOG_TAIL_LINES = 15
# What a small model on CPU wants; what the caller has set already stays.
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class DemoError(Exception):
    """The demo cannot go on; the message says why, in words for the person who started it."""


def credence_command() -> str:
    """The `credence` program of the running Python environment."""
    return str(Path(sys.executable).with_name("credence"))


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log file, or a remark that there are none."""
    text = path.read_text(errors="replace").rstrip() if path.is_file() else ""
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"


class Server:
    """A server in its own process group; leaving the `with` block stops it, whatever happened inside.

    Args:
        command: program and arguments; must serve at `url`.
        url: address of the server.
        log: file that receives everything the server prints.
    """

    def __init__(self, command: Sequence[str], *, url: str, log: Path) -> None:
        self.command, self.url, self.log = list(command), url, log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**ENVIRONMENT, **os.environ},
                start_new_session=True,
            )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Does nothing while the process lives.

        Raises:
            DemoError: it has ended; the message holds the end of its log.
        """
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            raise DemoError(
                f"the server ended with exit code {code}; the end of its log ({self.log}) is:\n{tail(self.log)}"
            )

    def wait_ready(self, client: Client, *, timeout_s: float = READY_TIMEOUT_S, waiting: Callable[[], None]) -> None:
        """Waits until the server takes requests; calls `waiting` at every look.

        Raises:
            DemoError: the server ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            try:
                if client.ready():
                    return
            except CredenceError:
                pass  # not listening yet
            waiting()
            time.sleep(POLL_S)
        raise DemoError(
            f"the server was not ready within {timeout_s:g} s; the end of its log ({self.log}) is:\n{tail(self.log)}"
        )

    def stop(self) -> None:
        """Asks the process to end, and kills its whole group if it does not in time."""
        process = self._process
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C, and for what a server that is gone may have left behind
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
