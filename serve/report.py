"""Statistics -> the response object ``uncertainty``. Knows no vLLM."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from credence.adapters import Agreement, ChoiceScores, probability_correct, sequence_scores
from credence.serve.ensemble import Plan
from credence.serve.schemas import (
    AdapterIdentity,
    Answer,
    AutoSamples,
    ChoiceProbability,
    MemberToken,
    Sample,
    SequenceUncertainty,
    TokenUncertainty,
    Uncertainty,
)
from credence.serve.step_stats import StepTable

Favourites = Sequence[Sequence[str]]


def describe(
    plan: Plan,
    num_samples: int,
    table: StepTable | None,
    tokens: Sequence[str],
    *,
    favourites: Favourites | None = None,
    auto: AutoSamples | None = None,
) -> Uncertainty:
    """Describes one text from its token records (modes ``ensemble`` and ``score``).

    Args:
        num_samples: samples that contributed.
        table: one record per token; None without tokens.
        tokens: the tokens' texts.
        favourites: [T][K] texts of each sample's own most likely token, with ``return_samples``.
    """
    if table is None:
        return _uncertainty(plan, num_samples, confidence=None, calibrated=False, auto=auto, sequence=None)
    confidence, calibrated = sequence_confidence(plan, table)
    members = table.member_log_probs.mean(0)
    return _uncertainty(
        plan,
        num_samples,
        confidence=confidence,
        calibrated=calibrated,
        auto=auto,
        tokens=token_details(table, tokens, read=plan.options.mode == "score", favourites=favourites)
        if plan.options.granularity == "token"
        else None,
        samples=[Sample(index=index, mean_logprob=_finite(value)) for index, value in enumerate(members.tolist())],
        **_sequence(table),
    )


def describe_choices(
    plan: Plan, num_samples: int, scores: ChoiceScores, *, calibrated: bool, auto: AutoSamples | None = None
) -> Uncertainty:
    """Describes the posterior predictive over labels; entropies are those of the label, in nats."""
    labels = plan.options.choices or []
    return _uncertainty(
        plan,
        num_samples,
        confidence=float(scores.prob_L.max()),
        calibrated=calibrated,
        auto=auto,
        total=scores.total,
        aleatoric=scores.aleatoric,
        epistemic=scores.epistemic,
        unit="nats",
        sequence=None,
        choices=[
            ChoiceProbability(label=label, prob=prob, std=std)
            for label, prob, std in zip(labels, scores.prob_L.tolist(), scores.std_L.tolist(), strict=True)
        ],
        choices_mass=scores.mass,
        samples=[
            Sample(index=index, probs=dict(zip(labels, row, strict=True)))
            for index, row in enumerate(scores.member_probs_KL.tolist())
        ],
    )


def describe_agreement(
    plan: Plan,
    num_samples: int,
    table: StepTable | None,
    tokens: Sequence[str],
    agreement: Agreement,
    texts: Sequence[str],
    mean_logprobs: Sequence[float],
    *,
    favourites: Favourites | None = None,
    auto: AutoSamples | None = None,
) -> Uncertainty:
    """Describes K independent completions; ``table`` holds the returned one, scored under all samples."""
    scores: dict[str, Any] = {"sequence": None}
    if table is not None:
        scores = _sequence(table)
        if plan.options.granularity == "token":
            scores["tokens"] = token_details(table, tokens, read=True, favourites=favourites)
    return _uncertainty(
        plan,
        num_samples,
        confidence=agreement.agreement,
        calibrated=False,
        auto=auto,
        agreement=agreement.agreement,
        answers=[Answer(answer=a.answer, count=a.count, share=a.share) for a in agreement.answers],
        samples=[
            Sample(index=index, text=text, mean_logprob=_finite(value))
            for index, (text, value) in enumerate(zip(texts, mean_logprobs, strict=True))
        ],
        **scores,
    )


def sequence_confidence(plan: Plan, table: StepTable) -> tuple[float, bool]:
    """Confidence in [0, 1] and whether the stored calibration was applied.

    The probability that the text is correct, by the stored map from its mean log-probability under the average at temperature 1; without a
    map the geometric mean of the tokens' probabilities under the average. Of a classification adapter it is the probability of its answer,
    the first token, among the labels. Without a usable calibration it is the geometric mean at temperature 1 over the vocabulary.
    """
    adapter = plan.adapter
    fitted = plan.confidence_map(table.member_log_probs.shape[1])
    if fitted is not None:
        return probability_correct(fitted, float(table.log_prob.mean())), True
    if plan.options.calibrated and adapter.can_calibrate:
        steps = slice(0, 1) if adapter.support else slice(None)
        log_prob = float(table.calibrated_log_prob[steps].mean())
        if not math.isnan(log_prob):
            return math.exp(min(log_prob, 0.0)), True
    return math.exp(min(float(table.log_prob.mean()), 0.0)), False


def token_details(
    table: StepTable, tokens: Sequence[str], *, read: bool = False, favourites: Favourites | None = None
) -> list[TokenUncertainty]:
    """Scores of every token.

    Args:
        read: the text was read, not written by the average: add the log-probability of the token that would have been the most likely.
        favourites: texts of each sample's own most likely token; adds them, and each sample's log-probability of the token.
    """
    return [
        TokenUncertainty(
            token=token,
            logprob=float(table.log_prob[step]),
            top_logprob=float(table.top_log_probs[step, 0]) if read else None,
            total=float(table.total[step]),
            aleatoric=float(table.aleatoric[step]),
            epistemic=float(table.epistemic[step]),
            variation_ratio=float(table.variation_ratio[step]),
            member_logprobs=[_finite(value) for value in table.member_log_probs[step].tolist()]
            if favourites is not None
            else None,
            member_tops=[
                MemberToken(token=text, logprob=value)
                for text, value in zip(favourites[step], table.member_token_log_probs[step].tolist(), strict=True)
            ]
            if favourites is not None
            else None,
        )
        for step, token in enumerate(tokens)
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity: a sample may give a chosen token probability 0."""
    return value if math.isfinite(value) else None


def _sequence(table: StepTable) -> dict[str, Any]:
    scores = sequence_scores(
        log_prob_T=torch.tensor(table.log_prob),
        total_T=torch.tensor(table.total),
        epistemic_T=torch.tensor(table.epistemic),
        variation_ratio_T=torch.tensor(table.variation_ratio),
        member_log_probs_TK=torch.tensor(table.member_log_probs),
    )
    return {
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
    }


def _uncertainty(
    plan: Plan,
    num_samples: int,
    *,
    confidence: float | None,
    calibrated: bool,
    auto: AutoSamples | None,
    sequence: SequenceUncertainty | None,
    samples: list[Sample] | None = None,
    **fields: Any,
) -> Uncertainty:
    options, adapter = plan.options, plan.adapter
    low = confidence is not None and options.threshold is not None and confidence < options.threshold
    return Uncertainty.model_validate(
        dict.fromkeys(("total", "aleatoric", "epistemic"))
        | fields
        | {
            "mode": options.mode,
            "n_samples": plan.num_samples,
            "n_effective": num_samples,
            "tau": plan.tau,
            "seed": plan.seed,
            "confidence": confidence,
            "calibrated": calibrated,
            "flag": "low_confidence" if low else "ok",
            "sequence": sequence,
            "samples": samples if options.return_samples else None,
            "auto": auto,
            "adapter": AdapterIdentity(name=adapter.name, digest=adapter.artifact.digest),
        }
    )
