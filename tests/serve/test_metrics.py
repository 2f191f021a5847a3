"""What the metrics say without a server; test_observability.py compares them with a real one's."""

import pytest
from prometheus_client import CollectorRegistry

from credence.serve.metrics import Metrics, k_label


@pytest.mark.parametrize(("k", "label"), [(0, "0"), (1, "1"), (3, "4"), (8, "8"), (9, "16"), (32, "32"), (1000, "32")])
def test_k_counts_as_the_next_value_up(k: int, label: str) -> None:
    assert k_label(k) == label


def test_every_adapter_begins_at_zero() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, [("triage", "ivon", "sha256:" + "ab12cd34" * 8)])
    metrics.serve("late", "map", "sha256:" + "0" * 64)
    assert registry.get_sample_value(
        "credence_adapter_info", {"adapter": "triage", "method": "ivon", "digest8": "ab12cd34"}
    )
    for adapter in ("triage", "late"):
        for name in ("credence_confidence_count", "credence_epistemic_nats_count", "credence_flagged_total"):
            assert registry.get_sample_value(name, {"adapter": adapter}) == 0


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({"release": {"accuracy": {"0": 0.5, "8": 0.9}, "ece15": {"0": 0.2, "8": 0.04}}}, (0.9, 0.04)),
        ({"release": {"accuracy": {"0": 0.5}, "ece15": {"0": 0.2}}}, (None, None)),
        ({"release": {"accuracy": {"8": 0.9}, "ece15": {}}}, (None, None)),
        ({"release": {"accuracy": {"8": "high"}, "ece15": {"8": 0.1}}}, (None, None)),
        ({"release": {"accuracy": {}, "ece15": {}}}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_the_release_is_shown_where_it_measured_this_k(
    measured: dict[str, object], shown: tuple[float | None, float | None]
) -> None:
    registry = CollectorRegistry()
    Metrics(registry, []).released("triage", measured, 8)
    names = ("credence_adapter_release_accuracy", "credence_adapter_release_ece")
    assert tuple(registry.get_sample_value(name, {"adapter": "triage"}) for name in names) == shown


def test_a_name_moves_to_another_artifact_and_ends() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, [("triage", "ivon", "sha256:" + "a" * 64)])
    metrics.released("triage", {"release": {"accuracy": {"8": 0.9}, "ece15": {"8": 0.1}}}, 8)
    metrics.serve("triage", "map", "sha256:" + "b" * 64)
    (info,) = (family for family in registry.collect() if family.name == "credence_adapter_info")
    assert [sample.labels for sample in info.samples] == [{"adapter": "triage", "method": "map", "digest8": "b" * 8}]
    assert registry.get_sample_value("credence_adapter_release_accuracy", {"adapter": "triage"}) is None
    metrics.withdraw("triage")
    assert not any(sample.labels.get("adapter") for family in registry.collect() for sample in family.samples)
