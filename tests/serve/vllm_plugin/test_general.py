"""Where our log lines go: to vLLM's handlers, also where vLLM configures them after the plugins were loaded."""

import subprocess
import sys

PROGRAM = """
import logging
from argparse import Namespace
from vllm.logger import configure_logging_from_args
from credence.serve.vllm_plugin import general

general._log_as_vllm_does()
general._log_as_vllm_does()
configure_logging_from_args(Namespace(log_level="INFO"))
logging.getLogger("credence.somewhere").info("ours, once")
logging.getLogger("credence.somewhere").debug("too quiet")
"""


def test_our_lines_go_where_vllms_go_once_and_at_its_level() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert said.count("ours, once") == 1 and " INFO " in said and "too quiet" not in said
