"""Kind core: (M + sqrt(tau) Omega * E) A_0, recovered from the mean M A_0; the references are loops over entries, in float64."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from credence.adapters import CorePosterior, LoraFactors, NoiseSource, PosteriorError, draw
from credence.adapters.kinds.core import core_sample, kl_core, kl_paper
from tests.adapters.kinds.moments import MODULE, deviations, mean_factors

Floats = NDArray[np.float64]

START = mean_factors().A  # A_0, [3, 5]
M = torch.tensor([[1.1, -0.4, 0.2], [0.3, 0.8, -0.1], [-0.2, 0.5, 1.4]])
SD = torch.tensor([[0.05, 0.4, 0.1], [0.3, 0.02, 0.2], [0.6, 0.15, 0.25]])
COUNT = 4000


def posterior_of() -> CorePosterior:
    return CorePosterior(M=M, log_sd=SD.log())


def mean_of(start: Tensor = START) -> LoraFactors:
    return LoraFactors(A=(M.double() @ start.double()).float(), B=mean_factors().B)


def slow_sample(start: Floats, core: Floats, sd: Floats, noise: Floats, tau: float) -> Floats:
    """Entry by entry: sum_k (M_ik + sqrt(tau) sd_ik E_ik) (A_0)_kj."""
    rank, n_in = start.shape
    sample = np.zeros((rank, n_in))
    for i in range(rank):
        for j in range(n_in):
            for k in range(rank):
                sample[i, j] += (core[i, k] + math.sqrt(tau) * sd[i, k] * noise[i, k]) * start[k, j]
    return sample


@pytest.mark.parametrize("tau", [1.0, 0.3, 7.0])
def test_the_sample_of_the_artifact_is_that_of_training(tau: float) -> None:
    """From M A_0 and from A_0, and both are the loop's, to float32."""
    mean, posterior = mean_of(), posterior_of()
    noise = posterior.noise(NoiseSource(3, 1), MODULE, mean)
    assert set(noise) == {"core"} and noise["core"].shape == (3, 3)
    served = posterior.sample(mean, noise, tau)
    trained = core_sample(START, M, SD, noise["core"], tau)
    slow = slow_sample(*(t.double().numpy() for t in (START, M, SD, noise["core"])), tau)
    assert served.A.dtype == torch.float32 and served.B is mean.B
    torch.testing.assert_close(served.A, torch.from_numpy(slow).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained, torch.from_numpy(slow).float(), rtol=1e-5, atol=1e-6)


def test_an_ill_conditioned_core_is_solved_in_float64() -> None:
    """At condition 4e5 a float32 solve has errors of percents; ours is that of the stored mean, to its last bits."""
    U, V = (torch.linalg.qr(mean_factors(rank=3, n_in=3).A.double() + k * torch.eye(3).double())[0] for k in (0, 2))
    core = (U @ torch.diag(torch.tensor([1.0, 3e-2, 2.5e-6]).double()) @ V).float()
    posterior, mean = CorePosterior(M=core, log_sd=SD.log()), mean_of()
    posterior.check(MODULE, mean)
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)
    start = np.linalg.solve(core.double().numpy(), mean.A.double().numpy())
    expected = mean.A.double().numpy() + (SD.double() * noise["core"].double()).numpy() @ start
    difference = np.abs(posterior.sample(mean, noise).A.double().numpy() - expected).max()
    assert difference < 1e-6 * np.abs(expected).max()


def test_sample_moments_approach_the_posteriors() -> None:
    """Var (A_s)_ij = sum_k sd_ik^2 A_0kj^2, rows independent, covariance within a row; 4,000 draws, bound 4.5 standard errors.

    The paper's standard deviation of an entry, sum_k sd_ik |A_0kj|, is refuted by the same draws.
    """
    A, B = deviations(posterior_of(), mean_of(), COUNT, tau=0.5)
    start, sd = START.double(), SD.double()
    expected = torch.zeros(3, 5, 3, 5, dtype=torch.float64)
    papers = torch.zeros(3, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            papers[i, j] = 0.5 * sum(sd[i, k] * abs(start[k, j]) for k in range(3)) ** 2
            for other in range(5):
                expected[i, j, i, other] = 0.5 * sum(sd[i, k] ** 2 * start[k, j] * start[k, other] for k in range(3))
    flat, covariance = A.flatten(1), expected.reshape(15, 15)
    variance = covariance.diagonal()
    assert float((flat.mean(0) / (variance / COUNT).sqrt()).abs().max()) < 4.5
    # The standard error of a Gaussian's sample covariance: sqrt((v_a v_b + c_ab^2) / n).
    error = ((variance[:, None] * variance[None] + covariance.square()) / COUNT).sqrt()
    assert float(((torch.cov(flat.T) - covariance) / error).abs().max()) < 4.5
    assert float((flat.var(0) / papers.flatten()).max()) < 0.95
    assert not bool(B.any())


def test_tau_scales_the_variance() -> None:
    one, four = (deviations(posterior_of(), mean_of(), 2, tau)[0] for tau in (1.0, 4.0))
    torch.testing.assert_close(four, 2 * one, rtol=1e-4, atol=1e-6)


def test_tau_zero_is_the_mean_bit_for_bit() -> None:
    mean, posterior = mean_of(), posterior_of()
    assert draw(posterior, mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    assert posterior.sample(mean, posterior.noise(NoiseSource(0, 0), MODULE, mean), 0.0) is mean


def test_samples_are_a_function_of_seed_and_index() -> None:
    mean, posterior = mean_of(), posterior_of()
    samples = [draw(posterior, mean, NoiseSource(*key), MODULE, 1.0).A for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2]) and not torch.equal(samples[0], samples[3])


def test_a_diagonal_core_gates_the_ranks() -> None:
    """With sd only on the diagonal every row of A is scaled by its own factor (rank-wise gates)."""
    posterior = CorePosterior(M=torch.eye(3), log_sd=torch.full((3, 3), -80.0) + 79 * torch.eye(3))
    mean = LoraFactors(A=START, B=mean_factors().B)
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)
    gates = 1 + math.exp(-1) * noise["core"].diagonal()
    torch.testing.assert_close(posterior.sample(mean, noise).A, gates[:, None] * START)


def test_gradients_of_the_training_sample_and_of_both_divergences() -> None:
    noise = posterior_of().noise(NoiseSource(0, 0), MODULE, mean_of())["core"].double()
    start, core, sd = (tensor.double().requires_grad_() for tensor in (START.clone(), M.clone(), SD.clone()))
    assert torch.autograd.gradcheck(lambda a, m, s: core_sample(a, m, s, noise, 0.6), (start, core, sd))
    assert torch.autograd.gradcheck(lambda m, s: kl_core(m, s, 0.3), (core, sd))
    assert torch.autograd.gradcheck(lambda a, m, s: kl_paper(a, m, s, 0.3), (start, core, sd))


@pytest.mark.parametrize("prior_sd", [0.2, 1.0, 3.0])
def test_kl_core_is_that_of_torch(prior_sd: float) -> None:
    core, sd = M.double(), SD.double()
    expected = kl_divergence(Normal(core, sd), Normal(torch.zeros(3, 3).double(), prior_sd)).sum()
    torch.testing.assert_close(kl_core(core, sd, prior_sd), expected)
    at_prior = kl_core(torch.zeros(3, 3), torch.full((3, 3), prior_sd), prior_sd)
    assert float(at_prior) == pytest.approx(0, abs=1e-6)


def test_kl_core_is_the_expected_log_ratio() -> None:
    """A Monte Carlo mean of ln q - ln p over 20,000 cores, bound 4.5 standard errors."""
    generator = np.random.default_rng(0)
    core, sd = M.double().numpy(), SD.double().numpy()
    drawn = core + sd * generator.standard_normal((20_000, 3, 3))
    log_q = -0.5 * ((drawn - core) / sd) ** 2 - np.log(sd)
    log_p = -0.5 * (drawn / 0.7) ** 2 - np.log(0.7)
    ratio = (log_q - log_p).sum((1, 2))
    assert abs(ratio.mean() - float(kl_core(M.double(), SD.double(), 0.7))) < 4.5 * ratio.std() / 20_000**0.5


def test_kl_paper_is_equation_8() -> None:
    start, core, sd = (tensor.double().numpy() for tensor in (START, M, SD))
    total = 0.0
    for i in range(3):
        for j in range(5):
            mean = sum(core[i, k] * start[k, j] for k in range(3))
            spread = sum(sd[i, k] * abs(start[k, j]) for k in range(3))
            total += (mean**2 + spread**2) / (2 * 0.3**2)
        total -= sum(math.log(sd[i, k]) for k in range(3))
    assert float(kl_paper(START.double(), M.double(), SD.double(), 0.3)) == pytest.approx(total, rel=1e-12)


def test_where_kl_paper_is_smallest() -> None:
    """For A_0 whose rows share no column the best Omega is s_p / ||row k of A_0||, whatever M is."""
    start = torch.zeros(3, 5).double()
    start[0, :2], start[1, 2], start[2, 3:] = (
        torch.tensor([0.3, -0.4]).double(),
        -2.0,
        torch.tensor([0.6, 0.8]).double(),
    )
    best = (0.2 / torch.tensor([0.5, 2.0, 1.0]).double()).expand(3, 3)
    sd = best.clone().requires_grad_()
    kl_paper(start, M.double(), sd, 0.2).backward()
    assert sd.grad is not None
    torch.testing.assert_close(sd.grad, torch.zeros_like(sd.grad), rtol=0, atol=1e-6)
    smallest = float(kl_paper(start, M.double(), best, 0.2))
    assert all(float(kl_paper(start, M.double(), best * factor, 0.2)) > smallest for factor in (0.9, 1.1))


def test_tensors_round_trip() -> None:
    posterior = posterior_of()
    again = CorePosterior.from_tensors(posterior.tensors(), {})
    assert again.M is posterior.M and again.log_sd is posterior.log_sd


@pytest.mark.parametrize(
    ("names", "settings"), [(["M"], {}), (["log_sd"], {}), (["M", "log_sd", "rho"], {}), (["M", "log_sd"], {"p": 0.1})]
)
def test_other_contents_are_refused(names: list[str], settings: dict[str, float]) -> None:
    with pytest.raises(PosteriorError, match="kind core needs the tensors M and log_sd and no settings, got"):
        CorePosterior.from_tensors(dict.fromkeys(names, M), settings)


LARGE = torch.full((3, 3), 90.0)


@pytest.mark.parametrize(
    ("core", "log_sd", "reason", "message"),
    [
        (torch.eye(4), SD.log(), "wrong_shape", r"M for .*v_proj has shape \(4, 4\), its mean adapter needs \(3, 3\)"),
        (M, torch.zeros(3, 5), "wrong_shape", r"log_sd for .*v_proj has shape \(3, 5\).* needs \(3, 3\)"),
        (M, LARGE, "not_finite", "log_sd for .*v_proj .* no sample would be finite"),
        (M * float("nan"), SD.log(), "not_finite", "M for .*v_proj"),
        (torch.ones(3, 3), SD.log(), "malformed", r"M for .*v_proj has condition number"),
        (torch.zeros(3, 3), SD.log(), "malformed", "condition number (inf|nan), at most 1e.06 is allowed"),
        (torch.diag(torch.tensor([1.0, 1.0, 9e-7])), SD.log(), "malformed", "Train again with a lower train.learning_rate"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(core: Tensor, log_sd: Tensor, reason: str, message: str) -> None:
    with pytest.raises(PosteriorError, match=message) as caught:
        CorePosterior(M=core, log_sd=log_sd).check(MODULE, mean_of())
    assert caught.value.reason == reason


def test_what_fits_passes() -> None:
    posterior_of().check(MODULE, mean_of())
    CorePosterior(M=torch.diag(torch.tensor([1.0, 1.0, 2e-6])), log_sd=SD.log()).check(MODULE, mean_of())
