"""TFB: the rotation against numpy's SVD, the noise in the output it promises, and both searches against functions with known optima."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from credence.adapters.kinds import FixedRowPosterior
from credence.adapters.posterior import LoraFactors, draw
from credence.adapters.sampling import NoiseSource
from credence.training.config import LoraSettings, parse_section
from credence.training.errors import ConfigError, TrainingError
from credence.training.methods import Tfb, TrainingRows
from credence.training.methods.tfb import TfbSettings, best_sigma, largest_sigma, rotate
from credence.training.modeling import add_lora, get_factors, load_base
from credence.training.predict import log_likelihood
from tests.training.test_release import examples


def factors(rank: int = 4, n_in: int = 9, n_out: int = 6, seed: int = 0) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(A=torch.randn(rank, n_in, generator=generator), B=torch.randn(n_out, rank, generator=generator))


def test_the_rotation_is_the_svds() -> None:
    given = factors()
    rotated, d = rotate(given, "m")
    A, B = given.A.double().numpy(), given.B.double().numpy()
    np.testing.assert_allclose(d.numpy(), np.linalg.svd(B, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose(rotated.B.double().numpy() @ rotated.A.double().numpy(), B @ A, atol=1e-5)
    gram = rotated.B.double().T @ rotated.B.double()
    torch.testing.assert_close(gram, torch.diag(d.square()), rtol=1e-5, atol=1e-5)
    # A' = V^T A with an orthogonal V
    torch.testing.assert_close(rotated.A.T @ rotated.A, given.A.T @ given.A, rtol=1e-5, atol=1e-5)
    assert (rotated.A.dtype, rotated.B.dtype, rotated.A.shape, rotated.B.shape) == (
        torch.float32, torch.float32, given.A.shape, given.B.shape,
    )  # fmt: skip


def test_every_direction_of_the_output_gets_the_same_noise() -> None:
    """Cov of a column of B'(A_s - A') is sigma_q^2 U U^T: a projection times sigma_q^2. 3,000 x 9 columns, 4.5 standard errors."""
    sigma, count, given = 0.3, 3000, factors()
    rotated, d = rotate(given, "m")
    posterior = FixedRowPosterior(rho=(math.log(sigma) - d.log()).float())
    columns = torch.cat(
        [rotated.B @ (draw(posterior, rotated, NoiseSource(0, i), "m", 1.0).A - rotated.A) for i in range(count)],
        dim=1,
    ).double()
    basis = np.linalg.svd(given.B.double().numpy(), full_matrices=False)[0]
    expected = sigma**2 * basis @ basis.T
    error = sigma**2 * (2 / columns.shape[1]) ** 0.5
    assert np.abs(np.cov(columns.numpy(), bias=True) - expected).max() < 4.5 * error


def test_a_lower_rank_is_clamped_and_a_zero_refused() -> None:
    given = factors()
    lower = LoraFactors(A=given.A, B=given.B[:, :2] @ torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    rotated, d = rotate(lower, "m")
    torch.testing.assert_close(rotated.B @ rotated.A, lower.B @ lower.A, rtol=1e-4, atol=1e-4)
    assert d[2:].tolist() == [float(1e-3 * d[0])] * 2
    with pytest.raises(TrainingError, match="lora_B of model.q_proj is zero.*lora.init"):
        rotate(LoraFactors(A=given.A, B=torch.zeros(6, 4)), "model.q_proj")


def test_fewer_outputs_than_the_rank_keep_the_rank() -> None:
    given = factors(rank=5, n_in=7, n_out=2)
    rotated, d = rotate(given, "m")
    assert (rotated.A.shape, rotated.B.shape, d.shape) == ((5, 7), (2, 5), (5,))
    torch.testing.assert_close(rotated.B @ rotated.A, given.B @ given.A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimum", [2e-4, 0.0173, 0.4])
def test_the_best_sigma_is_within_half_a_grid_step(optimum: float) -> None:
    calls: list[float] = []

    def nll(sigma: float) -> float:
        calls.append(sigma)
        return (math.log(sigma) - math.log(optimum)) ** 2

    found = best_sigma(nll, TfbSettings())
    assert abs(math.log(found / optimum)) < math.log(10) / 8 + 1e-9
    assert all(1e-4 * (1 - 1e-12) <= sigma <= 1 + 1e-12 for sigma in calls) and len(calls) == len(set(calls))


def test_the_search_stops_where_noise_only_destroys() -> None:
    calls: list[float] = []
    best_sigma(lambda sigma: calls.append(sigma) or sigma, TfbSettings())
    assert len(calls) == 4  # the smallest is best, two are worse, and the half step above


def test_the_papers_rule_finds_the_largest_sigma_within_the_tolerance() -> None:
    """NLL 2 + sigma^2: a relative change of 1 % is reached at sqrt(0.02); an improvement counts like a loss."""
    for sign in (1, -1):
        found = largest_sigma(lambda sigma: 2 + sign * sigma**2, TfbSettings(criterion="paper"))  # noqa: B023
        assert 0.98 * 0.02**0.5 <= found <= 0.02**0.5
    assert largest_sigma(lambda sigma: 2.0, TfbSettings()) == 1.0
    with pytest.raises(TrainingError, match="lower method.min_sigma, raise method.tolerance"):
        largest_sigma(lambda sigma: 2 + 1e6 * sigma, TfbSettings())


@pytest.mark.parametrize("criterion", ["nll", "paper"])
def test_fitting_on_a_model(criterion: str, base: Path) -> None:
    torch.manual_seed(2)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    for site in sites:
        torch.nn.init.normal_(site.mean.B, std=0.3)
    before = get_factors(sites)
    rows = TrainingRows(model=model, sites=sites, examples=examples(20), pad_token=0, batch_size=5, seed=3)
    method = Tfb(TfbSettings(criterion=criterion, samples=4, max_rows=10), sites)
    with pytest.raises(RuntimeError, match="fit_posterior"):
        method.posteriors()
    method.fit_posterior(rows)
    after = get_factors(sites)
    assert method.sigma is not None
    for name, given in before.items():
        assert torch.equal(after[name].A, given.A) and torch.equal(after[name].B, given.B)
        mean, posterior = method.mean()[name], method.posteriors()[name]
        torch.testing.assert_close(mean.B @ mean.A, given.B @ given.A, rtol=1e-4, atol=1e-5)
        assert isinstance(posterior, FixedRowPosterior)
        d = np.linalg.svd(given.B.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(posterior.rho.exp().numpy(), method.sigma / d, rtol=1e-4)
    # The criterion holds for an NLL computed the long way, on every second row: the anchors.
    anchors, predictor = examples(20)[1::2], rows.predictor()

    def nll(sigma: float) -> float:
        draws = []
        for index in range(4):
            sample = {}
            for name, mean in method.mean().items():
                z = NoiseSource(3, index, "train").normal(name, "z", tuple(mean.A.shape))
                scale = sigma * (method.posteriors()[name].tensors()["rho"].exp() / method.sigma)
                sample[name] = LoraFactors(A=mean.A + scale[:, None] * z, B=mean.B)
            draws.append(sample)
        values = [-log_likelihood(p) for p in predictor.predict(anchors, draws, [4])]
        return float(torch.cat(values).mean())

    if criterion == "nll":
        assert all(nll(method.sigma) <= nll(method.sigma * factor) + 1e-6 for factor in (0.1, 10**0.5, 10))
    else:
        assert abs(nll(method.sigma) - nll(0.0)) <= 0.01 * nll(0.0) < abs(nll(method.sigma * 1.03) - nll(0.0))


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_sigma is 1 and max_sigma 0.1"):
        parse_section(TfbSettings, {"min_sigma": 1.0, "max_sigma": 0.1}, prefix="method")
