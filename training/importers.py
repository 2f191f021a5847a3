"""Adapters from elsewhere become artifacts. What a format's reader does not understand it refuses by name.

A format is one reader in ``FORMATS``. Three of them convert what is stored: ``peft`` with method ``map``, ``peft-monteclora`` and
``ivon-checkpoint`` need neither the base model nor data. ``peft`` with another method makes a posterior around the given adapter, by a
training run of no steps that starts from it (``lora.init``), and needs both.
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from credence.adapters.artifact import config_of_rank, load_artifact, write_artifact
from credence.adapters.config import BaseModelRef, Calibration, MemberPosterior, PosteriorConfig
from credence.adapters.errors import PosteriorError
from credence.adapters.files import (
    MANIFEST,
    MEAN_CONFIG,
    MEAN_TENSORS,
    json_object,
    read_file,
    refused,
    replacing_folder,
)
from credence.adapters.kinds import (
    DiagPosterior,
    EnsemblePosterior,
    Member,
    PointPosterior,
    RowPosterior,
)
from credence.adapters.peft_folder import (
    DEFAULT_MAX_BYTES,
    PEFT_PREFIX,
    check_finite,
    check_peft_config,
    factors_of,
    parse_tensors,
    read_peft_folder,
)
from credence.adapters.posterior import LoraFactors, Posterior
from credence.training.card import model_card
from credence.training.checkpoint import ADAPTER_FILE, RUN_FILE
from credence.training.config import TrainConfig
from credence.training.data import DataFormat, read_data
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.modeling import ADAPTER, is_encoder, load_tokenizer
from credence.training.prompts import label_space
from credence.training.release import release

DEFAULT_METHOD = "tfb"
LABEL_KEYS = ("labels", "label_texts", "label_tokens", "template")
OPTIMIZER_FILE = "optimizer.pt"
SAMPLER = ".lora_monteclora_sampler."
SAMPLER_TENSORS = {"std_prior": "rho", "expert_weights_prior": "beta"}
LAST_DRAW = ("gaussian_var_prior", "expert_weights")
# Of PEFT's MontecloraConfig only num_samples and sample_scaler say how a sample is drawn.
SAMPLER_SETTINGS = frozenset(
    {"num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size"}
)
PEFT_FLOOR = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRequest:
    """What to import, and what it is to become.

    Attributes:
        source: folder of the adapter.
        others: of format ``ensemble``, the folders of the other members.
        base: folder or hub id of the base model; needed by methods that run it, and to release.
        data: rows of the adapter's task, anchors of the posterior; they also tell the format and labels.
        validation: held-out rows: release the artifact.
        method: of format ``peft``; None is ``tfb`` there. The other formats know theirs.
    """

    source: Path
    output: Path
    base: str | None = None
    data: Path | None = None
    validation: Path | None = None
    method: str | None = None
    config: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    others: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """An adapter that was read, ready to be written as an artifact."""

    adapter_config: dict[str, Any]
    mean: dict[str, LoraFactors]
    posteriors: dict[str, Posterior]
    kind: str
    method: str
    settings: dict[str, float]
    base_model: BaseModelRef | None
    training: dict[str, Any]
    member: MemberPosterior | None = None
    mean_kind: Literal["exact", "first member"] = "exact"


def import_adapter(request: ImportRequest, format: str) -> str:
    """Reads ``request.source`` and writes its artifact; ``request.output`` appears complete or not at all.

    Args:
        format: one of ``FORMATS``.

    Returns:
        The digest, ``sha256:<64 hex>``.

    Raises:
        ConfigError: the format is unknown, or an argument is missing or does not belong to it (``key`` names it).
        ArtifactError: the source is not understood, or the output exists.
        TrainingError: with the reason, where the base model or data are used.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; allowed: {', '.join(FORMATS)}", key="format")
    if request.others and format != "ensemble":
        raise ConfigError(f"{1 + len(request.others)} adapters were given; format {format} takes one", key="source")
    return FORMATS[format](request)


def _import_peft(request: ImportRequest) -> str:
    method = request.method or DEFAULT_METHOD
    content = read_peft_folder(request.source)
    path = request.source / MEAN_CONFIG
    if content.config.get("monteclora_config") is not None:
        raise refused(
            f"{path}: monteclora_config is set; import this adapter with the format peft-monteclora",
            "unsupported",
            path,
        )
    check_peft_config(content.config, path)
    if method == "map":
        mean = factors_of(content.tensors, content.config["r"], request.source / MEAN_TENSORS)
        return _write(
            request,
            _Contents(
                adapter_config=content.config,
                mean=mean,
                posteriors={name: PointPosterior() for name in mean},
                kind=PointPosterior.kind,
                method="map",
                settings={},
                base_model=_named_base(content.config),
                training={"imported": _origin("peft", request.source, content.digest)},
            ),
        )
    if request.base is None or request.data is None:
        lacking = "--base" if request.base is None else "--data"
        raise ConfigError(
            f"{method} makes a posterior around the adapter with its base model and some rows of its task, and {lacking} is missing; "
            "give it, or use --method map to store the adapter without a posterior",
            key="base" if request.base is None else "data",
        )
    for key in ("max_steps", "epochs"):
        if key in request.config.train.model_fields_set:
            raise ConfigError(
                f"train.{key} is set and an import takes no steps; to train on from this adapter use `credence train` with lora.init",
                key=f"train.{key}",
            )
    config = request.config.model_copy(
        update={
            "train": request.config.train.model_copy(update={"max_steps": 0}),
            "lora": request.config.lora.model_copy(update={"init": str(request.source)}),
        }
    )
    return train(request.base, request.data, request.validation, method, request.output, config, request.seed).digest


def _import_peft_monteclora(request: ImportRequest) -> str:
    _only_method(request, "monteclora")
    content = read_peft_folder(request.source)
    path, tensors_path = request.source / MEAN_CONFIG, request.source / MEAN_TENSORS
    sampler = content.config.get("monteclora_config")
    if not isinstance(sampler, dict):
        raise refused(
            f"{path}: monteclora_config is {sampler!r}, so this is not a MonteCLoRA adapter; use the format peft",
            "unsupported",
            path,
        )
    unknown = sorted(set(sampler) - SAMPLER_SETTINGS)
    if unknown:
        raise refused(
            f"{path}: monteclora_config.{unknown[0]} is a setting that is not understood here", "unsupported", path
        )
    scaler, components = sampler.get("sample_scaler"), sampler.get("num_samples")
    if not isinstance(scaler, int | float) or not math.isfinite(scaler) or scaler <= 0:
        raise refused(
            f"{path}: monteclora_config.sample_scaler is {scaler!r}, a number above 0 is needed", "malformed", path
        )
    config = {**content.config, "monteclora_config": None}
    check_peft_config(config, path)
    plain, parameters = _split_sampler(content.tensors, tensors_path)
    mean = factors_of(plain, config["r"], tensors_path)
    if set(parameters) != set(mean):
        lost = sorted(set(parameters) ^ set(mean))[0]
        raise refused(f"{tensors_path}: {lost} has a LoRA or a sampler, not both", "wrong_shape", tensors_path)
    settings = {"epsilon": float(scaler), "dof": float(config["r"]), "floor": PEFT_FLOOR}
    posteriors: dict[str, Posterior] = {}
    for name, own in parameters.items():
        if set(own) != {"rho", "beta"} or tuple(own["beta"].shape) != (components,):
            raise refused(
                f"{tensors_path}: the sampler of {name} needs std_prior [r] and expert_weights_prior [num_samples = {components}], got "
                + ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(own.items())),
                "wrong_shape",
                tensors_path,
            )
        posterior = RowPosterior.from_tensors(own, settings)
        try:
            posterior.check(name, mean[name])
        except PosteriorError as error:
            raise refused(f"{tensors_path}: {error}", error.reason, tensors_path) from None
        posteriors[name] = posterior
    return _write(
        request,
        _Contents(
            adapter_config=config,
            mean=mean,
            posteriors=posteriors,
            kind=RowPosterior.kind,
            method="monteclora",
            settings=settings,
            base_model=_named_base(config),
            training={
                "imported": {**_origin("peft-monteclora", request.source, content.digest), "monteclora_config": sampler}
            },
        ),
    )


def _split_sampler(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The plain factors, and each module's variational parameters; what is only the last draw is dropped."""
    plain: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, found, parameter = name.partition(SAMPLER)
        if not found:
            plain[name] = tensor
        elif parameter in SAMPLER_TENSORS:
            parameters.setdefault(module.removeprefix(PEFT_PREFIX), {})[SAMPLER_TENSORS[parameter]] = tensor
        elif parameter not in LAST_DRAW:
            raise refused(
                f"{path}: {name} is no tensor of a MonteCLoRA sampler that is understood here", "unsupported", path
            )
    return plain, parameters


def _import_ivon_checkpoint(request: ImportRequest) -> str:
    """The state of an unfinished IVON run: m from the adapter's file, h and the settings from the optimiser's."""
    _only_method(request, "ivon")
    folder = request.source
    needs = (
        f"a checkpoint of a run is a folder checkpoint-N with {ADAPTER_FILE} and {OPTIMIZER_FILE}, beside {RUN_FILE}"
    )
    run_bytes = read_file(folder.resolve().parent / RUN_FILE, DEFAULT_MAX_BYTES, needs)
    adapter_bytes = read_file(folder / ADAPTER_FILE, DEFAULT_MAX_BYTES, needs)
    optimizer_bytes = read_file(folder / OPTIMIZER_FILE, DEFAULT_MAX_BYTES, needs)
    run = json_object(run_bytes, folder.resolve().parent / RUN_FILE, strict=False)
    if run.get("method") != "ivon":
        raise refused(
            f"{folder} is a checkpoint of method {run.get('method')!r}; this format reads those of ivon",
            "unsupported",
            folder,
        )
    try:
        lora, base_model, rows = run["config"]["lora"], BaseModelRef(**run["base_model"]), run["rows"]
        rank, alpha, targets = lora["r"], lora["alpha"], lora["target_modules"]
    except (KeyError, TypeError, ValueError) as error:
        raise refused(
            f"{folder.parent / RUN_FILE} is not a run's description: {error!r}", "malformed", folder
        ) from None
    if rows.get("by_head"):
        raise refused(
            f"{folder} is a checkpoint of an encoder with a classification head, which is not imported; finish the run with --resume",
            "unsupported",
            folder,
        )
    tensors = parse_tensors(adapter_bytes, folder / ADAPTER_FILE)
    check_finite(tensors, folder / ADAPTER_FILE)
    mean = factors_of(
        {name.replace(f".{ADAPTER}.weight", ".weight"): tensor for name, tensor in tensors.items()},
        rank,
        folder / ADAPTER_FILE,
    )
    log_sds = _ivon_log_sds(optimizer_bytes, mean, folder / OPTIMIZER_FILE)
    posteriors: dict[str, Posterior] = {
        name: DiagPosterior(log_sd_A=log_sds[name, "A"], log_sd_B=log_sds[name, "B"]) for name in mean
    }
    step = folder.resolve().name.rpartition("-")[2]
    origin = {
        **_origin("ivon-checkpoint", folder, None),
        "step": int(step) if step.isdecimal() else None,
    }
    return _write(
        request,
        _Contents(
            adapter_config={
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": rank,
                "lora_alpha": alpha,
                "lora_dropout": lora["dropout"],
                "target_modules": targets,
                "bias": "none",
            },
            mean=mean,
            posteriors=posteriors,
            kind=DiagPosterior.kind,
            method="ivon",
            settings={},
            base_model=base_model,
            training={
                **rows,
                "seed": run.get("seed"),
                "config": run["config"],
                "data": run.get("data"),
                "validation": None,
                "imported": origin,
            },
        ),
    )


def _ivon_log_sds(data: bytes, mean: Mapping[str, LoraFactors], path: Path) -> dict[tuple[str, str], Tensor]:
    """-1/2 ln(lambda (h + delta)) by module and factor; the optimiser holds A and B of the modules in the order of their names."""
    try:
        document = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        (group,) = document["param_groups"]
        ess, decay = float(group["ess"]), float(group["weight_decay"])
        hessians = [document["state"][index]["hess"] for index in group["params"]]
    except Exception as error:
        raise refused(f"{path} is not the state of an IVON optimiser: {error}", "malformed", path) from None
    keys = [(module, side) for module in sorted(mean) for side in ("A", "B")]
    if len(hessians) != len(keys):
        raise refused(
            f"{path} has the state of {len(hessians)} parameters, the adapter has {len(keys)}", "wrong_shape", path
        )
    result = {}
    for (module, side), hess in zip(keys, hessians, strict=True):
        factor = getattr(mean[module], side)
        if hess.shape != factor.shape:
            raise refused(
                f"{path}: the Hessian of lora_{side} of {module} has shape {tuple(hess.shape)}, the factor {tuple(factor.shape)}",
                "wrong_shape",
                path,
            )
        precision = ess * (hess + decay)
        if not bool((torch.isfinite(precision) & (precision > 0)).all()):
            raise refused(
                f"{path}: the posterior precision of lora_{side} of {module} is not positive and finite everywhere",
                "not_finite",
                path,
            )
        result[module, side] = -0.5 * precision.log()
    return result


def _import_ensemble(request: ImportRequest) -> str:
    """Artifacts (with their posteriors, all of one kind) or plain PEFT LoRAs of one base model, as members of equal weight."""
    _only_method(request, "ensemble")
    folders = (request.source, *request.others)
    if len(folders) < 2:
        raise ConfigError("an ensemble has 2 or more members; give several SRC", key="source")
    members = [_read_member(folder) for folder in folders]
    first = members[0]
    rank = max(next(iter(member.mean.values())).rank for member in members)
    scaling = first.adapter_config["lora_alpha"] / first.adapter_config["r"]
    by_module: dict[str, list[Member]] = {name: [] for name in first.mean}
    for folder, member in zip(folders, members, strict=True):
        _check_member(folder, member, first, rank)
        own = member.adapter_config["lora_alpha"] / member.adapter_config["r"]
        for name, factors in member.mean.items():
            widened = _widened(factors, rank, own / scaling)
            by_module[name].append(Member(mean=widened, posterior=member.posteriors[name]))
    posteriors: dict[str, Posterior] = {name: EnsemblePosterior(members=tuple(own)) for name, own in by_module.items()}
    mean = {name: own[0].mean for name, own in by_module.items()}
    return _write(
        request,
        _Contents(
            adapter_config=config_of_rank(first.adapter_config, mean),
            mean=mean,
            posteriors=posteriors,
            kind=EnsemblePosterior.kind,
            method="ensemble",
            settings={},
            base_model=first.base_model,
            training={
                **{key: first.training[key] for key in ("format", *LABEL_KEYS) if key in first.training},
                "imported": {"format": "ensemble", "members": [member.training["origin"] for member in members]},
            },
            member=None if first.kind == "point" else MemberPosterior(kind=first.kind, settings=first.settings),  # type: ignore[arg-type]
            mean_kind="first member",
        ),
    )


def _read_member(folder: Path) -> _Contents:
    if (folder / MANIFEST).exists():
        artifact = load_artifact(folder)
        if artifact.head:
            raise refused(
                f"{folder} has a classification head of its own; an ensemble has one base model without heads",
                "unsupported",
                folder,
            )
        if artifact.config.kind == "ensemble":
            raise refused(f"{folder} is an ensemble; give its members", "unsupported", folder)
        config = artifact.config
        return _Contents(
            adapter_config=artifact.adapter_config,
            mean=artifact.mean,
            posteriors=artifact.posteriors,
            kind=config.kind,
            method=config.method,
            settings=config.settings,
            base_model=config.base_model,
            training={**config.training, "origin": {"folder": folder.resolve().name, "digest": artifact.digest}},
        )
    content = read_peft_folder(folder)
    check_peft_config(content.config, folder / MEAN_CONFIG)
    mean = factors_of(content.tensors, content.config["r"], folder / MEAN_TENSORS)
    return _Contents(
        adapter_config=content.config,
        mean=mean,
        posteriors={name: PointPosterior() for name in mean},
        kind=PointPosterior.kind,
        method="map",
        settings={},
        base_model=_named_base(content.config),
        training={"origin": {"folder": folder.resolve().name, "digest": content.digest}},
    )


def _check_member(folder: Path, member: _Contents, first: _Contents, rank: int) -> None:
    """Raises ArtifactError unless the member adapts the first one's modules, under its labels, with a posterior of its kind."""
    shapes, expected = (
        {name: (pair.A.shape[1], pair.B.shape[0]) for name, pair in one.mean.items()} for one in (member, first)
    )
    if shapes != expected:
        odd = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
        raise refused(
            f"{folder} and the first member differ in {len(odd)} modules, e.g. {odd[0]}: members adapt the same modules of one base model",
            "wrong_shape",
            folder,
        )
    if (member.kind, member.settings) != (first.kind, first.settings):
        raise refused(
            f"{folder} has a posterior of kind {member.kind} with settings {member.settings}, the first member {first.kind} with "
            f"{first.settings}; members carry posteriors of one kind and setting, or none",
            "unsupported",
            folder,
        )
    if member.kind != "point" and next(iter(member.mean.values())).rank != rank:
        raise refused(
            f"{folder} has another rank than the widest member, {rank}; members with posteriors have one rank",
            "unsupported",
            folder,
        )
    if member.kind != "point" and member.adapter_config["lora_alpha"] != first.adapter_config["lora_alpha"]:
        raise refused(
            f"{folder} has lora_alpha {member.adapter_config['lora_alpha']}, the first member "
            f"{first.adapter_config['lora_alpha']}; members with posteriors have one scale",
            "unsupported",
            folder,
        )
    for key in ("format", *LABEL_KEYS):
        if member.training.get(key) != first.training.get(key):
            raise refused(
                f"{folder} was trained with {key} {member.training.get(key)!r}, the first member with {first.training.get(key)!r}",
                "unsupported",
                folder,
            )


def _widened(factors: LoraFactors, rank: int, scale: float) -> LoraFactors:
    """The same product times ``scale``, padded with zeros to ``rank``."""
    extra = rank - factors.rank
    A = torch.nn.functional.pad(factors.A, (0, 0, 0, extra)) if extra else factors.A
    B = torch.nn.functional.pad(factors.B, (0, extra)) if extra else factors.B
    return LoraFactors(A=A, B=B if scale == 1 else B * scale)


def _write(request: ImportRequest, contents: _Contents) -> str:
    """Writes the artifact, released if there are held-out rows."""
    base_model = contents.base_model
    if request.base is not None:
        folder = Path(request.base)
        base_model = BaseModelRef(name=folder.resolve().name if folder.is_dir() else request.base)
    if base_model is None:
        raise ConfigError(
            f"{request.source} does not say which base model it belongs to; give it with --base", key="base"
        )
    training = dict(contents.training)
    if request.data is not None:
        training |= _rows_record(request)
    if request.validation is not None:
        if request.base is None:
            raise ConfigError("--validation releases the artifact, which needs the base model: give --base", key="base")
        if "format" not in training:
            raise ConfigError(
                "--validation releases the artifact, which needs the format and labels of the task: give rows of it with --data",
                key="data",
            )
    targets = tuple(sorted({name.rpartition(".")[2] for name in contents.mean}))
    rank = next(iter(contents.mean.values())).rank
    config = PosteriorConfig(
        kind=contents.kind,  # type: ignore[arg-type]
        method=contents.method,
        credence_version=version("credence"),
        base_model=base_model,
        rank=rank,
        lora_alpha=float(contents.adapter_config["lora_alpha"]),
        target_modules=targets,
        settings=contents.settings,
        member=contents.member,
        mean=contents.mean_kind,
        training=training,
    )
    adapter_config = {
        **contents.adapter_config,
        "base_model_name_or_path": base_model.name,
        "revision": base_model.revision,
        "inference_mode": True,
    }
    with replacing_folder(request.output, replace=False) as folder:
        digest = write_artifact(
            folder,
            adapter_config=adapter_config,
            mean=contents.mean,
            posteriors=contents.posteriors,
            config=config,
            card=lambda sizes: model_card(config, Calibration(), {}, sizes),
        )
        if request.validation is not None:
            assert request.base is not None
            digest = release(folder, request.base, request.validation, request.config.release).digest
    return digest


def _rows_record(request: ImportRequest) -> dict[str, Any]:
    """Format and labels of the task, as training would have recorded them."""
    if request.base is None:
        raise ConfigError("--data needs the base model's tokenizer: give --base", key="base")
    assert request.data is not None
    if is_encoder(request.base):
        raise ConfigError(
            f"{request.base} is an encoder, and the adapter has no classification head; adapters of causal language models are imported",
            key="base",
        )
    data = read_data(request.data)
    record: dict[str, Any] = {"format": str(data.format)}
    if data.format is DataFormat.LABEL:
        record |= label_space(load_tokenizer(request.base), data.labels, request.config.data.template).record()
    return record


def _only_method(request: ImportRequest, name: str) -> None:
    if request.method not in (None, name):
        raise ConfigError(
            f"--method is {request.method}, and this format holds a posterior of method {name} already; leave --method out",
            key="method",
        )


def _named_base(config: Mapping[str, Any]) -> BaseModelRef | None:
    """The base model a PEFT configuration names: a hub id as it is, of a path the last part only."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    revision = config.get("revision")
    path = PurePosixPath(name.replace("\\", "/"))
    if name.startswith((".", "~", "/")) or len(path.parts) > 2:
        return BaseModelRef(name=path.name)
    return BaseModelRef(name=name, revision=revision if isinstance(revision, str) else None)


def _origin(format: str, source: Path, digest: str | None) -> dict[str, Any]:
    return {"format": format, "folder": source.resolve().name, **({"digest": digest} if digest else {})}


FORMATS: dict[str, Callable[[ImportRequest], str]] = {
    "peft": _import_peft,
    "peft-monteclora": _import_peft_monteclora,
    "ivon-checkpoint": _import_ivon_checkpoint,
    "ensemble": _import_ensemble,
}
"""Reader of each format: writes the artifact and returns its digest."""

__all__ = ["FORMATS", "ImportRequest", "import_adapter"]
