"""The slow reference: posterior samples as PEFT adapters in transformers, averaged one forward pass at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Step:
    """Scores of one generated token, nats."""

    token: int
    total: float
    aleatoric: float
    epistemic: float
    log_prob: float
    calibrated: float
    """Log-probability of the token after the temperature, ln (p^(1/T) / sum p^(1/T))."""
    top: float
    """Log-probability of the average's most likely token."""


class Reference:
    """A base model with sample folders loaded beside it."""

    def __init__(self, base: Path, samples: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        names = list(samples)
        self.model: Any = PeftModel.from_pretrained(model, samples[names[0]], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(samples[name], adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def greedy(
        self, prompt: list[int], num_tokens: int, names: list[str | None], temperature: float = 1.0
    ) -> list[Step]:
        """Greedy decoding of the average of ``names`` (None: the bare base model), in float64 after the logits.

        PEFT's mixed batches give each row its own adapter.
        """
        rows = [name or "__base__" for name in names]
        ids, cache, steps = list(prompt), None, []
        for _ in range(num_tokens):
            output = self.model(
                torch.tensor([ids] * len(rows)), adapter_names=rows, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            members = torch.softmax(output.logits[:, -1].double(), -1)
            token = int(members.mean(0).argmax())
            steps.append(_step(members, token, temperature))
            ids = [token]
        return steps

    @torch.no_grad()
    def log_probs(self, ids: list[int], names: list[str]) -> torch.Tensor:
        """[K, T, V] float64 log-probabilities after each of the T tokens under each adapter: one pass over the whole text."""
        output = self.model(torch.tensor([ids] * len(names)), adapter_names=names)
        return torch.log_softmax(output.logits.double(), -1)

    def read(self, prompt: list[int], text: list[int], names: list[str]) -> list[Step]:
        """Teacher forcing: scores of a given text after a prompt."""
        members = self.log_probs(prompt + text[:-1], names)[:, len(prompt) - 1 :].exp()
        return [_step(members[:, step], token, 1.0) for step, token in enumerate(text)]

    def choose(
        self, prompt: list[int], num_tokens: int, names: list[str], choose: Callable[[torch.Tensor, list[int]], int]
    ) -> list[Step]:
        """Decoding with a rule of one's own: ``choose(average [V], tokens so far)``."""
        output: list[int] = []
        steps = []
        for _ in range(num_tokens):
            members = self.log_probs(prompt + output, names)[:, -1].exp()
            token = choose(members.mean(0), output)
            steps.append(_step(members, token, 1.0))
            output.append(token)
        return steps


def _step(members: torch.Tensor, token: int, temperature: float) -> Step:
    """Scores by the definitions: p = mean_k p_k, total H[p], aleatoric mean_k H[p_k]."""
    average = members.mean(0)
    total = float(torch.special.entr(average).sum())
    aleatoric = float(torch.special.entr(members).sum(-1).mean())
    tempered = average ** (1 / temperature)
    calibrated = float((tempered[token] / tempered.sum()).log())
    return Step(
        token, total, aleatoric, total - aleatoric, float(average[token].log()), calibrated, float(average.max().log())
    )
