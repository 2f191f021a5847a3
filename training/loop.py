"""Trains an adapter and writes its artifact."""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments, set_seed

from credence.adapters.artifact import CLASSIFIER_TASK, write_artifact
from credence.adapters.config import BaseModelRef, Calibration, PosteriorConfig
from credence.training.card import model_card
from credence.training.checkpoint import checkpoint_folder, prepare_folder
from credence.training.classifier import Head, check_padding, load_model
from credence.training.config import DEFAULT_TEMPLATE, Section, TrainConfig
from credence.training.data import DataFile, DataFormat, read_data
from credence.training.distributed import Processes, joined_processes
from credence.training.errors import ConfigError, DataError
from credence.training.init import read_start
from credence.training.methods import METHODS, Ensemble, Method, Plan, TrainingRows, method_class, method_settings
from credence.training.modeling import (
    add_lora,
    base_reference,
    context_length,
    initialise,
    load_tokenizer,
    set_factors,
)
from credence.training.monitor import Monitor, check_settings
from credence.training.predict import Predictor
from credence.training.prompts import Encoder, Example, LabelSpace, class_space, label_space
from credence.training.release import ReleaseResult, fit_and_check, held_out_rows
from credence.training.run_config import run_config
from credence.training.session import pad_token
from credence.training.trainer import BayesianTrainer, JointRows, ProgressReport, collate_share, logged_losses

KEPT_CHECKPOINTS = 2
DEFAULT_EPOCHS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run produced.

    Attributes:
        digest, path: of the artifact.
        seconds: wall-clock time of the training steps of this call, without loading and release.
        metrics: what metrics.json holds.
    """

    digest: str
    path: Path
    seconds: float
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    train: DataFile
    examples: list[Example]
    validation: DataFile | None
    held_out: list[Example]
    space: LabelSpace | None


def train(
    base: str | Path,
    data: str | Path,
    validation: str | Path | None,
    method: str,
    output: str | Path,
    config: TrainConfig | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Trains one adapter and writes it, released if there is validation data, as an artifact at ``output``.

    The same arguments give the same artifact, byte for byte, on the same machine and versions, also when the run is interrupted
    after a checkpoint and resumed. Until the artifact is complete nothing appears at ``output``; checkpoints lie beside it.

    Started n times by torchrun, the n processes train together: a step has n times ``train.batch_size`` rows. All of them return the
    result of process 0, which alone writes.

    Args:
        base: folder or hub id of the base model.
        validation: held-out rows for tau and calibration; None leaves the artifact unreleased.
        method: one of ``credence.training.methods.METHODS``.
        resume: continue from the last checkpoint, if there is one.
        progress: progress bar on standard error; plain lines otherwise.
        callbacks: more callbacks of transformers' Trainer.

    Raises:
        TrainingError: with the reason (ConfigError, DataError, ModelError, CheckpointError).
        ArtifactError: the adapter to start from is refused.
    """
    with joined_processes() as processes:
        return _train(
            base,
            data,
            validation,
            method,
            output,
            config,
            seed,
            resume,
            progress,
            callbacks=callbacks,
            processes=processes,
        )


def _train(
    base: str | Path,
    data: str | Path,
    validation: str | Path | None,
    method: str,
    output: str | Path,
    config: TrainConfig | None,
    seed: int,
    resume: bool,
    progress: bool,
    *,
    callbacks: Sequence[TrainerCallback],
    processes: Processes,
) -> TrainResult:
    config = config or TrainConfig()
    output = Path(output)
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; 0 or more is allowed", key="seed")
    chosen = method_class(method)
    settings = method_settings(method, config.method)
    _check_steps(chosen, config)
    check_settings(config.train, chosen, settings, has_validation=validation is not None)
    start = read_start(config.lora.init) if config.lora.init is not None else None
    tokenizer = load_tokenizer(base)
    set_seed(seed)
    train_file = read_data(data)
    num_classes = len(train_file.labels) or None
    model, head = load_model(base, config.train.dtype, config.train.quantization, num_classes=num_classes)
    check_head(head, chosen, config)
    if head.parameters:
        check_padding(model, tokenizer)
    reference = base_reference(base, model)
    if start is not None:
        config = config.model_copy(update={"lora": start.settings(config.lora, model)})
    context = context_length(model)
    loaded = _load_data(tokenizer, train_file, validation, config, context, by_head=bool(head.parameters))
    run = {
        "base_model": reference.model_dump(),
        "method": method,
        "seed": seed,
        "config": {
            **config.model_dump(mode="json", exclude={"train": {"tensorboard"}}),
            "method": settings.model_dump(mode="json"),
        },
        "init": start.record() if start else None,
        "rows": {"format": str(loaded.train.format), **(loaded.space.record() if loaded.space else {})},
        "data": _file_record(loaded.train),
        "validation": _file_record(loaded.validation) if loaded.validation else None,
        **({"processes": processes.count} if processes.count > 1 else {}),
    }
    checkpoint = processes.on_first(lambda: prepare_folder(output, run, resume=resume))
    peft_model, sites = add_lora(model, config.lora, head.modules)
    initialise(sites, seed)
    if start is not None:
        set_factors(sites, start.factors)
    trained: Method = chosen(settings, sites)
    trained.head = head
    head.start(seed, trains=trained.trains_head)
    if start is not None:
        start.load_head(head, train_file.labels, trains=trained.trains_head and config.train.max_steps != 0)
    monitor = Monitor(
        method=trained,
        predictor=Predictor(peft_model, sites, pad_token(tokenizer)),
        examples=loaded.held_out,
        settings=config.train,
        folder=checkpoint_folder(output),
        processes=processes,
    )
    trainer, seconds = _optimise(
        peft_model,
        trained,
        chosen,
        loaded,
        config,
        seed,
        output,
        checkpoint,
        pad_token(tokenizer),
        progress,
        callbacks,
        processes,
        monitor,
    )
    trainer.check_equal()
    if not processes.is_first:
        return processes.result(None)
    monitor.restore_best(trainer)
    head.load(trained.final_head())
    trained.fit_posterior(
        TrainingRows(
            model=peft_model,
            sites=sites,
            examples=loaded.examples,
            pad_token=pad_token(tokenizer),
            batch_size=config.train.batch_size,
            seed=seed,
        )
    )
    mean, posteriors = trained.mean(), trained.posteriors()
    scaling, rank = config.lora.alpha / config.lora.r, next(iter(mean.values())).rank
    alpha = config.lora.alpha * rank / config.lora.r
    released: ReleaseResult | None = None
    if loaded.held_out:
        predictor = Predictor(peft_model, sites, pad_token(tokenizer))
        released = fit_and_check(
            predictor, loaded.held_out, mean, posteriors, config.release, scaling=scaling, tokenizer=tokenizer, say=_say
        )
    metrics: dict[str, Any] = {
        "train": {
            "steps": trainer.state.global_step,
            "curve": logged_losses(trainer.state.log_history),
            **monitor.metrics(trainer.state),
        },
        **({"release": released.metrics()} if released else {}),
    }
    artifact_config = PosteriorConfig(
        **trained.posterior_fields(),
        method=method,
        credence_version=version("credence"),
        base_model=reference,
        rank=rank,
        lora_alpha=alpha,
        target_modules=tuple(sorted({name.rpartition(".")[2] for name in mean})),
        tau=released.tau if released else {},
        training=_training_record(run, loaded, settings),
    )
    versions = {**artifact_config.training["versions"], "credence": artifact_config.credence_version}
    calibration = released.calibration if released else Calibration()
    digest = write_artifact(
        output,
        adapter_config={
            **_adapter_config(peft_model, reference),
            "r": rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        },
        mean=mean,
        posteriors=posteriors,
        config=artifact_config,
        calibration=calibration if released else None,
        metrics=metrics,
        card=lambda sizes: model_card(artifact_config, calibration, metrics, sizes),
        run_config=run_config(config, chosen, settings, run, versions, epochs=DEFAULT_EPOCHS, context=context),
        head=head.tensors(),
        replace=True,  # an empty folder may be there; prepare_folder refused anything else
    )
    shutil.rmtree(checkpoint_folder(output), ignore_errors=True)
    return processes.result(TrainResult(digest=digest, path=output, seconds=seconds, metrics=metrics))


def _load_data(
    tokenizer: Any,
    train_file: DataFile,
    validation: str | Path | None,
    config: TrainConfig,
    context: int,
    *,
    by_head: bool,
) -> _Data:
    max_length = config.train.max_length or context
    if max_length > context:
        raise ConfigError(
            f"train.max_length is {max_length}; the base model takes {context} tokens", key="train.max_length"
        )
    space = None
    if train_file.format is DataFormat.LABEL:
        if len(train_file.labels) < 2:
            raise DataError(
                f"has one label only ({train_file.labels[0]!r}); two or more are needed", file=train_file.path
            )
        space = (
            class_space(train_file.labels, has_pairs=train_file.has_pairs)
            if by_head
            else label_space(tokenizer, train_file.labels, config.data.template)
        )
    encoder = Encoder(tokenizer, train_file.format, space=space, max_length=max_length)
    examples = encoder.encode(train_file)
    validation_file, held_out = None, []
    if validation is not None:
        validation_file = read_data(validation, expected=train_file.format)
        held_out = encoder.encode(validation_file, rows=held_out_rows(validation_file, config.release.max_rows))
    return _Data(train=train_file, examples=examples, validation=validation_file, held_out=held_out, space=space)


def _optimise(
    model: Any,
    method: Method,
    chosen: type[Method],
    data: _Data,
    config: TrainConfig,
    seed: int,
    output: Path,
    checkpoint: Path | None,
    pad: int,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
    processes: Processes,
    monitor: Monitor,
) -> tuple[BayesianTrainer, float]:
    options, defaults = config.train, chosen.defaults_for(method.settings)
    max_grad_norm = defaults.max_grad_norm if options.max_grad_norm is None else options.max_grad_norm
    if defaults.max_grad_norm == 0 and max_grad_norm > 0:
        raise ConfigError(
            f"train.max_grad_norm is {max_grad_norm:g}; {chosen.name} takes 0 only: it clips its own update (method.clip_radius)",
            key="train.max_grad_norm",
        )
    learning_rate = defaults.learning_rate if options.learning_rate is None else options.learning_rate
    args = TrainingArguments(
        output_dir=str(checkpoint_folder(output)),
        max_steps=options.max_steps or -1,
        num_train_epochs=options.epochs or DEFAULT_EPOCHS,
        per_device_train_batch_size=options.batch_size * processes.count,  # the collator takes this process's share
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=options.lr_scheduler or defaults.lr_scheduler,
        warmup_steps=options.warmup_ratio,
        max_grad_norm=max_grad_norm if method.num_members == 1 else 0.0,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 1,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    args._n_gpu = min(args.n_gpu, 1)  # several devices would be wrapped in DataParallel, which copies the sites
    report = ProgressReport(bar=progress)
    trainer = BayesianTrainer(
        method=method,
        noise_seed=seed,
        learning_rate=learning_rate,
        head_learning_rate=options.head_learning_rate or defaults.head_learning_rate,
        weight_decay=defaults.weight_decay if options.weight_decay is None else options.weight_decay,
        model=model,
        args=args,
        train_dataset=JointRows(data.examples),
        data_collator=lambda items: collate_share(items, pad, processes, options.batch_size),
        callbacks=[*([report] if processes.is_first else []), *callbacks],
        processes=processes,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for watcher in monitor.callbacks():
        trainer.add_callback(watcher)
    batches_per_epoch = math.ceil(len(data.examples) / (options.batch_size * processes.count))
    steps_per_epoch = math.ceil(batches_per_epoch / options.gradient_accumulation)
    num_steps = options.max_steps or math.ceil((options.epochs or DEFAULT_EPOCHS) * steps_per_epoch)
    method.begin_training(
        Plan(
            num_steps=num_steps,
            steps_per_epoch=steps_per_epoch,
            num_rows=len(data.examples),
            seed=seed,
            max_grad_norm=max_grad_norm,
            from_init=config.lora.init is not None,
        )
    )
    if not processes.is_first:
        torch.manual_seed(seed + processes.rank)  # dropout; the noise of the methods has its own source
    started = time.perf_counter()
    if options.max_steps == 0:
        return trainer, 0.0
    try:
        ended = checkpoint is not None and (
            monitor.restore_stopped(trainer, checkpoint) or trainer.restore_finished(checkpoint)
        )
        if not ended:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        report.close()
        monitor.close()
    return trainer, time.perf_counter() - started


def check_head(head: Head, chosen: type[Method], config: TrainConfig) -> None:
    """Refuses what does not go together with a classification head, or with its absence.

    Raises:
        ConfigError: ``key`` names it.
    """
    if not head.parameters:
        if config.train.head_learning_rate is not None:
            raise ConfigError(
                f"train.head_learning_rate is {config.train.head_learning_rate:g} and the base model is a causal language model, which has "
                "no classification head; leave it out",
                key="train.head_learning_rate",
            )
        return
    if chosen is Ensemble:
        raise ConfigError(
            "the base model is an encoder and the method ensemble; every member would need a classification head of its own, and an "
            "artifact holds one: choose another method",
            key="method",
        )
    if config.data.template != DEFAULT_TEMPLATE:
        raise ConfigError(
            f"data.template is {config.data.template!r} and the base model is an encoder, which reads text and text_b as they are; leave "
            "the template out",
            key="data.template",
        )


def _check_steps(chosen: type[Method], config: TrainConfig) -> None:
    if config.train.max_steps != 0:
        return
    if chosen.needs_steps:
        able = ", ".join(name for name, other in METHODS.items() if not other.needs_steps) or "none"
        raise ConfigError(
            f"train.max_steps is 0; {chosen.name} is trained by steps, give 1 or more (methods that can do without: {able})",
            key="train.max_steps",
        )
    if config.lora.init is None:
        raise ConfigError(
            f"train.max_steps is 0 and lora.init is not set, so there is no adapter for {chosen.name} to work on; set lora.init to an "
            "artifact or a PEFT LoRA folder, or train.max_steps to 1 or more",
            key="lora.init",
        )


def _training_record(run: dict[str, Any], data: _Data, settings: Section) -> dict[str, Any]:
    return {
        **run["rows"],
        "seed": run["seed"],
        "config": run["config"],
        **({"processes": run["processes"]} if "processes" in run else {}),
        **({"init": run["init"]} if run["init"] else {}),
        "data": run["data"],
        "validation": {**run["validation"], "rows": len(data.held_out)} if run["validation"] else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _file_record(data: DataFile) -> dict[str, Any]:
    return {"file": data.path.name, "sha256": data.sha256, "rows": len(data.rows)}


def _adapter_config(peft_model: Any, reference: BaseModelRef) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON; it names the base model as the artifact does (never a path of this machine)."""
    document: dict[str, Any] = {}
    for key, value in peft_model.peft_config["default"].to_dict().items():
        if isinstance(value, set):
            value = sorted(value)
        document[key] = value.value if isinstance(value, Enum) else value
    document.update(base_model_name_or_path=reference.name, revision=reference.revision, inference_mode=True)
    if document["task_type"] is None:
        document["task_type"] = CLASSIFIER_TASK
    return document


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
