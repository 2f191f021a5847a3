"""The ensemble service with a fake engine: plans, leases, failures, and the response object."""

import asyncio
import itertools
import math
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from credence.adapters import Artifact
from credence.serve.config import ServeConfig
from credence.serve.engine import EngineLimits, SampleLoadError
from credence.serve.ensemble import EnsembleService, Gang, ServedAdapter, describe
from credence.serve.errors import BadRequest, ConfigurationError, EnsembleFailed, Unavailable
from credence.serve.metrics import Metrics
from credence.serve.samples import Slot
from credence.serve.schemas import UncertaintyOptions
from tests.tiny import make_artifact


class FakeEngine:
    """Holds ids; fails for the sample indices in ``broken``."""

    def __init__(self) -> None:
        self.held: dict[int, Slot] = {}
        self.loads = 0
        self.broken: set[int] = set()
        self.delay_s = 0.0

    async def load(self, slot: Slot) -> None:
        self.loads += 1
        await asyncio.sleep(self.delay_s)
        if slot.ref.index in self.broken:
            raise SampleLoadError("broken")
        self.held[slot.lora_id] = slot

    async def unload(self, lora_id: int) -> None:
        self.held.pop(lora_id, None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("adapters")
    small = {"modules": ("self_attn.q_proj",), "rank": 2, "alpha": 3}
    return {
        "triage": make_artifact(folder / "triage", tau={8: 3.0, 32: 5.0}, **small),
        "map": make_artifact(folder / "map", kind="point", **small),
        "labels": make_artifact(
            folder / "labels",
            temperature={0: 0.5, 2: 1.5, 8: 3.0},
            training={"format": "label", "label_tokens": [10, 40]},
            **small,
        ),
        "choices": make_artifact(folder / "choices", temperature={2: 1.5}, training={"format": "choices"}, **small),
    }


class World:
    """A service and what surrounds it."""

    def __init__(self, adapters: dict[str, Artifact], folder: Path, **changes: object) -> None:
        settings: dict[str, object] = {"default_samples": 4, "max_samples": 8, "max_inflight_rows": 20, **changes}
        self.config = ServeConfig.model_validate(
            {
                **settings,
                "adapters": {name: str(artifact.path) for name, artifact in adapters.items()},
                "state_dir": str(folder),
                "stats_dir": str(folder),
            }
        )
        self.engine = FakeEngine()
        self.registry = CollectorRegistry()
        self.service = EnsembleService(
            config=self.config,
            adapters={name: ServedAdapter(name=name, artifact=artifact) for name, artifact in adapters.items()},
            engine=self.engine,
            limits=EngineLimits(max_num_seqs=16, max_loras=10, num_kv_blocks=101, block_size=16),
            metrics=Metrics(self.registry, []),
            lora_ids=itertools.count(1),
        )

    def plan(self, model: str = "triage", **options: object) -> object:
        return self.service.plan(model, UncertaintyOptions.model_validate(options))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def world(adapters: dict[str, Artifact], tmp_path: Path) -> World:
    return World(adapters, tmp_path)


def test_defaults_come_from_the_server_and_the_artifact(world: World) -> None:
    plan = world.plan()
    assert (plan.num_samples, plan.min_samples, plan.tau, plan.seed) == (4, 4, 3.0, 0)
    assert world.plan(tau=0.5, seed=9, n_samples=2, min_samples=1).tau == 0.5
    assert world.plan("map").num_samples == 1


@pytest.mark.parametrize(
    ("model", "options", "param", "said"),
    [
        ("base", {}, "model", "models with one: choices, labels, map, triage"),
        ("triage", {"n_samples": 9}, "uncertainty.n_samples", "1 to 8 for triage, got 9"),
        ("map", {"n_samples": 2}, "uncertainty.n_samples", "no posterior"),
        ("triage", {"n_samples": 2, "min_samples": 3}, "uncertainty.min_samples", "at most n_samples = 2"),
    ],
)
def test_bad_plans(world: World, model: str, options: dict, param: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said) as caught:
        world.plan(model, **options)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_samples": 11}, "--max-loras"),
        ({"max_samples": 17}, "--max-num-seqs"),
        ({"default_samples": 9}, "--default-samples 9"),
    ],
)
def test_a_server_that_could_not_hold_the_largest_ensemble_does_not_start(
    adapters: dict[str, Artifact], tmp_path: Path, changes: dict, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        World(adapters, tmp_path, **changes)


def test_a_gang_that_could_never_fit_the_cache_is_refused(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan(n_samples=8)) as gang:
            world.service.check_fits(gang, 100, 76)  # 8 (11 + 1) = 96 of 100 blocks
            with pytest.raises(BadRequest, match="need 104 KV blocks, the server has 100"):
                world.service.check_fits(gang, 100, 80)

    asyncio.run(scenario())


def test_samples_are_drawn_once_and_leases_end(world: World) -> None:
    async def scenario() -> None:
        await world.service.warm_up()
        assert world.engine.loads == 13, "four samples, and the mean of the adapter without posterior"
        for _ in range(3):
            async with world.service.gang(world.plan()) as gang:
                assert [slot.ref.index for slot in gang.slots] == [0, 1, 2, 3]
                assert {slot.lora_id for slot in gang.slots} <= set(world.engine.held)
                assert world.count("credence_sample_slots", state="leased") == 4
        assert world.engine.loads == 13

    asyncio.run(scenario())
    assert world.count("credence_sample_slots", state="leased") == 0
    assert world.count("credence_inflight_requests") == 0


def test_at_tau_zero_all_members_share_the_mean(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan(tau=0.0, n_samples=8)) as gang:
            assert gang.num_samples == 8
            assert len({slot.lora_id for slot in gang.slots}) == 1

    asyncio.run(scenario())


def test_the_engine_never_holds_more_than_the_slots(world: World) -> None:
    async def scenario() -> None:
        for seed in range(10):
            async with world.service.gang(world.plan(seed=seed, n_samples=8)) as gang:
                assert {slot.lora_id for slot in gang.slots} <= set(world.engine.held)
                assert len(world.engine.held) <= world.config.num_slots

    asyncio.run(scenario())


def test_a_broken_sample_fails_the_request_or_degrades_it(world: World) -> None:
    world.engine.broken = {1, 2}

    async def scenario() -> None:
        with pytest.raises(Unavailable, match="2 of 4 posterior samples could not be drawn, at least 4"):
            async with world.service.gang(world.plan()):
                pass
        async with world.service.gang(world.plan(min_samples=2)) as gang:
            assert [slot.ref.index for slot in gang.slots] == [0, 3]
        world.engine.broken = set()
        async with world.service.gang(world.plan()) as gang:
            assert gang.num_samples == 4, "a sample that failed is tried again"

    asyncio.run(scenario())
    assert world.count("credence_degraded_requests_total", reason="sample_failed") == 1
    assert world.count("credence_sample_slots", state="leased") == 0


def test_a_request_cancelled_while_its_samples_are_drawn_leaves_nothing_half_drawn(world: World) -> None:
    world.engine.delay_s = 0.05

    async def once() -> None:
        async with world.service.gang(world.plan()):
            pass

    async def scenario() -> None:
        task = asyncio.create_task(once())
        await asyncio.sleep(0.07)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.engine.delay_s = 0.0
        async with world.service.gang(world.plan()) as gang:
            assert {slot.lora_id for slot in gang.slots} <= set(world.engine.held)

    asyncio.run(scenario())
    assert world.count("credence_inflight_requests") == 0


def test_rows_in_flight_are_bounded(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan(n_samples=8)), world.service.gang(world.plan(n_samples=8)):
            with pytest.raises(Unavailable, match="16 of 20 member rows") as caught:
                async with world.service.gang(world.plan(n_samples=8)):
                    pass
            assert caught.value.status == 503
            assert caught.value.headers() == {"Retry-After": "1"}
        async with world.service.gang(world.plan(n_samples=8)):
            pass

    asyncio.run(scenario())


def records(gang: Gang, service: EnsembleService, steps: int) -> None:
    """What the worker would write: token 10 + t with known scores."""
    service.open_stats(gang, 8)
    assert gang.stats is not None
    for step in range(steps):
        members = [math.log(0.5) + 0.1 * index for index in range(gang.num_samples)]
        gang.stats.write(step, 10 + step, math.log(0.5), 0.6, 0.4, 0.2, 0.25, members)


def test_the_response_object(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan(n_samples=2, granularity="token", threshold=0.6)) as gang:
            records(gang, world.service, 3)
            document = describe(gang, [10, 11, 12], ["a", "b", "c"]).to_json()
            path = Path(gang.stats.path)
            assert path.exists()
        assert not path.exists()
        assert document["total"] == pytest.approx(0.6)
        assert document["aleatoric"] == pytest.approx(0.4)
        assert document["epistemic"] == pytest.approx(0.2)
        assert document["confidence"] == pytest.approx(0.5)
        assert (document["calibrated"], document["flag"]) == (False, "low_confidence")
        assert document["sequence"]["mean_logprob"] == pytest.approx(math.log(0.5))
        assert document["sequence"]["logprob_std"] == pytest.approx(0.05)
        assert [token["token"] for token in document["tokens"]] == ["a", "b", "c"]
        assert document["adapter"]["name"] == "triage"
        assert (document["n_samples"], document["n_effective"], document["tau"]) == (2, 2, 3.0)

    asyncio.run(scenario())


@pytest.mark.parametrize(("steps", "tokens"), [(2, [10, 11, 12]), (3, [10, 11, 99]), (0, [10])])
def test_a_missing_or_foreign_record_is_an_error_never_a_number(world: World, steps: int, tokens: list[int]) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan()) as gang:
            records(gang, world.service, steps)
            with pytest.raises(EnsembleFailed, match="lock-step"):
                describe(gang, tokens, ["x"] * len(tokens))

    asyncio.run(scenario())


def test_no_statistics_at_all(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan()) as gang:
            with pytest.raises(EnsembleFailed, match="no statistics"):
                describe(gang, [1], ["x"])

    asyncio.run(scenario())


def test_an_empty_answer_has_no_scores(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan()) as gang:
            document = describe(gang, [], []).to_json()
        assert document["total"] is None and document["confidence"] is None and document["sequence"] is None

    asyncio.run(scenario())


def test_no_room_for_statistics(world: World) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan()) as gang:
            Path(world.config.stats_dir, gang.gang_id).write_text("in the way")
            with pytest.raises(Unavailable, match="no room for the statistics"):
                world.service.open_stats(gang, 4)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("model", "options", "calibrated_log_prob", "confidence", "calibrated"),
    [
        ("labels", {}, math.log(0.7), 0.7, True),
        ("labels", {}, math.nan, 0.5, False),  # the answer is none of the labels
        ("labels", {"calibrated": False}, math.log(0.7), 0.5, False),
        ("triage", {}, math.log(0.7), 0.5, False),  # nothing is stored
        ("choices", {}, math.log(0.7), 0.5, False),  # the server does not know the row's letters
    ],
)
def test_confidence_uses_the_stored_calibration_where_it_applies(
    world: World, model: str, options: dict, calibrated_log_prob: float, confidence: float, calibrated: bool
) -> None:
    """A classification adapter's confidence is that of its first token, the answer."""

    async def scenario() -> None:
        async with world.service.gang(world.plan(model, n_samples=2, **options)) as gang:
            world.service.open_stats(gang, 8)
            assert gang.stats is not None
            for step, value in enumerate((calibrated_log_prob, math.log(0.01))):
                gang.stats.write(step, 10, math.log(0.5), 0.6, 0.4, 0.2, 0.0, [0.0, 0.0], calibrated_log_prob=value)
            document = describe(gang, [10, 10], ["a", "b"]).to_json()
        assert document["confidence"] == pytest.approx(confidence)
        assert document["calibrated"] is calibrated

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "temperature"), [({"n_samples": 2}, 1.5), ({"n_samples": 8}, 3.0), ({"tau": 0.0}, 0.5)]
)
def test_the_temperature_is_that_of_this_k_and_at_tau_zero_the_means(
    world: World, options: dict, temperature: float
) -> None:
    async def scenario() -> None:
        async with world.service.gang(world.plan("labels", **options)) as gang:
            assert gang.temperature == temperature
            assert gang.plan.adapter.support == (10, 40)

    asyncio.run(scenario())
