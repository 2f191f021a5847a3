"""Laplace: Fisher information against slow loops, the Kronecker form against the dense Fisher, the evidence against dense determinants."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from credence.adapters.artifact import load_artifact
from credence.adapters.kinds import DiagPosterior, KroneckerPosterior, PointPosterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import LoraSettings
from credence.training.errors import ConfigError, TrainingError
from credence.training.loop import train
from credence.training.methods import Laplace, TrainingRows
from credence.training.methods import laplace as module
from credence.training.methods.laplace import (
    LaplaceSettings,
    LeadingEigenvectors,
    best_precision,
    draw_labels,
    last_block,
    log_evidence,
)
from credence.training.modeling import LoraSite, add_lora, get_factors, load_base
from credence.training.prompts import Example
from tests.training.conftest import quick_config

LABEL_ROWS = [
    Example(
        prompt=tuple(range(40 + i, 44 + 2 * i)), target=(66 + i % 3,), candidates=(66, 67, 68), answer=i % 3, line=i
    )
    for i in range(5)
]
TEXT_ROWS = [
    Example(prompt=tuple(range(50, 52 + i)), target=tuple(range(90, 93 + i)), candidates=(), answer=None, line=i)
    for i in range(3)
]


def setting(base: Path, examples: list[Example], batch_size: int = 2) -> TrainingRows:
    """r = 3 on q (32 x 32) and v (32 x 16, one key-value head), with a B that is not zero."""
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=3, alpha=6, dropout=0.5))
    for site in sites:
        nn.init.normal_(site.mean.B, std=0.2)
    return TrainingRows(model=model, sites=sites, examples=examples, pad_token=0, batch_size=batch_size, seed=4)


def fitted(rows: TrainingRows, **settings: Any) -> Laplace:
    method = Laplace(LaplaceSettings(**settings), rows.sites)
    method.fit_posterior(rows)
    return method


def row_loss(rows: TrainingRows, example: Example, labels: tuple[int, ...]) -> Tensor:
    """NLL of one row alone, without padding, at ``labels``."""
    ids = torch.tensor([example.prompt + example.target])
    log_probs = torch.log_softmax(rows.model(input_ids=ids).logits[0], dim=-1)
    first = len(example.prompt) - 1
    return -torch.stack([log_probs[first + i, label] for i, label in enumerate(labels)]).sum()


def drawn(rows: TrainingRows, number: int) -> tuple[int, ...]:
    """Labels from the model's own distribution at the row's uniforms, by a loop over the vocabulary."""
    example = rows.examples[number]
    uniforms = NoiseSource(rows.seed, number, "init").uniform("", "fisher", (len(example.target),)).tolist()
    ids = torch.tensor([example.prompt + example.target])
    probabilities = torch.softmax(rows.model(input_ids=ids).logits[0].detach().double(), dim=-1)
    labels = []
    for i, uniform in enumerate(uniforms):
        total = 0.0
        for label, probability in enumerate(probabilities[len(example.prompt) - 1 + i].tolist()):
            total += probability
            if total > uniform:
                labels.append(label)
                break
    return tuple(labels)


def parameters(sites: list[LoraSite]) -> dict[tuple[str, str], nn.Parameter]:
    return {(site.name, side): getattr(site.mean, side) for site in sites for side in ("A", "B")}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("examples", [LABEL_ROWS, TEXT_ROWS], ids=["label", "text"])
def test_the_diagonal_is_the_sum_of_squared_per_row_gradients(base: Path, fisher: str, examples: list[Example]) -> None:
    rows = setting(base, examples)
    method = fitted(rows, structure="diag", fisher=fisher, prior_precision=2.0)
    rows.model.eval()
    factors = parameters(list(rows.sites))
    slow = {key: torch.zeros_like(factor, dtype=torch.float64) for key, factor in factors.items()}
    for number, example in enumerate(examples):
        labels = drawn(rows, number) if fisher == "mc" else example.target
        gradients = torch.autograd.grad(row_loss(rows, example, labels), list(factors.values()))
        for key, gradient in zip(factors, gradients, strict=True):
            slow[key] += gradient.double().square()
    assert method.kind == "diag" and method.posterior_settings() == {}
    for (name, side), expected in slow.items():
        posterior = method.posteriors()[name]
        assert isinstance(posterior, DiagPosterior)
        precision = (-2 * posterior.tensors()[f"log_sd_{side}"].double()).exp()
        torch.testing.assert_close(precision, expected + 2.0, rtol=1e-4, atol=1e-6)
    assert max(float(value.max()) for value in slow.values()) > 0.01  # the rows say something beside the prior


def recorded(rows: TrainingRows, number: int, labels: tuple[int, ...]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Inputs [T, n] and output gradients [T, m] of every factor for one row alone, by recomputing each layer's output."""
    kept: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    handles = []
    for site in rows.sites:
        for side, container in (("A", site.layer.lora_A), ("B", site.layer.lora_B)):

            def hook(_: Any, given: tuple[Tensor], output: Tensor, key: tuple[str, str] = (site.name, side)) -> None:
                output.retain_grad()
                kept[key] = (given[0], output)

            handles.append(container["default"].register_forward_hook(hook))
    row_loss(rows, rows.examples[number], labels).backward()
    for handle in handles:
        handle.remove()
    rows.model.zero_grad()
    return {
        key: (inputs.detach()[0].double(), output.grad[0].double())  # type: ignore[index]
        for key, (inputs, output) in kept.items()
    }


@pytest.mark.parametrize("examples", [LABEL_ROWS, TEXT_ROWS], ids=["label", "text"])
def test_the_kronecker_factors_are_sums_over_rows_and_tokens(base: Path, examples: list[Example]) -> None:
    """Loops over tokens, without padding and without each row's last token; full ranks, so that nothing is cut off."""
    rows = setting(base, examples)
    method = fitted(rows, kronecker_rank=32, fisher="empirical", prior_precision=0.5)
    rows.model.eval()
    sums = {
        key: [torch.zeros(n, n, dtype=torch.float64) for n in (factor.shape[0], factor.shape[1])]
        for key, factor in parameters(list(rows.sites)).items()
    }
    tokens = 0
    for number, example in enumerate(examples):
        length = len(example.prompt) + len(example.target) - 1
        tokens += length
        for key, (inputs, gradients) in recorded(rows, number, example.target).items():
            assert not bool(gradients[length:].any())
            for t in range(length):
                sums[key][0] += torch.outer(gradients[t], gradients[t])
                sums[key][1] += torch.outer(inputs[t], inputs[t])
    assert method.kind == "lowrank"
    assert method.posterior_settings() == {"prior_log_sd": pytest.approx(-0.5 * np.log(0.5))}
    for (name, side), (S_out, S_in) in sums.items():
        posterior = method.posteriors()[name]
        assert isinstance(posterior, KroneckerPosterior)
        posterior.check(name, get_factors(rows.sites)[name])
        curvature = getattr(posterior, side)
        for end, expected in (("out", S_out), ("in", S_in / tokens)):
            vectors = getattr(curvature, f"{end}_vectors").double()
            ours = vectors @ torch.diag(getattr(curvature, f"{end}_values").double()) @ vectors.T
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_with_one_row_and_one_token_the_kronecker_form_is_the_rows_fisher(base: Path) -> None:
    """The product of the factors equals the outer product of the whole gradient, dense; the rank is 1 on both sides."""
    example = Example(prompt=(45,), target=(66,), candidates=(66, 67), answer=0, line=1)
    rows = setting(base, [example])
    method = fitted(rows, kronecker_rank=1, fisher="empirical", prior_precision=1.0)
    rows.model.eval()
    factors = parameters(list(rows.sites))
    gradients = torch.autograd.grad(row_loss(rows, example, (66,)), list(factors.values()))
    seen = 0.0
    for (name, side), gradient in zip(factors, gradients, strict=True):
        curvature = getattr(method.posteriors()[name], side)
        U, V = curvature.in_vectors.double(), curvature.out_vectors.double()
        S_in, S_out = (
            U @ torch.diag(curvature.in_values.double()) @ U.T,
            (V @ torch.diag(curvature.out_values.double()) @ V.T),
        )
        fisher = torch.outer(gradient.flatten(), gradient.flatten()).double()
        torch.testing.assert_close(torch.kron(S_out, S_in), fisher, rtol=1e-3, atol=1e-5 * float(fisher.abs().max()))
        seen = max(seen, float(fisher.abs().max()))
    assert seen > 1e-4


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_batch_size_and_the_padding_change_nothing(base: Path, structure: str) -> None:
    """Also the labels drawn for a row are its own."""
    one, all_at_once = (
        fitted(setting(base, TEXT_ROWS, batch_size=size), structure=structure, kronecker_rank=3) for size in (1, 3)
    )
    assert one.prior_precision == pytest.approx(all_at_once.prior_precision, rel=1e-3)
    for name, posterior in one.posteriors().items():
        for key, tensor in posterior.tensors().items():
            if not key.endswith("vectors"):
                other = all_at_once.posteriors()[name].tensors()[key]
                torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-5 * float(tensor.abs().max()))


def test_the_model_is_left_as_it_was(base: Path) -> None:
    rows = setting(base, LABEL_ROWS)
    rows.model.train()
    before = get_factors(rows.sites)
    fitted(rows)
    assert rows.model.training
    for site in rows.sites:
        assert torch.equal(site.mean.A, before[site.name].A) and torch.equal(site.mean.B, before[site.name].B)
        assert site.mean.A.grad is None
        assert not site.layer.lora_A["default"]._forward_hooks


def test_labels_are_drawn_from_the_distribution() -> None:
    """20,000 draws of a skewed distribution, bound 4.5 standard errors; 0 takes the first label that has probability."""
    probabilities = torch.tensor([0.0, 0.5, 0.05, 0.0, 0.45], dtype=torch.float64)
    uniform = NoiseSource(0, 0).uniform("", "u", (1, 20_000)).double()
    labels = draw_labels(probabilities.log().expand(1, 20_000, 5), uniform)
    share = torch.bincount(labels[0], minlength=5) / 20_000
    assert share.tolist() == pytest.approx(probabilities.tolist(), abs=4.5 * (0.25 / 20_000) ** 0.5)
    assert share[0] == 0 and share[3] == 0
    assert draw_labels(probabilities.log()[None, None], torch.zeros(1, 1)).item() == 1


def rows_of_rank(count: int, size: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(count, rank, generator=generator), torch.randn(rank, size, generator=generator)
    return (left * torch.logspace(1, -1, rank)) @ right


@pytest.mark.parametrize("exact", [True, False])
def test_leading_eigenvectors(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows of rank 9 in 40 dimensions: also a sketch of 12 rows finds the first 3 exactly."""
    monkeypatch.setattr(module, "EXACT_SIZE", 64 if exact else 16)
    rows = rows_of_rank(300, 40, 9)
    found = LeadingEigenvectors(40, 3, torch.device("cpu"))
    for block in rows.split(70):
        found.add(block)
    values, vectors = found.top()
    dense = rows.double().T @ rows.double()
    assert (values.shape, vectors.shape) == ((3,), (40, 3))
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(0)[:3])
    torch.testing.assert_close(dense @ vectors, vectors * values)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))


def test_a_sketch_of_full_rank_rows_is_close_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIZE", 16)
    rows = rows_of_rank(600, 40, 40)
    found = LeadingEigenvectors(40, 3, torch.device("cpu"))
    found.add(rows)
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double()).flip(0)[:3]
    ratio = found.top()[0] / exact
    assert 0.97 < float(ratio.min()) and float(ratio.max()) <= 1 + 1e-9


def test_leading_eigenvectors_of_nothing_are_orthonormal() -> None:
    """B starts at zero, and then A has no gradient."""
    for size in (4, module.EXACT_SIZE + 1):
        values, vectors = LeadingEigenvectors(size, 10, torch.device("cpu")).top()
        assert not bool(values.any()) and vectors.shape == (size, min(10, size))
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(10, size), dtype=torch.float64))


def dense_evidence(F: Tensor, theta: Tensor, precision: float, log_likelihood: float) -> float:
    """log p(D | theta) + log N(theta; 0, 1 / lambda) + P/2 log 2 pi - 1/2 log det(F + lambda I), term by term."""
    size = len(theta)
    prior = torch.distributions.Normal(0.0, torch.tensor(precision, dtype=torch.float64) ** -0.5).log_prob(theta).sum()
    determinant = torch.linalg.slogdet(F + precision * torch.eye(size, dtype=torch.float64)).logabsdet
    return float(log_likelihood + prior + 0.5 * size * np.log(2 * np.pi) - 0.5 * determinant)


@pytest.mark.parametrize("precision", [0.03, 1.0, 40.0])
def test_the_evidence_is_the_dense_one(precision: float) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    F, theta = root.T @ root, torch.randn(9, generator=generator, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(root @ root.T)  # the five that are zero are left out
    ours = log_evidence(eigenvalues, float(theta.square().sum()), precision, log_likelihood=-12.5)
    assert ours == pytest.approx(dense_evidence(F, theta, precision, -12.5))


@pytest.mark.parametrize(("scale", "squared_norm"), [(1.0, 3.0), (1e4, 0.1), (1e-5, 50.0)])
def test_the_best_precision_maximises_the_evidence(scale: float, squared_norm: float) -> None:
    """Against scipy, and against the fixed point lambda |theta|^2 = sum_i f_i / (f_i + lambda)."""
    eigenvalues = scale * torch.logspace(-3, 1, 30, dtype=torch.float64)
    best = best_precision(eigenvalues, squared_norm)
    found = minimize_scalar(
        lambda log10: -log_evidence(eigenvalues, squared_norm, 10**log10), bounds=(-10, 10), method="bounded"
    )
    assert np.log10(best) == pytest.approx(found.x, abs=1e-3)
    assert best * squared_norm == pytest.approx(float((eigenvalues / (eigenvalues + best)).sum()), rel=1e-3)


@pytest.mark.parametrize(("eigenvalues", "squared_norm"), [([0.0, 0.0], 1.0), ([1.0, 2.0], 0.0)])
def test_an_evidence_without_a_maximum_is_an_error(eigenvalues: list[float], squared_norm: float) -> None:
    with pytest.raises(TrainingError, match=r"no maximum between .* train the adapter first, or set method.prior_prec"):
        best_precision(torch.tensor(eigenvalues, dtype=torch.float64), squared_norm)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_prior_precision_of_a_fit_is_the_evidences_maximum(base: Path, structure: str) -> None:
    """Recomputed from the posterior that was stored: its Fisher information and the norm of all A and B."""
    rows = setting(base, LABEL_ROWS)
    method = fitted(rows, structure=structure)
    assert method.prior_precision is not None
    squared_norm = sum(float(p.detach().double().square().sum()) for p in parameters(list(rows.sites)).values())
    eigenvalues = []
    for posterior in method.posteriors().values():
        if isinstance(posterior, DiagPosterior):
            precisions = [(-2 * tensor.double()).exp().flatten() for tensor in posterior.tensors().values()]
            eigenvalues += [(precision - method.prior_precision).clamp_min(0) for precision in precisions]
        else:
            assert isinstance(posterior, KroneckerPosterior) and posterior.A is not None and posterior.B is not None
            assert posterior.prior_log_sd == pytest.approx(-0.5 * np.log(method.prior_precision))
            eigenvalues += [
                torch.outer(s.out_values, s.in_values).double().flatten() for s in (posterior.A, posterior.B)
            ]
    values = torch.cat(eigenvalues)
    fixed_point = float((values / (values + method.prior_precision)).sum()) / squared_norm
    assert method.prior_precision == pytest.approx(fixed_point, rel=0.02)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_last_layer_noise(base: Path, structure: str) -> None:
    rows = setting(base, LABEL_ROWS)
    last, everything = (
        fitted(rows, structure=structure, layers=layers, prior_precision=1.0) for layers in ("last", "all")
    )
    for name, posterior in last.posteriors().items():
        if ".layers.0." in name:
            assert posterior == PointPosterior()
        else:
            expected = everything.posteriors()[name].tensors()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in posterior.tensors().items())
    assert sum(isinstance(posterior, PointPosterior) for posterior in last.posteriors().values()) == 2


def test_the_last_block_is_found_by_number() -> None:
    """Not by text: 10 comes after 9; a second number (an expert's) does not count."""
    names = ["m.layers.9.mlp.experts.70.up", "m.layers.10.mlp.experts.3.up", "m.layers.10.q", "head"]
    assert last_block(names) == names[1:3]
    with pytest.raises(ConfigError, match=r"no adapted module has a layer index in its name \(head, embed2\); use all"):
        last_block(["head", "embed2"])


def test_modules_that_see_no_tokens_are_refused(base: Path) -> None:
    rows = setting(base, LABEL_ROWS)
    torch.manual_seed(1)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(target_modules=("q_proj", "lm_head")))
    with pytest.raises(TrainingError, match=r"lm_head sees inputs of shape .*leave it out of lora.target_modules"):
        fitted(replace(rows, model=model, sites=sites), structure="diag")


def test_the_posterior_is_read_after_it_was_fitted(base: Path) -> None:
    with pytest.raises(RuntimeError, match="fit_posterior must be called"):
        Laplace(LaplaceSettings(), setting(base, LABEL_ROWS).sites).posteriors()


@pytest.mark.parametrize(("layers", "structure"), [("last", "diag"), ("last", "kron"), ("all", "diag")])
def test_runs_of_every_structure_write_artifacts(
    layers: str, structure: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    config = quick_config("laplace", f"method.layers={layers}", f"method.structure={structure}")
    result = train(base, train_file, validation_file, "laplace", tmp_path / "out", config)
    artifact = load_artifact(result.path)
    assert artifact.config.kind == ("diag" if structure == "diag" else "lowrank")
    assert set(artifact.config.settings) == (set() if structure == "diag" else {"prior_log_sd"})
    points = [name for name, posterior in artifact.posteriors.items() if isinstance(posterior, PointPosterior)]
    assert points == ([name for name in sorted(artifact.mean) if ".0." in name] if layers == "last" else [])
    sample = artifact.draw(seed=0, index=0, tau=1.0)
    for name, mean in artifact.mean.items():
        assert torch.equal(sample[name].A, mean.A) == (name in points)
