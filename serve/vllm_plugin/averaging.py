"""Bayesian model averaging of one decoding step: pure torch, no vLLM.

A gang is K requests that decode the same text under K posterior samples. At every step their next-token
distributions are averaged, one token is chosen from the average, and all members continue with it. Functions that return
tensors never make the host wait for the device. Shape suffixes: G gangs of equal K, K members, V vocabulary, N tokens,
M most likely tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from credence.adapters.sampling import inverse_cdf, token_uniform
from credence.adapters.uncertainty import TokenScores, token_scores

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the most likely token is taken (vLLM's threshold)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRule:
    """How a gang chooses a token from the averaged distribution; the meaning and order of the filters are vLLM's.

    Attributes:
        seed: 0 <= seed < 2**64, key of the generator; the token of a step is a function of (seed, step) and the average.
        temperature: divides the log-probabilities; below 1e-5 the choice is greedy and the filters do not matter.
        top_k: keep the k most likely tokens (ties with the last stay); 0 or less keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, after top_k; 1 keeps all.
        min_p: keep tokens whose probability is at least min_p times the largest.
        presence_penalty, frequency_penalty, repetition_penalty: OpenAI's and vLLM's penalties on tokens seen before; 0, 0 and 1 do nothing.
    """

    seed: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalised(self) -> bool:
        """Whether any penalty is in force."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedStep:
    """One step of G gangs.

    Attributes:
        scores: TokenScores with batch dimension G; ``scores.mean_log_probs`` is [G, V], float32.
        member_log_probs: [G, K, V], log-softmax of each member, float32.
    """

    scores: TokenScores
    member_log_probs: Tensor

    def columns(self, tokens_N: Tensor, gangs_N: Tensor | None = None) -> Tensor:
        """Returns the scores of N tokens: log_prob, total, aleatoric, epistemic, variation_ratio, then K member log-probabilities, the K
        members' own most likely tokens and what they give them.

        Args:
            tokens_N: [N] int64.
            gangs_N: [N] int64, the gang of each token; None for one token of each gang, in order.

        Returns:
            [N, 5 + 3 K] float64, on the device of the logits.
        """
        if gangs_N is None:
            gangs_N = torch.arange(len(tokens_N), device=tokens_N.device)
        chosen = self.scores.mean_log_probs[gangs_N, tokens_N].double()
        members = self.member_log_probs[gangs_N, :, tokens_N].double()
        total, ratio = self.scores.total[gangs_N].double(), self.scores.variation_ratio[gangs_N].double()
        # In float64: ln K as a float32 may exceed ln K, and the written parts have to add up to the written total.
        epistemic = self.scores.epistemic[gangs_N].double().clamp_max(math.log(self.member_log_probs.shape[1]))
        scores = torch.stack([chosen, total, total - epistemic, epistemic, ratio], dim=-1)
        favourites = self.scores.member_tokens
        theirs = self.member_log_probs.gather(-1, favourites[..., None])[..., 0]
        return torch.cat([scores, members, favourites[gangs_N].double(), theirs[gangs_N].double()], dim=-1)

    def record(self, tokens_N: Tensor, gangs_N: Tensor | None = None) -> list[list[float]]:
        """Returns ``columns`` as a list of N rows."""
        rows: list[list[float]] = self.columns(tokens_N, gangs_N).tolist()
        return rows

    def top_columns(self, num_top: int) -> tuple[Tensor, Tensor]:
        """Returns, per gang, the M = ``num_top`` most likely tokens of the average and their log-probabilities, most likely first.

        Returns:
            [G, M] int64 and [G, M] float32. A smaller vocabulary is padded with token -1 at -inf.
        """
        mean = self.scores.mean_log_probs
        values, tokens = mean.topk(min(num_top, mean.shape[-1]), dim=-1)
        missing = num_top - values.shape[-1]
        if missing > 0:
            values = torch.cat([values, values.new_full((len(mean), missing), -torch.inf)], dim=-1)
            tokens = torch.cat([tokens, tokens.new_full((len(mean), missing), -1)], dim=-1)
        return tokens, values

    def top(self, num_top: int) -> tuple[list[list[int]], list[list[float]]]:
        """Returns ``top_columns`` as lists of G rows."""
        tokens, values = self.top_columns(num_top)
        return tokens.tolist(), values.tolist()


def average(logits_GKV: Tensor) -> AveragedStep:
    """Averages the next-token distributions of G gangs: log (1/K) sum_k softmax(logits_k), and its scores on the full vocabulary.

    Args:
        logits_GKV: [G, K, V]; -inf marks a token that must not be chosen. Each row is treated by itself: a gang's numbers do not depend on
            the other gangs.
    """
    log_probs = torch.log_softmax(logits_GKV, dim=-1, dtype=torch.float32)
    return AveragedStep(scores=token_scores(log_probs), member_log_probs=log_probs)


def calibrate(mean_log_probs_V: Tensor, token: Tensor, temperature: float, support: Sequence[int] = ()) -> Tensor:
    """Log-probability of a token after the calibration: log softmax(log p / T) over the support, nats.

    Args:
        mean_log_probs_V: [V], log of the averaged probabilities.
        token: 0-dimensional int64, on the same device.
        temperature: T > 0, fitted on held-out data for this number of samples.
        support: the tokens the temperature was fitted on (the answer letters of a classification adapter); empty for the vocabulary.

    Returns:
        0-dimensional float64; NaN if ``token`` is outside the support: the calibration says nothing about it.
    """
    chosen = mean_log_probs_V.gather(0, token[None])[0].double() / temperature
    if not support:
        return chosen - torch.logsumexp(mean_log_probs_V.double() / temperature, dim=-1)
    supported = to_device(support, mean_log_probs_V.device)
    scaled = mean_log_probs_V[supported].double() / temperature
    return torch.where((supported == token).any(), chosen - torch.logsumexp(scaled, dim=-1), torch.nan)


def calibrated_log_prob(mean_log_probs_V: Tensor, token: int, temperature: float, support: Sequence[int] = ()) -> float:
    """Returns ``calibrate`` of a token id as a float."""
    return float(calibrate(mean_log_probs_V, to_device([token], mean_log_probs_V.device)[0], temperature, support))


def mean_log_normaliser(logits_KV: Tensor) -> Tensor:
    """Returns mean_k logsumexp(logits_k), which puts averaged log-probabilities back on the scale of logits (exactly, for K = 1)."""
    return torch.logsumexp(logits_KV.float(), dim=-1).mean()


def penalise(
    logits_V: Tensor, rule: ChoiceRule, prompt: Sequence[int] | Tensor, output: Sequence[int] | Tensor
) -> Tensor:
    """Applies vLLM's penalties to the logits of one gang.

    repetition_penalty concerns prompt and output tokens (positive logits are divided by it, negative ones multiplied), presence_penalty and
    frequency_penalty the output only. The first is not invariant to a shift, so the average must be given on the scale of logits.

    Args:
        prompt, output: token ids; those outside 0..V - 1 (placeholders of tokens that are not known yet) do not count.
    """
    counts = _counts(output, logits_V)
    seen = (counts > 0) | (_counts(prompt, logits_V) > 0)
    factor = torch.where(logits_V > 0, 1 / rule.repetition_penalty, rule.repetition_penalty)
    logits = torch.where(seen, logits_V * factor, logits_V)
    return logits - rule.frequency_penalty * counts - rule.presence_penalty * (counts > 0).to(logits.dtype)


def constraint(raw_V: Tensor, constrained_V: Tensor) -> Tensor:
    """Returns what a constraint added to one row of logits: -inf where it forbids the token, else the bias (0 for none).

    Added to averaged log-probabilities it gives the average under that constraint.

    Args:
        raw_V: [V], the row before; -inf is an impossible token and stays one.
        constrained_V: [V], the row after.
    """
    return torch.where(constrained_V.isneginf(), -torch.inf, constrained_V - raw_V)


def choose_token(logits_V: Tensor, rule: ChoiceRule, step: int) -> Tensor:
    """Chooses one token from softmax(logits / temperature) after min_p, top_k and top_p.

    Inverse-CDF sampling in float64 with one uniform number from (seed, step): it has no state, and is the same on every rank and
    whatever else is in the batch.

    Args:
        logits_V: [V], averaged log-probabilities (any shift); -inf is never chosen.
        step: number of output tokens so far.

    Returns:
        The token id, a 0-dimensional int64 tensor on the device of the logits.
    """
    if rule.temperature < GREEDY_TEMPERATURE:
        return logits_V.argmax()
    scaled = logits_V.double() / rule.temperature
    weights = (scaled - scaled.max()).exp()
    if rule.min_p > 0:
        weights = torch.where(weights < rule.min_p, 0.0, weights)
    ids = None
    if 0 < rule.top_k < weights.shape[0]:
        # Ties with the k-th token stay, as in vLLM: keep by value, not by position.
        smallest = weights.topk(rule.top_k).values[-1]
        weights = torch.where(weights < smallest, 0.0, weights)
    if rule.top_p < 1:
        weights, ids = weights.sort(descending=True, stable=True)
        reached = weights.cumsum(0) - weights
        weights = torch.where(reached < rule.top_p * weights.sum(), weights, 0.0)
        weights[0] = weights[0].clamp_min(torch.finfo(weights.dtype).tiny)
    position = inverse_cdf(weights, token_uniform(rule.seed, step))
    # gather, not ids[position]: an index without dimensions is read by the host.
    return position if ids is None else ids.gather(0, position[None])[0]


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Returns int64 values as a tensor on a device; pinned memory lets the host go on while they are copied."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _counts(tokens: Sequence[int] | Tensor, logits_V: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs, [V] int64."""
    size = logits_V.shape[-1]
    ids = tokens.long() if isinstance(tokens, Tensor) else to_device(tokens, logits_V.device)
    # bincount would wait for the device; ids that do not count go to one slot more.
    ids = torch.where((ids >= 0) & (ids < size), ids, size)
    return torch.zeros(size + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))[:size]
