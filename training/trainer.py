"""transformers' Trainer with a noise draw per optimiser step, our loss, and checkpoints of the adapter only."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import DistributedType
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from credence.adapters.sampling import NoiseSource
from credence.training.checkpoint import load_adapter, load_method, save_adapter, save_method
from credence.training.distributed import Processes, separate, tensors_in
from credence.training.errors import TrainingError
from credence.training.methods.base import Method
from credence.training.methods.ensemble import JointOptimizer
from credence.training.modeling import logits_at
from credence.training.prompts import IGNORED, Example, collate

LENGTH_GROUPS = 5
SMALLEST_GROUP = 16
"""Most groups of a joint batch, and the fewest rows that a group is worth a pass for."""


class BayesianTrainer(Trainer):  # type: ignore[misc]
    """Trains an adapter with one method.

    The noise of an optimiser step depends on (seed, step) only, is drawn before its first micro-batch and holds for all of them,
    so accumulation and a resumed run see the same noise.

    Args:
        method: the training method; it owns the noise, the regulariser and the optimiser.
        head_learning_rate: of AdamW on the method's classification head, if it has one; None is ``learning_rate``.
        processes: those that share the batches. The batch size given to TrainingArguments is that of all together.
    """

    def __init__(
        self,
        *,
        method: Method,
        noise_seed: int,
        learning_rate: float,
        weight_decay: float,
        head_learning_rate: float | None = None,
        processes: Processes | None = None,
        **kwargs: Any,
    ) -> None:
        self.method = method
        self.processes = processes or Processes()
        self.noise_seed = noise_seed
        self._method_options = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        self._head_options = {"lr": head_learning_rate or learning_rate, "weight_decay": weight_decay}
        self._noise_step: int | None = None
        super().__init__(**kwargs)
        self.add_callback(_StepEnd(method))
        # compute_loss divides by the number of target tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def create_accelerator_and_postprocess(self) -> None:
        """Keeps accelerate from wrapping the model and from sharing out the batches of several processes."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.distributed_type != DistributedType.NO:
            separate(self.accelerator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The method's own optimiser, and beside it AdamW for a classification head."""
        optimizer: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if optimizer is None:
            optimizer = self.method.optimizer(**self._method_options)
            if self.method.head.parameters and self.method.trains_head:
                optimizer = with_head(optimizer, list(self.method.head.parameters.values()), self._head_options)
            self.optimizer = optimizer
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> "RowOrder":
        """Every member has an order of its own."""
        assert self.train_dataset is not None
        seeds = range(self.noise_seed, self.noise_seed + self.method.num_members)
        return RowOrder(len(self.train_dataset), tuple(seeds))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Takes the micro-batches of one optimiser step and counts each member's target tokens in all processes, [M]."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        members = self.method.num_members
        own: Any = sum((batch["labels"][:, 1:] != IGNORED).view(members, -1).sum(1) for batch in batches)
        return batches, self.processes.total(own) if batches else own

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of one micro-batch, under the noise of its optimiser step."""
        step = self.state.global_step
        if self._noise_step != step:
            self.method.begin_step(NoiseSource(self.noise_seed, step, "train"))
            self._noise_step = step
            rows = self.args.per_device_train_batch_size // self.processes.count
            self.processes.place_signs(self.method.sites, rows)
        if bool((inputs["labels"][:, 1:] != IGNORED).any()):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = torch.zeros((), device=self.args.device)  # a short batch left this process no rows
        loss = self.processes.total(loss) / self.method.num_members  # what is shown; the gradients are there already
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {float(loss)} at optimiser step {step + 1}: lower train.learning_rate, or use train.dtype=float32"
            )
        if self.accelerator.sync_gradients:
            groups = self.create_optimizer().param_groups
            self.processes.add_gradients([parameter for group in groups for parameter in group["params"]])
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Share of one micro-batch in NLL per target token + regulariser; the shares of an optimiser step add up to it.

        Of several members it is the sum over the members, none of which has a parameter of another.
        """
        members = self.method.num_members
        # Flipout's signs belong to a row's place in the batch, so the rows stay where they are.
        has_signs = any(member.row_signs is not None for site in self.method.sites for member in site.members)
        parts = [inputs] if has_signs else by_length(inputs, members)
        shares = [target_nll(model, part, members) for part in parts]
        nll_M, count_M = (
            torch.stack([nll for nll, _ in shares]).sum(0),
            torch.stack([count for _, count in shares]).sum(0),
        )
        total_M = count_M if num_items_in_batch is None else num_items_in_batch.to(nll_M.device)
        loss = (nll_M / total_M).sum()
        regulariser = self.method.regulariser()
        if regulariser is not None:
            loss = loss + (regulariser * (count_M / total_M)).sum()
        return (loss, {}) if return_outputs else loss

    def check_equal(self) -> None:
        """Compares parameters, optimiser and the method's state between the processes."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {
            "parameters": trained,
            "optimizer": self.create_optimizer().state_dict(),
            "method": self.method.state(),
        }
        self.processes.check_equal(tensors_in(state))

    def restore_finished(self, checkpoint: Path) -> bool:
        """Restores a run that had taken its last step when it stopped; False if there are steps left.

        Trainer itself would take one step too many from such a checkpoint.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        optimizer = self.create_optimizer()
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True))
        return True

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, folder)
        save_method(self.method, folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state, which makes a checkpoint complete, follows when every process has written its generators.
        self.processes.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, Path(resume_from_checkpoint))
        load_method(self.method, Path(resume_from_checkpoint))


def with_head(
    optimizer: torch.optim.Optimizer, head: Sequence[nn.Parameter], options: dict[str, float]
) -> JointOptimizer:
    """The method's optimiser and AdamW over the head as one; gradients are clipped by the trainer, both together."""
    parts = [optimizer, torch.optim.AdamW(head, **options)]  # type: ignore[arg-type]
    parameters = [[p for group in part.param_groups for p in group["params"]] for part in parts]
    return JointOptimizer(parts, parameters, max_grad_norm=0.0)


class _StepEnd(TrainerCallback):  # type: ignore[misc]
    """Tells the method that a step is done, before a checkpoint of it is written."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes the number of the step on."""
        self.method.end_step(state.global_step)


def target_nll(model: nn.Module, inputs: dict[str, Tensor], num_members: int = 1) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of the target tokens over the full vocabulary (nats), and their number, both [M].

    Args:
        num_members: M; the batch holds the members' rows one after the other, as many for each.
    """
    labels = inputs["labels"]
    targets = labels[:, 1:]
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)
    logits = logits_at(
        model, inputs["input_ids"], inputs["attention_mask"], positions, inputs.get("token_type_ids")
    ).float()
    kept = targets[:, positions]
    loss = F.cross_entropy(logits.flatten(0, 1), kept.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view(num_members, -1).sum(1), (kept != IGNORED).view(num_members, -1).sum(1)


def by_length(inputs: dict[str, Tensor], num_members: int) -> list[dict[str, Tensor]]:
    """Splits a batch of M > 1 members into groups of rows of similar length, each padded to its own longest row.

    A joint batch is as wide as the longest row of all members: of 5 members with 16 rows of 37 tokens on average, 6 times the tokens of
    one member's batch, in 4 groups 4 times. Every group holds equally many rows of every member, one member after the other; a single
    member's batch stays whole, so that it trains as it always did.
    """
    rows = inputs["labels"].shape[0] // num_members
    groups = min(LENGTH_GROUPS, rows, num_members * rows // SMALLEST_GROUP) if num_members > 1 else 1
    if groups < 2:
        return [inputs]
    lengths = inputs["attention_mask"].sum(1)
    first = torch.arange(num_members, device=lengths.device)[:, None] * rows
    order = lengths.view(num_members, rows).argsort(dim=1, stable=True) + first
    parts = []
    for chosen in order.tensor_split(groups, dim=1):
        indices = chosen.reshape(-1)
        width = int(lengths[indices].max())
        parts.append({name: tensor[indices, :width] for name, tensor in inputs.items()})
    return parts


class JointRows(Dataset[tuple[Example, ...]]):
    """Rows by tuples of indices: one row for every member."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: tuple[int, ...]) -> tuple[Example, ...]:
        return tuple(self.examples[index] for index in indices)


def collate_members(items: Sequence[tuple[Example, ...]], pad_token: int) -> dict[str, Tensor]:
    """Pads a batch of B items to B rows of the first member, then B of the second, and so on."""
    return collate([row for rows in zip(*items, strict=True) for row in rows], pad_token)


def collate_share(
    items: Sequence[tuple[Example, ...]], pad_token: int, processes: Processes, size: int
) -> dict[str, Tensor]:
    """Collates this process's ``size`` items of a batch of all processes; where none is left, one row without targets."""
    own = processes.share(items, size)
    batch = collate_members(own or items[:1], pad_token)
    if not own:
        batch["labels"].fill_(IGNORED)
    return batch


class RowOrder(Sampler[tuple[int, ...]]):
    """An order of all rows for every epoch and member, each a pure function of (seed, epoch).

    Args:
        count: number of rows.
        seeds: one for each member.
    """

    def __init__(self, count: int, seeds: Sequence[int]) -> None:
        self.count = count
        self.seeds = seeds
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        orders = [NoiseSource(seed, self.epoch, "init").permutation("rows", self.count) for seed in self.seeds]
        yield from zip(*orders, strict=True)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """A progress bar on standard error, or one plain line per logged step."""

    def __init__(self, *, bar: bool) -> None:
        self.use_bar = bar
        self.bar: Progress | None = None
        self.task: Any = None
        self.started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock and the bar."""
        self.started = time.perf_counter()
        if self.use_bar:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if not logs or "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.update(self.task, description=f"loss {float(logs['loss']):.4f}")
        else:
            seconds = time.perf_counter() - self.started
            print(
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}  "
                f"learning rate {float(logs['learning_rate']):.3g}  {seconds:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also after an exception."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def logged_losses(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The training curve from the trainer's log history."""
    return [{"step": float(entry["step"]), "loss": float(entry["loss"])} for entry in history if "loss" in entry]
