"""What is checked before an engine is started: by every start, which ends at the first problem, and by ``--check``, which lists them all.

Nothing here uses the network, loads weights or runs code from a model's folder.
"""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from credence.serve.errors import ConfigurationError

GIB = 2**30
ITEM_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(slots=True, kw_only=True)
class Row:
    """One check.

    Attributes:
        name: what is checked.
        found: what was found; empty if the check could not be made.
        problem: why the server must not start like this.
    """

    name: str
    found: str = ""
    problem: str | None = None


@dataclass(slots=True)
class Checks:
    """The checks of one start.

    Attributes:
        keep_going: note problems instead of raising them.
    """

    keep_going: bool = False
    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[Row]:
        """One check, whose block sets ``found`` or raises ConfigurationError."""
        row = Row(name=name)
        self.rows.append(row)
        try:
            yield row
        except ConfigurationError as error:
            if not self.keep_going:
                raise
            row.problem = error.message

    @property
    def refused(self) -> bool:
        """Whether a check found a problem."""
        return any(row.problem is not None for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What a model's config.json says about its size.

    Attributes:
        modules: (n_out, n_in) of every linear layer by PEFT's module name.
        weights_bytes: of all weights in the dtype they are served in.
        kv_bytes_per_token: keys and values of one token of one sequence.
        item_bytes: size of one number of the served dtype.
        max_model_len: longest sequence.
    """

    modules: dict[str, tuple[int, int]]
    weights_bytes: int
    kv_bytes_per_token: int
    item_bytes: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of the device that holds the engine, bytes.

    Attributes:
        total, available: of the device; of a container, its limit.
        share: part of the total that vLLM takes (--gpu-memory-utilization).
        kv_bytes: size of the KV cache if it was given, else None: what the share leaves.
        holds_samples: whether the samples beside the slots lie in the same memory (on CPU).
    """

    total: int
    available: int
    share: float
    kv_bytes: int | None
    holds_samples: bool


def read_base(base: str, *, revision: str | None = None, dtype: str = "auto") -> BaseModel | None:
    """The base model without its weights, from a folder or the local hub cache.

    Returns:
        None where it cannot be known: the model is not on this machine, or transformers has no class of its architecture (vLLM may).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, revision=revision, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError):
        return None
    text = config.get_text_config()
    # A wrapper class may name the same layers otherwise; only the model's own class is sure to name them as training did.
    if type(model).__name__ not in (getattr(config, "architectures", None) or []):
        return None
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    # vLLM's "auto" serves float32 weights in a half precision.
    item_bytes = ITEM_BYTES.get(dtype, 2 if stored == "float32" else ITEM_BYTES.get(stored, 2))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return BaseModel(
        modules={
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        },
        weights_bytes=_weights_bytes(base, config, sum(weight.numel() for weight in model.parameters()) * item_bytes),
        kv_bytes_per_token=2 * text.num_hidden_layers * heads * head_dim * item_bytes,
        item_bytes=item_bytes,
        max_model_len=text.max_position_embeddings,
    )


def check_modules(name: str, folder: str, base: BaseModel) -> str:
    """Compares an artifact's layers with the base model's.

    Args:
        name: served name.
        folder: verified copy of the artifact.

    Returns:
        What was found, for the table.

    Raises:
        ConfigurationError: a layer is absent from the base model or has another shape: the adapter is another model's.
    """
    layers = lora_shapes(Path(folder))
    for module, shape in layers.items():
        expected = base.modules.get(module)
        if expected is None:
            raise ConfigurationError(
                f"adapter {name} changes {module}, and the base model has no linear layer of that name; serve the base model that the "
                "adapter was trained on"
            )
        if expected != shape:
            raise ConfigurationError(
                f"adapter {name} is for a {module} of {shape[0]} x {shape[1]}, the base model's is {expected[0]} x {expected[1]}; serve "
                "the base model that the adapter was trained on"
            )
    return f"{len(layers)} layers of the base model, shapes equal"


def lora_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(n_out, n_in) of every layer that an artifact changes, from its manifest."""
    tensors = json.loads((folder / "manifest.json").read_text())["files"]["adapter_model.safetensors"]["tensors"]
    sides: dict[str, dict[str, Sequence[int]]] = {}
    for tensor, (_, shape) in tensors.items():
        module, _, side = tensor.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        sides.setdefault(module, {})[side] = shape
    return {module: (int(side["B"][0]), int(side["A"][1])) for module, side in sides.items()}


def check_memory(
    base: BaseModel,
    memory: Memory,
    *,
    rank: int,
    modules: Sequence[str],
    slots: int,
    samples: int,
    k: int,
    max_len: int,
) -> str:
    """Estimates what the server will hold: weights, LoRA slots, samples kept beside them, and the KV cache.

    Args:
        rank: --max-lora-rank, the width of every slot.
        modules: last names of the layers that slots have.
        slots: --max-loras.
        samples: samples and means that workers keep in host memory (--max-cpu-loras).
        k: largest K of a request.
        max_len: longest sequence.

    Returns:
        The numbers, for the table.

    Raises:
        ConfigurationError: they do not fit; the message has the numbers.
    """
    widths = sum(
        n_out + n_in for name, (n_out, n_in) in base.modules.items() if name.rpartition(".")[2] in set(modules)
    )
    slot = rank * widths * base.item_bytes
    kept = samples * slot if memory.holds_samples else 0
    fixed = base.weights_bytes + slots * slot + kept
    limit = memory.available if memory.kv_bytes is not None else min(memory.available, int(memory.share * memory.total))
    kv = memory.kv_bytes if memory.kv_bytes is not None else max(limit - fixed, 0)
    parts = f"weights {_gib(base.weights_bytes)} + {slots} LoRA slots {_gib(slots * slot)}"
    if kept:
        parts += f" + {samples} kept samples {_gib(kept)}"
    tokens = kv // base.kv_bytes_per_token
    parts += f" + KV cache {_gib(kv)} ({tokens} tokens: {k} samples of up to {min(tokens // k, max_len)})"
    if fixed + kv > limit or not tokens:
        raise ConfigurationError(
            f"the server needs about {_gib(fixed + max(kv, base.kv_bytes_per_token * k))} ({parts}) and {_gib(limit)} are available; "
            "lower --max-samples, --sample-slots or the KV cache, or serve on a larger machine"
        )
    return f"{parts} = {_gib(fixed + kv)} of {_gib(limit)}"


def check_port(host: str, port: int) -> str:
    """Whether the address can be listened on; raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise ConfigurationError(
                f"--host {host} --port {port} cannot be listened on: {error.strerror}; choose another one"
            ) from error
    return f"{host}:{port} is free" if port else f"{host}, a free port"


def host_memory() -> tuple[int, int]:
    """Total and available bytes of this machine, or of this container if it is limited."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    total, available = fields["MemTotal"], fields["MemAvailable"]
    limit, used = _number(Path("/sys/fs/cgroup/memory.max")), _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None:
        total, available = min(total, limit), min(available, limit - (used or 0))
    return total, available


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _weights_bytes(base: str, config: Any, computed: int) -> int:
    """Quantised weights are as large as their files."""
    if getattr(config, "quantization_config", None) is None or not os.path.isdir(base):
        return computed
    return sum(path.stat().st_size for path in Path(base).glob("*.safetensors")) or computed


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
