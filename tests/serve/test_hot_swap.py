"""Adapters that change on a real server while it answers."""

import itertools
import random
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from credence.adapters import Artifact
from credence.adapters.errors import REASONS
from credence.clients import AuthenticationError, Client, ConflictError, NotFoundError, PermissionDeniedError
from tests.corrupted import fingerprint, variants
from tests.servers import Server, credence_command, start
from tests.tiny import LAYERS, make_artifact
from tests.tiny import SHAPES as LAYER_SHAPES

pytestmark = pytest.mark.engine

KEY = "test-key-of-the-administrator"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPTS = [[5, 9, 17, 3], [8, 8, 2, 40, 6], [30, 1, 22]]
SHAPES: list[dict[str, Any]] = [
    {},
    {"uncertainty": {"n_samples": 2}},
    {"uncertainty": {"n_samples": 3, "granularity": "token"}},
    {"uncertainty": {"n_samples": 2, "mode": "score"}},
]
REQUESTS, PROMOTIONS = 1000, 20


class Admin:
    """The admin routes of one server."""

    def __init__(self, server: Server) -> None:
        self.client = server.client

    def load(self, name: str, path: Path, **fields: Any) -> httpx.Response:
        body = {"name": name, "path": str(path), **fields}
        return self.client.post("/admin/v1/adapters", json=body)

    def states(self) -> list[dict[str, Any]]:
        return list(self.client.get("/admin/v1/adapters").json()["data"])

    def settle(self) -> list[dict[str, Any]]:
        """Waits until nothing drains any more."""
        deadline = time.monotonic() + 60
        while any(state["state"] == "draining" for state in self.states()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.states()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[str, Artifact]:
    return {
        "v1": make_artifact(folder / "v1", form="diag", seed=11),
        "v2": make_artifact(folder / "v2", form="row", seed=12),
        "v3": make_artifact(folder / "v3", form="diag", seed=13),
    }


@pytest.fixture(scope="module")
def server(
    model_path: Path, versions: dict[str, Artifact], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    key = tmp_path_factory.mktemp("keys") / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    command = credence_command(
        model_path, {"v1": versions["v1"].path}, "--adapter-root", str(folder), "--admin-key-file", str(key)
    )
    running = start(command, tmp_path_factory.mktemp("server") / "log", "/readyz")
    running.client.headers.update(HEADERS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def admin(server: Server) -> Admin:
    return Admin(server)


def ask(client: httpx.Client, model: str, prompt: list[int], shape: dict[str, Any]) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0.0, "logprobs": 1, **shape}
    return client.post("/v1/completions", json=body)


def content(response: httpx.Response) -> tuple[str, list[float]]:
    """Text and numbers of an answer."""
    choice = response.json()["choices"][0]
    numbers = list(choice["logprobs"]["token_logprobs"])
    uncertainty = choice.get("uncertainty")
    if uncertainty is not None:
        numbers += [uncertainty["total"], uncertainty["epistemic"], uncertainty["confidence"]]
    return choice["text"], numbers


def test_a_name_moves_under_load(server: Server, admin: Admin, versions: dict[str, Artifact]) -> None:
    """1,000 requests, 20 promotions: every answer is 200 and wholly of one version."""
    assert admin.load("v2", versions["v2"].path).status_code == 201
    known = {}
    for name, (i, prompt), (j, shape) in itertools.product(("v1", "v2"), enumerate(PROMPTS), enumerate(SHAPES)):
        known[versions[name].digest, i, j] = content(ask(server.client, name, prompt, shape))
    assert server.client.post("/admin/v1/adapters/live/promote", json={"target": "v1"}).status_code == 200
    rng = random.Random(3)
    plan = [(rng.randrange(len(PROMPTS)), rng.randrange(len(SHAPES))) for _ in range(REQUESTS)]
    done = threading.Semaphore(0)

    def one(request: tuple[int, int]) -> str:
        i, j = request
        response = ask(server.client, "live", PROMPTS[i], SHAPES[j])
        done.release()
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["model"] == "live"
        text, numbers = content(response)
        uncertainty = answer["choices"][0].get("uncertainty")
        digests = (
            {uncertainty["adapter"]["digest"]} if uncertainty else {versions[name].digest for name in ("v1", "v2")}
        )
        matching = [
            digest
            for digest in digests
            if (text == known[digest, i, j][0] and numbers == pytest.approx(known[digest, i, j][1], abs=2e-4))
        ]
        assert matching, (
            f"request {request} got {text!r} {numbers}, known are {[known[digest, i, j] for digest in digests]}"
        )
        return matching[0]

    def promote() -> None:
        for turn in range(PROMOTIONS):
            for _ in range(REQUESTS // (PROMOTIONS + 1)):
                assert done.acquire(timeout=30), "the requests have stopped"
            response = server.client.post("/admin/v1/adapters/live/promote", json={"target": ("v2", "v1")[turn % 2]})
            assert response.status_code == 200, response.text

    with ThreadPoolExecutor(17) as pool:
        promoting = pool.submit(promote)
        seen = list(pool.map(one, plan))
        promoting.result()
    shares = [seen.count(versions[name].digest) / REQUESTS for name in ("v1", "v2")]
    assert min(shares) > 0.2, shares
    assert {state["name"]: state["digest"] for state in admin.settle()} == {
        "v1": versions["v1"].digest,
        "v2": versions["v2"].digest,
        "live": versions["v1"].digest,
    }


def test_a_replaced_folder_serves_the_new_content_and_the_old_one_leaves(
    server: Server, admin: Admin, versions: dict[str, Artifact], folder: Path
) -> None:
    """The same name and path with other content: no prefix cached under the old weights is used for the new."""
    place = folder / "place"
    prompt = list(range(3, 80))
    for name in ("v1", "v3"):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(versions[name].path, place)
        response = admin.load("moving", place, replace=True)
        assert response.json()["digest"] == versions[name].digest
        first = ask(server.client, "moving", prompt, SHAPES[1])
        again = ask(server.client, "moving", prompt, SHAPES[1])
        assert first.json()["choices"][0]["uncertainty"]["adapter"]["digest"] == versions[name].digest
        assert content(first)[1] == pytest.approx(content(again)[1], abs=2e-4)
        plain = content(ask(server.client, "moving", prompt, {}))
        assert admin.load("fresh", versions[name].path, replace=True).status_code in (200, 201)
        assert plain[1] == pytest.approx(content(ask(server.client, "fresh", prompt, {}))[1], abs=2e-4)
    digests = {state["digest"] for state in admin.settle()}
    assert versions["v3"].digest in digests
    stored = server.metric('credence_adapter_loads_total{result="refused"}')
    assert stored == 0


def test_models_and_names_that_go_away(server: Server, admin: Admin, versions: dict[str, Artifact]) -> None:
    assert admin.load("short", versions["v3"].path).status_code in (200, 201)
    listed = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
    assert listed["short"]["posterior"]["digest"] == versions["v3"].digest and "base" in listed
    assert not any("@" in name for name in listed)
    assert ask(server.client, "short", PROMPTS[0], {}).json()["model"] == "short"
    assert server.client.delete("/admin/v1/adapters/short").status_code == 200
    for shape in SHAPES:
        assert ask(server.client, "short", PROMPTS[0], shape).status_code == 404
    assert "short" not in {card["id"] for card in server.client.get("/v1/models").json()["data"]}
    assert server.client.delete("/admin/v1/adapters/short").status_code == 404


@pytest.mark.parametrize("what", ["narrower", "deeper"])
def test_an_adapter_of_another_model_is_refused(
    server: Server, admin: Admin, versions: dict[str, Artifact], folder: Path, what: str
) -> None:
    """vLLM itself would load it: it copies a smaller factor into the corner of a slot, and skips layers it does not have."""
    half = {name: (n_out, n_in // 2) for name, (n_out, n_in) in LAYER_SHAPES.items()}
    changes: dict[str, Any] = {"narrower": {"shapes": half}, "deeper": {"layers": LAYERS + 1}}[what]
    make_artifact(folder / what, seed=14, **changes)
    before = content(ask(server.client, "v1", PROMPTS[0], SHAPES[1]))
    for name, replace in (("v1", True), (what, False)):
        response = admin.load(name, folder / what, replace=replace)
        assert response.status_code == 422, response.text
        assert response.json()["error"]["code"] == "base_model"
    assert {state["name"]: state["state"] for state in admin.states()}[what] == "failed"
    after = content(ask(server.client, "v1", PROMPTS[0], SHAPES[1]))
    assert after[0] == before[0] and after[1] == pytest.approx(before[1], abs=2e-4)


def test_the_client_administers(server: Server, admin: Admin, versions: dict[str, Artifact], tmp_path: Path) -> None:
    with Client(server.url, api_key=KEY) as client:
        loaded = client.adapters.load("by-client", str(versions["v2"].path), replace=True)
        assert (loaded.state, loaded.digest, loaded.alias_of) == ("ready", versions["v2"].digest, None)
        assert client.adapters.promote("alias", "by-client").alias_of == "by-client"
        answer = client.complete(PROMPTS[0], model="alias", uncertainty=True, n_samples=2, max_tokens=2)
        uncertainty = answer.choices[0].uncertainty
        assert uncertainty is not None and uncertainty.adapter.digest == versions["v2"].digest
        with pytest.raises(ConflictError):
            client.adapters.load("by-client", str(versions["v2"].path))
        with pytest.raises(PermissionDeniedError):
            client.adapters.load("elsewhere", str(tmp_path))
        assert {"by-client", "alias"} <= {adapter.name for adapter in client.adapters.list()}
        for name in ("alias", "by-client"):
            assert client.adapters.unload(name).state in ("draining", "removed")
        admin.settle()
        with pytest.raises(NotFoundError):
            client.adapters.get("by-client")
    with Client(server.url, api_key="wrong") as stranger, pytest.raises(AuthenticationError):
        stranger.adapters.list()


def test_corrupted_artifacts_over_http(
    server: Server, admin: Admin, versions: dict[str, Artifact], folder: Path
) -> None:
    """A fifth of the variants that tests/serve/test_corrupted_adapters.py offers to a registry, over the real server's own route."""
    untouched = fingerprint(versions["v1"].path)
    before = content(ask(server.client, "v1", PROMPTS[0], SHAPES[1]))
    counted = server.metric('credence_adapter_loads_total{result="refused"}')
    offered = list(itertools.islice(variants(versions["v1"].path, folder / "variants"), 0, None, 5))
    for name, place in offered:
        assert fingerprint(place) != untouched, name
        response = admin.load("v1", place, replace=True)
        assert response.status_code in (403, 422), f"{name}: {response.status_code} {response.text}"
        error = response.json()["error"]
        assert error["message"] and (response.status_code == 403 or error["code"] in REASONS), name
    assert len(offered) >= 200
    forbidden = len(offered) - (server.metric('credence_adapter_loads_total{result="refused"}') - counted)
    assert forbidden <= 3, "only links out of the root are refused before they are read"
    after = content(ask(server.client, "v1", PROMPTS[0], SHAPES[1]))
    assert after[0] == before[0] and after[1] == pytest.approx(before[1], abs=2e-4)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "", {"name": "x", "path": "/etc"}, 403, "path"),
        ("POST", "", {"name": "x"}, 400, "path"),
        ("POST", "", {"name": "x", "path": "p", "more": 1}, 400, "more"),
        ("POST", "", [], 400, None),
        ("GET", "/nothing", None, 404, "name"),
        ("POST", "/live/promote", {"target": "nothing"}, 404, "target"),
        ("POST", "/base/promote", {"target": "v1"}, 409, "name"),
        ("DELETE", "/v1?drain_s=forever", None, 400, "drain_s"),
        ("DELETE", "/base", None, 404, "name"),
    ],
)
def test_bad_administration(
    server: Server, method: str, path: str, body: object, status: int, param: str | None
) -> None:
    response = server.client.request(method, "/admin/v1/adapters" + path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


def test_cycles_of_loading_leave_nothing(server: Server, admin: Admin, versions: dict[str, Artifact]) -> None:
    def residue() -> tuple[float, ...]:
        admin.settle()
        slots = [server.metric(f'credence_sample_slots{{state="{state}"}}') for state in ("leased", "resident", "free")]
        return (*slots, server.metric("vllm:num_requests_running"))

    def descriptors() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    for state in admin.settle():
        if state["name"] not in ("v1", "live"):
            server.client.delete(f"/admin/v1/adapters/{state['name']}")
    before = residue()
    files = descriptors()
    for cycle in range(12):
        response = admin.load("cycle", versions[("v2", "v3")[cycle % 2]].path)
        assert response.status_code == 201, response.text
        assert ask(server.client, "cycle", PROMPTS[0], SHAPES[cycle % len(SHAPES)]).status_code == 200
        assert server.client.delete("/admin/v1/adapters/cycle").status_code == 200
    assert residue() == before
    assert descriptors() <= files + 2
