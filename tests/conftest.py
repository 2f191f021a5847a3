"""Settings for all tests: no network, one thread (several processes share few cores); the servers that several folders share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.servers import artifacts, model_path, server, stock_server

__all__ = ["artifacts", "model_path", "server", "stock_server"]
