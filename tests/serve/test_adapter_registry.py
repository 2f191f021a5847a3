"""Adapters at run time with a fake engine: moving names, draining, refusals, the watched folder, and 1,000 cycles."""

import asyncio
import itertools
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from credence.adapters import Artifact
from credence.serve import adapter_registry
from credence.serve.adapter_folder import AdapterFolder
from credence.serve.adapter_registry import AdapterRegistry
from credence.serve.admin import below_a_root
from credence.serve.config import ServeConfig
from credence.serve.engine import EngineLimits, SampleLoadError
from credence.serve.ensemble import EnsembleService, ServedAdapter
from credence.serve.errors import ArtifactRefused, BadRequest, Conflict, Forbidden, NotFound, ServeError, Unavailable
from credence.serve.facts import RequestFacts
from credence.serve.in_flight import InFlight
from credence.serve.metrics import Metrics
from credence.serve.preflight import BaseModel
from credence.serve.schemas import UncertaintyOptions
from tests.serve.test_ensemble import FakeEngine
from tests.tiny import SHAPES, make_artifact

BASE = BaseModel(
    modules={
        f"model.layers.{layer}.self_attn.{name}_proj": SHAPES[f"self_attn.{name}_proj"]
        for layer in (0, 1)
        for name in "qv"
    },
    weights_bytes=0,
    kv_bytes_per_token=0,
    item_bytes=4,
    max_model_len=64,
)
SMALL = {"modules": ("self_attn.q_proj",), "rank": 2, "alpha": 3}


class FakeMeans:
    """Holds means by id and the published names."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.published: dict[str, int] = {}
        self.broken = False

    def reserved(self, name: str) -> bool:
        return name == "base"

    async def load(self, lora_id: int, artifact: Artifact) -> int:
        if self.broken:
            raise SampleLoadError("no room")
        self.held[lora_id] = artifact.digest
        return lora_id

    async def unload(self, mean: int) -> None:
        del self.held[mean]

    def publish(self, name: str, mean: int) -> None:
        self.published[name] = mean

    def withdraw(self, name: str) -> None:
        del self.published[name]


class World:
    """A registry and what surrounds it."""

    def __init__(self, folder: Path, **changes: object) -> None:
        settings = {"default_samples": 2, "max_samples": 4, "max_adapters": 3, **changes}
        self.config = ServeConfig.model_validate(
            {**settings, "adapters": {"triage": "/x"}, "state_dir": str(folder / "state"), "stats_dir": str(folder)}
        )
        self.prometheus = CollectorRegistry()
        self.adapters: dict[str, ServedAdapter] = {}
        self.samples, self.means, self.in_flight = FakeEngine(), FakeMeans(), InFlight()
        ids = itertools.count(1)
        self.service = EnsembleService(
            config=self.config,
            adapters=self.adapters,
            engine=self.samples,
            limits=EngineLimits(
                max_num_seqs=16,
                max_loras=10,
                num_kv_blocks=101,
                block_size=16,
                max_lora_rank=8,
                lora_modules=frozenset({"q_proj"}),
            ),
            metrics=Metrics(self.prometheus, []),
            lora_ids=ids,
        )
        self.canary_error: Exception | None = None
        self.registry = AdapterRegistry(
            config=self.config,
            service=self.service,
            adapters=self.adapters,
            engine=self.means,
            in_flight=self.in_flight,
            lora_ids=ids,
            canary=self.canary,
            base=BASE,
        )

    async def canary(self, adapter: ServedAdapter) -> None:
        assert adapter.name not in self.adapters or self.adapters[adapter.name].artifact is not adapter.artifact
        if self.canary_error is not None:
            raise self.canary_error

    def request(self, model: str, until: asyncio.Event) -> "asyncio.Task[str]":
        """A request that plans at once and answers with its artifact's digest when it is allowed to."""
        facts = RequestFacts(request_id="r", method="POST", path="/v1/completions", started_s=0.0, model=model)

        async def run() -> str:
            with self.in_flight.entered(facts):
                plan = self.service.plan(model, UncertaintyOptions())
                await until.wait()
                async with self.service.ensemble(plan) as ensemble:
                    digests = {self.samples.held[slot.lora_id].ref.digest for slot in ensemble.slots}
                    assert digests == {plan.adapter.artifact.digest} == {self.means.held[plan.adapter.mean]}
                    assert plan.adapter.artifact.path.is_dir()
                return plan.adapter.artifact.digest

        return asyncio.ensure_future(run())

    def count(self, name: str, **labels: str) -> float | None:
        return self.prometheus.get_sample_value(name, labels)

    @property
    def stored(self) -> set[str]:
        folder = Path(self.config.state_dir) / "artifacts"
        return {f"sha256:{entry.name}" for entry in folder.iterdir()} if folder.is_dir() else set()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: make_artifact(folder / name, seed=seed, **SMALL) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))  # type: ignore[arg-type]


def test_a_name_is_loaded_moved_and_taken_away(world: World, artifacts: dict[str, Artifact]) -> None:
    one, two = artifacts["one"], artifacts["two"]

    async def scenario() -> None:
        state = await world.registry.load("triage", one.path)
        assert (state["state"], state["digest"], state["kind"]) == ("ready", one.digest, "diag")
        assert (state["default_n_samples"], state["max_n_samples"], state["alias_of"]) == (2, 4, None)
        digest8, method = one.digest.removeprefix("sha256:")[:8], one.config.method
        assert world.count("credence_adapter_info", adapter="triage", method=method, digest8=digest8) == 1
        go, asked = asyncio.Event(), asyncio.Event()
        old = world.request("triage", go)
        await asyncio.sleep(0)
        state = await world.registry.load("triage", two.path, replace=True)
        assert state["digest"] == two.digest
        new = world.request("triage", go)
        await asyncio.sleep(0)
        assert {(s["name"], s["state"], s["digest"]) for s in world.registry.list()} == {
            ("triage", "ready", two.digest),
            ("triage", "draining", one.digest),
        }
        assert set(world.means.held.values()) == {one.digest, two.digest} == world.stored
        go.set()
        assert (await old, await new) == (one.digest, two.digest)
        await world.registry.settled()
        assert set(world.means.held.values()) == {two.digest} == world.stored
        assert {slot.ref.digest for slot in world.samples.held.values()} == {two.digest}
        assert world.count("credence_adapter_info", adapter="triage", method=method, digest8=digest8) is None
        assert (await world.registry.remove("triage"))["state"] == "draining"
        with pytest.raises(BadRequest, match="no posterior"):
            world.service.plan("triage", UncertaintyOptions())
        await world.registry.settled()
        assert not world.means.held and not world.samples.held and not world.means.published and not world.stored
        assert world.registry.list() == []
        assert not asked.is_set()

    run(scenario)


def test_an_alias_is_promoted_and_shares_the_artifact(world: World, artifacts: dict[str, Artifact]) -> None:
    async def scenario() -> None:
        await world.registry.load("v1", artifacts["one"].path)
        await world.registry.load("v2", artifacts["two"].path)
        state = await world.registry.promote("live", "v1")
        assert (state["name"], state["alias_of"], state["digest"]) == ("live", "v1", artifacts["one"].digest)
        assert world.means.published["live"] == world.means.published["v1"]
        assert len(world.means.held) == 2
        assert (await world.registry.promote("live", "v2"))["digest"] == artifacts["two"].digest
        await world.registry.remove("v2")
        await world.registry.settled()
        # The alias holds the artifact although its target's name is gone.
        assert world.adapters["live"].artifact.digest == artifacts["two"].digest in world.means.held.values()
        await world.registry.remove("live")
        await world.registry.settled()
        assert set(world.means.held.values()) == {artifacts["one"].digest}

    run(scenario)


def test_an_artifact_that_comes_back_while_it_drains_stays(world: World, artifacts: dict[str, Artifact]) -> None:
    async def scenario() -> None:
        await world.registry.load("triage", artifacts["one"].path)
        go = asyncio.Event()
        old = world.request("triage", go)
        await asyncio.sleep(0)
        await world.registry.remove("triage")
        await world.registry.load("again", artifacts["one"].path)
        assert len(world.means.held) == 1, "the mean that was draining is used again"
        assert [state["state"] for state in world.registry.list()] == ["ready"]
        go.set()
        await old
        await world.registry.settled()
        assert world.stored == {artifacts["one"].digest} == set(world.means.held.values())
        assert await world.request("again", go) == artifacts["one"].digest

    run(scenario)


def test_what_outlasts_the_drain_is_aborted(world: World, artifacts: dict[str, Artifact]) -> None:
    async def scenario() -> None:
        await world.registry.load("triage", artifacts["one"].path)
        await world.registry.load("other", artifacts["two"].path)
        go = asyncio.Event()
        stuck, other = world.request("triage", go), world.request("other", go)
        await asyncio.sleep(0)
        assert (await world.registry.remove("triage", drain_s=0.05))["requests_in_flight"] == 1
        with pytest.raises(Unavailable, match="taken away"):
            await stuck
        assert not other.done()
        go.set()
        assert await other == artifacts["two"].digest
        await world.registry.settled()
        assert set(world.means.held.values()) == {artifacts["two"].digest}

    run(scenario)


def test_a_replaced_version_has_all_the_time_it_needs(
    world: World, artifacts: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a name that is taken away has a limit: a move never costs anybody an answer."""
    monkeypatch.setattr(adapter_registry, "DEFAULT_DRAIN_S", 0.0)

    async def scenario() -> None:
        await world.registry.load("triage", artifacts["one"].path)
        await world.registry.load("other", artifacts["three"].path)
        go = asyncio.Event()
        replaced = world.request("triage", go)
        await asyncio.sleep(0)
        await world.registry.load("triage", artifacts["two"].path, replace=True)
        promoted = world.request("triage", go)
        await asyncio.sleep(0)
        await world.registry.promote("triage", "other")
        await asyncio.sleep(0.05)
        assert not replaced.done() and not promoted.done()
        go.set()
        assert (await replaced, await promoted) == (artifacts["one"].digest, artifacts["two"].digest)
        await world.registry.settled()
        assert set(world.means.held.values()) == {artifacts["three"].digest}

    run(scenario)


@pytest.mark.parametrize(
    "fault", ["artifact", "rank", "modules", "shape", "layers", "mean", "samples", "canary", "crash"]
)
def test_a_refusal_changes_nothing(world: World, artifacts: dict[str, Artifact], tmp_path: Path, fault: str) -> None:
    bad = tmp_path / "bad"
    n_out, n_in = SHAPES["self_attn.q_proj"]
    shape: dict[str, Any] = {
        "rank": {"rank": 9},
        "modules": {"modules": ("self_attn.v_proj",)},
        "shape": {"shapes": {"self_attn.q_proj": (n_out, n_in // 2)}},
        "layers": {"layers": 3},
    }.get(fault, {})
    make_artifact(bad, seed=9, **{**SMALL, **shape})
    if fault == "artifact":
        data = bytearray((bad / "posterior.safetensors").read_bytes())
        data[-1] ^= 1
        (bad / "posterior.safetensors").write_bytes(data)

    async def scenario() -> None:
        await world.registry.load("triage", artifacts["one"].path)
        held = dict(world.means.held)
        world.means.broken = fault == "mean"
        world.samples.broken = {0} if fault == "samples" else set()
        if fault == "canary":
            world.canary_error = ArtifactRefused("no answer", code="engine")
        if fault == "crash":
            world.canary_error = RuntimeError("nobody knows this error")
        for name, replace in (("triage", True), ("fresh", False)):
            with pytest.raises(RuntimeError if fault == "crash" else ServeError) as caught:
                await world.registry.load(name, bad, replace=replace)
            if isinstance(caught.value, ServeError):
                assert caught.value.status == (503 if fault == "samples" else 422)
        assert world.registry.get("triage")["digest"] == artifacts["one"].digest
        failed = world.registry.get("fresh")
        assert failed["state"] == "failed" and failed["reason"]
        assert world.means.held == held
        assert world.stored == {artifacts["one"].digest}
        assert {slot.ref.digest for slot in world.samples.held.values()} == {artifacts["one"].digest}
        assert world.count("credence_adapter_loads_total", result="refused") == 2
        expected = 2 if fault == "artifact" else 0
        assert world.count("credence_adapter_integrity_failures_total", reason="hash_mismatch") == expected
        assert (await world.registry.remove("fresh"))["state"] == "removed"
        world.means.broken, world.samples.broken, world.canary_error = False, set(), None
        assert (await world.registry.load("fresh", artifacts["two"].path))["state"] == "ready"

    run(scenario)


def test_names_and_room(world: World, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    async def scenario() -> None:
        registry = world.registry
        for name in ("one", "two", "three"):
            await registry.load(name, artifacts[name].path)
        with pytest.raises(Conflict, match="larger --max-adapters"):
            await registry.load("four", make_artifact(tmp_path / "four", seed=4, **SMALL).path)
        assert not (Path(world.config.state_dir) / "artifacts" / "four").exists() and len(world.stored) == 3
        four = await registry.load("one", tmp_path / "four", replace=True)
        assert four["state"] == "ready", "a name can move on a full server"
        await registry.settled()
        assert len(world.stored) == len(world.means.held) == 3
        with pytest.raises(Conflict, match="replace: true"):
            await registry.load("one", artifacts["two"].path)
        with pytest.raises(Conflict, match="base model"):
            await registry.load("base", artifacts["two"].path, replace=True)
        with pytest.raises(BadRequest, match="must match"):
            await registry.load("../one", artifacts["two"].path)
        with pytest.raises(BadRequest, match="the alias itself"):
            await registry.promote("one", "one")
        with pytest.raises(NotFound, match="ready are one, three, two"):
            await registry.promote("one", "nothing")
        for call in (registry.remove("nothing"), asyncio.to_thread(registry.get, "nothing")):
            with pytest.raises(NotFound):
                await call  # type: ignore[misc]

    run(scenario)


def test_a_merged_model_keeps_its_adapter(tmp_path: Path, artifacts: dict[str, Artifact]) -> None:
    world = World(tmp_path, merged=True, max_adapters=None)

    async def scenario() -> None:
        for call in (
            world.registry.load("a", artifacts["one"].path),
            world.registry.promote("a", "b"),
            world.registry.remove("a"),
        ):
            with pytest.raises(Conflict, match="merged model"):
                await call

    run(scenario)


def test_a_thousand_cycles_leave_nothing(world: World, artifacts: dict[str, Artifact]) -> None:
    """The folders are links to one copy: copying is load_artifact's, tested elsewhere."""
    descriptors = len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        for cycle in range(1000):
            name = ("one", "two", "three")[cycle % 3]
            await world.registry.load("triage", artifacts[name].path, replace=cycle % 5 != 0)
            go = asyncio.Event()
            go.set()
            assert await world.request("triage", go) == artifacts[name].digest
            if cycle % 5 == 4:
                await world.registry.remove("triage")
        await world.registry.settled()

    run(scenario)
    assert not world.means.held and not world.samples.held and not world.stored and not len(world.in_flight)
    assert not world.service._slots._pinned
    assert world.service._slots.counts() == {"leased": 0, "resident": 0, "free": world.config.num_slots}
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_watched_folder(world: World, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()

    async def scenario() -> None:
        await world.registry.load("triage", artifacts["three"].path)
        folder = AdapterFolder(watched, world.registry)

        async def steps(count: int = 2) -> dict[str, tuple[str, str | None]]:
            for _ in range(count):
                await folder.step()
            return {s["name"]: (s["state"], s["digest"]) for s in world.registry.list() if s["state"] != "draining"}

        shutil.copytree(artifacts["one"].path, watched / "live")
        shutil.copytree(artifacts["one"].path, watched / "Not a name")
        shutil.copytree(artifacts["one"].path, watched / "triage")
        shutil.copytree(artifacts["one"].path, watched / "half", ignore=shutil.ignore_patterns("manifest.json"))
        assert "live" not in await steps(1), "it may still be growing"
        assert await steps(1) == {
            "live": ("ready", artifacts["one"].digest),
            "triage": ("ready", artifacts["three"].digest),
        }
        shutil.rmtree(watched / "live")
        shutil.copytree(artifacts["two"].path, watched / "live")
        assert (await steps())["live"] == ("ready", artifacts["two"].digest)
        good = (watched / "live" / "posterior.json").read_bytes()
        (watched / "live" / "posterior.json").write_bytes(good + b" ")
        shutil.copytree(artifacts["one"].path, watched / "bad")
        (watched / "bad" / "posterior.json").write_bytes(b"{}")
        after = await steps()
        assert after["live"] == ("ready", artifacts["two"].digest), "the old version keeps serving"
        assert after["bad"] == ("failed", None)
        refused = world.count("credence_adapter_loads_total", result="refused")
        await steps(3)
        assert world.count("credence_adapter_loads_total", result="refused") == refused == 2
        shutil.rmtree(watched / "bad")
        shutil.rmtree(watched / "live")
        assert await steps() == {"triage": ("ready", artifacts["three"].digest)}
        shutil.rmtree(watched)
        assert "triage" in await steps()

    run(scenario)


def test_the_watched_folder_owns_what_came_from_it(
    world: World, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """At the start: a given adapter is not the folder's to take away, and a change during the start is seen."""
    watched = tmp_path / "watched"
    shutil.copytree(artifacts["two"].path, watched / "live")

    async def scenario() -> None:
        await world.registry.load("given", artifacts["three"].path)
        await world.registry.load("live", artifacts["one"].path)  # the folder's content when the server read it
        folder = AdapterFolder(watched, world.registry, ["live"])
        await folder.step()
        assert {s["name"]: s["digest"] for s in world.registry.list() if s["state"] == "ready"} == {
            "given": artifacts["three"].digest,
            "live": artifacts["two"].digest,
        }

    run(scenario)


def test_the_watched_folder_tries_again_when_the_server_was_busy(
    world: World, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()

    async def scenario() -> None:
        folder = AdapterFolder(watched, world.registry)
        shutil.copytree(artifacts["one"].path, watched / "live")
        world.samples.broken = {0}
        for _ in range(3):
            await folder.step()
        assert world.registry.get("live")["state"] == "failed"
        world.samples.broken = set()
        await folder.step()
        assert world.registry.get("live")["state"] == "ready"

    run(scenario)


def test_paths_stay_below_the_roots(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    roots = (str(root),)
    assert below_a_root(str(root / "a"), roots) == root / "a"
    assert below_a_root(str(root / "missing"), roots) == root / "missing"
    for path in (
        outside,
        root / "link",
        root / ".." / "outside",
        "/",
        "relative",
        "/etc/passwd",
        str(root) + "-other",
        "a\0b",
    ):
        with pytest.raises(Forbidden, match="not below"):
            below_a_root(str(path), roots)
    with pytest.raises(Forbidden, match="--adapter-root"):
        below_a_root(str(root / "a"), ())
