"""The merged layout: one adapter per server, its mean inside the base weights and its samples as delta adapters.

With s = lora_alpha / r, the merged model and the sample served on top of it are

    W_m = round(W0 + s B A),        W_s = W_m + s B' A',
    B' A' = B_s A_s - B A = B_s (A_s - A) + (B_s - B) A.

The first summand alone has rank r, and where B is deterministic it is the whole: A' = A_s - A, B' = B. Otherwise
A' = [A_s - A; A] and B' = [B_s, B_s - B] have rank 2r, and lora_alpha doubles with it. The noise has tensors of its own, so a dtype
rounds it relative to itself; in the shared layout (A_s, B_s) it is rounded relative to the mean, and drowns where it is below one ulp.

    config.json, *.safetensors, tokenizer ...   base and mean, a model any engine loads
    credence/                                   the artifact, every file as it was
    credence_merged.json                        name, dtype, digest of the artifact, SHA-256 of every other file
    signature.json                              optional: of credence_merged.json's bytes (credence.adapters.signature)

Writing, reading and drawing from such a folder are kept together, although that makes a long file: they share its format.
"""

import hashlib
import json
import re
import shutil
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from credence.adapters.artifact import Artifact, config_of_rank, load_artifact, write_factors
from credence.adapters.config import BaseModelRef, Document, FileEntry
from credence.adapters.errors import ArtifactReason, PosteriorError
from credence.adapters.files import (
    MAX_JSON_BYTES,
    SIGNATURE,
    json_object,
    parse,
    read_file,
    refused,
    replacing_folder,
)
from credence.adapters.posterior import LoraFactors, check_tau

if TYPE_CHECKING:
    from credence.adapters.signature import TrustRoot

MERGED, ARTIFACT_FOLDER = "credence_merged.json", "credence"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MergedDtype = Literal["bfloat16", "float32"]
# What an engine may read weights from; nothing of this kind may lie beside the files that were merged.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
# Tokenizer, generation, processor and licence files of a base model; never code, weights or what is written anew.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.bpe", "LICENSE*", "NOTICE*")
NOT_COPIED = (*WEIGHT_PATTERNS, "*.index.json", CONFIG, MERGED, SIGNATURE, "params.json", "adapter_config.json")
TEMPLATES = "additional_chat_templates"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A temperature at which no noise rounds away beside its weight: the standard deviation grows 2^20 times.
PROBE_TAU = 2.0**40


class MergedManifest(Document):
    """credence_merged.json.

    Attributes:
        name: name under which the merged model is served.
        dtype: of the weights.
        digest: of the artifact in ``credence/``, ``sha256:<64 hex>``.
        base_model: what the mean was merged into.
        weights: size and SHA-256 of every weight file, and of their index.
        companions: size and SHA-256 of configuration, tokenizer and whatever else was written beside the weights, by path in the folder.
            They may be edited (a chat template, say), except where a signature is required.
    """

    format_version: Literal[1] = 1
    name: str = Field(pattern=f"^{MODEL_NAME.pattern}$")
    dtype: MergedDtype
    digest: str = Field(pattern="^sha256:[0-9a-f]{64}$")
    base_model: BaseModelRef
    weights: dict[str, FileEntry] = Field(min_length=1)
    companions: dict[str, FileEntry] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A verified merged folder.

    Attributes:
        path: the model's folder.
        artifact: the posterior, its mean already in the weights.
        document_digest: ``sha256:<64 hex>`` of credence_merged.json.
        rank: rank of the widest delta adapter: r if only A is random, 2r otherwise, (M + 1) r of an ensemble with its exact mean.
        signed_by: id of the trusted key that signed it; None if it was loaded without a trust root.
    """

    path: Path
    manifest: MergedManifest
    document_digest: str
    artifact: Artifact
    rank: int
    signed_by: str | None = None

    @property
    def name(self) -> str:
        """Name under which it is served."""
        return self.manifest.name

    @property
    def dtype(self) -> str:
        """Dtype of the weights, ``bfloat16`` or ``float32``."""
        return self.manifest.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What was merged.

    Attributes:
        model: the folder, read back and verified.
        rounding: per module, |W_m - (W0 + s B A)| / |s B A| in the Frobenius norm: how much of the mean the dtype lost. Modules whose
            mean is zero are left out.
    """

    model: MergedModel
    rounding: Mapping[str, float]


def delta(sample: Mapping[str, LoraFactors], mean: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Factors of B_s A_s - B A by module, all of rank r if B_s equals B bit for bit in every module, else all of rank 2r.

    At tau = 0 they have rank r, A' = 0, and the product is exactly zero. The members of an ensemble whose mean has rank M r give
    A' = [A_s; A] and B' = [B_s, -B], of rank (M + 1) r.

    Args:
        sample: a draw, A_s [r_s, n_in] and B_s [n_out, r_s].
        mean: the mean it was drawn around; same modules, and same shapes but for the rank.

    Raises:
        PosteriorError: the modules or shapes differ.
    """
    _check_pairs(sample, mean)
    if any(sample[module].rank != pair.rank for module, pair in mean.items()):
        return {
            module: LoraFactors(
                A=torch.cat([sample[module].A, pair.A], dim=0), B=torch.cat([sample[module].B, -pair.B], dim=1)
            )
            for module, pair in mean.items()
        }
    if all(torch.equal(sample[module].B, mean[module].B) for module in mean):
        return {module: LoraFactors(A=sample[module].A - pair.A, B=pair.B) for module, pair in mean.items()}
    return {
        module: LoraFactors(
            A=torch.cat([sample[module].A - pair.A, pair.A], dim=0),
            B=torch.cat([sample[module].B, sample[module].B - pair.B], dim=1),
        )
        for module, pair in mean.items()
    }


def delta_rank(artifact: Artifact) -> int:
    """Rank of the widest delta adapter of an artifact, over all seeds, indices and tau: r if its B is deterministic, else 2r."""
    factors = delta(artifact.draw(seed=0, index=0, tau=PROBE_TAU), artifact.mean)
    return next(iter(factors.values())).rank


def write_delta(path: str | Path, artifact: Artifact, *, seed: int, index: int, tau: float) -> None:
    """Writes sample ``index`` as a plain PEFT LoRA folder for the merged model: what the server serves as that sample.

    Raises:
        ArtifactError: if ``path`` exists and is not empty.
        PosteriorError: if tau is negative or not finite.
    """
    check_tau(tau)
    factors = delta(artifact.draw(seed=seed, index=index, tau=tau), artifact.mean)
    write_factors(path, config_of_rank(artifact.adapter_config, factors), factors)


def is_merged(path: str | Path) -> bool:
    """Whether ``path`` is a folder that `credence merge` wrote (nothing is verified)."""
    return (Path(path) / MERGED).is_file()


def load_merged(
    path: str | Path,
    *,
    store: Path | None = None,
    verify_weights: bool = True,
    trust: "TrustRoot | None" = None,
) -> MergedModel:
    """Reads and verifies a merged folder.

    Args:
        store: private folder for a verified copy of the artifact, as in ``load_artifact``.
        verify_weights: hash the weight files, at the speed of the disk; False checks the artifact only.
        trust: public keys, one of which must have signed credence_merged.json, which names the artifact by its digest. Then all other
            files must be as they were written too, and no file be added.

    Raises:
        ArtifactError: the artifact is refused, or the weights are not those that were merged with it.
    """
    folder = Path(path)
    document = read_file(folder / MERGED, MAX_JSON_BYTES, "it is the record that `credence merge` writes")
    signed_by = None if trust is None else trust.check(folder, MERGED, document)
    manifest = parse(MergedManifest, document, folder / MERGED)
    artifact = load_artifact(folder / ARTIFACT_FOLDER, store=store)
    if artifact.digest != manifest.digest:
        raise refused(
            f"{folder / ARTIFACT_FOLDER} holds {artifact.digest}, the weights were merged with {manifest.digest}; merge again",
            "hash_mismatch",
            folder / ARTIFACT_FOLDER,
        )
    if verify_weights:
        _verify_weights(folder, manifest)
    if trust is not None:
        _verify_companions(folder, manifest)
    return MergedModel(
        path=folder,
        manifest=manifest,
        document_digest=f"sha256:{hashlib.sha256(document).hexdigest()}",
        artifact=artifact,
        rank=delta_rank(artifact),
        signed_by=signed_by,
    )


def merge(
    adapter: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    linear_modules: Mapping[str, tuple[int, ...]],
    base_model: BaseModelRef,
    name: str,
    dtype: MergedDtype | None = None,
) -> MergeReport:
    """Writes base and mean as one model, with the artifact beside it, in one step: a failure leaves ``output`` as it was.

    The sum is taken in float64 and converted once. The base's shards stay as they are cut. Tensors without adapter are converted if they
    have the base's own dtype (the one of most of its numbers); what the base keeps in another dtype stays so.

    Args:
        adapter: the artifact's folder.
        base: folder of the base model, with safetensors weights.
        output: new or empty folder.
        linear_modules: shape [n_out, n_in] of every plain linear layer of the base whose weight is its own, by PEFT's module name. The
            files alone do not tell a linear weight from a transposed or a tied one.
        base_model: the base's name, for the record.
        name: name under which the merged model will be served.
        dtype: of the weights; None keeps the base's.

    Raises:
        ArtifactError: the artifact, the base or ``output`` is refused, or a sum is not finite. ``reason`` says why.
        ValueError: the name is not valid.
    """
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} must match {MODEL_NAME.pattern}")
    source = Path(base)
    with replacing_folder(Path(output), replace=False) as folder:
        store = folder / ".store"
        artifact = load_artifact(adapter, store=store)
        if artifact.head:
            raise refused(
                f"{adapter} is a classifier on an encoder, with a head of its own; causal language models are merged: evaluate it with "
                "`credence eval`",
                "unsupported",
                Path(adapter),
            )
        checkpoint = _Checkpoint.open(source)
        dtype = dtype or checkpoint.usual_dtype()
        _check_fits(artifact, checkpoint, linear_modules)
        rounding: dict[str, float] = {}
        num_bytes = 0
        for file in checkpoint.files:
            lost, size = _write_shard(folder / file, checkpoint, file, artifact, getattr(torch, dtype))
            rounding |= lost
            num_bytes += size
        files = [*checkpoint.files]
        if checkpoint.index is not None:
            files.append(INDEX)
            metadata = {**(checkpoint.index.get("metadata") or {}), "total_size": num_bytes}
            _write_json(folder / INDEX, {**checkpoint.index, "metadata": metadata})
        _write_json(folder / CONFIG, _with_dtype(checkpoint.config, dtype))
        _copy_companions(source, folder)
        artifact.path.rename(folder / ARTIFACT_FOLDER)
        store.rmdir()
        manifest = MergedManifest(
            name=name,
            dtype=dtype,
            digest=artifact.digest,
            base_model=base_model,
            weights={file: _file_entry(folder / file) for file in files},
            companions={file: _file_entry(folder / file) for file in sorted(_companions(folder) - set(files))},
        )
        _write_json(folder / MERGED, manifest.model_dump(mode="json"))
        load_merged(folder, verify_weights=False)
    return MergeReport(model=load_merged(output, verify_weights=False), rounding=rounding)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checkpoint:
    """The weight files of a base model: dtype (safetensors' name) and shape of every tensor, and the file it lies in."""

    folder: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    files: tuple[str, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def open(cls, folder: Path) -> "_Checkpoint":
        if (folder / MERGED).exists():
            raise refused(
                f"{folder} is a merged model already; give the base model the adapter was trained on",
                "unsupported",
                folder,
            )
        config = json_object(_read(folder / CONFIG), folder / CONFIG, strict=False)
        if config.get("quantization_config"):
            raise refused(
                f"{folder} is a quantised model; merge into the float checkpoint it was made of",
                "unsupported",
                folder / CONFIG,
            )
        index = None
        if (folder / INDEX).exists():
            index = json_object(_read(folder / INDEX), folder / INDEX, strict=False)
        if index is None and not (folder / WEIGHTS).exists():
            raise refused(
                f"{folder} has neither {WEIGHTS} nor {INDEX}; merging reads safetensors weights",
                "missing",
                folder / WEIGHTS,
            )
        weight_map = {} if index is None else index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
            for file in weight_map.values()
        ):
            raise refused(
                f"{folder / INDEX}: weight_map must name safetensors files of the folder", "malformed", folder / INDEX
            )
        files = tuple(sorted(set(weight_map.values()))) if index is not None else (WEIGHTS,)
        tensors = {}
        for file in files:
            with _open(folder / file) as shard:
                for key in shard.keys():
                    part = shard.get_slice(key)
                    tensors[key] = (str(part.get_dtype()), tuple(part.get_shape()))
        if index is not None and set(tensors) != set(weight_map):
            odd = sorted(set(tensors) ^ set(weight_map))
            raise refused(
                f"{folder / INDEX} and its files differ in {len(odd)} tensors, first {odd[0]}",
                "malformed",
                folder / INDEX,
            )
        return cls(folder=folder, config=config, index=index, files=files, tensors=tensors)

    @property
    def main_dtype(self) -> torch.dtype | None:
        """The floating dtype of most of the numbers; None without any."""
        count: Counter[torch.dtype] = Counter()
        for dtype, shape in self.tensors.values():
            if dtype in FLOATS:
                count[FLOATS[dtype]] += torch.Size(shape).numel()
        return count.most_common(1)[0][0] if count else None

    def usual_dtype(self) -> MergedDtype:
        if self.main_dtype is torch.bfloat16:
            return "bfloat16"
        if self.main_dtype is torch.float32:
            return "float32"
        raise refused(
            f"{self.folder} has {self.main_dtype} weights; say which dtype the merged ones get, bfloat16 or float32",
            "unsupported",
            self.folder,
        )


def _check_pairs(sample: Mapping[str, LoraFactors], mean: Mapping[str, LoraFactors]) -> None:
    if set(sample) != set(mean):
        odd = sorted(set(sample) ^ set(mean))
        raise PosteriorError(
            f"the sample and the mean differ in {len(odd)} modules, first {odd[0]}", reason="wrong_shape"
        )
    for module, pair in mean.items():
        drawn = sample[module]
        if drawn.A.shape[1] != pair.A.shape[1] or drawn.B.shape[0] != pair.B.shape[0]:
            raise PosteriorError(
                f"{module}: the sample has A {tuple(drawn.A.shape)} and B {tuple(drawn.B.shape)}, the mean A {tuple(pair.A.shape)} "
                f"and B {tuple(pair.B.shape)}",
                reason="wrong_shape",
            )


def _check_fits(artifact: Artifact, checkpoint: _Checkpoint, linear_modules: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ArtifactError unless every adapted module is a plain linear layer with a float weight of the right shape of its own."""
    folder = checkpoint.folder
    for module, pair in artifact.mean.items():
        expected = (pair.B.shape[0], pair.A.shape[1])
        if module not in linear_modules:
            raise refused(
                f"the adapter changes {module}, {folder} has no plain linear layer of that name: this is not the adapter's base model, "
                "or its layers cannot be merged (serve the adapter with --adapter)",
                "unsupported",
                folder,
            )
        dtype, shape = checkpoint.tensors.get(f"{module}.weight", (None, tuple(linear_modules[module])))
        if shape != expected or tuple(linear_modules[module]) != expected:
            raise refused(
                f"{module} is {shape} in {folder}, the adapter is for {expected}: this is not the adapter's base model",
                "wrong_shape",
                folder,
            )
        if dtype is None:
            raise refused(
                f"{module} has no weight of its name in {folder}, so the adapter cannot be merged; "
                "serve it with --adapter",
                "unsupported",
                folder,
            )
        if dtype not in FLOATS:
            raise refused(f"{module}.weight is {dtype}; merging needs floating-point weights", "unsupported", folder)


def _write_shard(
    target: Path, checkpoint: _Checkpoint, file: str, artifact: Artifact, dtype: torch.dtype
) -> tuple[dict[str, float], int]:
    """Writes one shard of the merged model; returns what rounding lost of each mean in it, and the tensors' bytes."""
    adapted = {f"{module}.weight": module for module in artifact.mean}
    scaling = artifact.config.lora_alpha / artifact.config.rank
    main = checkpoint.main_dtype
    tensors, rounding = {}, {}
    with _open(checkpoint.folder / file) as shard:
        metadata = shard.metadata()
        for key in shard.keys():
            weight: Tensor = shard.get_tensor(key)
            module = adapted.get(key)
            if module is not None:
                pair = artifact.mean[module]
                update = scaling * (pair.B.double() @ pair.A.double())
                exact = weight.double() + update
                weight = exact.to(dtype)
                if bool((update != 0).any()):
                    rounding[module] = float((weight.double() - exact).norm() / update.norm())
                finite = bool(torch.isfinite(weight).all())
            else:
                finite = True
                if weight.dtype == main:
                    # Constants of a base model may be infinite (masks); conversion must not make more of them.
                    converted = weight.to(dtype)
                    finite = torch.equal(torch.isfinite(weight), torch.isfinite(converted))
                    weight = converted
            if not finite:
                raise refused(
                    f"{key} of {checkpoint.folder} is not finite in {str(dtype).removeprefix('torch.')} after merging",
                    "not_finite",
                    checkpoint.folder / file,
                )
            tensors[key] = weight.contiguous()
    save_file(tensors, target, metadata=metadata or {"format": "pt"})
    return rounding, sum(tensor.nbytes for tensor in tensors.values())


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with the merged dtype, also in its sub-configurations, and without references to code, which is not copied."""

    def changed(document: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: changed(value)
            if key.endswith("_config") and isinstance(value, dict)
            else (dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value)
            for key, value in document.items()
            if key != "auto_map"
        }

    document = changed(config)
    # The older name: every release of transformers reads it.
    return document if {"dtype", "torch_dtype"} & set(document) else {**document, "torch_dtype": dtype}


def _copy_companions(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in COPIED)
        if path.is_file() and wanted and not any(fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES)


def _verify_weights(folder: Path, manifest: MergedManifest) -> None:
    found = {path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in WEIGHT_PATTERNS)}
    missing, strange = sorted(set(manifest.weights) - found), sorted(found - set(manifest.weights))
    if missing or strange:
        reason: ArtifactReason = "missing" if missing else "malformed"
        raise refused(
            f"{folder} lacks the weight files {missing} and has {strange} that `credence merge` did not write; merge again",
            reason,
            folder,
        )
    for name, entry in manifest.weights.items():
        path = folder / name
        if _file_entry(path) != entry:
            raise refused(
                f"{path} is not the file `credence merge` wrote (another size or SHA-256): the weights were changed, so the posterior "
                "no longer belongs to them; merge again",
                "hash_mismatch",
                path,
            )


def _companions(folder: Path) -> set[str]:
    """Paths in a merged folder of all files but the artifact's, the record and its signature."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    return {str(file) for file in files if file.parts[0] not in (ARTIFACT_FOLDER, MERGED, SIGNATURE)}


def _verify_companions(folder: Path, manifest: MergedManifest) -> None:
    found = _companions(folder) - set(manifest.weights)
    for name in sorted(found ^ set(manifest.companions)):
        known = name in manifest.companions
        state = "missing" if known else "no file of `credence merge`"
        raise refused(
            f"{folder / name} is {state}; a signature is required, so the folder must be as it was signed: merge and sign again",
            "missing" if known else "unsupported",
            folder / name,
        )
    for name, entry in manifest.companions.items():
        if _file_entry(folder / name) != entry:
            raise refused(
                f"{folder / name} is not the file `credence merge` wrote; a signature is required, so the folder must be as it was signed: "
                "merge and sign again",
                "hash_mismatch",
                folder / name,
            )


def _file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a regular file; symbolic links are followed, as by the engine that reads the weights."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise refused(f"{path} is not a regular file", "malformed", path)
        with path.open("rb") as file:
            return FileEntry(size=status.st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    except FileNotFoundError:
        raise refused(f"{path} is missing", "missing", path) from None
    except OSError as error:
        raise refused(f"{path} cannot be read: {error.strerror}", "io", path) from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise refused(f"{path} is missing", "missing", path) from None
    except (SafetensorError, OSError) as error:
        raise refused(f"{path} cannot be read as safetensors: {error}", "malformed", path) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise refused(f"{path} is missing", "missing", path) from None
    except OSError as error:
        raise refused(f"{path} cannot be read: {error.strerror}", "io", path) from None


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "MergeReport",
    "MergedManifest",
    "MergedModel",
    "delta",
    "delta_rank",
    "is_merged",
    "load_merged",
    "merge",
    "write_delta",
]
