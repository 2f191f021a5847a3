"""Posterior predictive over given labels, mode ``choices`` (docs/equations.md, section 11). All scores in nats.

Shape suffixes: K posterior samples, L labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from credence.adapters.uncertainty import token_scores

# Log-probabilities of tokens are sums of rounded float32 numbers: a certain label may come out a little above 0.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScores:
    """The average distribution over L labels under K posterior samples, and its uncertainty (sequence level, nats).

    Attributes:
        prob_L: float64, the tempered average; sums to 1.
        std_L: float64, population standard deviation over the samples of q_k(l), at temperature 1; 0 for K = 1.
        member_probs_KL: float64, q_k(l), each row summing to 1.
        top: index of the most likely label of the average (the first of equals).
        total: H[mean_k q_k], at temperature 1, within [0, ln L]; higher = more uncertain.
        aleatoric: mean_k H[q_k]; higher = more uncertain.
        epistemic: total - aleatoric, the mutual information of label and sample, within [0, ln min(K, L)]; 0 for K = 1.
        variation_ratio: share of samples whose most likely label is not ``top`` (no unit, [0, 1]).
        mass: sum_l mean_k p_k(l), how much of the model's own probability the labels hold; within [0, 1] unless one label is the beginning
            of another, whose probability is then counted twice. None when length-normalised.
    """

    prob_L: Tensor
    std_L: Tensor
    member_probs_KL: Tensor
    top: int
    total: float
    aleatoric: float
    epistemic: float
    variation_ratio: float
    mass: float | None


def choice_scores(
    log_probs_KL: Tensor,
    num_tokens_L: Sequence[int],
    *,
    length_normalized: bool = False,
    temperature: float = 1.0,
) -> ChoiceScores:
    """Computes the average of the samples' distributions over the labels, and how much they disagree.

    With u_k(l) = log p_k(l), or log p_k(l) / n_l when length-normalised (n_l the label's number of tokens):

        q_k(l) = exp u_k(l) / sum_l' exp u_k(l'),   q(l) = (1/K) sum_k q_k(l),   prob(l) = q(l)^(1/T) / sum_l' q(l')^(1/T)

    Each sample is restricted to the labels first and then averaged, as in training and evaluation (docs/equations.md, section 7): every
    sample has one vote, whatever probability it leaves to other texts. A posterior over the weights given that the text is one of the
    labels would instead weigh the samples by their mass.

    Args:
        log_probs_KL: [K, L] log p_k(label l) in nats, summed over the label's tokens; -inf marks an impossible label.
        num_tokens_L: number of tokens of each label, at least 1.
        length_normalized: divide each log-probability by its label's number of tokens.
        temperature: T > 0, applied to the average; 1 changes nothing.

    Raises:
        ValueError: if the shape is not [K, L] with K, L >= 1, a log-probability is NaN or positive, a sample gives every label probability
            zero, the numbers of tokens do not fit, or the temperature is not a positive number.
    """
    log_probs = _checked(log_probs_KL, num_tokens_L)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a finite number above 0 (1 = none)")
    k, num_labels = log_probs.shape
    lengths_L = torch.tensor(list(num_tokens_L), dtype=torch.float64)
    members = torch.log_softmax(log_probs / lengths_L if length_normalized else log_probs, dim=-1)
    member_probs = members.exp()
    scores = token_scores(members)
    total = min(max(float(scores.total), 0.0), math.log(num_labels))
    # token_scores bounds it by ln K, total is at most ln L; both entropies are rounded.
    epistemic = min(float(scores.epistemic), total)
    return ChoiceScores(
        prob_L=torch.softmax(scores.mean_log_probs / temperature, dim=-1),
        std_L=member_probs.std(dim=0, correction=0),
        member_probs_KL=member_probs,
        top=int(scores.mean_log_probs.argmax()),
        total=total,
        aleatoric=total - epistemic,
        epistemic=epistemic,
        variation_ratio=float(scores.variation_ratio),
        mass=None if length_normalized else float(log_probs.exp().sum(-1).mean()),
    )


def _checked(log_probs_KL: Tensor, num_tokens_L: Sequence[int]) -> Tensor:
    """The log-probabilities in float64 on the CPU, once they and the labels' lengths are known to be usable."""
    if log_probs_KL.ndim != 2 or 0 in log_probs_KL.shape:
        raise ValueError(f"log_probs must be [K, L] with K, L >= 1, got shape {tuple(log_probs_KL.shape)}")
    num_labels = log_probs_KL.shape[1]
    if len(num_tokens_L) != num_labels or min(num_tokens_L) < 1:
        raise ValueError(
            f"num_tokens must give at least 1 token for each of the {num_labels} labels, got {list(num_tokens_L)}"
        )
    log_probs = log_probs_KL.detach().double().cpu()
    if not bool((log_probs <= _ROUNDING).all()):
        sample, label = (int(i) for i in (~(log_probs <= _ROUNDING)).nonzero()[0])
        raise ValueError(
            f"log_probs[{sample}, {label}] is {float(log_probs[sample, label])}; the log-probability of a label is at most 0"
        )
    without_label = log_probs.isneginf().all(-1).nonzero()
    if without_label.numel():
        raise ValueError(
            f"sample {int(without_label[0])} gives each of the {num_labels} labels probability 0, so it has no distribution over them; "
            "check the labels' texts"
        )
    return log_probs
