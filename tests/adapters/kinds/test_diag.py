"""Kind diag: N(mean, tau exp(2 log_sd)) on each entry of A and B."""

import pytest
import torch

from credence.adapters import DiagPosterior, LoraFactors, NoiseSource, PosteriorError, draw
from tests.adapters.kinds.moments import MODULE, deviations, mean_factors

COUNT = 4000


def posterior_of(mean: LoraFactors) -> DiagPosterior:
    """Standard deviations that differ from entry to entry, 0.05 to 0.6."""
    A = torch.linspace(-3.0, -0.5, mean.A.numel(), dtype=mean.A.dtype).reshape(mean.A.shape)
    B = torch.linspace(-0.5, -2.5, mean.B.numel(), dtype=mean.B.dtype).reshape(mean.B.shape)
    return DiagPosterior(log_sd_A=A, log_sd_B=B)


@pytest.mark.parametrize("tau", [1.0, 0.25, 9.0])
def test_sample_moments_approach_the_posteriors(tau: float) -> None:
    """n = 4,000 draws: standard error sd/sqrt(n) of a mean, sqrt(2/n) of a relative variance; bound 4.5 over 36 entries.

    The scaling alpha/r appears nowhere: a posterior is over the factors, not over their product.
    """
    mean = mean_factors()
    posterior = posterior_of(mean)
    for deviation, log_sd in zip(
        deviations(posterior, mean, COUNT, tau), (posterior.log_sd_A, posterior.log_sd_B), strict=True
    ):
        assert log_sd is not None
        variance = tau * (2 * log_sd.double()).exp()
        assert deviation.shape[1:] == log_sd.shape
        assert float((deviation.mean(0) / (variance / COUNT).sqrt()).abs().max()) < 4.5
        assert float((deviation.var(0) / variance - 1).abs().max()) < 4.5 * (2 / COUNT) ** 0.5


def test_entries_are_independent() -> None:
    """Correlations of all 36 entries of A and B (630 pairs); standard error 1/sqrt(n), bound 4.7."""
    mean = mean_factors()
    A, B = deviations(posterior_of(mean), mean, COUNT)
    correlation = torch.corrcoef(torch.cat([A.flatten(1), B.flatten(1)], dim=1).T)
    assert float((correlation - torch.eye(len(correlation))).abs().max()) < 4.7 / COUNT**0.5


def test_the_mean_of_the_product_is_the_product_of_the_means() -> None:
    mean = mean_factors()
    A, B = deviations(posterior_of(mean), mean, COUNT)
    products = (B + mean.B) @ (A + mean.A)
    error = products.mean(0) - mean.B.double() @ mean.A.double()
    assert float((error / (products.std(0) / COUNT**0.5)).abs().max()) < 4.5


def test_tau_scales_the_same_deviation() -> None:
    mean = mean_factors()
    posterior = posterior_of(mean)
    one, four = (deviations(posterior, mean, 1, tau)[0] for tau in (1.0, 4.0))
    torch.testing.assert_close(four, 2 * one, rtol=1e-5, atol=1e-6)


def test_tau_zero_is_the_mean_bit_for_bit() -> None:
    mean = mean_factors()
    posterior = posterior_of(mean)
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)
    assert draw(posterior, mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    assert posterior.sample(mean, noise, 0.0) is mean


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_side_may_be_deterministic(side: str) -> None:
    mean = mean_factors()
    full = posterior_of(mean)
    posterior = DiagPosterior(**{f"log_sd_{side}": getattr(full, f"log_sd_{side}")})
    posterior.check(MODULE, mean)
    assert set(posterior.tensors()) == {f"log_sd_{side}"}
    assert set(posterior.noise(NoiseSource(0, 0), MODULE, mean)) == {side}
    sample = draw(posterior, mean, NoiseSource(0, 0), MODULE, 1.0)
    other = "B" if side == "A" else "A"
    assert torch.equal(getattr(sample, other), getattr(mean, other))
    # the noise of a side does not depend on whether the other one has any
    assert torch.equal(getattr(sample, side), getattr(draw(full, mean, NoiseSource(0, 0), MODULE, 1.0), side))


def test_gradients_reach_the_mean_and_log_sd() -> None:
    mean = mean_factors(dtype=torch.float64)
    posterior = posterior_of(mean)
    noise = {name: value.double() for name, value in posterior.noise(NoiseSource(0, 0), MODULE, mean).items()}

    def sample(A: torch.Tensor, B: torch.Tensor, sd_A: torch.Tensor, sd_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        drawn = DiagPosterior(log_sd_A=sd_A, log_sd_B=sd_B).sample(LoraFactors(A=A, B=B), noise, 0.7)
        return drawn.A, drawn.B

    inputs = [t.clone().requires_grad_() for t in (mean.A, mean.B, posterior.log_sd_A, posterior.log_sd_B)]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(sample, inputs)


def test_tensors_round_trip() -> None:
    posterior = posterior_of(mean_factors())
    again = DiagPosterior.from_tensors(posterior.tensors(), {})
    assert again.log_sd_A is posterior.log_sd_A and again.log_sd_B is posterior.log_sd_B


def test_wrong_shapes_are_refused_by_name() -> None:
    mean = mean_factors(rank=3, n_in=5, n_out=7)
    with pytest.raises(
        PosteriorError, match=rf"log_sd_A for {MODULE} has shape \(3, 4\), its mean adapter needs \(3, 5\)"
    ):
        DiagPosterior(log_sd_A=torch.zeros(3, 4)).check(MODULE, mean)
    # the transposed shape is the easy mistake
    with pytest.raises(
        PosteriorError, match=rf"log_sd_B for {MODULE} has shape \(3, 7\), its mean adapter needs \(7, 3\)"
    ):
        DiagPosterior(log_sd_B=torch.zeros(3, 7)).check(MODULE, mean)


def test_a_posterior_without_noise_or_with_strangers_is_refused() -> None:
    with pytest.raises(PosteriorError, match="neither log_sd_A nor log_sd_B; at least one is needed"):
        DiagPosterior().check(MODULE, mean_factors())
    with pytest.raises(PosteriorError, match=r"kind diag has no \['log_sd_C'\]; its tensors are log_sd_A and log_sd_B"):
        DiagPosterior.from_tensors({"log_sd_C": torch.zeros(1)}, {})
    with pytest.raises(PosteriorError, match=r"kind diag has no \['epsilon'\]"):
        DiagPosterior.from_tensors({"log_sd_A": torch.zeros(3, 5)}, {"epsilon": 0.1})


def test_a_scale_that_overflows_is_refused() -> None:
    with pytest.raises(PosteriorError, match="log_sd_A for .* no sample would be finite") as caught:
        DiagPosterior(log_sd_A=torch.full((3, 5), 90.0)).check(MODULE, mean_factors())
    assert caught.value.reason == "not_finite"


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
def test_a_tau_out_of_range_is_refused(tau: float) -> None:
    mean = mean_factors()
    with pytest.raises(PosteriorError, match=f"tau must be a finite number of 0 or more .* got {tau}"):
        draw(posterior_of(mean), mean, NoiseSource(0, 0), MODULE, tau)
