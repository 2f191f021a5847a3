"""posterior.json and calibration.json: the fit nearest to a K, and keys that are not theirs."""

import pytest
from pydantic import ValidationError

from credence.adapters import BaseModelRef, Calibration, CurvePoint, Fit, PosteriorConfig
from credence.adapters.config import FileEntry, Manifest


def fits(values: dict[int, float]) -> dict[int, Fit]:
    return {k: Fit(value=value, nll=0.5) for k, value in values.items()}


def config(**changes: object) -> PosteriorConfig:
    fields: dict[str, object] = {
        "kind": "diag",
        "method": "ivon",
        "credence_version": "0",
        "base_model": BaseModelRef(name="base"),
        "rank": 8,
        "lora_alpha": 16.0,
        "target_modules": ("q_proj",),
    }
    return PosteriorConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, 4.0),
        (4, 4.0),
        (5, 4.0),  # 5/4 < 8/5
        (6, 8.0),  # 8/6 < 6/4
        (8, 8.0),
        (16, 8.0),  # 16/8 = 32/16: the smaller K
        (17, 32.0),
        (32, 32.0),
        (1000, 32.0),
    ],
)
def test_the_fit_of_the_nearest_k_in_ratio_is_used(k: int, expected: float) -> None:
    values = {8: 8.0, 32: 32.0, 4: 4.0}  # the order does not matter
    assert config(tau=fits(values)).fitted_tau(k) == expected
    assert Calibration(temperature=fits({0: 9.0, **values})).fitted_temperature(k) == expected


def test_without_a_fit_both_are_one() -> None:
    assert config().fitted_tau(8) == 1.0
    assert Calibration().fitted_temperature(8) == 1.0
    assert Calibration().fitted_temperature(0) == 1.0


def test_the_means_temperature_is_its_own() -> None:
    """K = 0 is another predictor than any average: neither borrows from the other."""
    assert Calibration(temperature=fits({0: 2.0, 8: 1.1})).fitted_temperature(0) == 2.0
    assert Calibration(temperature=fits({8: 1.1})).fitted_temperature(0) == 1.0
    assert Calibration(temperature=fits({0: 2.0})).fitted_temperature(8) == 1.0


def test_documents_round_trip_through_json() -> None:
    curve = (CurvePoint(value=0.0, nll=0.9), CurvePoint(value=1.0, nll=0.4))
    first = config(tau={8: Fit(value=1.0, nll=0.4, curve=curve)}, settings={}, training={"seed": 3, "rows": [1, 2]})
    assert PosteriorConfig.model_validate_json(first.model_dump_json()) == first
    calibration = Calibration(temperature={0: Fit(value=1.3, nll=0.2), 8: Fit(value=1.0, nll=0.1)})
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"kernel": "rbf"}, "kernel"),
        ({"kind": "gaussian"}, "kind"),
        ({"format_version": 2}, "format_version"),
        ({"rank": 0}, "rank"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"generator": "mt19937"}, "generator"),
        ({"default_seed": -1}, "default_seed"),
        ({"settings": {"epsilon": float("nan")}}, "settings.epsilon"),
        ({"tau": {"8": {"value": -1.0, "nll": 0.0}}}, "tau.8.value"),
        ({"tau": {"8": {"value": 1.0, "nll": float("nan")}}}, "tau.8.nll"),
        ({"tau": {"eight": {"value": 1.0, "nll": 0.0}}}, "tau.eight.[key]"),
        ({"base_model": {"name": "b", "sha": "x"}}, "base_model.sha"),
    ],
)
def test_unknown_keys_and_values_out_of_range_are_refused(changes: dict[str, object], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    assert ".".join(str(part) for part in caught.value.errors()[0]["loc"]) == where


def test_documents_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().rank = 4  # type: ignore[misc]


@pytest.mark.parametrize("sha256", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 65])
def test_a_manifest_entry_needs_a_sha256(sha256: str) -> None:
    with pytest.raises(ValidationError):
        Manifest(files={"README.md": FileEntry(size=0, sha256=sha256)})
