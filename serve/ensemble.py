"""The posterior samples of one request: planning, leasing, and the gangs that run on them. Knows no vLLM.

The order of a request: :meth:`EnsembleService.plan` checks everything that can be checked and resolves defaults;
:meth:`EnsembleService.ensemble` leases the samples' slots and draws those that hold none; :meth:`Ensemble.gang` describes K member
requests; the engine side runs them in lock-step and leaves one record per step in the gang's statistics file; credence.serve.report turns
the records into the response object.
"""

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from credence.adapters import Artifact, IsotonicMap, PlattMap
from credence.serve.config import ServeConfig
from credence.serve.engine import EngineLimits, SampleEngine, SampleLoadError
from credence.serve.errors import BadRequest, ConfigurationError, EnsembleFailed, Unavailable
from credence.serve.facts import CURRENT, note
from credence.serve.metrics import Metrics, k_label
from credence.serve.readiness import ASIDE
from credence.serve.samples import NoFreeSlot, SampleRef, SampleSlots, Slot
from credence.serve.schemas import UncertaintyOptions
from credence.serve.step_stats import StepStats, StepTable

logger = logging.getLogger(__name__)

FIRST_STAGE = 4
"""Samples with which an adaptive request starts; the number then doubles."""
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the token seeds of the sequences of one request: the golden ratio of 2**64, odd."""


@dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """An adapter by its served name."""

    name: str
    artifact: Artifact
    merged: bool = False
    """Whether the mean is in the base weights, so that samples are delta adapters."""
    mean: Any = None
    """What the engine calls the mean adapter; None for the mean of a merged model."""

    @property
    def support(self) -> tuple[int, ...]:
        """Answer tokens of a classification adapter, which its temperature was fitted on; empty: the vocabulary."""
        return tuple(self.artifact.config.training.get("label_tokens", ()))

    @property
    def can_calibrate(self) -> bool:
        """Whether a temperature is stored whose support the server knows (the letters of a multiple-choice row it does not)."""
        return bool(self.artifact.calibration.temperature) and self.artifact.config.training.get("format") != "choices"

    @property
    def labels(self) -> dict[str, int]:
        """Answer token of each label of a classification adapter, by the label's name; empty for other adapters."""
        return dict(zip(self.artifact.config.training.get("labels", ()), self.support, strict=False))

    def can_calibrate_choices(self, tokens: Sequence[Sequence[int]]) -> bool:
        """Whether the stored temperature was fitted on choices like these: the classification labels, or single answer letters."""
        if not self.artifact.calibration.temperature or any(len(label) != 1 for label in tokens):
            return False
        if self.artifact.config.training.get("format") == "choices":
            return True
        return bool(self.support) and {label[0] for label in tokens} == set(self.support)

    def sample(self, seed: int, index: int, tau: float) -> SampleRef:
        """Identity of one sample; at tau = 0 and for point posteriors every sample is the mean, and shares one slot.

        A member of an ensemble without further posterior is the same under every seed and tau.
        """
        if tau == 0 or not self.artifact.has_posterior:
            seed, index, tau = 0, 0, 0.0
        elif self.artifact.num_distinct_samples is not None:
            seed, index, tau = 0, index % self.artifact.num_distinct_samples, 1.0
        return SampleRef(
            store=str(self.artifact.path),
            digest=self.artifact.digest,
            seed=seed,
            index=index,
            tau=tau,
            layout="delta" if self.merged else "shared",
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request: nothing in it can fail for a reason the user could have been told at once.

    Attributes:
        num_samples: K; the largest K of an adaptive request.
        min_samples: fewer samples than this are an error.
        adaptive: whether samples are added only until the decision is settled.
    """

    adapter: ServedAdapter
    options: UncertaintyOptions
    num_samples: int
    min_samples: int
    tau: float
    seed: int
    adaptive: bool = False

    def temperature(self, num_samples: int) -> float:
        """The stored temperature for this K; samples at tau = 0 are the mean, which has its own."""
        return self.adapter.artifact.calibration.fitted_temperature(0 if self.tau == 0 else num_samples)

    def confidence_map(self, num_samples: int) -> PlattMap | IsotonicMap | None:
        """The stored map from a text's score to its confidence for this K; None without, or if no calibration is wanted."""
        if not self.options.calibrated or not self.adapter.can_calibrate or self.adapter.support:
            return None
        return self.adapter.artifact.calibration.fitted_map(0 if self.tau == 0 else num_samples)


@dataclass(kw_only=True)
class Gang:
    """K member requests that the engine runs in lock-step, and what came of them.

    Attributes:
        slots: the members' samples.
        token_seed: key of the token generator.
        prompt_token_ids: what the members read; of a scoring gang, context and text without its last token.
        max_tokens: largest number of tokens to generate; 1 for a scoring gang.
        targets: of a scoring gang, the (position, token) pairs to score; else empty.
        num_top: top log-probabilities to record per token.
        token_ids: the tokens generated so far.
    """

    gang_id: str
    plan: Plan
    slots: list[Slot]
    token_seed: int
    prompt_token_ids: list[int]
    max_tokens: int
    targets: tuple[tuple[int, int], ...] = ()
    num_top: int = 0
    stats: StepStats | None = None
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """K, the number of members."""
        return len(self.slots)

    @property
    def temperature(self) -> float:
        """The calibration's temperature for this K."""
        return self.plan.temperature(self.num_samples)

    def table(self, start: int = 0) -> StepTable:
        """The records of the generated tokens, or of the targets, from ``start`` on.

        Raises:
            EnsembleFailed: a record is missing or is of another token: the members did not stay together.
        """
        if self.stats is None:
            raise EnsembleFailed("the engine left no statistics for this answer")
        expected = [token for _, token in self.targets] if self.targets else self.token_ids
        table = self.stats.read(len(expected), start)
        if table.token_id.tolist() != expected[start:]:
            raise EnsembleFailed("the statistics do not match the tokens: the members did not stay in lock-step")
        return table


class Ensemble:
    """The leased samples of one request.

    Attributes:
        slots: the samples drawn so far.
        token_seed: the request's own sampling seed, or a random one.
        sample_prompt_tokens, sample_completion_tokens: work done under posterior samples, for ``usage``.
    """

    def __init__(self, service: "EnsembleService", plan: Plan) -> None:
        self.plan = plan
        self.slots: list[Slot] = []
        self.token_seed = secrets.randbits(63)
        self.sample_prompt_tokens = 0
        self.sample_completion_tokens = 0
        self._service = service
        self._asked = 0
        self._gangs: list[Gang] = []
        self._counted: set[str] = set()

    async def draw(self, num_samples: int) -> None:
        """Leases samples until ``num_samples`` have been asked for, drawing those that hold no slot.

        Raises:
            Unavailable: no free slot, or fewer samples than the plan's minimum can be drawn.
        """
        wanted = range(self._asked, num_samples)
        if not wanted:
            return
        plan = self.plan
        refs = [plan.adapter.sample(plan.seed, index, plan.tau) for index in wanted]
        self._asked = num_samples
        self._service.metrics.samples_requested.inc(len(refs))
        self.slots += await self._service.lease(refs)
        missing = num_samples - len(self.slots)
        if missing and num_samples - missing < min(plan.min_samples, num_samples):
            raise Unavailable(
                f"{missing} of {num_samples} posterior samples could not be drawn, at least {plan.min_samples} are needed",
                reason="sample_failed",
            )
        if missing:
            self._service.metrics.degraded_requests.labels("sample_failed").inc()

    def gang(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int = 1,
        samples: slice = slice(None),
        sequence: int = 0,
        targets: Sequence[tuple[int, int]] = (),
        num_top: int = 0,
    ) -> Gang:
        """Describes the members of one sequence and creates their statistics file.

        Args:
            samples: which of the drawn samples take part; all by default.
            sequence: number of the sequence within the request: each has its own token seed.

        Raises:
            BadRequest: the engine could never run it.
            Unavailable: the statistics folder is full.
        """
        gang = Gang(
            gang_id=secrets.token_hex(8),
            plan=self.plan,
            slots=self.slots[samples],
            token_seed=(self.token_seed + sequence * SEED_STRIDE) % 2**63,
            prompt_token_ids=list(prompt_token_ids),
            max_tokens=max_tokens,
            targets=tuple(targets),
            num_top=num_top,
        )
        self._service.check_fits(
            gang.num_samples, len(gang.prompt_token_ids), max_tokens, len({position for position, _ in targets})
        )
        path = Path(self._service.config.stats_dir) / gang.gang_id
        try:
            gang.stats = StepStats.create(path, gang.num_samples, len(targets) or max_tokens, num_top)
        except OSError as error:
            raise Unavailable(
                f"no room for the statistics of this request: {error.strerror}", reason="overload"
            ) from error
        self._gangs.append(gang)
        return gang

    def check_fits(self, num_prompt_tokens: int, num_scored: int) -> None:
        """Refuses a text that could never be scored under all the plan's samples; raises BadRequest."""
        self._service.check_fits(self.plan.num_samples, num_prompt_tokens, 1, num_scored)

    def finished(self, gang: Gang) -> None:
        """Counts the work of a gang that has ended."""
        self._count(gang)
        waited = gang.stats.read_wait() if gang.stats is not None else None
        if waited is not None:
            self._service.metrics.gang_wait_seconds.labels(k_label(gang.num_samples)).observe(waited)

    def _count(self, gang: Gang) -> None:
        self._counted.add(gang.gang_id)
        self.sample_prompt_tokens += gang.num_samples * len(gang.prompt_token_ids)
        if not gang.targets:
            self.sample_completion_tokens += gang.num_samples * len(gang.token_ids)

    def close(self) -> None:
        """Removes the statistics files, ends the leases, and notes the work, of gangs that were broken off too, for the key's rate."""
        for gang in self._gangs:
            if gang.gang_id not in self._counted:
                self._count(gang)
            if gang.stats is not None:
                gang.stats.unlink()
        facts = CURRENT.get()
        if facts is not None:
            facts.sample_prompt_tokens = self.sample_prompt_tokens
            facts.sample_completion_tokens = self.sample_completion_tokens
        self._service.release([slot.ref for slot in self.slots])


def check_limits(config: ServeConfig, *, max_num_seqs: int | None, max_loras: int | None) -> None:
    """Raises ConfigurationError unless the engine can hold the largest ensemble in one batch (None: not known yet)."""
    for name, limit in (("--max-num-seqs", max_num_seqs), ("--max-loras", max_loras)):
        if limit is not None and config.max_samples > limit:
            raise ConfigurationError(
                f"--max-samples {config.max_samples} needs {name} of at least {config.max_samples}, it is {limit}; "
                f"lower --max-samples or raise {name}"
            )
    if config.num_slots < config.max_samples:
        raise ConfigurationError(
            f"--sample-slots {config.num_slots} cannot hold one request of --max-samples {config.max_samples}; raise the first or lower "
            "the second"
        )
    if config.default_samples > config.max_samples:
        raise ConfigurationError(
            f"--default-samples {config.default_samples} is more than --max-samples {config.max_samples}"
        )


class EnsembleService:
    """Plans requests and lends out posterior samples.

    Raises (constructor):
        ConfigurationError: the engine cannot hold ``max_samples`` members at once.
    """

    def __init__(
        self,
        *,
        config: ServeConfig,
        adapters: Mapping[str, ServedAdapter],
        engine: SampleEngine,
        limits: EngineLimits,
        metrics: Metrics,
        lora_ids: "itertools.count[int]",
    ) -> None:
        check_limits(config, max_num_seqs=limits.max_num_seqs, max_loras=limits.max_loras)
        self.config = config
        self.adapters = adapters
        self.limits = limits
        self._metrics = metrics
        self._engine = engine
        self._slots = SampleSlots(config.num_slots, lora_ids)
        self._lock = asyncio.Lock()
        self._rows = 0
        self._count_slots()

    @property
    def metrics(self) -> Metrics:
        """Where requests are counted; those of a readiness probe aside."""
        return ASIDE.get() or self._metrics

    def default_samples(self, adapter: ServedAdapter) -> int:
        """K when the request does not say: every member of an ensemble, 1 for an adapter without posterior."""
        most = self.max_samples(adapter)
        return min(self.config.default_samples, most) if adapter.artifact.num_distinct_samples is None else most

    def max_samples(self, adapter: ServedAdapter) -> int:
        """Largest K of an adapter: samples of an adapter without posterior would all be its mean, those of M points repeat after M."""
        distinct = adapter.artifact.num_distinct_samples
        return self.config.max_samples if distinct is None else min(self.config.max_samples, distinct)

    def most_samples(self, model: object, options: UncertaintyOptions) -> int:
        """The largest K that a request can take if it is served; the server's for a model that is not known."""
        adapter = self.adapters.get(model) if isinstance(model, str) else None
        if isinstance(options.n_samples, int):
            return options.n_samples
        if adapter is None:
            return self.config.max_samples
        return self.max_samples(adapter) if options.n_samples == "auto" else self.default_samples(adapter)

    async def make_resident(self, adapter: ServedAdapter) -> None:
        """Draws the resident sample set of an adapter, so that the first request finds it.

        Raises:
            Unavailable: a sample cannot be drawn.
        """
        plan = self.plan_for(adapter, UncertaintyOptions())
        refs = [adapter.sample(plan.seed, index, plan.tau) for index in range(plan.num_samples)]
        drawn = [slot.ref for slot in await self.lease(refs)]
        self.release(drawn)
        if len(drawn) < len(refs):
            raise Unavailable(
                f"{len(refs) - len(drawn)} of {len(refs)} posterior samples could not be drawn", reason="sample_failed"
            )
        self._slots.pin(refs)

    async def forget(self, digest: str) -> None:
        """Takes the idle samples of an artifact out of the engine."""
        async with self._lock:
            for slot in self._slots.forget(digest):
                await self._engine.unload(slot.lora_id)
            self._count_slots()

    def plan(self, model: str | None, options: UncertaintyOptions, ceiling: int | None = None) -> Plan:
        """Checks a request against the adapter and the server's limits and fills in the defaults.

        Args:
            ceiling: largest K that the request's key may have; it bounds the defaults.

        Raises:
            BadRequest: names the field.
        """
        adapter = self.adapters.get(model or "")
        if adapter is None:
            raise BadRequest(
                f"model {model!r:.80} has no posterior, so it has no uncertainty to report; GET /v1/models lists those with one",
                param="model",
            )
        return self.plan_for(adapter, options, ceiling)

    def plan_for(self, adapter: ServedAdapter, options: UncertaintyOptions, ceiling: int | None = None) -> Plan:
        """Like :meth:`plan`, for an adapter that need not be served yet; raises BadRequest."""
        model, most = adapter.name, self.max_samples(adapter)
        adaptive = options.n_samples == "auto"
        k = (
            options.n_samples
            if isinstance(options.n_samples, int)
            else min(most if adaptive else self.default_samples(adapter), ceiling or most)
        )
        if k > most:
            why = ""
            if not adapter.artifact.has_posterior:
                why = f" ({model} was trained with {adapter.artifact.config.method}: no posterior)"
            elif most == adapter.artifact.num_distinct_samples:
                why = f" (an ensemble of {most} members, each of which is one sample)"
            raise BadRequest(
                f"uncertainty.n_samples must be 1 to {most} for {model}{why}, got {k}", param="uncertainty.n_samples"
            )
        if options.min_samples is not None and options.min_samples > k:
            raise BadRequest(
                f"uncertainty.min_samples must be at most n_samples = {k}, got {options.min_samples}",
                param="uncertainty.min_samples",
            )
        config = adapter.artifact.config
        return Plan(
            adapter=adapter,
            options=options,
            num_samples=k,
            min_samples=k if options.min_samples is None else options.min_samples,
            tau=config.fitted_tau(k) if options.tau is None else options.tau,
            seed=config.default_seed if options.seed is None else options.seed,
            adaptive=adaptive,
        )

    def check_fits(self, k: int, num_prompt_tokens: int, max_tokens: int, num_scored: int = 0) -> None:
        """Refuses a gang whose worst case is larger than the whole KV cache, or that scores more rows than a worker may hold.

        Args:
            k: members.
            num_scored: positions that are scored under every member.

        Raises:
            BadRequest: it could never be run.
        """
        # One spare block per member, as the gang scheduler reserves it.
        per_member = math.ceil((num_prompt_tokens + max_tokens) / self.limits.block_size) + 1
        needed, total = k * per_member, self.limits.num_kv_blocks - 1
        if needed > total:
            raise BadRequest(
                f"{k} samples of {num_prompt_tokens} + {max_tokens} tokens need {needed} KV blocks, the server has {total}; "
                "ask for fewer samples or fewer tokens",
                param="uncertainty.n_samples",
            )
        most = self.config.max_scored_rows
        if k * num_scored > most:
            raise BadRequest(
                f"scoring up to {num_scored} tokens under {k} samples makes {k * num_scored} rows, the server takes {most}; "
                "lower max_tokens, score a shorter text or ask for fewer samples",
                param="uncertainty.n_samples",
            )

    @asynccontextmanager
    async def ensemble(self, plan: Plan, *, sequences: int = 1) -> AsyncIterator[Ensemble]:
        """Lends the samples of a plan, and takes everything back at the end.

        An adaptive plan starts with :data:`FIRST_STAGE` samples; its modes draw more.

        Args:
            sequences: how many gangs of K members the request may run at once.

        Raises:
            Unavailable: too many member rows in flight, no free slot, or too few samples could be drawn.
        """
        rows = plan.num_samples * sequences
        if rows > self.config.max_inflight_rows:
            raise BadRequest(
                f"{plan.num_samples} samples of {sequences} sequences make {rows} rows, the server takes {self.config.max_inflight_rows} "
                "at once; ask for fewer samples, prompts or completions",
                param="n",
            )
        if self._rows + rows > self.config.max_inflight_rows:
            raise Unavailable(
                f"{self._rows} of {self.config.max_inflight_rows} member rows are in flight, {rows} more do not fit; retry later",
                reason="overload",
            )
        self._rows += rows
        self.metrics.inflight_requests.inc()
        ensemble = Ensemble(self, plan)
        try:
            await ensemble.draw(min(FIRST_STAGE, plan.num_samples) if plan.adaptive else plan.num_samples)
            yield ensemble
        finally:
            ensemble.close()
            self._rows -= rows
            self.metrics.inflight_requests.dec()

    def release(self, refs: Sequence[SampleRef]) -> None:
        """Ends leases."""
        self._slots.release(refs)
        self._count_slots()

    async def lease(self, refs: Sequence[SampleRef]) -> list[Slot]:
        """Leases and draws; samples that cannot be drawn are left out. One at a time, so nobody sees a half-drawn sample.

        Raises:
            Unavailable: no free slot.
        """
        asked = time.perf_counter()
        async with self._lock:
            known = set(self._slots.resident())
            try:
                slots, displaced = self._slots.lease(refs)
            except NoFreeSlot as error:
                raise Unavailable(str(error), reason="overload") from error
            new = [slot for slot in dict.fromkeys(slots) if slot.ref not in known]
            self.metrics.sample_cache_requests.labels("miss").inc(len(new))
            self.metrics.sample_cache_requests.labels("hit").inc(len(set(slots)) - len(new))
            failed: set[SampleRef] = {slot.ref for slot in new}
            try:
                for slot in displaced:
                    await self._engine.unload(slot.lora_id)
                for slot in new:
                    start = time.perf_counter()
                    try:
                        await self._engine.load(slot)
                    except SampleLoadError as error:
                        logger.warning("A posterior sample could not be drawn: %s", error)
                        continue
                    failed.discard(slot.ref)
                    self.metrics.sample_materialize_seconds.observe(time.perf_counter() - start)
            except BaseException:
                self._slots.release(refs)
                self._slots.discard(failed)
                raise
            self._slots.release([ref for ref in refs if ref in failed])
            self._slots.discard(failed)
            self._count_slots()
        note(
            "samples leased", samples=len(refs), drawn=len(new), failed=len(failed), seconds=time.perf_counter() - asked
        )
        return [slot for slot in slots if slot.ref not in failed]

    def _count_slots(self) -> None:
        for state, count in self._slots.counts().items():
            self._metrics.sample_slots.labels(state).set(count)
