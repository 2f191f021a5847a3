"""Uncertainty scores, all in nats; higher = more uncertain unless said otherwise (docs/equations.md, section 8).

Averages are over probabilities, never logits. Shape suffixes: K posterior samples, V vocabulary, T tokens; ``...`` any batch dimensions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of one next-token distribution under K posterior samples (token level, nats).

    Attributes:
        mean_log_probs: [..., V], log of the average of the K distributions.
        total: [...], predictive entropy H[mean_k p_k].
        aleatoric: [...], expected entropy mean_k H[p_k].
        epistemic: [...], mutual information total - aleatoric, within [0, ln K]; 0 for K = 1.
        variation_ratio: [...], share of samples whose most likely token is not the average's (no unit, [0, 1]).
        member_tokens: [..., K] int64, the most likely token of each sample.
    """

    mean_log_probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variation_ratio: Tensor
    member_tokens: Tensor


def token_scores(log_probs_KV: Tensor) -> TokenScores:
    """Computes the average distribution and its entropy decomposition on the full support.

    Args:
        log_probs_KV: [..., K, V] normalised log-probabilities; -inf marks an impossible token.

    Returns:
        TokenScores with total = aleatoric + epistemic. The difference of two rounded entropies can leave [0, ln K] by rounding; it is
        clamped there, and the aleatoric part is recomputed so that the sum stays exact.

    Raises:
        ValueError: if there is no sample or no vocabulary dimension.
    """
    if log_probs_KV.ndim < 2 or 0 in log_probs_KV.shape[-2:]:
        raise ValueError(f"log_probs must be [..., K, V] with K, V >= 1, got shape {tuple(log_probs_KV.shape)}")
    k = log_probs_KV.shape[-2]
    mean_log_probs = torch.logsumexp(log_probs_KV, dim=-2) - math.log(k)
    total = torch.special.entr(mean_log_probs.exp()).sum(-1)
    expected = torch.special.entr(log_probs_KV.exp()).sum(-1).mean(-1)
    epistemic = (total - expected).clamp(0.0, math.log(k)) if k > 1 else torch.zeros_like(total)
    member_tokens = log_probs_KV.argmax(-1)
    votes = member_tokens != mean_log_probs.argmax(-1, keepdim=True)
    return TokenScores(
        mean_log_probs=mean_log_probs,
        total=total,
        aleatoric=total - epistemic,
        epistemic=epistemic,
        variation_ratio=votes.to(total.dtype).mean(-1),
        member_tokens=member_tokens,
    )


def truncated_token_scores(log_probs_KM: Tensor) -> tuple[TokenScores, Tensor]:
    """Computes the scores on a truncated support: M shared tokens and one bucket for the rest.

    Merging outcomes can only lose information, so total and epistemic are lower bounds of their full-vocabulary values (data-processing
    inequality). Never show them without the tail mass.

    Args:
        log_probs_KM: [..., K, M] log-probabilities of the same M tokens under each sample, each row summing to at most 1.

    Returns:
        The scores, whose ``mean_log_probs`` is [..., M + 1] with the tail last, and the tail mass of the average, [...], in [0, 1].
    """
    tail = (1 - log_probs_KM.exp().sum(-1, keepdim=True)).clamp(0.0, 1.0)
    scores = token_scores(torch.cat([log_probs_KM, tail.log()], dim=-1))
    return scores, tail.squeeze(-1).mean(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScores:
    """Scores of one generated sequence of T tokens under K samples (sequence level).

    Attributes:
        total, aleatoric, epistemic: means over the tokens, nats/token. (Their sums are T times these.)
        max_total, max_epistemic: the largest value of any token, nats.
        mean_logprob: length-normalised log-probability of the sequence under the average, nats/token, <= 0 (higher = more certain).
        logprob_std: standard deviation over the samples of their mean log-probability of the sequence, nats/token.
        variation_ratio: mean over tokens of the token-level variation ratio, [0, 1].
    """

    num_tokens: int
    total: float
    aleatoric: float
    epistemic: float
    max_total: float
    max_epistemic: float
    mean_logprob: float
    logprob_std: float
    variation_ratio: float


def sequence_scores(
    *,
    log_prob_T: Tensor,
    total_T: Tensor,
    epistemic_T: Tensor,
    variation_ratio_T: Tensor,
    member_log_probs_TK: Tensor,
) -> SequenceScores:
    """Reduces token scores to sequence scores.

    ``logprob_std`` is the population standard deviation (divisor K) of (1/T) sum_t log p_k(y_t); it is 0 for K = 1 and infinite only if
    some sample gives a chosen token probability zero.

    Raises:
        ValueError: if there is no token, or the lengths differ.
    """
    num_tokens = log_prob_T.shape[0]
    lengths = {t.shape[0] for t in (log_prob_T, total_T, epistemic_T, variation_ratio_T, member_log_probs_TK)}
    if num_tokens == 0 or len(lengths) != 1:
        raise ValueError(
            f"sequence scores need one value per token and at least one token, got lengths {sorted(lengths)}"
        )
    total, epistemic = float(total_T.double().mean()), float(epistemic_T.double().mean())
    return SequenceScores(
        num_tokens=num_tokens,
        total=total,
        aleatoric=total - epistemic,
        epistemic=epistemic,
        max_total=float(total_T.max()),
        max_epistemic=float(epistemic_T.max()),
        mean_logprob=float(log_prob_T.double().mean()),
        logprob_std=_population_std(member_log_probs_TK.double().mean(0)),
        variation_ratio=float(variation_ratio_T.double().mean()),
    )


def _population_std(values_K: Tensor) -> float:
    if values_K.shape[0] == 1:
        return 0.0
    if bool(values_K.isneginf().any()):
        return math.inf  # the formula would give NaN
    return float(values_K.std(correction=0))
