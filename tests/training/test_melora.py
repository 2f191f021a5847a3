"""Me-LoRA: everything receives the task's gradient, the loss is the documented one, training and serving sample alike."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credence.adapters.errors import PosteriorError
from credence.adapters.kinds import CorePosterior
from credence.adapters.kinds.core import kl_core, kl_paper
from credence.adapters.posterior import LoraFactors, draw
from credence.adapters.sampling import NoiseSource
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError
from credence.training.methods import method_settings
from credence.training.methods.melora import MeLora, MeLoraSettings
from credence.training.modeling import LoraSite, MemberSite, add_lora, load_base, set_factors


def adapted(base: Path, **settings: object) -> tuple[nn.Module, list[LoraSite], MeLora]:
    """A model with B away from zero, and cores that are not the identity and whose entries differ in scale."""
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    method = MeLora(MeLoraSettings.model_validate(settings), sites)
    for site in sites:
        nn.init.normal_(site.mean.B, std=0.1)
        with torch.no_grad():
            site.layer.credence_core_mean.add_(0.2 * torch.randn(4, 4))
            site.layer.credence_core_root.mul_(torch.linspace(-1.5, 1.5, 16).reshape(4, 4))
    return model, sites, method


def nll(model: nn.Module) -> Tensor:
    ids = torch.arange(12).reshape(2, 6) + 40
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_it_starts_as_the_lora(base: Path) -> None:
    """M = I and Omega = initial_sd; 2 r^2 trainable numbers more per module."""
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    starts = {site.name: site.mean.A.detach().clone() for site in sites}
    method = MeLora(MeLoraSettings(initial_sd=0.07), sites)
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert after - before == len(sites) * 2 * 4**2
    assert all(torch.equal(pair.A, starts[name]) for name, pair in method.mean().items())
    for posterior in method.posteriors().values():
        assert isinstance(posterior, CorePosterior)
        assert torch.equal(posterior.M, torch.eye(4)) and not posterior.log_sd.requires_grad
        torch.testing.assert_close(posterior.log_sd.exp(), torch.full((4, 4), 0.07))
    assert method.posterior_settings() == {}


@pytest.mark.parametrize("kl", ["paper", "core"])
def test_all_parameters_receive_task_gradient_and_move(base: Path, kl: str) -> None:
    model, sites, method = adapted(base, kl=kl, initial_sd=0.2)
    optimizer = method.optimizer(learning_rate=0.01, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model.train()
    method.begin_step(NoiseSource(0, 0, "train"))
    nll(model).backward()  # the likelihood alone, no complexity term
    parameters = {
        f"{site.name} {name}": parameter
        for site in sites
        for name, parameter in (
            ("A", site.mean.A),
            ("B", site.mean.B),
            ("M", site.layer.credence_core_mean),
            ("H", site.layer.credence_core_root),
        )
    }
    for name, parameter in parameters.items():
        assert parameter.is_leaf and parameter.grad is not None, name
        assert bool(parameter.grad.any()), f"{name} has no task gradient"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
    assert {id(p) for p in trainable} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = [p.detach().clone() for p in trainable]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(trainable, before, strict=True))


def test_the_task_gradient_equals_a_finite_difference(base: Path) -> None:
    model, sites, method = adapted(base, initial_sd=0.2)
    model.train()
    model.double()
    method.begin_step(NoiseSource(0, 0, "train"))
    nll(model).backward()
    for parameter in (sites[0].layer.credence_core_mean, sites[1].layer.credence_core_root):
        index = divmod(int(parameter.grad.abs().argmax()), 4)
        gradient, step = float(parameter.grad[index]), 0.02  # Llama's norms round to float32
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(float(nll(model).detach()))
            with torch.no_grad():
                parameter[index] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient, rel=2e-2)


@pytest.mark.parametrize("kl", ["paper", "core"])
@pytest.mark.parametrize("noise_prior", [True, False])
def test_the_regulariser_is_the_mean_over_modules_at_the_steps_prior(base: Path, kl: str, noise_prior: bool) -> None:
    _, sites, method = adapted(base, kl=kl, kl_weight=0.3, prior_sd=0.5, noise_prior=noise_prior)
    values = []
    for step in (2, 3):
        source = NoiseSource(4, step, "train")
        method.begin_step(source)
        u = float(source.uniform("", "prior", (1,))) if noise_prior else 0.0
        assert 0 <= u < 1
        total = 0.0
        for site in sites:
            core, omega = site.layer.credence_core_mean.detach(), site.layer.credence_core_root.detach() ** 2
            if kl == "paper":
                total += float(kl_paper(site.mean.A.detach(), core, omega, 0.5 + u))
            else:
                total += float(kl_core(core, omega, 0.5 + u))
        assert float(method.regulariser().detach()) == pytest.approx(0.3 * total / len(sites), rel=1e-5)
        values.append(total)
    assert (values[0] == values[1]) is not noise_prior


def test_training_and_serving_sample_alike(base: Path) -> None:
    """The loss of a training step is that of the artifact's draw around the artifact's mean, to float32."""
    model, sites, method = adapted(base, initial_sd=0.2)
    source = NoiseSource(3, 7, "train")
    method.begin_step(source)
    model.train()
    noisy = float(nll(model).detach())
    mean, posteriors = method.mean(), method.posteriors()
    model.eval()
    set_factors(sites, mean)
    at_mean = float(nll(model).detach())
    set_factors(sites, {name: draw(posteriors[name], pair, source, name, 1.0) for name, pair in mean.items()})
    assert float(nll(model).detach()) == pytest.approx(noisy, rel=1e-5)
    assert abs(at_mean - noisy) > 1e-3 * noisy


def test_the_mean_is_the_average_of_training_samples(base: Path) -> None:
    _, sites, method = adapted(base, initial_sd=0.2)
    samples = []
    for step in range(400):
        method.begin_step(NoiseSource(0, step, "train"))
        samples.append(sites[0].factors().A.detach().double())
    stacked, mean = torch.stack(samples), method.mean()[sites[0].name]
    error = (stacked.mean(0) - mean.A) / (stacked.std(0) / 400**0.5)
    assert float(error.abs().max()) < 4.5
    assert torch.equal(mean.B, sites[0].mean.B)


ROWS = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 1.5]))[:4]
"""Inputs x_n, one per row, along the first four of five axes."""


def test_a_regression_has_the_closed_form_posterior() -> None:
    """y = B C A_0 x + N(0, s^2) with orthonormal columns of B and A_0 x along different axes for every row n.

    The evidence lower bound of the core then has the exact posterior as its optimum: in column k of C each entry has precision
    1/s_p^2 + |(A_0 x)_k|^2 / s^2. No row reaches the third of A_0's directions: there the divergence alone acts, and takes the
    standard deviation to the prior's and the mean to 0.
    """
    prior_sd, sigma, rank, n_out = 0.7, 0.5, 3, 4
    start = torch.zeros(rank, 5)
    start[0, 0], start[1, 1], start[2, 4] = 1.0, 1.3, 1.0
    B = torch.linalg.qr(torch.randn(n_out, rank, generator=torch.Generator().manual_seed(0)))[0]
    target = torch.randn(len(ROWS), n_out, generator=torch.Generator().manual_seed(1))
    site = MemberSite("m", LoraFactors(A=start, B=B))
    settings = MeLoraSettings(kl="core", kl_weight=1.0, prior_sd=prior_sd, noise_prior=False, initial_sd=0.1)
    method = MeLora(settings, [site])
    core, root = site.layer.credence_core_mean, site.layer.credence_core_root
    optimizer = torch.optim.Adam([core, root], lr=0.02)
    steps, kept = 2500, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        method.begin_step(NoiseSource(0, step, "train"))
        factors = site.factors()
        loss = (target - ROWS @ factors.A.T @ factors.B.T).square().sum() / (2 * sigma**2) + method.regulariser()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 500:
            kept.append((core.detach().clone(), root.detach().square()))
    reached = (ROWS @ start.T).square().sum(0)  # |(A_0 x)_k|^2 over the rows
    assert reached.tolist() == pytest.approx([9.0, 1.69, 0.0])
    precision = 1 / prior_sd**2 + reached / sigma**2
    sd = torch.stack([entry[1] for entry in kept]).mean(0)
    torch.testing.assert_close(sd, precision.rsqrt().expand(rank, rank), rtol=0.1, atol=0)
    mean = torch.stack([entry[0] for entry in kept]).mean(0)
    expected = (B.T @ target.T @ (ROWS @ start.T)) / sigma**2 / precision
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05)
    assert float(sd[:, 2].mean()) == pytest.approx(prior_sd, rel=0.02)


def test_a_root_of_zero_can_be_stored(base: Path) -> None:
    _, sites, method = adapted(base)
    nn.init.zeros_(sites[0].layer.credence_core_root)
    posterior = method.posteriors()[sites[0].name]
    assert isinstance(posterior, CorePosterior) and bool(torch.isfinite(posterior.log_sd).all())
    assert math.isfinite(float(method.regulariser().detach()))


def test_a_core_that_cannot_be_inverted_is_refused(base: Path) -> None:
    _, sites, method = adapted(base)
    nn.init.ones_(sites[2].layer.credence_core_mean)
    with pytest.raises(
        PosteriorError, match=rf"M for {sites[2].name} has condition number .* lower train.learning_rate"
    ):
        method.posteriors()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("initial_sd", 0), ("kl_weight", -1), ("prior_sd", 0), ("kl", "blob"), ("noise_prior", "perhaps"), ("omega", 1)],
)
def test_bad_settings_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}") as caught:
        method_settings("melora", {setting: value})
    assert caught.value.key == f"method.{setting}"
