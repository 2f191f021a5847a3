"""The door with keys, limits, rates, salts and the audit log, in front of an application that answers everything."""

import asyncio
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from credence.serve.audit import AuditLog
from credence.serve.errors import BadRequest, Unavailable, without_messages
from credence.serve.facts import CURRENT
from credence.serve.gate import Answer, EventStream, Gate, Scope
from credence.serve.keys import KeyRecord, KeyRing, hash_of, plain_key
from credence.serve.limits import RequestLimits
from credence.serve.rates import Rates
from credence.serve.routes import ROUTES, Access, with_extra
from credence.serve.schemas import UncertaintyOptions
from credence.serve.security import Security, key_of
from tests.serve.test_gate import FakeBackend, FakeStream, post
from tests.serve.test_rates import Clock

USER, OTHER, ADMIN, FREE = "credence-user", "credence-other", "credence-admin", "credence-free"


def record(name: str, token: str, **changes: object) -> KeyRecord:
    return KeyRecord.model_validate({"name": name, "hash": hash_of(token), **changes})


class SecuredBackend(FakeBackend):
    """Notes the work that an answer took, as the ensemble does."""

    work = 0

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        try:
            return await super().answer(path, body, options, scope)
        finally:
            facts = CURRENT.get()
            assert facts is not None
            facts.sample_completion_tokens = self.work


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backend(clock: Clock) -> FakeBackend:
    backend = SecuredBackend()
    users = [
        record("user", USER, adapters=["triage", "score"], max_samples=4),
        record("other", OTHER, tenant="acme", return_samples=True),
        record("free", FREE, tenant="acme"),
    ]
    backend.security = Security(
        users=KeyRing(None, users),
        admins=KeyRing(None, [record("boss", ADMIN, admin=True)], admin=True),
        rates=Rates(clock),
        max_model_len=100,
    )
    return backend


async def anything(request: Request) -> Response:
    key = key_of(request.scope)
    length = request.headers.get("content-length")
    return Response(
        await request.body(),
        headers={"x-key": key.name if key else "", "x-length": length or "", "x-path": request.url.path},
    )


@pytest.fixture
def app(backend: FakeBackend) -> Gate:
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    return Gate(Starlette(routes=[Route("/{path:path}", anything, methods=methods)]), backend=lambda scope: backend)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def call(app: Gate, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, headers=bearer(token) if token else {}, **options)

    return asyncio.run(ask())


def ask(app: Gate, token: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return post(app, path, {"model": "triage", **body}, headers=bearer(token))


# --- who ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_route_of_the_table_is_guarded_as_it_says(app: Gate, route: Any) -> None:
    path = route.path.replace("{name}", "triage").replace("{file}", "app.js")
    for method in route.methods:
        body = {"json": {"model": "triage"}} if method == "POST" else {}
        statuses = {
            token: call(app, method, path, token, **body).status_code for token in (None, "wrong", USER, OTHER, ADMIN)
        }
        expected = {
            Access.OPEN: {None: 200, "wrong": 200, USER: 200, OTHER: 200, ADMIN: 200},
            Access.USER: {None: 401, "wrong": 401, USER: 200, OTHER: 200, ADMIN: 403},
            Access.ADMIN: {None: 401, "wrong": 401, USER: 403, OTHER: 403, ADMIN: 200},
        }[route.access]
        assert statuses == expected, method


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_no_method_opens_a_route(app: Gate, method: str) -> None:
    assert call(app, method, "/pause").status_code == 404
    if method != "OPTIONS":  # a browser asks without a key, and the application answers it without doing anything
        assert call(app, method, "/v1/models").status_code == 401
        assert call(app, method, "/admin/v1/adapters", USER).status_code == 403


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", USER, f"Basic {USER}", f"Bearer {USER}x", f"Bearer {USER.upper()}", f"Bearer {hash_of(USER)}",
     f"Bearer x{USER}", f"Bearer {USER} {USER}", f"Bearer, Bearer {USER}"],
)  # fmt: skip
def test_headers_that_are_no_key(app: Gate, header: str) -> None:
    response = post(app, "/v1/completions", {"model": "triage"}, headers={"authorization": header})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "AuthenticationError"


def test_two_authorization_headers_are_no_key(app: Gate) -> None:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            headers = [("authorization", f"Bearer {USER}"), ("authorization", "Bearer other")]
            return await client.get("/v1/models", headers=headers)

    assert asyncio.run(ask()).status_code == 401


def test_a_key_may_hold_any_characters(app: Gate, backend: FakeBackend) -> None:
    token = "s\u00e4cret"
    backend.security.users = KeyRing(None, [plain_key(token, name="default")])
    headers = {"authorization": f"bearer  {token}".encode()}
    assert post(app, "/v1/completions", {"model": "x"}, headers=headers).status_code == 200


def test_without_keys_users_need_none_and_admin_is_closed(app: Gate, backend: FakeBackend) -> None:
    backend.security = Security()
    assert call(app, "GET", "/v1/models").status_code == 200
    assert call(app, "GET", "/admin/v1/adapters").status_code == 401
    backend.security.admins = KeyRing(None, [record("boss", ADMIN, admin=True)], admin=True)
    assert call(app, "GET", "/admin/v1/adapters", ADMIN).status_code == 200
    assert call(app, "GET", "/v1/models", ADMIN).status_code == 200, "the users' routes are open to everybody"


def test_rejections_are_counted_by_reason_only(app: Gate, backend: FakeBackend) -> None:
    call(app, "GET", "/v1/models")
    call(app, "GET", "/v1/models", ADMIN)
    assert backend.count("credence_rejections_total", reason="unauthorized") == 1
    assert backend.count("credence_rejections_total", reason="forbidden") == 1
    names = {sample.labels.get("reason") for metric in backend.registry.collect() for sample in metric.samples}
    assert not names & {"user", "boss", USER, ADMIN}


def test_until_the_engine_is_up_only_open_routes_answer() -> None:
    app = Gate(Starlette(routes=[Route("/{path:path}", anything, methods=["GET", "POST"])]), backend=lambda scope: None)
    assert call(app, "GET", "/livez").status_code == 200
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/admin/v1/adapters"),
        ("GET", "/pause"),
    ):
        response = call(app, method, path)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_websockets_are_refused(app: Gate) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(app({"type": "websocket", "path": "/v1/completions", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


PATH_TRICKS = [
    "/V1/completions", "/v1/completions/", "//v1/completions", "/v1//completions", "/v1/./completions", "/v1/x/../completions",
    "/v1/completions;a", "/v1/completions;/../pause", "/v1;/completions", "/v1/completions%20", "/v1/completions%00",
    "/v1%2Fcompletions%2F", "/v1/%2e%2e/pause", "/%76%31/pause", "/v1/%EF%BD%83ompletions", "/..;/v1/completions", "/livez/../pause",
    "/livez%2f..%2fpause", "/livez%252f", "/playground/..%2fpause", "/playground/%2e%2e", "/admin/v1/adapters/%2e%2e/promote",
    "/health;/v1/models", "/health%0a", "http://localhost/v1/models", "", "*", "/.",
]  # fmt: skip


@pytest.mark.parametrize("path", PATH_TRICKS)
@pytest.mark.parametrize("token", [None, USER, ADMIN])
def test_path_tricks_meet_no_route(app: Gate, path: str, token: str | None) -> None:
    """The path is taken as the server decoded it, once; the application would answer anything."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model":"triage"}'}

    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    scope = {
        "type": "http", "method": "POST", "path": unquote(path), "raw_path": path.encode(), "query_string": b"", "headers": headers,
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 404


# --- further routes ----------------------------------------------------------------------------------------------


def test_a_further_route_needs_a_key_that_may_ask_for_everything(app: Gate, backend: FakeBackend) -> None:
    assert call(app, "POST", "/v1/embeddings", OTHER, json={}).status_code == 404
    backend.security.routes = with_extra(["/v1/embeddings", "/invocations"])
    for token, status in ((None, 401), (USER, 401), (ADMIN, 403), (OTHER, 200)):
        assert call(app, "POST", "/v1/embeddings", token, json={"model": "x"}).status_code == status
        assert call(app, "GET", "/invocations", token).status_code == status
    assert (
        call(
            app,
            "POST",
            "/v1/embeddings",
            OTHER,
            content=b"not json",
        ).status_code
        == 400
    )
    multipart = call(app, "POST", "/v1/embeddings", OTHER, files={"file": b"x"})
    assert multipart.status_code == 200
    refused = call(app, "POST", "/v1/embeddings", OTHER, json={"model": "x", "uncertainty": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "uncertainty"


# --- what --------------------------------------------------------------------------------------------------------


def test_models_of_others_do_not_exist(app: Gate, backend: FakeBackend) -> None:
    for model in ("secret-model", "nonexistent"):
        for path in ("/v1/completions", "/tokenize", "/v1/uncertainty/score", "/v1/completions?uncertainty=true"):
            response = ask(app, USER, path, model=model)
            assert response.status_code == 404
            assert response.json()["error"] == {
                "message": f"The model `{model}` does not exist.", "type": "NotFoundError", "param": "model", "code": 404,
            }  # fmt: skip
    assert ask(app, OTHER, model="secret-model").status_code == 200
    assert not backend.calls


@pytest.mark.parametrize("model", [None, "", 7, ["triage"]])
def test_a_key_with_a_list_must_name_a_model(app: Gate, model: object) -> None:
    """Without one the base model would answer."""
    response = ask(app, USER, model=model)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert ask(app, OTHER, model=model).status_code == 200


def test_a_model_is_read_as_the_application_reads_it(app: Gate) -> None:
    """A key that is given twice would be one model for the door and another behind it."""
    raw = b'{"model":"triage","model":"secret-model"}'
    assert post(app, "/v1/completions", raw, headers=bearer(USER)).status_code == 400


@pytest.mark.parametrize(
    ("token", "options", "status"),
    [
        (USER, {"n_samples": 4}, 200),
        (USER, {"n_samples": 5}, 403),
        (USER, {"n_samples": 4, "min_samples": 5}, 403),
        (USER, {"n_samples": "auto", "mode": "generate"}, 200),
        (USER, {"return_samples": True}, 403),
        (OTHER, {"return_samples": True, "n_samples": 5}, 200),
        (FREE, {"return_samples": True}, 403),
    ],
)
def test_what_a_key_may_ask_of_the_uncertainty(
    app: Gate, backend: FakeBackend, token: str, options: dict[str, Any], status: int
) -> None:
    response = ask(app, token, uncertainty=options)
    assert response.status_code == status
    assert len(backend.calls) == (status == 200)
    if status == 403:
        assert response.json()["error"]["param"].removeprefix("uncertainty.") in options


def test_a_server_may_keep_its_samples(app: Gate, backend: FakeBackend) -> None:
    backend.security = Security()
    assert post(app, "/v1/completions", {"model": "a", "uncertainty": {"return_samples": True}}).status_code == 200
    backend.security.return_samples = False
    response = post(app, "/v1/completions", {"model": "a", "uncertainty": {"return_samples": True}})
    assert (response.status_code, response.json()["error"]["param"]) == (403, "uncertainty.return_samples")


@pytest.mark.parametrize("extra", [{}, {"uncertainty": {"n_samples": 2}}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_limits_hold_with_and_without_uncertainty(
    app: Gate, backend: FakeBackend, path: str, extra: dict[str, Any]
) -> None:
    for body, param in (
        ({"n": 1000}, "n"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
    ):
        response = ask(app, OTHER, path, **body, **extra)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert not backend.calls


def test_the_budget_of_rows_counts_samples(app: Gate, backend: FakeBackend) -> None:
    backend.security.limits = RequestLimits(max_sequences=20)
    assert ask(app, OTHER, n=20).status_code == 200
    assert ask(app, OTHER, n=4, uncertainty={"n_samples": 4}).status_code == 200
    assert ask(app, OTHER, n=4, uncertainty={"n_samples": 5}).status_code == 400
    assert ask(app, OTHER, n=4, uncertainty=True).status_code == 400, "eight samples by default"
    assert ask(app, USER, n=4, uncertainty=True).status_code == 200, "this key has four at most"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model":"triage","a":NaN}', b'{"model":"triage","prompt":"\\ud800"}',
     b'{"model":"triage","n":' + b"9" * 5000 + b"}", b'{"model":"triage","a":' + b"[" * 200_000, b'{"model":"triage","n":true}'],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score", "/tokenize"])
def test_bodies_that_are_none_are_a_400(app: Gate, path: str, raw: bytes) -> None:
    if path == "/tokenize" and raw.endswith(b"true}"):
        return  # it has no n
    response = post(app, path, raw, headers=bearer(OTHER))
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


def test_a_body_of_another_type_is_a_400(app: Gate) -> None:
    headers = {**bearer(OTHER), "content-type": "text/plain"}
    assert post(app, "/v1/completions", b'{"model":"triage","n":1000}', headers=headers).status_code == 400


# --- rates -------------------------------------------------------------------------------------------------------


def test_requests_of_a_minute(app: Gate, backend: FakeBackend, clock: Clock) -> None:
    backend.security.users = KeyRing(None, [record("slow", USER, requests_per_minute=2), record("other", OTHER)])
    assert [ask(app, USER).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(app, USER)
    assert refused.headers["retry-after"] == "30"
    assert refused.json()["error"]["type"] == "RateLimitError"
    assert backend.count("credence_rejections_total", reason="rate_limit") == 2
    assert ask(app, OTHER).status_code == 200
    clock.now_ms += 30_000
    assert [ask(app, USER).status_code for _ in range(2)] == [200, 429]


def test_sample_tokens_are_settled_by_what_was_done(app: Gate, backend: SecuredBackend) -> None:
    backend.security.users = KeyRing(None, [record("slow", USER, sample_tokens_per_minute=100)])
    options = {"n_samples": 8}  # at most 8 x (3 + 16) = 152
    backend.work = 60
    assert [ask(app, USER, prompt="a", uncertainty=options).status_code for _ in range(3)] == [200, 200, 429]
    assert ask(app, USER, prompt="a").status_code == 200, "without samples nothing is taken"


@pytest.mark.parametrize(
    "failure", [BadRequest("no", param=None), Unavailable("full", reason="overload"), RuntimeError()]
)
def test_a_request_that_failed_costs_what_it_did(app: Gate, backend: SecuredBackend, failure: Exception) -> None:
    backend.security.users = KeyRing(None, [record("slow", USER, sample_tokens_per_minute=100)])
    backend.failure = failure
    for _ in range(5):
        assert ask(app, USER, uncertainty=True).status_code != 429
    backend.work = 101
    ask(app, USER, uncertainty=True)
    assert ask(app, USER, uncertainty=True).status_code == 429


def test_a_running_request_is_charged_with_the_most_it_can_cost(app: Gate, backend: SecuredBackend) -> None:
    backend.security.users = KeyRing(None, [record("slow", USER, sample_tokens_per_minute=100)])
    backend.delay_s = 0.2

    async def together() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"model": "triage", "prompt": "a", "uncertainty": {"n_samples": 8}}
            asked = [client.post("/v1/completions", json=body, headers=bearer(USER)) for _ in range(5)]
            return sorted(response.status_code for response in await asyncio.gather(*asked))

    assert asyncio.run(together()) == [200, 429, 429, 429, 429]
    assert ask(app, USER, uncertainty=True).status_code == 200


# --- cache salt --------------------------------------------------------------------------------------------------


def salt_of(app: Gate, token: str, path: str = "/v1/completions", **body: Any) -> str | None:
    response = ask(app, token, path, **body)
    assert response.status_code == 200
    assert response.headers["x-length"] == str(len(response.content))
    return response.json().get("cache_salt")


def test_each_tenant_has_its_salt(app: Gate, backend: FakeBackend) -> None:
    mine, other, colleague = (salt_of(app, token) for token in (USER, OTHER, FREE))
    assert mine and other and mine != other and other == colleague
    assert mine == salt_of(app, USER, "/v1/chat/completions"), "and keeps it"
    own = salt_of(app, USER, cache_salt="abc")
    assert own not in (mine, other, salt_of(app, OTHER, cache_salt="abc"))
    assert own == salt_of(app, USER, cache_salt="abc")
    assert salt_of(app, USER, cache_salt=other) != other, "nobody can choose another's salt"
    assert len(str(own)) == 64, "vLLM takes 128 characters"
    secret = backend.security.secret
    backend.security.secret = b"another start"
    assert salt_of(app, USER) != mine
    backend.security.secret = secret
    assert salt_of(app, USER) == mine


def test_a_tenant_and_a_key_of_one_name_are_two(app: Gate, backend: FakeBackend) -> None:
    backend.security.users = KeyRing(None, [record("acme", USER), record("b", OTHER, tenant="acme")])
    assert salt_of(app, USER) != salt_of(app, OTHER)


def test_requests_with_uncertainty_carry_the_salt_too(app: Gate, backend: FakeBackend) -> None:
    plain = salt_of(app, USER)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score"):
        ask(app, USER, path, uncertainty={"mode": "score"})
    assert [body["cache_salt"] for body, _ in backend.calls] == [plain] * 3


def test_without_keys_a_body_is_left_alone(app: Gate, backend: FakeBackend) -> None:
    backend.security = Security()
    raw = b'{ "model":"a", "cache_salt":"mine" }'
    assert post(app, "/v1/completions", raw).content == raw


def test_a_salted_body_is_otherwise_the_same(app: Gate) -> None:
    sent = {
        "model": "triage",
        "prompt": "h\u00e9 \U0001f600",
        "temperature": 0.1,
        "seed": 2**62,
        "stop": None,
        "x": [1.5, -0.0, {}],
    }
    got = json.loads(ask(app, USER, **sent).content)
    assert got.pop("cache_salt")
    assert got == sent


@pytest.mark.parametrize("own", ["", 7, ["a"], "x" * 1025])
def test_a_salt_that_is_none(app: Gate, own: object) -> None:
    response = ask(app, USER, cache_salt=own)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "cache_salt")


# --- audit and logs ----------------------------------------------------------------------------------------------


@pytest.fixture
def audit(backend: FakeBackend, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, backend.metrics.audit_failures.inc)
    backend.security.audit = log
    yield path
    log.close()


def written(backend: FakeBackend, path: Path) -> list[dict[str, Any]]:
    assert backend.security.audit is not None
    backend.security.audit.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_requests_with_uncertainty_and_admin_calls_are_audited(app: Gate, backend: FakeBackend, audit: Path) -> None:
    ask(app, USER, uncertainty={"n_samples": 3})
    ask(app, USER, uncertainty={"n_samples": 9})
    ask(app, USER)
    call(app, "GET", "/v1/models", USER)
    backend.stream = FakeStream()
    ask(app, OTHER, "/v1/chat/completions", uncertainty={"mode": "score"}, stream=True)
    call(app, "DELETE", "/admin/v1/adapters/triage", ADMIN)
    call(app, "POST", "/admin/v1/adapters", USER, json={"path": "/secret/place"})
    rows = written(backend, audit)
    assert [
        (
            row["key"],
            row["method"],
            row["route"],
            row["status"],
            row["reason"],
            row.get("mode"),
            row.get("n_samples_asked"),
            row["model"],
        )
        for row in rows
    ] == [
        ("user", "POST", "/v1/completions", 200, None, "ensemble", 3, "triage"),
        ("user", "POST", "/v1/completions", 403, "forbidden", "ensemble", 9, "triage"),
        ("other", "POST", "/v1/chat/completions", 200, None, "score", None, "triage"),
        ("boss", "DELETE", "/admin/v1/adapters/{name}", 200, None, None, None, "triage"),
        (None, "POST", "/admin/v1/adapters", 403, "forbidden", None, None, None),
    ]


def test_a_lost_line_harms_no_request(app: Gate, backend: FakeBackend) -> None:
    backend.security.audit = AuditLog(Path("/dev/full"), backend.metrics.audit_failures.inc)
    assert ask(app, USER, uncertainty={"n_samples": 3}).status_code == 200
    backend.security.audit.close()
    assert backend.count("credence_audit_failures_total") == 1


class SpillingBackend(SecuredBackend):
    """Fails as careless code would: with the prompt in the exception's text."""

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        try:
            raise ValueError(f"cannot tokenise {body!r}")
        except ValueError as error:
            raise RuntimeError(f"failed for {body!r}") from error


MARK = "PLUGH"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.fixed_dictionaries(
        {"model": st.sampled_from(["triage", f"{MARK} hello", 3])},
        optional={
            "prompt": st.sampled_from([MARK, [MARK], [f"{MARK} {MARK}", "x"], {"a": MARK}]),
            "messages": st.sampled_from([[{"role": "user", "content": MARK}], MARK]),
            "stop": st.just(MARK), "user": st.just(MARK), "suffix": st.just(MARK), "cache_salt": st.just(MARK),
            "n": st.sampled_from([1, MARK]), "completion": st.just(MARK),
            "uncertainty": st.sampled_from(
                [True, {"mode": "score"}, {"mode": "choices", "choices": [MARK, "b"]}, {"mode": MARK}, {MARK: 1}, {"tau": MARK}]
            ),
        },
    ),
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/uncertainty/score", "/tokenize", f"/{MARK}"]),
    token=st.sampled_from([USER, OTHER, f"{USER}-{MARK}"]),
    spills=st.booleans(),
)  # fmt: skip
def test_no_prompt_and_no_key_is_ever_in_audit_or_log(
    app: Gate, backend: FakeBackend, tmp_path: Path, body: dict[str, Any], path: str, token: str, spills: bool
) -> None:
    held = io.StringIO()
    handler = logging.StreamHandler(held)
    root = logging.getLogger("credence")
    root.addHandler(handler)
    secured = SpillingBackend() if spills else SecuredBackend()
    secured.security = Security(users=backend.security.users, max_model_len=100)
    log = tmp_path / f"audit-{time.monotonic_ns()}"
    secured.security.audit = AuditLog(log)
    try:
        gate = Gate(app.app, backend=lambda scope: secured)
        response = post(gate, path, body, headers=bearer(token))
        asked = response.status_code
        assert asked < 500 or spills
    finally:
        secured.security.audit.close()
        root.removeHandler(handler)
    for text in (log.read_text(), held.getvalue()):
        assert MARK not in text and USER not in text and OTHER not in text
    if asked == 500:
        assert "RuntimeError" in held.getvalue() and "test_security.py" in held.getvalue()


def test_a_failure_is_told_by_types_and_places() -> None:
    def fails() -> None:
        try:
            raise KeyError("a prompt")
        except KeyError as error:
            raise RuntimeError("a prompt") from error

    try:
        fails()
    except RuntimeError as error:
        told = without_messages(error)
    assert "builtins.RuntimeError" in told and "caused by builtins.KeyError" in told and " fails" in told
    assert "a prompt" not in told
