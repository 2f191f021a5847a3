from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from credence.adapters import (
    BaseModelRef,
    Calibration,
    DiagPosterior,
    Fit,
    LoraFactors,
    PointPosterior,
    Posterior,
    PosteriorConfig,
    write_artifact,
)
from credence.adapters.config import PlattMap
from credence.cli.main import run

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
RANK, WIDTH = 2, 32


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def credence(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line as the console script does."""

    def invoke(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return invoke


def write(
    path: Path,
    *,
    log_sd: float | None = -3.0,
    tau: float | None = 4.0,
    temperature: float | None = 1.3,
    maps: dict[int, PlattMap] | None = None,
) -> str:
    """Write a small artifact: kind diag with one log standard deviation, or kind point."""
    torch.manual_seed(0)
    mean = {name: LoraFactors(A=torch.rand(RANK, WIDTH) + 0.5, B=torch.rand(WIDTH, RANK) + 0.5) for name in MODULES}
    posteriors: dict[str, Posterior] = {name: PointPosterior() for name in MODULES}
    if log_sd is not None:
        posteriors = {name: DiagPosterior(log_sd_A=torch.full((RANK, WIDTH), log_sd)) for name in MODULES}
    config = PosteriorConfig(
        kind="point" if log_sd is None else "diag",
        method="map" if log_sd is None else "ivon",
        credence_version="0.1.0",
        base_model=BaseModelRef(name="tiny", revision="abc"),
        rank=RANK,
        lora_alpha=4.0,
        target_modules=("q_proj", "v_proj"),
        tau={} if tau is None else {8: Fit(value=tau, nll=0.5)},
    )
    calibration = None
    if temperature is not None:
        calibration = Calibration(temperature={8: Fit(value=temperature, nll=0.4)}, maps=maps or {})
    adapter_config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}
    return write_artifact(
        path,
        adapter_config=adapter_config,
        mean=mean,
        posteriors=posteriors,
        config=config,
        calibration=calibration,
    )
