"""Slots: identities never shared, leases never taken away, bounded names."""

import itertools
import random

import pytest

from credence.serve.samples import Layout, NoFreeSlot, SampleRef, SampleSlots


def ref(
    index: int,
    *,
    seed: int = 0,
    tau: float = 1.0,
    digest: str = "sha256:" + "a" * 64,
    layout: Layout = "shared",
) -> SampleRef:
    return SampleRef(store="/store/a b&c=d", digest=digest, seed=seed, index=index, tau=tau, layout=layout)


@pytest.mark.parametrize("layout", ["shared", "delta"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1 / 3, 1e-30, 316.22776601683796])
def test_paths_round_trip(tau: float, layout: Layout) -> None:
    original = ref(3, seed=2**63 - 1, tau=tau, layout=layout)
    assert SampleRef.parse(original.to_path()) == original


def test_samples_are_their_own_factors_unless_said_otherwise() -> None:
    assert SampleRef(store="/a", digest="d", seed=0, index=0, tau=1.0).layout == "shared"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a/folder",
        "credence:?store=/a",
        "credence:?",
        "credence:?seed=1&seed=2",
        ref(0).to_path().replace("layout=shared", "layout=merged"),
        ref(0).to_path().replace("&layout=shared", ""),
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError):
        SampleRef.parse(path)


def test_every_part_of_the_identity_changes_the_path() -> None:
    variants = [
        ref(0),
        ref(1),
        ref(0, seed=1),
        ref(0, tau=2.0),
        ref(0, digest="sha256:" + "b" * 64),
        ref(0, layout="delta"),
    ]
    assert len({variant.to_path() for variant in variants}) == len(variants)


def test_a_second_content_never_gets_the_id_of_the_first() -> None:
    slots = SampleSlots(1, itertools.count(1))
    [first], displaced = slots.lease([ref(0)])
    assert displaced == []
    slots.release([ref(0)])
    [second], displaced = slots.lease([ref(1)])
    assert displaced == [first]
    assert second.name == first.name, "names are few"
    assert second.lora_id != first.lora_id


def test_leased_slots_are_never_taken() -> None:
    slots = SampleSlots(2, itertools.count(1))
    slots.lease([ref(0), ref(1)])
    with pytest.raises(NoFreeSlot, match="1 new samples need a slot, 0 of 2 are free"):
        slots.lease([ref(2)])
    slots.release([ref(0)])
    _, displaced = slots.lease([ref(2)])
    assert [slot.ref for slot in displaced] == [ref(0)]


def test_the_least_recently_used_idle_sample_goes_first() -> None:
    slots = SampleSlots(3, itertools.count(1))
    for index in (0, 1, 2, 0):
        slots.lease([ref(index)])
        slots.release([ref(index)])
    _, displaced = slots.lease([ref(3)])
    assert [slot.ref.index for slot in displaced] == [1]


def test_pinned_samples_go_last_but_go() -> None:
    """An adapter's resident set stays while another idle sample can make room; a request is never refused for the sake of a pin."""
    slots = SampleSlots(3, itertools.count(1))
    slots.pin([ref(0), ref(1)])
    for index in (0, 1, 2):
        slots.lease([ref(index)])
        slots.release([ref(index)])
    for index, gone in ((3, 2), (4, 3)):
        _, displaced = slots.lease([ref(index)])
        assert [slot.ref.index for slot in displaced] == [gone], "the pinned ones are older"
        slots.release([ref(index)])
    _, displaced = slots.lease([ref(4), ref(5), ref(6)])
    assert [slot.ref.index for slot in displaced] == [0, 1]


def test_one_sample_for_all_members_takes_one_slot() -> None:
    """tau = 0: every member is the mean."""
    slots = SampleSlots(2, itertools.count(1))
    leased, _ = slots.lease([ref(0)] * 8)
    assert len({slot.lora_id for slot in leased}) == 1
    assert slots.counts() == {"leased": 1, "resident": 0, "free": 1}
    slots.release([ref(0)] * 8)
    assert slots.counts() == {"leased": 0, "resident": 1, "free": 1}


def test_random_traffic_against_a_model() -> None:
    generator = random.Random(0)
    slots = SampleSlots(6, itertools.count(1))
    held: dict[SampleRef, int] = {}
    leases: list[list[SampleRef]] = []
    contents: dict[int, SampleRef] = {}
    loaded: dict[int, str] = {}
    for _ in range(4000):
        if leases and generator.random() < 0.5:
            refs = leases.pop(generator.randrange(len(leases)))
            slots.release(refs)
            for one in refs:
                held[one] -= 1
            continue
        refs = [ref(generator.randrange(10), seed=generator.randrange(2)) for _ in range(generator.randint(1, 4))]
        in_use = {one for one, count in held.items() if count}
        try:
            leased, displaced = slots.lease(refs)
        except NoFreeSlot:
            assert len(in_use | set(refs)) > 6
            continue
        for slot in displaced:
            assert slot.ref not in in_use | set(refs)
            del loaded[slot.lora_id]
        for one, slot in zip(refs, leased, strict=True):
            assert slot.ref == one
            assert contents.setdefault(slot.lora_id, one) == one, "an id got a second content"
            loaded[slot.lora_id] = slot.name
            held[one] = held.get(one, 0) + 1
        leases.append(refs)
        assert len(loaded) <= 6
        assert len(set(loaded.values())) == len(loaded), "a name is used twice"
    assert sum(slots.counts().values()) == 6
