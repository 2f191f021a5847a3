"""Watching a training run: evaluations on held-out rows, early stopping, and TensorBoard.

An evaluation leaves training as it was, bit for bit: A and B are put back as the very tensors they were, and so are the modes of the
modules and the state of torch's generators; the noise of the samples is a function of their index alone.

What was measured lies in the trainer's log history, which a checkpoint holds. Early stopping is a function of that history, so it has no
state of its own. The best step's adapter, method and optimiser lie in ``best-<step>`` beside the checkpoints.
"""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from credence.adapters.artifact import num_distinct_samples
from credence.adapters.files import replacing_folder
from credence.adapters.posterior import draw
from credence.adapters.sampling import NoiseSource
from credence.training.checkpoint import load_adapter, load_method, save_adapter, save_method
from credence.training.config import Section, TrainSettings
from credence.training.distributed import Processes
from credence.training.errors import CheckpointError, ConfigError, TrainingError
from credence.training.methods import Ensemble, Method, Swa
from credence.training.methods.base import factor_parameters
from credence.training.methods.ensemble import EnsembleSettings
from credence.training.modeling import LoraSite
from credence.training.predict import Factors, Predictor, log_likelihood
from credence.training.prompts import Example
from credence.training.release import evenly_spaced
from credence.training.trainer import BayesianTrainer

EVALUATION = "evaluation"
OPTIMIZER_FILE = "optimizer.pt"
SEED = 0
"""Of the samples: those that the release fits tau on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One measurement on the validation rows.

    Attributes:
        step: optimiser steps taken.
        k: number of samples averaged, 0 for the mean.
        tau: posterior temperature, 0 for the mean.
        nll: mean negative log-likelihood, nats a row (free text: a token), at temperature 1.
        accuracy: share of rows (tokens) whose most likely answer is the right one.
    """

    step: int
    k: int
    tau: float
    nll: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """Where early stopping is.

    Attributes:
        best_step, best_nll: of the best evaluation so far; None before the first one.
        stopped_at: the step at which it ended the run; None if it has not.
    """

    best_step: int | None = None
    best_nll: float | None = None
    stopped_at: int | None = None


def check_settings(settings: TrainSettings, chosen: type[Method], method: Section, *, has_validation: bool) -> None:
    """Refuses settings of ``train`` that the data or the method do not allow.

    Args:
        chosen, method: the method's class and its settings.

    Raises:
        ConfigError: names the key.
    """
    for key in ("early_stopping", "eval_samples"):
        if getattr(settings, key) and not settings.eval_steps:
            raise ConfigError(
                f"train.{key} is {getattr(settings, key)} and train.eval_steps 0, so nothing is evaluated; set train.eval_steps to 1 or "
                f"more, or leave train.{key} out",
                key=f"train.{key}",
            )
    if settings.eval_steps and not has_validation:
        raise ConfigError(
            f"train.eval_steps is {settings.eval_steps} and there are no validation rows; give a validation file, or leave "
            "train.eval_steps out",
            key="train.eval_steps",
        )
    if settings.eval_samples and not issubclass(chosen, Ensemble):
        if chosen.fit_posterior is not Method.fit_posterior:
            raise ConfigError(
                f"train.eval_samples is {settings.eval_samples}; {chosen.name} makes its posterior after the last step, so that during "
                "training there is the mean alone: leave train.eval_samples at 0",
                key="train.eval_samples",
            )
        kind: object = chosen.kind
        if kind == "point":
            raise ConfigError(
                f"train.eval_samples is {settings.eval_samples}; {chosen.name} has no posterior to draw from: leave "
                "train.eval_samples at 0",
                key="train.eval_samples",
            )
    if settings.early_stopping:
        _check_early_stopping(settings, chosen, method)
    if settings.tensorboard is not None:
        _summary_writer()


def _check_early_stopping(settings: TrainSettings, chosen: type[Method], method: Section) -> None:
    # They average iterates of steps that the length of the run decides: a run that ends early collects fewer or none, and the state of
    # the best step is an average that was not finished.
    averages = issubclass(chosen, Swa)
    if isinstance(method, EnsembleSettings):
        averages = method.source == "checkpoints" or method.member in ("swa", "swag")
    if averages:
        raise ConfigError(
            f"train.early_stopping is {settings.early_stopping}; this {chosen.name} is made of the iterates of the last part of a run of "
            "known length, which stopping early, or keeping an earlier step, would cut off: leave it at 0 and set train.max_steps",
            key="train.early_stopping",
        )
    if settings.max_steps is not None and settings.max_steps < settings.eval_steps:
        raise _nothing_evaluated(settings, settings.max_steps)


def _nothing_evaluated(settings: TrainSettings, steps: int) -> ConfigError:
    return ConfigError(
        f"train.eval_steps is {settings.eval_steps} and the run has {steps} steps, so early stopping has nothing to choose from; lower "
        "train.eval_steps",
        key="train.eval_steps",
    )


@contextmanager
def undisturbed(model: Any, sites: Sequence[LoraSite]) -> Iterator[None]:
    """Lets the block overwrite A and B of the sites, and afterwards puts back those tensors, the modules' modes and torch's generators."""
    parameters = factor_parameters(sites)
    kept = [parameter.data for parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data.clone()
            yield
        finally:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data
            for module, mode in modes:
                module.training = mode


def measure(
    predictor: Predictor,
    examples: Sequence[Example],
    draws: Sequence[Factors],
) -> tuple[float, float]:
    """NLL (nats a position, temperature 1) and accuracy of the average over all ``draws``; the predictor's A and B are overwritten."""
    total, correct, count = 0.0, 0, 0
    for prediction in predictor.predict(examples, draws, [len(draws)]):
        total -= float(log_likelihood(prediction).sum())
        correct += int((prediction.log_mean_PC.argmax(-1) == prediction.target).sum())
        count += len(prediction.row)
    return total / count, correct / count


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations in a trainer's log history."""
    return [Evaluation(**entry[EVALUATION]) for entry in history if EVALUATION in entry]


def stopping(found: Sequence[Evaluation], patience: int) -> Stopping:
    """Follows the NLL of the mean until ``patience`` evaluations in a row have brought no new best.

    Equal is not better: of equal evaluations the earliest is the best.
    """
    state, since = Stopping(), 0
    for entry in found:
        if entry.k:
            continue
        if state.best_nll is None or entry.nll < state.best_nll:
            state, since = Stopping(best_step=entry.step, best_nll=entry.nll), 0
            continue
        since += 1
        if since >= patience:
            return Stopping(best_step=state.best_step, best_nll=state.best_nll, stopped_at=entry.step)
    return state


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Evaluates the adapter every ``train.eval_steps`` optimiser steps, and stops the run if that was asked for.

    It must be called after the method was told that the step is done. Of several processes the first one evaluates and all learn the
    result.

    Args:
        predictor: on the model under training.
        examples: the validation rows; ``train.eval_rows`` of them are used.
        folder: of the checkpoints.
    """

    def __init__(
        self,
        *,
        method: Method,
        predictor: Predictor,
        examples: Sequence[Example],
        settings: TrainSettings,
        folder: Path,
        processes: Processes,
    ) -> None:
        self.method = method
        self.predictor = predictor
        self.examples = evenly_spaced(examples, settings.eval_rows)
        self.settings = settings
        self.folder = folder
        self.processes = processes
        has_log = settings.tensorboard is not None and processes.is_first
        self.log = TensorBoardLog(settings.tensorboard) if has_log else None  # type: ignore[arg-type]

    def callbacks(self) -> list[TrainerCallback]:
        """Those to add to the trainer, in this order; none if nothing is watched."""
        return [*([self] if self.settings.eval_steps else []), *([self.log] if self.log is not None else [])]

    def close(self) -> None:
        """Closes TensorBoard's files, also after an exception."""
        if self.log is not None:
            self.log.close()

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses early stopping in a run that ends before its first evaluation."""
        if self.settings.early_stopping and state.max_steps < self.settings.eval_steps:
            raise _nothing_evaluated(self.settings, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates if it is time, keeps a new best, and stops the run when none has come for long enough."""
        step = state.global_step
        if step % self.settings.eval_steps:
            return
        found = self.processes.on_first(lambda: self._evaluate(step))
        state.log_history.extend({"step": step, EVALUATION: asdict(entry)} for entry in found)
        if self.processes.is_first:
            _show(found, state.max_steps)
        if not self.settings.early_stopping:
            return
        now = self._stopping(state)
        if now.best_step == step and self.processes.is_first:
            with replacing_folder(self._best(step), replace=True) as folder:
                save_adapter(kwargs["model"], folder)
                save_method(self.method, folder)
                torch.save(kwargs["optimizer"].state_dict(), folder / OPTIMIZER_FILE)
            self._remove_superseded(state)
        if now.stopped_at is not None:
            control.should_training_stop = True
            control.should_save = bool(self.settings.save_steps)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes the adapters that no checkpoint needs any more."""
        if self.settings.early_stopping and self.processes.is_first:
            self._remove_superseded(state)

    def restore_stopped(self, trainer: BayesianTrainer, checkpoint: Path) -> bool:
        """Takes over the log of a run that early stopping had ended; False if it had not. The adapter is :meth:`restore_best`'s."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not self.settings.early_stopping or self._stopping(state).stopped_at is None:
            return False
        trainer.state = state
        return True

    def restore_best(self, trainer: BayesianTrainer) -> None:
        """Restores parameters, method and optimiser of the best step, if early stopping is on.

        Raises:
            CheckpointError: they are not there.
        """
        best = self._stopping(trainer.state).best_step if self.settings.early_stopping else None
        if best is None or best == trainer.state.global_step:
            return
        folder = self._best(best)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is missing; it holds the adapter of the best step: delete {folder.parent} to start again"
            )
        load_adapter(trainer.model, folder)
        load_method(self.method, folder)
        state = torch.load(
            folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True
        )  # loading moves it to the parameters
        trainer.create_optimizer().load_state_dict(state)

    def metrics(self, state: Any) -> dict[str, Any]:
        """The part of metrics.json's ``train``: ``evaluations``, and with early stopping ``stopped_at``, ``best_step`` and ``best_nll``."""
        if not self.settings.eval_steps:
            return {}
        return {
            "evaluations": [asdict(entry) for entry in evaluations(state.log_history)],
            **(asdict(self._stopping(state)) if self.settings.early_stopping else {}),
        }

    def _evaluate(self, step: int) -> list[Evaluation]:
        of_members = isinstance(self.method, Ensemble)
        k = self.settings.eval_samples or (self.method.settings.members if of_members else 0)
        mean, posteriors = self.method.current(posterior=k > 0)
        draws: dict[tuple[int, float], list[Factors]] = {(0, 0.0): [mean]}
        if posteriors is not None:
            distinct = num_distinct_samples(posteriors)
            k = k if distinct is None else min(k, distinct)
            tau = self.settings.eval_tau
            draws[k, tau] = [
                {name: draw(posteriors[name], factors, source, name, tau) for name, factors in mean.items()}
                for source in (NoiseSource(SEED, index) for index in range(k))
            ]
        found = []
        head = self.method.head.holding(self.method.final_head())
        with undisturbed(self.predictor.model, self.predictor.sites), head:
            for (number, tau), samples in draws.items():
                nll, accuracy = measure(self.predictor, self.examples, samples)
                found.append(Evaluation(step=step, k=number, tau=tau, nll=nll, accuracy=accuracy))
                if not abs(nll) < float("inf"):
                    raise TrainingError(
                        f"the validation NLL is {nll} at optimiser step {step} ({_name(found[-1])}): lower train.learning_rate, or use "
                        "train.dtype=float32"
                    )
        return found

    def _stopping(self, state: Any) -> Stopping:
        return stopping(evaluations(state.log_history), self.settings.early_stopping)

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step}"

    def _remove_superseded(self, state: Any) -> None:
        """Keeps the best adapter as of now and as of every checkpoint, from which the run may have to go on."""
        found = evaluations(state.log_history)
        steps = [state.global_step, *(_step_of(path) for path in self.folder.glob("checkpoint-*"))]
        needed = {
            stopping([entry for entry in found if entry.step <= step], self.settings.early_stopping).best_step
            for step in steps
        }
        for path in self.folder.glob("best-*"):
            if _step_of(path) not in needed:
                shutil.rmtree(path, ignore_errors=True)


class TensorBoardLog(TrainerCallback):  # type: ignore[misc]
    """Writes losses, learning rate and evaluations for TensorBoard. It must be called after the monitor.

    Args:
        folder: of the event files; a resumed run takes back what it had written after its checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the event file."""
        purge_step = state.global_step + 1 if state.global_step else None
        self.writer = _summary_writer()(self.folder, purge_step=purge_step)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Writes the loss, the learning rate and the gradient's norm."""
        for key in ("loss", "learning_rate", "grad_norm"):
            if "loss" in (logs or {}) and key in logs:
                self.writer.add_scalar(f"train/{key}", float(logs[key]), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes this step's evaluations: ``validation/nll``, and ``validation/nll_k8`` for the average of 8 samples."""
        recent = [entry for entry in state.log_history[-2:] if entry.get("step") == state.global_step]
        for entry in evaluations(recent):
            suffix = f"_k{entry.k}" if entry.k else ""
            self.writer.add_scalar(f"validation/nll{suffix}", entry.nll, entry.step)
            self.writer.add_scalar(f"validation/accuracy{suffix}", entry.accuracy, entry.step)

    def close(self) -> None:
        """Writes out what is left."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"train.tensorboard is set and TensorBoard cannot be imported ({error}); install it (pip install tensorboard), or leave "
            "train.tensorboard out",
            key="train.tensorboard",
        ) from None
    return SummaryWriter


def _show(found: Sequence[Evaluation], max_steps: int) -> None:
    parts = [f"{_name(entry)} NLL {entry.nll:.4f}, accuracy {entry.accuracy:.3f}" for entry in found]
    print(f"step {found[0].step}/{max_steps}  validation: {'; '.join(parts)}", file=sys.stderr, flush=True)


def _name(entry: Evaluation) -> str:
    return f"K = {entry.k}, tau {entry.tau:g}:" if entry.k else "mean:"


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
