"""BLoB: gradients, the divergence and its weights, the closed-form posterior of a regression, and flipout."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from credence.adapters.kinds import DiagPosterior
from credence.adapters.posterior import LoraFactors, draw
from credence.adapters.sampling import NoiseSource
from credence.training.checkpoint import checkpoint_folder, latest_checkpoint
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError
from credence.training.loop import train
from credence.training.methods import Plan, method_settings
from credence.training.methods.blob import Blob, BlobSettings, RowSigns, blundell_weight, kl_diagonal
from credence.training.modeling import LoraSite, MemberSite, _SampledLinear, add_lora, load_base
from tests.training.conftest import quick_config
from tests.training.test_loop import Gradients, StopAfter


def adapted(base: Path, **settings: object) -> tuple[nn.Module, list[LoraSite], Blob]:
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    method = Blob(BlobSettings.model_validate(settings), sites)
    for site in sites:
        nn.init.normal_(site.mean.B, std=0.1)
        with torch.no_grad():
            root = site.layer.credence_sd_root
            root.mul_(torch.linspace(-1.5, 1.5, root.numel()).reshape(root.shape))
    return model, sites, method


def nll(model: nn.Module) -> Tensor:
    ids = torch.arange(18).reshape(3, 6) + 40
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_it_starts_as_the_lora(base: Path) -> None:
    """r n_in trainable numbers more per module, and sd = initial_sd."""
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    method = Blob(BlobSettings(initial_sd=0.03), sites)
    after = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert after - before == len(sites) * 4 * 32
    for site in sites:
        posterior = method.posteriors()[site.name]
        assert isinstance(posterior, DiagPosterior) and posterior.log_sd_A is not None and posterior.log_sd_B is None
        assert not posterior.log_sd_A.requires_grad
        torch.testing.assert_close(posterior.log_sd_A.exp(), torch.full((4, 32), 0.03))
        posterior.check(site.name, site.mean)


@pytest.mark.parametrize("flipout", [False, True])
def test_all_parameters_receive_task_gradient_and_move(base: Path, flipout: bool) -> None:
    model, sites, method = adapted(base, initial_sd=0.05, flipout=flipout)
    optimizer = method.optimizer(learning_rate=0.01, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    model.train()
    method.begin_step(NoiseSource(0, 0, "train"))
    nll(model).backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 3 * len(sites)
    assert {id(p) for p in trainable} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(p.is_leaf and p.grad is not None and bool(p.grad.any()) for p in trainable)
    before = [p.detach().clone() for p in trainable]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(trainable, before, strict=True))


def test_the_training_sample_is_the_posteriors_draw(base: Path) -> None:
    model, sites, method = adapted(base, initial_sd=0.05)
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


@pytest.mark.parametrize("prior_sd", [0.2, 1.0, 3.0])
def test_the_divergence_is_that_of_torch(prior_sd: float) -> None:
    mean, log_sd = torch.linspace(-1, 2, 15).double().reshape(3, 5), torch.linspace(-4, 1, 15).double().reshape(3, 5)
    expected = kl_divergence(Normal(mean, log_sd.exp()), Normal(torch.zeros(3, 5).double(), prior_sd)).sum()
    torch.testing.assert_close(kl_diagonal(mean, log_sd, prior_sd), expected)


def test_the_regulariser_is_the_mean_over_modules(base: Path) -> None:
    _, sites, method = adapted(base, kl_weight=0.3, prior_sd=0.5)
    method.begin_step(NoiseSource(0, 0, "train"))
    total = 0.0
    for site in sites:
        mean, sd = site.mean.A.detach().double(), site.layer.credence_sd_root.detach().double() ** 2
        total += float(kl_divergence(Normal(mean, sd), Normal(torch.zeros_like(mean), 0.5)).sum())
    assert float(method.regulariser().detach()) == pytest.approx(0.3 * total / len(sites), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_blundell_weights(steps: int) -> None:
    """2^(S - i) / (2^S - 1), times S; they add up to S in every epoch."""
    weights = [blundell_weight(step, steps) for step in range(3 * steps)]
    expected = [steps * 2 ** (steps - i) / (2**steps - 1) for i in range(1, steps + 1)]
    assert weights == pytest.approx(3 * expected)
    assert sum(weights[:steps]) == pytest.approx(steps)


def test_blundell_weights_of_long_epochs() -> None:
    weights = [blundell_weight(step, 5000) for step in range(5000)]
    assert sum(weights) == pytest.approx(5000) and weights[:2] == [2500.0, 1250.0] and weights[-1] == 0


def test_blundell_weights_follow_the_step(base: Path) -> None:
    _, _, method = adapted(base, kl_reweighting="blundell", kl_weight=1.0)
    with pytest.raises(RuntimeError, match="begin_training must be called"):
        method.begin_step(NoiseSource(0, 0, "train"))
    method.begin_training(Plan(num_steps=8, steps_per_epoch=3, num_rows=24))
    values = []
    for step in range(5):
        method.begin_step(NoiseSource(0, step, "train"))
        values.append(float(method.regulariser().detach()))
    assert [value / sum(values[:3]) for value in values] == pytest.approx([4 / 7, 2 / 7, 1 / 7, 4 / 7, 2 / 7], rel=1e-5)


ROWS = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 1.5]))[:4]
"""Inputs x_n, one per row, along the first four of five axes."""


@pytest.mark.parametrize("flipout", [False, True])
def test_a_regression_has_the_closed_form_posterior(flipout: bool) -> None:
    """y = B A x + N(0, s^2) with orthonormal columns of B: entry (j, i) of A has precision 1/s_p^2 + sum_n x_ni^2 / s^2.

    The fifth column meets no input: there the divergence alone acts, and takes the standard deviation to the prior's and the mean
    to 0.
    """
    prior_sd, sigma, rank, n_out = 0.7, 0.5, 2, 4
    B = torch.linalg.qr(torch.randn(n_out, rank, generator=torch.Generator().manual_seed(0)))[0]
    target = torch.randn(len(ROWS), n_out, generator=torch.Generator().manual_seed(1))
    site = MemberSite("m", LoraFactors(A=torch.full((rank, 5), 0.5), B=B))
    method = Blob(BlobSettings(kl_weight=1.0, prior_sd=prior_sd, initial_sd=0.1, flipout=flipout), [site])
    A, root = site.mean.A, site.layer.credence_sd_root
    optimizer = torch.optim.Adam([A, root], lr=0.02)
    steps, kept = 2500, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        method.begin_step(NoiseSource(0, step, "train"))
        hidden = layer_of(site, ROWS)
        loss = (target - hidden @ B.T).square().sum() / (2 * sigma**2) + method.regulariser()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps - 500:
            kept.append((A.detach().clone(), root.detach().square()))
    precision = 1 / prior_sd**2 + ROWS.square().sum(0) / sigma**2
    sd = torch.stack([entry[1] for entry in kept]).mean(0)
    torch.testing.assert_close(sd, precision.rsqrt().expand(rank, 5), rtol=0.1, atol=0)
    mean = torch.stack([entry[0] for entry in kept]).mean(0)
    torch.testing.assert_close(mean, (B.T @ target.T @ ROWS) / sigma**2 / precision, rtol=0, atol=0.05)
    assert float(sd[:, 4].mean()) == pytest.approx(prior_sd, rel=0.02)


def layer_of(site: LoraSite, input: Tensor) -> Tensor:
    """What the module's factor A makes of ``input`` in training mode."""
    rank, n_in = (site.members[0] if site.members else site).mean.A.shape
    layer = _SampledLinear(site, "A", nn.Linear(n_in, rank, bias=False)).train()
    output: Tensor = layer(input)
    site.take_B()
    return output


def member(seed: int = 0, sd: float = 0.3) -> tuple[MemberSite, Blob]:
    generator = torch.Generator().manual_seed(seed)
    mean = LoraFactors(A=torch.randn(3, 5, generator=generator), B=torch.randn(4, 3, generator=generator))
    site = MemberSite("m", mean)
    method = Blob(BlobSettings(initial_sd=sd, flipout=True), [site])
    with torch.no_grad():
        site.layer.credence_sd_root.mul_(torch.linspace(0.5, 1.5, 15).reshape(3, 5))
    return site, method


def test_flipout_gives_every_row_the_posteriors_noise_and_rows_their_own() -> None:
    """The same input in three rows, 4,000 steps: the mean of the outputs is that of the mean adapter, every row's covariance is the
    posterior's, and two rows are uncorrelated (bounds of 4.5 standard errors). Without signs all rows would be equal."""
    site, method = member()
    x, count = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2]), 4000
    with torch.no_grad():
        outputs = []
        for step in range(count):
            method.begin_step(NoiseSource(0, step, "train"))
            outputs.append(layer_of(site, x.expand(3, 2, 5)))
        deviation = (torch.stack(outputs) - F.linear(x, site.mean.A)).double()
        variance = (site.layer.credence_sd_root.double() ** 4 * x.double() ** 2).sum(1)  # [r]
    assert torch.equal(deviation[:, :, 0], deviation[:, :, 1])  # the positions of a row share its signs
    flat = deviation[:, :, 0].flatten(1)  # [count, 3 rows * r]
    scale = variance.sqrt().repeat(3)
    assert float((flat.mean(0) / (scale / count**0.5)).abs().max()) < 4.5
    covariance = torch.cov(flat.T) / (scale[:, None] * scale)
    off_diagonal = covariance - torch.eye(9)
    # The product of two rows' deviations has a heavier tail than that of independent Gaussians: standard error at most sqrt(3 / n).
    assert float(off_diagonal.abs().max()) < 4.5 * (3 / count) ** 0.5


def test_flipout_averages_to_the_mean_under_one_noise() -> None:
    """Over 20,000 rows of one step, whose noise they share: the signs alone are unbiased."""
    site, method = member()
    method.begin_step(NoiseSource(1, 0, "train"))
    x, count = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2]), 20_000
    with torch.no_grad():
        deviation = (layer_of(site, x.expand(count, 5)) - F.linear(x, site.mean.A)).double()
        assert float((deviation.mean(0) / (deviation.std(0) / count**0.5)).abs().max()) < 4.5
        assert site.noise is not None
        entries = site.layer.credence_sd_root.square() * site.noise["A"] * x
        torch.testing.assert_close(deviation.var(0), entries.square().sum(1).double(), rtol=0.05, atol=0)


def test_flipout_is_a_rank_one_change_of_signs() -> None:
    """Row n sees the weights A + (t_n s_n^T) * (A_s - A), by an explicit loop."""
    site, method = member()
    source = NoiseSource(2, 3, "train")
    method.begin_step(source)
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, sample, A = layer_of(site, x), site.factors().A, site.mean.A
        s, t = RowSigns(source, "m", site.mean)(4)
        assert s.shape == (4, 5) and t.shape == (4, 3)
        assert set(s.flatten().tolist()) == set(t.flatten().tolist()) == {-1.0, 1.0}
        for n in range(4):
            weights = A + torch.outer(t[n], s[n]) * (sample - A)
            torch.testing.assert_close(output[n], x[n] @ weights.T)


def test_signs_do_not_depend_on_the_size_of_the_batch() -> None:
    site, _ = member()
    small, large = (RowSigns(NoiseSource(0, 1, "train"), "m", site.mean) for _ in range(2))
    few, many = small(2), large(7)
    assert all(torch.equal(a, b[:2]) for a, b in zip(few, many, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(small(7), many, strict=True))
    other = RowSigns(NoiseSource(0, 2, "train"), "m", site.mean)(7)
    assert not torch.equal(other[0], many[0]) and not torch.equal(other[1], many[1])


def test_the_signs_of_both_sides_have_nothing_in_common() -> None:
    """Read as one sequence each, they agree in half of 3,000 places (bound 4.5 standard errors)."""
    s, t = RowSigns(NoiseSource(0, 0, "train"), "m", member()[0].mean)(1000)
    assert abs(float((s.flatten()[:3000] * t.flatten()).mean())) < 4.5 / 3000**0.5


def test_members_side_by_side_have_their_own_signs() -> None:
    """Two members in one module give what each gives alone."""
    pairs = [member(seed=seed) for seed in (0, 1)]
    for seed, (_, method) in enumerate(pairs):
        method.begin_step(NoiseSource(seed, 5, "train"))
    both = LoraSite("m", nn.Module(), members=[site for site, _ in pairs])
    x = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([layer_of(site, part) for (site, _), part in zip(pairs, x.chunk(2), strict=True)])
        torch.testing.assert_close(layer_of(both, x), alone)


def test_evaluation_has_no_signs(base: Path) -> None:
    model, _, method = adapted(base, flipout=True)
    model.eval()
    before = nll(model)
    method.begin_step(NoiseSource(0, 0, "train"))
    assert torch.equal(nll(model), before)
    model.train()
    assert not torch.equal(nll(model), before)


def test_flipout_survives_recomputation(base: Path, train_file: Path, tmp_path: Path) -> None:
    """Recomputed activations give the gradient of a run without: the forward pass that is repeated has the same signs."""
    gradients = []
    for number, checkpointing in enumerate(("false", "true")):
        kept = Gradients()
        overrides = ["method.flipout=true", "train.max_grad_norm=0", f"train.gradient_checkpointing={checkpointing}"]
        train(
            base, train_file, None, "blob", tmp_path / str(number), quick_config("blob", *overrides), callbacks=[kept]
        )
        assert kept.gradients is not None
        gradients.append(kept.gradients)
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("save_steps", [2, 3])
def test_flipout_and_blundell_resume_bit_for_bit(save_steps: int, base: Path, train_file: Path, tmp_path: Path) -> None:
    options = ["train.max_steps=7", f"train.save_steps={save_steps}", "method.flipout=true"]
    config = quick_config("blob", *options, "method.kl_reweighting=blundell", "method.kl_weight=0.01")
    whole = train(base, train_file, None, "blob", tmp_path / "whole", config, 5)
    with pytest.raises(KeyboardInterrupt):
        train(base, train_file, None, "blob", tmp_path / "cut", config, 5, callbacks=[StopAfter(5)])
    assert latest_checkpoint(checkpoint_folder(tmp_path / "cut")) is not None
    resumed = train(base, train_file, None, "blob", tmp_path / "cut", config, 5, True)
    assert resumed.digest == whole.digest
    plain = quick_config("blob", *options[:2], "method.kl_weight=0.01")
    assert train(base, train_file, None, "blob", tmp_path / "plain", plain, 5).digest != whole.digest


@pytest.mark.parametrize(
    ("setting", "value"),
    [("initial_sd", 0), ("kl_weight", -1), ("prior_sd", 0), ("kl_reweighting", "linear"), ("flipout", "maybe")],
)
def test_bad_settings_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"method.{setting}") as caught:
        method_settings("blob", {setting: value})
    assert caught.value.key == f"method.{setting}"
