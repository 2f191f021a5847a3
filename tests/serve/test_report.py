"""The confidence of free text by a stored map: what is served equals the offline function, and where the map does not apply."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from credence.adapters import Artifact, BeforeAfter, Calibration, Fit, IsotonicMap, PlattMap, probability_correct
from credence.serve.ensemble import Plan, ServedAdapter
from credence.serve.report import describe, sequence_confidence
from credence.serve.schemas import UncertaintyOptions
from credence.serve.step_stats import StepTable
from tests.tiny import make_artifact

MEASURED: dict[str, Any] = {
    "rows": 20,
    "correct": 9,
    "nll": BeforeAfter(before=0.9, after=0.5),
    "brier": BeforeAfter(before=0.4, after=0.2),
}
MEAN_MAP = PlattMap(slope=1.5, intercept=0.5, **MEASURED)
MAP = IsotonicMap(knots=((-1.0, 0.2), (-0.4, 0.2), (-0.2, 0.8)), **MEASURED)
LOG_PROBS = [-0.1, -0.5]
TEMPERED = [-0.7, -0.9]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    small = {"modules": ("self_attn.q_proj",), "rank": 2, "alpha": 3}
    return make_artifact(tmp_path_factory.mktemp("report") / "a", training={"format": "completion"}, **small)


def plan_of(artifact: Artifact, *, training: dict[str, Any] | None = None, tau: float = 1.0, **options: Any) -> Plan:
    fits = {k: Fit(value=2.0, nll=0.1) for k in (0, 4)}
    changed = Artifact(
        **{
            **{name: getattr(artifact, name) for name in artifact.__dataclass_fields__},
            "calibration": Calibration(temperature=fits, maps={0: MEAN_MAP, 4: MAP}),
            "config": artifact.config.model_copy(update={"training": training or {"format": "completion"}}),
        }
    )
    return Plan(
        adapter=ServedAdapter(name="a", artifact=changed),
        options=UncertaintyOptions.model_validate(options),
        num_samples=2,
        min_samples=2,
        tau=tau,
        seed=0,
    )


def table(log_probs: list[float] = LOG_PROBS, samples: int = 2) -> StepTable:
    steps = len(log_probs)
    zeros = np.zeros(steps)
    return StepTable(
        token_id=np.arange(steps),
        log_prob=np.array(log_probs),
        total=zeros,
        aleatoric=zeros,
        epistemic=zeros,
        variation_ratio=zeros,
        calibrated_log_prob=np.array(TEMPERED),
        member_log_probs=np.tile(np.array(log_probs)[:, None], (1, samples)),
        top_tokens=np.zeros((steps, 0), dtype=np.int64),
        top_log_probs=np.zeros((steps, 0)),
        member_tokens=np.zeros((steps, samples), dtype=np.int64),
        member_token_log_probs=np.tile(np.array(log_probs)[:, None] / 2, (1, samples)),
    )


def test_the_served_confidence_is_the_map_of_the_mean_log_probability_at_temperature_one(artifact: Artifact) -> None:
    document = describe(plan_of(artifact, threshold=0.51), 2, table(), ["a", "b"]).to_json()
    assert document["confidence"] == probability_correct(MAP, -0.3) == pytest.approx(0.5)
    assert document["calibrated"] is True and document["flag"] == "low_confidence"
    assert document["sequence"]["mean_logprob"] == pytest.approx(-0.3)  # not touched


def test_at_tau_zero_it_is_the_means_map(artifact: Artifact) -> None:
    assert sequence_confidence(plan_of(artifact, tau=0.0), table()) == (probability_correct(MEAN_MAP, -0.3), True)


def test_without_calibration_it_is_the_geometric_mean(artifact: Artifact) -> None:
    assert sequence_confidence(plan_of(artifact, calibrated=False), table()) == (pytest.approx(math.exp(-0.3)), False)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"format": "label", "label_tokens": [10, 40]}, (math.exp(-0.7), True)),
        ({"format": "choices"}, (math.exp(-0.3), False)),
    ],
)
def test_labels_and_choices_take_no_map(
    artifact: Artifact, training: dict[str, Any], expected: tuple[float, bool]
) -> None:
    assert sequence_confidence(plan_of(artifact, training=training), table()) == pytest.approx(expected)


def test_a_text_that_is_impossible_is_the_least_confident(artifact: Artifact) -> None:
    assert sequence_confidence(plan_of(artifact), table([-math.inf, -0.5])) == (0.2, True)


def test_an_old_artifact_keeps_its_temperature(artifact: Artifact, tmp_path: Path) -> None:
    small = {"modules": ("self_attn.q_proj",), "rank": 2, "alpha": 3}
    old = make_artifact(tmp_path / "old", temperature={4: 2.0}, training={"format": "completion"}, **small)
    plan = Plan(
        adapter=ServedAdapter(name="a", artifact=old),
        options=UncertaintyOptions(),
        num_samples=2,
        min_samples=2,
        tau=1.0,
        seed=0,
    )
    assert sequence_confidence(plan, table()) == (pytest.approx(math.exp(-0.8)), True)


def test_what_each_sample_says_of_a_token_comes_with_its_favourites(artifact: Artifact) -> None:
    recorded = table()
    recorded.member_log_probs[:] = [[-0.25, -math.inf], [-1.5, -0.125]]
    recorded.member_token_log_probs[:] = [[-0.25, -0.5], [-0.75, -0.125]]
    token = {"granularity": "token"}
    plan = plan_of(artifact, **token, return_samples=True)
    with_samples = describe(plan, 2, recorded, ["a", "b"], favourites=[["a", "c"], ["d", "b"]]).to_json()
    assert [entry["member_logprobs"] for entry in with_samples["tokens"]] == [[-0.25, None], [-1.5, -0.125]]
    assert [entry["member_tops"] for entry in with_samples["tokens"]] == [
        [{"token": "a", "logprob": -0.25}, {"token": "c", "logprob": -0.5}],
        [{"token": "d", "logprob": -0.75}, {"token": "b", "logprob": -0.125}],
    ]
    without = describe(plan_of(artifact, **token), 2, recorded, ["a", "b"]).to_json()
    assert all("member_logprobs" not in entry and "member_tops" not in entry for entry in without["tokens"])
    assert "tokens" not in describe(plan_of(artifact, return_samples=True), 2, recorded, ["a", "b"]).to_json()
