"""Kind mask: a sample is A with dropped columns, with the moments of a Bernoulli mask."""

import numpy as np
import pytest
import torch

from credence.adapters import LoraFactors, MaskPosterior, NoiseSource, PosteriorError, draw
from tests.adapters.kinds.moments import MODULE, deviations, mean_factors

P = 0.3


def test_at_tau_one_a_sample_is_inverted_dropout_of_the_input() -> None:
    """A_s x = A (x m / (1 - p)) with m from an independent numpy loop over the columns."""
    mean, posterior = mean_factors(n_in=40), MaskPosterior(p=P)
    uniform = posterior.noise(NoiseSource(0, 3), MODULE, mean)["mask"].numpy()
    A = np.zeros((3, 40))
    for column in range(40):
        if uniform[column] >= P:
            A[:, column] = mean.A[:, column].double().numpy() / (1 - P)
    sample = draw(posterior, mean, NoiseSource(0, 3), MODULE, 1.0)
    np.testing.assert_allclose(sample.A.double().numpy(), A, rtol=1e-5, atol=1e-6)
    assert sample.B is mean.B
    dropped = int((A == 0).all(0).sum())
    assert 0 < dropped < 40


@pytest.mark.parametrize("tau", [0.25, 1.0, 4.0])
def test_moments(tau: float) -> None:
    """Mean A; covariance of two entries of a column tau p/(1-p) A_ji A_ki, of different columns 0. Bound 4.5 standard errors."""
    count = 4000
    mean = mean_factors()
    relative = deviations(MaskPosterior(p=P), mean, count, tau)[0] / mean.A.double()
    assert torch.allclose(relative, relative[:, :1].expand_as(relative), atol=1e-4)  # all rows share the mask
    columns = relative[:, 0]
    variance = tau * P / (1 - P)
    assert float(columns.mean(0).abs().max()) < 4.5 * (variance / count) ** 0.5
    kurtosis = (1 - 3 * P * (1 - P)) / (P * (1 - P))
    error = ((kurtosis - 1) / count) ** 0.5
    assert float((columns.var(0) / variance - 1).abs().max()) < 4.5 * error
    off = torch.corrcoef(columns.T) - torch.eye(5)
    assert float(off.abs().max()) < 4.5 / count**0.5


def test_tau_zero_is_the_mean_and_modules_have_masks_of_their_own() -> None:
    mean, posterior = mean_factors(n_in=64), MaskPosterior(p=P)
    assert draw(posterior, mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    assert posterior.sample(mean, posterior.noise(NoiseSource(0, 0), MODULE, mean), 0.0) is mean
    one, other = (draw(posterior, mean, NoiseSource(0, 0), name, 1.0).A for name in ("a", "b"))
    assert not torch.equal(one, other)
    assert torch.equal(one, draw(posterior, mean, NoiseSource(0, 0), "a", 1.0).A)


def test_gradients_reach_the_mean() -> None:
    mean = mean_factors(dtype=torch.float64)
    noise = MaskPosterior(p=P).noise(NoiseSource(0, 0), MODULE, mean)

    def sample(A: torch.Tensor) -> torch.Tensor:
        return MaskPosterior(p=P).sample(LoraFactors(A=A, B=mean.B), noise, 0.6).A

    assert torch.autograd.gradcheck(sample, [mean.A.clone().requires_grad_()])


def test_tensors_round_trip() -> None:
    assert MaskPosterior.from_tensors(MaskPosterior(p=P).tensors(), {"p": P}) == MaskPosterior(p=P)
    for tensors, settings in (({"rho": torch.ones(3)}, {"p": P}), ({}, {}), ({}, {"p": P, "q": 1.0})):
        with pytest.raises(PosteriorError, match="kind mask needs the setting p and no tensors"):
            MaskPosterior.from_tensors(tensors, settings)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_probabilities_out_of_range_are_refused(p: float) -> None:
    with pytest.raises(PosteriorError, match=f"p = {p}, a probability between 0 and 1"):
        MaskPosterior(p=p).check(MODULE, mean_factors())
    MaskPosterior(p=0.5).check(MODULE, mean_factors())
