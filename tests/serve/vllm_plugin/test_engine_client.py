"""Fan-out to members: their parameters, their end, and what happens when one of them fails. No engine."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys
from vllm.v1.engine.exceptions import EngineDeadError

from credence.adapters import Artifact
from credence.serve.config import TOKEN_VARIABLE
from credence.serve.engine import SampleLoadError
from credence.serve.ensemble import Gang, Plan, ServedAdapter
from credence.serve.errors import EnsembleFailed
from credence.serve.samples import Slot
from credence.serve.schemas import UncertaintyOptions
from credence.serve.vllm_plugin.engine_client import (
    CURRENT_RUN,
    EnsembleClient,
    GangRunner,
    VllmMeans,
    lora_request_of,
    member_params,
)
from tests.tiny import make_artifact

K = 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedAdapter:
    artifact: Artifact = make_artifact(tmp_path_factory.mktemp("a") / "a", modules=("self_attn.q_proj",), rank=2)
    return ServedAdapter(name="triage", artifact=artifact)


@pytest.fixture
def gang(served: ServedAdapter, monkeypatch: pytest.MonkeyPatch) -> Gang:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    plan = Plan(adapter=served, options=UncertaintyOptions(), num_samples=K, min_samples=K, tau=1.0, seed=0)
    ids = itertools.count(1)
    slots = [Slot(lora_id=next(ids), name=f"credence-slot-{i:03d}", ref=served.sample(0, i, 1.0)) for i in range(K)]
    return Gang(
        gang_id="g",
        plan=plan,
        slots=slots,
        token_seed=99,
        prompt_token_ids=[1],
        max_tokens=3,
        num_top=2,
        targets=((0, 7),),
    )


def test_only_the_leader_makes_text_and_looks_for_stop_strings(gang: Gang) -> None:
    params = SamplingParams(
        temperature=0.7, top_p=0.9, seed=5, stop=["x"], max_tokens=7, logprobs=2, n=1, stop_token_ids=[3]
    )
    members = [member_params(gang, params, member) for member in range(K)]
    for number, member in enumerate(members):
        assert member.seed is None, "vLLM's per-request generators are not used: the processor chooses the token"
        assert member.logprobs is None and member.n == 1
        assert (member.temperature, member.top_p, member.max_tokens) == (0.7, 0.9, 7)
        assert member.stop_token_ids == [3]
        assert member.extra_args is not None
        assert member.extra_args["credence_member"] == number
        assert member.extra_args["credence_seed"] == 99
        assert member.extra_args["credence_token"] == "secret"
        assert member.extra_args["credence_top"] == 2
        assert member.extra_args["credence_targets"] == [[0, 7]]
    assert members[0].stop == ["x"] and members[0].detokenize
    assert members[0].output_kind == params.output_kind == RequestOutputKind.CUMULATIVE
    assert all(member.output_kind == RequestOutputKind.FINAL_ONLY for member in members[1:])
    assert all(member.stop == [] and not member.detokenize for member in members[1:])
    assert params.seed == 5, "the caller's parameters are not changed"


def test_constraints_are_the_leaders(gang: Gang) -> None:
    """They act on the average, which the processor gives all members; on a member they would act before averaging."""
    params = SamplingParams(
        max_tokens=7,
        min_tokens=2,
        logit_bias={3: 1.0},
        allowed_token_ids=[3, 4],
        bad_words=["x"],
        structured_outputs=StructuredOutputsParams(choice=["a"]),
    )
    params._bad_words_token_ids = [[9]]
    leader, *followers = [member_params(gang, params, member) for member in range(K)]
    assert (leader.min_tokens, leader.logit_bias, leader.allowed_token_ids) == (2, {3: 1.0}, [3, 4])
    assert leader._bad_words_token_ids == [[9]] and leader.structured_outputs is not None
    for follower in followers:
        assert (follower.min_tokens, follower.logit_bias, follower.allowed_token_ids) == (0, None, None)
        assert not follower.bad_words and not follower._bad_words_token_ids
        assert follower.structured_outputs is None


def test_prompts_are_cached_by_the_samples_content(served: ServedAdapter) -> None:
    """vLLM's prefix cache knows an adapter by name and path only; slots reuse names, so the path must tell contents apart."""

    def key(seed: int, tau: float) -> Any:
        slot = Slot(lora_id=1, name="credence-slot-000", ref=served.sample(seed, 0, tau))
        return _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=lora_request_of(slot)))

    assert key(0, 1.0) == key(0, 1.0)
    assert len({str(key(0, 1.0)), str(key(1, 1.0)), str(key(0, 2.0))}) == 3


class FakeInner:
    """Members that end after ``delays`` seconds, fail with ``failures``, or run until aborted."""

    def __init__(
        self, delays: dict[int, float], failures: dict[int, Exception] | None = None, reason: str = "length"
    ) -> None:
        self.delays, self.failures, self.reason = delays, failures or {}, reason
        self.aborts: list[list[str]] = []
        self.ended: set[str] = set()

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
        member = params.extra_args["credence_member"]
        try:
            await asyncio.sleep(self.delays.get(member, 60))
            if member in self.failures:
                raise self.failures[member]
            completion = SimpleNamespace(finish_reason=self.reason, token_ids=[5])
            yield SimpleNamespace(outputs=[completion], member=member, finished=True)
        finally:
            self.ended.add(request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborts.append(list(request_ids))


def run(inner: FakeInner, gang: Gang, cancel_after_s: float | None = None) -> Any:
    async def scenario() -> Any:
        finished: list[Gang] = []
        runner = GangRunner(inner, SimpleNamespace(finished=finished.append))  # type: ignore[arg-type]
        outputs = runner.stream(gang, {"prompt_token_ids": [1]}, SamplingParams(max_tokens=3), "r", {})

        async def consume() -> Any:
            [output] = [output async for output in outputs]
            assert finished == [gang]
            return output

        task = asyncio.ensure_future(consume())
        if cancel_after_s is not None:
            await asyncio.sleep(cancel_after_s)
            task.cancel()
        try:
            return await asyncio.wait_for(task, timeout=5)
        finally:
            await outputs.aclose()

    return asyncio.run(scenario())


def test_a_call_of_vllms_handler_reaches_the_current_request() -> None:
    class FakeRun:
        def generate(self, *arguments: Any) -> Any:
            return arguments

    run = FakeRun()
    client = EnsembleClient(SimpleNamespace(errored="theirs"))  # type: ignore[arg-type]
    token = CURRENT_RUN.set(run)  # type: ignore[arg-type]
    assert client.generate("prompt", "params", "id", lora_request=1, priority=2) == (  # type: ignore[arg-type]
        "prompt", "params", "id", {"lora_request": 1, "priority": 2}
    )  # fmt: skip
    CURRENT_RUN.reset(token)
    assert client.errored == "theirs"


def test_all_members_end_together(gang: Gang) -> None:
    inner = FakeInner(dict.fromkeys(range(K), 0.01))
    assert run(inner, gang).member == 0
    assert len(inner.ended) == K


def test_followers_are_ended_with_the_leader_in_one_message(gang: Gang) -> None:
    """A stop string is found by the leader only."""
    inner = FakeInner({0: 0.01}, reason="stop")
    run(inner, gang)
    assert inner.aborts == [["r-g-1", "r-g-2", "r-g-3"]]
    assert len(inner.ended) == K


@pytest.mark.parametrize("member", range(K))
def test_a_failing_member_fails_the_request_and_ends_the_others(gang: Gang, member: int) -> None:
    inner = FakeInner({member: 0.01}, {member: EngineDeadError()})
    with pytest.raises(EngineDeadError):
        run(inner, gang)
    [aborted] = inner.aborts
    assert len(aborted) == K - 1
    assert len(inner.ended) == K


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_ensemble_the_scheduler_ended_is_an_error(gang: Gang, reason: str) -> None:
    with pytest.raises(EnsembleFailed, match=reason):
        run(FakeInner(dict.fromkeys(range(K), 0.01), reason=reason), gang)


def test_a_cancelled_request_ends_every_member_in_one_message(gang: Gang) -> None:
    inner = FakeInner({})
    with pytest.raises(asyncio.CancelledError):
        run(inner, gang, cancel_after_s=0.05)
    assert inner.aborts == [[f"r-g-{member}" for member in range(K)]]
    assert len(inner.ended) == K


def test_the_mean_has_one_identity(served: ServedAdapter) -> None:
    """At tau = 0 all members are the mean, so they share one slot and one cache entry."""
    assert served.sample(0, 0, 0.0) == served.sample(7, 5, 0.0)


class LoraClient:
    """Takes LoRAs as vLLM does: what it cannot put into a slot it keeps under its id."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.broken = False

    async def add_lora(self, request: Any) -> bool:
        self.held[request.lora_int_id] = request.lora_name
        if self.broken:
            raise ValueError("another shape")
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self.held.pop(lora_id, None) is not None


def test_means_have_few_names_and_never_one_for_two(served: ServedAdapter) -> None:
    client = LoraClient()
    means = VllmMeans(client, SimpleNamespace(lora_requests={}))  # type: ignore[arg-type]

    async def scenario() -> None:
        held = {}
        for lora_id in range(1, 101):
            held[lora_id] = await means.load(lora_id, served.artifact)
            assert held[lora_id].lora_path == str(served.artifact.path)
            if lora_id > 2:
                await means.unload(held.pop(lora_id - 2))
            if lora_id % 5 == 0:
                client.broken = True
                with pytest.raises(SampleLoadError, match="another shape"):
                    await means.load(1000 + lora_id, served.artifact)
                client.broken = False
            names = [mean.lora_name for mean in held.values()]
            assert (
                len(set(names)) == len(names)
                and {lora_id: mean.lora_name for lora_id, mean in held.items()} == client.held
            )
            assert set(names) <= {f"credence-mean-{number:03d}" for number in range(4)}

    asyncio.run(scenario())
