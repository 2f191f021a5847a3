"""One decoding step of complete gangs: averages them, forces their tokens, and has the records written before the tokens leave the worker.

What the adapters to vLLM's two model runners share. A step does not make the host wait for the device: tokens are chosen where the logits
are, whether a gang has a distribution at all is decided there too, and the records travel in one copy to pinned memory. They are written
after that copy has arrived and before vLLM hands the step's tokens over. On the CPU they are written at once.

Shape suffixes: G gangs of equal K, K members, V vocabulary, M most likely tokens, C columns of a record.
"""

import functools
import hmac
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from credence.serve.config import TOKEN_VARIABLE
from credence.serve.step_stats import StepStats
from credence.serve.vllm_plugin.averaging import (
    ChoiceRule,
    average,
    calibrate,
    choose_token,
    constraint,
    mean_log_normaliser,
    penalise,
    to_device,
)
from credence.serve.vllm_plugin.gang_member import PREFIX, GangMember, constrained

logger = logging.getLogger(__name__)


class StatsFile:
    """Writes the records of one gang. The file is open only while it is written, so a gang that leaves the engine leaves nothing open."""

    def __init__(self, member: GangMember) -> None:
        self._gang = member.gang
        self._path = member.stats
        self._usable = bool(member.stats)

    def write(self, *record: Any) -> None:
        """Writes a record (the arguments of ``StepStats.write``).

        A file that is gone (the request has been aborted) or full must not hurt the engine: this is said once.
        """
        if not self._usable:
            return
        try:
            with StepStats.open(self._path) as stats:
                stats.write(*record)
        except (OSError, ValueError) as error:
            logger.warning("no statistics for gang %s: %s", self._gang, error)
            self._usable = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gang:
    """A complete gang in one step.

    Attributes:
        rows: [K] rows of the logits, by member.
        leader: reserved keys of member 0.
        rule: how the token is chosen.
        step: number of output tokens so far.
        file: where the record goes.
        prompt, output: token ids so far, read only if ``rule.penalised``; an int tensor on the logits' device, or a sequence.
        raw: [V] float32, the leader's logits before its constraints; None if it has none.
    """

    rows: Sequence[int]
    leader: GangMember
    rule: ChoiceRule
    step: int
    file: StatsFile
    prompt: Sequence[int] | Tensor = ()
    output: Sequence[int] | Tensor = ()
    raw: Tensor | None = None


class StepRecords:
    """The records of G gangs of one step, on their way to the host.

    Args:
        gangs: the gangs.
        columns_GC: [G, 2 + 5 + 3 K + 1 + 2 M] float64: whether the gang had a distribution, token, ``AveragedStep.columns``, calibrated
            log-probability, M tokens, M log-probabilities.
        num_top: M.
    """

    def __init__(self, gangs: Sequence[Gang], columns_GC: Tensor, num_top: int) -> None:
        self._gangs = gangs
        self._num_top = num_top
        self._columns, self._copied = copy_to_host(columns_GC)

    @property
    def on_host(self) -> bool:
        """Whether ``write`` would not wait."""
        return self._copied is None

    def write(self) -> None:
        """Writes the records, after waiting for their copy. A gang that had no distribution gets none."""
        if self._copied is not None:
            self._copied.synchronize()
        broken = 0
        for gang, row in zip(self._gangs, self._columns.tolist(), strict=True):
            valid, token, *scores = row[:7]
            if not valid:
                broken += 1
                continue
            k = gang.leader.num_samples
            last = 7 + 3 * k
            tops = row[last + 1 : last + 1 + self._num_top], row[last + 1 + self._num_top :]
            tokens, log_probs = (columns[: gang.leader.num_top] for columns in tops)
            members, favourites, theirs = row[7 : 7 + k], row[7 + k : 7 + 2 * k], row[7 + 2 * k : last]
            record = (members, row[last], tokens, log_probs, favourites, theirs)
            gang.file.write(gang.step, int(token), *scores, *record)
        if broken:
            logger.error("%d gangs have logits that are no distribution in this step", broken)


def copy_to_host(columns: Tensor) -> tuple[Tensor, Any]:
    """Starts the copy of a device tensor to pinned memory; returns the host tensor, and the event of the copy (None: there already)."""
    if not columns.is_cuda:
        return columns, None
    host = torch.empty(columns.shape, dtype=columns.dtype, pin_memory=True)
    host.copy_(columns, non_blocking=True)
    # Blocking: the thread that waits sleeps instead of polling the driver.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record()
    return host, copied


class RecordQueue:
    """Records of the current step that are still on their way to the host."""

    def __init__(self) -> None:
        self._waiting: list[StepRecords] = []

    def put(self, records: StepRecords) -> None:
        """Writes records that are on the host, and keeps the others."""
        if records.on_host:
            records.write()
        else:
            self._waiting.append(records)

    def take(self) -> list[StepRecords]:
        """Returns the waiting records, and forgets them."""
        waiting, self._waiting = self._waiting, []
        return waiting


def average_gangs(logits: Tensor, gangs: Sequence[Gang], raw_logits: Tensor | None = None) -> list[StepRecords]:
    """Averages gangs and gives each of them one token, in place: 0 there and -inf elsewhere, in all its rows.

    A gang whose logits are no distribution (NaN, or every token forbidden) keeps its rows and gets no record.

    Args:
        logits: [rows, V], what vLLM will sample from.
        gangs: of any sizes.
        raw_logits: [rows, V], the logits to average; None: ``logits``.
    """
    by_size: dict[int, list[Gang]] = {}
    for gang in gangs:
        by_size.setdefault(len(gang.rows), []).append(gang)
    source = logits if raw_logits is None else raw_logits
    return [_average_equal(logits, source, group, size) for size, group in by_size.items()]


def _average_equal(logits: Tensor, source: Tensor, gangs: list[Gang], size: int) -> StepRecords:
    rows = to_device([row for gang in gangs for row in gang.rows], logits.device)
    members_GKV = source[rows].view(len(gangs), size, -1)
    for position, gang in enumerate(gangs):
        if gang.raw is not None:
            members_GKV[position, 0] = gang.raw
    averaged = average(members_GKV)
    mean_GV = averaged.scores.mean_log_probs
    choices = [_choose(gang, mean_GV[i], members_GKV[i], logits) for i, gang in enumerate(gangs)]
    tokens, possible = (torch.stack(parts) for parts in zip(*choices, strict=True))
    columns = averaged.columns(tokens)
    valid = possible & ~columns[:, :5].isnan().any(-1)
    calibrated = [
        calibrate(mean_GV[i], tokens[i], gang.leader.temperature, gang.leader.support) for i, gang in enumerate(gangs)
    ]
    num_top = max(gang.leader.num_top for gang in gangs)
    top_tokens, top_log_probs = averaged.top_columns(num_top)
    record = [valid[:, None], tokens[:, None], columns, torch.stack(calibrated)[:, None], top_tokens, top_log_probs]
    # Added, not assigned: the rows of a gang without a distribution get + 0, and the host need not know which.
    minus = torch.where(valid, -torch.inf, 0.0)
    for i, gang in enumerate(gangs):
        for row in gang.rows:
            logits[row].add_(minus[i])
    chosen, forced = (part.repeat_interleave(size, output_size=len(rows)) for part in (tokens, valid))
    logits[rows, chosen] = torch.where(forced, 0.0, logits[rows, chosen])
    return StepRecords(gangs, torch.cat([part.double() for part in record], dim=-1), num_top)


def _choose(gang: Gang, mean_V: Tensor, members_KV: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gang's token (int64) and whether there was any to choose (bool), both 0-dimensional."""
    scores = mean_V
    if gang.rule.penalised:
        scores = scores + mean_log_normaliser(members_KV)
    if gang.raw is not None:
        scores = scores + constraint(gang.raw, logits[gang.rows[0]])
    possible = scores.max() > -torch.inf
    scores = torch.where(possible, scores, 0.0)
    if gang.rule.penalised:
        scores = penalise(scores, gang.rule, gang.prompt, gang.output)
    return choose_token(scores, gang.rule, gang.step), possible


def write_before_output(output_class: Any) -> None:
    """Lets ``get_output`` of vLLM's asynchronous step outputs write the records that ``attach`` gave them. Safe to call twice.

    Raises:
        RuntimeError: if the class has no ``get_output``.
    """
    original = getattr(output_class, "get_output", None)
    if original is None:
        raise RuntimeError(f"this vLLM's {output_class.__name__} has no get_output: it is not a supported version")
    if getattr(original, "credence_hook", False):
        return

    @functools.wraps(original)
    def get_output(self: Any) -> Any:
        for records in vars(self).pop("credence_records", ()):
            records.write()
        return original(self)

    get_output.credence_hook = True  # type: ignore[attr-defined]
    output_class.get_output = get_output


def attach(output: Any, records: Sequence[StepRecords]) -> None:
    """Has records written before the tokens of their step leave the worker.

    Args:
        output: what the model runner's ``sample_tokens`` returned: an asynchronous output, whose ``get_output`` will write them (see
            ``write_before_output``), or one that already has its tokens on the host, for which they are written now.
    """
    if not records:
        return
    if hasattr(output, "get_output"):
        output.credence_records = list(records)
    else:
        for part in records:
            part.write()


def choice_rule(member: GangMember, params: Any) -> ChoiceRule:
    """The rule of a gang, from its leader's reserved keys and SamplingParams."""
    return ChoiceRule(
        seed=member.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
    )


def validate_member(params: Any) -> GangMember | None:
    """Checks SamplingParams that may form a member of a gang; returns the member, or None for an ordinary request.

    Raises:
        ValueError: if a ``credence_`` key comes without the server's token, or does not form a valid gang member.
    """
    extra_args = params.extra_args or {}
    if not any(isinstance(key, str) and key.startswith(PREFIX) for key in extra_args):
        return None
    expected, given = os.environ.get(TOKEN_VARIABLE, ""), extra_args.get(PREFIX + "token")
    authentic = isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
    if not expected or not authentic:
        raise ValueError(f"vllm_xargs: keys that begin with {PREFIX!r} are reserved for the server; remove them")
    member = GangMember.from_extra_args(extra_args)
    if params.n != 1:
        raise ValueError(f"a gang member has n = 1, got n = {params.n}: use one gang for each completion")
    if member is not None and member.index > 0 and constrained(params):
        raise ValueError(
            f"member {member.index} of a gang carries a constraint (logit_bias, allowed_token_ids, bad_words, min_tokens or structured "
            "output); only member 0 may"
        )
    if member is not None and member.targets and params.max_tokens != 1:
        raise ValueError(f"a scoring gang has max_tokens = 1, got {params.max_tokens}")
    return member
