"""Entry point ``vllm.endpoint_plugins``: puts the gate in front of vLLM's application and answers behind it.

The plugin refuses to start where an answer could be wrong: without our scheduler or logits processor vLLM would serve ``uncertainty``
requests as something else, and only log that a plugin is missing.
"""

import asyncio
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.v1.engine.exceptions import EngineDeadError

from credence.serve import admin, playground
from credence.serve.config import from_environment
from credence.serve.drain import CountRequests, Drain
from credence.serve.errors import BadRequest, ConfigurationError, ServeError
from credence.serve.gate import Gate
from credence.serve.readiness import Readiness
from credence.serve.security import key_of
from credence.serve.telemetry import Telemetry
from credence.serve.vllm_plugin.backend import VllmBackend
from credence.serve.vllm_plugin.scheduler import GangAsyncScheduler, GangScheduler, gang_scheduler

logger = logging.getLogger(__name__)


class CredenceEndpointPlugin:
    """See vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "credence_http"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the gate, the playground, and the routes /v1/models, /livez and /readyz."""
        app.state.credence = None
        app.state.credence_drain = Drain()
        app.add_middleware(Gate, backend=lambda scope: scope["app"].state.credence)
        app.add_middleware(CountRequests, drain=app.state.credence_drain)
        _outermost(app)
        router = APIRouter()

        @router.get("/v1/models")
        async def models(request: Request) -> JSONResponse:
            return JSONResponse(await request.app.state.credence.models(key_of(request.scope)))

        @router.get("/livez")
        async def livez() -> JSONResponse:
            return JSONResponse({"status": "alive"})

        @router.get("/readyz")
        async def readyz(request: Request) -> JSONResponse:
            backend = request.app.state.credence
            problem = "starting" if backend is None else await backend.problem()
            headers = {"Retry-After": "1"} if problem else {}
            return JSONResponse({"status": problem or "ready"}, status_code=503 if problem else 200, headers=headers)

        app.include_router(
            admin.router(
                lambda request: request.app.state.credence.registry,
                lambda request: request.app.state.credence.config.adapter_roots,
            )
        )
        app.include_router(playground.router())
        app.include_router(router)
        app.openapi = _openapi  # type: ignore[method-assign]
        app.add_exception_handler(HTTPException, _refused_by_the_framework)
        app.add_exception_handler(AttributeError, _refused_or_broken)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Loads the adapters, draws their resident samples and opens the gate.

        Raises:
            ConfigurationError: the server must not start like this.
        """
        if engine_client is None:
            raise ConfigurationError("credence needs an engine; it cannot run in vLLM's render-only server")
        check_engine(engine_client, args)
        backend = await VllmBackend.create(engine_client, state, args, from_environment())
        watch_shutdown(engine_client, backend)
        watch_outputs(engine_client, backend.readiness)
        if await engine_client.is_tracing_enabled():
            from opentelemetry.trace import get_tracer

            state.credence_tracer = get_tracer("credence.serve")
        state.credence = backend
        backend.follow_folder()


def _outermost(app: FastAPI) -> None:
    """Puts Telemetry around the whole stack, which Starlette builds at the first call, when vLLM has added its middleware too."""
    app.state.credence_tracer = None
    inner = app.build_middleware_stack
    outer: Any = app
    outer.build_middleware_stack = lambda: Telemetry(inner(), tracer=lambda scope: scope["app"].state.credence_tracer)


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


async def _refused_by_the_framework(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals (no such method, a body that cannot be read) in the envelope that all other errors have."""
    assert isinstance(error, HTTPException)
    refusal = ServeError(str(error.detail))
    refusal.status, refusal.kind = error.status_code, HTTPStatus(error.status_code).phrase
    return JSONResponse(refusal.body(), status_code=error.status_code, headers=dict(error.headers or {}))


async def _refused_or_broken(request: Request, error: Exception) -> JSONResponse:
    """An attribute that is missing inside vLLM's request models is a value of the wrong type; anywhere else it is a bug."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    validating = frame is not None and frame.tb_frame.f_code.co_filename.endswith("protocol.py")
    if not validating:
        logger.error("A request failed", exc_info=error)
    refusal = (
        BadRequest("a field of the request has a value of the wrong type", param=None)
        if validating
        else ServeError("internal error; the server's log has the details")
    )
    return JSONResponse(refusal.body(), status_code=refusal.status)


def _openapi() -> dict[str, Any]:
    # Imported when it is asked for: the document names this module's own models.
    from credence.serve.vllm_plugin.openapi import document

    return document()


def watch_shutdown(engine_client: EngineClient, backend: VllmBackend) -> None:
    """Makes a shutdown orderly: new requests get 503, accepted ones are answered before the engine is told to end, and whoever still
    waits after that gets an error. A second signal ends the wait.

    vLLM stops the engine but leaves the ``generate`` calls that wait for it, and the HTTP server then waits for them.
    """
    original: Callable[..., None] = engine_client.shutdown
    loop = asyncio.get_running_loop()

    def force_at_next_signal() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, backend.drain.force)

    def shutdown(timeout: float | None = None) -> None:
        # vLLM also shuts down what is left after the engine has died; only a living engine drains.
        backend.engine_died = backend.engine_died or (engine_client.errored and not backend.draining)
        backend.draining = True
        if timeout and not backend.engine_died and not backend.drain.begun:
            backend.drain.begin()
            loop.call_soon_threadsafe(force_at_next_signal)
            started = time.monotonic()
            answered = backend.drain.wait(timeout)
            timeout = max(timeout - (time.monotonic() - started), 1.0) if answered else 0
        original(timeout=timeout)
        if not loop.is_closed():
            loop.call_soon_threadsafe(engine_client.output_processor.propagate_error, EngineDeadError())

    engine_client.shutdown = shutdown


def watch_outputs(engine_client: EngineClient, readiness: Readiness) -> None:
    """Tells readiness whenever the engine has delivered something."""
    original = engine_client.output_processor.process_outputs

    def process_outputs(outputs: Any, *args: Any, **options: Any) -> Any:
        if outputs:
            readiness.delivered()
        return original(outputs, *args, **options)

    engine_client.output_processor.process_outputs = process_outputs
