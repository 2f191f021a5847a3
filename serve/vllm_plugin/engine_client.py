"""An engine client that runs one request as the K members of a gang.

vLLM's serving classes call ``engine_client.generate``. A shallow copy of the completion handler gets this client instead of vLLM's own,
so rendering, tokenising, stop strings and the shape of the answer stay vLLM's. Which gang a call belongs to travels in a context
variable that is read when ``generate`` is called, inside the request's own task.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextvars import ContextVar
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from credence.serve.config import TOKEN_VARIABLE
from credence.serve.engine import SampleLoadError
from credence.serve.ensemble import EnsembleService, Gang
from credence.serve.errors import EnsembleFailed
from credence.serve.samples import Slot

CURRENT_GANG: ContextVar[Gang] = ContextVar("credence_gang")


class VllmSampleEngine:
    """Loads samples into vLLM's workers (see credence.serve.engine.SampleEngine)."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._client = engine_client

    async def load(self, slot: Slot) -> None:
        """Registers the sample; the workers draw it."""
        try:
            loaded = await self._client.add_lora(lora_request_of(slot))
        except EngineDeadError:
            raise
        except Exception as error:
            raise SampleLoadError(str(error)) from error
        if not loaded:
            raise SampleLoadError(f"vLLM refused {slot.ref.to_path()}")

    async def unload(self, lora_id: int) -> None:
        """Forgets the sample."""
        await self._client.remove_lora(lora_id)


def lora_request_of(slot: Slot) -> LoRARequest:
    """vLLM's name of a sample. The path spells out its content, because prompts are cached by name and path."""
    return LoRARequest(lora_name=slot.name, lora_int_id=slot.lora_id, lora_path=slot.ref.to_path())


class EnsembleClient:
    """vLLM's engine client with ``generate`` replaced; everything else is passed through."""

    def __init__(self, inner: EngineClient, service: EnsembleService) -> None:
        self._inner = inner
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Runs the current gang on ``prompt`` and yields its leader's final output; arguments as vLLM's ``generate``."""
        return self._run(CURRENT_GANG.get(), prompt, sampling_params, request_id, kwargs)

    async def _run(
        self, gang: Gang, prompt: Any, params: SamplingParams, request_id: str, kwargs: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        max_tokens = params.max_tokens or 1
        self._service.check_fits(gang, len(prompt.get("prompt_token_ids", ())), max_tokens)
        stats_path = self._service.open_stats(gang, max_tokens)
        ids = [f"{request_id}-{gang.gang_id}-{member}" for member in range(gang.num_samples)]
        members = [
            asyncio.ensure_future(
                _last(
                    self._inner.generate(
                        prompt,
                        member_params(gang, params, member, stats_path),
                        ids[member],
                        lora_request=lora_request_of(slot),
                        **kwargs,
                    )
                )
            )
            for member, slot in enumerate(gang.slots)
        ]
        try:
            yield await _leader(members)
        finally:
            await asyncio.shield(self._end(ids, members))

    async def _end(self, ids: list[str], members: Sequence["asyncio.Future[RequestOutput]"]) -> None:
        """Ends the members that still run: one message for all of them, then wait until none is left."""
        running = [request_id for request_id, member in zip(ids, members, strict=True) if not member.done()]
        if running:
            await _quietly(self._inner.abort(running))
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)


def member_params(gang: Gang, params: SamplingParams, member: int, stats_path: str) -> SamplingParams:
    """Sampling parameters of one member.

    The logits processor chooses the gang's token, so members need no seed (vLLM's per-request generators also crash on CPU with chunked
    prompts). Only the leader looks for stop strings and makes text; the followers are ended with it.
    """
    clone = params.clone()
    clone.n = 1
    clone.seed = None
    clone.logprobs = None
    clone.prompt_logprobs = None
    clone.output_kind = RequestOutputKind.FINAL_ONLY
    clone.extra_args = {
        "credence_gang": gang.gang_id,
        "credence_k": gang.num_samples,
        "credence_member": member,
        "credence_seed": gang.token_seed,
        "credence_stats": stats_path,
        "credence_temperature": gang.temperature,
        "credence_support": list(gang.plan.adapter.support),
        "credence_token": os.environ[TOKEN_VARIABLE],
    }
    if member > 0:
        clone.stop = []
        clone.include_stop_str_in_output = False
        clone.output_text_buffer_length = 0
        clone.detokenize = False
    return clone


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    last = None
    async for output in outputs:
        last = output
    if last is None:
        raise EnsembleFailed("the engine ended a member without an output")
    return last


async def _leader(members: Sequence["asyncio.Future[RequestOutput]"]) -> RequestOutput:
    """The leader's output, or the first error of any member."""
    waiting = set(members)
    while not members[0].done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for member in done:
            member.result()
    output = members[0].result()
    reason = output.outputs[0].finish_reason
    if reason in ("abort", "error"):
        raise EnsembleFailed(f"the engine ended the ensemble before its answer was complete (finish reason {reason})")
    return output


async def _quietly(work: Awaitable[None]) -> None:
    try:
        await work
    except EngineDeadError:
        return
