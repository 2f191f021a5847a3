"""vLLM (V1 sampler) adapter of the averaging core: finds the members of each gang in the batch and gives them one common token.

A gang is averaged in a step only if all K members are in the batch, have the same number of output tokens, and all
sample a real token in this step (vLLM also computes logits for unfinished prompts and throws the token away).
Otherwise nothing is averaged and no record is written, so that the API process, which misses the record, fails the
request; it never gets a number made from the wrong rows.

Requests without a gang are not touched.
"""

import functools
import hmac
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from credence.serve.config import TOKEN_VARIABLE
from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.averaging import (
    ChoiceRule,
    average,
    calibrated_log_prob,
    choose_token,
    mean_log_normaliser,
    penalise,
)

logger = logging.getLogger(__name__)

PREFIX = "credence_"
_KEYS = frozenset(PREFIX + name for name in ("gang", "k", "member", "seed", "stats", "support", "temperature", "token"))


@dataclass(frozen=True, slots=True, kw_only=True)
class GangMember:
    """The reserved keys of one member request (``SamplingParams.extra_args``), validated.

    Attributes:
        gang: id of the gang, unique among the running ones.
        num_samples: K.
        index: which posterior sample this member is, 0..K-1.
        seed: key of the token generator, 0..2**64-1.
        stats: absolute path of the gang's statistics file; "" for none.
        temperature, support: the calibration: temperature on the averaged probabilities, over these tokens (all if empty).
    """

    gang: str
    num_samples: int
    index: int
    seed: int
    stats: str
    temperature: float = 1.0
    support: tuple[int, ...] = ()

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "GangMember | None":
        """Reads the reserved keys; None if there are none. The token is not checked here.

        Raises:
            ValueError: if a key is unknown or missing, or has a value it may not have.
        """
        keys = {key for key in extra_args or () if isinstance(key, str) and key.startswith(PREFIX)}
        if extra_args is None or not keys:
            return None
        if keys != _KEYS:
            raise ValueError(f"gang requests need exactly the keys {sorted(_KEYS)}, got {sorted(keys)}")
        gang, num_samples, index, seed, stats = (
            extra_args[PREFIX + name] for name in ("gang", "k", "member", "seed", "stats")
        )
        if not isinstance(gang, str) or not gang:
            raise ValueError(f"{PREFIX}gang must be a non-empty string, got {gang!r}")
        for name, value, limit in (("k", num_samples, 2**16), ("seed", seed, 2**64), ("member", index, 2**16)):
            if type(value) is not int or not 0 <= value < limit:
                raise ValueError(f"{PREFIX}{name} must be an integer in 0..{limit - 1}, got {value!r}")
        if index >= num_samples:
            raise ValueError(f"{PREFIX}member must be below {PREFIX}k, got member {index} of {num_samples}")
        if not isinstance(stats, str) or (stats and not os.path.isabs(stats)):
            raise ValueError(f"{PREFIX}stats must be an absolute path or an empty string, got {stats!r}")
        temperature, support = extra_args[PREFIX + "temperature"], extra_args[PREFIX + "support"]
        if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise ValueError(f"{PREFIX}temperature must be a positive number, got {temperature!r}")
        if not all(type(token) is int and token >= 0 for token in support):
            raise ValueError(f"{PREFIX}support must be a list of token ids, got {support!r}")
        return cls(
            gang=gang,
            num_samples=num_samples,
            index=index,
            seed=seed,
            stats=stats,
            temperature=float(temperature),
            support=tuple(support),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One batch row that belongs to a gang (compared by identity). ``output`` is vLLM's own list, which grows as tokens are sampled."""

    member: GangMember
    params: SamplingParams
    prompt: list[int]
    output: list[int]

    def rule(self) -> ChoiceRule:
        p = self.params
        return ChoiceRule(
            seed=self.member.seed,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            presence_penalty=p.presence_penalty,
            frequency_penalty=p.frequency_penalty,
            repetition_penalty=p.repetition_penalty,
        )


class EnsembleLogitsProcessor(LogitsProcessor):
    """Averages every complete gang, chooses its token, records the scores and forces the token on all its members."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._rows: dict[int, _Row] = {}
        self._gangs: list[list[int]] | None = []
        self._stats: dict[str, StepStats | None] = {}
        self.discarded: NDArray[np.bool_] | None = None
        """Rows of this step whose token vLLM throws away (unfinished prompts); set by the model runner's hook before ``apply``."""
        install_discard_hook()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses reserved keys that do not come from this server.

        Raises:
            ValueError: if a ``credence_`` key comes without the server's token, or does not form a valid gang member.
        """
        extra_args = sampling_params.extra_args or {}
        if not any(isinstance(key, str) and key.startswith(PREFIX) for key in extra_args):
            return
        expected, given = os.environ.get(TOKEN_VARIABLE, ""), extra_args.get(PREFIX + "token")
        authentic = isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
        if not expected or not authentic:
            raise ValueError(f"vllm_xargs: keys that begin with {PREFIX!r} are reserved for the server; remove them")
        GangMember.from_extra_args(extra_args)
        if sampling_params.n != 1:
            raise ValueError(f"a gang member has n = 1, got n = {sampling_params.n}: use one gang for each completion")

    def is_argmax_invariant(self) -> bool:
        """Averaging changes the most likely token, so greedy requests need it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the persistent batch: removals, additions, then moves, in the order vLLM documents."""
        if batch_update is None:
            return
        before = self._rows.copy()
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            # A request may take the row of another one without that row being listed as removed.
            self._rows.pop(index, None)
            member = GangMember.from_extra_args(params.extra_args)
            if member is not None:
                self._rows[index] = _Row(member=member, params=params, prompt=prompt or [], output=output)
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = displaced
        if self._rows != before:
            self._gangs = None
            self._close_stats({row.member.gang for row in self._rows.values()})

    def apply(self, logits: Tensor) -> Tensor:
        """Replaces the rows of every complete gang, in place, by its one token (0 there, -inf elsewhere)."""
        if not self._rows:
            return logits
        by_size: dict[int, list[list[int]]] = {}
        for gang in self._ready_gangs():
            by_size.setdefault(len(gang), []).append(gang)
        for size, gangs in by_size.items():
            self._apply_gangs(logits, gangs, size)
        return logits

    def _apply_gangs(self, logits: Tensor, gangs: list[list[int]], size: int) -> None:
        rows = torch.tensor(gangs, device=logits.device)
        members = logits[rows.view(-1)].view(len(gangs), size, -1)
        averaged = average(members)
        mean = averaged.scores.mean_log_probs
        tokens = torch.empty(len(gangs), dtype=torch.int64, device=logits.device)
        for position, gang in enumerate(gangs):
            leader = self._rows[gang[0]]
            rule, step, scores = leader.rule(), len(leader.output), mean[position]
            if rule.penalised:
                scores = scores + mean_log_normaliser(members[position])
                scores = penalise(scores, rule, leader.prompt, leader.output)
            tokens[position] = choose_token(scores, rule, step)
        records, chosen = averaged.record(tokens), tokens.tolist()
        # Not a distribution (NaN logits, or every token masked): leave such a gang alone and unrecorded.
        good = [position for position, record in enumerate(records) if not np.isnan(record[:5]).any()]
        if len(good) < len(gangs):
            logger.error("%d gangs have logits that are no distribution in this step", len(gangs) - len(good))
        for position in good:
            leader = self._rows[gangs[position][0]]
            calibrated = calibrated_log_prob(
                mean[position], chosen[position], leader.member.temperature, leader.member.support
            )
            self._write(leader, chosen[position], records[position], calibrated)
            logits[rows[position]] = -torch.inf
            logits[rows[position], tokens[position]] = 0.0

    def _ready_gangs(self) -> list[list[int]]:
        """Rows of the gangs to average now, ordered by member."""
        if self._gangs is None:
            found: dict[str, list[int]] = {}
            for index, row in self._rows.items():
                found.setdefault(row.member.gang, []).append(index)
            ordered = [sorted(rows, key=lambda index: self._rows[index].member.index) for rows in found.values()]
            self._gangs = [rows for rows in ordered if self._complete(rows)]
        return [
            rows
            for rows in self._gangs
            if len({len(self._rows[index].output) for index in rows}) == 1
            and (self.discarded is None or not self.discarded[rows].any())
        ]

    def _complete(self, rows: list[int]) -> bool:
        members = [self._rows[index].member for index in rows]
        return [member.index for member in members] == list(range(members[0].num_samples))

    def _write(self, leader: _Row, token: int, record: list[float], calibrated: float) -> None:
        """Writes a record. A file that is gone (the request has been aborted) or full must not hurt the engine: say so once per gang."""
        member = leader.member
        if not member.stats:
            return
        try:
            if member.gang not in self._stats:
                self._stats[member.gang] = StepStats.open(member.stats)
            stats = self._stats[member.gang]
            if stats is not None:
                log_prob, total, aleatoric, epistemic, variation_ratio, *members = record
                scores = (log_prob, total, aleatoric, epistemic, variation_ratio, members)
                stats.write(len(leader.output), token, *scores, calibrated_log_prob=calibrated)
        except (OSError, ValueError) as error:
            logger.warning("no statistics for gang %s: %s", member.gang, error)
            self._close(member.gang)
            self._stats[member.gang] = None

    def _close_stats(self, running: set[str]) -> None:
        for gang in self._stats.keys() - running:
            self._close(gang)

    def _close(self, gang: str) -> None:
        stats = self._stats.pop(gang, None)
        if stats is not None:
            stats.close()


def install_discard_hook() -> None:
    """Lets vLLM's model runner tell our processors, before sampling, which rows' tokens it will throw away. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's model runner has no ``_sample`` or no ``discard_request_mask``.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = getattr(GPUModelRunner, "_sample", None)
    if original is None:
        raise RuntimeError("this vLLM has no GPUModelRunner._sample: it is not a supported version")
    if getattr(original, "credence_hook", False):
        return

    @functools.wraps(original)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        for processor in self.input_batch.logitsprocs.non_argmax_invariant:
            if isinstance(processor, EnsembleLogitsProcessor):
                processor.discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
        return original(self, *args, **kwargs)

    _sample.credence_hook = True  # type: ignore[attr-defined]
    GPUModelRunner._sample = _sample
