"""The real server with key files, vLLM's own key, an audit log and a further route: what is behind the door, and what is not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from credence.adapters import Artifact
from credence.serve.keys import KeyRecord, KeyTable, hash_of, write_table
from credence.serve.routes import Access, find
from tests.serve.test_security import PATH_TRICKS
from tests.servers import ENVIRONMENT, Server, credence_command, start

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ALICE, BOB, CAROL, VLLM, ADMIN = (f"credence-test-{name}" for name in ("alice", "bob", "carol", "vllm", "admin"))
EXTRA = "/load"
BLOCK = 32
MARK = "w77 w99 w55 w33"
"""Words that stand in prompts alone."""


@dataclass
class Secured:
    """The server and its files."""

    server: Server
    keys: Path
    audit: Path
    records: tuple[KeyRecord, ...]

    def ask(self, token: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        """One request with a key."""
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return self.server.client.request(method, path, headers=headers, **options)

    def complete(self, token: str, **body: Any) -> httpx.Response:
        """POST /v1/completions for the adapter diag."""
        return self.ask(token, "POST", "/v1/completions", json={"model": "diag", "max_tokens": 2, **body})


@pytest.fixture(scope="module")
def secured(
    model_path: Path, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    records = (
        KeyRecord(
            name="alice", hash=hash_of(ALICE), adapters=("diag", "row"), max_samples=4, sample_tokens_per_minute=10**6
        ),
        KeyRecord(name="bob", hash=hash_of(BOB), tenant="acme", return_samples=True),
        KeyRecord(name="carol", hash=hash_of(CAROL), tenant="acme"),
    )
    keys, admin, audit = folder / "keys.yaml", folder / "admin", folder / "audit.jsonl"
    write_table(keys, KeyTable(keys=records))
    admin.write_text(ADMIN)
    admin.chmod(0o600)
    command = credence_command(
        model_path, {name: artifact.path for name, artifact in artifacts.items()}, "--api-key-file", str(keys), "--admin-key-file",
        str(admin), "--audit-log", str(audit), "--extra-route", EXTRA, "--api-key", VLLM,
    )  # fmt: skip
    running = start(command, folder / "log", "/readyz")
    yield Secured(running, keys, audit, records)
    running.stop()


@pytest.fixture(scope="module")
def registered() -> list[tuple[str, str]]:
    """(path, method) of every route that vLLM's own application has; in a process of its own, since importing vLLM leaves traces."""
    program = """
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",), None)
print()
for route in app.routes:
    for method in getattr(route, "methods", None) or ["GET"]:
        print("ROUTE", route.path, method)
"""
    environment = {**os.environ, **ENVIRONMENT, "VLLM_PLUGINS": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    routes = [tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("ROUTE ")]
    assert ("/invocations", "POST") in routes and len(routes) > 20, done.stderr[-2000:]
    return routes  # type: ignore[return-value]


def test_every_route_that_vllm_registers_is_guarded_or_does_not_exist(
    secured: Secured, registered: list[tuple[str, str]]
) -> None:
    others = ["/pause", "/resume", "/sleep", "/v1/load_lora_adapter", "/collective_rpc", "/server_info", "/reset_prefix_cache",
              "/start_profile", "/v1/embeddings", "/rerank", "/v1/realtime"]  # fmt: skip
    more = [(path, method) for path in others for method in ("GET", "POST")]
    seen = set()
    for template, method in [*registered, *more]:
        path = re.sub(r"\{\w+\}", "x", template)
        route = find(path)
        body = {"json": {"model": "diag"}} if method == "POST" else {}
        statuses = [secured.ask(token, method, path, **body).status_code for token in (None, "wrong", ADMIN)]
        if path == EXTRA:
            assert statuses == [401, 401, 403], path
        elif route is None:
            assert statuses == [404, 404, 404], path
            assert secured.ask(BOB, method, path, **body).status_code == 404, path
        elif route.access is Access.USER:
            assert statuses == [401, 401, 403], path
        else:
            assert route.access is Access.OPEN and statuses[0] < 500 and statuses[0] not in (401, 403), path
        seen.add(route.access if route else None)
    assert seen == {None, Access.USER, Access.OPEN}


def test_admin_routes_know_the_admin_key_only(secured: Secured) -> None:
    for method, path in (
        ("GET", "/admin/v1/adapters"),
        ("DELETE", "/admin/v1/adapters/diag"),
        ("POST", "/admin/v1/adapters/diag/promote"),
    ):
        body = {"json": {}} if method == "POST" else {}
        statuses = [secured.ask(token, method, path, **body).status_code for token in (None, ALICE, BOB, VLLM)]
        assert statuses == [401, 403, 403, 403]
    assert secured.ask(ADMIN, "GET", "/admin/v1/adapters").status_code not in (401, 403)
    assert secured.ask(ADMIN, "GET", "/v1/models").status_code == 403


@pytest.mark.parametrize("token", [BOB, VLLM])
def test_vllms_own_key_and_ours_open_the_same_routes(secured: Secured, token: str) -> None:
    assert secured.ask(token, "GET", "/v1/models").status_code == 200
    assert secured.ask(token, "POST", "/tokenize", json={"model": "base", "prompt": "w1"}).status_code == 200
    assert secured.complete(token, prompt="w1 w2").status_code == 200
    assert secured.complete(token, prompt="w1 w2", uncertainty={"n_samples": 2}).status_code == 200
    assert secured.ask(token, "GET", EXTRA).status_code == 200


def raw(server: Server, request: bytes) -> int:
    """Status of a request that is sent as it is; 0 if the connection was closed without an answer."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request)
        answer = connection.recv(4096)
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PURGE"])
def test_path_tricks_on_the_wire(secured: Secured, method: str) -> None:
    body = b'{"model":"diag","prompt":"w1"}'
    tail = (
        b" HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        + body
    )
    tricks = [path.encode() for path in PATH_TRICKS if path]
    tricks += [
        b"/pause?x=/v1/models",
        b"/pause#/health",
        b"/pause%3F/health",
        b"/pause%23",
        b"http://x/pause",
        b"http:/pause",
    ]
    for path in tricks:
        for host in (b"localhost", b"localhost/v1/models", b"evil@localhost"):
            status = raw(secured.server, method.encode() + b" " + path + tail % (host, len(body)))
            # An absolute-form target is taken for its path, and needs a key like that path. A browser's question (OPTIONS) does nothing.
            allowed = (400, 401, 404, 405) if method != "OPTIONS" else (200, 400, 404, 405)
            assert status in allowed, (path, host, status)


def test_a_key_sees_its_models_alone(secured: Secured) -> None:
    def names(token: str) -> list[str]:
        return sorted(card["id"] for card in secured.ask(token, "GET", "/v1/models").json()["data"])

    assert names(ALICE) == ["diag", "row"]
    assert names(BOB) == ["base", "diag", "point", "row"]
    for extra in ({}, {"uncertainty": True}):
        hidden = secured.complete(ALICE, **{"model": "point", "prompt": "w1", **extra})
        absent = secured.complete(ALICE, **{"model": "nothing", "prompt": "w1", **extra})
        assert hidden.status_code == absent.status_code == 404
        assert hidden.text.replace("point", "nothing") == absent.text


def test_a_keys_largest_k_bounds_the_defaults(secured: Secured) -> None:
    answer = secured.complete(ALICE, prompt="w1 w2", uncertainty=True).json()["choices"][0]["uncertainty"]
    assert answer["n_samples"] == 4
    assert secured.complete(BOB, prompt="w1 w2", uncertainty=True).json()["choices"][0]["uncertainty"]["n_samples"] == 8
    auto = {"n_samples": "auto", "mode": "choices", "choices": [" w3", " w4"], "stop_confidence": 0.999}
    assert (
        secured.complete(ALICE, prompt="w1 w2", uncertainty=auto).json()["choices"][0]["uncertainty"]["n_samples"] == 4
    )
    refused = secured.complete(ALICE, prompt="w1 w2", uncertainty={"n_samples": 5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "uncertainty.n_samples")


def _prompt(start: int) -> list[int]:
    """A prompt of three full cache blocks that no other test sends."""
    return [3 + (start * 31 + 7 * step * step) % 120 for step in range(3 * BLOCK + 1)]


def _text(ids: list[int]) -> str:
    """The words of these tokens."""
    return " ".join(f"w{token - 3}" for token in ids)


WAYS: dict[str, Callable[[list[int]], tuple[str, dict[str, Any]]]] = {
    "plain": lambda ids: ("/v1/completions", {"prompt": ids, "max_tokens": 1}),
    "chat": lambda ids: ("/v1/chat/completions", {"messages": [{"role": "user", "content": _text(ids)}], "max_tokens": 1}),
    "ensemble": lambda ids: ("/v1/completions", {"prompt": ids, "max_tokens": 1, "uncertainty": {"n_samples": 2}}),
    "choices": lambda ids: (
        "/v1/completions",
        {"prompt": ids, "max_tokens": 1, "uncertainty": {"n_samples": 2, "mode": "choices", "choices": [" w3 w4", " w5 w6"]}},
    ),
    "score": lambda ids: ("/v1/completions", {"prompt": ids, "max_tokens": 1, "uncertainty": {"n_samples": 2, "mode": "score"}}),
    "score route": lambda ids: ("/v1/uncertainty/score", {"prompt": ids, "completion": [5], "uncertainty": {"n_samples": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_tenants_do_not_share_cached_prefixes(secured: Secured, way: str) -> None:
    path, body = WAYS[way](_prompt(list(WAYS).index(way) + 1))

    def hits(token: str, **extra: Any) -> float:
        def count() -> float:
            return sum(
                float(row.rpartition(" ")[2])
                for row in secured.server.client.get("/metrics").text.splitlines()
                if row.startswith("vllm:prefix_cache_hits_total")
            )

        before = count()
        response = secured.ask(token, "POST", path, json={"model": "diag", **body, **extra})
        assert response.status_code == 200, response.text
        return count() - before

    alone = hits(ALICE)  # what the parts of one request share
    again = hits(ALICE)
    assert again >= alone + 2 * BLOCK, "a tenant finds its own prefix"
    assert hits(BOB) == alone, "another does not"
    assert hits(CAROL) == again, "unless it is the same tenant"
    if path != "/v1/uncertainty/score":
        assert hits(BOB, cache_salt="own") == alone, "a client's own salt divides further"


def test_limits_keep_the_engine_alive(secured: Secured) -> None:
    bodies: list[dict[str, Any]] = [
        {"n": 1000}, {"n": True}, {"prompt_logprobs": -1}, {"logprobs": 21}, {"prompt": ["w1"] * 1025}, {"best_of": 10**6},
        {"n": 128, "prompt": ["w1"] * 1000}, {"prompt": [[[1]]]}, {"logit_bias": {"9" * 30: 1}}, {"stop": ["a"] * 100},
    ]  # fmt: skip
    for body in bodies:
        for uncertainty in ({}, {"uncertainty": {"n_samples": 2}}):
            response = secured.complete(BOB, **{"prompt": "w1", **body, **uncertainty})
            assert response.status_code == 400, (body, response.text)
    for content in (
        b"[" * 10**6,
        b'{"model":"diag","prompt":"\\ud800"}',
        b'{"n":' + b"9" * 10**5 + b"}",
        b'{"a":1e999}',
        b"\x00",
    ):
        headers = {"authorization": f"Bearer {BOB}", "content-type": "application/json"}
        response = secured.server.client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400, content[:20]
    assert secured.complete(BOB, prompt="w1", prompt_logprobs=2, seed=3).status_code == 200
    assert secured.server.client.get("/readyz").status_code == 200


def test_a_rate_is_settled_by_the_work_that_was_done(secured: Secured) -> None:
    """A key of 60 tokens a minute; the first request may cost far more than it does, and leaves the rest for the next."""
    slow = KeyRecord(name="slow", hash=hash_of("credence-test-slow"), sample_tokens_per_minute=60)
    write_table(secured.keys, KeyTable(keys=(*secured.records, slow)))
    time.sleep(1.1)
    # 2 samples of 3 + 2 tokens: 10 of 60 (the estimate, by bytes of the prompt, is 26).
    statuses = [
        secured.complete("credence-test-slow", prompt="w1 w2 w3", uncertainty={"n_samples": 2}).status_code
        for _ in range(10)
    ]
    assert statuses[:5] == [200] * 5 and 429 in statuses[5:9]
    refused = secured.complete("credence-test-slow", prompt="w1 w2 w3", uncertainty={"n_samples": 8}, max_tokens=50)
    refused = (
        refused if refused.status_code == 429 else secured.complete("credence-test-slow", prompt="w1", uncertainty=True)
    )
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert secured.server.metric('credence_rejections_total{reason="rate_limit"}') >= 1


def test_keys_change_while_the_server_runs(secured: Secured) -> None:
    new = KeyRecord(name="new", hash=hash_of("credence-test-new"))
    assert secured.ask("credence-test-new", "GET", "/v1/models").status_code == 401
    write_table(secured.keys, KeyTable(keys=(*secured.records, new)))
    secured.server.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert secured.ask("credence-test-new", "GET", "/v1/models").status_code == 200
    secured.keys.write_text("keys: [")
    time.sleep(1.1)
    assert secured.ask("credence-test-new", "GET", "/v1/models").status_code == 200
    write_table(secured.keys, KeyTable(keys=secured.records))
    time.sleep(1.1)
    assert secured.ask("credence-test-new", "GET", "/v1/models").status_code == 401
    assert secured.ask(VLLM, "GET", "/v1/models").status_code == 200


def test_neither_log_nor_audit_has_prompts_or_keys(secured: Secured) -> None:
    """Last in this file: the log is that of all tests before."""
    bodies: list[dict[str, Any]] = [
        {"prompt": MARK},
        {"prompt": MARK, "uncertainty": {"n_samples": 2}},
        {"prompt": MARK, "uncertainty": {"n_samples": 2, "mode": "generate"}, "stream": True},
        {"prompt": MARK, "uncertainty": {"mode": "choices", "choices": [MARK, "w1"], "n_samples": 2}},
        {"prompt": MARK, "uncertainty": {MARK: 1}},
        {"prompt": MARK, "max_tokens": 10**6},
        {"prompt": [MARK], "structured_outputs": {"regex": f"[{MARK}"}},
        {"prompt": [MARK], "structured_outputs": {"regex": f"[{MARK}"}, "uncertainty": {"n_samples": 2}},
        {"model": f"diag {MARK}", "prompt": MARK, "uncertainty": True},
    ]
    for body in bodies:
        secured.complete(BOB, **body)
        secured.complete(f"wrong-{MARK}", **body)
    secured.ask(
        BOB, "POST", "/v1/chat/completions", json={"model": "diag", "messages": [{"role": MARK, "content": MARK}]}
    )
    secured.ask(ADMIN, "DELETE", f"/admin/v1/adapters/{MARK}")
    rows: list[dict[str, Any]] = []
    for _ in range(50):
        rows = [json.loads(line) for line in secured.audit.read_text().splitlines()]
        if any(row["route"] == "/admin/v1/adapters/{name}" and row["key"] == "admin" for row in rows):
            break
        time.sleep(0.1)
    # An unknown route's path is in the access log, as it was sent; a prompt has no business there.
    log = "\n".join(
        row for row in secured.server.log.read_text().splitlines() if "DELETE /admin/v1/adapters/" not in row
    )
    for text in (log, secured.audit.read_text()):
        for secret in (MARK, MARK.replace(" ", "%20"), ALICE, BOB, CAROL, VLLM, ADMIN, "credence-test-new"):
            assert secret not in text, secret
    answered = [row for row in rows if row.get("mode") == "ensemble" and row["status"] == 200]
    assert answered
    for row in answered:
        assert row["key"] in ("alice", "bob", "carol", "slow", "vllm-1")
        assert row["digest"].startswith("sha256:") and row["tau"] > 0 and row["usage"]["sample_prompt_tokens"] > 0
        [first, *_] = row["answers"]
        assert first["total"] == pytest.approx(first["aleatoric"] + first["epistemic"], abs=1e-6)
