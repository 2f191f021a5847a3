"""Four repairs of vLLM 0.32 on CPU, for every request, not only ours.

1. ``SamplingParams.seed`` with a prompt that is prefilled in chunks. vLLM samples a token for every row of every
   step and throws away those of unfinished prompts; to leave no trace it winds the request's generator back by
   ``set_offset(get_offset() - 4)``. CPU generators have no offset ("CPU Generator does not use offset"), the
   exception ends the engine. Here the generator's state is kept before sampling and restored after it, so a
   chunked prompt gives the same tokens as an unchunked one.
2. ``prompt_logprobs`` where the output layer takes LoRA. vLLM computes the logits of all prompt positions of a
   request with the mapping "one row per request", which fails, or picks another request's adapter. Here the
   request is named while its prompt logits are computed.
3. The engine process and the worker wait for one another in a loop that never sleeps within a second of the last message, so
   while the worker computes, the engine process keeps a second core busy with nothing. Here the loop naps between two looks.
   (vLLM's own idle mode waits for a wake-up message instead, and misses some when steps follow one another closely.)
4. vLLM looks through the attributes of every loaded module, and fails on llvmlite, which numba loads: its library object returns
   a function for any name, ``__dict__`` included.
"""

import contextlib
import functools
import time
from typing import Any

NAP_S = 2e-4
"""How long a process sleeps between two looks at the queue, seconds; a step takes milliseconds."""


def install() -> None:
    """Repairs vLLM's model runner and message queue in this process. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's classes do not have what is repaired here.
    """
    _nap_while_waiting()
    _hide_special_names_of_llvmlite()
    # The CPU runner inherits these methods. They are wrapped where they are defined, where other hooks wrap them too, in any order.
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in ("_sample", "_bookkeeping_sync", "_get_prompt_logprobs_dict"):
        if not hasattr(GPUModelRunner, name):
            raise RuntimeError(f"this vLLM has no GPUModelRunner.{name}: it is not a supported version")
    if getattr(GPUModelRunner, "credence_fixes", False):
        return
    GPUModelRunner._sample = _keeping_generators(GPUModelRunner._sample)
    GPUModelRunner._bookkeeping_sync = _restoring_generators(GPUModelRunner._bookkeeping_sync)
    GPUModelRunner._get_prompt_logprobs_dict = _one_request_at_a_time(GPUModelRunner._get_prompt_logprobs_dict)
    GPUModelRunner.credence_fixes = True


def _nap_while_waiting() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    if not hasattr(shm_broadcast, "sched_yield"):
        raise RuntimeError("this vLLM's message queue does not wait by sched_yield: it is not a supported version")
    shm_broadcast.sched_yield = functools.partial(time.sleep, NAP_S)


def _hide_special_names_of_llvmlite() -> None:
    from llvmlite.binding import ffi

    original = ffi._lib_wrapper.__getattr__
    if getattr(original, "credence_fix", False):
        return

    def __getattr__(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    __getattr__.credence_fix = True  # type: ignore[attr-defined]
    ffi._lib_wrapper.__getattr__ = __getattr__


def _keeping_generators(original: Any) -> Any:
    @functools.wraps(original)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        self.credence_generator_states = {
            row: generator.get_state()
            for row, generator in batch.generators.items()
            if self.discard_request_mask.np[row]
        }
        return original(self, *args, **kwargs)

    return _sample


def _restoring_generators(original: Any) -> Any:
    @functools.wraps(original)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        rewound = {}
        for row, state in getattr(self, "credence_generator_states", {}).items():
            rewound[row] = generators.pop(row)
            rewound[row].set_state(state)
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(rewound)
            self.credence_generator_states = {}

    return _bookkeeping_sync


def _one_request_at_a_time(original: Any) -> Any:
    @functools.wraps(original)
    def _get_prompt_logprobs_dict(self: Any, hidden_states: Any, num_scheduled_tokens: Any) -> Any:
        pending = self.num_prompt_logprobs
        if not pending or not self.lora_config:
            return original(self, hidden_states, num_scheduled_tokens)
        wrappers = self.lora_manager._adapter_manager.punica_wrapper_mapping.values()
        results: dict[str, Any] = {}
        try:
            for request_id in [name for name in pending if name in num_scheduled_tokens]:
                self.num_prompt_logprobs = {request_id: pending[request_id]}
                with contextlib.ExitStack() as stack:
                    for wrapper in wrappers:
                        stack.enter_context(wrapper.prompt_rows_of(self.input_batch.req_id_to_index[request_id]))
                    results.update(original(self, hidden_states, num_scheduled_tokens))
                if not self.num_prompt_logprobs:
                    del pending[request_id]
        finally:
            self.num_prompt_logprobs = pending
        return results

    return _get_prompt_logprobs_dict
