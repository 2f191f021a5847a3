"""One request -> K members -> one answer: planning, slots, statistics and the response object. Knows no vLLM.

The order of a request: :meth:`EnsembleService.plan` checks everything that can be checked and resolves defaults;
:meth:`EnsembleService.gang` leases the samples' slots and draws those that hold none; the engine side runs the members in lock-step and
leaves one record per step in the gang's statistics file; :func:`describe` turns the records into the response object, or refuses if any
record is missing or names another token than the one that was sent.
"""

import asyncio
import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from credence.adapters import Artifact, sequence_scores
from credence.serve.config import ServeConfig
from credence.serve.engine import EngineLimits, SampleEngine, SampleLoadError
from credence.serve.errors import BadRequest, ConfigurationError, EnsembleFailed, Unavailable
from credence.serve.metrics import Metrics
from credence.serve.samples import NoFreeSlot, SampleRef, SampleSlots, Slot
from credence.serve.schemas import (
    AdapterIdentity,
    SequenceUncertainty,
    TokenUncertainty,
    Uncertainty,
    UncertaintyOptions,
)
from credence.serve.step_stats import StepStats, StepTable


@dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """An adapter by its served name."""

    name: str
    artifact: Artifact

    @property
    def support(self) -> tuple[int, ...]:
        """Answer tokens of a classification adapter, which its temperature was fitted on; empty: the vocabulary."""
        return tuple(self.artifact.config.training.get("label_tokens", ()))

    @property
    def can_calibrate(self) -> bool:
        """Whether a temperature is stored whose support the server knows (the letters of a multiple-choice row it does not)."""
        return bool(self.artifact.calibration.temperature) and self.artifact.config.training.get("format") != "choices"

    def sample(self, seed: int, index: int, tau: float) -> SampleRef:
        """Identity of one sample; at tau = 0 and for point posteriors every sample is the mean, and shares one slot."""
        if tau == 0 or not self.artifact.has_posterior:
            seed, index, tau = 0, 0, 0.0
        return SampleRef(store=str(self.artifact.path), digest=self.artifact.digest, seed=seed, index=index, tau=tau)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked request: nothing in it can fail for a reason the user could have been told at once."""

    adapter: ServedAdapter
    options: UncertaintyOptions
    num_samples: int
    min_samples: int
    tau: float
    seed: int


@dataclass(kw_only=True)
class Gang:
    """The running members of one request."""

    gang_id: str
    plan: Plan
    slots: list[Slot]
    token_seed: int = field(default_factory=lambda: secrets.randbits(63))
    stats: StepStats | None = None

    @property
    def num_samples(self) -> int:
        """K, the number of members."""
        return len(self.slots)

    @property
    def temperature(self) -> float:
        """The stored temperature for this K; samples at tau = 0 are the mean, which has its own."""
        calibration = self.plan.adapter.artifact.calibration
        return calibration.fitted_temperature(0 if self.plan.tau == 0 else self.num_samples)


def check_limits(config: ServeConfig, *, max_num_seqs: int | None, max_loras: int | None) -> None:
    """Raises ConfigurationError unless the engine can hold the largest ensemble in one batch (None: not known yet)."""
    for name, limit in (("--max-num-seqs", max_num_seqs), ("--max-loras", max_loras)):
        if limit is not None and config.max_samples > limit:
            raise ConfigurationError(
                f"--max-samples {config.max_samples} needs {name} of at least {config.max_samples}, it is {limit}; "
                f"lower --max-samples or raise {name}"
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
        self.metrics = metrics
        self._engine = engine
        self._slots = SampleSlots(config.num_slots, lora_ids)
        self._lock = asyncio.Lock()
        self._rows = 0
        self._count_slots()

    def default_samples(self, adapter: ServedAdapter) -> int:
        """K when the request does not say: 1 for an adapter without posterior."""
        return self.config.default_samples if adapter.artifact.has_posterior else 1

    def max_samples(self, adapter: ServedAdapter) -> int:
        """Largest K of an adapter: samples of an adapter without posterior would all be its mean."""
        return self.config.max_samples if adapter.artifact.has_posterior else 1

    async def warm_up(self) -> None:
        """Draws the resident sample set of every adapter, so that the first request finds it.

        Raises:
            ConfigurationError: a sample cannot be drawn.
        """
        for adapter in self.adapters.values():
            try:
                async with self.gang(self.plan(adapter.name, UncertaintyOptions())):
                    pass
            except Unavailable as error:
                raise ConfigurationError(f"adapter {adapter.name}: {error.message}") from error

    def plan(self, model: str | None, options: UncertaintyOptions) -> Plan:
        """Checks a request against the adapter and the server's limits and fills in the defaults.

        Raises:
            BadRequest: names the field.
        """
        adapter = self.adapters.get(model or "")
        if adapter is None:
            raise BadRequest(
                f"model {model!r} has no posterior, so it has no uncertainty to report; "
                f"models with one: {', '.join(sorted(self.adapters))}",
                param="model",
            )
        most = self.max_samples(adapter)
        k = self.default_samples(adapter) if options.n_samples is None else options.n_samples
        if k > most:
            why = (
                ""
                if adapter.artifact.has_posterior
                else f" ({model} was trained with {adapter.artifact.config.method}: no posterior)"
            )
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
        )

    def check_fits(self, gang: Gang, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuses a gang whose worst case is larger than the whole KV cache.

        Raises:
            BadRequest: it could never be admitted.
        """
        # One spare block per member, as the gang scheduler reserves it.
        per_member = math.ceil((num_prompt_tokens + max_tokens) / self.limits.block_size) + 1
        needed, total = gang.num_samples * per_member, self.limits.num_kv_blocks - 1
        if needed > total:
            raise BadRequest(
                f"{gang.num_samples} samples of {num_prompt_tokens} + {max_tokens} tokens need {needed} KV blocks, the server has {total}; "
                "ask for fewer samples or fewer tokens",
                param="uncertainty.n_samples",
            )

    @asynccontextmanager
    async def gang(self, plan: Plan) -> AsyncIterator[Gang]:
        """Lends the slots of a plan's samples, drawing those that hold none; gives everything back at the end.

        Raises:
            Unavailable: too many member rows in flight, no free slot, or fewer than ``min_samples`` samples could be drawn.
        """
        k = plan.num_samples
        if self._rows + k > self.config.max_inflight_rows:
            raise Unavailable(
                f"{self._rows} of {self.config.max_inflight_rows} member rows are in flight, {k} more do not fit; retry later",
                reason="overload",
            )
        self._rows += k
        self.metrics.inflight_requests.inc()
        self.metrics.samples_requested.inc(k)
        leased: list[SampleRef] = []
        gang: Gang | None = None
        try:
            refs = [plan.adapter.sample(plan.seed, index, plan.tau) for index in range(k)]
            slots = await self._lease(refs)
            leased = [slot.ref for slot in slots]
            if len(slots) < plan.min_samples:
                raise Unavailable(
                    f"{k - len(slots)} of {k} posterior samples could not be drawn, at least {plan.min_samples} are needed",
                    reason="sample_failed",
                )
            if len(slots) < k:
                self.metrics.degraded_requests.labels("sample_failed").inc()
            gang = Gang(gang_id=secrets.token_hex(8), plan=plan, slots=slots)
            yield gang
        finally:
            if gang is not None and gang.stats is not None:
                gang.stats.unlink()
            self._slots.release(leased)
            self._count_slots()
            self._rows -= k
            self.metrics.inflight_requests.dec()

    def open_stats(self, gang: Gang, max_tokens: int) -> str:
        """Creates the statistics file of a gang and returns its path.

        Raises:
            Unavailable: the statistics folder is full.
        """
        path = Path(self.config.stats_dir) / gang.gang_id
        try:
            gang.stats = StepStats.create(path, gang.num_samples, max_tokens)
        except OSError as error:
            raise Unavailable(
                f"no room for the statistics of this request: {error.strerror}", reason="overload"
            ) from error
        return str(path)

    async def _lease(self, refs: Sequence[SampleRef]) -> list[Slot]:
        """Leases and draws; samples that cannot be drawn are left out. One at a time, so nobody sees a half-drawn sample."""
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
                    except SampleLoadError:
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
        return [slot for slot in slots if slot.ref not in failed]

    def _count_slots(self) -> None:
        for state, count in self._slots.counts().items():
            self.metrics.sample_slots.labels(state).set(count)


def _confidence(gang: Gang, table: StepTable) -> tuple[float, bool]:
    """Confidence in [0, 1] and whether the stored calibration was applied.

    The geometric mean of the tokens' probabilities under the average; of a classification adapter, the probability of its answer, the
    first token, among the labels. Without a usable calibration, at temperature 1 over the vocabulary.
    """
    adapter = gang.plan.adapter
    if gang.plan.options.calibrated and adapter.can_calibrate:
        steps = slice(0, 1) if adapter.support else slice(None)
        log_prob = float(table.calibrated_log_prob[steps].mean())
        if not math.isnan(log_prob):
            return math.exp(min(log_prob, 0.0)), True
    return math.exp(min(float(table.log_prob.mean()), 0.0)), False


def describe(gang: Gang, token_ids: Sequence[int], tokens: Sequence[str]) -> Uncertainty:
    """Builds the response object from the records the engine left.

    Args:
        token_ids: the answer's tokens.
        tokens: their texts.

    Raises:
        EnsembleFailed: a record is missing or is of another token: the members did not stay together.
    """
    plan, options = gang.plan, gang.plan.options
    artifact = plan.adapter.artifact
    identity = AdapterIdentity(name=plan.adapter.name, digest=artifact.digest)
    common = {
        "mode": options.mode,
        "n_samples": plan.num_samples,
        "n_effective": gang.num_samples,
        "tau": plan.tau,
        "seed": plan.seed,
        "adapter": identity,
    }
    if not token_ids:
        return Uncertainty.model_validate(
            common
            | dict.fromkeys(("confidence", "total", "aleatoric", "epistemic", "sequence"))
            | {"calibrated": False, "flag": "ok"}
        )
    if gang.stats is None:
        raise EnsembleFailed("the engine left no statistics for this answer")
    table = gang.stats.read(len(token_ids))
    if [int(token) for token in table.token_id] != list(token_ids):
        raise EnsembleFailed("the statistics do not match the answer's tokens: the members did not stay in lock-step")
    scores = sequence_scores(
        log_prob_T=torch.tensor(table.log_prob),
        total_T=torch.tensor(table.total),
        epistemic_T=torch.tensor(table.epistemic),
        variation_ratio_T=torch.tensor(table.variation_ratio),
        member_log_probs_TK=torch.tensor(table.member_log_probs),
    )
    confidence, calibrated = _confidence(gang, table)
    low = options.threshold is not None and confidence < options.threshold
    details = None
    if options.granularity == "token":
        details = [
            TokenUncertainty(
                token=token,
                logprob=float(table.log_prob[step]),
                total=float(table.total[step]),
                aleatoric=float(table.aleatoric[step]),
                epistemic=float(table.epistemic[step]),
                variation_ratio=float(table.variation_ratio[step]),
            )
            for step, token in enumerate(tokens)
        ]
    return Uncertainty.model_validate(
        common
        | {
            "confidence": confidence,
            "calibrated": calibrated,
            "flag": "low_confidence" if low else "ok",
            "total": scores.total,
            "aleatoric": scores.aleatoric,
            "epistemic": scores.epistemic,
            "sequence": SequenceUncertainty(
                mean_logprob=scores.mean_logprob,
                logprob_std=scores.logprob_std if math.isfinite(scores.logprob_std) else None,
                variation_ratio=scores.variation_ratio,
                max_total=scores.max_total,
                max_epistemic=scores.max_epistemic,
            ),
            "tokens": details,
        }
    )
