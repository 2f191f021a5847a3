"""The artifact: a folder with a mean adapter any PEFT tool loads, and its posterior beside it (format version 1).

    adapter_config.json, adapter_model.safetensors   the mean, plain PEFT LoRA, float32
    posterior.json, posterior.safetensors            kind, method, settings, noise convention, fitted tau; the parameters
    head.safetensors                                 of an encoder (task_type SEQ_CLS): its classification head, float32, without noise
    calibration.json, metrics.json, README.md        optional: temperatures by K, measured numbers, model card
    config.yaml                                      optional: every setting of the run that made it, under comments
    manifest.json                                    size and SHA-256 of every file above, dtype and shape of every tensor
    signature.json                                   optional: of manifest.json's bytes (credence.adapters.signature)

The digest of an artifact is the SHA-256 of manifest.json. Reading verifies everything before anything is used: each file is read once,
hashed, and parsed from the very bytes that were hashed, so a file that changes underneath cannot slip through. With a ``store`` those bytes
are also laid down in a private folder named by the digest, and whoever needs a path later (vLLM's workers) gets that copy.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from credence.adapters.config import (
    BaseModelRef,
    Calibration,
    CurvePoint,
    FileEntry,
    Fit,
    Manifest,
    MemberPosterior,
    PosteriorConfig,
)
from credence.adapters.errors import ArtifactError, PosteriorError
from credence.adapters.files import (
    CALIBRATION,
    CARD,
    HEAD_TENSORS,
    MANIFEST,
    MEAN_CONFIG,
    MEAN_TENSORS,
    METRICS,
    POSTERIOR_CONFIG,
    POSTERIOR_TENSORS,
    RUN_CONFIG,
    json_object,
    lay_down,
    parse,
    read_listed,
    read_manifest,
    refused,
    replacing_folder,
)
from credence.adapters.kinds import KINDS, EnsemblePosterior, PointPosterior
from credence.adapters.kinds.ensemble import PREFIX as MEMBER_PREFIX
from credence.adapters.peft_folder import (
    DEFAULT_MAX_BYTES,
    PEFT_PREFIX,
    check_finite,
    check_peft_config,
    factors_of,
    parse_tensors,
)
from credence.adapters.posterior import LoraFactors, Posterior, check_tau, draw
from credence.adapters.sampling import NoiseSource

if TYPE_CHECKING:
    from credence.adapters.signature import TrustRoot

PARTIAL_KINDS = ("diag", "lowrank")
"""Kinds of which a module without tensors is deterministic if another one of the artifact has some (last-layer Laplace)."""

CLASSIFIER_TASK = "SEQ_CLS"
"""PEFT's task_type of an artifact with a classification head."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A verified artifact in memory.

    Attributes:
        path: folder it was read from, or its copy in the store.
        digest: ``sha256:<64 hex>``, identifies every byte of it.
        mean: factors by module (PEFT's module names without their prefix).
        posteriors: posterior by module; the same keys as ``mean``. Of some kinds a module may be deterministic, kind ``point``.
        run_config: text of config.yaml, the settings of the training run, if there is one; it is not parsed.
        head: of an encoder, the parameters of its classification head by their names in the model without PEFT; empty for others.
        signed_by: id of the trusted key that signed it; None if it was loaded without a trust root.
    """

    path: Path
    digest: str
    config: PosteriorConfig
    adapter_config: dict[str, Any]
    mean: dict[str, LoraFactors]
    posteriors: dict[str, Posterior]
    calibration: Calibration
    metrics: dict[str, Any]
    manifest: Manifest
    run_config: str | None = None
    head: dict[str, Tensor] = field(default_factory=dict)
    signed_by: str | None = None

    @property
    def has_posterior(self) -> bool:
        """Whether samples differ from the mean (false for kind ``point``)."""
        return self.config.kind != "point"

    @property
    def num_distinct_samples(self) -> int | None:
        """Number of samples after which they repeat: 1 for kind ``point``, M for an ensemble of M points; None if they never do."""
        return num_distinct_samples(self.posteriors)

    def draw(self, *, seed: int, index: int, tau: float) -> dict[str, LoraFactors]:
        """Draws sample ``index`` of ``seed``: float32 factors by module, a pure function of the arguments and the digest.

        The tensors are the caller's own, also those of factors without noise: changing them in place leaves the artifact as it is.

        Raises:
            PosteriorError: if tau is negative or not finite.
            ValueError: if seed or index is negative.
        """
        source = NoiseSource(seed, index)
        drawn = {}
        for name, mean in self.mean.items():
            factors = draw(self.posteriors[name], mean, source, name, tau)
            drawn[name] = LoraFactors(A=_own(factors.A, mean.A), B=_own(factors.B, mean.B))
        return drawn


def num_distinct_samples(posteriors: Mapping[str, Posterior]) -> int | None:
    """See :attr:`Artifact.num_distinct_samples`."""
    most = 1
    for posterior in posteriors.values():
        if isinstance(posterior, EnsemblePosterior) and not posterior.has_posteriors:
            most = max(most, len(posterior.members))
        elif posterior.kind != "point":
            return None
    return most


def config_of_rank(adapter_config: Mapping[str, Any], factors: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """PEFT's adapter_config.json for factors of another rank than the mean's: lora_alpha in proportion, so that lora_alpha / r stays.

    Args:
        adapter_config: that of the artifact's mean.
        factors: by module, all of one rank.

    Raises:
        ValueError: the factors have several ranks.
    """
    ranks = {pair.rank for pair in factors.values()}
    if len(ranks) != 1:
        raise ValueError(f"the factors of one adapter must have one rank, got {sorted(ranks)}")
    rank, r = ranks.pop(), adapter_config["r"]
    if rank == r:
        return dict(adapter_config)
    alpha = adapter_config["lora_alpha"] * rank / r
    return {**adapter_config, "r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


def load_artifact(
    path: str | Path,
    *,
    store: Path | None = None,
    trust: "TrustRoot | None" = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Artifact:
    """Reads and verifies an artifact.

    Args:
        store: private folder; the verified bytes are also written to ``store/<digest hex>`` and ``Artifact.path`` is that copy.
        trust: public keys, one of which must have signed the manifest. The signature is checked before anything else is read, on the very
            bytes whose hashes then decide about the other files.
        max_bytes: limit for all files together.

    Raises:
        ArtifactError: the folder is refused; ``reason`` says why, and nothing was kept.
    """
    folder = Path(path)
    manifest_bytes = read_manifest(folder, max_bytes)
    signed_by = None if trust is None else trust.check(folder, MANIFEST, manifest_bytes)
    contents, manifest = read_listed(folder, manifest_bytes, max_bytes)
    digest = hashlib.sha256(contents[MANIFEST]).hexdigest()
    config = parse(PosteriorConfig, contents[POSTERIOR_CONFIG], folder / POSTERIOR_CONFIG)
    adapter_config = json_object(contents[MEAN_CONFIG], folder / MEAN_CONFIG)
    check_peft_config(adapter_config, folder / MEAN_CONFIG)
    _check_agreement(adapter_config, config, folder / MEAN_CONFIG)
    calibration = Calibration()
    if CALIBRATION in contents:
        calibration = parse(Calibration, contents[CALIBRATION], folder / CALIBRATION)
    metrics = json_object(contents[METRICS], folder / METRICS) if METRICS in contents else {}
    mean_tensors = _tensors(contents[MEAN_TENSORS], manifest.files[MEAN_TENSORS], folder / MEAN_TENSORS)
    posterior_tensors = _tensors(
        contents[POSTERIOR_TENSORS], manifest.files[POSTERIOR_TENSORS], folder / POSTERIOR_TENSORS
    )
    mean = factors_of(mean_tensors, config.rank, folder / MEAN_TENSORS)
    _check_targets(adapter_config.get("target_modules"), mean, folder / MEAN_CONFIG)
    _check_targets(config.target_modules, mean, folder / POSTERIOR_CONFIG)
    posteriors = _posteriors(posterior_tensors, config, mean, folder / POSTERIOR_TENSORS)
    head = _head(contents, manifest, adapter_config, folder)
    if CARD in contents:
        _text(contents[CARD], folder / CARD)
    run_config = _text(contents[RUN_CONFIG], folder / RUN_CONFIG) if RUN_CONFIG in contents else None
    kept = folder
    if store is not None:
        kept = store / digest
        lay_down(kept, contents)
    return Artifact(
        path=kept,
        digest=f"sha256:{digest}",
        config=config,
        adapter_config=adapter_config,
        mean=mean,
        posteriors=posteriors,
        calibration=calibration,
        metrics=metrics,
        manifest=manifest,
        run_config=run_config,
        head=head,
        signed_by=signed_by,
    )


def write_artifact(
    path: str | Path,
    *,
    adapter_config: Mapping[str, Any],
    mean: Mapping[str, LoraFactors],
    posteriors: Mapping[str, Posterior],
    config: PosteriorConfig,
    calibration: Calibration | None = None,
    metrics: Mapping[str, Any] | None = None,
    card: str | Callable[[Mapping[str, int]], str] | None = None,
    run_config: str | None = None,
    head: Mapping[str, Tensor] | None = None,
    replace: bool = False,
) -> str:
    """Writes an artifact as one step: a failure leaves ``path`` as it was. What was written is read back and verified.

    Args:
        adapter_config: PEFT's LoraConfig as JSON.
        mean, posteriors: by module, equal keys; written as float32.
        card: text of the folder's README.md, or a function that writes it from the sizes of the other files (bytes, by name).
        run_config: text of config.yaml.
        head: an encoder's classification head; ``adapter_config`` then has task_type SEQ_CLS. Written as float32.
        replace: replace the artifact at ``path``; otherwise an existing non-empty path is refused.

    Returns:
        The digest, ``sha256:<64 hex>``.

    Raises:
        ArtifactError: what was given does not make a valid artifact, or ``path`` exists.
    """
    if set(mean) != set(posteriors):
        raise ArtifactError(
            f"the posterior covers {sorted(posteriors)}, the mean adapter {sorted(mean)}; they must be the same modules",
            reason="wrong_shape",
            path=path,
        )
    stored = {
        f"{module}.{name}": tensor
        for module, posterior in posteriors.items()
        for name, tensor in posterior.tensors().items()
    }
    contents = {
        MEAN_CONFIG: _dump_json(adapter_config),
        MEAN_TENSORS: dump_safetensors(peft_tensors(mean), metadata={"format": "pt"}),
        POSTERIOR_CONFIG: _dump_json(config.model_dump(mode="json")),
        POSTERIOR_TENSORS: dump_safetensors({name: _float32(tensor) for name, tensor in stored.items()}),
    }
    if head:
        contents[HEAD_TENSORS] = dump_safetensors({name: _float32(tensor) for name, tensor in head.items()})
    if calibration is not None:
        contents[CALIBRATION] = _dump_json(calibration.model_dump(mode="json"))
    if metrics is not None:
        contents[METRICS] = _dump_json(metrics)
    if run_config is not None:
        contents[RUN_CONFIG] = run_config.encode()
    if card is not None:
        text = card if isinstance(card, str) else card({name: len(data) for name, data in contents.items()})
        contents[CARD] = text.encode()
    manifest = Manifest(files={name: _entry(name, data) for name, data in contents.items()})
    contents[MANIFEST] = _dump_json(manifest.model_dump(mode="json"))
    with replacing_folder(Path(path), replace=replace) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        digest = load_artifact(folder).digest
    return digest


def write_sample(path: str | Path, artifact: Artifact, *, seed: int, index: int, tau: float) -> None:
    """Writes sample ``index`` as a plain PEFT LoRA folder: what the server serves as that sample.

    An encoder's folder also holds the classification head, as PEFT stores modules that were trained as a whole (modules_to_save).

    Raises:
        ArtifactError: if ``path`` exists and is not empty.
    """
    check_tau(tau)
    factors = artifact.draw(seed=seed, index=index, tau=tau)
    write_factors(path, config_of_rank(artifact.adapter_config, factors), factors, artifact.head)


def write_factors(
    path: str | Path,
    adapter_config: Mapping[str, Any],
    factors: Mapping[str, LoraFactors],
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes factors (float32) and their PEFT configuration as a plain LoRA folder.

    Args:
        head: a classification head, whose modules PEFT then loads in place of the base model's.

    Raises:
        ArtifactError: if ``path`` exists and is not empty.
    """
    tensors, config = peft_tensors(factors), dict(adapter_config)
    if head:
        tensors |= {f"{PEFT_PREFIX}{name}": _float32(tensor) for name, tensor in head.items()}
        config["modules_to_save"] = sorted({_saved_module(name) for name in head})
    with replacing_folder(Path(path), replace=False) as folder:
        (folder / MEAN_CONFIG).write_bytes(_dump_json(config))
        (folder / MEAN_TENSORS).write_bytes(dump_safetensors(tensors, metadata={"format": "pt"}))


def _saved_module(parameter: str) -> str:
    """Module of a head's parameter as PEFT saves it; these two it wraps as a whole whatever the configuration says."""
    top = parameter.partition(".")[0]
    return top if top in ("classifier", "score") else parameter.rpartition(".")[0]


def peft_tensors(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Factors under PEFT's tensor names: copies, float32 and contiguous."""
    tensors = {}
    for module, pair in factors.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = _float32(pair.A)
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = _float32(pair.B)
    return tensors


def _float32(tensor: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory.
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def _own(factor: Tensor, mean: Tensor) -> Tensor:
    return factor.clone() if factor is mean else factor


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise refused(f"{path} is not UTF-8 text: {error}", "malformed", path) from None


def _dump_json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _entry(name: str, data: bytes) -> FileEntry:
    tensors = {}
    if name.endswith(".safetensors"):
        for key, tensor in parse_safetensors(data).items():
            tensors[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=tensors)


def _check_agreement(adapter_config: Mapping[str, Any], config: PosteriorConfig, path: Path) -> None:
    for key, expected in (("r", config.rank), ("lora_alpha", config.lora_alpha)):
        if adapter_config.get(key) != expected:
            raise refused(
                f"{path}: {key} is {adapter_config.get(key)!r}, {POSTERIOR_CONFIG} says {expected!r}", "malformed", path
            )


def _check_targets(targets: object, mean: Mapping[str, LoraFactors], path: Path) -> None:
    """Raises ArtifactError if a list of target modules leaves out one that has factors: PEFT would load the adapter without it."""
    if isinstance(targets, str):  # a pattern, or all-linear
        return
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise refused(f"{path}: target_modules is {targets!r}, a list of names is needed", "malformed", path)
    for module in mean:
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise refused(
                f"{path}: target_modules {list(targets)} leaves out {module}, which has factors", "malformed", path
            )


def _tensors(data: bytes, entry: FileEntry, path: Path) -> dict[str, Tensor]:
    tensors = parse_tensors(data, path)
    found = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != entry.tensors:
        raise refused(f"{path} holds other tensors than its manifest entry describes", "malformed", path)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise refused(f"{path}: {name} is {tensor.dtype}, means and posteriors are float32", "unsupported", path)
    check_finite(tensors, path)
    return tensors


def _head(
    contents: Mapping[str, bytes], manifest: Manifest, adapter_config: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    """The classification head, which is there exactly if PEFT's configuration says that the adapter classifies."""
    path, task = folder / HEAD_TENSORS, adapter_config.get("task_type")
    if (HEAD_TENSORS in contents) != (task == CLASSIFIER_TASK):
        found = "there is a" if HEAD_TENSORS in contents else "there is no"
        raise refused(
            f"{folder}: {MEAN_CONFIG} has task_type {task!r} and {found} {HEAD_TENSORS}; adapters of task_type {CLASSIFIER_TASK} have a "
            "classification head, others have none",
            "malformed" if HEAD_TENSORS in contents else "missing",
            path,
        )
    if HEAD_TENSORS not in contents:
        return {}
    head = _tensors(contents[HEAD_TENSORS], manifest.files[HEAD_TENSORS], path)
    if not head:
        raise refused(f"{path} holds no tensor; a classification head has some", "malformed", path)
    return head


def _posteriors(
    tensors: Mapping[str, Tensor], config: PosteriorConfig, mean: Mapping[str, LoraFactors], path: Path
) -> dict[str, Posterior]:
    by_module: dict[str, dict[str, Tensor]] = {module: {} for module in mean}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module not in by_module:
            raise refused(f"{path}: {name} belongs to no module of the mean adapter", "wrong_shape", path)
        by_module[module][parameter] = tensor
    # The factors of an ensemble's members are no noise.
    is_random = any(config.kind != "ensemble" or name.rpartition(".")[2].startswith(MEMBER_PREFIX) for name in tensors)
    posteriors: dict[str, Posterior] = {}
    for module, parameters in by_module.items():
        try:
            posterior = _posterior(config, parameters, is_random=is_random)
            posterior.check(module, mean[module])
        except PosteriorError as error:
            raise refused(f"{path}: {error}", error.reason, path) from None
        posteriors[module] = posterior
    return posteriors


def _posterior(
    config: PosteriorConfig | MemberPosterior, parameters: dict[str, Tensor], *, is_random: bool
) -> Posterior:
    """Builds the posterior of one module.

    Args:
        is_random: whether some module of the artifact has parameters of noise.
    """
    if isinstance(config, PosteriorConfig) and config.kind == "ensemble":
        if config.settings:
            raise PosteriorError(f"kind ensemble has no settings of its own, got {sorted(config.settings)}")
        member = config.member
        build = None if member is None else functools.partial(_posterior, member, is_random=is_random)
        return EnsemblePosterior.from_members(parameters, build)
    if config.kind not in KINDS:
        raise PosteriorError(
            f"the members of an ensemble cannot be of kind {config.kind}; choose from {', '.join(KINDS)}"
        )
    if is_random and not parameters and config.kind in PARTIAL_KINDS:
        return PointPosterior()
    return KINDS[config.kind].from_tensors(parameters, config.settings)


__all__ = [
    "Artifact",
    "BaseModelRef",
    "Calibration",
    "CurvePoint",
    "Fit",
    "PosteriorConfig",
    "config_of_rank",
    "load_artifact",
    "num_distinct_samples",
    "peft_tensors",
    "write_artifact",
    "write_factors",
    "write_sample",
]
