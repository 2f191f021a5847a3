import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.cli.conftest import Command
from tests.clients.answers import Script, error, serve
from tests.clients.test_admin import ADAPTER, adapter, sent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Script:
    return serve(monkeypatch)


def test_all_adapters_in_a_table(credence: Command, server: Script) -> None:
    failed = ADAPTER | {"name": "new", "state": "failed", "reason": "not_finite", "digest": None, "method": None}
    alias = ADAPTER | {"name": "live", "alias_of": "triage"}
    answer = httpx2.Response(200, json={"object": "list", "data": [ADAPTER, failed, alias]})
    server.steps += [answer, answer]
    outcome = credence("adapters", "list")
    assert (outcome.code, outcome.err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert cells == [
        ["triage", "ready", "2", "ivon", "", "ab", ""],
        ["new", "failed", "2", "", "", "", "not_finite"],
        ["live", "ready", "2", "ivon", "triage", "ab", ""],
    ]
    document = json.loads(credence("adapters", "list", "--json", "-").out)
    assert [each["name"] for each in document["adapters"]] == ["triage", "new", "live"]


@pytest.mark.parametrize(
    ("arguments", "request_sent"),
    [
        (("show", "triage"), ("GET", "/admin/v1/adapters/triage", None)),
        (
            ("load", "triage", "/a/v2"),
            ("POST", "/admin/v1/adapters", {"name": "triage", "path": "/a/v2", "replace": False}),
        ),
        (
            ("load", "triage", "/a/v2", "--replace"),
            ("POST", "/admin/v1/adapters", {"name": "triage", "path": "/a/v2", "replace": True}),
        ),
        (("unload", "triage"), ("DELETE", "/admin/v1/adapters/triage?drain_s=30", None)),
        (("unload", "triage", "--drain", "5"), ("DELETE", "/admin/v1/adapters/triage?drain_s=5", None)),
        (("promote", "live", "triage"), ("POST", "/admin/v1/adapters/live/promote", {"target": "triage"})),
    ],
)
def test_every_command_and_its_request(
    credence: Command, server: Script, tmp_path: Path, arguments: tuple[str, ...], request_sent: tuple[str, str, Any]
) -> None:
    key = tmp_path / "key"
    key.write_text("admin-1\n")
    server.steps += [adapter(), adapter()]
    outcome = credence("adapters", *arguments, "--url", "http://server:8000", "--api-key-file", key)
    assert (outcome.code, outcome.err) == (0, "")
    assert sent(server) == request_sent
    assert server.requests[-1].headers["authorization"] == "Bearer admin-1"
    shown = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert (shown["name"], shown["state"], shown["requests_in_flight"]) == ("triage", "ready", "2")
    assert shown["loaded_at"].startswith("2025-11-2") and "reason" not in shown
    assert json.loads(credence("adapters", *arguments, "--json", "-").out) == ADAPTER


def test_refusals_are_one_sentence(credence: Command, server: Script) -> None:
    server.steps.append(error(422, {"error": {"message": "the weights are not finite", "code": "not_finite"}}))
    outcome = credence("adapters", "load", "triage", "/a/v2")
    assert (outcome.code, outcome.out) == (1, "") and "the weights are not finite (status 422" in outcome.err
    outcome = credence("adapters", "show", "../keys")
    assert outcome.code == 2 and "is no name of an adapter" in outcome.err
    assert len(server.requests) == 1
