"""What the ensemble needs of an engine. vLLM's side of it is serve/vllm_plugin; tests drive a fake one."""

from dataclasses import dataclass
from typing import Protocol

from credence.serve.samples import Slot


class SampleLoadError(Exception):
    """The engine could not draw or register a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Hard limits of the engine, checked at the door so that no group waits for room that can never come.

    Attributes:
        max_num_seqs: sequences in one batch.
        max_loras: distinct adapters in one batch.
        num_kv_blocks, block_size: the KV cache, in blocks and tokens per block.
        max_lora_rank: largest rank of an adapter.
        lora_modules: last names of the modules that take LoRA; None for all.
    """

    max_num_seqs: int
    max_loras: int
    num_kv_blocks: int
    block_size: int
    max_lora_rank: int = 512
    lora_modules: frozenset[str] | None = None


class SampleEngine(Protocol):
    """Loads and forgets posterior samples."""

    async def load(self, slot: Slot) -> None:
        """Draws ``slot.ref`` in every worker under ``slot.lora_id``; raises SampleLoadError."""
        ...

    async def unload(self, lora_id: int) -> None:
        """Forgets a sample; unknown ids are ignored."""
        ...
