"""The posterior predictive in transformers + PEFT: averages of K samples' probabilities, and the scores of each position.

Shape suffixes: P positions (one per label or choice row, one per target token of free text), C candidates (the answer tokens of the
row, padded with probability zero; the whole vocabulary for free text), K samples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credence.adapters.posterior import LoraFactors
from credence.training.modeling import LoraSite, logits_at, set_factors
from credence.training.prompts import IGNORED, Example, collate

Factors = Mapping[str, LoraFactors]

MAX_POSITIONS = 512
"""Most predictions in one batch: each is a distribution over the vocabulary, 0.5 MB at 128,000 tokens."""

TOP_ANSWERS = 5
"""Most likely candidates that scores keep of each position: 80 bytes, whatever the number of candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The average over the first K samples, for one batch of rows.

    Attributes:
        k: number of samples averaged.
        row: [P], index of the row (in the list of examples given) of each position.
        target: [P], index of the right candidate, -100 where the row is unlabelled.
        log_mean_PC: log of the averaged probabilities; float64 over candidates, float32 over a whole vocabulary.
        expected_entropy: [P], mean over the samples of their entropy, nats.
    """

    k: int
    row: Tensor
    target: Tensor
    log_mean_PC: Tensor
    expected_entropy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of positions at one temperature; [P] float64 tensors (``row`` and ``choice`` int64, ``correct`` bool).

    Attributes:
        log_prob: log-probability of the right candidate, nats; NaN where the row is unlabelled.
        choice: index of the most likely candidate (int64); a token id in free text.
        correct: whether the most likely candidate is the right one.
        confidence: probability of the most likely candidate.
        brier: sum over the candidates of (p - y)^2; NaN where unlabelled.
        total: entropy of the (tempered) average, nats. epistemic: mutual information at temperature 1, nats.
        top: [P, 5] int64, the most likely candidates, best first. top_probs: [P, 5], their probabilities; 0 where there are fewer.
    """

    row: Tensor
    log_prob: Tensor
    choice: Tensor
    correct: Tensor
    confidence: Tensor
    brier: Tensor
    total: Tensor
    epistemic: Tensor
    top: Tensor
    top_probs: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence["Scores"]) -> "Scores":
        """Joins the scores of several batches."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__})

    def on_cpu(self) -> "Scores":
        """The same scores, numbers as float64 on the CPU."""
        moved = {name: getattr(self, name).cpu() for name in self.__dataclass_fields__}
        return Scores(**{name: t.double() if t.is_floating_point() else t for name, t in moved.items()})

    def resampled(self, generator: torch.Generator) -> "Scores":
        """As many rows drawn with replacement, each with all its positions, numbered anew; of ``row`` values 0, ..., rows - 1."""
        counts = torch.bincount(self.row)
        order, starts = self.row.argsort(stable=True), counts.cumsum(0) - counts
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        row = torch.repeat_interleave(torch.arange(len(drawn)), counts[drawn])
        within = torch.arange(len(row)) - (counts[drawn].cumsum(0) - counts[drawn])[row]
        positions = order[starts[drawn][row] + within]
        picked = {name: getattr(self, name)[positions] for name in self.__dataclass_fields__}
        return Scores(**{**picked, "row": row})

    def by_row(self, name: str) -> Tensor:
        """Mean of one score over each row's positions, [rows]."""
        rows = int(self.row.max()) + 1
        sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, self.row, getattr(self, name))
        return sums / torch.bincount(self.row, minlength=rows)


class Predictor:
    """Runs rows through the model under given LoRA factors.

    Args:
        sites: the model's LoRA modules; their factors are overwritten.
        batch_size: rows per forward pass; rows of similar length go together.
    """

    def __init__(self, model: Any, sites: list[LoraSite], pad_token: int, batch_size: int = 64) -> None:
        self.model = model
        self.sites = sites
        self.pad_token = pad_token
        self.batch_size = batch_size

    @torch.no_grad()
    def predict(self, examples: Sequence[Example], draws: Sequence[Factors], ks: Sequence[int]) -> Iterator[Prediction]:
        """Yields, for every batch and every K in ``ks``, the average over the first K of ``draws``.

        One pass over the largest K serves them all, because sample s is the same for every K.
        """
        if not ks or min(ks) < 1 or max(ks) > len(draws):
            raise ValueError(f"ks must be within 1 and the {len(draws)} draws, got {list(ks)}")
        self.model.eval()
        wanted = set(ks)
        for rows in self._batches(examples):
            batch = _Batch.build([examples[row] for row in rows], rows, self.pad_token, self.model.device)
            log_sum: Tensor | None = None
            entropy_sum = torch.zeros((), device=self.model.device)
            for index, factors in enumerate(draws[: max(ks)]):
                set_factors(self.sites, factors)
                log_probs = batch.log_probs(self.model)
                log_sum = log_probs if log_sum is None else torch.logaddexp(log_sum, log_probs)
                entropy_sum = entropy_sum + _entropy(log_probs)
                if index + 1 in wanted:
                    yield Prediction(
                        k=index + 1,
                        row=batch.row,
                        target=batch.target,
                        log_mean_PC=log_sum - math.log(index + 1),
                        expected_entropy=entropy_sum / (index + 1),
                    )

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Rows of similar length together, at most ``batch_size`` and, for free text, at most ``MAX_POSITIONS`` predictions."""
        order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt) + len(examples[row].target))
        batch: list[int] = []
        positions = 0
        for row in order:
            added = 1 if examples[row].candidates else len(examples[row].target)
            if batch and (len(batch) == self.batch_size or positions + added > MAX_POSITIONS):
                yield batch
                batch, positions = [], 0
            batch.append(row)
            positions += added
        if batch:
            yield batch


def temper(log_probs_PC: Tensor, temperature: float) -> Tensor:
    """Log of p^(1/T) / sum p^(1/T), [P, C]: the temperature acts on the averaged probabilities."""
    if temperature == 1:
        return log_probs_PC
    return torch.log_softmax(log_probs_PC / temperature, dim=-1)


def log_likelihood(prediction: Prediction, temperature: float = 1.0) -> Tensor:
    """Log-probability of the right candidate, [P] float64 on the CPU, nats."""
    tempered = temper(prediction.log_mean_PC, temperature)
    return tempered.gather(1, prediction.target[:, None]).squeeze(1).double().cpu()


def score(prediction: Prediction, temperature: float = 1.0) -> Scores:
    """Scores every position of a prediction at one temperature."""
    tempered = temper(prediction.log_mean_PC, temperature)
    probs = tempered.exp()
    confidence, choice = probs.max(-1)
    known = prediction.target != IGNORED
    right = probs.gather(1, prediction.target.clamp_min(0)[:, None]).squeeze(1)
    log_right = tempered.gather(1, prediction.target.clamp_min(0)[:, None]).squeeze(1)
    nan = torch.full_like(log_right, float("nan"))
    epistemic = _entropy(prediction.log_mean_PC) - prediction.expected_entropy
    top_probs, top = probs.topk(min(TOP_ANSWERS, probs.shape[1]))
    missing = (0, TOP_ANSWERS - top.shape[1])
    scores = Scores(
        row=prediction.row,
        log_prob=torch.where(known, log_right, nan),
        choice=choice,
        correct=(choice == prediction.target) & known,
        confidence=confidence,
        brier=torch.where(known, probs.square().sum(-1) - 2 * right + 1, nan),
        total=_entropy(tempered),
        epistemic=epistemic.clamp(0.0, math.log(prediction.k)) if prediction.k > 1 else torch.zeros_like(epistemic),
        top=F.pad(top, missing),
        top_probs=F.pad(top_probs, missing),
    )
    return scores.on_cpu()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Padded rows and where their predictions are read."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    positions: Tensor
    row_in_batch: Tensor
    slot: Tensor
    candidates: Tensor | None
    row: Tensor
    target: Tensor

    @classmethod
    def build(cls, examples: Sequence[Example], rows: Sequence[int], pad_token: int, device: torch.device) -> "_Batch":
        choice = bool(examples[0].candidates)
        padded = collate(examples, pad_token)
        # (row in batch, sequence position, target) of every prediction
        reads: list[tuple[int, int, int]] = []
        for index, example in enumerate(examples):
            first = example.position
            if choice:
                reads.append((index, first, IGNORED if example.answer is None else example.answer))
            else:
                reads.extend((index, first + offset, token) for offset, token in enumerate(example.target))
        row_in_batch, sequence, target = torch.tensor(reads, dtype=torch.int64).unbind(1)
        positions, slot = torch.unique(sequence, return_inverse=True)
        candidates = None
        if choice:
            width = max(len(example.candidates) for example in examples)
            candidates = torch.tensor([(*e.candidates, *[-1] * (width - len(e.candidates))) for e in examples])
        return cls(
            input_ids=padded["input_ids"].to(device),
            attention_mask=padded["attention_mask"].to(device),
            token_type_ids=padded["token_type_ids"].to(device) if "token_type_ids" in padded else None,
            positions=positions.to(device),
            row_in_batch=row_in_batch.to(device),
            slot=slot.to(device),
            candidates=None if candidates is None else candidates.to(device),
            row=torch.tensor(rows)[row_in_batch],
            target=target.to(device),
        )

    def log_probs(self, model: Any) -> Tensor:
        """Normalised log-probabilities of the candidates, [P, C], on the model's device."""
        logits = logits_at(model, self.input_ids, self.attention_mask, self.positions, self.token_type_ids)
        picked: Tensor = logits[self.row_in_batch, self.slot].float()
        if self.candidates is not None:
            picked = (
                picked.double().gather(1, self.candidates.clamp_min(0)).masked_fill(self.candidates < 0, float("-inf"))
            )
        return torch.log_softmax(picked, dim=-1)


def _entropy(log_probs_PC: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(log_probs_PC.exp()).sum(-1)
    return entropy
