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
from credence.serve.ensemble import Ensemble, EnsembleService, Gang, ServedAdapter
from credence.serve.errors import BadRequest, ConfigurationError, EnsembleFailed, Unavailable
from credence.serve.facts import CURRENT, RequestFacts
from credence.serve.metrics import Metrics
from credence.serve.report import describe, token_details
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
        "map": make_artifact(folder / "map", form="point", **small),
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


def test_a_keys_ceiling_bounds_the_defaults_only(world: World) -> None:
    plan = world.service.plan
    assert plan("triage", UncertaintyOptions(), 3).num_samples == 3
    assert plan("triage", UncertaintyOptions(), 100).num_samples == 4
    assert plan("map", UncertaintyOptions(), 3).num_samples == 1
    auto = UncertaintyOptions(n_samples="auto", mode="generate")
    assert (plan("triage", auto, 3).num_samples, plan("triage", auto).num_samples) == (3, 8)


def test_the_most_samples_of_a_request(world: World) -> None:
    most = world.service.most_samples
    auto = UncertaintyOptions(n_samples="auto", mode="generate")
    assert [most(model, UncertaintyOptions()) for model in ("triage", "map", "absent", None, 7)] == [4, 1, 8, 8, 8]
    assert [most(model, auto) for model in ("triage", "map", "absent")] == [8, 1, 8]
    assert most("triage", UncertaintyOptions(n_samples=3)) == 3


def test_the_work_of_gangs_is_noted_also_when_they_are_broken_off(world: World) -> None:
    facts = RequestFacts(request_id="r", method="POST", path="/", started_s=0.0)

    async def run() -> None:
        CURRENT.set(facts)
        async with world.service.ensemble(world.plan(n_samples=2)) as ensemble:
            done, broken = ensemble.gang([1, 2, 3], max_tokens=4), ensemble.gang([1, 2], max_tokens=4)
            scored = ensemble.gang([1, 2, 3, 4], targets=[(2, 7)])
            done.token_ids, broken.token_ids, scored.token_ids = [5, 6], [5], [9]
            ensemble.finished(done)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        asyncio.run(run())
    assert facts.sample_prompt_tokens == 2 * (3 + 2 + 4)
    assert facts.sample_completion_tokens == 2 * (2 + 1)


def test_an_ensemble_answers_with_every_member_and_no_more(tmp_path: Path) -> None:
    small = {"modules": ("self_attn.q_proj",), "rank": 2, "alpha": 3}
    members = make_artifact(tmp_path / "members", form="ensemble", **small)
    mixture = make_artifact(tmp_path / "mixture", form="mixture", **small)
    world = World({"members": members, "mixture": mixture}, tmp_path)
    assert (world.plan("members").num_samples, world.plan("mixture").num_samples) == (3, 4)
    with pytest.raises(
        BadRequest, match=r"1 to 3 for members \(an ensemble of 3 members, each of which is one sample\), got 4"
    ):
        world.plan("members", n_samples=4)
    points, draws = (ServedAdapter(name=name, artifact=a) for name, a in (("members", members), ("mixture", mixture)))
    # A member is the same under every seed and tau, and takes one slot.
    assert points.sample(7, 1, 0.5) == points.sample(0, 4, 2.0) == points.sample(0, 1, 1.0)
    assert points.sample(0, 1, 1.0) != points.sample(0, 2, 1.0)
    assert draws.sample(7, 1, 0.5) != draws.sample(0, 1, 0.5) != draws.sample(0, 4, 0.5)


@pytest.mark.parametrize(
    ("model", "options", "param", "said"),
    [
        ("base", {}, "model", "GET /v1/models lists those with one"),
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
        ({"sample_slots": 7}, "--sample-slots 7"),
    ],
)
def test_a_server_that_could_not_hold_the_largest_ensemble_does_not_start(
    adapters: dict[str, Artifact], tmp_path: Path, changes: dict, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        World(adapters, tmp_path, **changes)


def test_a_gang_that_could_never_run_is_refused(adapters: dict[str, Artifact], tmp_path: Path) -> None:
    world = World(adapters, tmp_path, max_scored_rows=80)

    async def scenario() -> None:
        async with world.service.ensemble(world.plan(n_samples=8)) as ensemble:
            ensemble.gang(range(100), max_tokens=76)  # 8 (11 + 1) = 96 of 100 blocks
            with pytest.raises(BadRequest, match="need 104 KV blocks, the server has 100"):
                ensemble.gang(range(100), max_tokens=80)
            ensemble.gang(range(50), targets=[(position, 1) for position in range(10)] * 2)
            with pytest.raises(BadRequest, match="11 tokens under 8 samples makes 88 rows, the server takes 80"):
                ensemble.gang(range(50), targets=[(position, 1) for position in range(11)])
            with pytest.raises(BadRequest, match="11 tokens under 8 samples"):
                ensemble.check_fits(20, 11)

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == [], "the statistics files of the gangs that could run are gone"


def test_samples_are_drawn_once_and_leases_end(world: World) -> None:
    async def scenario() -> None:
        for adapter in world.service.adapters.values():
            await world.service.make_resident(adapter)
        assert world.engine.loads == 13, "four samples, and the mean of the adapter without posterior"
        for _ in range(3):
            async with world.service.ensemble(world.plan()) as ensemble:
                assert [slot.ref.index for slot in ensemble.slots] == [0, 1, 2, 3]
                assert {slot.lora_id for slot in ensemble.slots} <= set(world.engine.held)
                assert world.count("credence_sample_slots", state="leased") == 4
        assert world.engine.loads == 13

    asyncio.run(scenario())
    assert world.count("credence_sample_slots", state="leased") == 0
    assert world.count("credence_inflight_requests") == 0


def test_at_tau_zero_all_members_share_the_mean(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan(tau=0.0, n_samples=8)) as ensemble:
            assert len(ensemble.slots) == 8
            assert len({slot.lora_id for slot in ensemble.slots}) == 1

    asyncio.run(scenario())


def test_the_engine_never_holds_more_than_the_slots(world: World) -> None:
    async def scenario() -> None:
        for seed in range(10):
            async with world.service.ensemble(world.plan(seed=seed, n_samples=8)) as ensemble:
                assert {slot.lora_id for slot in ensemble.slots} <= set(world.engine.held)
                assert len(world.engine.held) <= world.config.num_slots

    asyncio.run(scenario())


def test_many_adapters_share_few_slots(adapters: dict[str, Artifact], tmp_path: Path) -> None:
    """Eight slots for four adapters of four samples each: every request gets its own samples, whoever was there before."""
    world = World(adapters, tmp_path, sample_slots=8)

    async def scenario() -> None:
        for adapter in world.service.adapters.values():
            await world.service.make_resident(adapter)
        for turn in range(12):
            name = ("triage", "labels", "choices", "map")[turn % 4]
            async with world.service.ensemble(world.plan(name)) as ensemble:
                digest = adapters[name].digest
                assert {slot.ref.digest for slot in ensemble.slots} == {digest}
                for slot in ensemble.slots:
                    assert world.engine.held[slot.lora_id] == slot
                assert len(world.engine.held) <= 8

    asyncio.run(scenario())


def test_a_broken_sample_fails_the_request_or_degrades_it(world: World) -> None:
    world.engine.broken = {1, 2}

    async def scenario() -> None:
        with pytest.raises(Unavailable, match="2 of 4 posterior samples could not be drawn, at least 4"):
            async with world.service.ensemble(world.plan()):
                pass
        async with world.service.ensemble(world.plan(min_samples=2)) as ensemble:
            assert [slot.ref.index for slot in ensemble.slots] == [0, 3]
        world.engine.broken = set()
        async with world.service.ensemble(world.plan()) as ensemble:
            assert len(ensemble.slots) == 4, "a sample that failed is tried again"

    asyncio.run(scenario())
    assert world.count("credence_degraded_requests_total", reason="sample_failed") == 1
    assert world.count("credence_sample_slots", state="leased") == 0


def test_a_request_cancelled_while_its_samples_are_drawn_leaves_nothing_half_drawn(world: World) -> None:
    world.engine.delay_s = 0.05

    async def once() -> None:
        async with world.service.ensemble(world.plan()):
            pass

    async def scenario() -> None:
        task = asyncio.create_task(once())
        await asyncio.sleep(0.07)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.engine.delay_s = 0.0
        async with world.service.ensemble(world.plan()) as ensemble:
            assert {slot.lora_id for slot in ensemble.slots} <= set(world.engine.held)

    asyncio.run(scenario())
    assert world.count("credence_inflight_requests") == 0


def test_rows_in_flight_are_bounded(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan(n_samples=4), sequences=4):
            with pytest.raises(Unavailable, match="16 of 20 member rows") as caught:
                async with world.service.ensemble(world.plan(n_samples=8)):
                    pass
            assert caught.value.status == 503
            assert caught.value.headers() == {"Retry-After": "1"}
        async with world.service.ensemble(world.plan(n_samples=8)):
            pass
        with pytest.raises(BadRequest, match="8 samples of 3 sequences make 24 rows, the server takes 20"):
            async with world.service.ensemble(world.plan(n_samples=8), sequences=3):
                pass

    asyncio.run(scenario())


def test_an_adaptive_request_draws_in_stages(world: World) -> None:
    plan = world.plan(n_samples="auto", mode="generate")
    assert (plan.num_samples, plan.adaptive, plan.tau) == (8, True, 3.0)

    async def scenario() -> None:
        async with world.service.ensemble(plan) as ensemble:
            assert [slot.ref.index for slot in ensemble.slots] == [0, 1, 2, 3]
            await ensemble.draw(6)
            await ensemble.draw(6)
            assert [slot.ref.index for slot in ensemble.slots] == [0, 1, 2, 3, 4, 5]
            assert world.count("credence_samples_requested_total") == 6
            world.engine.broken = {7}
            with pytest.raises(Unavailable, match="1 of 8 posterior samples"):
                await ensemble.draw(8)

    asyncio.run(scenario())
    assert world.count("credence_sample_slots", state="leased") == 0


def test_sequences_of_one_request_have_their_own_token_seeds(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan()) as ensemble:
            ensemble.token_seed = 5
            seeds = [ensemble.gang([1], sequence=number).token_seed for number in range(50)]
            assert seeds[0] == 5 and len(set(seeds)) == 50
            assert all(0 <= seed < 2**63 for seed in seeds)

    asyncio.run(scenario())


def test_waiting_in_the_scheduler_is_measured_where_it_is_known(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan()) as ensemble:
            for waited in (0.5, None):
                gang = ensemble.gang([1, 2, 3], max_tokens=2)
                gang.token_ids = [7, 8]
                if waited is not None:
                    gang.stats.write_wait(waited)
                ensemble.finished(gang)
            assert (ensemble.sample_prompt_tokens, ensemble.sample_completion_tokens) == (24, 16)
            scored = ensemble.gang([1, 2, 3], targets=[(2, 5)])
            scored.token_ids = [9]
            ensemble.finished(scored)
            assert (ensemble.sample_prompt_tokens, ensemble.sample_completion_tokens) == (36, 16)

    asyncio.run(scenario())
    assert world.count("credence_gang_wait_seconds_count", k="4") == 1
    assert world.count("credence_gang_wait_seconds_sum", k="4") == 0.5


def records(ensemble: Ensemble, tokens: list[int], steps: int) -> Gang:
    """A gang that has generated ``tokens``, and what the worker would write: token 10 + t with known scores."""
    gang = ensemble.gang([1], max_tokens=8)
    gang.token_ids = tokens
    assert gang.stats is not None
    for step in range(steps):
        members = [math.log(0.5) + 0.1 * index for index in range(gang.num_samples)]
        gang.stats.write(step, 10 + step, math.log(0.5), 0.6, 0.4, 0.2, 0.25, members)
    return gang


def test_the_response_object(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan(n_samples=2, granularity="token", threshold=0.6)) as ensemble:
            gang = records(ensemble, [10, 11, 12], 3)
            document = describe(ensemble.plan, 2, gang.table(), ["a", "b", "c"]).to_json()
            assert [token.logprob for token in token_details(gang.table(2), ["c"])] == [pytest.approx(math.log(0.5))]
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
        async with world.service.ensemble(world.plan()) as ensemble:
            with pytest.raises(EnsembleFailed, match="lock-step"):
                records(ensemble, tokens, steps).table()

    asyncio.run(scenario())


def test_a_scoring_gang_expects_its_targets(world: World) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan()) as ensemble:
            for tokens, fits in (([10, 11], True), ([11, 10], False)):
                gang = ensemble.gang([1], targets=[(0, token) for token in tokens])
                for step in range(2):
                    gang.stats.write(step, 10 + step, -1.0, 0.6, 0.4, 0.2, 0.25, [-1.0] * 4)
                gang.token_ids = [99]  # what the engine happened to sample after the text
                if fits:
                    assert len(gang.table()) == 2
                else:
                    with pytest.raises(EnsembleFailed, match="lock-step"):
                        gang.table()

    asyncio.run(scenario())


def test_an_empty_answer_has_no_scores(world: World) -> None:
    document = describe(world.plan(), 4, None, []).to_json()
    assert document["total"] is None and document["confidence"] is None and document["sequence"] is None


def test_no_room_for_statistics(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world.service.ensemble(world.plan()) as ensemble:
            tmp_path.rename(tmp_path.with_name("elsewhere"))
            with pytest.raises(Unavailable, match="no room for the statistics"):
                ensemble.gang([1])

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
        async with world.service.ensemble(world.plan(model, n_samples=2, **options)) as ensemble:
            gang = ensemble.gang([1], max_tokens=8)
            gang.token_ids = [10, 10]
            for step, value in enumerate((calibrated_log_prob, math.log(0.01))):
                gang.stats.write(step, 10, math.log(0.5), 0.6, 0.4, 0.2, 0.0, [0.0, 0.0], calibrated_log_prob=value)
            document = describe(ensemble.plan, 2, gang.table(), ["a", "b"]).to_json()
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
        async with world.service.ensemble(world.plan("labels", **options)) as ensemble:
            gang = ensemble.gang([1])
            assert gang.temperature == temperature
            assert gang.plan.adapter.support == (10, 40)

    asyncio.run(scenario())
