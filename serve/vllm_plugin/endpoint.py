"""Entry point ``vllm.endpoint_plugins``: puts the gate in front of vLLM's application and answers behind it.

The plugin refuses to start where an answer could be wrong: without our scheduler or logits processor vLLM would serve ``uncertainty``
requests as something else, and only log that a plugin is missing.
"""

import asyncio
import copy
import itertools
import json
import logging
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY
from pydantic import ValidationError
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMError
from vllm.lora.request import LoRARequest
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.v1.engine.exceptions import EngineDeadError

from credence.adapters import load_artifact
from credence.serve.config import ServeConfig, from_environment
from credence.serve.engine import EngineLimits
from credence.serve.ensemble import EnsembleService, ServedAdapter, describe
from credence.serve.errors import BadRequest, ConfigurationError, NotFound, ServeError, Unavailable
from credence.serve.gate import Answer, Gate, Scope
from credence.serve.metrics import Metrics
from credence.serve.schemas import UncertaintyOptions
from credence.serve.vllm_plugin.engine_client import CURRENT_GANG, EnsembleClient, VllmSampleEngine
from credence.serve.vllm_plugin.scheduler import GangAsyncScheduler, GangScheduler, gang_scheduler

logger = logging.getLogger(__name__)

# Fields that would change what the average means or that the ensemble does not carry yet, with their harmless values.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "stream": (False, None),
    "n": (1,),
    "echo": (False, None),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "use_beam_search": (False,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": ([],),
    "min_tokens": (0,),
    "response_format": (None,),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "prompt_embeds": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "vllm_xargs": (None, {}),
    "repetition_detection": (None,),
    "watermarking": (None, False),
    "thinking_token_budget": (None,),
}


class CredenceEndpointPlugin:
    """See vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "credence_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the gate and the routes /v1/models, /livez and /readyz."""
        app.state.credence = None
        app.add_middleware(Gate, backend=lambda scope: scope["app"].state.credence)
        router = APIRouter()

        @router.get("/v1/models")
        async def models(request: Request) -> JSONResponse:
            return JSONResponse(await request.app.state.credence.models())

        @router.get("/livez")
        async def livez() -> JSONResponse:
            return JSONResponse({"status": "alive"})

        @router.get("/readyz")
        async def readyz(request: Request) -> JSONResponse:
            backend = request.app.state.credence
            problem = "starting" if backend is None else backend.problem()
            return JSONResponse({"status": problem or "ready"}, status_code=503 if problem else 200)

        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Loads the adapters, draws their resident samples and opens the gate.

        Raises:
            ConfigurationError: the server must not start like this.
        """
        if engine_client is None:
            raise ConfigurationError("credence needs an engine; it cannot run in vLLM's render-only server")
        check_engine(engine_client, args)
        backend = await VllmBackend.create(engine_client, state, args, from_environment())
        await backend.canary()
        watch_shutdown(engine_client, backend)
        state.credence = backend


def check_engine(engine_client: EngineClient, args: Namespace) -> None:
    """Refuses engines that would run without what exact ensembles need."""
    config = engine_client.vllm_config
    needed = GangAsyncScheduler if config.scheduler_config.async_scheduling else GangScheduler
    scheduler = config.scheduler_config.get_scheduler_cls()
    if scheduler not in (gang_scheduler, needed):
        raise ConfigurationError(
            f"the engine runs with the scheduler {scheduler.__qualname__}, ensembles need --scheduler-cls "
            f"{gang_scheduler.__module__}.{gang_scheduler.__name__}; start the server with `credence serve`"
        )
    if config.lora_config is None:
        raise ConfigurationError(
            "the engine runs without LoRA; start the server with `credence serve` (it sets --enable-lora)"
        )
    if config.speculative_config is not None:
        raise ConfigurationError("speculative decoding cannot run with logits processors; remove --speculative-config")
    if config.parallel_config.data_parallel_size > 1:
        raise ConfigurationError(
            "one gang must stay on one engine: run one server per replica instead of --data-parallel-size"
        )
    if (getattr(args, "api_server_count", None) or 1) > 1:
        raise ConfigurationError("several API processes would not see each other's samples; use --api-server-count 1")
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigurationError(
            "unset VLLM_ALLOW_RUNTIME_LORA_UPDATING: its endpoints load any path and reuse adapter ids"
        )


class VllmBackend:
    """Answers uncertainty requests through vLLM's own completion handler (see credence.serve.gate.Backend)."""

    def __init__(
        self,
        *,
        engine_client: EngineClient,
        state: State,
        service: EnsembleService,
        config: ServeConfig,
        api_keys: tuple[str, ...],
    ) -> None:
        self.metrics = service.metrics
        self.draining = False
        self.engine_died = False
        self.max_body_bytes = config.max_body_bytes
        self.api_keys = api_keys
        self.engine_client = engine_client
        self._service = service
        self._models = state.openai_serving_models
        # The copy shares everything with vLLM's handler but the engine client.
        self._handler = copy.copy(state.openai_serving_completion)
        self._handler.engine_client = EnsembleClient(engine_client, service)
        self._tokenizer = self._handler.renderer.tokenizer

    @classmethod
    async def create(
        cls, engine_client: EngineClient, state: State, args: Namespace, config: ServeConfig
    ) -> "VllmBackend":
        """Loads every adapter's mean and resident samples; raises ConfigurationError if one does not load."""
        for name in config.adapters:
            if name in state.openai_serving_models.lora_requests or state.openai_serving_models.registry.is_base_model(
                name
            ):
                raise ConfigurationError(f"--adapter {name}: the server already has a model of this name")
        adapters = {
            name: ServedAdapter(name=name, artifact=load_artifact(Path(path))) for name, path in config.adapters.items()
        }
        metrics = Metrics(REGISTRY, [(a.name, a.artifact.config.method, a.artifact.digest) for a in adapters.values()])
        lora_ids = itertools.count(1_000_001)  # vLLM counts its own adapters from 1
        for adapter in adapters.values():
            start = time.perf_counter()
            request = LoRARequest(
                lora_name=adapter.name, lora_int_id=next(lora_ids), lora_path=str(adapter.artifact.path)
            )
            try:
                await engine_client.add_lora(request)
            except Exception as error:
                metrics.adapter_loads.labels("refused").inc()
                raise ConfigurationError(f"adapter {adapter.name} does not load into this model: {error}") from error
            state.openai_serving_models.lora_requests[adapter.name] = request
            metrics.adapter_loads.labels("ok").inc()
            metrics.adapter_load_seconds.observe(time.perf_counter() - start)
        vllm_config = engine_client.vllm_config
        service = EnsembleService(
            config=config,
            adapters=adapters,
            engine=VllmSampleEngine(engine_client),
            limits=EngineLimits(
                max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
                max_loras=vllm_config.lora_config.max_loras,
                num_kv_blocks=vllm_config.cache_config.num_gpu_blocks,
                block_size=vllm_config.cache_config.block_size,
            ),
            metrics=metrics,
            lora_ids=lora_ids,
        )
        await service.warm_up()
        metrics.engine_up.set_function(lambda: 0.0 if engine_client.errored else 1.0)
        keys = tuple(key for key in (args.api_key or [envs.VLLM_API_KEY]) if key)
        return cls(engine_client=engine_client, state=state, service=service, config=config, api_keys=keys)

    async def canary(self) -> None:
        """Asks every adapter for one averaged token through the whole path.

        Raises:
            ConfigurationError: an answer did not come out whole, e.g. because vLLM did not load the logits processor.
        """
        for name in self._service.adapters:
            body = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0.0, "add_special_tokens": False}
            scope = {"type": "http", "headers": [], "state": {}}
            try:
                await self.complete(body, UncertaintyOptions(), scope)
            except ServeError as error:
                raise ConfigurationError(f"the engine does not answer for adapter {name}: {error.message}") from error

    def problem(self) -> str | None:
        """Why the server should get no traffic, or None."""
        if self.engine_client.errored:
            return "engine dead"
        return "draining" if self.draining else None

    async def models(self) -> dict[str, Any]:
        """vLLM's model list, with the posterior of each adapter."""
        listing: dict[str, Any] = (await self._models.show_available_models()).model_dump()
        for card in listing["data"]:
            adapter = self._service.adapters.get(card["id"])
            if adapter is not None:
                card["root"] = adapter.name
                card["posterior"] = self._posterior(adapter)
        return listing

    def _posterior(self, adapter: ServedAdapter) -> dict[str, Any]:
        config, default = adapter.artifact.config, self._service.default_samples(adapter)
        return {
            "kind": config.kind,
            "method": config.method,
            "digest": adapter.artifact.digest,
            "tau": config.fitted_tau(default),
            "default_n_samples": default,
            "max_n_samples": self._service.max_samples(adapter),
        }

    async def complete(self, body: dict[str, Any], options: UncertaintyOptions, scope: Scope) -> Answer:
        """Answers one /v1/completions request with uncertainty."""
        if self.engine_client.errored:
            raise self.engine_client.dead_error
        request = _parse(body)
        if await self._handler._check_model(request) is not None:
            known = ", ".join(sorted(self._service.adapters))
            raise NotFound(f"model {request.model!r} does not exist; adapters with a posterior: {known}", param="model")
        plan = self._service.plan(request.model, options)
        wants_token_ids = request.return_token_ids
        request.return_token_ids = True
        async with self._service.gang(plan) as gang:
            if request.seed is not None:
                gang.token_seed = request.seed % 2**63
            context = CURRENT_GANG.set(gang)
            try:
                response = await self._handler.create_completion(request, Request(dict(scope)))
            finally:
                CURRENT_GANG.reset(context)
            if isinstance(response, ErrorResponse):
                raise _from_envelope(response)
            assert isinstance(response, CompletionResponse)
            choice = response.choices[0]
            token_ids = list(choice.token_ids or ())
            texts = token_texts(self._tokenizer, list(choice.prompt_token_ids or ()), token_ids)
            uncertainty = describe(gang, token_ids, texts)
            num_samples = gang.num_samples
        name = plan.adapter.name
        if uncertainty.confidence is not None and uncertainty.epistemic is not None:
            self.metrics.confidence.labels(name).observe(uncertainty.confidence)
            self.metrics.epistemic_nats.labels(name).observe(uncertainty.epistemic)
        if uncertainty.flag != "ok":
            self.metrics.flagged.labels(name).inc()
        document = response.model_dump()
        document["choices"][0]["uncertainty"] = uncertainty.to_json()
        if not wants_token_ids:
            document["choices"][0]["token_ids"] = None
            document["choices"][0]["prompt_token_ids"] = None
        document["model"] = name
        usage = document["usage"]
        usage["uncertainty_details"] = {
            "n_samples": num_samples,
            "sample_prompt_tokens": num_samples * usage["prompt_tokens"],
            "sample_completion_tokens": num_samples * usage["completion_tokens"],
        }
        return Answer(body=document, num_samples=plan.num_samples)

    def error_of(self, error: Exception) -> ServeError:
        """vLLM's own translation of its exceptions, in our error class."""
        if isinstance(error, EngineDeadError):
            return Unavailable("the engine has stopped; send the request to another replica", reason="draining")
        if isinstance(error, (VLLMError, ValueError)):
            return _from_envelope(create_error_response(error))
        return ServeError("internal error while serving an uncertainty request; the server's log has the details")


def _parse(body: dict[str, Any]) -> CompletionRequest:
    try:
        request = CompletionRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise BadRequest(f"{param or 'request'}: {first['msg']}", param=param) from None
    for field, harmless in UNSUPPORTED.items():
        value = getattr(request, field, harmless[0])
        if value not in harmless:
            raise BadRequest(
                f"{field} = {json.dumps(value, default=str)[:80]} cannot be combined with uncertainty; leave it out",
                param=field,
            )
    if isinstance(request.prompt, list) and request.prompt and not isinstance(request.prompt[0], int):
        raise BadRequest(
            "a list of prompts cannot be combined with uncertainty; send one request per prompt", param="prompt"
        )
    if request.max_tokens is not None and request.max_tokens < 1:
        raise BadRequest(f"max_tokens must be 1 or more with uncertainty, got {request.max_tokens}", param="max_tokens")
    return request


def _from_envelope(response: ErrorResponse) -> ServeError:
    error = ServeError(response.error.message, param=response.error.param)
    error.status, error.kind = int(response.error.code), response.error.type
    if error.status < 500:
        error.reason = "bad_request"
    return error


def token_texts(tokenizer: Any, prompt_ids: list[int], token_ids: list[int]) -> list[str]:
    """The text each token adds, decoded after the few tokens before it, so that leading spaces and split characters come out right."""
    context = 8
    ids = prompt_ids[-context:] + token_ids
    texts = []
    for end in range(len(ids) - len(token_ids), len(ids)):
        start = max(0, end - context)
        before, after = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start : end + 1])
        whole = after.startswith(before) and not after.endswith("\ufffd")
        texts.append(after[len(before) :] if whole else convert_ids_list_to_tokens(tokenizer, [ids[end]])[0])
    return texts


def watch_shutdown(engine_client: EngineClient, backend: VllmBackend) -> None:
    """Makes a shutdown say so: new requests get 503 while it drains, and whoever still waits after it gets an error.

    vLLM stops the engine but leaves the ``generate`` calls that wait for it, and the HTTP server then waits for them.
    """
    original: Callable[..., None] = engine_client.shutdown
    loop = asyncio.get_running_loop()

    def shutdown(timeout: float | None = None) -> None:
        # vLLM also shuts down what is left after the engine has died; only a living engine drains.
        backend.engine_died = backend.engine_died or (engine_client.errored and not backend.draining)
        backend.draining = True
        original(timeout=timeout)
        if not loop.is_closed():
            loop.call_soon_threadsafe(engine_client.output_processor.propagate_error, EngineDeadError())

    engine_client.shutdown = shutdown
