"""Adapter to vLLM's second model runner (V2): finds the members of each gang by their request slots.

A step's rows are ``idx_mapping_np``, the slot of each row; a slot is filled by ``add_request`` and keeps its content when the request has
left, but no row names it then. Without speculative decoding a request has one row, and the host knows its length: of the tokens the row
sees, ``seq_lens_upper_bound_np`` (then exact), the prompt has ``prompt_len``, so the difference is the number of output tokens; and a row
that sees fewer than ``prefill_len`` is inside a prompt, its token is thrown away. Prompt and output are read on the device.

vLLM changes the logits in this order: grammar (in place), then in a float32 copy logit bias with allowed tokens and minimum length,
penalties, bad words, this processor; temperature and the filters come after it and cannot change a row with one token left. Averaged are
the rows from before all of this: those of structured leaders are kept before the grammar, all others are still there, because of the copy.
Penalties are then applied to the average. What a leader's constraint added is known as the difference of its row, unless penalties are in
it too; so both together are refused.

Refused as well, because it would not be exact: scoring gangs (their hidden states are hooked in the first model runner only), thinking
budgets and replayed traces (they overwrite the chosen token), and engines with speculative decoding, batch-sharded sampling (members would
be sampled by different ranks), prefill context parallelism, diffusion models or watermarks.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor, LogitsProcRequestState

from credence.serve.vllm_plugin.averaging import ChoiceRule
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

logger = logging.getLogger(__name__)

FIRST_RUNNER = "start the server with VLLM_USE_V2_MODEL_RUNNER=0"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Slot:
    """The member of a gang in one request slot."""

    member: GangMember
    rule: ChoiceRule
    file: StatsFile
    structured: bool
    constrained: bool


class EnsembleLogitsProcessorV2(LogitsProcessor):
    """Averages every complete gang, chooses its token, records the scores and forces the token on all its members.

    Raises:
        ValueError: if the engine does what is refused above.
    """

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        check_engine(vllm_config)
        logger.warning("Ensembles under Model Runner V2 are experimental: they have not been run on a GPU")
        self._requests = req_states
        self._slots: list[_Slot | None] = [None] * req_states.max_num_reqs
        self._raw_logits: Tensor | None = None
        self._raw_rows: dict[int, Tensor] = {}
        self.queue = RecordQueue()
        """Records of this step that have not left the device."""
        install_hooks()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses reserved keys that do not come from this server, and members that this runner cannot treat exactly.

        Raises:
            ValueError: says which.
        """
        member = validate_member(sampling_params)
        if member is None:
            return
        if member.targets:
            raise ValueError(
                f"scores of a given text are not available under Model Runner V2 (experimental); {FIRST_RUNNER}"
            )
        if constrained(sampling_params) and choice_rule(member, sampling_params).penalised:
            raise ValueError(
                "under Model Runner V2 (experimental) an ensemble takes penalties or constraints (logit_bias, allowed_token_ids, "
                f"bad_words, min_tokens, structured output), not both; leave one out, or {FIRST_RUNNER}"
            )
        for name in ("thinking_token_budget", "trace_decode_token_ids"):
            if getattr(sampling_params, name) is not None:
                raise ValueError(f"{name} would overwrite the tokens of an ensemble; leave it out")

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Fills a slot, whatever it held; returns whether the request belongs to a gang that is averaged here."""
        member = GangMember.from_extra_args(sampling_params.extra_args)
        if member is None or member.targets:
            self._slots[req_idx] = None
            return False
        leads = member.index == 0
        self._slots[req_idx] = _Slot(
            member=member,
            rule=choice_rule(member, sampling_params),
            file=StatsFile(member),
            structured=leads and sampling_params.structured_outputs is not None,
            constrained=leads and constrained(sampling_params),
        )
        return True

    def keep_structured_rows(self, logits: Tensor, slots: NDArray[Any]) -> None:
        """Keeps the rows [V] that a grammar is about to change; ``slots`` [rows] are those of the rows."""
        for row, index in enumerate(slots.tolist()):
            slot = self._slots[index]
            if slot is not None and slot.structured:
                self._raw_rows[row] = logits[row].to(torch.float32, copy=True)

    def keep_logits(self, logits: Tensor) -> None:
        """Notes the logits [rows, V] that vLLM is about to copy and change; they are not copied here."""
        self._raw_logits = logits

    def forget_logits(self) -> None:
        """Ends the step."""
        self._raw_logits = None
        self._raw_rows = {}

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Replaces the rows of every complete gang, in place, by its one token (0 there, -inf elsewhere).

        Raises:
            RuntimeError: if vLLM did not pass through the hooks.
        """
        gangs = self._ready_gangs(logits, ctx)
        if gangs and self._raw_logits is None:
            raise RuntimeError("this vLLM's Sampler did not call apply_sampling_params: it is not a supported version")
        for records in average_gangs(logits, gangs, self._raw_logits):
            self.queue.put(records)
        return logits

    def _ready_gangs(self, logits: Tensor, ctx: LogitsContext) -> list[Gang]:
        indices = ctx.idx_mapping_np
        if len(logits) != len(indices):  # more than one row for some request
            return []
        lengths = ctx.seq_lens_upper_bound_np[: len(indices)]
        prompts = self._requests.prompt_len.np[indices]
        sampled: NDArray[np.bool_] = lengths >= self._requests.prefill_len.np[indices]
        found: dict[str, list[tuple[int, int]]] = {}
        for row, index in enumerate(indices.tolist()):
            slot = self._slots[index]
            if slot is not None:
                found.setdefault(slot.member.gang, []).append((slot.member.index, row))
        gangs = []
        for pairs in map(sorted, found.values()):
            members, rows = zip(*pairs, strict=True)
            slot = self._slots[indices[rows[0]]]
            assert slot is not None
            steps = {int(lengths[row] - prompts[row]) for row in rows}
            complete = list(members) == list(range(slot.member.num_samples))
            if complete and len(steps) == 1 and sampled[list(rows)].all():
                length = int(prompts[rows[0]])
                gangs.append(self._gang(list(rows), slot, int(indices[rows[0]]), length, steps.pop()))
        return gangs

    def _gang(self, rows: list[int], slot: _Slot, index: int, prompt_length: int, step: int) -> Gang:
        tokens = self._requests.all_token_ids.gpu[index, : prompt_length + step] if slot.rule.penalised else None
        raw = self._raw_rows.get(rows[0])
        if raw is None and slot.constrained and self._raw_logits is not None:
            raw = self._raw_logits[rows[0]].float()
        return Gang(
            rows=rows,
            leader=slot.member,
            rule=slot.rule,
            step=step,
            file=slot.file,
            prompt=() if tokens is None else tokens[:prompt_length],
            output=() if tokens is None else tokens[prompt_length:],
            raw=raw,
        )


def check_engine(vllm_config: Any) -> None:
    """Refuses engines under which a gang would not be averaged exactly.

    Raises:
        ValueError: names the feature.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "batch-sharded sampling": bool(parallel.enable_batch_sharded_sampling),
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "a diffusion model": bool(model.is_diffusion),
        "watermarking": vllm_config.watermark_config is not None,
    }
    for name, active in refused.items():
        if active:
            raise ValueError(f"ensembles under Model Runner V2 (experimental) do not work with {name}; {FIRST_RUNNER}")


def install_hooks() -> None:
    """Lets our processors see the logits before vLLM changes them, and has their records written in time. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's second model runner lacks what is hooked here.
    """
    from vllm.v1.worker.gpu.async_utils import AsyncOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    hooked = (
        (GPUModelRunner, "sample"),
        (GPUModelRunner, "sample_tokens"),
        (Sampler, "apply_sampling_params"),
        (StructuredOutputsWorker, "apply_grammar_bitmask"),
    )
    for owner, name in hooked:
        if not hasattr(owner, name):
            raise RuntimeError(f"this vLLM's {owner.__name__} has no {name}: it is not a supported version")
    write_before_output(AsyncOutput)
    if getattr(GPUModelRunner.sample, "credence_hook", False):
        return
    sample, finish = GPUModelRunner.sample, GPUModelRunner.sample_tokens
    change, mask = Sampler.apply_sampling_params, StructuredOutputsWorker.apply_grammar_bitmask

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        processors = _processors(self.sampler)
        # The structured output worker does not know the sampler.
        if self.structured_outputs_worker is not None:
            self.structured_outputs_worker.credence_processors = processors
        try:
            return sample(self, *args, **kwargs)
        finally:
            for processor in processors:
                processor.forget_logits()

    @functools.wraps(finish)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = finish(self, *args, **kwargs)
        for processor in _processors(self.sampler):
            attach(output, processor.queue.take())
        return output

    @functools.wraps(change)
    def apply_sampling_params(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        for processor in _processors(self):
            processor.keep_logits(logits)
        return change(self, logits, *args, **kwargs)

    @functools.wraps(mask)
    def apply_grammar_bitmask(self: Any, logits: Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        for processor in vars(self).get("credence_processors", ()):
            processor.keep_structured_rows(logits, input_batch.idx_mapping_np)
        mask(self, logits, input_batch, *args, **kwargs)

    _sample.credence_hook = True  # type: ignore[attr-defined]
    GPUModelRunner.sample = _sample
    GPUModelRunner.sample_tokens = sample_tokens
    Sampler.apply_sampling_params = apply_sampling_params
    StructuredOutputsWorker.apply_grammar_bitmask = apply_grammar_bitmask


def _processors(sampler: Any) -> list[EnsembleLogitsProcessorV2]:
    """Our processors among a sampler's; a rank of pipeline parallelism without a sampler has none."""
    processors = getattr(sampler, "logits_processors", ())
    return [processor for processor in processors if isinstance(processor, EnsembleLogitsProcessorV2)]
