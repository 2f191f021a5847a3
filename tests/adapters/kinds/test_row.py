"""Kind row: the collapsed draw is the paper's N-component draw, and the complexity terms are the textbook's.

The references in this file are written from the distributions' definitions (numpy, scipy, torch.distributions, autograd Hessians); they
share no formula with the code under test.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.distributions import Dirichlet, MultivariateNormal, kl_divergence

from credence.adapters import FixedRowPosterior, LoraFactors, NoiseSource, PosteriorError, RowPosterior, draw
from credence.adapters.kinds.row import (
    cooperative,
    kl_dirichlet,
    kl_normal,
    kl_wishart,
    mixture_weights,
    row_variances,
)
from tests.adapters.kinds.moments import MODULE, deviations, mean_factors

Floats = NDArray[np.float64]

RHO = (-0.4, 0.0, 0.5)
BETA = (0.5, -0.3, 0.9, 0.1)
SETTINGS = {"epsilon": 0.2, "dof": 5.0, "floor": 1e-3}


def posterior_of(rho: tuple[float, ...] = RHO, beta: tuple[float, ...] = BETA, **changes: float) -> RowPosterior:
    return RowPosterior(rho=torch.tensor(rho), beta=torch.tensor(beta), **{**SETTINGS, **changes})


def laplace_in_softmax_basis(beta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variances of the Gaussian at the mode of Dir(exp(beta)) over logits that sum to 0, from a numerical Hessian.

    With the change of variables to logits the density is prod softmax_k^a_k (MacKay, 1998). The precision is the negative Hessian of
    its log; adding the same number to all logits changes nothing, so the covariance is the pseudo-inverse.
    """
    a = beta.double().exp()

    def log_density(logits: Tensor) -> Tensor:
        return (a * torch.log_softmax(logits, dim=0)).sum()

    mode = a.log() - a.log().mean()
    gradient = torch.autograd.functional.jacobian(log_density, mode)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    precision = -torch.autograd.functional.hessian(log_density, mode)
    return mode, torch.linalg.pinv(precision, hermitian=True).diagonal()


def explicit_deviation(
    generator: np.random.Generator, variances: Floats, weights: Floats, epsilon: float, n_in: int
) -> Floats:
    """epsilon sum_k pi_k S^(k) with N component matrices whose columns are N(0, Sigma), [r, n_in]."""
    total = np.zeros((len(variances), n_in))
    for weight in weights:
        columns = generator.multivariate_normal(np.zeros(len(variances)), np.diag(variances), size=n_in)
        total += weight * columns.T
    return epsilon * total


def batch_statistics(deviation: Floats, batches: int) -> Floats:
    """Mean, variance and kurtosis of each row in each batch of draws, [3, batches, r]."""
    count, rank, n_in = deviation.shape
    values = deviation.reshape(batches, count // batches, rank, n_in).transpose(0, 2, 1, 3).reshape(batches, rank, -1)
    return np.stack([values.mean(-1), values.var(-1), stats.kurtosis(values, axis=-1, fisher=False)])


def test_given_pi_and_sigma_the_collapsed_draw_is_the_explicit_one() -> None:
    """n = 60,000 columns, bounds of 4.5 standard errors: sqrt(2/n) of a relative variance, sqrt(24/n) of a Gaussian's kurtosis."""
    n = 60_000
    posterior = posterior_of()
    mean = LoraFactors(A=torch.zeros(3, n), B=torch.zeros(2, 3))
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)
    ours = posterior.sample(mean, noise).A.double().numpy()

    variances = np.maximum(np.exp(2 * np.array(RHO)) * noise["chi2"].double().numpy(), 1e-3)
    mode, spread = laplace_in_softmax_basis(posterior.beta)
    logits = (mode + spread.sqrt() * noise["mixture"].double()).numpy()
    weights = np.exp(logits) / np.exp(logits).sum()
    explicit = explicit_deviation(np.random.default_rng(1), variances, weights, 0.2, n)

    for values in (ours, explicit):
        assert np.abs(values.mean(1) / values.std(1)).max() < 4.5 / n**0.5
        assert stats.kurtosis(values, axis=1, fisher=False) == pytest.approx(3, abs=4.5 * (24 / n) ** 0.5)
        assert np.abs(np.corrcoef(values) - np.eye(3)).max() < 4.5 / n**0.5
    assert ours.var(1) / explicit.var(1) == pytest.approx(1, abs=4.5 * (4 / n) ** 0.5)


def test_over_draws_of_pi_and_sigma_the_moments_agree_too() -> None:
    """3,000 draws of each in 30 batches; the difference of the batch means against its standard error, bound 4.5 (9 comparisons).

    The scale mixture is visible: its kurtosis is well above a Gaussian's 3.
    """
    count, batches, n_in = 3000, 30, 8
    posterior = posterior_of()
    mean = mean_factors(rank=3, n_in=n_in)
    ours = deviations(posterior, mean, count)[0].numpy()

    generator = np.random.default_rng(2)
    mode, spread = (value.numpy() for value in laplace_in_softmax_basis(posterior.beta))
    explicit = np.empty_like(ours)
    for index in range(count):
        logits = generator.normal(mode, np.sqrt(spread))
        weights = np.exp(logits) / np.exp(logits).sum()
        variances = np.maximum(np.exp(2 * np.array(RHO)) * generator.chisquare(SETTINGS["dof"], 3), 1e-3)
        explicit[index] = explicit_deviation(generator, variances, weights, 0.2, n_in)

    a, b = batch_statistics(ours, batches), batch_statistics(explicit, batches)
    error = np.sqrt((a.var(1, ddof=1) + b.var(1, ddof=1)) / batches)
    assert np.abs((a.mean(1) - b.mean(1)) / error).max() < 4.5
    assert a[2].mean() > 3.5


def test_rows_share_nothing_but_the_mixture() -> None:
    """With N = 1 and many degrees of freedom the deviation is Gaussian with variance epsilon^2 exp(2 rho) dof, about."""
    count, dof = 1500, 1e6
    posterior = posterior_of(beta=(0.3,), dof=dof)
    A = deviations(posterior, mean_factors(), count)[0]
    expected = 0.2**2 * (2 * torch.tensor(RHO).double()).exp() * dof
    ratio = A.square().mean((0, 2)) / expected
    assert float((ratio - 1).abs().max()) < 4.5 * (2 / (count * 5)) ** 0.5 + 0.005


def test_B_is_deterministic() -> None:
    mean = mean_factors()
    assert draw(posterior_of(), mean, NoiseSource(0, 0), MODULE, 1.0).B is mean.B


def test_tau_scales_the_variance() -> None:
    mean = mean_factors()
    one, four = (deviations(posterior_of(), mean, 2, tau)[0] for tau in (1.0, 4.0))
    torch.testing.assert_close(four, 2 * one, rtol=1e-4, atol=1e-6)


def test_tau_zero_is_the_mean_bit_for_bit() -> None:
    mean = mean_factors()
    posterior = posterior_of()
    assert draw(posterior, mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    assert posterior.sample(mean, posterior.noise(NoiseSource(0, 0), MODULE, mean), 0.0) is mean


def test_gradients_reach_the_mean_rho_and_beta() -> None:
    mean = mean_factors(dtype=torch.float64)
    noise = {name: v.double() for name, v in posterior_of().noise(NoiseSource(0, 0), MODULE, mean).items()}

    def sample(A: Tensor, B: Tensor, rho: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        drawn = RowPosterior(rho=rho, beta=beta, **SETTINGS).sample(LoraFactors(A=A, B=B), noise, 0.6)
        return drawn.A, drawn.B

    inputs = [mean.A, mean.B, torch.tensor(RHO).double(), torch.tensor(BETA).double()]
    assert torch.autograd.gradcheck(sample, [tensor.clone().requires_grad_() for tensor in inputs])


def test_row_variances_are_clipped_from_below() -> None:
    variances = row_variances(torch.tensor([0.0, -4.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]), 1e-2)
    torch.testing.assert_close(variances, torch.tensor([2.0, 1e-2, 1e-2]))


@pytest.mark.parametrize("beta", [(0.0, 0.0), BETA, (3.0, -2.0, 0.5, 1.0, -1.0), (5.0,) * 24])
def test_mixture_weights_have_the_laplace_approximations_parameters(beta: tuple[float, ...]) -> None:
    """The Gaussian is read off the weights: its mean at noise 0, the standard deviation of logit k at unit noise on k."""
    concentrations = torch.tensor(beta, dtype=torch.float64)
    mode, variances = laplace_in_softmax_basis(concentrations)
    n = len(beta)
    centre = mixture_weights(concentrations, torch.zeros(n, dtype=torch.float64)).log()
    torch.testing.assert_close(centre - centre.mean(), mode)
    for k in range(n):
        unit = torch.zeros(n, dtype=torch.float64)
        unit[k] = 1
        moved = mixture_weights(concentrations, unit).log()
        other = (k + 1) % n
        sd = (moved[k] - moved[other]) - (centre[k] - centre[other])
        assert float(sd) == pytest.approx(float(variances[k].sqrt()))


def test_mixture_weights_approach_the_dirichlet_at_large_concentrations() -> None:
    """a = 200 to 540: the mean of pi to 1 %; its variance to a factor of 2, because the Gaussian drops the logits' covariance."""
    beta = torch.tensor([5.3, 5.8, 6.3], dtype=torch.float64)
    noise = NoiseSource(0, 0).normal("m", "g", (4000, 3)).double()
    drawn = torch.stack([mixture_weights(beta, g) for g in noise])
    exact = Dirichlet(beta.exp())
    torch.testing.assert_close(drawn.mean(0), exact.mean, rtol=0.01, atol=0)
    ratio = drawn.var(0) / exact.variance
    assert 0.5 < float(ratio.min()) and float(ratio.max()) < 2


def test_one_component_has_all_the_weight() -> None:
    beta = torch.tensor([-1.7], requires_grad=True)
    weights = mixture_weights(beta, torch.tensor([2.0]))
    assert weights.tolist() == [1.0]
    weights.sum().backward()
    assert beta.grad is not None and beta.grad.tolist() == [0.0]


def test_kl_normal_is_that_of_torch() -> None:
    variances = torch.tensor([0.3, 1.0, 2.5, 0.01], dtype=torch.float64)
    zero, identity = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    expected = kl_divergence(MultivariateNormal(zero, torch.diag(variances)), MultivariateNormal(zero, identity))
    torch.testing.assert_close(kl_normal(variances), expected)
    assert float(kl_normal(torch.ones(3))) == 0


@pytest.mark.parametrize("dof", [3.0, 5.5, 64.0])
def test_kl_wishart_is_the_expected_log_ratio(dof: float) -> None:
    """Against ln q - ln p of scipy's densities, whose X enters through tr X and tr(V^-1 X) only: at E_q[X] it is the expectation.

    And as a Monte Carlo mean over 4,000 draws, bound 4.5 standard errors.
    """
    rho = np.array(RHO)
    q, p = stats.wishart(dof, np.diag(np.exp(2 * rho))), stats.wishart(dof, np.eye(3))
    # ln|X| has the same factor in both densities (equal dof) and cancels, so any X with these traces will do
    at_mean = q.logpdf(q.mean()) - p.logpdf(q.mean())
    ours = float(kl_wishart(torch.tensor(RHO, dtype=torch.float64), dof))
    assert ours == pytest.approx(at_mean)
    drawn = np.moveaxis(q.rvs(4000, random_state=0), 0, -1)
    ratio = q.logpdf(drawn) - p.logpdf(drawn)
    assert abs(ratio.mean() - ours) < 4.5 * ratio.std() / 4000**0.5
    assert float(kl_wishart(torch.zeros(5), dof)) == 0


def test_kl_dirichlet_of_the_known_mistake() -> None:
    """alpha = [2, 3, 0.5] against ones: 1.2215 (a sign error in public code gives 3.7526)."""
    assert float(kl_dirichlet(torch.tensor([2.0, 3.0, 0.5]).log(), 1.0)) == pytest.approx(1.2215, abs=5e-5)


@pytest.mark.parametrize("prior", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("beta", [(0.0,) * 4, BETA, (-3.0, 4.0), (2.0,) * 24])
def test_kl_dirichlet_is_that_of_torch(beta: tuple[float, ...], prior: float) -> None:
    log_a = torch.tensor(beta, dtype=torch.float64)
    expected = kl_divergence(Dirichlet(log_a.exp()), Dirichlet(torch.full_like(log_a, prior)))
    torch.testing.assert_close(kl_dirichlet(log_a, prior), expected)
    assert float(kl_dirichlet(log_a, prior)) > -1e-12
    assert float(kl_dirichlet(torch.full((5,), math.log(prior)), prior)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("log_a", [4.0, 8.0, 11.0, 20.0])
def test_kl_dirichlet_survives_large_concentrations_in_float32(log_a: float) -> None:
    """N = 24: exp(lgamma(sum)) overflows from the first of these on, and float32 differences of lgamma lose every digit at the last."""
    beta = log_a + 0.1 * torch.arange(24)
    assert math.isinf(float(torch.lgamma(beta.exp().sum()).exp()))
    double = beta.double()
    expected = kl_divergence(Dirichlet(double.exp()), Dirichlet(torch.ones_like(double)))
    ours = kl_dirichlet(beta, 1.0)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)


def test_the_complexity_terms_are_differentiable() -> None:
    rho = torch.tensor(RHO, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(BETA, dtype=torch.float64, requires_grad=True)
    chi2 = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    gaussian = torch.tensor([0.3, -1.0, 0.2, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_wishart(x, 6.0), rho)
    assert torch.autograd.gradcheck(lambda x: kl_normal(row_variances(x, chi2, 1e-3)), rho)
    assert torch.autograd.gradcheck(lambda x: kl_dirichlet(x, 1.0), beta)
    assert torch.autograd.gradcheck(lambda x: cooperative(mixture_weights(x, gaussian)), beta)


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.floats(-5, 5, allow_nan=False, width=32), st.floats(-6, 6, allow_nan=False, width=32)),
        min_size=1,
        max_size=12,
    )
)
def test_the_cooperative_loss_lies_between_one_over_n_and_one(pairs: list[tuple[float, float]]) -> None:
    beta, gaussian = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    weights = mixture_weights(beta, gaussian)
    assert float(weights.sum()) == pytest.approx(1)
    assert 1 / len(pairs) - 1e-9 <= float(cooperative(weights)) <= 1 + 1e-9


def test_the_cooperative_loss_at_its_ends() -> None:
    assert float(cooperative(torch.full((4,), 0.25))) == pytest.approx(0.25)
    assert float(cooperative(torch.tensor([0.0, 1.0, 0.0]))) == 1.0


def test_tensors_round_trip() -> None:
    posterior = posterior_of()
    again = RowPosterior.from_tensors(posterior.tensors(), SETTINGS)
    assert again.rho is posterior.rho and again.beta is posterior.beta
    assert (again.epsilon, again.dof, again.floor) == (0.2, 5.0, 1e-3)


@pytest.mark.parametrize("missing", ["rho", "beta", "epsilon", "dof", "floor"])
def test_a_missing_parameter_is_refused(missing: str) -> None:
    tensors = {name: value for name, value in posterior_of().tensors().items() if name != missing}
    chosen = {name: value for name, value in SETTINGS.items() if name != missing}
    with pytest.raises(
        PosteriorError, match=r"kind row needs the tensors rho and beta and the settings .*epsilon.*, got"
    ):
        RowPosterior.from_tensors(tensors, chosen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon > 0, dof > 0 and floor >= 0, got epsilon=0.0"),
        ({"epsilon": -0.1}, "got epsilon=-0.1"),
        ({"epsilon": float("nan")}, "got epsilon=nan"),
        ({"dof": 0.0}, "got epsilon=0.2, dof=0.0"),
        ({"floor": -1e-9}, "floor=-1e-09"),
        ({"floor": float("inf")}, "floor=inf"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(PosteriorError, match=message) as caught:
        posterior_of(**changes).check(MODULE, mean_factors())
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    ("rho", "beta", "reason", "message"),
    [
        ((0.0, 0.0), BETA, "wrong_shape", r"rho for .*v_proj has shape \(2,\), its mean adapter needs \(3,\)"),
        (RHO, (), "wrong_shape", r"beta for .*v_proj has shape \(0,\); it must be a vector of N >= 1"),
        ((0.0, 0.0, 50.0), BETA, "not_finite", "rho for .*v_proj .* no sample would be finite"),
        (RHO, (0.0, -95.0), "not_finite", "beta for .*v_proj .* no sample would be finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    rho: tuple[float, ...], beta: tuple[float, ...], reason: str, message: str
) -> None:
    with pytest.raises(PosteriorError, match=message) as caught:
        posterior_of(rho, beta).check(MODULE, mean_factors())
    assert caught.value.reason == reason


def test_the_sparse_draw_has_the_variance_of_the_largest_component() -> None:
    """The same noise with and without ``sparse``: the deviations differ by max pi / sqrt(sum pi^2), from a numpy softmax."""
    mean = mean_factors()
    dense, sparse = posterior_of(), RowPosterior.from_tensors(posterior_of().tensors(), {**SETTINGS, "sparse": 1})
    for index in range(5):
        noise = dense.noise(NoiseSource(0, index), MODULE, mean)
        mode, spread = laplace_in_softmax_basis(dense.beta)
        logits = (mode + spread.sqrt() * noise["mixture"].double()).numpy()
        weights = np.exp(logits) / np.exp(logits).sum()
        ratio = (sparse.sample(mean, noise).A - mean.A) / (dense.sample(mean, noise).A - mean.A)
        expected = torch.full_like(ratio, weights.max() / (weights**2).sum() ** 0.5)
        torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=0)


def test_the_gradient_passes_through_the_largest_component() -> None:
    mean = mean_factors(dtype=torch.float64)
    noise = {name: v.double() for name, v in posterior_of().noise(NoiseSource(0, 0), MODULE, mean).items()}

    def sample(rho: Tensor, beta: Tensor) -> Tensor:
        return RowPosterior(rho=rho, beta=beta, **SETTINGS, sparse=True).sample(mean, noise, 0.6).A

    inputs = [torch.tensor(RHO).double().requires_grad_(), torch.tensor(BETA).double().requires_grad_()]
    assert torch.autograd.gradcheck(sample, inputs)
    gradient = torch.autograd.grad(sample(*inputs).sum(), inputs[1])[0]
    assert bool((gradient != 0).all())


def test_dof_can_be_the_modules_own_n_in() -> None:
    settings = {"epsilon": 0.2, "floor": 1e-3, "dof_is_n_in": 1.0}
    own = RowPosterior.from_tensors(posterior_of().tensors(), settings)
    for n_in in (5, 11):
        mean = mean_factors(n_in=n_in)
        own.check(MODULE, mean)
        number = posterior_of(dof=float(n_in))
        assert torch.equal(
            draw(own, mean, NoiseSource(0, 1), MODULE, 1.0).A, draw(number, mean, NoiseSource(0, 1), MODULE, 1.0).A
        )


@pytest.mark.parametrize(
    "changes", [{"sparse": 0.5}, {"dof_is_n_in": 1.0}, {"dof_is_n_in": 0.0}, {"sparse": 1.0, "other": 1.0}]
)
def test_settings_of_no_known_form_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(PosteriorError, match="kind row needs the tensors rho and beta"):
        RowPosterior.from_tensors(posterior_of().tensors(), {**SETTINGS, **changes})


def fixed() -> FixedRowPosterior:
    return FixedRowPosterior(rho=torch.tensor(RHO) - 1)


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_the_fixed_form_is_a_gaussian_with_one_sd_per_row(tau: float) -> None:
    """1,500 draws of 3 x 5 entries, bounds of 4.5 standard errors."""
    count, mean = 1500, mean_factors()
    A, B = deviations(fixed(), mean, count, tau)
    sd = np.sqrt(tau) * np.exp(np.array(RHO) - 1)
    rows = A.numpy().transpose(1, 0, 2).reshape(3, -1)
    n = rows.shape[1]
    assert np.abs(rows.mean(1) / sd).max() < 4.5 / n**0.5
    assert rows.var(1) / sd**2 == pytest.approx(1, abs=4.5 * (2 / n) ** 0.5)
    assert stats.kurtosis(rows, axis=1, fisher=False) == pytest.approx(3, abs=4.5 * (24 / n) ** 0.5)
    assert not bool(B.any())


def test_the_fixed_form_at_tau_zero_and_its_gradient() -> None:
    mean = mean_factors(dtype=torch.float64)
    assert draw(fixed(), mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    noise = {"z": fixed().noise(NoiseSource(0, 0), MODULE, mean)["z"].double()}
    assert fixed().sample(mean, noise, 0.0) is mean

    def sample(A: Tensor, rho: Tensor) -> Tensor:
        return FixedRowPosterior(rho=rho).sample(LoraFactors(A=A, B=mean.B), noise, 0.6).A

    assert torch.autograd.gradcheck(sample, [mean.A.clone().requires_grad_(), fixed().rho.double().requires_grad_()])


def test_the_tensors_tell_the_forms_apart() -> None:
    again = RowPosterior.from_tensors(fixed().tensors(), {})
    assert isinstance(again, FixedRowPosterior) and again.rho is not None and again.kind == "row"
    with pytest.raises(PosteriorError, match="or the tensor rho alone and no settings"):
        RowPosterior.from_tensors(fixed().tensors(), {"epsilon": 0.1})


@pytest.mark.parametrize(("rho", "reason"), [((0.0, 0.0), "wrong_shape"), ((0.0, 0.0, 90.0), "not_finite")])
def test_a_fixed_form_that_does_not_fit_is_refused(rho: tuple[float, ...], reason: str) -> None:
    with pytest.raises(PosteriorError, match="rho for .*v_proj") as caught:
        FixedRowPosterior(rho=torch.tensor(rho)).check(MODULE, mean_factors())
    assert caught.value.reason == reason
    fixed().check(MODULE, mean_factors())
