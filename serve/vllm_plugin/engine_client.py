"""Runs gangs on vLLM's engine client: one member request per posterior sample, one output stream.

vLLM's serving classes call ``engine_client.generate``. Shallow copies of its completion and chat handlers get :class:`EnsembleClient`
instead of vLLM's own client, so rendering, tokenising, stop strings, streaming and the shape of the answer stay vLLM's. Which request a
call belongs to travels in a context variable that is read when ``generate`` is called, inside the request's own task.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from credence.adapters import Artifact
from credence.serve.config import TOKEN_VARIABLE
from credence.serve.engine import SampleLoadError
from credence.serve.ensemble import Ensemble, Gang, Plan
from credence.serve.errors import EnsembleFailed
from credence.serve.facts import CURRENT, note
from credence.serve.samples import Slot


class Run(Protocol):
    """Answers one uncertainty request; see credence.serve.vllm_plugin.modes."""

    @property
    def plan(self) -> Plan:
        """The request's plan."""
        ...

    def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one prompt of the request."""
        ...


CURRENT_RUN: ContextVar[Run] = ContextVar("credence_run")


class EnsembleClient:
    """vLLM's engine client with ``generate`` replaced; everything else is passed through."""

    def __init__(self, inner: EngineClient) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers ``prompt`` in the current request's mode; arguments as vLLM's ``generate``."""
        return CURRENT_RUN.get().generate(prompt, sampling_params, request_id, options)


class VllmSampleEngine:
    """Loads samples into vLLM's workers (see credence.serve.engine.SampleEngine)."""

    def __init__(self, engine_client: EngineClient) -> None:
        self._client = engine_client

    async def load(self, slot: Slot) -> None:
        """Registers the sample; the workers draw it."""
        await _add(self._client, lora_request_of(slot))

    async def unload(self, lora_id: int) -> None:
        """Forgets the sample."""
        await self._client.remove_lora(lora_id)


class VllmMeans:
    """Mean adapters of vLLM (see credence.serve.adapter_registry.MeanEngine).

    Args:
        models: vLLM's table of served models.
    """

    def __init__(self, client: EngineClient, models: Any) -> None:
        self._client = client
        self._models = models
        self._published: set[str] = set()
        self._loaded: dict[int, str] = {}
        self._names: list[str] = []
        self._numbers = itertools.count()
        # vLLM puts its own name of the LoRA into answers; callers know the served name.
        models.model_name = self._model_name

    def reserved(self, name: str) -> bool:
        """Whether vLLM serves something else under this name."""
        return self._models.registry.is_base_model(name) or (
            name in self._models.lora_requests and name not in self._published
        )

    async def load(self, lora_id: int, artifact: Artifact) -> LoRARequest:
        """Loads the mean.

        vLLM takes two LoRAs of one name for the same, and while a served name moves both are in one batch; and it keeps a series of metrics
        for every name it has seen. So the names are few, each belongs to one mean at a time, and the path spells out the content.
        """
        name = self._names.pop() if self._names else f"credence-mean-{next(self._numbers):03d}"
        request = LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=str(artifact.path))
        try:
            await _add(self._client, request)
        except BaseException:
            self._names.append(name)
            raise
        self._loaded[lora_id] = name
        return request

    async def unload(self, mean: LoRARequest) -> None:
        """Forgets the mean."""
        await self._client.remove_lora(mean.lora_int_id)
        self._names.append(self._loaded.pop(mean.lora_int_id))

    def publish(self, name: str, mean: LoRARequest) -> None:
        """Makes requests without uncertainty for ``name`` go to ``mean``."""
        self._published.add(name)
        self._models.lora_requests[name] = mean

    def withdraw(self, name: str) -> None:
        """Makes ``name`` unknown to vLLM."""
        self._published.discard(name)
        self._models.lora_requests.pop(name, None)

    def _model_name(self, lora_request: LoRARequest | None = None) -> str:
        if lora_request is None:
            return str(self._models.base_model_paths[0].name)
        facts = CURRENT.get()
        return (facts and facts.model) or next(
            (name for name in self._published if self._models.lora_requests[name] is lora_request),
            lora_request.lora_name,
        )


async def _add(client: EngineClient, request: LoRARequest) -> None:
    """Loads a LoRA whole or not at all; raises SampleLoadError."""
    try:
        loaded = await client.add_lora(request)
    except EngineDeadError:
        raise
    except Exception as error:
        # vLLM keeps, under its id, what it has read and could not put into a slot.
        await client.remove_lora(request.lora_int_id)
        raise SampleLoadError(str(error)) from error
    if not loaded:
        raise SampleLoadError(f"vLLM refused {request.lora_path}")


def lora_request_of(slot: Slot) -> LoRARequest:
    """vLLM's name of a sample. The path spells out its content, because prompts are cached by name and path."""
    return LoRARequest(lora_name=slot.name, lora_int_id=slot.lora_id, lora_path=slot.ref.to_path())


class GangRunner:
    """Runs the gangs of one request; at the end of the request, none of their members is left in the engine.

    Args:
        cache_salt: of the prefix cache, for texts that are read; a prompt that is generated from carries its own.
    """

    def __init__(self, client: EngineClient, ensemble: Ensemble, cache_salt: str | None = None) -> None:
        self.client = client
        self._ensemble = ensemble
        self._cache_salt = cache_salt

    async def score(self, gang: Gang, request_id: str, options: dict[str, Any]) -> None:
        """Runs a scoring gang to its end; raises what its members raise."""
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prompt = tokens_input(gang.prompt_token_ids, cache_salt=self._cache_salt)
        async for _ in self.stream(gang, prompt, params, request_id, options):
            pass

    async def stream(
        self, gang: Gang, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the leader's outputs, with the log-probabilities of the average where ``params`` asks for them.

        Raises:
            EnsembleFailed: the engine ended a member before the answer was complete.
        """
        note("gang start", members=gang.num_samples, prompt_tokens=len(gang.prompt_token_ids))
        ids = [f"{request_id}-{gang.gang_id}-{member}" for member in range(gang.num_samples)]
        outputs = [
            self.client.generate(
                prompt, member_params(gang, params, member), ids[member], lora_request=lora_request_of(slot), **options
            )
            for member, slot in enumerate(gang.slots)
        ]
        leader = aiter(outputs[0])
        followers = [asyncio.ensure_future(_last(output)) for output in outputs[1:]]
        # One future for all followers: waiting for each of them at every token would cost K callbacks a token.
        together = asyncio.gather(*followers)
        following: asyncio.Future[RequestOutput | None] = asyncio.ensure_future(_next(leader))
        finished = False
        try:
            while not finished:
                waiting: set[asyncio.Future[Any]] = {following} if together.done() else {following, together}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if together.done():
                    together.result()
                if not following.done():
                    continue
                output = following.result()
                if output is None:
                    raise EnsembleFailed("the engine ended a member without an output")
                finished = output.finished
                _take(gang, output, params)
                if not finished:
                    following = asyncio.ensure_future(_next(leader))
                yield output
            self._ensemble.finished(gang)
        finally:
            tasks = [following, *followers]
            await asyncio.shield(self._end(ids, tasks, together))
            note(
                "gang end", members=gang.num_samples, complete=finished, tokens=len(gang.targets) or len(gang.token_ids)
            )

    async def _end(
        self, ids: list[str], tasks: Sequence["asyncio.Future[RequestOutput | None]"], together: "asyncio.Future[Any]"
    ) -> None:
        """Ends the members that still run: one message for all of them, then wait until none is left."""
        running = [request_id for request_id, task in zip(ids, tasks, strict=True) if not task.done()]
        if running:
            await _quietly(self.client.abort(running))
        together.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, together, return_exceptions=True)


def member_params(gang: Gang, params: SamplingParams, member: int) -> SamplingParams:
    """Sampling parameters of one member.

    The logits processor chooses the gang's token, so members need no seed (vLLM's per-request generators also crash on CPU with chunked
    prompts). Only the leader looks for stop strings, makes text and carries constraints (logit bias, allowed and forbidden tokens, minimum
    length, grammar), which act on the average; the followers are ended with it.
    """
    clone = params.clone()
    clone.n = 1
    clone.seed = None
    clone.logprobs = None
    clone.prompt_logprobs = None
    clone.extra_args = {
        "credence_gang": gang.gang_id,
        "credence_k": gang.num_samples,
        "credence_member": member,
        "credence_seed": gang.token_seed,
        "credence_stats": gang.stats.path if gang.stats is not None else "",
        "credence_temperature": gang.temperature,
        "credence_support": list(gang.plan.adapter.support),
        "credence_token": os.environ[TOKEN_VARIABLE],
        "credence_top": gang.num_top,
        "credence_targets": [list(target) for target in gang.targets],
    }
    if member > 0:
        clone.output_kind = RequestOutputKind.FINAL_ONLY
        clone.stop = []
        clone.include_stop_str_in_output = False
        clone.output_text_buffer_length = 0
        clone.detokenize = False
        clone.min_tokens = 0
        clone.logit_bias = None
        clone.allowed_token_ids = None
        clone.bad_words = None
        clone._bad_words_token_ids = None
        clone.structured_outputs = None
    return clone


def _take(gang: Gang, output: RequestOutput, params: SamplingParams) -> None:
    """Notes the leader's new tokens, and gives them the average's log-probabilities if ``params.logprobs`` asks for them."""
    completion = output.outputs[0]
    if completion.finish_reason in ("abort", "error"):
        raise EnsembleFailed(
            f"the engine ended the ensemble before its answer was complete (finish reason {completion.finish_reason})"
        )
    start = len(gang.token_ids) if params.output_kind == RequestOutputKind.DELTA else 0
    gang.token_ids[start:] = completion.token_ids
    if params.logprobs is None:
        return
    table = gang.table(start)
    completion.logprobs = [
        {
            int(token): Logprob(logprob=float(value))
            # The chosen token first, as vLLM has it; once more in the list of the most likely, it stays where it is.
            for token, value in [
                (table.token_id[step], table.log_prob[step]),
                *zip(table.top_tokens[step], table.top_log_probs[step], strict=True),
            ]
        }
        for step in range(len(table))
    ]
    completion.cumulative_logprob = float(gang.table().log_prob.sum())


async def _next(outputs: AsyncIterator[RequestOutput]) -> RequestOutput | None:
    return await anext(outputs, None)


async def _last(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    last = None
    async for output in outputs:
        last = output
    if last is None:
        raise EnsembleFailed("the engine ended a member without an output")
    return last


async def _quietly(work: Awaitable[None]) -> None:
    try:
        await work
    except EngineDeadError:
        return
