"""A real vLLM scheduler driven without a model: stands in for EngineCore, the worker and the API process.

``Engine.step`` does what ``EngineCore.step`` (or, for async scheduling, ``step_with_batch_queue``) does, with a model
that emits tokens known in advance, and checks after every step what must hold in all of them.
"""

import json
import tempfile
import zlib
from collections import deque
from functools import cache
from types import SimpleNamespace
from typing import Any

from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import credence.serve.vllm_plugin.scheduler as scheduler_module
from credence.serve.vllm_plugin.scheduler import gang_scheduler

STOP_TOKEN = 100
BLOCK_SIZE = 4


@cache
def model_config() -> ModelConfig:
    """A one-layer Llama that exists only as a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "vocab_size": 128,
            "max_position_embeddings": 1024,
        }
        with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)
        init_none_hash(sha256)
        return ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", seed=0, max_model_len=1024)


def vllm_config(
    *,
    is_async: bool = False,
    seqs: int = 8,
    tokens: int = 64,
    scheduled_tokens: int | None = None,
    blocks: int = 200,
    loras: int = 8,
    max_model_len: int = 256,
    caching: bool = True,
    **scheduler: Any,
) -> VllmConfig:
    """A configuration; ``blocks`` counts usable KV blocks of ``BLOCK_SIZE`` tokens (vLLM takes one more for itself)."""
    model = model_config()
    model.max_model_len = max_model_len
    cache_config = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=caching)
    config = VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_num_scheduled_tokens=scheduled_tokens,
            max_model_len=max_model_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            **scheduler,
        ),
        cache_config=cache_config,
        lora_config=LoRAConfig(max_loras=loras, max_cpu_loras=64, max_lora_rank=8),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.num_gpu_blocks = blocks + 1
    config.scheduler_config.async_scheduling = is_async  # the CPU platform switches it off
    return config


class Engine:
    """EngineCore, worker and API process around one scheduler; ``now`` counts steps and is the scheduler's clock."""

    def __init__(self, make: Any = gang_scheduler, check: bool = True, **settings: Any) -> None:
        config = vllm_config(**settings)
        self.is_async = bool(config.scheduler_config.async_scheduling)
        self.check = check
        self.now = 0.0
        scheduler_module.time = SimpleNamespace(monotonic=lambda: self.now)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=config.model_config.dtype)
        blocks = config.cache_config.num_gpu_blocks
        self.scheduler = make(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self.hasher = (
            get_request_block_hasher(BLOCK_SIZE, sha256) if config.cache_config.enable_prefix_caching else None
        )
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.requests: dict[str, Request] = {}
        self.gangs: dict[str, list[str]] = {}
        self.stop_at: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.started: set[str] = set()  # gangs that have sampled a token
        self.cancelled: set[str] = set()  # the API process has dropped these
        self.first_step: dict[str, float] = {}
        self.preemptions = 0
        self.prefix_hits: dict[
            str, int
        ] = {}  # tokens that a request found in the prefix cache, when it was last admitted
        self.may_preempt_gangs = False
        self.last: SchedulerOutput | None = None

    # --- the API process

    def add(
        self,
        request_id: str,
        prompt: int | list[int] = 8,
        max_tokens: int = 4,
        lora: int = 0,
        stop_at: int | None = None,
        extra: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> Request:
        """An ordinary request (or, with ``extra``, any other); ``stop_at`` is the output index of a stop token."""
        ids = list(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(
            request_id=request_id,
            prompt_token_ids=ids,
            sampling_params=SamplingParams(max_tokens=max_tokens, stop_token_ids=[STOP_TOKEN], extra_args=extra),
            pooling_params=None,
            lora_request=LoRARequest(f"lora{lora}", lora, f"/lora{lora}") if lora else None,
            block_hasher=self.hasher,
            priority=priority,
        )
        self.requests[request_id] = request
        self.tokens[request_id] = []
        if stop_at is not None:
            self.stop_at[request_id] = stop_at
        self.scheduler.add_request(request)
        return request

    def add_member(
        self,
        gang: str,
        k: Any,
        member: int,
        lora: int | None = None,
        targets: list[list[int]] | None = None,
        stats: str = "",
        **kwargs: Any,
    ) -> str:
        """One member; adapter ``member + 1`` unless given; of a scoring gang if there are targets."""
        request_id = f"{gang}.{member}"
        self.gangs.setdefault(gang, []).append(request_id)
        extra = {"credence_gang": gang, "credence_k": k, "credence_member": member}
        extra |= {"credence_targets": targets or [], "credence_stats": stats}
        self.add(request_id, lora=member + 1 if lora is None else lora, extra=extra, **kwargs)
        return request_id

    def add_gang(self, gang: str, k: int, loras: list[int] | None = None, **kwargs: Any) -> list[str]:
        return [self.add_member(gang, k, i, loras[i] if loras else None, **kwargs) for i in range(k)]

    def abort(self, *request_ids: str) -> None:
        """Abort as a client that goes away does: the API process forgets the requests at once."""
        self.cancelled.update(request_ids)
        self.scheduler.finish_requests(list(request_ids), RequestStatus.FINISHED_ABORTED)

    # --- EngineCore

    def step(self, abort_during: tuple[str, ...] = ()) -> SchedulerOutput | None:
        self.now += 1
        self.last = None
        if self.scheduler.has_requests():
            output = self.last = self.scheduler.schedule()
            if self.check:
                self._check_schedule(output)
            self.in_flight.append((output, self._execute(output)))
            more = output.total_num_scheduled_tokens > 0 or self.scheduler.has_requests()
            if self.is_async and len(self.in_flight) < 2 and more:
                return output
        if self.in_flight:
            if abort_during:
                self.abort(*abort_during)
            self._update(*self.in_flight.popleft())
        return self.last

    def run(self, limit: int = 500) -> int:
        """Step until nothing is left; the number of steps."""
        for steps in range(limit):
            if not self.scheduler.has_requests() and not self.in_flight:
                self.check_empty()
                return steps
            self.step()
        left = {r: q.status.name for r, q in self.scheduler.requests.items()}
        raise AssertionError(f"{len(left)} requests are still there after {limit} steps: {left}")

    def step_until(self, condition: Any, limit: int = 200) -> None:
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"not reached within {limit} steps")

    # --- the worker: samples a token for each request whose known tokens are all computed after the step

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        cached = output.scheduled_cached_reqs
        known = {r.req_id: (r.num_computed_tokens, 0) for r in output.scheduled_new_reqs}
        known |= zip(
            cached.req_ids, zip(cached.num_computed_tokens, cached.num_output_tokens, strict=True), strict=True
        )
        sampled: dict[str, list[int]] = {}
        for request_id, count in output.num_scheduled_tokens.items():
            computed, num_output = known[request_id]
            missing = self.requests[request_id].num_prompt_tokens + num_output - computed - count
            assert missing >= 0
            sampled[request_id] = [] if missing else [self._token(request_id, num_output)]
        if self.check:
            self._check_sampled({r: known[r][1] for r, tokens in sampled.items() if tokens})
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={r: i for i, r in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )

    def _token(self, request_id: str, index: int) -> int:
        if self.stop_at.get(request_id) == index:
            return STOP_TOKEN
        return zlib.crc32(f"{request_id.split('.')[0]} {index}".encode()) % STOP_TOKEN

    def _update(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        # As in the real one, each reply names a request at most once and a finished request is never named again.
        for outputs in self.scheduler.update_from_output(output, result).values():
            for out in outputs.outputs:
                if out.request_id in self.cancelled:
                    continue
                assert out.request_id not in self.reasons, f"{out.request_id} was already finished"
                self.tokens[out.request_id] += out.new_token_ids
                if out.finish_reason is not None:
                    self.reasons[out.request_id] = out.finish_reason
        if self.check:
            for members in self.gangs.values():
                live = {r: len(q.output_token_ids) for r in members if (q := self.scheduler.requests.get(r))}
                assert len(set(live.values())) <= 1, f"members have different numbers of tokens: {live}"

    # --- what must hold in every step

    def members_of(self, request_id: str) -> list[str]:
        gang = self.requests[request_id].sampling_params.extra_args
        return self.gangs.get((gang or {}).get("credence_gang"), [])

    def _check_schedule(self, output: SchedulerOutput) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_num_active_reqs
        assert output.total_num_scheduled_tokens <= scheduler._token_budget
        loras = {
            q.lora_request.lora_int_id for r in output.num_scheduled_tokens if (q := self.requests[r]).lora_request
        }
        assert len(loras) <= scheduler.lora_config.max_loras, f"adapters in one step: {loras}"
        self.preemptions += len(output.preempted_req_ids or ())
        for request_id in output.preempted_req_ids or ():
            assert self.may_preempt_gangs or request_id not in scheduler._gang_of, f"{request_id} was preempted"
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert scheduler._reserved_blocks == sum(scheduler._reserve.values()) <= free
        assert scheduler._reserve == {
            r: blocks
            for r, gang in scheduler._gang_of.items()
            if gang.admitted and (blocks := scheduler._blocks_to_come(scheduler.requests[r]))
        }
        for gang in self.started:
            given = {output.num_scheduled_tokens.get(r, 0) for r in self.gangs[gang] if r in scheduler.requests}
            assert self.may_preempt_gangs or given in (set(), {0}, {1}), f"{gang} out of lock-step: {given}"
        cached = output.scheduled_cached_reqs
        admitted = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids:
                admitted[request_id] = computed
        self.prefix_hits |= admitted
        for request_id, hit in admitted.items():
            extra = self.requests[request_id].sampling_params.extra_args or {}
            targets = extra.get("credence_targets") or [[hit]]
            assert hit <= targets[0][0], (
                f"{request_id} will not compute its first target {targets[0]}, it has {hit} tokens"
            )
        for request_id in output.num_scheduled_tokens:
            self.first_step.setdefault(request_id, self.now)

    def _check_sampled(self, positions: dict[str, int]) -> None:
        for gang, members in self.gangs.items():
            at = [positions[r] for r in members if r in positions]
            size = (self.requests[members[0]].sampling_params.extra_args or {})["credence_k"]
            assert not at or (len(at) == size and len(set(at)) == 1), f"{gang} of {size} sampled at positions {at}"
            if at and size > 1:  # a gang of one is an ordinary request
                self.started.add(gang)

    def check_empty(self) -> None:
        scheduler = self.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert scheduler._reserved_blocks == 0
        left = [scheduler.requests, scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting]
        left += [scheduler.deferred_waiting, scheduler._gangs, scheduler._gang_of, scheduler._reserve]
        left += [scheduler._arrival, scheduler._torn, scheduler._notices]
        assert not any(map(len, left)), left
        assert scheduler.get_request_counts() == (0, 0)
        assert scheduler.gang_violations == 0
        unheard = set(self.requests) - set(self.reasons) - self.cancelled
        assert not unheard, f"the API process never heard of the end of {unheard}"
        for members in self.gangs.values():
            ends = {(self.reasons[r], tuple(self.tokens[r])) for r in members if r not in self.cancelled}
            assert len({reason for reason, _ in ends}) <= 1 or {reason for reason, _ in ends} <= {
                FinishReason.ABORT,
                FinishReason.ERROR,
            }, ends
            if not self.cancelled.intersection(members):
                assert len(ends) <= 1, f"members ended differently: {ends}"
