"""The logits processor vLLM loads, and its adapter to vLLM's first model runner (V1): finds the members of each gang in the batch.

A gang is averaged in a step only if all K members are in the batch, have the same number of output tokens, and all
sample a real token in this step (vLLM also computes logits for unfinished prompts and throws the token away).
Otherwise nothing is averaged and no record is written, so that the API process, which misses the record, fails the
request; it never gets a number made from the wrong rows. What happens to a gang then is in credence.serve.vllm_plugin.gang_step.

Constraints (``logit_bias``, ``allowed_token_ids``, ``bad_words``, ``min_tokens``, structured output) come after averaging, and only
the leader carries them. vLLM writes them into the leader's row before this processor sees it; so the row is kept at the earliest point of
the step, and what was added to it is added to the average instead. The recorded scores are those of the unconstrained average.

A scoring gang (``credence_targets``) is left alone here; credence.serve.vllm_plugin.scoring records it. Requests without a gang are not
touched.

vLLM has one entry point for the processors of both model runners, and wants another class for each. ``EnsembleLogitsProcessor`` is the one
for the runner that ``VLLM_USE_V2_MODEL_RUNNER`` names when this module is imported; unset means V1. If vLLM then takes the other runner
(without the variable it decides by itself), it refuses the class and does not start.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams, envs
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from credence.serve.vllm_plugin.gang_member import GangMember, constrained
from credence.serve.vllm_plugin.gang_step import (
    Gang,
    RecordQueue,
    StatsFile,
    attach,
    average_gangs,
    choice_rule,
    validate_member,
    write_before_output,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One batch row that belongs to a gang (compared by identity). ``output`` is vLLM's own list, which grows as tokens are sampled."""

    member: GangMember
    params: SamplingParams
    file: StatsFile
    prompt: list[int]
    output: list[int]

    @property
    def needs_snapshot(self) -> bool:
        """Whether the row has to be kept before vLLM constrains it."""
        return self.member.index == 0 and not self.member.targets and constrained(self.params)


class EnsembleLogitsProcessorV1(LogitsProcessor):
    """Averages every complete gang, chooses its token, records the scores and forces the token on all its members."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._rows: dict[int, _Row] = {}
        self._gangs: list[list[int]] | None = []
        self.queue = RecordQueue()
        """Records of this step that have not left the device."""
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
        validate_member(sampling_params)

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
                self._rows[index] = _Row(
                    member=member, params=params, file=StatsFile(member), prompt=prompt or [], output=output
                )
        for source, target, direction in batch_update.moved:
            moved, displaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if displaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = displaced
        if self._rows != before:
            self._gangs = None

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
        for records in average_gangs(logits, [self._gang(rows) for rows in self._ready_gangs()]):
            self.queue.put(records)
        return logits

    def _gang(self, rows: list[int]) -> Gang:
        leader = self._rows[rows[0]]
        return Gang(
            rows=rows,
            leader=leader.member,
            rule=choice_rule(leader.member, leader.params),
            step=len(leader.output),
            file=leader.file,
            prompt=leader.prompt,
            output=leader.output,
            raw=(self._raw or {}).get(rows[0]),
        )

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


def install_hooks() -> None:
    """Lets vLLM's model runner call our processors before it masks and samples. Safe to call twice.

    They hear which rows' tokens vLLM will throw away, and see the logits before a grammar, and before the sampler. Their records
    are written before the tokens of the step leave the worker.

    Raises:
        RuntimeError: if this vLLM's model runner lacks what is hooked here.
    """
    from vllm.v1.worker import gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    sample, mask = getattr(runner, "_sample", None), getattr(gpu_model_runner, "apply_grammar_bitmask", None)
    finish = getattr(runner, "sample_tokens", None)
    if sample is None or mask is None or finish is None:
        raise RuntimeError(
            "this vLLM has no GPUModelRunner._sample, .sample_tokens or no apply_grammar_bitmask: it is not a supported version"
        )
    write_before_output(gpu_model_runner.AsyncGPUModelRunnerOutput)
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

    @functools.wraps(finish)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = finish(self, *args, **kwargs)
        for processor in _processors(self.input_batch):
            attach(output, processor.queue.take())
        return output

    _sample.credence_hook = True  # type: ignore[attr-defined]
    runner._sample = _sample
    runner.sample_tokens = sample_tokens
    gpu_model_runner.apply_grammar_bitmask = apply_grammar_bitmask


def _processors(input_batch: Any) -> list[EnsembleLogitsProcessorV1]:
    processors = input_batch.logitsprocs.non_argmax_invariant
    return [processor for processor in processors if isinstance(processor, EnsembleLogitsProcessorV1)]


def _adapter() -> Any:
    if not envs.VLLM_USE_V2_MODEL_RUNNER:
        return EnsembleLogitsProcessorV1
    from credence.serve.vllm_plugin.logits_processor_v2 import EnsembleLogitsProcessorV2

    return EnsembleLogitsProcessorV2


_Adapter: Any = _adapter()


class EnsembleLogitsProcessor(_Adapter):
    """What vLLM loads: the adapter to its model runner."""
