"""Texts of the posterior predictive, in transformers: what the server's ensemble says, its most likely token or one drawn by chance.

Every draw keeps keys and values of its own, so that a text of n tokens costs each draw one pass over the prompt and n - 1 passes over one
token. Shape suffixes: B rows under way, K draws, V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from credence.adapters.posterior import LoraFactors
from credence.adapters.sampling import inverse_cdf, token_uniform
from credence.adapters.uncertainty import token_scores
from credence.training.modeling import next_logits, set_factors
from credence.training.predict import Factors, Predictor, temper


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """One text and the scores of its tokens; all lists are as long as ``tokens``.

    Attributes:
        tokens: what was generated, with the stop token if there is one at the end.
        stopped: whether it ended with a stop token, not at a limit.
        log_probs: log-probability of each token under the average at temperature 1, nats.
        total: entropy of the average at each token, nats. epistemic: mutual information there, nats; 0 for one draw.
        tempered_score: mean log-probability of the tokens at the temperature of the calibration, nats.
    """

    tokens: tuple[int, ...]
    stopped: bool
    log_probs: tuple[float, ...]
    total: tuple[float, ...]
    epistemic: tuple[float, ...]
    tempered_score: float

    @property
    def score(self) -> float:
        """Mean log-probability of the tokens under the average at temperature 1, nats; 0 of no token."""
        return sum(self.log_probs) / max(len(self.log_probs), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Tokens drawn from the average, not its most likely ones: the server's own choice under the same seed.

    Attributes:
        seeds: one for each prompt, in [0, 2**64); its tokens are a pure function of it and the average (``adapters/sampling.py``).
        temperature: of the averaged probabilities, above 0.
    """

    seeds: Sequence[int]
    temperature: float = 1.0


@dataclass(slots=True)
class _Text:
    """A text that is being written: ``scores`` are log_prob, total, epistemic and tempered log_prob of each token."""

    limit: int
    tokens: list[int] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    def ends(self, stop: Collection[int]) -> bool:
        return len(self.tokens) == self.limit or self.tokens[-1] in stop

    def finished(self, stop: Collection[int]) -> GeneratedText:
        log_probs, total, epistemic, tempered = zip(*self.scores, strict=True) if self.scores else ((), (), (), ())
        return GeneratedText(
            tokens=tuple(self.tokens),
            stopped=bool(self.tokens) and self.tokens[-1] in stop,
            log_probs=log_probs,
            total=total,
            epistemic=epistemic,
            tempered_score=sum(tempered) / max(len(tempered), 1),
        )


@torch.no_grad()
def generate(
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Factors],
    *,
    stop: Collection[int],
    max_new_tokens: int,
    max_length: int,
    temperature: float = 1.0,
    sampling: Sampling | None = None,
) -> list[GeneratedText]:
    """Continues every prompt by tokens of the average over the draws, until a stop token or a limit.

    Greedy decoding gives a reference text exactly if, teacher-forced, the most likely token equals the reference at every position: the
    context of a position differs between the two only if an earlier token does, so the first difference of one is that of the other.
    Where it gives another text, the reference's score is not that of the text the model says; hence the texts are generated.

    As many rows are under way at once as their K draws have keys and values for at most ``predictor.batch_size`` sequences (one row at
    least). The draws are held on the model's device.

    Args:
        prompts: token ids, none empty.
        stop: token ids that end a text.
        max_length: longest prompt with text, in tokens: the model's context.
        temperature: of ``tempered_score``; it does not change the text.
        sampling: draws the tokens; None takes the most likely one.

    Returns:
        One text for each prompt; without any token where the prompt fills the context.
    """
    if not draws or (sampling is not None and len(sampling.seeds) != len(prompts)):
        raise ValueError("at least one draw, and one seed for each prompt, are needed")
    model = predictor.model
    model.eval()
    draws = [{name: _on_device(factors, model.device) for name, factors in draw.items()} for draw in draws]
    texts = [_Text(limit=min(max_new_tokens, max_length - len(prompt))) for prompt in prompts]
    order = sorted((row for row, text in enumerate(texts) if text.limit > 0), key=lambda row: len(prompts[row]))
    at_once = max(1, predictor.batch_size // len(draws))
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        input_ids, mask = _padded_left([prompts[row] for row in rows], predictor.pad_token)
        input_ids, mask = input_ids.to(model.device), mask.to(model.device)
        caches: list[Any] = [None] * len(draws)
        for step in range(max_new_tokens):
            members = []
            for index, factors in enumerate(draws):
                if len(draws) > 1 or step == 0:
                    set_factors(predictor.sites, factors)
                logits, caches[index] = next_logits(model, input_ids, mask, caches[index])
                members.append(torch.log_softmax(logits.float(), dim=-1))
            scores = token_scores(torch.stack(members, dim=1))
            chosen = _choose(scores.mean_log_probs, rows, step, sampling)
            at_one, tempered = (
                log_probs.gather(1, chosen[:, None]).squeeze(1)
                for log_probs in (scores.mean_log_probs, temper(scores.mean_log_probs, temperature))
            )
            columns = torch.stack([at_one, scores.total, scores.epistemic, tempered], dim=1)
            for row, token, numbers in zip(rows, chosen.tolist(), columns.tolist(), strict=True):
                texts[row].tokens.append(token)
                texts[row].scores.append(numbers)
            going_on = [index for index, row in enumerate(rows) if not texts[row].ends(stop)]
            if not going_on:
                break
            if len(going_on) < len(rows):
                rows, kept = [rows[index] for index in going_on], torch.tensor(going_on, device=model.device)
                chosen, mask = chosen[kept], mask[kept]
                for cache in caches:
                    cache.reorder_cache(kept)
            input_ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [text.finished(stop) for text in texts]


def _choose(mean_log_probs_BV: Tensor, rows: Sequence[int], step: int, sampling: Sampling | None) -> Tensor:
    """One token for each of the rows, [B]; drawn in float64, as the server does it."""
    if sampling is None:
        return mean_log_probs_BV.argmax(-1)
    scaled = mean_log_probs_BV.double() / sampling.temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    uniforms = [[token_uniform(sampling.seeds[row], step)] for row in rows]
    return inverse_cdf(weights, torch.tensor(uniforms, dtype=torch.float64, device=weights.device))


def _padded_left(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, T] int64, every prompt at the right end."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad_token] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _on_device(factors: LoraFactors, device: torch.device) -> LoraFactors:
    return LoraFactors(A=factors.A.to(device), B=factors.B.to(device))


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's end of text and those of the model's generation settings, as vLLM takes them."""
    found = {tokenizer.eos_token_id}
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found.update(given if isinstance(given, list | tuple) else [given])
    return frozenset(int(token) for token in found if token is not None)
