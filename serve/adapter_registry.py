"""The adapters of a running server: loaded, replaced, promoted and taken away without a request noticing. Knows no vLLM.

A name stands for an artifact. Moving a name is one assignment in the event loop: a request that was planned before it keeps its artifact to
the end, a later one gets the new. What no name stands for any more is *draining*; it leaves the engine once every request that ran at that
moment has ended (credence.serve.in_flight), or was aborted when its time was up.
"""

import asyncio
import itertools
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from credence.adapters import Artifact, ArtifactError, TrustRoot, load_artifact
from credence.serve.config import ADAPTER_NAME, ServeConfig
from credence.serve.engine import EngineLimits, SampleLoadError
from credence.serve.ensemble import EnsembleService, ServedAdapter
from credence.serve.errors import ArtifactRefused, BadRequest, ConfigurationError, Conflict, NotFound, ServeError
from credence.serve.in_flight import InFlight, Snapshot
from credence.serve.metrics import Metrics
from credence.serve.preflight import BaseModel, check_modules

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed", "removed"]
DEFAULT_DRAIN_S = 30.0


class MeanEngine(Protocol):
    """Loads mean adapters, and answers requests without uncertainty by name."""

    def reserved(self, name: str) -> bool:
        """Whether a name belongs to something that is no adapter of ours, such as the base model."""
        ...

    async def load(self, lora_id: int, artifact: Artifact) -> Any:
        """Loads a mean and returns the engine's handle of it; raises SampleLoadError."""
        ...

    async def unload(self, mean: Any) -> None:
        """Forgets a mean."""
        ...

    def publish(self, name: str, mean: Any) -> None:
        """Makes a name stand for a mean."""
        ...

    def withdraw(self, name: str) -> None:
        """Makes a name stand for nothing."""
        ...


@dataclass(eq=False, kw_only=True)
class Loaded:
    """An artifact in the engine.

    Attributes:
        mean: the engine's handle.
        names: names that stand for it.
        releases: how often the last name left it; a retirement that was begun at an earlier one is void.
        draining: the requests that ran when the last name left it, and the name.
    """

    artifact: Artifact
    mean: Any
    names: set[str] = field(default_factory=set)
    releases: int = 0
    draining: tuple[str, Snapshot] | None = None


@dataclass(frozen=True, kw_only=True)
class Served:
    """A name that is ready."""

    adapter: ServedAdapter
    loaded: Loaded
    alias_of: str | None
    loaded_at: float


class AdapterRegistry:
    """Names and artifacts of one server.

    Args:
        adapters: the service's own table of ready adapters by name; kept up to date here.
        canary: asks an adapter that is not served yet for an answer; raises ServeError.
        base: the base model's layers, where they are known. vLLM takes factors smaller than a layer, and of layers it does not have.
    """

    def __init__(
        self,
        *,
        config: ServeConfig,
        service: EnsembleService,
        adapters: dict[str, ServedAdapter],
        engine: MeanEngine,
        in_flight: InFlight,
        lora_ids: "itertools.count[int]",
        canary: Callable[[ServedAdapter], Awaitable[None]],
        base: BaseModel | None = None,
    ) -> None:
        self._config = config
        self._service = service
        self._adapters = adapters
        self._engine = engine
        self._in_flight = in_flight
        self._lora_ids = lora_ids
        self._canary = canary
        self._base = base
        self._store = Path(config.state_dir) / "artifacts"
        self._trust = None if config.trust is None else TrustRoot.load(config.trust)
        self._served: dict[str, Served] = {}
        self._loaded: dict[str, Loaded] = {}
        self._loading: str | None = None
        self._failed: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self._retirements: set[asyncio.Task[None]] = set()

    @property
    def metrics(self) -> Metrics:
        """The server's metrics."""
        return self._service.metrics

    def serves(self, name: str) -> bool:
        """Whether a name is ready."""
        return name in self._served

    def list(self) -> list[dict[str, Any]]:
        """Every adapter as JSON: ready, loading, failed, and what is draining."""
        states = [self._describe(name) for name in sorted(self._served.keys() | self._failed.keys())]
        if self._loading is not None and self._loading not in self._served:
            states.append(_state(self._loading, "loading"))
        for loaded in self._loaded.values():
            if loaded.draining is not None:
                states.append(self._draining(loaded))
        return states

    def get(self, name: str) -> dict[str, Any]:
        """One adapter as JSON.

        Raises:
            NotFound: nothing has this name.
        """
        if name in self._served or name in self._failed:
            return self._describe(name)
        for state in self.list():
            if state["name"] == name:
                return state
        raise NotFound(f"there is no adapter {name!r}; there are {', '.join(sorted(self._served))}", param="name")

    async def start(self, name: str, folder: Path) -> None:
        """Serves a verified artifact of the private store at the server's start; raises ServeError."""
        start = time.perf_counter()
        artifact = await asyncio.to_thread(load_artifact, folder)
        await self._serve(name, artifact, alias_of=None)
        self._count_load(start)

    async def load(self, name: str, folder: Path, *, replace: bool = False) -> dict[str, Any]:
        """Verifies an artifact and serves it as ``name``.

        Nothing changes where it is refused; of a new name the refusal stays visible as state ``failed``.

        Raises:
            BadRequest: the name is not allowed.
            Conflict: the name is taken, or the server has no room for another adapter.
            ArtifactRefused: the artifact cannot be served.
            Unavailable: its samples cannot be drawn now.
        """
        if not ADAPTER_NAME.match(name):
            raise BadRequest(f"the name {name!r:.80} must match {ADAPTER_NAME.pattern}", param="name")
        async with self._lock:
            self._check_free(name, replace)
            self._loading = name
            start = time.perf_counter()
            try:
                artifact = await self._verify(name, folder)
                await self._serve(name, artifact, alias_of=None)
            except Exception as error:
                self.metrics.adapter_loads.labels("refused").inc()
                if name not in self._served:
                    self._failed[name] = (
                        error.message if isinstance(error, ServeError) else f"internal: {type(error).__name__}"
                    )
                raise
            finally:
                self._loading = None
            self._count_load(start)
            return self._describe(name)

    async def promote(self, alias: str, target: str) -> dict[str, Any]:
        """Makes ``alias``, a new name or one that is served, stand for what ``target`` stands for now.

        Raises:
            BadRequest: the alias is not allowed as a name, or is the target itself.
            NotFound: the target is not served.
            Conflict: the name belongs to the base model.
        """
        if not ADAPTER_NAME.match(alias):
            raise BadRequest(f"the name {alias!r:.80} must match {ADAPTER_NAME.pattern}", param="name")
        if alias == target:
            raise BadRequest(f"target is {target!r}, the alias itself; give another adapter", param="target")
        async with self._lock:
            self._check_free(alias, replace=True)
            served = self._served.get(target)
            if served is None:
                raise NotFound(
                    f"target {target!r:.80} is not served; ready are {', '.join(sorted(self._served))}", param="target"
                )
            await self._serve(alias, served.loaded.artifact, alias_of=target)
            return self._describe(alias)

    async def remove(self, name: str, drain_s: float = DEFAULT_DRAIN_S) -> dict[str, Any]:
        """Takes a name away: new requests for it get 404 at once, running ones are finished.

        Args:
            drain_s: seconds after which they are aborted.

        Raises:
            NotFound: nothing has this name.
            Conflict: the server's layout has one adapter for good.
        """
        async with self._lock:
            self._check_layout()
            if self._failed.pop(name, None) is not None and name not in self._served:
                return _state(name, "removed")
            served = self._served.pop(name, None)
            if served is None:
                raise NotFound(f"there is no adapter {name!r:.80}", param="name")
            del self._adapters[name]
            self._engine.withdraw(name)
            self.metrics.withdraw(name)
            self._release(name, served.loaded, drain_s)
            if served.loaded.draining is None:
                return _state(name, "removed", digest=served.loaded.artifact.digest)
            return self._draining(served.loaded)

    async def settled(self) -> None:
        """Waits until nothing is draining."""
        while self._retirements:
            await asyncio.wait(set(self._retirements))

    def _count_load(self, start: float) -> None:
        self.metrics.adapter_loads.labels("ok").inc()
        self.metrics.adapter_load_seconds.observe(time.perf_counter() - start)

    def _check_layout(self) -> None:
        if self._config.merged:
            raise Conflict(
                "a merged model serves its own adapter for as long as it runs; serve the base model with --adapter to change adapters",
                param="name",
            )

    def _check_free(self, name: str, replace: bool) -> None:
        self._check_layout()
        if self._engine.reserved(name):
            raise Conflict(f"the name {name!r} belongs to the base model; choose another", param="name")
        if name in self._served and not replace:
            raise Conflict(f"an adapter {name!r} is served; send replace: true to move the name", param="name")

    async def _verify(self, name: str, folder: Path) -> Artifact:
        """Reads, verifies and copies an artifact; raises ArtifactRefused."""
        try:
            artifact = await asyncio.to_thread(load_artifact, folder, store=self._store, trust=self._trust)
        except ArtifactError as error:
            self.metrics.adapter_integrity_failures.labels(error.reason).inc()
            raise ArtifactRefused(str(error), code=error.reason) from error
        try:
            check_fits(artifact, self._service.limits)
            if self._base is not None:
                check_modules(name, str(artifact.path), self._base)
        except ServeError as error:
            self._delete(artifact)
            if isinstance(error, ConfigurationError):
                raise ArtifactRefused(error.message, code="base_model") from None
            raise
        return artifact

    async def _serve(self, name: str, artifact: Artifact, *, alias_of: str | None) -> None:
        """Makes a name stand for a verified artifact."""
        loaded = self._loaded.get(artifact.digest)
        if loaded is None:
            loaded = await self._into_engine(name, artifact)
        loaded.names.add(name)
        loaded.draining = None
        adapter = ServedAdapter(name=name, artifact=loaded.artifact, merged=self._config.merged, mean=loaded.mean)
        before = self._served.get(name)
        self._served[name] = Served(adapter=adapter, loaded=loaded, alias_of=alias_of, loaded_at=time.time())
        self._failed.pop(name, None)
        self._adapters[name] = adapter
        if not self._config.merged:
            self._engine.publish(name, loaded.mean)
        self.metrics.serve(name, artifact.config.method, artifact.digest)
        self.metrics.released(name, artifact.metrics, self._service.default_samples(adapter))
        if before is not None and before.loaded is not loaded:
            self._release(name, before.loaded, None)

    async def _into_engine(self, name: str, artifact: Artifact) -> Loaded:
        in_use = sum(bool(loaded.names - {name}) for loaded in self._loaded.values())  # what is replaced makes room
        if in_use >= self._config.num_adapters:
            self._delete(artifact)
            raise Conflict(
                f"{in_use} artifacts are served, the most this server has room for; remove one, or start it with a larger --max-adapters",
                param="name",
            )
        mean = None
        try:
            if not self._config.merged:
                mean = await self._engine.load(next(self._lora_ids), artifact)
            adapter = ServedAdapter(name=name, artifact=artifact, merged=self._config.merged, mean=mean)
            await self._service.make_resident(adapter)
            await self._canary(adapter)
        except Exception as error:
            try:
                await self._service.forget(artifact.digest)
                if mean is not None:
                    await self._engine.unload(mean)
            finally:
                self._delete(artifact)
            if isinstance(error, SampleLoadError) or (isinstance(error, ServeError) and error.status == 500):
                raise ArtifactRefused(
                    f"adapter {name} does not load into this model: {error}", code="engine"
                ) from error
            raise
        loaded = Loaded(artifact=artifact, mean=mean)
        self._loaded[artifact.digest] = loaded
        return loaded

    def _release(self, name: str, loaded: Loaded, drain_s: float | None) -> None:
        """A name leaves an artifact; the last one lets it drain. ``drain_s`` None: however long its requests run."""
        loaded.names.discard(name)
        if loaded.names:
            return
        loaded.releases += 1
        snapshot = self._in_flight.now()
        loaded.draining = (name, snapshot)
        retirement = asyncio.create_task(self._retire(loaded, name, snapshot, drain_s))
        self._retirements.add(retirement)
        retirement.add_done_callback(self._retirements.discard)

    async def _retire(self, loaded: Loaded, name: str, snapshot: Snapshot, drain_s: float | None) -> None:
        release = loaded.releases
        ended = asyncio.ensure_future(snapshot.ended())
        await asyncio.wait({ended}, timeout=drain_s)
        if not ended.done():
            snapshot.abort({name}, f"the adapter {name} was taken away {drain_s:g} s ago; ask for another")
            await ended
        async with self._lock:
            if loaded.names or loaded.releases != release:
                return
            try:
                await self._service.forget(loaded.artifact.digest)
                if loaded.mean is not None:
                    await self._engine.unload(loaded.mean)
            except Exception:
                logger.exception("Adapter %s could not be taken out of the engine", name)
            del self._loaded[loaded.artifact.digest]
            self._delete(loaded.artifact)
        logger.info("Adapter %s (%s) has left the engine", name, loaded.artifact.digest[:15])

    def _delete(self, artifact: Artifact) -> None:
        """Removes the private copy of an artifact that is not in the engine."""
        folder = artifact.path
        if artifact.digest not in self._loaded and folder.parent == self._store:
            shutil.rmtree(folder, ignore_errors=True)

    def _describe(self, name: str) -> dict[str, Any]:
        served = self._served.get(name)
        if served is None:
            return _state(name, "failed", reason=self._failed[name])
        adapter = served.adapter
        config, default = adapter.artifact.config, self._service.default_samples(adapter)
        return _state(
            name,
            "ready",
            digest=adapter.artifact.digest,
            method=config.method,
            kind=config.kind,
            alias_of=served.alias_of,
            requests_in_flight=self._in_flight.count(name),
            tau=config.fitted_tau(default),
            default_n_samples=default,
            max_n_samples=self._service.max_samples(adapter),
            loaded_at=served.loaded_at,
        )

    def _draining(self, loaded: Loaded) -> dict[str, Any]:
        assert loaded.draining is not None
        name, snapshot = loaded.draining
        config = loaded.artifact.config
        return _state(
            name,
            "draining",
            digest=loaded.artifact.digest,
            method=config.method,
            kind=config.kind,
            requests_in_flight=snapshot.count({name}),
        )


def check_fits(artifact: Artifact, limits: EngineLimits) -> None:
    """Refuses an artifact that the running engine has no room for; raises ArtifactRefused."""
    modules = adapted_modules(artifact)
    if artifact.config.rank > limits.max_lora_rank:
        raise ArtifactRefused(
            f"the adapter has rank {artifact.config.rank}, the server takes {limits.max_lora_rank}; start it with a larger --max-lora-rank",
            code="rank",
        )
    unknown = sorted(modules - limits.lora_modules) if limits.lora_modules is not None else []
    if unknown:
        raise ArtifactRefused(
            f"the adapter changes {', '.join(unknown)}, the server takes LoRA on {', '.join(sorted(limits.lora_modules or ()))}; start it "
            "with --lora-target-modules that name them too",
            code="modules",
        )


def adapted_modules(artifact: Artifact) -> set[str]:
    """Last names of the modules an artifact changes.

    Raises:
        ArtifactRefused: vLLM cannot serve it, or serves it wrongly.
    """
    if artifact.head:
        raise ArtifactRefused(
            "the adapter is a classifier on an encoder, with a head of its own; vLLM serves causal language models: evaluate it with "
            "`credence eval`",
            code="classifier",
        )
    modules = {module.rpartition(".")[2] for module in artifact.mean}
    if "lm_head" in modules:
        raise ArtifactRefused(
            "the adapter changes lm_head; vLLM 0.32 computes wrong log-probabilities there, train without it",
            code="modules",
        )
    return modules


def _state(name: str, state: State, **known: Any) -> dict[str, Any]:
    """The JSON of one adapter."""
    empty: dict[str, Any] = dict.fromkeys(
        ("reason", "digest", "method", "kind", "alias_of", "tau", "default_n_samples", "max_n_samples", "loaded_at")
    )
    return {"object": "adapter", "name": name, "state": state, "requests_in_flight": 0} | empty | known
