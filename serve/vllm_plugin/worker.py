"""Draws posterior samples inside the vLLM worker.

A LoRA request whose path is a ``SampleRef`` (``credence:?store=..&digest=..&seed=..&index=..&tau=..&layout=..``) is not a
folder: the worker opens the artifact, draws the sample and hands its factors to vLLM as if they had been read from a plain LoRA folder;
in the layout ``delta`` those of its difference from the mean. The draw is a pure function of the path, so every tensor-parallel rank,
and every reload after an eviction, gets the same bits.
"""

import functools
import logging
import threading
from collections import OrderedDict
from typing import Any

from credence.adapters.artifact import Artifact, config_of_rank, load_artifact, peft_tensors
from credence.adapters.errors import AdapterError, ArtifactError
from credence.adapters.merged import delta
from credence.serve.engine import SampleLoadError
from credence.serve.samples import SCHEME, SampleRef

logger = logging.getLogger(__name__)

MAX_OPEN_ARTIFACTS = 8


class ArtifactCache:
    """The artifacts this process has opened, by digest, least recently used first.

    Opened artifacts stay in memory, so that a sample that lost its slot can be drawn again although its folder has been removed.
    """

    def __init__(self, capacity: int = MAX_OPEN_ARTIFACTS) -> None:
        self.capacity = capacity
        self._artifacts: OrderedDict[str, Artifact] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._artifacts)

    def get(self, ref: SampleRef) -> Artifact:
        """Returns the artifact of a sample, reading and verifying it if it is not open.

        Raises:
            ArtifactError: if it cannot be read, or the folder holds another artifact than ``ref.digest`` (reason hash_mismatch).
        """
        with self._lock:
            artifact = self._artifacts.get(ref.digest)
            if artifact is None:
                artifact = load_artifact(ref.store)
                if artifact.digest != ref.digest:
                    raise ArtifactError(
                        f"{ref.store} holds {artifact.digest}, the sample belongs to {ref.digest}",
                        reason="hash_mismatch",
                        path=ref.store,
                    )
                self._artifacts[ref.digest] = artifact
                while len(self._artifacts) > self.capacity:
                    self._artifacts.popitem(last=False)
            self._artifacts.move_to_end(ref.digest)
            return artifact


_artifacts = ArtifactCache()


def install() -> None:
    """Teaches this process's vLLM worker to load ``credence:`` paths; every other path is vLLM's business. Safe to call twice.

    Raises:
        RuntimeError: if this vLLM has no ``WorkerLoRAManager._load_adapter``.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = getattr(WorkerLoRAManager, "_load_adapter", None)
    if original is None:
        raise RuntimeError("this vLLM has no WorkerLoRAManager._load_adapter: it is not a supported version")
    if getattr(original, "credence_draws", False):
        return

    @functools.wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        if not lora_request.lora_path.startswith(SCHEME):
            return original(self, lora_request)
        return load_sample(self, lora_request, _artifacts)

    _load_adapter.credence_draws = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = _load_adapter


def load_sample(manager: Any, lora_request: Any, artifacts: ArtifactCache) -> Any:
    """Draws the sample a LoRA request names and builds vLLM's LoRAModel of it, with vLLM's own checks.

    Args:
        manager: vLLM's WorkerLoRAManager.
        lora_request: its ``lora_path`` is ``SampleRef.to_path()``.

    Raises:
        SampleLoadError: if the path is malformed, the artifact is refused, or the adapter does not fit the served model.
    """
    path = lora_request.lora_path
    try:
        ref = SampleRef.parse(path)
        artifact = artifacts.get(ref)
        factors, config = artifact.draw(seed=ref.seed, index=ref.index, tau=ref.tau), artifact.adapter_config
        if ref.layout == "delta":
            factors = delta(factors, artifact.mean)
        config = config_of_rank(config, factors)
        # peft_tensors copies, and it has to: vLLM folds alpha / r into B in place, and a factor without noise is the artifact's own tensor.
        return _lora_model(manager, lora_request, config, peft_tensors(factors), set(artifact.mean))
    except (AdapterError, ValueError, OSError) as error:
        raise SampleLoadError(f"{error} (sample {path})") from error


def _lora_model(
    manager: Any, lora_request: Any, adapter_config: dict[str, Any], tensors: dict[str, Any], modules: set[str]
) -> Any:
    from vllm.lora.peft_helper import PEFTHelper

    adapters, model = manager._adapter_manager, manager._adapter_manager.model
    config = {**adapter_config, "vllm_max_position_embeddings": manager.max_position_embeddings}
    helper = PEFTHelper.from_dict(config)
    helper.validate_legal(manager.lora_config)
    served = {
        name
        for module in adapters.supported_lora_modules
        for name in adapters.packed_modules_mapping.get(module, [module])
    }
    unknown = sorted({module for module in modules if module.rpartition(".")[2] not in served})
    if unknown:
        raise ValueError(f"the adapter has modules {unknown}, the served model takes LoRA on {sorted(served)}")
    # Models rename some weights (vision-language wrappers); LoRA needs the renames, not the stacking.
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    lora = manager._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_request.lora_int_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    lora.is_3d_lora_weight = lora_request.is_3d_lora_weight
    adapters._validate_moe_lora_format(lora)
    adapters._validate_modules_to_save(lora)
    adapters._validate_token_classification_lora(lora)
    return lora
