"""Maps of the confidence: their values by definition, their inverse, the map of a K, and what is refused on load."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from credence.adapters import (
    ArtifactError,
    BeforeAfter,
    Calibration,
    Fit,
    IsotonicMap,
    PlattMap,
    load_artifact,
    lowest_score,
    probability_correct,
)
from tests.tiny import make_artifact

MEASURED: dict[str, Any] = {
    "rows": 20,
    "correct": 9,
    "nll": BeforeAfter(before=0.9, after=0.5),
    "brier": BeforeAfter(before=0.4, after=0.2),
}
PLATT = PlattMap(slope=2.0, intercept=1.0, **MEASURED)
FLAT = PlattMap(slope=0.0, intercept=-1.0, **MEASURED)
ISOTONIC = IsotonicMap(knots=((-2.0, 0.1), (-1.0, 0.1), (-0.5, 0.6), (-0.25, 0.6), (-0.1, 0.9)), **MEASURED)


@pytest.mark.parametrize("score", [-800.0, -3.0, -0.5, 0.0, 800.0])
def test_platt_is_the_logistic_function(score: float) -> None:
    expected = 1 / (1 + math.exp(-(2 * score + 1))) if abs(score) < 100 else float(score > 0)
    assert probability_correct(PLATT, score) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("score", "expected"),
    [(-math.inf, 0.1), (-9.0, 0.1), (-1.5, 0.1), (-0.75, 0.35), (-0.5, 0.6), (-0.3, 0.6), (-0.2, 0.7), (0.0, 0.9)],
)
def test_isotonic_is_linear_between_its_knots_and_constant_beyond(score: float, expected: float) -> None:
    assert probability_correct(ISOTONIC, score) == pytest.approx(expected, abs=1e-12)


def test_an_impossible_text_has_a_probability_and_nan_is_refused() -> None:
    assert probability_correct(PLATT, -math.inf) == 0
    assert probability_correct(FLAT, -math.inf) == pytest.approx(1 / (1 + math.e))
    with pytest.raises(ValueError, match="NaN"):
        probability_correct(ISOTONIC, math.nan)


@pytest.mark.parametrize("fitted", [PLATT, FLAT, ISOTONIC])
def test_the_lowest_score_is_where_the_threshold_is_reached(fitted: PlattMap | IsotonicMap) -> None:
    """Against a scan: a score is below it exactly if its confidence is below the threshold."""
    scores = [-4 + 4 * i / 997 for i in range(998)]
    for threshold in (0.0, 0.05, 0.1, 0.2, 0.35, 0.599, 0.7, 0.9, 0.95, 1.0):
        lowest = lowest_score(fitted, threshold)
        for score in scores:
            assert (probability_correct(fitted, score) < threshold) == (score < lowest), (score, threshold)


def test_the_map_of_the_nearest_k_is_used_and_the_mean_has_its_own() -> None:
    other = PlattMap(slope=5.0, intercept=0.0, **MEASURED)
    calibration = Calibration(maps={0: FLAT, 4: PLATT, 32: other})
    assert [calibration.fitted_map(k) for k in (0, 1, 4, 11, 12, 100)] == [FLAT, PLATT, PLATT, PLATT, other, other]
    assert Calibration(maps={0: FLAT}).fitted_map(8) is None
    assert Calibration(maps={8: PLATT}).fitted_map(0) is None
    assert Calibration().fitted_map(8) is None


def test_maps_round_trip_and_their_absence_leaves_no_key() -> None:
    calibration = Calibration(temperature={0: Fit(value=1.0, nll=0.1)}, maps={0: PLATT, 8: ISOTONIC})
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
    assert set(calibration.model_dump(mode="json")) == {"temperature", "maps"}
    assert set(Calibration().model_dump(mode="json")) == {"temperature"}  # as releases before maps wrote it


def knots(*pairs: tuple[float, float]) -> dict[str, Any]:
    return {"knots": [list(pair) for pair in pairs]}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (ISOTONIC, knots((-1, 0.5), (-0.5, 0.4))),
        (ISOTONIC, knots((-0.5, 0.4), (-1, 0.5))),
        (ISOTONIC, knots((-1, 0.4), (-1, 0.5))),
        (ISOTONIC, knots((-1, -0.1), (0, 0.5))),
        (ISOTONIC, knots((-1, 0.5), (0, 1.1))),
        (ISOTONIC, knots((-math.inf, 0.5), (0, 0.6))),
        (ISOTONIC, knots((-1, math.nan))),
        (ISOTONIC, knots()),
        (PLATT, {"slope": -0.1}),
        (PLATT, {"slope": math.inf}),
        (PLATT, {"intercept": math.nan}),
        (PLATT, {"temperature": 2.0}),
        (PLATT, {"score": "sum_logprob"}),
        (PLATT, {"kind": "spline"}),
        (PLATT, {"extra": 1}),
    ],
)
def test_a_bad_map_is_refused_and_its_file_named(
    tmp_path: Path, base: PlattMap | IsotonicMap, changes: dict[str, Any]
) -> None:
    artifact = make_artifact(tmp_path / "a", modules=("self_attn.q_proj",), rank=2, alpha=3, temperature={8: 1.5})
    path = artifact.path / "calibration.json"
    document = json.loads(path.read_text())

    def store(fitted: dict[str, Any]) -> None:
        data = json.dumps({**document, "maps": {"8": fitted}}).encode()
        path.write_bytes(data)
        manifest = json.loads((artifact.path / "manifest.json").read_text())
        manifest["files"]["calibration.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (artifact.path / "manifest.json").write_text(json.dumps(manifest))

    good = base.model_dump(mode="json")
    store(good)
    assert load_artifact(artifact.path).calibration.fitted_map(8) == base
    store({**good, **changes})
    with pytest.raises(
        ArtifactError, match=r"calibration\.json(: maps\.8| is not JSON: .* no number of JSON)"
    ) as caught:
        load_artifact(artifact.path)
    assert caught.value.reason == "malformed"
