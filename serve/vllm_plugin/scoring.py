"""Teacher forcing: the averaged distributions of a scoring gang at given positions of its prompt.

A scoring gang reads one text under K posterior samples and generates nothing of interest. Record i of its statistics file describes the
average of the K distributions after prompt position p_i, at token y_i (``credence_targets``), with the columns of a generated token's
record. Each member's final hidden states at the target positions are kept until every member has all of them; the logits are then computed
block by block, in the worker, and only the records leave it. They are written before the tokens of that step leave the engine.

A position that was not computed (because its KV was read from the prefix cache, or it is not in the prompt) leaves the gang without
records: the API process misses them and fails the request.

Shape suffixes: K members, P distinct positions, B positions of one block, D hidden size, V vocabulary.
"""

import contextlib
import functools
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.averaging import average, calibrated_log_prob
from credence.serve.vllm_plugin.gang_member import PREFIX, GangMember

logger = logging.getLogger(__name__)

# The arguments of ``StepStats.write``.
Record = tuple[Any, ...]

BLOCK_BYTES = 64 * 2**20
"""Size of the float32 logits of one block, K * B * V * 4 bytes; a few copies of it exist at a time."""


class MemberRows:
    """Hidden states of one member at the target positions, as they are computed.

    Attributes:
        request: the model runner's state of the request (compared by identity).
        member: its reserved keys.
        positions: [P] int64, distinct target positions, ascending.
        rows: [P, D]; None until the first is there.
    """

    def __init__(self, request: Any, member: GangMember) -> None:
        self.request = request
        self.member = member
        self.positions: NDArray[np.int64] = np.unique(np.array([p for p, _ in member.targets], dtype=np.int64))
        self.rows: Tensor | None = None
        self._computed = np.zeros(len(self.positions), dtype=np.bool_)

    @property
    def complete(self) -> bool:
        """Whether the rows of all positions are there."""
        return bool(self._computed.all())

    def take(self, hidden_states: Tensor, start: int, count: int) -> None:
        """Copies the rows of the target positions among ``start .. start + count - 1``, which ``hidden_states`` [count, D] are."""
        first, last = np.searchsorted(self.positions, [start, start + count])
        if first == last:
            return
        if self.rows is None:
            self.rows = hidden_states.new_empty(len(self.positions), hidden_states.shape[-1])
        wanted = torch.from_numpy(self.positions[first:last] - start).to(hidden_states.device)
        self.rows[first:last] = hidden_states[wanted]
        self._computed[first:last] = True


@dataclass(slots=True, kw_only=True, eq=False)
class _Gang:
    """Members seen so far, by index; ``done``: nothing more is to be computed."""

    members: dict[int, MemberRows] = field(default_factory=dict)
    done: bool = False

    @property
    def complete(self) -> bool:
        size = next(iter(self.members.values())).member.num_samples
        return len(self.members) == size and all(rows.complete for rows in self.members.values())

    def finish(self) -> None:
        """Frees the hidden states; the members may stay in the engine for some more steps."""
        self.done = True
        for rows in self.members.values():
            rows.rows = None


class Scorer:
    """Collects the hidden states of the scoring gangs of one model runner, and writes their records."""

    def __init__(self) -> None:
        self._gangs: dict[str, _Gang] = {}

    def __len__(self) -> int:
        return len(self._gangs)

    def collect(self, runner: Any, hidden_states: Tensor, num_scheduled_tokens: Mapping[str, int]) -> None:
        """Takes the rows of one step, and records every gang that is complete now.

        Args:
            runner: vLLM's GPUModelRunner, after the step's forward pass.
            hidden_states: [tokens of the step, D], final hidden states, request by request in the order of the batch.
            num_scheduled_tokens: tokens of the step of each request.
        """
        ready: dict[_Gang, None] = {}  # an ordered set: several members may be here
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            extra_args = (request.sampling_params and request.sampling_params.extra_args) or {}
            if not extra_args.get(PREFIX + "targets"):
                continue
            gang, rows = self._rows_of(runner, request)
            if gang.done:
                continue
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            rows.take(hidden_states[offset : offset + count], request.num_computed_tokens, count)
            if gang.complete:
                ready[gang] = None
        for gang in ready:
            members = [gang.members[index] for index in sorted(gang.members)]
            _write(members[0].member, _records(runner, members))
            gang.finish()

    def prune(self, requests: Mapping[str, Any]) -> None:
        """Forgets the gangs of which no member is among the runner's requests any more."""
        current = {id(request) for request in requests.values()}
        for name, gang in list(self._gangs.items()):
            if not any(id(rows.request) in current for rows in gang.members.values()):
                del self._gangs[name]

    def _rows_of(self, runner: Any, request: Any) -> tuple[_Gang, MemberRows]:
        extra_args = request.sampling_params.extra_args
        gang = self._gangs.setdefault(extra_args[PREFIX + "gang"], _Gang())
        rows = gang.members.get(extra_args[PREFIX + "member"])
        if rows is None or rows.request is not request:
            member = GangMember.from_extra_args(extra_args)
            assert member is not None
            rows = gang.members[member.index] = MemberRows(request, member)
            if _adapts_lm_head(runner, request.lora_request):
                logger.error("no scores for gang %s: its adapter changes lm_head", member.gang)
                gang.finish()
        return gang, rows


def _records(runner: Any, members: list[MemberRows]) -> list[Record]:
    """Computes the records of all targets; those that are no distribution, or name a token outside the vocabulary, are left out."""
    leader = members[0].member
    if any(rows.member.targets != leader.targets for rows in members):
        logger.error("no scores for gang %s: its members differ in credence_targets", leader.gang)
        return []
    positions, k = members[0].positions, len(members)
    block = max(1, BLOCK_BYTES // (4 * len(members) * runner.input_batch.vocab_size))
    target_positions = [position for position, _ in leader.targets]
    records: list[Record] = []
    for start in range(0, len(positions), block):
        hidden = torch.cat([rows.rows[start : start + block] for rows in members if rows.rows is not None])
        with _base_logits(runner):
            logits = runner.model.compute_logits(hidden)
        if logits is None:  # a rank of tensor parallelism that does not gather them
            return []
        averaged = average(logits.view(len(members), -1, logits.shape[-1]).transpose(0, 1))
        size = averaged.scores.mean_log_probs.shape[-1]
        stop = min(start + block, len(positions))
        first = bisect_left(target_positions, int(positions[start]))
        last = bisect_left(target_positions, int(positions[stop - 1]) + 1)
        steps = [step for step in range(first, last) if leader.targets[step][1] < size]
        if not steps:
            continue
        tokens = [leader.targets[step][1] for step in steps]
        rows_of = np.searchsorted(positions, [target_positions[step] for step in steps]) - start
        device = logits.device
        scores = averaged.record(torch.tensor(tokens, device=device), torch.from_numpy(rows_of).to(device))
        top_tokens, top_log_probs = averaged.top(leader.num_top)
        for step, token, row, record in zip(steps, tokens, rows_of.tolist(), scores, strict=True):
            if any(map(math.isnan, record[:5])):
                continue
            mean = averaged.scores.mean_log_probs[row]
            calibrated = calibrated_log_prob(mean, token, leader.temperature, leader.support)
            under_each, favourites, theirs = (record[5 + part * k : 5 + (part + 1) * k] for part in range(3))
            tops = (top_tokens[row], top_log_probs[row])
            records.append((step, token, *record[:5], under_each, calibrated, *tops, favourites, theirs))
    missing = len(leader.targets) - len(records)
    if missing:
        reason = "logits that are no distribution, or tokens outside the vocabulary"
        logger.error(
            "%d of the %d targets of gang %s have no scores: %s", missing, len(leader.targets), leader.gang, reason
        )
    return records


def _write(leader: GangMember, records: list[Record]) -> None:
    """Writes the records. A file that is gone (the request has been aborted) or does not fit must not hurt the engine."""
    # The file is opened after all logits are there: ranks of tensor parallelism must not disagree on whether to compute them.
    if not leader.stats or not records:
        return
    try:
        with StepStats.open(leader.stats) as stats:
            for record in records:
                stats.write(*record)
    except (OSError, ValueError) as error:
        logger.warning("no statistics for gang %s: %s", leader.gang, error)


def _lora(runner: Any) -> Any:
    """vLLM's adapter manager of the runner, or None."""
    return runner.lora_manager._adapter_manager if runner.lora_config else None


def _adapts_lm_head(runner: Any, lora_request: Any) -> bool:
    manager = _lora(runner)
    if manager is None or lora_request is None:
        return False
    adapter = manager.get_adapter(lora_request.lora_int_id)
    return adapter is None or any(name.rpartition(".")[2] == "lm_head" for name in adapter.loras)


@contextlib.contextmanager
def _base_logits(runner: Any) -> Iterator[None]:
    """While active, logits are those of the base output layer.

    Where lm_head takes LoRA, vLLM finds the adapter of a row by its place in the batch, which rows of several positions do not have.
    """
    manager = _lora(runner)
    wrappers = [] if manager is None else list(manager.punica_wrapper_mapping.values())
    for wrapper in wrappers:
        wrapper.add_lora_logits = lambda y, *args, **kwargs: y
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.add_lora_logits


def install() -> None:
    """Lets this process's vLLM model runners score. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM's model runner lacks what is hooked here.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    names = ("_bookkeeping_sync", "_update_states")
    bookkeeping, update = (getattr(GPUModelRunner, name, None) for name in names)
    if bookkeeping is None or update is None:
        raise RuntimeError(f"this vLLM's GPUModelRunner lacks one of {names}: it is not a supported version")
    if getattr(GPUModelRunner, "credence_scores", False):
        return

    # Once a step, after sampling and before the tokens are handed over. (_get_prompt_logprobs_dict, called inside, may run more than once.)
    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(
        self: Any, scheduler_output: Any, sampler_output: Any, logits: Any, hidden_states: Tensor, *args: Any
    ) -> Any:
        result = bookkeeping(self, scheduler_output, sampler_output, logits, hidden_states, *args)
        if "credence_scorer" not in vars(self):
            self.credence_scorer = Scorer()
        self.credence_scorer.collect(self, hidden_states, scheduler_output.num_scheduled_tokens)
        return result

    @functools.wraps(update)
    def _update_states(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        scorer = vars(self).get("credence_scorer")
        if scorer:
            scorer.prune(self.requests)
        return result

    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync
    GPUModelRunner._update_states = _update_states
    GPUModelRunner.credence_scores = True
