import math
from pathlib import Path

import pytest
import torch

from credence.adapters import (
    Artifact,
    BaseModelRef,
    DiagPosterior,
    LoraFactors,
    PointPosterior,
    Posterior,
    PosteriorConfig,
    PosteriorError,
    RowPosterior,
    load_artifact,
    write_artifact,
)
from credence.adapters.precision import SERVING_DTYPES, check_precision, ulp

RANK, WIDTH = 4, 256


def artifact(path: Path, posterior: Posterior, *, mean: LoraFactors | None = None, lora_alpha: float = 4.0) -> Artifact:
    mean = mean or LoraFactors(A=torch.full((RANK, WIDTH), 0.75), B=torch.full((WIDTH, RANK), 0.75))
    config = PosteriorConfig(
        kind=posterior.kind,  # type: ignore[arg-type]
        method="test",
        credence_version="0",
        base_model=BaseModelRef(name="base"),
        rank=RANK,
        lora_alpha=lora_alpha,
        target_modules=("q_proj",),
        settings={"epsilon": 0.01, "dof": 4.0, "floor": 1e-3} if posterior.kind == "row" else {},
    )
    write_artifact(
        path,
        adapter_config={"peft_type": "LORA", "r": RANK, "lora_alpha": lora_alpha, "target_modules": ["q_proj"]},
        mean={"layers.0.q_proj": mean},
        posteriors={"layers.0.q_proj": posterior},
        config=config,
    )
    return load_artifact(path)


@pytest.mark.parametrize("dtype", SERVING_DTYPES.values())
@pytest.mark.parametrize("value", [1.0, 0.75, -3.1, 1e-3, 65504.0, 1.1e-5, 3e-8])
def test_ulp_is_the_gap_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    stored = torch.tensor(value, dtype=dtype)
    if stored == 0 or not bool(torch.isfinite(stored)):
        pytest.skip("not representable")
    infinity = torch.tensor(math.inf, dtype=dtype)
    gap = (torch.nextafter(stored.abs(), infinity).double() - stored.abs().double()).item()
    if math.isinf(gap):
        pytest.skip("the largest number has no next one")
    assert ulp(stored.double(), dtype).item() == gap


def test_ulp_of_zero_is_the_smallest_number() -> None:
    assert ulp(torch.zeros(1), torch.float16).item() == 2.0**-24
    assert ulp(torch.zeros(1), torch.bfloat16).item() == 2.0**-133


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_a_diagonal_posterior_against_its_known_noise(tmp_path: Path, tau: float) -> None:
    # At 0.75 the spacing of bfloat16 is 2^-8, of float16 2^-11 and of float32 2^-24.
    sd = 1.25 * 2.0**-9
    posterior = DiagPosterior(log_sd_A=torch.full((RANK, WIDTH), math.log(sd)))
    report = check_precision(artifact(tmp_path / "a", posterior), tau=tau)
    (entry,) = report.factors
    served = sd * math.sqrt(tau)
    assert entry.sd_over_ulp["bfloat16"] == pytest.approx(served * 2**8, rel=0.05)
    assert entry.sd_over_ulp["float16"] == pytest.approx(served * 2**11, rel=0.05)
    assert entry.sd_over_ulp["float32"] == pytest.approx(served * 2**24, rel=0.05)
    assert entry.sd_over_rms == pytest.approx(served / 0.75, rel=0.05)
    assert report.below_one_ulp("bfloat16") == (("layers.0.q_proj.lora_A",) if tau == 1.0 else ())
    assert report.below_one_ulp("float16") == ()
    assert report.median_sd_over_ulp("bfloat16") == entry.sd_over_ulp["bfloat16"]


def test_the_check_is_what_rounding_does(tmp_path: Path) -> None:
    posterior = DiagPosterior(log_sd_A=torch.full((RANK, WIDTH), math.log(2.0**-12)))
    loaded = artifact(tmp_path / "a", posterior)
    assert check_precision(loaded, tau=1.0).below_one_ulp("bfloat16")
    drawn = loaded.draw(seed=0, index=0, tau=1.0)["layers.0.q_proj"].A
    kept = (drawn.bfloat16() != loaded.mean["layers.0.q_proj"].A.bfloat16()).float().mean()
    assert kept < 0.01


def test_b_is_checked_after_the_scaling_vllm_folds_into_it(tmp_path: Path) -> None:
    # 3 * 0.75 = 2.25 lies two binades up: the noise grows by 3, the spacing by 4.
    posterior = DiagPosterior(log_sd_B=torch.full((WIDTH, RANK), math.log(2.0**-9)))
    plain = check_precision(artifact(tmp_path / "a", posterior), tau=1.0).factors[0]
    scaled = check_precision(artifact(tmp_path / "b", posterior, lora_alpha=12.0), tau=1.0).factors[0]
    assert scaled.sd_over_ulp["bfloat16"] == pytest.approx(0.75 * plain.sd_over_ulp["bfloat16"], rel=1e-6)
    assert scaled.sd_over_rms == pytest.approx(plain.sd_over_rms, rel=1e-6)


def test_a_row_posterior_scales_with_tau(tmp_path: Path) -> None:
    loaded = artifact(
        tmp_path / "a",
        RowPosterior(rho=torch.zeros(RANK), beta=torch.zeros(4), epsilon=0.01, dof=4.0),
    )
    one, four = (check_precision(loaded, tau=tau).factors[0].sd_over_ulp["bfloat16"] for tau in (1.0, 4.0))
    assert four == pytest.approx(2 * one, rel=1e-3)


def test_a_factor_of_zeros_has_no_relative_noise(tmp_path: Path) -> None:
    mean = LoraFactors(A=torch.full((RANK, WIDTH), 0.75), B=torch.zeros(WIDTH, RANK))
    posterior = DiagPosterior(log_sd_B=torch.full((WIDTH, RANK), -3.0))
    (entry,) = check_precision(artifact(tmp_path / "a", posterior, mean=mean), tau=1.0).factors
    assert entry.sd_over_rms is None
    assert entry.sd_over_ulp["float16"] > 1e5


def test_a_noisy_b_does_not_hide_an_a_whose_noise_rounds_away(tmp_path: Path) -> None:
    mean = LoraFactors(A=torch.full((RANK, WIDTH), 0.75), B=torch.zeros(2 * WIDTH, RANK))
    posterior = DiagPosterior(
        log_sd_A=torch.full((RANK, WIDTH), math.log(2.0**-12)), log_sd_B=torch.full((2 * WIDTH, RANK), -3.0)
    )
    report = check_precision(artifact(tmp_path / "a", posterior, mean=mean), tau=1.0)
    assert [entry.factor for entry in report.factors] == ["A", "B"]
    assert report.below_one_ulp("bfloat16") == ("layers.0.q_proj.lora_A",)


def test_without_noise_there_is_nothing_to_report(tmp_path: Path) -> None:
    report = check_precision(artifact(tmp_path / "a", PointPosterior()), tau=1.0)
    assert report.factors == () and report.median_sd_over_ulp("bfloat16") is None
    noisy = artifact(tmp_path / "b", DiagPosterior(log_sd_A=torch.zeros(RANK, WIDTH)))
    assert check_precision(noisy, tau=0.0).factors == ()


def test_bad_arguments(tmp_path: Path) -> None:
    loaded = artifact(tmp_path / "a", PointPosterior())
    with pytest.raises(PosteriorError, match="tau must be"):
        check_precision(loaded, tau=-1.0)
    with pytest.raises(ValueError, match="num_draws is 0"):
        check_precision(loaded, tau=1.0, num_draws=0)
