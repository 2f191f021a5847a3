"""Gang scheduling: the K member requests of one ensemble answer run in lock-step on vLLM's scheduler.

A *gang* is K >= 2 requests that carry the same ``credence_gang`` id in ``SamplingParams.extra_args`` and differ only in
their LoRA adapter. The logits processor averages the K rows of one step, so all K have to be in the same step, always.

Rules (``tests/serve/vllm_plugin/test_scheduler.py`` has one test for each):

1. Admission is all or nothing, and only when K running places, the distinct LoRA adapters and the worst-case KV blocks
   (prompt + max_tokens for every member, no prefix hits assumed) are free together. All three stay reserved until the
   gang ends: an ordinary request is refused places, adapters and blocks that an admitted gang may still need.
2. Each member's prompt is computed up to its last token and held there. When all K wait there, the gang is *released*:
   the last token of all K is computed in one step, and from then on every step takes all K or none.
3. One queue in order of arrival (with policy "priority": of priority, then arrival); a gang arrives with its last
   member. A gang is admitted only after every ordinary request that arrived before it, and while the oldest gang waits
   for room, no ordinary request that arrived after it is admitted. So neither kind can starve the other, and gangs do
   not overtake each other. Blocks that a once preempted ordinary request still needs are not given to a gang.
4. In a step released gangs come first, then gang prefills, which leave half of the remaining tokens, and at least one
   for each running ordinary request, to the ordinary ones. If there are more running requests than tokens
   in a step and ordinary ones were left out, the gangs stand still in the next step.
5. Members end together. Whoever finishes one member from outside finishes all. Members that were not named get a final
   output, so that the API process hears of it. A gang that is incomplete for too long, that can never fit, or that
   falls out of lock-step for whatever reason ends in ``FinishReason.ERROR``: no answer rather than a wrong one.
6. What a scoring gang (``credence_targets``) wants to know must be computed, not read from the prefix cache: its members'
   hits end at the first target position, also for K = 1.

Gangs with K = 1 and requests without gang keys are ordinary; without any gang every call goes straight to vLLM.
Memory that sliding-window layers give back is not counted, so the reservation for such models is larger than needed.
The module is long because all of vLLM's hooks read one plan; it leans on private methods of vLLM 0.32.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from credence.serve.step_stats import StepStats

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "CREDENCE_GANG_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 30.0
# Priority of an admitted member: before everyone in the queue, and never the victim of a preemption.
ADMITTED_PRIORITY = -(2**62)

Order = tuple[int, int]


@dataclass(slots=True, eq=False)
class Gang:
    """K requests that run in lock-step.

    Attributes:
        gang_id: ``credence_gang``.
        size: K.
        since_s: Monotonic time at which the first member arrived, seconds.
        complete_s: Monotonic time at which the last member arrived, until the waiting time has been reported; seconds.
        members: The members that have arrived and have not ended, by request id.
        indices: Every ``credence_member`` seen so far.
        order: Place in the queue, given when the last member arrives.
        admitted: Places, adapters and KV blocks are reserved.
        released: All members have waited at their last prompt token; they run in lock-step.
        fault: Why the gang has to be ended, if it has.
    """

    gang_id: str
    size: int
    since_s: float
    members: dict[str, Request] = field(default_factory=dict)
    indices: set[int] = field(default_factory=set)
    order: Order | None = None
    admitted: bool = False
    released: bool = False
    fault: str | None = None
    complete_s: float | None = None


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ValueError(f"{TIMEOUT_VARIABLE} is {text!r}; give a positive number of seconds, or leave it unset")
    return seconds


def _extra_args(request: Request) -> dict[str, Any]:
    return (request.sampling_params.extra_args if request.sampling_params else None) or {}


def _adapter_ids(requests: Iterable[Request]) -> set[int]:
    return {r.lora_request.lora_int_id for r in requests if r.lora_request and r.lora_request.lora_int_id > 0}


class GangScheduler(Scheduler):
    """vLLM's scheduler with gangs; for ``async_scheduling`` off (see ``gang_scheduler``).

    Attributes:
        gangs_admitted: Gangs that got their reservation.
        gangs_aborted: Gangs that ended aborted or in error, whoever asked for it.
        gang_violations: Gangs that fell out of lock-step and were ended for it; 0 unless something is broken.
        gang_wait_steps: Sum over steps of the complete gangs that were not yet released.
        gang_timeout_s: Seconds after which an incomplete gang is ended.
    """

    _for_async = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if bool(self.scheduler_config.async_scheduling) != self._for_async:
            raise ValueError(
                f"{type(self).__name__} was given async_scheduling={self.scheduler_config.async_scheduling}; "
                f"pass --scheduler-cls {__name__}.gang_scheduler, which takes the class that fits"
            )
        self.gangs_admitted = 0
        self.gangs_aborted = 0
        self.gang_violations = 0
        self.gang_wait_steps = 0
        self.gang_timeout_s = _timeout_s()
        self._token_budget: int = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        self._gangs: dict[str, Gang] = {}
        self._gang_of: dict[str, Gang] = {}
        self._tick = itertools.count()
        self._arrival: dict[str, int] = {}
        # KV blocks that members of admitted gangs may still ask for, by request id, and their sum.
        self._reserve: dict[str, int] = {}
        self._reserved_blocks = 0
        self._torn: set[Gang] = set()  # lost a member, the others are still here
        self._preempted: set[Gang] = set()
        self._notices: list[Request] = []  # ended by us; the API process has to be told
        # The plan of the current step.
        self._door: Order | None = None
        self._adapters: set[int] = set()
        self._joining: list[Request] = []
        self._frozen: set[Gang] = set()
        self._prefill_share = 0
        self._held_tokens = 0
        self._used_tokens = 0
        self._yield_turn = False
        self._vllm_allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots

    # --- arrival and end -----------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue a request; a member joins its gang and stays out of vLLM's queues until the gang is admitted."""
        if request.request_id not in self.requests:
            self._arrival[request.request_id] = next(self._tick)
            extra = _extra_args(request)
            if extra.get("credence_gang") is not None and extra.get("credence_k") != 1:
                self._join(request, str(extra["credence_gang"]), extra.get("credence_k"), extra.get("credence_member"))
        super().add_request(request)

    def _join(self, request: Request, gang_id: str, size: Any, index: Any) -> None:
        gang = self._gangs.get(gang_id)
        if gang is None:
            gang = self._gangs[gang_id] = Gang(gang_id, size if isinstance(size, int) else 0, time.monotonic())
        first = next(iter(gang.members.values()), request)
        if not isinstance(size, int) or size < 1 or not isinstance(index, int) or not 0 <= index < size:
            gang.fault = f"a member has credence_k={size!r} and credence_member={index!r}, allowed are 0 <= member < k"
        elif size != gang.size or index in gang.indices:
            gang.fault = f"member {index} of {size} came to a gang of {gang.size} that has {sorted(gang.indices)}"
        elif (request.num_prompt_tokens, request.max_tokens) != (first.num_prompt_tokens, first.max_tokens):
            gang.fault = "its members differ in prompt length or max_tokens, so they cannot end together"
        gang.members[request.request_id] = request
        gang.indices.add(index)
        self._gang_of[request.request_id] = gang
        if len(gang.indices) == gang.size and gang.order is None:
            gang.order = self._order(request)
            gang.complete_s = time.monotonic()
        if gang.fault is None and not gang.admitted:
            gang.fault = self._refusal(gang)

    def _enqueue_waiting_request(self, request: Request) -> None:
        gang = self._gang_of.get(request.request_id)
        if gang is None or gang.admitted:
            super()._enqueue_waiting_request(request)
        else:
            self.deferred_waiting.add(request)

    def get_request_counts(self) -> tuple[int, int]:
        """Numbers of running and waiting requests, with the members that wait for admission."""
        running, waiting = super().get_request_counts()
        return running, waiting + sum(len(gang.members) for gang in self._gangs.values() if not gang.admitted)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """Finish requests from outside; one member takes its whole gang along."""
        if request_ids is None or not self._gangs:
            return list(super().finish_requests(request_ids, finished_status))
        named = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        gangs = {gang for gang in map(self._gang_of.get, named) if gang is not None}
        others = [member for gang in gangs for member in gang.members.values() if member.request_id not in named]
        finished = super().finish_requests(named | {member.request_id for member in others}, finished_status)
        self._notices += others
        return list(finished)

    def _end(self, gang: Gang, why: str) -> None:
        logger.warning("Ending gang %s (%d of %d members here): %s", gang.gang_id, len(gang.members), gang.size, why)
        self._notices += self.finish_requests(list(gang.members), RequestStatus.FINISHED_ERROR)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._arrival.pop(request.request_id, None)
        self._set_reserve(request.request_id, 0)
        gang = self._gang_of.pop(request.request_id, None)
        if gang is not None:
            del gang.members[request.request_id]
            if gang.members:
                self._torn.add(gang)
            else:
                self._torn.discard(gang)
                del self._gangs[gang.gang_id]
                self.gangs_aborted += request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
        return super()._free_request(request, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's tokens, end what is left of torn gangs, and tell the API process whom we ended."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for gang in list(self._torn):
            self.gang_violations += 1
            self._end(gang, "a member ended before the others")
        if self._notices:
            told = {out.request_id for outs in outputs.values() for out in outs.outputs if out.finished}
            for request in {r.request_id: r for r in self._notices if r.request_id not in told}.values():
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=request.get_finished_reason(),
                        events=request.take_events(),
                        trace_headers=request.trace_headers,
                    )
                )
            self._notices.clear()
        return outputs

    # --- one step ------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan the gangs of this step, let vLLM schedule under that plan, and check lock-step."""
        if not self._gangs:
            return super().schedule(*args, **kwargs)
        self._end_hopeless()
        self._admit()
        self._release()
        self._plan_tokens()
        self._preempted.clear()
        output = super().schedule(*args, **kwargs)
        self._check(output)
        return output

    def _end_hopeless(self) -> None:
        now_s = time.monotonic()
        for gang in list(self._gangs.values()):
            if gang.fault is not None:
                self._end(gang, gang.fault)
            elif gang.order is None and now_s - gang.since_s > self.gang_timeout_s:
                self._end(gang, f"incomplete for more than {self.gang_timeout_s:g} s ({TIMEOUT_VARIABLE})")

    def _refusal(self, gang: Gang) -> str | None:
        """Why this gang can never run here, or None."""
        places = min(self.max_num_active_reqs, self._token_budget)
        if gang.size > places:
            return f"K = {gang.size}, but at most {places} requests run in one step (max_num_seqs, token budget)"
        if self.lora_config and (count := len(_adapter_ids(gang.members.values()))) > self.lora_config.max_loras:
            return f"{count} adapters, but max_loras is {self.lora_config.max_loras}"
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
        if (need := sum(map(self._blocks_to_come, gang.members.values()))) > usable:
            return f"may need {need} KV blocks, but there are {usable}: lower max_tokens or K"
        if self.num_spec_tokens or self.connector is not None:
            return "gangs run neither with speculative decoding nor with a KV connector"
        return None

    def _admit(self) -> None:
        self._door = None
        admitted = [m for gang in self._gangs.values() if gang.admitted for m in gang.members.values()]
        self._joining = [m for m in admitted if m.status != RequestStatus.RUNNING]
        self._adapters = _adapter_ids(self.running) | _adapter_ids(admitted)
        waiting = [(gang.order, gang) for gang in self._gangs.values() if gang.order and not gang.admitted]
        for order, gang in sorted(waiting, key=lambda entry: entry[0]):
            members = list(gang.members.values())
            if self._pause_state != PauseState.UNPAUSED:
                break
            if not all([super(GangScheduler, self)._handle_blocked_waiting_request(m) for m in members]):
                continue  # a grammar is still being compiled: not a lack of room
            if not self._has_room(order, members):
                self._door = order
                break
            gang.admitted = True
            self.gangs_admitted += 1
            self._joining += members
            self._adapters |= _adapter_ids(members)
            for member in members:
                self._set_reserve(member.request_id, self._blocks_to_come(member))

    def _has_room(self, order: Order, members: list[Request]) -> bool:
        ready = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        if any(r.status in ready and self._order(r) < order for r in self.waiting):
            return False
        places = self.max_num_active_reqs - len(self.running) - self.num_waiting_for_streaming_input
        if len(members) > places - len(self._joining):
            return False
        if self.lora_config and len(self._adapters | _adapter_ids(members)) > self.lora_config.max_loras:
            return False
        once_preempted = (r for r in self.running if r.num_preemptions and r.request_id not in self._gang_of)
        spoken_for = self._reserved_blocks + sum(map(self._blocks_to_come, once_preempted))
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return bool(sum(map(self._blocks_to_come, members)) <= free - spoken_for)

    def _release(self) -> None:
        for gang in self._gangs.values():
            if gang.order is None:
                continue
            members = gang.members.values()
            if gang.admitted and not gang.released:
                # A one-token prompt has nothing to compute before its last token: it is released out of the queue.
                gang.released = all(m.num_tokens == 1 for m in members) or all(
                    m.status == RequestStatus.RUNNING and m.num_computed_tokens == m.num_tokens - 1 for m in members
                )
                if gang.released:
                    self._report_wait(gang)
            self.gang_wait_steps += not gang.released

    def _report_wait(self, gang: Gang) -> None:
        """Leaves in the gang's statistics file how long it waited from its last arrival to its first release; for metrics only."""
        leader = next(extra for extra in map(_extra_args, gang.members.values()) if extra["credence_member"] == 0)
        path, since_s = leader.get("credence_stats"), gang.complete_s
        gang.complete_s = None
        if not path or since_s is None:
            return
        try:
            with StepStats.open(path) as stats:
                stats.write_wait(time.monotonic() - since_s)
        except OSError as error:
            logger.debug("The waiting time of gang %s is not reported: %s", gang.gang_id, error)

    def _plan_tokens(self) -> None:
        """Order the requests, decide which released gangs run, and divide the tokens that are left."""
        gangs = [gang for gang in self._gangs.values() if gang.admitted]
        gangs.sort(key=lambda gang: (not gang.released, gang.order))
        rank = {request_id: i for i, gang in enumerate(gangs) for request_id in gang.members}
        # Gangs first: vLLM takes tokens from the front of the list and preempts from its end.
        self.running.sort(key=lambda r: rank.get(r.request_id, len(gangs)))
        if self._joining:
            # vLLM drains this queue before the ordinary one, and also when new requests are paused.
            self.waiting.remove_requests(self._joining)
            self.kv_holding_waiting.remove_requests(self._joining)
            for member in reversed(sorted(self._joining, key=lambda m: rank[m.request_id])):
                member.priority = ADMITTED_PRIORITY + rank[member.request_id]
                self.kv_holding_waiting.prepend_request(member)
        left = self._token_budget
        self._frozen.clear()
        self._held_tokens = self._used_tokens = 0
        for gang in gangs:
            if gang.released and (self._yield_turn or len(gang.members) > left):
                self._frozen.add(gang)
            elif gang.released:
                left -= len(gang.members)
                self._held_tokens += sum(m.status != RequestStatus.RUNNING for m in gang.members.values())
        others = sum(r.request_id not in self._gang_of for r in self.running)
        if self._yield_turn:
            self._prefill_share = 0
        else:
            self._prefill_share = min(left, max(1, min(left // 2, left - others))) if others else left

    def _check(self, output: SchedulerOutput) -> None:
        scheduled = output.num_scheduled_tokens
        for gang in [gang for gang in self._gangs.values() if gang.released or gang in self._preempted]:
            tokens = [scheduled.get(request_id, 0) for request_id in gang.members]
            if gang in self._preempted or tokens not in ([0] * gang.size, [1] * gang.size):
                self.gang_violations += 1
                self._end(gang, f"out of lock-step: its members were given {tokens} tokens")
        starved = output.total_num_scheduled_tokens >= self._token_budget < len(self.running) and any(
            r.request_id not in scheduled and r.request_id not in self._gang_of for r in self.running
        )
        self._yield_turn = starved and not self._yield_turn

    # --- where vLLM's own loop asks ------------------------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may go on; an ordinary one only with an adapter for which there is a slot."""
        ready = bool(super()._handle_blocked_waiting_request(request))
        if not ready or not self._gangs or request.request_id in self._gang_of:
            return ready
        if self.lora_config:
            adapters = self._adapters | _adapter_ids([request])
            if len(adapters) > self.lora_config.max_loras:
                return False
            self._adapters = adapters
        return True

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Tokens a request gets in this step. vLLM asks here last; 0 skips a running request and stops admission."""
        tokens = int(super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens))
        if not self._gangs:
            return tokens
        running = request.status == RequestStatus.RUNNING
        gang = self._gang_of.get(request.request_id)
        if gang is None:
            if not running and self._door is not None and self._order(request) > self._door:
                return 0
        elif gang.released:
            tokens = 0 if gang in self._frozen else tokens
            self._held_tokens -= 0 if running else tokens
        else:
            tokens = min(tokens, request.num_tokens + request.num_output_placeholders - 1 - num_computed_tokens)
            if running:
                tokens = min(tokens, self._prefill_share)
                self._prefill_share -= tokens
        if self._held_tokens:  # for members that are released out of the queue, after all running requests
            tokens = min(tokens, self._token_budget - self._used_tokens - self._held_tokens)
        tokens = max(tokens, 0)
        self._used_tokens += tokens
        return tokens

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        manager = self.kv_cache_manager
        targets = _extra_args(request).get("credence_targets")
        in_gang = request.request_id in self._gang_of
        if not (in_gang or targets) or not manager.prefix_cache_lookup_enabled(request):
            hit: tuple[Any, int, int, bool] = super()._get_local_prefix_cache_hit(request)
            return hit
        # Not the whole prompt but one: vLLM cannot start a request with nothing to compute before the held token.
        limit = max(request.num_tokens - (2 if in_gang else 1), 0)
        if targets:
            limit = min(limit, targets[0][0])
        blocks, num_tokens, num_uncached = manager.coordinator.find_longest_cache_hit(request.block_hashes, limit)
        boundary = num_tokens + num_uncached if num_uncached else 0
        return manager.create_kv_cache_blocks(blocks), num_tokens, boundary, False

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # Inside schedule() this must not happen to a member (see _check); reset_prefix_cache() takes all members.
        super()._preempt_request(request, *args, **kwargs)
        gang = self._gang_of.get(request.request_id)
        if gang is not None:
            gang.released = False
            self._preempted.add(gang)
            self._set_reserve(request.request_id, self._blocks_to_come(request))

    # --- KV reservation ------------------------------------------------------------------------------------------

    def _blocks_to_come(self, request: Request) -> int:
        """Most KV blocks that a request can still ask for."""
        tokens = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        manager = self.kv_cache_manager
        blocks: int = manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=tokens,
            new_computed_blocks=manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=request.num_computed_tokens,
            num_local_computed_tokens=request.num_computed_tokens,
            num_tokens_main_model=tokens,
        )
        return blocks

    def _set_reserve(self, request_id: str, blocks: int) -> None:
        self._reserved_blocks += blocks - self._reserve.pop(request_id, 0)
        if blocks:
            self._reserve[request_id] = blocks

    def _allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's ``allocate_slots``, which keeps the gangs' reservation free of ordinary requests."""
        if request.request_id in self._gang_of:
            kwargs["has_scheduled_reqs"] = False  # the watermark is for requests without a reservation
            blocks = self._vllm_allocate_slots(request, *args, **kwargs)
            if blocks is not None and (request.status != RequestStatus.RUNNING or any(blocks.blocks)):
                self._set_reserve(request.request_id, self._blocks_to_come(request))
            return blocks
        if not self._reserved_blocks:
            return self._vllm_allocate_slots(request, *args, **kwargs)
        if request.status == RequestStatus.RUNNING:
            kwargs["reserved_blocks"] = kwargs.get("reserved_blocks", 0) + self._reserved_blocks
            return self._vllm_allocate_slots(request, *args, **kwargs)
        # For a newcomer the watermark, unlike reserved_blocks, also limits the test that the whole prompt fits.
        watermark = self.kv_cache_manager.watermark_blocks
        self.kv_cache_manager.watermark_blocks = watermark + self._reserved_blocks
        try:
            return self._vllm_allocate_slots(request, *args, **kwargs)
        finally:
            self.kv_cache_manager.watermark_blocks = watermark

    def _order(self, request: Request) -> Order:
        priority = request.priority if self.policy == SchedulingPolicy.PRIORITY else 0
        return priority, self._arrival.get(request.request_id, 0)


class GangAsyncScheduler(GangScheduler, AsyncScheduler):
    """The same for ``async_scheduling`` on, vLLM's default on GPUs: steps are planned before the last one's tokens."""

    _for_async = True


def gang_scheduler(*, vllm_config: Any, **kwargs: Any) -> GangScheduler:
    """Build the gang scheduler that fits ``async_scheduling``; usable as ``--scheduler-cls`` on any platform."""
    cls = GangAsyncScheduler if vllm_config.scheduler_config.async_scheduling else GangScheduler
    return cls(vllm_config=vllm_config, **kwargs)
