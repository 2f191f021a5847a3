"""GangScheduler: one test for each rule of its docstring, and random traffic over all of them together."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

import credence.serve.vllm_plugin.scheduler as scheduler_module
from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.scheduler import GangAsyncScheduler, GangScheduler, gang_scheduler
from tests.serve.vllm_plugin.scheduler_harness import BLOCK_SIZE, Engine, vllm_config

both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def real_clock() -> Iterator[None]:
    """The harness replaces the scheduler's clock."""
    before = scheduler_module.time
    yield
    scheduler_module.time = before


def ends(engine: Engine, *request_ids: str) -> set[FinishReason]:
    return {engine.reasons[r] for r in request_ids}


# --- admission


@both
def test_nobody_starts_before_the_last_member_has_come(is_async: bool) -> None:
    engine = Engine(is_async=is_async)
    for i in range(3):
        assert not engine.started and not engine.first_step
        engine.add_member("g", 3, i)
        engine.step()
    engine.run()
    assert ends(engine, "g.0", "g.1", "g.2") == {FinishReason.LENGTH}
    assert len(engine.tokens["g.0"]) == 4
    assert (engine.scheduler.gangs_admitted, engine.scheduler.gangs_aborted) == (1, 0)


@both
def test_waits_for_all_its_places(is_async: bool) -> None:
    engine = Engine(is_async=is_async, seqs=4)
    engine.add("long", max_tokens=20)
    engine.add("short", max_tokens=5)
    engine.step()
    engine.add_gang("g", 3)
    engine.step_until(lambda: "short" in engine.reasons)
    assert "g.0" not in engine.first_step
    engine.run()
    assert engine.first_step["g.0"] == engine.first_step["g.2"]


@both
def test_places_adapters_and_blocks_of_a_joining_gang_stay_reserved(is_async: bool) -> None:
    """Prompts much longer than a step: the members come in one by one, and nobody takes what the others will need."""
    engine = Engine(is_async=is_async, seqs=4, tokens=16, loras=3, blocks=48)
    engine.add_gang("g", 3, prompt=60, max_tokens=4)
    engine.step()
    assert "g.1" not in engine.first_step
    for i in range(3):
        engine.add(f"adapter{i}", lora=9, prompt=2, max_tokens=3)
        engine.add(f"base{i}", prompt=2, max_tokens=30)
    engine.run()
    assert min(engine.first_step[f"adapter{i}"] for i in range(3)) > engine.first_step["g.2"]
    assert ends(engine, *engine.requests) == {FinishReason.LENGTH}


@both
def test_ordinary_growth_leaves_the_reserved_blocks_alone(is_async: bool) -> None:
    """40 blocks: a gang may need 24, two ordinary requests 14 each; they are preempted, never the gang."""
    engine = Engine(is_async=is_async, blocks=40)
    engine.add("a", prompt=16, max_tokens=40)
    engine.step()
    engine.add("b", prompt=[7] * 16, max_tokens=40)
    engine.step()
    engine.add_gang("g", 2, prompt=8, max_tokens=40)
    for _ in range(30):
        engine.step()
        assert not engine.started or engine.last.num_scheduled_tokens.get("g.0", 0) == 1
    assert engine.preemptions
    engine.run()
    assert ends(engine, *engine.requests) == {FinishReason.LENGTH}


def test_the_worst_case_is_reserved_not_the_prompt() -> None:
    engine = Engine(blocks=40)
    engine.add_gang("g", 2, prompt=4, max_tokens=60)  # 2 x 16 blocks
    engine.add_gang("h", 2, prompt=4, max_tokens=16, loras=[3, 4])  # 2 x 5 blocks
    engine.step()
    engine.step()
    assert "g.0" in engine.first_step and "h.0" not in engine.first_step
    engine.run()


@both
def test_the_watermark_does_not_keep_members_from_their_reserved_blocks(is_async: bool) -> None:
    engine = Engine(is_async=is_async, blocks=20, watermark=0.3, caching=False)
    engine.add_gang("g", 2, prompt=36, max_tokens=4)
    engine.run()


@both
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_an_admitted_gang_is_not_preempted_for_others(policy: str, is_async: bool) -> None:
    engine = Engine(is_async=is_async, policy=policy, blocks=26)
    engine.add("a", prompt=20, max_tokens=60, priority=0)
    engine.add_gang("g", 2, prompt=4, max_tokens=12, priority=9)
    engine.step()
    engine.add("b", prompt=[7] * 20, max_tokens=40, priority=1)
    engine.run()
    assert engine.preemptions


# --- lock-step


@both
def test_members_with_unequal_prefix_hits_start_together(is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=16)
    prompt = list(range(33))
    for lora in (1, 2):
        engine.add(f"warm{lora}", prompt=prompt[: 16 * lora], lora=lora, max_tokens=1)
    engine.run()
    engine.add_gang("g", 3, prompt=prompt, max_tokens=20)
    hits = {}
    for _ in range(12):
        output = engine.step()
        hits |= {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
    assert engine.started
    assert hits == {"g.0": 16, "g.1": 32 - BLOCK_SIZE, "g.2": 0}  # g.1: the hit leaves one token to start with
    assert engine.scheduler.gang_wait_steps > 3
    engine.run()


@both
@pytest.mark.parametrize("length", [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 40])
def test_prompt_lengths_cold_and_cached(length: int, is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=12)
    for round_ in ("cold", "warm"):
        engine.add("o" + round_, prompt=30, max_tokens=20)
        engine.add_gang(round_, 4, prompt=length, max_tokens=9)
        engine.run()
        assert len(engine.tokens[f"{round_}.3"]) == 9


@both
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("first", "hit"), [(0, 0), (3, 0), (4, 4), (17, 16), (30, 28), (32, 32), (33, 32)])
def test_a_scoring_gang_reads_from_the_cache_only_what_lies_before_its_first_target(
    first: int, hit: int, k: int, is_async: bool
) -> None:
    engine = Engine(is_async=is_async, tokens=16)
    for member in range(k):
        engine.add(f"warm{member}", prompt=34, lora=member + 1, max_tokens=1)
    engine.run()
    members = engine.add_gang("g", k, prompt=34, max_tokens=1, targets=[[first, 5], [33, 5]])
    engine.run()
    assert [engine.prefix_hits[member] for member in members] == [hit] * k
    assert ends(engine, *members) == {FinishReason.LENGTH}


@both
def test_one_token_prompts_keep_their_tokens_from_ordinary_prefills(is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=8, max_model_len=512)
    engine.add("long", prompt=200)
    engine.step()
    engine.add_gang("g", 6, prompt=1)
    engine.step()
    assert engine.last.num_scheduled_tokens == {"long": 2} | {f"g.{i}": 1 for i in range(6)}
    engine.run()


@both
def test_a_step_with_too_few_tokens_takes_whole_gangs(is_async: bool) -> None:
    """Five tokens a step for two gangs of three and an ordinary request; all end, none is split."""
    engine = Engine(is_async=is_async, seqs=7, tokens=8, scheduled_tokens=5)
    engine.add_gang("g", 3, max_tokens=10)
    engine.add_gang("h", 3, max_tokens=10)
    engine.add("o", max_tokens=30)
    engine.run()


@both
def test_ordinary_requests_get_every_other_step_when_gangs_take_all_tokens(is_async: bool) -> None:
    engine = Engine(is_async=is_async, seqs=7, tokens=8, scheduled_tokens=3)
    engine.add("o", max_tokens=20)
    for i in range(20):
        engine.add_gang(f"g{i}", 3, prompt=1, max_tokens=10)
    engine.step_until(lambda: "o" in engine.reasons, limit=60)
    assert "g9.0" not in engine.first_step
    engine.run(limit=2000)


@both
def test_a_gang_prefill_leaves_tokens_to_the_ordinary(is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=16)
    engine.add("decodes", max_tokens=60)
    engine.add_gang("g", 4, prompt=100)
    engine.step_until(lambda: "g.3" in engine.first_step)
    engine.add("prefills", prompt=[5] * 150)
    for _ in range(20):
        given = engine.step().num_scheduled_tokens
        assert (given["decodes"], given["prefills"], sum(given.values())) == (1, 7, 16)
    engine.run()


@both
def test_all_preempted_together_resume_together(is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=16)
    engine.may_preempt_gangs = True
    engine.add("o", max_tokens=30)
    engine.add_gang("g", 3, prompt=20, max_tokens=12)
    engine.add_gang("one", 2, prompt=1, max_tokens=12)
    for _ in range(4):
        for _ in range(7):
            engine.step()
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert engine.preemptions
    assert ends(engine, *engine.requests) == {FinishReason.LENGTH}


@both
def test_a_gang_that_falls_out_of_step_is_ended(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM is made to preempt a member: nobody gets a number from an incomplete gang."""
    engine = Engine(is_async=is_async, check=False)
    engine.add_gang("g", 3, max_tokens=20)
    engine.add("o", max_tokens=20)
    for _ in range(5):
        engine.step()
    real = engine.scheduler._vllm_allocate_slots
    refuse = {"g.1"}

    def allocate(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.request_id in refuse and len(engine.scheduler.running) > 2:
            return None
        return real(request, *args, **kwargs)

    engine.scheduler._vllm_allocate_slots = allocate
    for _ in range(4):
        engine.step()
    assert ends(engine, "g.0", "g.1", "g.2") == {FinishReason.ERROR}
    assert (engine.scheduler.gang_violations, engine.scheduler.gangs_aborted) == (1, 1)
    assert "out of lock-step" in caplog.text
    engine.scheduler.gang_violations = 0
    engine.run()
    assert ends(engine, "o") == {FinishReason.LENGTH}


# --- the waiting time


@both
def test_the_first_release_reports_the_time_since_the_last_arrival(is_async: bool, tmp_path: Path) -> None:
    engine = Engine(is_async=is_async, seqs=4, tokens=16)
    engine.may_preempt_gangs = True
    with StepStats.create(tmp_path / "gang", 3, 20) as stats:
        engine.add("long", max_tokens=30)
        engine.add("short", max_tokens=10)
        for member in range(3):
            engine.step()
            arrived = engine.now
            engine.add_member("g", 3, 2 - member, prompt=20, max_tokens=20, stats=stats.path)
        engine.step_until(lambda: engine.started)
        wait_s = stats.read_wait()
        assert wait_s == engine.now - arrived > 6
        for _ in range(3):
            engine.step()
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        assert engine.preemptions and stats.read_wait() == wait_s


@both
def test_nobody_else_reports_a_waiting_time(is_async: bool, tmp_path: Path) -> None:
    """K = 1 is ordinary; a file that is gone, or none at all, is nobody's business."""
    engine = Engine(is_async=is_async)
    with StepStats.create(tmp_path / "one", 1, 4) as stats:
        engine.add_gang("one", 1, stats=stats.path)
        engine.add_gang("gone", 2, stats=str(tmp_path / "gone"))
        engine.add_gang("none", 2)
        engine.run()
        assert stats.read_wait() is None
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


# --- fairness


@both
def test_an_old_gang_gets_in_although_small_requests_keep_coming(is_async: bool) -> None:
    engine = Engine(is_async=is_async, seqs=4, blocks=40, loras=4)
    for step in range(60):
        engine.add(f"o{step}", prompt=[step] * 4, max_tokens=6, lora=9 + step % 4)
        if step == 10:
            engine.add_gang("g", 4, prompt=8, max_tokens=8)
        engine.step()
    assert "g.0" in engine.reasons
    older = [engine.first_step[f"o{i}"] for i in range(11)]
    younger = [engine.first_step.get(f"o{i}", 1e9) for i in range(11, 60)]
    assert max(older) <= engine.first_step["g.0"] < min(younger)
    engine.run()


@both
@pytest.mark.parametrize("lora", [0, 9], ids=["base", "adapter"])
def test_an_old_request_gets_in_although_gangs_keep_coming(lora: int, is_async: bool) -> None:
    """Places, blocks and (with an adapter) LoRA slots are all taken by gangs when it comes."""
    engine = Engine(is_async=is_async, seqs=4, loras=2, blocks=40)
    for step in range(80):
        engine.add_gang(f"g{step}", 2, prompt=4, max_tokens=6)
        if step == 5:
            engine.add("o", prompt=[3] * 8, lora=lora, max_tokens=4)
        engine.step()
    assert "o" in engine.reasons
    assert engine.first_step["g4.0"] <= engine.first_step["o"] <= engine.first_step["g6.0"]
    engine.run(limit=2000)


@both
def test_a_preempted_request_is_not_squeezed_again_and_again(is_async: bool) -> None:
    """It comes back in pieces of 8 tokens, and whenever it does, there is a gang that could take the rest first."""
    engine = Engine(is_async=is_async, blocks=20, tokens=8, caching=False)
    engine.add("o", prompt=20, max_tokens=56)
    for step in range(150):
        if step % 2 == 0:
            engine.add_gang(f"g{step}", 2, prompt=4, max_tokens=16)
        engine.step()
    assert engine.preemptions and "o" in engine.reasons
    engine.run(limit=5000)


@both
def test_gangs_do_not_overtake_gangs(is_async: bool) -> None:
    engine = Engine(is_async=is_async, seqs=6)
    for i, k in enumerate([4, 6, 2, 3]):
        engine.add_gang(f"g{i}", k, max_tokens=6)
    engine.run()
    starts = [engine.first_step[f"g{i}.0"] for i in range(4)]
    assert starts == sorted(starts)


def test_priority_policy_orders_gangs_too() -> None:
    engine = Engine(policy="priority", seqs=4)
    engine.add_gang("first", 4, priority=1)
    engine.step()
    engine.add_gang("late", 3, priority=5)
    engine.add("o", priority=3)
    engine.add_gang("urgent", 4, priority=0)
    engine.run()
    assert engine.first_step["urgent.0"] < engine.first_step["o"] <= engine.first_step["late.0"]


# --- the end


@both
@pytest.mark.parametrize("when", [0, 1, 4], ids=["incomplete", "prefilling", "decoding"])
def test_finishing_one_member_finishes_all(when: int, is_async: bool) -> None:
    engine = Engine(is_async=is_async, tokens=16)
    engine.add_gang("g", 4, prompt=20, max_tokens=30)
    engine.add("o", max_tokens=12)
    for _ in range(3 * when):
        engine.step()
    engine.abort("g.2")
    assert not [r for r in engine.scheduler.requests if r.startswith("g")]
    engine.run()
    assert ends(engine, "g.0", "g.1", "g.3") == {FinishReason.ABORT}
    assert (engine.scheduler.gangs_aborted, engine.scheduler.gang_violations) == (1, 0)
    assert len(engine.tokens["o"]) == 12


@both
def test_abort_while_the_model_runs(is_async: bool) -> None:
    engine = Engine(is_async=is_async)
    engine.add_gang("g", 3, max_tokens=20)
    for _ in range(5):
        engine.step()
    engine.step(abort_during=("g.0",))
    engine.run()
    assert ends(engine, "g.1", "g.2") == {FinishReason.ABORT}


@both
def test_members_stop_in_the_same_step(is_async: bool) -> None:
    engine = Engine(is_async=is_async)
    engine.add_gang("g", 3, max_tokens=20, stop_at=6)
    engine.run()
    assert ends(engine, "g.0", "g.1", "g.2") == {FinishReason.STOP}
    assert len(engine.tokens["g.1"]) == 7
    assert engine.scheduler.gangs_aborted == 0


@both
def test_a_member_that_ends_alone_takes_the_rest_along(is_async: bool) -> None:
    """Cannot happen while all members get the same tokens; if it does, the rest ends in error."""
    engine = Engine(is_async=is_async, check=False)
    for i in range(3):
        engine.add_member("g", 3, i, max_tokens=20, stop_at=2 if i == 1 else None)
    engine.step_until(lambda: "g.1" in engine.reasons)
    assert engine.reasons == {"g.0": FinishReason.ERROR, "g.1": FinishReason.STOP, "g.2": FinishReason.ERROR}
    assert engine.scheduler.gang_violations == 1
    assert not engine.scheduler.requests and not engine.scheduler._gangs


@both
def test_an_incomplete_gang_ends_in_error(is_async: bool) -> None:
    engine = Engine(is_async=is_async, seqs=4)
    assert engine.scheduler.gang_timeout_s == 30
    for i in range(3):
        engine.add_member("g", 4, i)
    for step in range(29):
        engine.add(f"o{step}", max_tokens=1)
        engine.step()
    assert "o25" in engine.reasons and not any(r.startswith("g") for r in engine.reasons)  # nobody waits for it
    engine.run()
    assert ends(engine, "g.0", "g.1", "g.2") == {FinishReason.ERROR}
    assert (engine.scheduler.gangs_aborted, engine.scheduler.gang_violations) == (1, 0)


@both
@pytest.mark.parametrize(
    ("settings", "k", "kwargs", "why"),
    [
        ({"seqs": 4}, 5, {}, "K = 5, but at most 4 requests"),
        ({"seqs": 8, "scheduled_tokens": 4}, 5, {}, "K = 5, but at most 4 requests"),
        ({"loras": 2}, 3, {}, "3 adapters, but max_loras is 2"),
        ({"blocks": 17}, 3, {"prompt": 8, "max_tokens": 16}, "may need 18 KV blocks, but there are 17"),
    ],
    ids=["places", "tokens", "adapters", "blocks"],
)
def test_a_gang_that_can_never_fit_ends_in_error(
    settings: dict[str, Any], k: int, kwargs: dict[str, Any], why: str, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(is_async=is_async, **settings)
    members = engine.add_gang("g", k, **kwargs)
    assert engine.run() < 4
    assert ends(engine, *members) == {FinishReason.ERROR}
    assert why in caplog.text
    engine.add_gang("fits", 2, prompt=8, max_tokens=16)
    engine.run()
    assert ends(engine, "fits.0") == {FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([(2, 0, 8), (3, 1, 8)], "came to a gang of 2"),
        ([(2, 0, 8), (2, 0, 8)], "came to a gang of 2 that has [0]"),
        ([(2, 0, 8), (2, 1, 9)], "differ in prompt length"),
        ([(2, 2, 8)], "0 <= member < k"),
        ([("2", 0, 8)], "credence_k='2'"),
        ([(0, 0, 8)], "credence_k=0"),
        ([(2, 0, 8), (2, 1, 8), (2, 1, 8)], "that has [0, 1]"),
    ],
)
def test_contradicting_members_end_in_error(
    members: list[tuple[Any, int, int]], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(check=False)
    for i, (k, member, prompt) in enumerate(members):
        extra = {"credence_gang": "g", "credence_k": k, "credence_member": member}
        engine.add(f"m{i}", prompt=prompt, lora=1, extra=extra)
    engine.run()
    assert set(engine.reasons.values()) == {FinishReason.ERROR}
    assert why in caplog.text


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_bad_timeout_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENCE_GANG_TIMEOUT_S", text)
    with pytest.raises(ValueError, match=f"CREDENCE_GANG_TIMEOUT_S is '{text}'; give a positive number"):
        Engine()


def test_the_timeout_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENCE_GANG_TIMEOUT_S", "2.5")
    assert Engine().scheduler.gang_timeout_s == 2.5


# --- beside vLLM's own states


@both
def test_a_pause_lets_admitted_gangs_finish_and_admits_no_other(is_async: bool) -> None:
    """PAUSED_NEW with half of the members still outside: a drain must not wait for ever."""
    engine = Engine(is_async=is_async, tokens=8)
    engine.add_gang("g", 4, prompt=20)
    engine.step()
    engine.add_gang("h", 4, prompt=20)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.step_until(lambda: not engine.scheduler.has_requests())
    assert "g.3" in engine.reasons and "h.0" not in engine.first_step
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()


@both
@pytest.mark.parametrize("constrained", [1, 2], ids=["leader", "all"])
def test_a_gang_waits_for_its_grammars_without_blocking_others(constrained: int, is_async: bool) -> None:
    engine = Engine(is_async=is_async)
    members = [engine.requests[r] for r in engine.add_gang("g", 2)]
    for member in members[:constrained]:
        member.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        member.structured_output_request = SimpleNamespace(grammar=None)
    engine.step()
    engine.add("o")
    engine.step_until(lambda: "o" in engine.reasons)
    assert not {"g.0", "g.1"} & set(engine.first_step) and engine.scheduler.gangs_admitted == 0
    members[constrained - 1].structured_output_request.grammar = ValueError("bad grammar")
    engine.run()
    assert ends(engine, "g.0", "g.1") == {FinishReason.ERROR}


@both
def test_without_gangs_it_schedules_as_vllm_does(is_async: bool) -> None:
    """Same scheduled tokens, preemptions and outputs as vLLM's own class, step by step; K = 1 is ordinary as well."""
    settings = {"is_async": is_async, "blocks": 30, "seqs": 6, "tokens": 16, "loras": 2, "watermark": 0.1}
    stock = AsyncScheduler if is_async else Scheduler
    for seed in range(30):
        logs = []
        for make in (gang_scheduler, stock):
            rng = random.Random(seed)
            engine = Engine(make=make, check=False, **settings)
            log: list[Any] = []
            for step in range(250):
                if step < 30 and rng.random() < 0.5:
                    prompt = [rng.choice([1, 2])] * rng.randint(1, 30)
                    extra = {"credence_gang": str(step), "credence_k": 1, "credence_member": 0}
                    lora, max_tokens = rng.choice([0, 1, 2, 3]), rng.randint(1, 20)
                    engine.add(f"o{step}", prompt, max_tokens, lora, extra=extra if rng.random() < 0.2 else None)
                output = engine.step()
                if output is not None:
                    log.append((output.num_scheduled_tokens, output.preempted_req_ids, output.finished_req_ids))
            logs.append((log, engine.tokens, engine.reasons))
            assert len(engine.reasons) == len(engine.requests)
        assert logs[0] == logs[1]


def test_the_class_must_fit_async_scheduling() -> None:
    for is_async, fits, other in [
        (False, GangScheduler, GangAsyncScheduler),
        (True, GangAsyncScheduler, GangScheduler),
    ]:
        assert type(Engine(is_async=is_async).scheduler) is fits
        with pytest.raises(
            ValueError, match=r"--scheduler-cls credence\.serve\.vllm_plugin\.scheduler\.gang_scheduler"
        ):
            Engine(make=other, is_async=is_async)


def test_vllm_resolves_the_scheduler_by_name() -> None:
    config = vllm_config()
    for name in ("gang_scheduler", "GangScheduler", "GangAsyncScheduler"):
        config.scheduler_config.scheduler_cls = f"credence.serve.vllm_plugin.scheduler.{name}"
        assert config.scheduler_config.get_scheduler_cls() is getattr(scheduler_module, name)


# --- random traffic


class Traffic:
    """Random arrivals, aborts, pauses and resets for one random configuration."""

    def __init__(self, seed: int, is_async: bool) -> None:
        rng = self.rng = random.Random(seed)
        seqs = rng.choice([2, 4, 8, 12])
        tokens = max(seqs, rng.choice([4, 8, 16, 64]))
        self.seqs = seqs
        self.loras = rng.choice([2, 4, 8])
        self.max_len = rng.choice([32, 64])
        self.blocks = rng.choice([16, 20, 30, 60, 200])
        self.engine = Engine(
            is_async=is_async,
            seqs=seqs,
            tokens=tokens,
            scheduled_tokens=rng.choice([None, None, None, rng.randint(2, tokens)]),
            blocks=self.blocks,
            loras=self.loras,
            max_model_len=self.max_len,
            caching=rng.random() < 0.8,
            policy=rng.choice(["fcfs", "fcfs", "fcfs", "priority"]),
            watermark=rng.choice([0.0, 0.0, 0.1]),
            long_prefill_token_threshold=rng.choice([0, 0, 5]),
            scheduler_reserve_full_isl=rng.random() < 0.8,
        )
        self.engine.scheduler.gang_timeout_s = 40
        self.engine.may_preempt_gangs = rng.random() < 0.1  # this run resets the prefix cache while requests run
        self.stray: list[tuple[float, str, int, int, dict[str, Any]]] = []  # members that arrive late
        self.work = 0
        self.count = 0

    def prompt(self) -> list[int]:
        length = self.rng.choice([1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 9, 17, self.rng.randint(1, self.max_len - 1)])
        return [self.rng.choice([1, 1, 1, 2])] * min(length, self.max_len - 1)

    def arrive(self) -> None:
        rng, engine = self.rng, self.engine
        self.count += 1
        prompt, max_tokens = self.prompt(), rng.choice([1, 2, 5, 20])
        max_tokens = min(max_tokens, self.max_len - len(prompt))
        shared = {"prompt": prompt, "max_tokens": max_tokens, "priority": rng.randint(0, 2)}
        shared["stop_at"] = rng.randrange(max_tokens) if rng.random() < 0.3 else None
        self.work += len(prompt) + max_tokens
        if rng.random() < 0.5:
            engine.add(f"o{self.count}", lora=rng.choice([0, 0, 1, 2, 9, 10]), **shared)
            return
        if rng.random() < 0.3:  # a scoring gang
            first = rng.randrange(len(prompt))
            shared |= {"max_tokens": 1, "stop_at": None, "targets": [[first, 1], [len(prompt) - 1, 2]]}
        k = rng.choice([1, 2, 2, 3, 4, 8])
        if rng.random() < 0.9:  # most gangs fit
            k = min(k, self.seqs, self.loras)
        self.work += (k - 1) * (len(prompt) + max_tokens)
        loras = [rng.choice([0, 3, i + 1]) for i in range(k)]
        for i in rng.sample(range(k), k):
            late = rng.random()
            if late > 0.15:
                engine.add_member(f"g{self.count}", k, i, loras[i], **shared)
            elif late > 0.03:  # the rest never comes
                when = engine.now + rng.randint(1, 30)
                self.stray.append((when, f"g{self.count}", k, i, {"lora": loras[i], **shared}))

    def disturb(self) -> tuple[str, ...]:
        """Abort, pause or reset; returns what is to be aborted while the model runs."""
        rng, engine = self.rng, self.engine
        for entry in [entry for entry in self.stray if entry[0] <= engine.now]:
            self.stray.remove(entry)
            engine.add_member(*entry[1:4], **entry[4])
        live = list(engine.scheduler.requests)
        if rng.random() < 0.05:
            engine.scheduler.set_pause_state(rng.choice([*PauseState, PauseState.UNPAUSED]))
        if engine.may_preempt_gangs and rng.random() < 0.1:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        if live and rng.random() < 0.06:
            victims = [rng.choice(live)]
            if rng.random() < 0.5:
                victims = engine.members_of(victims[0]) or victims
            if rng.random() < 0.5:
                return tuple(victims)
            engine.abort(*victims)
        return ()

    def run(self) -> None:
        for _ in range(self.rng.randint(10, 40)):
            if self.rng.random() < 0.5:
                self.arrive()
            self.engine.step(self.disturb())
        while self.stray:
            self.engine.step(self.disturb())
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        # One token a step would do the remaining work once; preempted requests do some of it again.
        self.engine.run(limit=100 + 4 * self.work)


@both
@pytest.mark.parametrize("block", range(10))
def test_random_traffic(block: int, is_async: bool) -> None:
    totals = {"admitted": 0, "aborted": 0, "preempted": 0}
    for seed in range(block * 100, block * 100 + 100):
        traffic = Traffic(seed, is_async)
        try:
            traffic.run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        totals["admitted"] += traffic.engine.scheduler.gangs_admitted
        totals["aborted"] += traffic.engine.scheduler.gangs_aborted
        totals["preempted"] += traffic.engine.preemptions
    assert min(totals.values()) > 20, f"the traffic does not test much: {totals}"


# --- a bound on waiting


@dataclass(frozen=True, slots=True)
class Job:
    """One arrival of the heavy traffic: an ordinary request (k = 1) or a gang, and the most it can ask for."""

    name: str
    arrival: float
    k: int
    adapters: frozenset[int]
    blocks: int
    steps: int

    def starts(self, engine: Engine) -> float:
        return engine.first_step[self.name if self.k == 1 else f"{self.name}.0"]


def first_come_first_served(jobs: list[Job], places: int, loras: int, blocks: int) -> list[float]:
    """Start of each job, in steps, in a server where nobody starts before those that came earlier.

    A job holds its places, adapters and worst-case blocks for its longest service time. What comes later does not matter.
    """
    starts: list[float] = []
    running: list[tuple[float, Job]] = []  # by end
    now = 0.0
    for job in jobs:
        now = max(now, job.arrival)
        while True:
            running = sorted((entry for entry in running if entry[0] > now), key=lambda entry: entry[0])
            held = frozenset[int]().union(*(other.adapters for _, other in running))
            if (
                sum(other.k for _, other in running) + job.k <= places
                and len(held | job.adapters) <= loras
                and sum(other.blocks for _, other in running) + job.blocks <= blocks
            ):
                break
            now = running[0][0]
        starts.append(now)
        running.append((now + job.steps, job))
    return starts


def heavy_traffic(seed: int, is_async: bool, scheduler: Any = gang_scheduler) -> tuple[Engine, list[Job], list[float]]:
    """More work than the engine can do for 400 steps; returns the jobs and their starts in the model."""
    rng = random.Random(seed)
    places, loras, blocks, tokens = 8, rng.choice([4, 8]), rng.choice([40, 200]), 32
    engine = Engine(is_async=is_async, make=scheduler, seqs=places, loras=loras, blocks=blocks, tokens=tokens)
    jobs: list[Job] = []
    most = ["gangs", "ordinary", "both"][seed % 3]  # what most of the traffic is; the rest must not starve
    for _ in range(400):
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            name, prompt, max_tokens = f"j{len(jobs)}", rng.randint(1, 24), rng.randint(1, 16)
            rare = rng.random() < 0.1
            k = {"gangs": 1 if rare else 2, "ordinary": loras if rare else 1, "both": rng.choice([1, 1, 2, 4])}[most]
            need = k * -(-(prompt + max_tokens) // BLOCK_SIZE)
            if need > blocks:
                continue
            targets = [[rng.randrange(prompt), 1]] if k > 1 and rng.random() < 0.3 else None
            max_tokens = 1 if targets else max_tokens
            if k == 1:
                adapters = rng.choice([0, 0, 1, 9])
                engine.add(name, [rng.choice([1, 2])] * prompt, max_tokens, adapters)
                held = {adapters} - {0}
            else:
                engine.add_gang(name, k, prompt=prompt, max_tokens=max_tokens, targets=targets)
                held = set(range(1, k + 1))
            # A quarter of the tokens of each step for its prompt, then a token a step.
            steps = -(-4 * k * prompt // tokens) + max_tokens + 1
            jobs.append(Job(name, engine.now, k, frozenset(held), need, steps))
        engine.step()
    engine.run(limit=5000)
    return engine, jobs, first_come_first_served(jobs, places, loras, blocks)


@both
@pytest.mark.parametrize("seed", range(4))
def test_waiting_is_bounded_by_the_work_that_came_before(seed: int, is_async: bool) -> None:
    """Under a stream that never lets up, nobody waits longer than if those before it were served one after the other, in order."""
    engine, jobs, bounds = heavy_traffic(seed, is_async)
    for job, bound in zip(jobs, bounds, strict=True):
        assert job.starts(engine) <= bound + 4, f"{job} started in step {job.starts(engine)}, the bound is {bound}"
    waits = [job.starts(engine) - job.arrival for job in jobs]
    assert max(waits) > 100, "nobody had to wait: the traffic does not test much"
