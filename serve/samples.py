"""Posterior samples as LoRA slots: what a sample is called, and which slot holds it.

vLLM knows a LoRA by (integer id, name, path), caches prompts by name and path, and never looks at the content. So a sample's path
spells out its whole identity (artifact digest, seed, index, tau), names come from a small fixed set (they end up in metric labels), and
an integer id is never given to a second content. A slot is leased by requests; only an idle slot is given to another sample.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qs, urlencode

SCHEME = "credence:?"
Layout = Literal["shared", "delta"]
"""``shared``: the sample's own factors. ``delta``: its difference from the mean, for a model that the mean is merged into."""
_LAYOUTS: dict[str, Layout] = {"shared": "shared", "delta": "delta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """Identity of one posterior sample.

    Attributes:
        store: absolute path of the verified copy of the artifact.
        digest: ``sha256:<64 hex>`` of the artifact.
        seed, index, tau: arguments of ``Artifact.draw``.
        layout: which factors the worker makes of the draw.
    """

    store: str
    digest: str
    seed: int
    index: int
    tau: float
    layout: Layout = "shared"

    def to_path(self) -> str:
        """The ``lora_path`` under which a vLLM worker draws this sample."""
        fields = {
            "store": self.store,
            "digest": self.digest,
            "seed": self.seed,
            "index": self.index,
            "tau": repr(self.tau),
            "layout": self.layout,
        }
        return SCHEME + urlencode(fields)

    @classmethod
    def parse(cls, path: str) -> "SampleRef":
        """Inverse of :meth:`to_path`.

        Raises:
            ValueError: if ``path`` is not of that form.
        """
        fields = parse_qs(path.removeprefix(SCHEME), strict_parsing=True) if path.startswith(SCHEME) else {}
        if set(fields) != {"store", "digest", "seed", "index", "tau", "layout"} or any(
            len(values) != 1 for values in fields.values()
        ):
            raise ValueError(
                f"{path!r} does not name a posterior sample ({SCHEME}store=..&digest=..&seed=..&index=..&tau=..&layout=..)"
            )
        value = {key: values[0] for key, values in fields.items()}
        layout = _LAYOUTS.get(value["layout"])
        if layout is None:
            raise ValueError(f"{path!r} has the layout {value['layout']!r}; there are {', '.join(_LAYOUTS)}")
        return cls(
            store=value["store"],
            digest=value["digest"],
            seed=int(value["seed"]),
            index=int(value["index"]),
            tau=float(value["tau"]),
            layout=layout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One sample in one slot: the three things vLLM calls a LoRA by."""

    lora_id: int
    name: str
    ref: SampleRef


class NoFreeSlot(Exception):
    """Every slot is leased to running requests."""


class SampleSlots:
    """Least-recently-used table of the samples that hold a slot.

    Args:
        num_slots: how many samples may hold a slot at once (>= the largest K).
        lora_ids: source of integer ids never used before, shared with whoever else names LoRAs to the engine.
    """

    def __init__(self, num_slots: int, lora_ids: "itertools.count[int]") -> None:
        self.num_slots = num_slots
        self._lora_ids = lora_ids
        self._slots: OrderedDict[SampleRef, Slot] = OrderedDict()
        self._leases: dict[SampleRef, int] = {}
        self._pinned: set[SampleRef] = set()
        self._names = [f"credence-slot-{number:03d}" for number in reversed(range(num_slots))]

    def lease(self, refs: Sequence[SampleRef]) -> tuple[list[Slot], list[Slot]]:
        """Leases a slot for each sample, all or none.

        Returns:
            The slots in the order of ``refs``, and those whose samples were displaced (tell the engine to forget their ids).

        Raises:
            NoFreeSlot: if fewer slots are idle than are needed; nothing was leased.
        """
        wanted = set(refs)
        new = [ref for ref in dict.fromkeys(refs) if ref not in self._slots]
        idle = [ref for ref in self._slots if not self._leases.get(ref) and ref not in wanted]
        idle.sort(key=self._pinned.__contains__)  # stable: the least recently used first, pinned ones last
        shortage = len(new) - len(self._names)
        if shortage > len(idle):
            raise NoFreeSlot(
                f"{len(new)} new samples need a slot, {len(self._names) + len(idle)} of {self.num_slots} are free"
            )
        displaced = [self._slots.pop(ref) for ref in idle[: max(shortage, 0)]]
        self._names.extend(slot.name for slot in displaced)
        for ref in new:
            self._slots[ref] = Slot(lora_id=next(self._lora_ids), name=self._names.pop(), ref=ref)
        for ref in refs:
            self._slots.move_to_end(ref)
            self._leases[ref] = self._leases.get(ref, 0) + 1
        return [self._slots[ref] for ref in refs], displaced

    def pin(self, refs: Iterable[SampleRef]) -> None:
        """Keeps samples in their slots for as long as any other idle sample can make room."""
        self._pinned.update(refs)

    def release(self, refs: Sequence[SampleRef]) -> None:
        """Ends one lease of each sample; the samples stay in their slots until the slots are needed."""
        for ref in refs:
            self._leases[ref] -= 1
            if not self._leases[ref]:
                del self._leases[ref]

    def discard(self, refs: Iterable[SampleRef]) -> None:
        """Empties the idle slots of samples that the engine does not hold."""
        for ref in refs:
            if ref in self._slots and not self._leases.get(ref):
                self._names.append(self._slots.pop(ref).name)

    def forget(self, digest: str) -> list[Slot]:
        """Empties the idle slots of an artifact's samples and unpins them.

        Returns:
            Their slots (tell the engine to forget their ids).
        """
        self._pinned = {ref for ref in self._pinned if ref.digest != digest}
        gone = [ref for ref in self._slots if ref.digest == digest and not self._leases.get(ref)]
        slots = [self._slots.pop(ref) for ref in gone]
        self._names.extend(slot.name for slot in slots)
        return slots

    def resident(self) -> list[SampleRef]:
        """The samples that hold a slot, least recently used first."""
        return list(self._slots)

    def counts(self) -> dict[str, int]:
        """Slots by state: leased, resident (idle but filled), free."""
        leased = len(self._leases)
        return {"leased": leased, "resident": len(self._slots) - leased, "free": len(self._names)}
