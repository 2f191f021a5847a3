"""A folder with a PEFT LoRA: its configuration and factors, read without trust in what is there.

Only plain LoRA is understood: a setting that changes what the factors mean is refused by name, as is one this file does not know. Tensors
come from safetensors (a pickle is never opened), must be finite, and are float32, or float16 or bfloat16, which float32 holds exactly.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from credence.adapters.files import MEAN_CONFIG, MEAN_TENSORS, json_object, read_file, refused
from credence.adapters.posterior import LoraFactors

PEFT_PREFIX = "base_model.model."
DEFAULT_MAX_BYTES = 8 * 2**30
PICKLE = "adapter_model.bin"
EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)
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
# Starts that leave the base model as it is; the others (pissa, olora, loftq, ...) subtract something from its weights.
INNOCENT_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Settings that say which modules are adapted (the tensors say it too), how training started, or nothing about the factors.
DESCRIPTIVE = frozenset(
    {
        "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
        "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights",
        "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftFolder:
    """The verified bytes of a PEFT LoRA folder, before its tensors are sorted into factors.

    Attributes:
        config: adapter_config.json, without the class of the base model (auto_mapping).
        tensors: float32, under the names of the file.
        digest: ``sha256:<64 hex>`` of the two files.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    digest: str


def read_peft_lora(
    path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES
) -> tuple[dict[str, Any], dict[str, LoraFactors]]:
    """Reads a plain PEFT LoRA folder.

    Returns:
        Its configuration, and its factors (float32) by module name without PEFT's prefix.

    Raises:
        ArtifactError: the folder is refused; ``reason`` says why.
    """
    content = read_peft_folder(path, max_bytes)
    check_peft_config(content.config, Path(path) / MEAN_CONFIG)
    return content.config, factors_of(content.tensors, content.config["r"], Path(path) / MEAN_TENSORS)


def read_peft_folder(path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> PeftFolder:
    """Reads the configuration and the tensors of a PEFT folder, without a look at what kind of adapter it is.

    Raises:
        ArtifactError: a file is missing, a symbolic link, too large, a pickle, not finite, or of a type float32 does not hold.
    """
    folder = Path(path)
    if not folder.exists():
        raise refused(
            f"{folder} does not exist; give a folder with {MEAN_CONFIG} and {MEAN_TENSORS}", "missing", folder
        )
    if not folder.is_dir():
        raise refused(f"{folder} is not a folder; a PEFT LoRA is one, with {MEAN_CONFIG}", "not_a_folder", folder)
    if not (folder / MEAN_TENSORS).exists() and (folder / PICKLE).exists():
        raise refused(
            f"{folder} holds {PICKLE}, a pickle, which can run any code and is never opened; load it where you trust it and save it "
            f"again with safe_serialization=True, which writes {MEAN_TENSORS}",
            "unsupported",
            folder,
        )
    needs = f"a PEFT LoRA folder needs {MEAN_CONFIG} and {MEAN_TENSORS}"
    config = read_file(folder / MEAN_CONFIG, max_bytes, needs)
    tensors = read_file(folder / MEAN_TENSORS, max_bytes - len(config), needs)
    parsed = parse_tensors(tensors, folder / MEAN_TENSORS)
    for name, tensor in parsed.items():
        if tensor.dtype not in EXACT_IN_FLOAT32:
            raise refused(
                f"{folder / MEAN_TENSORS}: {name} is {tensor.dtype}; float32, float16 and bfloat16 are read, because float32 holds "
                "them exactly",
                "unsupported",
                folder / MEAN_TENSORS,
            )
    check_finite(parsed, folder / MEAN_TENSORS)
    # PEFT names the base model's class there where no task_type was given; an artifact names none.
    document = {**json_object(config, folder / MEAN_CONFIG), "auto_mapping": None}
    return PeftFolder(
        config=document,
        tensors={name: tensor.float() for name, tensor in parsed.items()},
        digest="sha256:" + hashlib.sha256(config + tensors).hexdigest(),
    )


def check_peft_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError unless ``config`` is that of a plain LoRA, all of whose settings are known, with a usable r and lora_alpha."""
    check_plain_lora(config, path)
    if config.get("init_lora_weights") not in INNOCENT_STARTS:
        raise refused(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, a start that changes the base model's own weights; convert "
            "the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
            "unsupported",
            path,
        )
    for key, value in config.items():
        if key not in PLAIN_LORA and key not in DESCRIPTIVE and value not in (None, False, {}, []):
            raise refused(f"{path}: {key} is {value!r}, a setting that is not understood here", "unsupported", path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise refused(f"{path}: r is {rank!r}, a whole number of 1 or more is needed", "malformed", path)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise refused(f"{path}: lora_alpha is {alpha!r}, a number above 0 is needed", "malformed", path)


def check_plain_lora(config: Mapping[str, Any], path: Path) -> None:
    """Raises ArtifactError if a setting of ``config`` makes it another thing than a plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise refused(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA is supported", "unsupported", path)
    for key, allowed in PLAIN_LORA.items():
        if config.get(key) not in allowed:
            raise refused(
                f"{path}: {key} is {config[key]!r}; the mean of an artifact is a plain LoRA, with {key} {allowed[0]!r}",
                "unsupported",
                path,
            )


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Parses the bytes of a safetensors file; raises ArtifactError otherwise."""
    try:
        tensors: dict[str, Tensor] = parse_safetensors(data)
    except Exception as error:
        raise refused(f"{path} is not a safetensors file: {error}", "malformed", path) from None
    # The parser takes the last of two tensors of one name, another may take the first.
    json_object(data[8 : 8 + int.from_bytes(data[:8], "little")], path)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ArtifactError if an entry is infinite or not a number."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise refused(f"{path}: {name} has entries that are not finite", "not_finite", path)


def factors_of(tensors: Mapping[str, Tensor], rank: int, path: Path) -> dict[str, LoraFactors]:
    """Sorts tensors under PEFT's names into factors by module; raises ArtifactError for what is no LoRA factor of this rank."""
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
        if pair["A"].numel() == 0 or pair["B"].numel() == 0:
            raise refused(f"{path}: {module} has factors without entries", "wrong_shape", path)
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise refused(
                f"{path}: {module} has lora_A {tuple(pair['A'].shape)} and lora_B {tuple(pair['B'].shape)}, the rank is {rank}",
                "wrong_shape",
                path,
            )
        factors[module] = LoraFactors(A=pair["A"], B=pair["B"])
    return factors
