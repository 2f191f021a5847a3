"""What docs/client.md says in Python is run, against the real server."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
# The tiny model has other names, and words like w7.
HERE = {'"triage"': '"diag"', '" yes"': '" w7"', '" no"': '" w8"'}


def test_every_example_of_the_client_page_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        if "client.adapters" in block:  # This server has no administrator.
            continue
        for said, here in (HERE | {"http://localhost:8000": server.url}).items():
            block = block.replace(said, here)
        exec(compile(block, str(PAGE), "exec"), names)
    names["client"].close()
    assert "not sure enough:" in capsys.readouterr().out
    assert len(names["answers"]) == len(names["scores"]) == 2
