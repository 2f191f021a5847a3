"""SWA and SWAG against the stored iterates of a run, and the refusal of runs that are too short."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from credence.adapters.artifact import load_artifact
from credence.adapters.kinds import LowRankPosterior
from credence.adapters.posterior import LoraFactors
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.methods import Plan, Swa, Swag
from credence.training.methods.swag import SwagSettings, SwaSettings
from credence.training.modeling import MemberSite
from tests.adapters.kinds.moments import draws
from tests.training.conftest import quick_config

MODULE = "model.layers.0.self_attn.q_proj"
SIZE = 3 * 5 + 7 * 3


def plan(num_steps: int) -> Plan:
    return Plan(num_steps=num_steps, steps_per_epoch=num_steps, num_rows=8)


def site_of(generator: torch.Generator) -> MemberSite:
    A, B = torch.randn(3, 5, generator=generator), torch.randn(7, 3, generator=generator)
    return MemberSite(MODULE, LoraFactors(A=A, B=B))


def walk(method: Swa, site: MemberSite, steps: range, generator: torch.Generator) -> dict[int, Tensor]:
    """A random walk of A and B, as an optimiser makes; returns the iterates [P] by step, float64."""
    iterates = {}
    for step in steps:
        with torch.no_grad():
            site.mean.A.add_(0.1 * torch.randn(3, 5, generator=generator))
            site.mean.B.add_(0.1 * torch.randn(7, 3, generator=generator))
        method.end_step(step)
        iterates[step] = torch.cat([site.mean.A.flatten(), site.mean.B.flatten()]).detach().double()
    return iterates


@pytest.mark.parametrize(
    ("steps", "settings", "collected"),
    [
        (10, {}, [6, 7, 8, 9, 10]),
        (7, {}, [4, 5, 6, 7]),
        (10, {"start": 0.4, "interval": 3}, [7, 10]),
        (9, {"start": 0.0, "interval": 2}, [2, 4, 6, 8]),
        (200, {}, list(range(102, 201, 2))),
    ],
)
def test_the_iterates_that_are_averaged(steps: int, settings: dict[str, Any], collected: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    site = site_of(generator)
    method = Swa(SwaSettings(**settings), [site])
    method.begin_training(plan(steps))
    iterates = walk(method, site, range(1, steps + 1), generator)
    assert method.collected == len(collected)
    average = torch.stack([iterates[step] for step in collected]).mean(0)
    mean = method.mean()[MODULE]
    assert (mean.A.shape, mean.B.shape, mean.A.dtype) == ((3, 5), (7, 3), torch.float32)
    torch.testing.assert_close(torch.cat([mean.A.flatten(), mean.B.flatten()]), average.float())
    assert method.posteriors()[MODULE].tensors() == {}


@pytest.mark.parametrize("rank", [4, 12, 20])
def test_swags_moments_are_those_of_the_stored_iterates(rank: int) -> None:
    """12 iterates; the deviations are from the mean of the iterates so far, the last ``rank`` of them."""
    generator = torch.Generator().manual_seed(0)
    site = site_of(generator)
    method = Swag(SwagSettings(rank=rank, start=0.25), [site])
    method.begin_training(plan(16))
    iterates = walk(method, site, range(1, 17), generator)
    kept = np.stack([iterates[step].numpy() for step in range(5, 17)])
    running = np.stack([kept[: i + 1].mean(0) for i in range(12)])
    posterior = method.posteriors()[MODULE]
    assert isinstance(posterior, LowRankPosterior)
    np.testing.assert_allclose(posterior.log_sd.exp().numpy(), kept.std(0), rtol=1e-5)
    np.testing.assert_allclose(posterior.deviations.numpy(), (kept - running)[-rank:], rtol=1e-5, atol=1e-7)
    posterior.check(MODULE, method.mean()[MODULE])
    assert sum(t.numel() for t in posterior.tensors().values()) == (1 + min(rank, 12)) * SIZE


def test_samples_have_the_iterates_covariance() -> None:
    """Two numbers that move together: the covariance of 3,000 samples, bound 5 standard errors.

    The expected one is half the diagonal of the iterates' covariance (divisor n) and half that of the deviations from the running mean.
    """
    generator = torch.Generator().manual_seed(0)
    site = site_of(generator)
    method = Swag(SwagSettings(rank=6, start=0.0), [site])
    method.begin_training(plan(6))
    kept = np.stack([value.numpy() for value in walk(method, site, range(1, 7), generator).values()])
    deviations = np.stack([kept[i] - kept[: i + 1].mean(0) for i in range(6)])
    expected = 0.5 * np.diag(kept.var(0)) + deviations.T @ deviations / (2 * 5)
    mean, count = method.mean()[MODULE], 3000
    samples = np.stack(
        [np.concatenate([s.A.flatten(), s.B.flatten()]) for s in draws(method.posteriors()[MODULE], mean, count)]
    )
    variances = np.diag(expected)
    bound = np.sqrt((expected**2 + variances[:, None] * variances) / count)
    assert np.abs((np.cov(samples.T) - expected) / bound).max() < 5
    assert np.abs(expected - np.diag(variances)).max() > 0.1 * variances.max()  # the correlation is there to be seen


def test_an_entry_that_does_not_move_has_the_floors_variance() -> None:
    site = site_of(torch.Generator().manual_seed(0))
    method = Swag(SwagSettings(start=0.0, variance_floor=1e-10), [site])
    method.begin_training(plan(4))
    for step in range(1, 5):
        with torch.no_grad():
            site.mean.A[0, 0] += 0.1
        method.end_step(step)
    posterior = method.posteriors()[MODULE]
    assert isinstance(posterior, LowRankPosterior)
    assert posterior.log_sd.exp().tolist()[1:] == pytest.approx([1e-5] * (SIZE - 1))
    assert float(posterior.log_sd.exp()[0]) == pytest.approx(0.1 * 1.25**0.5, rel=1e-5)


@pytest.mark.parametrize("cls", [Swa, Swag])
def test_the_state_resumes_bit_for_bit(cls: type[Swa]) -> None:
    generator = torch.Generator().manual_seed(0)
    site = site_of(generator)
    settings = cls.settings_class(start=0.2) if cls is Swa else cls.settings_class(start=0.2, rank=7)
    whole = cls(settings, [site])  # type: ignore[arg-type]
    whole.begin_training(plan(10))
    walk(whole, site, range(1, 6), generator)
    resumed = cls(settings, [site])  # type: ignore[arg-type]
    resumed.begin_training(plan(10))
    resumed.load_state({name: tensor.clone() for name, tensor in whole.state().items()})
    state = generator.get_state()
    start = LoraFactors(A=site.mean.A.detach().clone(), B=site.mean.B.detach().clone())
    walk(whole, site, range(6, 11), generator)
    with torch.no_grad():
        site.mean.A.copy_(start.A)
        site.mean.B.copy_(start.B)
    generator.set_state(state)
    walk(resumed, site, range(6, 11), generator)
    assert whole.state().keys() == resumed.state().keys()
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in whole.state().items())
    assert whole.state()[f"mean.{MODULE}"].dtype == torch.float64


@pytest.mark.parametrize(
    ("cls", "steps", "settings", "message"),
    [
        (Swag, 1, {}, "swag needs 2 or more iterates; 1 steps with method.start = 0.5 and an interval of 1 give 1"),
        (Swag, 10, {"interval": 4}, "interval of 4 give 1: lower method.start or method.interval"),
        (Swa, 10, {"interval": 6}, "swa needs 1 or more iterates"),
    ],
)
def test_runs_that_are_too_short_are_refused(
    cls: type[Swa], steps: int, settings: dict[str, Any], message: str
) -> None:
    method = cls(cls.settings_class(**settings), [site_of(torch.Generator())])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message) as caught:
        method.begin_training(plan(steps))
    assert caught.value.key == "method.interval"


class Iterates(TrainerCallback):  # type: ignore[misc]
    """Keeps A of one module after every step."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(kwargs["model"].named_parameters())
        name = next(name for name in parameters if MODULE in name and "lora_A" in name)
        self.kept.append(parameters[name].detach().double().clone())
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def test_a_run_stores_the_average_of_its_iterates(
    base: Path, train_file: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Six steps at a falling learning rate, as of AdamW; the artifact's mean is not the last iterate."""
    kept = Iterates()
    config = quick_config("swag", "train.max_steps=6", "train.warmup_ratio=0")
    result = train(base, train_file, None, "swag", tmp_path / "out", config, callbacks=[kept])
    assert kept.rates == pytest.approx([0.01 * (5 - step) / 6 for step in range(6)])
    artifact = load_artifact(result.path)
    torch.testing.assert_close(artifact.mean[MODULE].A, torch.stack(kept.kept[3:]).mean(0).float())
    assert not torch.allclose(artifact.mean[MODULE].A, kept.kept[-1].float(), atol=1e-4)
    assert artifact.config.kind == "lowrank" and artifact.config.settings == {}
