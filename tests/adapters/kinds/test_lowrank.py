"""Kind lowrank: SWAG's Gaussian, and the Kronecker form against the inverse of its dense precision."""

import numpy as np
import pytest
import torch
from torch import Tensor

from credence.adapters import (
    KroneckerPosterior,
    LoraFactors,
    LowRankPosterior,
    NoiseSource,
    Posterior,
    PosteriorError,
    draw,
)
from credence.adapters.kinds.lowrank import KroneckerCurvature
from tests.adapters.kinds.moments import MODULE, deviations, mean_factors

COUNT = 4000
SIZE = 3 * 5 + 7 * 3
PRIOR_LOG_SD = -0.7


def swag(dtype: torch.dtype = torch.float32) -> LowRankPosterior:
    """P = 36, R = 4; standard deviations from 0.05 to 0.6 in both parts."""
    generator = torch.Generator().manual_seed(1)
    return LowRankPosterior(
        log_sd=torch.linspace(-3.0, -0.5, SIZE, dtype=dtype),
        deviations=0.3 * torch.randn(4, SIZE, generator=generator, dtype=dtype),
    )


def swag_covariance(posterior: LowRankPosterior) -> Tensor:
    """Maddox et al., eq. 1, dense: 1/2 Sigma_diag + 1/(2 (R - 1)) D^T D with the iterates as rows."""
    D = posterior.deviations.double()
    return 0.5 * torch.diag((2 * posterior.log_sd.double()).exp()) + D.T @ D / (2 * (len(D) - 1))


def curvature(rows: int, columns: int, rank_out: int, rank_in: int, seed: int) -> KroneckerCurvature:
    """Eigenvectors from a QR decomposition and eigenvalues from 0 to 9."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(rows, rank_out, generator=generator, dtype=torch.float64)).Q
    U = torch.linalg.qr(torch.randn(columns, rank_in, generator=generator, dtype=torch.float64)).Q
    return KroneckerCurvature(
        in_vectors=U.float(),
        in_values=torch.linspace(0, 3, rank_in),
        out_vectors=V.float(),
        out_values=torch.linspace(3, 0.5, rank_out),
    )


def kronecker() -> KroneckerPosterior:
    """For r = 3, n_in = 5, n_out = 7: A's input and B's output are known on fewer directions than they have."""
    return KroneckerPosterior(A=curvature(3, 5, 3, 2, 1), B=curvature(7, 3, 4, 3, 2), prior_log_sd=PRIOR_LOG_SD)


def flat(A: Tensor, B: Tensor) -> Tensor:
    """[count, P]: A row by row, then B."""
    return torch.cat([A.flatten(1), B.flatten(1)], dim=1)


def assert_covariance(samples: Tensor, expected: Tensor) -> None:
    """Each entry of the sample covariance within 5 standard errors (about 700 entries), each mean within 4.5."""
    count = len(samples)
    sd = expected.diagonal().sqrt()
    assert float((samples.mean(0) / sd).abs().max()) < 4.5 / count**0.5
    error = torch.cov(samples.T) - expected
    bound = ((expected.square() + sd[:, None].square() * sd.square()) / count).sqrt()
    assert float((error / bound).abs().max()) < 5


@pytest.mark.parametrize("tau", [1.0, 9.0])
def test_swag_samples_have_the_papers_covariance(tau: float) -> None:
    posterior = swag()
    posterior.check(MODULE, mean_factors())
    samples = flat(*deviations(posterior, mean_factors(), COUNT, tau))
    assert_covariance(samples, tau * swag_covariance(posterior))


def test_swags_draw_is_the_papers_formula_entry_by_entry() -> None:
    mean, posterior = mean_factors(), swag()
    noise = posterior.noise(NoiseSource(3, 4), MODULE, mean)
    e1, e2 = noise["diagonal"].double().numpy(), noise["shared"].double().numpy()
    theta = torch.cat([mean.A.flatten(), mean.B.flatten()]).double().numpy()
    D, sd = posterior.deviations.double().numpy(), np.exp(posterior.log_sd.double().numpy())
    expected = []
    for index in range(SIZE):
        low_rank = sum(D[i, index] * e2[i] for i in range(4)) / (2 * (4 - 1)) ** 0.5
        expected.append(theta[index] + 0.6**0.5 * (sd[index] * e1[index] / 2**0.5 + low_rank))
    sample = posterior.sample(mean, noise, 0.6)
    assert (sample.A.shape, sample.B.shape) == ((3, 5), (7, 3))
    ours = torch.cat([sample.A.flatten(), sample.B.flatten()]).numpy()
    np.testing.assert_allclose(ours, np.float32(expected), rtol=2e-7)


def test_the_low_rank_noise_of_a_sample_is_shared_by_all_modules() -> None:
    """Across modules the correlation is that of the iterates; the diagonal noise is a module's own."""
    mean, posterior, source = mean_factors(), swag(), NoiseSource(0, 0)
    one, other = (posterior.noise(source, module, mean) for module in ("a.q_proj", "a.v_proj"))
    assert torch.equal(one["shared"], other["shared"])
    assert not torch.equal(one["diagonal"], other["diagonal"])
    assert not torch.equal(one["shared"], posterior.noise(NoiseSource(0, 1), "a.q_proj", mean)["shared"])


def dense_covariance(side: KroneckerCurvature) -> Tensor:
    """The inverse of S_out (x) S_in + I / p^2, over the row-by-row vec of the factor."""
    S_in = side.in_vectors.double() @ torch.diag(side.in_values.double()) @ side.in_vectors.double().T
    S_out = side.out_vectors.double() @ torch.diag(side.out_values.double()) @ side.out_vectors.double().T
    precision = torch.kron(S_out, S_in)
    return torch.linalg.inv(precision + np.exp(-2 * PRIOR_LOG_SD) * torch.eye(len(precision), dtype=torch.float64))


@pytest.mark.parametrize(
    ("rows", "columns", "rank_out", "rank_in"), [(3, 5, 3, 2), (7, 3, 4, 3), (2, 4, 2, 4), (4, 3, 1, 1), (3, 4, 0, 2)]
)
def test_the_kronecker_draw_has_exactly_the_inverse_precision(
    rows: int, columns: int, rank_out: int, rank_in: int
) -> None:
    """The draw is linear in Z: with L its matrix, L L^T is the covariance. Eigenvectors are rounded to float32, hence 1e-6."""
    side = curvature(rows, columns, rank_out, rank_in, 5)
    unit = torch.eye(rows * columns, dtype=torch.float64).reshape(-1, rows, columns)
    L = torch.stack([side.deviation(Z, PRIOR_LOG_SD).flatten() for Z in unit], dim=1)
    torch.testing.assert_close(L @ L.T, dense_covariance(side), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_kronecker_samples_have_that_covariance(tau: float) -> None:
    posterior = kronecker()
    posterior.check(MODULE, mean_factors())
    assert posterior.A is not None and posterior.B is not None
    expected = torch.block_diag(dense_covariance(posterior.A), dense_covariance(posterior.B))
    assert_covariance(flat(*deviations(posterior, mean_factors(), COUNT, tau)), tau * expected)


@pytest.mark.parametrize("posterior", [swag(), kronecker()])
def test_tau_scales_the_same_deviation_and_zero_is_the_mean(posterior: Posterior) -> None:
    mean = mean_factors()
    for one, four in zip(deviations(posterior, mean, 2, 1.0), deviations(posterior, mean, 2, 4.0), strict=True):
        torch.testing.assert_close(four, 2 * one, rtol=1e-4, atol=1e-6)
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)
    assert draw(posterior, mean, NoiseSource(0, 0), MODULE, 0.0) is mean
    assert posterior.sample(mean, noise, 0.0) is mean


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_side_of_the_kronecker_form_may_be_deterministic(side: str) -> None:
    mean, full = mean_factors(), kronecker()
    posterior = KroneckerPosterior(**{side: getattr(full, side)}, prior_log_sd=PRIOR_LOG_SD)
    posterior.check(MODULE, mean)
    assert all(name.startswith(f"{side}_") for name in posterior.tensors())
    sample, whole = (draw(p, mean, NoiseSource(0, 0), MODULE, 1.0) for p in (posterior, full))
    other = "B" if side == "A" else "A"
    assert torch.equal(getattr(sample, other), getattr(mean, other))
    assert torch.equal(getattr(sample, side), getattr(whole, side))


def test_gradients_reach_the_mean_and_swags_parameters() -> None:
    mean, posterior = mean_factors(dtype=torch.float64), swag(torch.float64)
    noise = posterior.noise(NoiseSource(0, 0), MODULE, mean)

    def sample(A: Tensor, B: Tensor, log_sd: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        drawn = LowRankPosterior(log_sd=log_sd, deviations=rows).sample(LoraFactors(A=A, B=B), noise, 0.7)
        return drawn.A, drawn.B

    inputs = [t.clone().requires_grad_() for t in (mean.A, mean.B, posterior.log_sd, posterior.deviations)]
    assert torch.autograd.gradcheck(sample, inputs)


def test_tensors_round_trip_into_their_own_form() -> None:
    for posterior, settings in ((swag(), {}), (kronecker(), {"prior_log_sd": PRIOR_LOG_SD})):
        again = LowRankPosterior.from_tensors(posterior.tensors(), settings)
        assert type(again) is type(posterior) and again.kind == "lowrank"
        assert again.tensors().keys() == posterior.tensors().keys()
        assert all(again.tensors()[name] is tensor for name, tensor in posterior.tensors().items())
        one, two = (draw(p, mean_factors(), NoiseSource(0, 0), MODULE, 1.0) for p in (posterior, again))
        assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_the_sizes_are_those_of_the_documentation() -> None:
    """SWAG (1 + R) P; Kronecker with full ranks on the r side: (n_in + n_out + 2) R + 2 (r^2 + r)."""
    assert sum(t.numel() for t in swag().tensors().values()) == (1 + 4) * SIZE
    same = KroneckerPosterior(A=curvature(3, 5, 3, 2, 1), B=curvature(7, 3, 2, 3, 2), prior_log_sd=0.0)
    assert sum(t.numel() for t in same.tensors().values()) == (5 + 7 + 2) * 2 + 2 * (3 * 3 + 3)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ((), {}),
        (("log_sd",), {}),
        (("log_sd", "deviations", "A_in_vectors"), {}),
        (("log_sd", "deviations"), {"prior_log_sd": 0.0}),
        (("A_in_vectors", "A_in_values", "A_out_vectors"), {"prior_log_sd": 0.0}),
        (("A_in_vectors", "A_in_values", "A_out_vectors", "A_out_values"), {}),
        (("A_in_vectors", "A_in_values", "A_out_vectors", "A_out_values", "C_in_values"), {"prior_log_sd": 0.0}),
    ],
)
def test_tensors_of_neither_form_are_refused(names: tuple[str, ...], settings: dict[str, float]) -> None:
    tensors = {name: torch.zeros(1) for name in names}
    with pytest.raises(
        PosteriorError, match=r"kind lowrank needs the tensors .*log_sd.* or .*in_vectors.*prior_log_sd"
    ):
        LowRankPosterior.from_tensors(tensors, settings)


@pytest.mark.parametrize(
    ("log_sd", "rows", "reason", "message"),
    [
        (torch.zeros(SIZE - 1), torch.zeros(4, SIZE), "wrong_shape", r"log_sd for .* has shape \(35,\)"),
        (torch.zeros(SIZE), torch.zeros(SIZE, 4), "wrong_shape", r"deviations for .* has shape \(36, 4\)"),
        (torch.zeros(SIZE), torch.zeros(()), "wrong_shape", r"deviations for .* has shape \(\)"),
        (torch.zeros(SIZE), torch.zeros(1, SIZE), "wrong_shape", "has 1 rows; a covariance needs 2 or more"),
        (torch.full((SIZE,), 90.0), torch.zeros(2, SIZE), "not_finite", "no sample would be finite"),
    ],
)
def test_swag_tensors_that_do_not_fit_are_refused(log_sd: Tensor, rows: Tensor, reason: str, message: str) -> None:
    with pytest.raises(PosteriorError, match=message) as caught:
        LowRankPosterior(log_sd=log_sd, deviations=rows).check(MODULE, mean_factors())
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        ("A", {"in_vectors": torch.eye(3)}, r"A_in_vectors for .* has shape \(3, 3\), its mean adapter needs \(5, 2\)"),
        ("B", {"out_vectors": torch.eye(4)}, r"B_out_vectors for .* has shape \(4, 4\), .* \(7, 4\)"),
        ("B", {"out_values": torch.zeros(3)}, r"B_out_vectors for .* has shape \(7, 4\), .* \(7, 3\)"),
        ("A", {"in_values": torch.tensor([1.0, -1e-3])}, "A_in_values for .* has the entry -0.001; eigenvalues"),
        ("A", {"in_values": torch.tensor([1.0, float("nan")])}, "A_in_values for .* has the entry nan"),
        ("A", {"out_vectors": 1.001 * torch.eye(3)}, "columns of A_out_vectors for .* not orthonormal: .* 0.002"),
        ("B", {"in_vectors": torch.ones(3, 3)}, "columns of B_in_vectors for .* are not orthonormal"),
    ],
)
def test_curvatures_that_do_not_fit_are_refused(side: str, changes: dict[str, Tensor], message: str) -> None:
    full = kronecker()
    broken = KroneckerCurvature(**{**getattr(full, side).tensors(), **changes})
    with pytest.raises(PosteriorError, match=message):
        KroneckerPosterior(**{side: broken}, prior_log_sd=0.0).check(MODULE, mean_factors())


@pytest.mark.parametrize("prior_log_sd", [float("nan"), float("inf"), -100.0, 100.0])
def test_a_prior_that_no_float32_holds_is_refused(prior_log_sd: float) -> None:
    with pytest.raises(PosteriorError, match="prior_log_sd for .* no sample would be finite"):
        KroneckerPosterior(A=kronecker().A, prior_log_sd=prior_log_sd).check(MODULE, mean_factors())


def test_a_kronecker_posterior_of_neither_factor_is_refused() -> None:
    with pytest.raises(PosteriorError, match="no curvature of A or B; at least one is needed"):
        KroneckerPosterior(prior_log_sd=0.0).check(MODULE, mean_factors())
