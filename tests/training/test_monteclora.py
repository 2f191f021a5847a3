"""MonteCLoRA: everything receives the task's gradient, the objective is the paper's, the draw is the published sampler's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.monteclora import MontecloraSampler
from safetensors.torch import load_file
from torch import Tensor, nn

from credence.adapters.artifact import load_artifact
from credence.adapters.kinds import RowPosterior
from credence.adapters.kinds.row import cooperative, kl_dirichlet, kl_normal, kl_wishart
from credence.adapters.posterior import LoraFactors, draw
from credence.adapters.sampling import NoiseSource
from credence.training.checkpoint import checkpoint_folder, latest_checkpoint
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.methods.monteclora import MonteCLora, MonteCLoraSettings
from credence.training.modeling import LoraSite, add_lora, load_base
from tests.training.conftest import quick_config
from tests.training.test_loop import StopAfter


def adapted(base: Path, **settings: float) -> tuple[nn.Module, list[LoraSite], MonteCLora]:
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    for site in sites:
        nn.init.normal_(site.mean.B, std=0.1)
    return model, sites, MonteCLora(MonteCLoraSettings(**settings), sites)


def nll(model: nn.Module) -> Tensor:
    ids = torch.arange(12).reshape(2, 6) + 40
    logits = model(input_ids=ids).logits  # not model(labels=...), which computes the loss in float32
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_all_parameters_receive_task_gradient_and_move(base: Path) -> None:
    model, sites, method = adapted(base, epsilon=0.05)
    optimizer = method.optimizer(learning_rate=0.01, weight_decay=0.0)
    model.train()
    method.begin_step(NoiseSource(0, 0, "train"))
    nll(model).backward()  # the likelihood alone, no complexity term
    for site in sites:
        parameters = {
            "A": site.mean.A,
            "B": site.mean.B,
            "rho": site.layer.credence_rho,
            "beta": site.layer.credence_beta,
        }
        for name, parameter in parameters.items():
            assert parameter.is_leaf and parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, f"{site.name} {name} has no task gradient"
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert len(before) == 4 * len(sites)
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_the_task_gradient_equals_a_finite_difference(base: Path) -> None:
    model, sites, method = adapted(base, epsilon=0.05)
    model.train()
    model.double()
    method.begin_step(NoiseSource(0, 0, "train"))
    nll(model).backward()
    for parameter in (sites[0].layer.credence_rho, sites[0].layer.credence_beta):
        gradient, step = float(parameter.grad[1]), 0.02  # Llama's norms round to float32
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[1] += sign * step
            values.append(float(nll(model).detach()))
            with torch.no_grad():
                parameter[1] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(gradient, rel=1e-2)


def test_the_regulariser_is_the_papers(base: Path) -> None:
    _, sites, method = adapted(base, kl_weight=0.3, dirichlet_prior=2.0, dof=6.0, floor=1e-3, components=5)
    for index, site in enumerate(sites):
        nn.init.normal_(site.layer.credence_rho, 0.1 * index, 0.2)
        nn.init.normal_(site.layer.credence_beta, 0.0, 0.3)
    method.begin_step(NoiseSource(4, 2, "train"))
    kl = cooperation = 0.0
    for site in sites:
        rho, beta = site.layer.credence_rho.detach(), site.layer.credence_beta.detach()
        noise = RowPosterior(rho=rho, beta=beta, epsilon=5e-3, dof=6.0).noise(
            NoiseSource(4, 2, "train"), site.name, site.mean
        )
        sigma = ((2 * rho).exp() * noise["chi2"]).clamp_min(1e-3)
        a = beta.exp()
        variance = (1 / a) * (1 - 2 / 5) + (1 / a).sum() / 25
        pi = torch.softmax(beta - beta.mean() + variance.sqrt() * noise["mixture"], 0)
        kl += float(kl_dirichlet(beta, 2.0) + kl_wishart(rho, 6.0) + kl_normal(sigma))
        cooperation += float(cooperative(pi))
    expected = 0.3 * kl / len(sites) + cooperation / len(sites)
    assert float(method.regulariser().detach()) == pytest.approx(expected, rel=1e-5)


def test_dof_is_the_rank_by_default(base: Path) -> None:
    _, sites, method = adapted(base)
    assert method.posterior_settings() == {"epsilon": 5e-3, "dof": 4.0, "floor": 1e-3}
    posterior = method.posteriors()[sites[0].name]
    assert isinstance(posterior, RowPosterior) and not posterior.rho.requires_grad
    posterior.check(sites[0].name, sites[0].mean)


def test_the_training_sample_is_the_posteriors_draw(base: Path) -> None:
    model, sites, method = adapted(base, epsilon=0.05)
    source = NoiseSource(3, 7, "train")
    method.begin_step(source)
    model.train()
    noisy = nll(model)
    posteriors = method.posteriors()
    with torch.no_grad():
        for site in sites:
            site.mean.A.copy_(draw(posteriors[site.name], site.mean, source, site.name, 1.0).A)
    model.eval()
    assert torch.equal(nll(model), noisy)


def test_one_component_is_a_plain_row_gaussian(base: Path) -> None:
    model, sites, method = adapted(base, components=1, epsilon=0.05)
    optimizer = method.optimizer(learning_rate=0.01, weight_decay=0.0)
    model.train()
    method.begin_step(NoiseSource(0, 0, "train"))
    (nll(model) + method.regulariser()).backward()
    optimizer.step()
    for site in sites:
        assert bool(torch.isfinite(site.mean.A).all() and torch.isfinite(site.layer.credence_rho).all())
        assert site.layer.credence_beta.tolist() == [0.0]


def test_moments_of_the_draw_equal_pefts_sampler() -> None:
    """PEFT 0.21.2 draws N components and mixes them; our collapsed draw must have the same mean, variance and kurtosis."""
    r, n_in, components, epsilon, draws = 4, 8, 4, 0.3, 3000
    torch.manual_seed(0)
    sampler = MontecloraSampler(n_in, r, components, sample_scaler=epsilon, buffer_size=draws, device="cpu")
    rho = torch.tensor([-0.5, 0.0, 0.3, 0.6])
    beta = torch.tensor([0.0, 0.4, -0.3, 0.8])
    with torch.no_grad():
        sampler.std_prior.copy_(rho)
        sampler.expert_weights_prior.copy_(beta)
        theirs = torch.stack([torch.einsum("e,eir->ri", pi, noise) for noise, pi in (sampler() for _ in range(draws))])
    posterior = RowPosterior(rho=rho, beta=beta, epsilon=epsilon, dof=float(r), floor=1e-3)
    mean = LoraFactors(A=torch.zeros(r, n_in), B=torch.zeros(3, r))
    ours = torch.stack([draw(posterior, mean, NoiseSource(0, i), "m", 1.0).A for i in range(draws)])

    def moments(samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = samples.double().transpose(0, 1).flatten(1)  # [r, draws * n_in]
        variance = rows.var(1)
        return rows.mean(1), variance, (rows**4).mean(1) / variance**2

    mean_o, variance_o, kurtosis_o = moments(ours)
    mean_t, variance_t, kurtosis_t = moments(theirs)
    sd = variance_t.sqrt()
    assert bool((mean_o.abs() < 0.02 * sd).all()) and bool((mean_t.abs() < 0.02 * sd).all())
    torch.testing.assert_close(variance_o, variance_t, rtol=0.05, atol=0)
    torch.testing.assert_close(kurtosis_o, kurtosis_t, rtol=0.15, atol=0)
    assert bool((kurtosis_o > 4).all())  # a scale mixture, not a Gaussian


def test_dof_of_each_modules_own_n_in(base: Path) -> None:
    """MLP down_proj has n_in 48, q_proj 32: the draws and the Wishart terms differ accordingly."""
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, target_modules=("q_proj", "down_proj")))
    method = MonteCLora(MonteCLoraSettings(dof="n_in", kl_weight=1.0, cooperative_weight=0.0, initial_rho=0.3), sites)
    assert method.posterior_settings() == {"epsilon": 5e-3, "floor": 1e-3, "dof_is_n_in": 1.0}
    assert {site.mean.A.shape[1] for site in sites} == {32, 48}
    source = NoiseSource(1, 0, "train")
    method.begin_step(source)
    expected = 0.0
    for site in sites:
        n_in = float(site.mean.A.shape[1])
        rho, beta = site.layer.credence_rho.detach(), site.layer.credence_beta.detach()
        chi2 = source.chi2(site.name, "chi2", n_in, 4)
        assert site.noise is not None and torch.equal(site.noise["chi2"], chi2)
        expected += float(kl_dirichlet(beta, 1.0) + kl_wishart(rho, n_in) + kl_normal((2 * rho).exp() * chi2))
        again = RowPosterior.from_tensors(method.posteriors()[site.name].tensors(), method.posterior_settings())
        assert again.dof is None and again.degrees(site.mean) == n_in
    assert float(method.regulariser().detach()) == pytest.approx(expected / len(sites), rel=1e-5)


def test_the_sparse_mixture_is_what_training_and_serving_draw(base: Path) -> None:
    model, sites, method = adapted(base, epsilon=0.05, sparse=True)
    for site in sites:
        nn.init.normal_(site.layer.credence_beta, 0.0, 0.5)
    assert method.posterior_settings() == {"epsilon": 0.05, "dof": 4.0, "floor": 1e-3, "sparse": 1.0}
    source = NoiseSource(3, 7, "train")
    method.begin_step(source)
    for site in sites:
        stored = RowPosterior.from_tensors(method.posteriors()[site.name].tensors(), method.posterior_settings())
        assert torch.equal(site.factors().A, draw(stored, site.mean, source, site.name, 1.0).A)
        dense = RowPosterior(rho=stored.rho, beta=stored.beta, epsilon=0.05, dof=4.0)
        dense_sd = (draw(dense, site.mean, source, site.name, 1.0).A - site.mean.A).detach().norm()
        assert float((site.factors().A - site.mean.A).detach().norm()) < 0.99 * float(dense_sd)
    model.train()
    nll(model).backward()
    assert all(float(site.layer.credence_beta.grad.abs().sum()) > 0 for site in sites)


def test_an_artifact_of_the_sparse_mixture_draws_sparsely(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = quick_config("monteclora", "method.sparse=true", "method.dof=n_in")
    artifact = load_artifact(train(base, train_file, None, "monteclora", tmp_path / "out", config).path)
    for posterior in artifact.posteriors.values():
        assert isinstance(posterior, RowPosterior) and posterior.sparse and posterior.dof is None


def test_post_hoc_keeps_the_adapter_and_resumes(base: Path, train_file: Path, tmp_path: Path) -> None:
    start = train(base, train_file, None, "map", tmp_path / "start", quick_config("map")).path
    config = quick_config("monteclora", "method.posthoc=true", f"lora.init={start}", "train.save_steps=2")
    whole = load_artifact(train(base, train_file, None, "monteclora", tmp_path / "whole", config).path)
    for name, factors in load_artifact(start).mean.items():
        assert torch.equal(whole.mean[name].A, factors.A) and torch.equal(whole.mean[name].B, factors.B)
        posterior = whole.posteriors[name]
        assert isinstance(posterior, RowPosterior)
        assert bool((posterior.rho != 0).all()) and bool((posterior.beta != 0).all())
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, None, "monteclora", tmp_path / "cut", config, callbacks=[StopAfter(3)])
    found = latest_checkpoint(checkpoint_folder(tmp_path / "cut"))
    assert found is not None
    stored = load_file(found / "credence_adapter.safetensors")
    assert len(stored) == 8 and all("credence_" in name for name in stored)  # rho and beta of four modules
    resumed = train(base, train_file, None, "monteclora", tmp_path / "cut", config, 0, True)
    assert resumed.digest == whole.digest


def test_post_hoc_needs_an_adapter(base: Path, train_file: Path, tmp_path: Path) -> None:
    config = quick_config("monteclora", "method.posthoc=true")
    with pytest.raises(ConfigError, match="method.posthoc keeps A and B of a trained adapter") as caught:
        train(base, train_file, None, "monteclora", tmp_path / "out", config)
    assert caught.value.key == "lora.init"


@pytest.mark.parametrize("dof", ["0", "-1", "n_out"])
def test_other_degrees_of_freedom_are_refused(dof: str, base: Path, train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.dof"):
        train(base, train_file, None, "monteclora", tmp_path / "o", quick_config("monteclora", f"method.dof={dof}"))
