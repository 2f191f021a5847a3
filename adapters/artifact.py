"""The artifact: a folder with a mean adapter any PEFT tool loads, and its posterior beside it (format version 1).

    adapter_config.json, adapter_model.safetensors   the mean, plain PEFT LoRA, float32
    posterior.json, posterior.safetensors            kind, method, settings, noise convention, fitted tau; the parameters
    calibration.json, metrics.json, README.md        optional: temperatures by K, measured numbers, model card
    manifest.json                                    size and SHA-256 of every file above, dtype and shape of every tensor

The digest of an artifact is the SHA-256 of manifest.json. Reading verifies everything before anything is used: each file is read once,
hashed, and parsed from the very bytes that were hashed, so a file that changes underneath cannot slip through. With a ``store`` those bytes
are also laid down in a private folder named by the digest, and whoever needs a path later (vLLM's workers) gets that copy.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from credence.adapters.config import BaseModelRef, Calibration, CurvePoint, FileEntry, Fit, Manifest, PosteriorConfig
from credence.adapters.errors import ArtifactError, PosteriorError
from credence.adapters.files import (
    CALIBRATION,
    CARD,
    MANIFEST,
    MEAN_CONFIG,
    MEAN_TENSORS,
    METRICS,
    POSTERIOR_CONFIG,
    POSTERIOR_TENSORS,
    json_object,
    lay_down,
    parse,
    read_verified,
    refused,
    replacing_folder,
)
from credence.adapters.kinds import KINDS
from credence.adapters.posterior import LoraFactors, Posterior, check_tau, draw
from credence.adapters.sampling import NoiseSource

PEFT_PREFIX = "base_model.model."
DEFAULT_MAX_BYTES = 8 * 2**30
# Settings of a PEFT LoRA that change what the factors mean; an artifact holds plain LoRA only.
PLAIN_LORA: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "auto_mapping": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A verified artifact in memory.

    Attributes:
        path: folder it was read from, or its copy in the store.
        digest: ``sha256:<64 hex>``, identifies every byte of it.
        mean: factors by module (PEFT's module names without their prefix).
        posteriors: posterior by module; the same keys as ``mean``.
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

    @property
    def has_posterior(self) -> bool:
        """Whether samples differ from the mean (false for kind ``point``)."""
        return self.config.kind != "point"

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


def load_artifact(path: str | Path, *, store: Path | None = None, max_bytes: int = DEFAULT_MAX_BYTES) -> Artifact:
    """Reads and verifies an artifact.

    Args:
        store: private folder; the verified bytes are also written to ``store/<digest hex>`` and ``Artifact.path`` is that copy.
        max_bytes: limit for all files together.

    Raises:
        ArtifactError: the folder is refused; ``reason`` says why, and nothing was kept.
    """
    folder = Path(path)
    contents, manifest = read_verified(folder, max_bytes)
    digest = hashlib.sha256(contents[MANIFEST]).hexdigest()
    config = parse(PosteriorConfig, contents[POSTERIOR_CONFIG], folder / POSTERIOR_CONFIG)
    adapter_config = json_object(contents[MEAN_CONFIG], folder / MEAN_CONFIG)
    _check_plain_lora(adapter_config, config, folder / MEAN_CONFIG)
    calibration = Calibration()
    if CALIBRATION in contents:
        calibration = parse(Calibration, contents[CALIBRATION], folder / CALIBRATION)
    metrics = json_object(contents[METRICS], folder / METRICS) if METRICS in contents else {}
    mean_tensors = _tensors(contents[MEAN_TENSORS], manifest.files[MEAN_TENSORS], folder / MEAN_TENSORS)
    posterior_tensors = _tensors(
        contents[POSTERIOR_TENSORS], manifest.files[POSTERIOR_TENSORS], folder / POSTERIOR_TENSORS
    )
    mean = _factors(mean_tensors, config, folder / MEAN_TENSORS)
    posteriors = _posteriors(posterior_tensors, config, mean, folder / POSTERIOR_TENSORS)
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
    card: str | None = None,
    replace: bool = False,
) -> str:
    """Writes an artifact as one step: a failure leaves ``path`` as it was. What was written is read back and verified.

    Args:
        adapter_config: PEFT's LoraConfig as JSON.
        mean, posteriors: by module, equal keys; written as float32.
        card: text of the folder's README.md.
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
    if calibration is not None:
        contents[CALIBRATION] = _dump_json(calibration.model_dump(mode="json"))
    if metrics is not None:
        contents[METRICS] = _dump_json(metrics)
    if card is not None:
        contents[CARD] = card.encode()
    manifest = Manifest(files={name: _entry(name, data) for name, data in contents.items()})
    contents[MANIFEST] = _dump_json(manifest.model_dump(mode="json"))
    with replacing_folder(Path(path), replace=replace) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        digest = load_artifact(folder).digest
    return digest


def write_sample(path: str | Path, artifact: Artifact, *, seed: int, index: int, tau: float) -> None:
    """Writes sample ``index`` as a plain PEFT LoRA folder: what the server serves as that sample.

    Raises:
        ArtifactError: if ``path`` exists and is not empty.
    """
    check_tau(tau)
    write_factors(path, artifact.adapter_config, artifact.draw(seed=seed, index=index, tau=tau))


def write_factors(path: str | Path, adapter_config: Mapping[str, Any], factors: Mapping[str, LoraFactors]) -> None:
    """Writes factors (float32) and their PEFT configuration as a plain LoRA folder.

    Raises:
        ArtifactError: if ``path`` exists and is not empty.
    """
    with replacing_folder(Path(path), replace=False) as folder:
        (folder / MEAN_CONFIG).write_bytes(_dump_json(adapter_config))
        (folder / MEAN_TENSORS).write_bytes(dump_safetensors(peft_tensors(factors), metadata={"format": "pt"}))


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


def _dump_json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _entry(name: str, data: bytes) -> FileEntry:
    tensors = {}
    if name.endswith(".safetensors"):
        for key, tensor in parse_safetensors(data).items():
            tensors[key] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=tensors)


def _check_plain_lora(adapter_config: Mapping[str, Any], config: PosteriorConfig, path: Path) -> None:
    if adapter_config.get("peft_type") != "LORA":
        raise refused(
            f"{path}: peft_type is {adapter_config.get('peft_type')!r}, only LORA is supported", "unsupported", path
        )
    for key, allowed in PLAIN_LORA.items():
        if adapter_config.get(key) not in allowed:
            raise refused(
                f"{path}: {key} is {adapter_config[key]!r}; the mean of an artifact is a plain LoRA, with {key} {allowed[0]!r}",
                "unsupported",
                path,
            )
    for key, expected in (("r", config.rank), ("lora_alpha", config.lora_alpha)):
        if adapter_config.get(key) != expected:
            raise refused(
                f"{path}: {key} is {adapter_config.get(key)!r}, {POSTERIOR_CONFIG} says {expected!r}", "malformed", path
            )


def _tensors(data: bytes, entry: FileEntry, path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except Exception as error:
        raise refused(f"{path} is not a safetensors file: {error}", "malformed", path) from None
    found = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != entry.tensors:
        raise refused(f"{path} holds other tensors than its manifest entry describes", "malformed", path)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise refused(f"{path}: {name} is {tensor.dtype}, means and posteriors are float32", "unsupported", path)
        if not bool(torch.isfinite(tensor).all()):
            raise refused(f"{path}: {name} has entries that are not finite", "not_finite", path)
    return tensors


def _factors(tensors: Mapping[str, Tensor], config: PosteriorConfig, path: Path) -> dict[str, LoraFactors]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, dot, side = name.removesuffix(".weight").rpartition(".lora_")
        if not (name.startswith(PEFT_PREFIX) and name.endswith(".weight") and dot and side in ("A", "B")):
            raise refused(
                f"{path}: {name} is not a LoRA factor ({PEFT_PREFIX}<module>.lora_A|B.weight)", "unsupported", path
            )
        sides.setdefault(module.removeprefix(PEFT_PREFIX), {})[side] = tensor
    if not sides:
        raise refused(f"{path} holds no LoRA module", "malformed", path)
    factors = {}
    for module, pair in sorted(sides.items()):
        if set(pair) != {"A", "B"} or pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise refused(
                f"{path}: {module} needs two matrices, lora_A [r, n_in] and lora_B [n_out, r]", "wrong_shape", path
            )
        if pair["A"].shape[0] != config.rank or pair["B"].shape[1] != config.rank:
            raise refused(
                f"{path}: {module} has lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, the rank is {config.rank}",
                "wrong_shape",
                path,
            )
        factors[module] = LoraFactors(A=pair["A"], B=pair["B"])
    return factors


def _posteriors(
    tensors: Mapping[str, Tensor], config: PosteriorConfig, mean: Mapping[str, LoraFactors], path: Path
) -> dict[str, Posterior]:
    by_module: dict[str, dict[str, Tensor]] = {module: {} for module in mean}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module not in by_module:
            raise refused(f"{path}: {name} belongs to no module of the mean adapter", "wrong_shape", path)
        by_module[module][parameter] = tensor
    posteriors: dict[str, Posterior] = {}
    for module, parameters in by_module.items():
        try:
            posterior = KINDS[config.kind].from_tensors(parameters, config.settings)
            posterior.check(module, mean[module])
        except PosteriorError as error:
            raise refused(f"{path}: {error}", error.reason, path) from None
        posteriors[module] = posterior
    return posteriors


__all__ = [
    "Artifact",
    "BaseModelRef",
    "Calibration",
    "CurvePoint",
    "Fit",
    "PosteriorConfig",
    "load_artifact",
    "peft_tensors",
    "write_artifact",
    "write_factors",
    "write_sample",
]
