"""Administration of adapters: what is sent, what comes back, what is refused."""

from pathlib import Path
from typing import Any

import httpx2
import pytest

from credence.clients import Adapter, ConflictError, InvalidResponseError, PermissionDeniedError, UnprocessableError
from tests.clients.answers import Script, error
from tests.clients.conftest import Connect

ADAPTER: dict[str, Any] = {
    "object": "adapter",
    "name": "triage",
    "state": "ready",
    "reason": None,
    "digest": "sha256:ab",
    "method": "ivon",
    "kind": "diag",
    "alias_of": None,
    "requests_in_flight": 2,
    "tau": 1.5,
    "default_n_samples": 8,
    "max_n_samples": 32,
    "loaded_at": 1764000000.5,
}


def adapter(status: int = 200, **changes: Any) -> httpx2.Response:
    return httpx2.Response(status, json=ADAPTER | changes)


def sent(script: Script) -> tuple[str, str, Any]:
    request = script.requests[-1]
    return request.method, str(request.url).removeprefix("http://server:8000"), script.body if request.content else None


def test_every_method_and_its_request(client: Connect) -> None:
    listed = httpx2.Response(
        200, json={"object": "list", "data": [ADAPTER, ADAPTER | {"name": "x", "state": "failed"}]}
    )
    script = Script(
        listed,
        adapter(),
        adapter(201, state="loading", loaded_at=None),
        adapter(),
        adapter(state="draining"),
        adapter(state="removed"),
        adapter(name="live", alias_of="triage"),
    )
    adapters = client(script, api_key="admin").adapters
    assert [(each.name, each.state) for each in adapters.list()] == [("triage", "ready"), ("x", "failed")]
    assert sent(script) == ("GET", "/admin/v1/adapters", None)
    found = adapters.get("triage")
    assert sent(script) == ("GET", "/admin/v1/adapters/triage", None)
    assert isinstance(found, Adapter) and found.model_dump() == ADAPTER
    assert adapters.load("triage", Path("/artifacts/v2")).loaded_at is None
    body = {"name": "triage", "path": "/artifacts/v2", "replace": False}
    assert sent(script) == ("POST", "/admin/v1/adapters", body)
    adapters.load("triage", "/artifacts/v2", replace=True)
    assert sent(script) == ("POST", "/admin/v1/adapters", body | {"replace": True})
    assert adapters.unload("triage").state == "draining"
    assert sent(script) == ("DELETE", "/admin/v1/adapters/triage?drain_s=30", None)
    assert adapters.unload("a.b_c-1", drain_s=0.5).state == "removed"
    assert sent(script) == ("DELETE", "/admin/v1/adapters/a.b_c-1?drain_s=0.5", None)
    assert adapters.promote("live", "triage").alias_of == "triage"
    assert sent(script) == ("POST", "/admin/v1/adapters/live/promote", {"target": "triage"})
    assert {request.headers["authorization"] for request in script.requests} == {"Bearer admin"}


def test_work_and_draining_are_given_more_time_than_an_answer(client: Connect) -> None:
    script = Script(adapter(), adapter(), adapter())
    adapters = client(script, timeout_s=10).adapters
    adapters.get("triage")
    adapters.load("triage", "/artifacts/v2")
    adapters.unload("triage", drain_s=600)
    read = [request.extensions["timeout"].get("read") for request in script.requests]
    assert read[0] == 10 and read[1] > 60 and read[2] > 600


def test_errors(client: Connect) -> None:
    refused = {"error": {"message": "weights are not finite", "type": "artifact", "code": "not_finite"}}
    script = Script(error(403), error(409), error(422, refused))
    adapters = client(script).adapters
    with pytest.raises(PermissionDeniedError):
        adapters.list()
    with pytest.raises(ConflictError):
        adapters.load("triage", "/artifacts/v2")
    with pytest.raises(UnprocessableError, match="weights are not finite") as caught:
        adapters.load("triage", "/artifacts/v2", replace=True)
    assert caught.value.code == "not_finite"


def test_a_server_without_administration(client: Connect) -> None:
    with pytest.raises(InvalidResponseError, match=r"/admin/v1/adapters is not what .*data: field required"):
        client(Script(httpx2.Response(200, json={}))).adapters.list()


@pytest.mark.parametrize("name", ["", "../keys", "a/b", "Triage", "a" * 65, ".hidden", "a\n", "a?b", "ä"])
def test_names_cannot_leave_their_place(client: Connect, name: str) -> None:
    adapters = client(Script()).adapters
    for ask in (
        lambda: adapters.get(name),
        lambda: adapters.load(name, "/artifacts/v2"),
        lambda: adapters.unload(name),
        lambda: adapters.promote(name, "triage"),
        lambda: adapters.promote("triage", name),
    ):
        with pytest.raises(ValueError, match="is no name of an adapter; give 1 to 64"):
            ask()


@pytest.mark.parametrize("drain_s", [-1, float("nan"), float("inf"), True])
def test_drain_is_a_time(client: Connect, drain_s: float) -> None:
    with pytest.raises(ValueError, match="drain_s is"):
        client(Script()).adapters.unload("triage", drain_s=drain_s)
