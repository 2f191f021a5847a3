"""vLLM (V1 sampler) adapter of the averaging core: finds the members of each gang in the batch and gives them one common token.

A gang is averaged in a step only if all K members are in the batch, have the same number of output tokens, and all
sample a real token in this step (vLLM also computes logits for unfinished prompts and throws the token away).
Otherwise nothing is averaged and no record is written, so that the API process, which misses the record, fails the
request; it never gets a number made from the wrong rows.

Constraints (``logit_bias``, ``allowed_token_ids``, ``bad_words``, ``min_tokens``, structured output) come after averaging, and only
the leader carries them. vLLM writes them into the leader's row before this processor sees it; so the row is kept at the earliest point of
the step, and what was added to it is added to the average instead. The recorded scores are those of the unconstrained average.

A scoring gang (``credence_targets``) is left alone here; credence.serve.vllm_plugin.scoring records it. Requests without a gang are not
touched.
"""

import functools
import hmac
import logging
import os
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
    constraint,
    mean_log_normaliser,
    penalise,
)
from credence.serve.vllm_plugin.gang_member import PREFIX, GangMember, constrained

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One batch row that belongs to a gang (compared by identity). ``output`` is vLLM's own list, which grows as tokens are sampled."""

    member: GangMember
    params: SamplingParams
    prompt: list[int]
    output: list[int]

    @property
    def needs_snapshot(self) -> bool:
        """Whether the row has to be kept before vLLM constrains it."""
        return self.member.index == 0 and not self.member.targets and constrained(self.params)

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
        self._raw: dict[int, Tensor] | None = None
        install_hooks()

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
        member = GangMember.from_extra_args(extra_args)
        if sampling_params.n != 1:
            raise ValueError(f"a gang member has n = 1, got n = {sampling_params.n}: use one gang for each completion")
        if member is not None and member.index > 0 and constrained(sampling_params):
            raise ValueError(
                f"member {member.index} of a gang carries a constraint (logit_bias, allowed_token_ids, bad_words, min_tokens or structured "
                "output); only member 0 may"
            )
        if member is not None and member.targets and sampling_params.max_tokens != 1:
            raise ValueError(f"a scoring gang has max_tokens = 1, got {sampling_params.max_tokens}")

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

    def keep_raw_rows(self, logits: Tensor) -> None:
        """Keeps the leaders' rows that vLLM is about to constrain, [rows, V]; the first call of a step counts."""
        if self._raw is None:
            self._raw = {
                index: logits[index].to(torch.float32, copy=True)
                for index, row in self._rows.items()
                if row.needs_snapshot
            }

    def drop_raw_rows(self) -> None:
        """Ends the step: the next ``keep_raw_rows`` counts again."""
        self._raw = None

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
        raw = {position: (self._raw or {}).get(gang[0]) for position, gang in enumerate(gangs)}
        for position, row in raw.items():
            if row is not None:
                members[position, 0] = row
        averaged = average(members)
        mean = averaged.scores.mean_log_probs
        tokens = torch.zeros(len(gangs), dtype=torch.int64, device=logits.device)
        impossible = set()
        for position, gang in enumerate(gangs):
            leader = self._rows[gang[0]]
            rule, step, scores, row = leader.rule(), len(leader.output), mean[position], raw[position]
            if rule.penalised:
                scores = scores + mean_log_normaliser(members[position])
            if row is not None:
                scores = scores + constraint(row, logits[gang[0]])
                if not scores.max() > -torch.inf:
                    impossible.add(position)
                    continue
            if rule.penalised:
                scores = penalise(scores, rule, leader.prompt, leader.output)
            tokens[position] = choose_token(scores, rule, step)
        records, chosen = averaged.record(tokens), tokens.tolist()
        top_tokens, top_log_probs = averaged.top(max(self._rows[gang[0]].member.num_top for gang in gangs))
        # Not a distribution (NaN logits, or every token masked): leave such a gang alone and unrecorded.
        broken = impossible | {position for position, record in enumerate(records) if np.isnan(record[:5]).any()}
        if broken:
            logger.error("%d gangs have logits that are no distribution in this step", len(broken))
        for position in sorted(set(range(len(gangs))) - broken):
            leader = self._rows[gangs[position][0]]
            calibrated = calibrated_log_prob(
                mean[position], chosen[position], leader.member.temperature, leader.member.support
            )
            top = leader.member.num_top
            self._write(
                leader,
                chosen[position],
                records[position],
                calibrated,
                top_tokens[position][:top],
                top_log_probs[position][:top],
            )
            logits[rows[position]] = -torch.inf
            logits[rows[position], tokens[position]] = 0.0

    def _ready_gangs(self) -> list[list[int]]:
        """Rows of the gangs to average now, ordered by member."""
        if self._gangs is None:
            found: dict[str, list[int]] = {}
            for index, row in self._rows.items():
                if not row.member.targets:
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

    def _write(
        self,
        leader: _Row,
        token: int,
        record: list[float],
        calibrated: float,
        top_tokens: list[int],
        top_log_probs: list[float],
    ) -> None:
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
                stats.write(len(leader.output), token, *scores, calibrated, top_tokens, top_log_probs)
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


def install_hooks() -> None:
    """Lets vLLM's model runner call our processors before it masks and samples. Safe to call twice.

    They hear which rows' tokens vLLM will throw away, and see the logits before a grammar, and before the sampler.

    Raises:
        RuntimeError: if this vLLM's model runner lacks what is hooked here.
    """
    from vllm.v1.worker import gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    sample, mask = getattr(runner, "_sample", None), getattr(gpu_model_runner, "apply_grammar_bitmask", None)
    if sample is None or mask is None:
        raise RuntimeError(
            "this vLLM has no GPUModelRunner._sample or no apply_grammar_bitmask: it is not a supported version"
        )
    if getattr(sample, "credence_hook", False):
        return

    @functools.wraps(sample)
    def _sample(self: Any, logits: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        processors = _processors(self.input_batch)
        for processor in processors:
            processor.discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
            if logits is not None:
                processor.keep_raw_rows(logits)
        try:
            return sample(self, logits, *args, **kwargs)
        finally:
            for processor in processors:
                processor.drop_raw_rows()

    @functools.wraps(mask)
    def apply_grammar_bitmask(
        scheduler_output: Any, grammar_output: Any, input_batch: Any, logits: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        for processor in _processors(input_batch):
            processor.keep_raw_rows(logits)
        mask(scheduler_output, grammar_output, input_batch, logits, *args, **kwargs)

    _sample.credence_hook = True  # type: ignore[attr-defined]
    runner._sample = _sample
    gpu_model_runner.apply_grammar_bitmask = apply_grammar_bitmask


def _processors(input_batch: Any) -> list[EnsembleLogitsProcessor]:
    processors = input_batch.logitsprocs.non_argmax_invariant
    return [processor for processor in processors if isinstance(processor, EnsembleLogitsProcessor)]
