"""PEFT's own adapters trained as our trainer trains ours: the same start, rows of a step, schedule, clipping and loss.

Non-Bayesian comparators of the methods benchmark (LoRA+, DoRA, AdaLoRA), and the loop that PEFT's MonteCLoRA is trained with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import get_scheduler

from credence.adapters.sampling import NoiseSource
from credence.training.data import DataFormat, read_data
from credence.training.modeling import context_length, load_base, load_tokenizer
from credence.training.predict import Predictor, Scores, score
from credence.training.prompts import Encoder, Example, collate, label_space
from credence.training.release import TEMPERATURES, nll_by_temperature
from credence.training.session import pad_token
from credence.training.summary import summarise
from credence.training.trainer import RowOrder, target_nll

STEPS, BATCH, RATE, WARMUP, MAX_GRAD_NORM = 400, 16, 1e-2, 20, 1.0
TEMPLATE = "Text: {text}\nLabel:"
TARGETS = ["q_proj", "v_proj"]

ZERO_ROW = 1e-6
"""Entries of a row of the base model that was zero, for DoRA."""

Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparator:
    """One non-Bayesian adapter of PEFT, r = 8 and alpha = 16 on q and v.

    Attributes:
        ratio: of ``lora+``, learning rate of B over that of A.
    """

    adapter: Literal["lora+", "dora", "adalora"]
    learning_rate: float = RATE
    ratio: float = 1.0

    def __str__(self) -> str:
        ratio = f", ratio {self.ratio:g}" if self.adapter == "lora+" else ""
        return f"learning rate {self.learning_rate:g}{ratio}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The files of one run, encoded."""

    parts: dict[str, list[Example]]
    pad_token: int

    @classmethod
    def read(cls, base: Path, files: dict[str, Path]) -> "Rows":
        """Encodes label rows with the labels of part ``train``; those of part ``ood`` are not known to it."""
        tokenizer, data = load_tokenizer(base), {part: read_data(path) for part, path in files.items()}
        space = label_space(tokenizer, data["train"].labels, TEMPLATE)
        length = context_length(load_base(base, "float32"))
        encoder = Encoder(tokenizer, DataFormat.LABEL, space=space, max_length=length)
        parts = {part: encoder.encode(file, answers=part != "ood") for part, file in data.items()}
        return cls(parts=parts, pad_token=pad_token(tokenizer))


def start_as_ours(model: Any, seed: int) -> None:
    """Gives every A the start that our trainer gives it."""
    source = NoiseSource(seed, 0, "init")
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                A = module.lora_A["default"].weight
                uniform = source.uniform(name.removeprefix("base_model.model."), "A", tuple(A.shape))
                A.copy_((2 * uniform - 1) / A.shape[1] ** 0.5)


def train_peft(
    model: Any,
    examples: Sequence[Example],
    pad: int,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    regulariser: Callable[[], Tensor] | None = None,
    loss: Loss | None = None,
    after_step: Callable[[int], None] | None = None,
    steps: int = STEPS,
) -> None:
    """Trains what is trainable of ``model``.

    Args:
        optimizer: AdamW at ``RATE`` without weight decay by default.
        loss: of a batch; the NLL per target token by default. ``regulariser`` is added to it.
        after_step: called with the number of steps taken, before the gradients are emptied.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, WARMUP, steps)
    order, step, epoch = RowOrder(len(examples), (seed,)), 0, 0
    model.train()
    while step < steps:
        order.set_epoch(epoch)
        indices = [index for (index,) in order]
        for start in range(0, len(indices), BATCH):
            batch = collate([examples[index] for index in indices[start : start + BATCH]], pad)
            if loss is None:
                nll, count = target_nll(model, batch)
                value = nll.sum() / count.sum()
            else:
                value = loss(batch)
            if regulariser is not None:
                value = value + regulariser()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            step += 1
            if after_step is not None:
                after_step(step)
            optimizer.zero_grad()
            if step == steps:
                break
        epoch += 1
    model.eval()


def train_comparator(base: Path, rows: Rows, comparator: Comparator, seed: int, steps: int = STEPS) -> Any:
    """Trains one comparator and returns the model."""
    torch.manual_seed(seed)
    examples, rate = rows.parts["train"], comparator.learning_rate
    if comparator.adapter == "adalora":
        # The pruning schedule scales with the run as in the paper: a tenth to warm up, a half for the last ranks.
        config = AdaLoraConfig(
            init_r=12,
            target_r=8,
            lora_alpha=16,
            tinit=steps // 10,
            tfinal=steps // 2,
            deltaT=10,
            total_step=steps,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(load_base(base, "float32"), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)

        def loss(batch: dict[str, Tensor]) -> Tensor:
            # AdaLoRA adds its orthogonality term only to a loss that the model itself computes.
            value: Tensor = model(**batch).loss
            return value

        train_peft(
            model,
            examples,
            rows.pad_token,
            seed,
            optimizer=optimizer,
            loss=loss,
            after_step=lambda step: model.base_model.update_and_allocate(step),
            steps=steps,
        )
        return model
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=comparator.adapter == "dora"
    )
    plain = load_base(base, "float32")
    if comparator.adapter == "dora":
        lift_zero_rows(plain)
    model = get_peft_model(plain, lora)
    start_as_ours(model, seed)
    if comparator.adapter == "lora+":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=comparator.ratio, weight_decay=0.0
        )
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    train_peft(model, examples, rows.pad_token, seed, optimizer=optimizer, steps=steps)
    return model


def lift_zero_rows(model: Any) -> None:
    """Makes rows of zeros in the adapted weights 1e-6: DoRA divides by the norm of each row.

    stories260K has such rows, the outputs of attention heads that only fill its shape up, and PEFT's first step makes everything NaN.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                module.weight[(module.weight == 0).all(1)] = ZERO_ROW


def fit_temperature(model: Any, rows: Rows, batch_size: int) -> tuple[float, float]:
    """The temperature with the smallest validation NLL, and that NLL (nats)."""
    predictor = Predictor(model, [], rows.pad_token, batch_size)
    nll = nll_by_temperature(predictor, rows.parts["validation"], [{}], [1], TEMPERATURES)[1]
    best = min(range(len(nll)), key=nll.__getitem__)
    return TEMPERATURES[best], nll[best]


def evaluate_model(model: Any, rows: Rows, temperature: float, batch_size: int) -> list[dict[str, Any]]:
    """The metrics of the test and out-of-scope rows at temperature 1 and at ``temperature``."""
    predictor = Predictor(model, [], rows.pad_token, batch_size)
    results = []
    for value in (1.0, temperature):
        test, ood = (
            Scores.concatenate([score(found, value) for found in predictor.predict(rows.parts[part], [{}], [1])])
            for part in ("test", "ood")
        )
        results.append({"k": 0, "tau": 0.0, "temperature": value, **summarise(test, ood)})
    return results
