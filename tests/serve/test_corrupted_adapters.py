"""Corrupted artifacts offered to a registry that serves a good one: none is taken, each is counted, the good one keeps answering."""

import asyncio
from collections import Counter
from pathlib import Path

from credence.adapters import generate_key, load_artifact, sign
from credence.adapters.errors import REASONS
from credence.adapters.signature import save_key
from credence.serve.errors import ArtifactRefused
from tests.corrupted import fingerprint, signature_variants, variants
from tests.serve.test_adapter_registry import SMALL, World, run
from tests.tiny import make_artifact


def test_no_corrupted_variant_takes_the_place_of_a_good_adapter(tmp_path: Path) -> None:
    good, other = tmp_path / "good", tmp_path / "other"
    key, trust = generate_key(), tmp_path / "trust"
    trust.write_text(save_key(tmp_path / "key", key).read_text())
    for seed, folder in enumerate((good, other)):
        make_artifact(folder, seed=seed, temperature={2: 1.5}, **SMALL)
        sign(folder, key)
    untouched, digest = fingerprint(good), load_artifact(good).digest
    world = World(tmp_path, trust=str(trust))
    refused = Counter[str]()

    async def scenario() -> None:
        await world.registry.load("triage", good)
        go = asyncio.Event()
        go.set()
        held = dict(world.means.held)
        offered = (
            *variants(good, tmp_path / "variants"),
            *signature_variants(good, other, tmp_path / "signed", lambda folder: sign(folder, generate_key())),
        )
        for number, (name, folder) in enumerate(offered):
            assert fingerprint(folder) != untouched, f"{name} is the good artifact"
            replaces = number % 2 == 0
            try:
                await world.registry.load("triage" if replaces else "fresh", folder, replace=replaces)
            except ArtifactRefused as error:
                assert error.message
                refused[error.code] += 1
            else:
                raise AssertionError(f"{name} was accepted")
            assert await world.request("triage", go) == digest, name
        assert world.means.held == held and world.stored == {digest}
        assert world.registry.get("fresh")["state"] == "failed" and "fresh" not in world.adapters

    run(scenario)
    assert refused.total() >= 200 and refused["bad_signature"] and refused["unsigned"]
    assert refused == {
        reason: count
        for reason in REASONS
        if (count := world.count("credence_adapter_integrity_failures_total", reason=reason))
    }
    assert world.count("credence_adapter_loads_total", result="refused") == refused.total()
