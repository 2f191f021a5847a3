"""Answers uncertainty requests through vLLM's own handlers, and keeps what a running server needs for it."""

import asyncio
import copy
import itertools
import logging
import secrets
import signal
import time
from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastapi import Request
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMError
from vllm.v1.engine.exceptions import EngineDeadError

from credence.serve import preflight
from credence.serve.adapter_folder import AdapterFolder
from credence.serve.adapter_registry import AdapterRegistry
from credence.serve.audit import AuditLog
from credence.serve.config import ServeConfig
from credence.serve.drain import Drain
from credence.serve.engine import EngineLimits
from credence.serve.ensemble import EnsembleService, Plan, ServedAdapter
from credence.serve.errors import (
    ArtifactRefused,
    BadRequest,
    ConfigurationError,
    EnsembleFailed,
    NotFound,
    ServeError,
    Unavailable,
)
from credence.serve.facts import CURRENT
from credence.serve.gate import Answer, EventStream, Scope
from credence.serve.in_flight import InFlight
from credence.serve.keys import KeyRecord, KeyRing
from credence.serve.metrics import Metrics
from credence.serve.readiness import ASIDE, Readiness
from credence.serve.routes import SCORE_PATH, with_extra
from credence.serve.schemas import Uncertainty, UncertaintyOptions
from credence.serve.security import Security, key_of
from credence.serve.vllm_plugin.bodies import ScoreRequest, from_envelope, num_sequences, parse
from credence.serve.vllm_plugin.engine_client import (
    CURRENT_RUN,
    EnsembleClient,
    GangRunner,
    VllmMeans,
    VllmSampleEngine,
)
from credence.serve.vllm_plugin.modes import Run
from credence.serve.vllm_plugin.stream import AnswerStream
from credence.serve.vllm_plugin.text import continuation

logger = logging.getLogger(__name__)


_PROBED: ContextVar[ServedAdapter | None] = ContextVar("credence_probed", default=None)
"""An adapter that is being tried before it is served."""


class VllmBackend:
    """Answers uncertainty requests through vLLM's own completion handler (see credence.serve.gate.Backend)."""

    def __init__(
        self,
        *,
        engine_client: EngineClient,
        state: State,
        service: EnsembleService,
        adapters: dict[str, ServedAdapter],
        lora_ids: "itertools.count[int]",
        config: ServeConfig,
        security: Security,
        base: preflight.BaseModel | None,
    ) -> None:
        self.metrics = service.metrics
        self.draining = False
        self.drain: Drain = state.credence_drain
        self.engine_died = False
        self.security = security
        self.readiness = Readiness(self._probe, limit_s=config.readiness_timeout_s)
        self._probe_metrics = Metrics(CollectorRegistry(), [])
        self.engine_client = engine_client
        self.config = config
        self.in_flight = InFlight()
        self._service = service
        self._models = state.openai_serving_models
        # The copies share everything with vLLM's handlers but the engine client.
        self._completions = copy.copy(state.openai_serving_completion)
        self._chat = copy.copy(state.openai_serving_chat)
        for handler in (self._completions, self._chat):
            handler.engine_client = EnsembleClient(engine_client)
            # The plan has looked the model up; vLLM would look again, and the name may have moved to another artifact in between.
            handler._check_model = _known
            handler._maybe_get_adapters = _planned_mean
        self._tokenizer = self._completions.renderer.tokenizer
        # credence.serve.vllm_plugin.scoring hooks the first model runner alone.
        self._can_score = not engine_client.vllm_config.use_v2_model_runner
        self._max_logprobs = int(self._completions.model_config.max_logprobs)
        self._means = VllmMeans(engine_client, state.openai_serving_models)
        self.registry = AdapterRegistry(
            config=config,
            service=service,
            adapters=adapters,
            engine=self._means,
            in_flight=self.in_flight,
            lora_ids=lora_ids,
            canary=self.canary,
            base=base,
        )
        self._background: set[asyncio.Task[None]] = set()

    @classmethod
    async def create(
        cls, engine_client: EngineClient, state: State, args: Namespace, config: ServeConfig
    ) -> "VllmBackend":
        """Loads every adapter's mean and resident samples; raises ConfigurationError if one does not load."""
        served = state.openai_serving_models
        for name in config.adapters:
            if name in served.lora_requests or served.registry.is_base_model(name) != config.merged:
                raise ConfigurationError(
                    f"the merged model must be served under its adapter's name {name}; leave --served-model-name out"
                    if config.merged
                    else f"--adapter {name}: the server already has a model of this name"
                )
        adapters: dict[str, ServedAdapter] = {}
        metrics = Metrics(REGISTRY, [])
        lora_ids = itertools.count(1_000_001)  # vLLM counts its own adapters from 1
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
                max_lora_rank=vllm_config.lora_config.max_lora_rank,
                lora_modules=frozenset(vllm_config.lora_config.target_modules or ()) or None,
            ),
            metrics=metrics,
            lora_ids=lora_ids,
        )
        metrics.engine_up.set_function(lambda: 0.0 if engine_client.errored else 1.0)
        backend = cls(
            engine_client=engine_client,
            state=state,
            service=service,
            adapters=adapters,
            lora_ids=lora_ids,
            config=config,
            security=make_security(config, args, vllm_config.model_config, metrics),
            base=await asyncio.to_thread(preflight.read_base, args.model, revision=args.revision, dtype=args.dtype)
            if config.adapter_roots or config.adapter_dir
            else None,
        )
        for name, path in config.adapters.items():
            try:
                await backend.registry.start(name, Path(path))
            except ServeError as error:
                raise ConfigurationError(f"--adapter {name}: {error.message}") from error
        return backend

    async def canary(self, adapter: ServedAdapter) -> None:
        """Asks an adapter, served or not, for one averaged token through the whole path.

        Raises:
            ArtifactRefused: an answer did not come out whole, e.g. because vLLM did not load the logits processor.
        """
        CURRENT.set(None)
        probed = _PROBED.set(adapter)
        try:
            await self._ask_one_token(adapter.name, UncertaintyOptions())
            if self._can_score:
                text = {"model": adapter.name, "prompt": [0], "completion": [0]}
                scope: Scope = {"type": "http", "headers": [], "state": {}}
                await self.answer(SCORE_PATH, text, UncertaintyOptions(mode="score"), scope)
        except Unavailable:
            raise
        except ServeError as error:
            raise ArtifactRefused(
                f"the engine does not answer for adapter {adapter.name}: {error.message}", code="engine"
            ) from error
        finally:
            _PROBED.reset(probed)

    def follow_folder(self) -> None:
        """Starts to watch the adapter folder, if there is one."""
        if self.config.adapter_dir is not None:
            folder = AdapterFolder(Path(self.config.adapter_dir), self.registry, self.config.adapters_of_dir)
            task = asyncio.create_task(folder.run())
            self._background.add(task)

    async def _ask_one_token(self, name: str, options: UncertaintyOptions) -> None:
        """Asks for one averaged token through the whole path; raises what goes wrong."""
        body = {"model": name, "prompt": [0, 0], "max_tokens": 1, "temperature": 0.0, "add_special_tokens": False}
        await self.answer("/v1/completions", body, options, {"type": "http", "headers": [], "state": {}})

    async def _probe(self) -> None:
        """The question of /readyz: two resident samples of one adapter, counted aside. An adapter less is no reason to be replaced."""
        name = next(iter(self._service.adapters), None)
        if name is None:
            return
        ASIDE.set(self._probe_metrics)
        resident = self._service.plan(name, UncertaintyOptions())
        await self._ask_one_token(name, UncertaintyOptions(n_samples=min(2, resident.num_samples), tau=resident.tau))

    async def problem(self) -> str | None:
        """Why the server should get no traffic, or None."""
        if self.engine_client.errored:
            return "engine dead"
        return "draining" if self.draining else await self.readiness.problem()

    def most_samples(self, model: object, options: UncertaintyOptions) -> int:
        """The largest K that a request can take if it is served."""
        return self._service.most_samples(model, options)

    async def models(self, key: KeyRecord | None = None) -> dict[str, Any]:
        """vLLM's model list, as far as a key may see it, with the posterior of each adapter."""
        listing: dict[str, Any] = (await self._models.show_available_models()).model_dump()
        cards = listing["data"]
        if not self.config.merged:
            # vLLM names its LoRAs, several names of one artifact among them, in its own way.
            base = len(self._models.base_model_paths)
            template, cards = cards[-1], cards[:base]
            cards += [{**template, "id": name, "parent": cards[0]["id"]} for name in self._service.adapters]
        cards = [card for card in cards if key is None or key.sees(card["id"])]
        for card in cards:
            adapter = self._service.adapters.get(card["id"])
            if adapter is not None:
                card["root"] = adapter.name
                card["posterior"] = self._posterior(adapter)
        return {**listing, "data": cards}

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

    async def answer(
        self, path: str, body: dict[str, Any], options: UncertaintyOptions, scope: Scope
    ) -> Answer | EventStream:
        """Answers a request with uncertainty."""
        if self.engine_client.errored:
            raise self.engine_client.dead_error
        if options.mode != "ensemble" and not self._can_score:
            raise BadRequest(
                f"mode {options.mode!r} reads texts under the samples, which this server's engine cannot: it runs vLLM's second model "
                "runner; ask for mode 'ensemble', or start the server without VLLM_USE_V2_MODEL_RUNNER=1",
                param="uncertainty.mode",
            )
        key = key_of(scope)
        ceiling = None if key is None else key.max_samples
        if path == SCORE_PATH:
            return await self._score(body, options, ceiling, scope)
        chat = path != "/v1/completions"
        handler = self._chat if chat else self._completions
        create = handler.create_chat_completion if chat else handler.create_completion
        request = parse(ChatCompletionRequest if chat else CompletionRequest, body)
        plan = self._plan(request, options, ceiling)
        async with AsyncExitStack() as stack:
            run = await self._run(stack, plan, num_sequences(request, options), request.cache_salt)
            if request.seed is not None:
                run.ensemble.token_seed = request.seed % 2**63
            context = CURRENT_RUN.set(run)
            try:
                response = await create(request, Request(dict(scope)))
            finally:
                CURRENT_RUN.reset(context)
            if isinstance(response, ErrorResponse):
                raise from_envelope(response)
            if isinstance(response, AsyncGenerator):
                return AnswerStream(
                    events=response, run=run, model=plan.adapter.name, stack=stack.pop_all(), backend=self
                )
            document: dict[str, Any] = response.model_dump()
            for choice in document["choices"]:
                uncertainty = run.uncertainty[choice["index"]]
                self.observe(plan, uncertainty)
                choice["uncertainty"] = uncertainty.to_json()
            document["model"] = plan.adapter.name
            document["usage"]["uncertainty_details"] = run.usage()
            return Answer(body=document, num_samples=run.num_samples)

    async def _score(
        self, body: dict[str, Any], options: UncertaintyOptions, ceiling: int | None, scope: Scope
    ) -> Answer:
        """Answers /v1/uncertainty/score: the uncertainty of a text that the caller already has."""
        given = parse(ScoreRequest, body)
        if given.messages is not None:
            fields = {"model": given.model, "messages": given.messages[:-1]}
            request = parse(ChatCompletionRequest, fields)
            plan = self._plan(request, options, ceiling)
            rendered = await self._chat.render_chat_request(request)
            inputs = rendered if isinstance(rendered, ErrorResponse) else rendered[1]
            text: str | list[int] = given.messages[-1]["content"]
        else:
            request = parse(CompletionRequest, {"model": given.model, "prompt": given.prompt, "max_tokens": 1})
            plan = self._plan(request, options, ceiling)
            inputs = await self._completions.render_completion_request(request)
            assert given.completion is not None
            text = given.completion
        if isinstance(inputs, ErrorResponse):
            raise from_envelope(inputs)
        prompt_ids = list(inputs[0]["prompt_token_ids"])
        token_ids = continuation(self._tokenizer, prompt_ids, text) if isinstance(text, str) else text
        self._check_scored(prompt_ids, token_ids)
        facts = CURRENT.get()
        identity = f"score-{secrets.token_hex(16) if facts is None else facts.request_id}"
        async with AsyncExitStack() as stack:
            run = await self._run(stack, plan, 1, given.cache_salt)
            headers = Request(dict(scope)).headers
            traced = await self.engine_client.is_tracing_enabled()
            trace_headers = await self._completions._get_trace_headers(headers) if traced else None
            await run.score(prompt_ids, token_ids, identity, {"trace_headers": trace_headers})
            uncertainty = run.uncertainty[0]
            self.observe(plan, uncertainty)
            usage = {
                "prompt_tokens": len(prompt_ids),
                "completion_tokens": len(token_ids),
                "total_tokens": len(prompt_ids) + len(token_ids),
                "uncertainty_details": run.usage(),
            }
            document = {
                "id": identity,
                "object": "uncertainty.score",
                "created": int(time.time()),
                "model": plan.adapter.name,
                "usage": usage,
                "uncertainty": uncertainty.to_json(),
            }
            return Answer(body=document, num_samples=run.num_samples)

    def _check_scored(self, prompt_ids: list[int], token_ids: list[int]) -> None:
        most, vocabulary = self._completions.model_config.max_model_len, self._completions.model_config.get_vocab_size()
        if not token_ids:
            raise BadRequest("the completion has no token to score", param="completion")
        if max(token_ids) >= vocabulary:
            raise BadRequest(
                f"completion has a token id of {vocabulary} or more, the vocabulary's size", param="completion"
            )
        if len(prompt_ids) + len(token_ids) > most:
            raise BadRequest(
                f"prompt and completion have {len(prompt_ids)} + {len(token_ids)} tokens, the model reads {most}",
                param="completion",
            )

    def _plan(self, request: Any, options: UncertaintyOptions, ceiling: int | None) -> Plan:
        probed = _PROBED.get()
        if probed is not None and request.model == probed.name:
            return self._service.plan_for(probed, options, ceiling)
        known = request.model in self._service.adapters
        if request.model and not known and not self._means.reserved(request.model):
            raise NotFound(f"The model `{request.model!s:.80}` does not exist.", param="model")
        return self._service.plan(request.model, options, ceiling)

    async def _run(self, stack: AsyncExitStack, plan: Plan, sequences: int, cache_salt: str | None) -> Run:
        ensemble = await stack.enter_async_context(self._service.ensemble(plan, sequences=sequences))
        runner = GangRunner(self.engine_client, ensemble, cache_salt)
        return Run(ensemble=ensemble, runner=runner, tokenizer=self._tokenizer, max_logprobs=self._max_logprobs)

    def observe(self, plan: Plan, uncertainty: Uncertainty) -> None:
        """Counts an answer in the metrics of its adapter, and notes it among the facts of the request that this task works for."""
        facts = CURRENT.get()
        if facts is not None:
            facts.uncertainties.append(uncertainty)
        self.readiness.answered()
        name, metrics = plan.adapter.name, self._service.metrics
        if name not in self._service.adapters:
            return  # taken away while this was answered: its series have ended
        if uncertainty.confidence is not None:
            metrics.confidence.labels(name).observe(uncertainty.confidence)
        if uncertainty.epistemic is not None and uncertainty.unit == "nats/token":
            metrics.epistemic_nats.labels(name).observe(uncertainty.epistemic)
        if uncertainty.flag != "ok":
            metrics.flagged.labels(name).inc()

    def error_of(self, error: Exception) -> ServeError:
        """vLLM's own translation of its exceptions, in our error class.

        A draining engine turns away members that reach it late; the request came before the drain and can be sent elsewhere.
        """
        if self.draining and isinstance(error, EnsembleFailed):
            return Unavailable("the server is shutting down; send the request to another replica", reason="draining")
        if isinstance(error, ServeError):
            return error
        if isinstance(error, EngineDeadError):
            return Unavailable("the engine has stopped; send the request to another replica", reason="draining")
        if isinstance(error, (VLLMError, ValueError)):
            return from_envelope(create_error_response(error))
        return ServeError("internal error while serving an uncertainty request; the server's log has the details")


def make_security(config: ServeConfig, args: Namespace, model_config: Any, metrics: Metrics) -> Security:
    """The door's settings and keys; the key file is read again at SIGHUP too.

    Raises:
        ConfigurationError: a key file or the audit log cannot be used.
    """
    hashes = getattr(args, "credence_key_hashes", None)
    if hashes is None:
        raise ConfigurationError(
            "the server was not started by `credence serve`, so vLLM's own door would stand before ours"
        )
    vllm_keys = [
        KeyRecord(name=f"vllm-{number}", hash=value, return_samples=True)
        for number, value in enumerate(hashes, start=1)
    ]
    users = KeyRing(Path(config.api_key_file) if config.api_key_file else None, vllm_keys)
    admins = KeyRing(Path(config.admin_key_file) if config.admin_key_file else None, admin=True)
    if users.guards or admins.guards:

        def reload() -> None:
            users.reload()
            admins.reload()

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    most_logprobs = int(model_config.max_logprobs)
    return Security(
        users=users,
        admins=admins,
        routes=with_extra(config.extra_routes),
        limits=config.limits.model_copy(update={"max_logprobs": most_logprobs} if most_logprobs > 0 else {}),
        return_samples=config.return_samples,
        max_body_bytes=config.max_body_bytes,
        max_inflight=config.max_inflight_requests,
        max_model_len=int(model_config.max_model_len),
        audit=AuditLog(Path(config.audit_log), metrics.audit_failures.inc) if config.audit_log else None,
    )


async def _known(request: Any) -> None:
    return None


def _planned_mean(request: Any, supports_default_mm_loras: bool = False) -> Any:
    return CURRENT_RUN.get().plan.adapter.mean
