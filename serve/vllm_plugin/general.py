"""Entry point ``vllm.general_plugins``: runs in the API, engine and worker processes before the engine is built."""

import logging
import os

from vllm.platforms import current_platform

from credence.serve.vllm_plugin import cpu_lora, scoring, worker


def register() -> None:
    """Installs the worker's draws and scoring, and on CPU the corrected LoRA product. May run several times in a process."""
    _log_as_vllm_does()
    worker.install()
    scoring.install()
    if current_platform.is_cpu():
        cpu_lora.install()
        if os.environ.get("CREDENCE_FORK_ENGINE"):
            _fork_engine()


class _AsVllm(logging.Handler):
    """Hands our records to vLLM's logger, whenever that is configured: it is not yet when the plugins are loaded."""

    def emit(self, record: logging.LogRecord) -> None:
        """Logs the record as vLLM would."""
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _log_as_vllm_does() -> None:
    """Sends our log lines where vLLM's go; it configures its own logger alone, and ours would be lost."""
    ours = logging.getLogger("credence")
    if not ours.handlers:
        ours.addHandler(_AsVllm())
        ours.propagate = False
        ours.setLevel(logging.DEBUG)  # vLLM's level decides


def _fork_engine() -> None:
    """Forks the engine process instead of spawning it, which saves a second import of vLLM; for tests and the demo.

    The CPU platform forces spawn while it checks the configuration; this sets fork back right after.
    """
    platform = type(current_platform)
    if getattr(platform, "_credence_fork", False):
        return
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: object) -> None:
        original(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform._credence_fork = True
