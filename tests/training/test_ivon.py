"""IVON against a slow scalar implementation of Algorithm 1, and the promises around the noisy section."""

import copy
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from credence.adapters.posterior import draw
from credence.adapters.sampling import NoiseSource
from credence.training.config import LoraSettings
from credence.training.methods.ivon import Ivon, IvonOptimizer, IvonSettings
from credence.training.modeling import LoraSite, add_lora, load_base

SETTINGS = IvonSettings(ess=50.0, hess_init=0.3, beta1=0.8, beta2=0.9, clip_radius=0.6)
DECAY = 0.05


class ScalarIvon:
    """One weight of Shen et al. 2024, Algorithm 1, line by line in Python floats."""

    def __init__(self, mean: float) -> None:
        self.m, self.g, self.h, self.t = mean, 0.0, SETTINGS.hess_init, 0

    def sigma(self) -> float:
        return 1 / math.sqrt(SETTINGS.ess * (self.h + DECAY))

    def step(self, gradient: float, deviation: float, lr: float) -> None:
        b1, b2, lam, xi = SETTINGS.beta1, SETTINGS.beta2, SETTINGS.ess, SETTINGS.clip_radius
        self.t += 1
        h_hat = gradient * deviation / self.sigma() ** 2
        assert math.isclose(h_hat, lam * (self.h + DECAY) * deviation * gradient, rel_tol=1e-9)
        self.g = b1 * self.g + (1 - b1) * gradient
        self.h = b2 * self.h + (1 - b2) * h_hat + 0.5 * (1 - b2) ** 2 * (self.h - h_hat) ** 2 / (self.h + DECAY)
        update = (self.g / (1 - b1**self.t) + DECAY * self.m) / (self.h + DECAY)
        self.m -= lr * max(-xi, min(xi, update))


def test_updates_equal_the_scalar_algorithm() -> None:
    rng = random.Random(0)
    slow = [ScalarIvon(rng.gauss(0, 1)) for _ in range(6)]
    parameter = nn.Parameter(torch.tensor([[w.m for w in slow[:3]], [w.m for w in slow[3:]]], dtype=torch.float64))
    fast = IvonOptimizer([parameter], lr=0.1, weight_decay=DECAY, settings=SETTINGS)
    clipped = 0
    for step in range(40):
        lr = fast.param_groups[0]["lr"] = 0.1 * (1 - step / 40)
        sd = fast.log_sd(parameter).exp().flatten().tolist()
        assert sd == pytest.approx([w.sigma() for w in slow], rel=1e-10)
        deviations = [rng.gauss(0, 1) * w.sigma() for w in slow]
        # A bowl with curvature 1 and a linear term, so that gradient and noise are correlated as in training.
        gradients = [2 * (w.m + e) - 1 + rng.gauss(0, 0.1) for w, e in zip(slow, deviations, strict=True)]
        parameter.grad = torch.tensor(gradients, dtype=torch.float64).reshape(2, 3)
        fast.set_noise(parameter, torch.tensor(deviations, dtype=torch.float64).reshape(2, 3))
        before = [w.m for w in slow]
        fast.step()
        for weight, gradient, deviation in zip(slow, gradients, deviations, strict=True):
            weight.step(gradient, deviation, lr)
        clipped += sum(math.isclose(abs(w.m - b), lr * SETTINGS.clip_radius) for w, b in zip(slow, before, strict=True))
        assert parameter.detach().flatten().tolist() == pytest.approx([w.m for w in slow], rel=1e-10)
        assert fast.state[parameter]["hess"].flatten().tolist() == pytest.approx([w.h for w in slow], rel=1e-10)
    assert 10 < clipped < 230  # both branches were taken


def test_the_hessian_estimate_finds_a_quadratics_curvature() -> None:
    torch.manual_seed(0)
    curvature = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    settings = IvonSettings(ess=1000.0, hess_init=1.0, beta2=0.999, clip_radius=1e3)
    optimizer = IvonOptimizer([parameter], lr=1e-3, weight_decay=1e-3, settings=settings)
    mean_hess = torch.zeros(3, dtype=torch.float64)
    for step in range(8000):
        noise = optimizer.log_sd(parameter).exp() * torch.randn(3, dtype=torch.float64)
        parameter.grad = curvature * (parameter.detach() + noise)
        optimizer.set_noise(parameter, noise)
        optimizer.step()
        if step >= 4000:
            mean_hess += optimizer.state[parameter]["hess"] / 4000
    assert mean_hess.tolist() == pytest.approx(curvature.tolist(), rel=0.1)
    variance = (2 * optimizer.log_sd(parameter)).exp()
    expected = 1 / (1000 * (optimizer.state[parameter]["hess"] + 1e-3))
    assert variance.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_parameters_without_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = IvonOptimizer([used, unused], lr=0.1, weight_decay=0.1, settings=SETTINGS)
    for parameter in (used, unused):
        optimizer.set_noise(parameter, torch.full((2,), 0.1))
    used.grad = torch.ones(2)
    optimizer.step()
    assert not torch.equal(used, torch.ones(2))
    assert torch.equal(unused, torch.ones(2))
    assert optimizer.state[unused]["step"] == 0
    assert torch.equal(optimizer.state[unused]["hess"], torch.full((2,), 0.3))


def test_a_gradient_without_noise_is_an_error() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = IvonOptimizer([parameter], lr=0.1, weight_decay=0.1, settings=SETTINGS)
    parameter.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="noise was not drawn"):
        optimizer.step()
    optimizer.set_noise(parameter, torch.ones(2))
    optimizer.step()
    with pytest.raises(RuntimeError, match="noise was not drawn"):
        optimizer.step()  # noise is used once


def test_state_dict_resumes_exactly() -> None:
    def run(optimizer: IvonOptimizer, parameter: nn.Parameter, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            optimizer.set_noise(parameter, optimizer.log_sd(parameter).exp() * torch.randn(3, generator=generator))
            parameter.grad = torch.randn(3, generator=generator)
            optimizer.step()

    whole = nn.Parameter(torch.ones(3))
    first = IvonOptimizer([whole], lr=0.1, weight_decay=0.1, settings=SETTINGS)
    run(first, whole, range(3))
    half = nn.Parameter(whole.detach().clone())
    second = IvonOptimizer([half], lr=0.1, weight_decay=0.1, settings=SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, whole, range(3, 7))
    run(second, half, range(3, 7))
    assert torch.equal(whole, half)
    assert torch.equal(first.state[whole]["hess"], second.state[half]["hess"])
    assert second.state[half]["step"] == 7


@pytest.mark.parametrize(("lr", "decay"), [(0.0, 0.1), (0.1, -1.0)])
def test_settings_out_of_range(lr: float, decay: float) -> None:
    with pytest.raises(ValueError, match="learning rate above 0"):
        IvonOptimizer([nn.Parameter(torch.ones(1))], lr=lr, weight_decay=decay, settings=SETTINGS)


def adapted(base: Path) -> tuple[nn.Module, list[LoraSite], Ivon, IvonOptimizer]:
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    for site in sites:
        nn.init.normal_(site.mean.B, std=0.1)
    method = Ivon(IvonSettings(ess=1e4, hess_init=1e-2), sites)
    return model, sites, method, method.optimizer(learning_rate=0.1, weight_decay=1e-4)


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(12).reshape(2, 6) + 40
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def test_the_training_sample_is_the_posteriors_draw(base: Path) -> None:
    model, sites, method, optimizer = adapted(base)
    source = NoiseSource(3, 7, "train")
    method.begin_step(source)
    model.train()
    noisy = loss_of(model)
    for site in sites:
        sampled = draw(method.posteriors()[site.name], site.mean, source, site.name, 1.0)
        with torch.no_grad():
            site.mean.A.copy_(sampled.A.detach())
            site.mean.B.copy_(sampled.B.detach())
    model.eval()
    assert torch.equal(loss_of(model), noisy)
    posterior = method.posteriors()[sites[0].name].tensors()
    hess = optimizer.state[sites[0].mean.A]["hess"]
    torch.testing.assert_close((2 * posterior["log_sd_A"]).exp(), 1 / (1e4 * (hess + 1e-4)))


def test_gradients_are_taken_at_the_sample(base: Path) -> None:
    model, sites, method, _ = adapted(base)
    method.begin_step(NoiseSource(0, 0, "train"))
    model.train()
    loss_of(model).backward()
    at_sample = [site.mean.A.grad.clone() for site in sites if site.mean.A.grad is not None]
    assert len(at_sample) == len(sites)
    model.zero_grad()
    for site in sites:
        site.posterior = None
    loss_of(model).backward()
    assert all(not torch.equal(a, site.mean.A.grad) for a, site in zip(at_sample, sites, strict=True))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_noisy_section_leaves_the_mean_bit_for_bit(base: Path, where: str) -> None:
    model, sites, method, optimizer = adapted(base)
    before = [(site.mean.A.detach().clone(), site.mean.B.detach().clone()) for site in sites]

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    last = model.get_base_model().model.layers[1]
    handle = last.register_forward_hook(fail) if where == "forward" else last.mlp.register_full_backward_hook(fail)
    method.begin_step(NoiseSource(0, 0, "train"))
    model.train()
    with pytest.raises(RuntimeError, match="broken"):
        loss_of(model).backward()
    handle.remove()
    for site, (A, B) in zip(sites, before, strict=True):
        assert torch.equal(site.mean.A, A) and torch.equal(site.mean.B, B)
    # and the next step works
    model.zero_grad()
    method.begin_step(NoiseSource(0, 1, "train"))
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(sites[0].mean.A, before[0][0])
