"""Laplace approximation around a MAP adapter (Daxberger et al., NeurIPS 2021; for LoRA Yang et al., ICLR 2024).

Training is that of ``map``, or there is none and the adapter is given. Then a Gaussian is put at its A and B, whose precision is the Fisher
information of the training rows plus a prior's precision lambda, F + lambda I, with F a sum over the rows n (not a mean):

    diag:  F = sum_n g_n^2 entry by entry,  g_n = sum_t b_t a_t^T the gradient of row n's negative log-likelihood (nats)
    kron:  F = S_out (x) S_in,   S_out = sum_{n,t} b_t b_t^T,   S_in = (1 / N_tokens) sum_{n,t} a_t a_t^T

a_t is the input of the factor (A or B, a linear layer) at token t, b_t the gradient at its output. The Kronecker form is KFAC-expand
(Eschenhagen et al., NeurIPS 2023, eq. 19): every token counts as a data point, and products of different tokens of a row are dropped. With
one row and one token it is the row's Fisher exactly. laplace-torch normalises in the same way, by the number of rows. Where we differ:
tokens on which no target depends (padding and the last token of a row) are left out of both sums, so that padding changes nothing.
As in Yang et al. the covariance of the large side (input of A, output of B) is kept on its leading ``kronecker_rank`` eigenvectors; in all
other directions the posterior is the prior.

The prior is N(0, 1 / lambda) for every entry, one lambda for all modules. Unless given it maximises the Laplace marginal likelihood
(Daxberger et al., eq. 5 and 6; P parameters theta in the modules concerned):

    log p(D | theta) - 1/2 log det(F + lambda I) + P/2 log lambda - lambda/2 |theta|^2

theta is not trained under this prior: it is where AdamW stopped, and A started away from 0. Along most directions the rows say little and
the posterior is as wide as the prior, so its samples are usable only at a fitted tau (release with validation rows).
"""

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from credence.adapters.kinds import DiagPosterior, KroneckerPosterior, PointPosterior
from credence.adapters.kinds.lowrank import KroneckerCurvature
from credence.adapters.posterior import LoraFactors, Posterior
from credence.adapters.sampling import NoiseSource
from credence.training.config import Section
from credence.training.errors import ConfigError, TrainingError
from credence.training.methods.base import Method, TrainingRows
from credence.training.modeling import ADAPTER, LoraSite, get_factors, logits_at, set_factors
from credence.training.prompts import IGNORED

logger = logging.getLogger(__name__)

EXACT_SIZE = 1024
"""Largest side whose covariance is summed as a matrix, 8 MB in float64; larger ones are sketched."""
OVERSAMPLING = 4
BLOCK_ROWS = 128
PRECISION_DECADES = 12
"""lambda is looked for from 10^-12 to 10^12."""
GOLDEN = (5**0.5 - 1) / 2


class LaplaceSettings(Section):
    """Settings of the Laplace approximation.

    Attributes:
        structure: of the Fisher information: Kronecker-factored, or its diagonal.
        layers: "last" keeps noise on the modules of the last transformer block only: those with the highest layer index, the first number
            between dots in a module's name. The others are deterministic.
        kronecker_rank: eigenvectors kept of the input of A and the output of B.
        fisher: "mc" draws one label for each target position from the model's own distribution over the full vocabulary: an unbiased
            estimate of the Fisher information. "empirical" takes the rows' own labels.
        prior_precision: lambda; None maximises the marginal likelihood.
    """

    structure: Literal["kron", "diag"] = "kron"
    layers: Literal["all", "last"] = "all"
    kronecker_rank: int = Field(default=10, ge=1)
    fisher: Literal["mc", "empirical"] = "mc"
    prior_precision: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorTrace:
    """What one batch leaves at one factor: inputs a [B, T, n] and output gradients b [B, T, m]."""

    inputs: Tensor
    gradients: Tensor


class LeadingEigenvectors:
    """Leading eigenvectors of a sum of x x^T over many rows x, without n x n memory where n is large.

    Up to ``EXACT_SIZE`` the matrix is summed and its eigenvectors are exact. Above, the sum is a sketch of 4 R rows: new rows are stacked
    under it and the leading 4 R singular directions kept (incremental SVD). A sketch loses the energy it drops, so its eigenvalues
    are lower bounds; they are exact while the rank of the sum is at most 4 R.

    Args:
        size: n.
        rank: R, eigenvectors wanted; at most n.
    """

    def __init__(self, size: int, rank: int, device: torch.device) -> None:
        self.rank = min(rank, size)
        self.exact = size <= EXACT_SIZE
        height = size if self.exact else min(size, OVERSAMPLING * self.rank)
        self._sum = torch.zeros(height, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Adds rows [N, n]."""
        rows = rows.double()
        if self.exact:
            self._sum += rows.T @ rows
            return
        for start in range(0, rows.shape[0], BLOCK_ROWS):
            stacked = torch.cat([self._sum, rows[start : start + BLOCK_ROWS]])
            _, directions = torch.linalg.eigh(stacked @ stacked.T)
            self._sum = directions[:, -self._sum.shape[0] :].T @ stacked

    def top(self) -> tuple[Tensor, Tensor]:
        """The R largest eigenvalues, [R], in falling order and their eigenvectors, [n, R]; float64 on the CPU."""
        if self.exact:
            values, vectors = torch.linalg.eigh(self._sum.cpu())
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            _, singular, directions = torch.linalg.svd(self._sum.cpu(), full_matrices=False)
            values, vectors = singular.square(), directions.T
        return values[: self.rank].clamp_min(0), vectors[:, : self.rank]


class DiagonalFisher:
    """Sum over the rows of a factor's squared per-row gradients, [m, n] float64."""

    def __init__(self, factor: Tensor) -> None:
        self.sum = torch.zeros(factor.shape, dtype=torch.float64, device=factor.device)

    def add(self, trace: FactorTrace, tokens: Tensor) -> None:
        """Adds the rows of a batch; padding has no gradient, so ``tokens`` changes nothing."""
        per_row = torch.einsum("btm,btn->bmn", trace.gradients, trace.inputs)
        self.sum += per_row.double().square().sum(0)

    def eigenvalues(self) -> Tensor:
        """The diagonal, flat, float64 on the CPU."""
        return self.sum.flatten().cpu()


class KroneckerFisher:
    """S_out (x) S_in of one factor [m, n].

    Args:
        rank_out, rank_in: eigenvectors kept.
    """

    def __init__(self, factor: Tensor, rank_out: int, rank_in: int) -> None:
        self._out = LeadingEigenvectors(factor.shape[0], rank_out, factor.device)
        self._in = LeadingEigenvectors(factor.shape[1], rank_in, factor.device)
        self._count = 0

    def add(self, trace: FactorTrace, tokens: Tensor) -> None:
        """Adds the tokens [B, T] (bool) of a batch that targets depend on."""
        self._in.add(trace.inputs[tokens])
        self._out.add(trace.gradients[tokens])
        self._count += int(tokens.sum())

    @cached_property
    def curvature(self) -> KroneckerCurvature:
        """Eigenvalues and eigenvectors of what was added, float32; read it after the last row."""
        in_values, in_vectors = self._in.top()
        out_values, out_vectors = self._out.top()
        return KroneckerCurvature(
            in_vectors=in_vectors.float(),
            in_values=(in_values / self._count).float(),
            out_vectors=out_vectors.float(),
            out_values=out_values.float(),
        )

    def eigenvalues(self) -> Tensor:
        """Those of the Kronecker product on its known directions, flat, float64 on the CPU; all others are 0."""
        return (self.curvature.out_values.double()[:, None] * self.curvature.in_values.double()).flatten()


class Laplace(Method):
    """MAP training, then a Gaussian from the curvature of the training rows' likelihood."""

    name: ClassVar[str] = "laplace"
    can_be_member: ClassVar[bool] = False
    settings_class: ClassVar[type[Section]] = LaplaceSettings
    needs_steps: ClassVar[bool] = False

    def __init__(self, settings: LaplaceSettings, sites: Sequence[LoraSite]) -> None:
        super().__init__(settings, sites)
        names = [site.name for site in self.sites]
        self.random_modules = names if settings.layers == "all" else last_block(names)
        self.prior_precision: float | None = None
        self._posteriors: dict[str, Posterior] | None = None

    @property
    def kind(self) -> str:
        """``diag`` for the diagonal structure, ``lowrank`` for the Kronecker structure."""
        return "diag" if self.settings.structure == "diag" else "lowrank"

    def fit_posterior(self, rows: TrainingRows) -> None:
        """Sums the Fisher information over all rows, one forward and backward pass each, and chooses the prior precision.

        Raises:
            TrainingError: a factor sees other inputs than one vector per token, or the marginal likelihood has no maximum.
        """
        mean = self.mean()
        with mean_in_model(rows, mean):
            fishers = self._fishers(rows, [site for site in rows.sites if site.name in self.random_modules])
        precision = self.settings.prior_precision
        if precision is None:
            squared_norm = sum(
                float(mean[module].A.double().square().sum() + mean[module].B.double().square().sum())
                for module in self.random_modules
            )
            precision = best_precision(torch.cat([fisher.eigenvalues() for fisher in fishers.values()]), squared_norm)
        logger.info("prior precision %.4g", precision)
        self.prior_precision = precision
        self._posteriors = {
            site.name: self._posterior(fishers[site.name, "A"], fishers[site.name, "B"])
            if site.name in self.random_modules
            else PointPosterior()
            for site in self.sites
        }

    def _fishers(
        self, rows: TrainingRows, sites: Sequence[LoraSite]
    ) -> dict[tuple[str, str], DiagonalFisher | KroneckerFisher]:
        kept, rank = self.settings.kronecker_rank, sites[0].mean.rank
        fishers: dict[tuple[str, str], DiagonalFisher | KroneckerFisher] = {}
        for site in sites:
            mean = site.mean
            if self.settings.structure == "diag":
                fishers[site.name, "A"], fishers[site.name, "B"] = DiagonalFisher(mean.A), DiagonalFisher(mean.B)
            else:
                fishers[site.name, "A"] = KroneckerFisher(mean.A, rank, kept)
                fishers[site.name, "B"] = KroneckerFisher(mean.B, kept, rank)
        first = 0
        for batch in rows.batches():
            numbers = range(first, first + len(batch["input_ids"]))
            for key, trace in traces(rows, sites, batch, numbers, drawn_labels=self.settings.fisher == "mc").items():
                fishers[key].add(trace, informed_tokens(batch, all_tokens=rows.by_head))
            first = numbers.stop
        return fishers

    def _posterior(self, A: DiagonalFisher | KroneckerFisher, B: DiagonalFisher | KroneckerFisher) -> Posterior:
        assert self.prior_precision is not None
        if isinstance(A, DiagonalFisher) and isinstance(B, DiagonalFisher):
            log_sd_A, log_sd_B = (-0.5 * (side.sum + self.prior_precision).log() for side in (A, B))
            return DiagPosterior(log_sd_A=log_sd_A.float().cpu(), log_sd_B=log_sd_B.float().cpu())
        assert isinstance(A, KroneckerFisher) and isinstance(B, KroneckerFisher)
        return KroneckerPosterior(A=A.curvature, B=B.curvature, prior_log_sd=-0.5 * math.log(self.prior_precision))

    def posteriors(self) -> dict[str, Posterior]:
        """What was fitted; kind ``point`` for modules that stay deterministic."""
        if self._posteriors is None:
            raise RuntimeError("Laplace.fit_posterior must be called before the posterior is read")
        return self._posteriors

    def posterior_settings(self) -> dict[str, float]:
        """prior_log_sd of the Kronecker structure; the diagonal one has the prior in its standard deviations."""
        assert self.prior_precision is not None
        return {} if self.settings.structure == "diag" else {"prior_log_sd": -0.5 * math.log(self.prior_precision)}


def last_block(names: Sequence[str]) -> list[str]:
    """The modules with the highest layer index, the first number between dots of a name.

    Raises:
        ConfigError: no name has one.
    """
    indices = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", f".{name}."))}
    if not indices:
        raise ConfigError(
            f"method.layers is 'last' and no adapted module has a layer index in its name ({', '.join(names)}); use all",
            key="method.layers",
        )
    return [name for name in names if indices.get(name) == max(indices.values())]


@contextmanager
def mean_in_model(rows: TrainingRows, mean: dict[str, LoraFactors]) -> Iterator[None]:
    """Puts the mean's factors into the model, in evaluation mode, and what was there back afterwards."""
    before, was_training = get_factors(rows.sites), rows.model.training
    set_factors(rows.sites, mean)
    rows.model.eval()
    try:
        yield
    finally:
        set_factors(rows.sites, before)
        rows.model.train(was_training)


def informed_tokens(batch: dict[str, Tensor], *, all_tokens: bool = False) -> Tensor:
    """Tokens [B, T] (bool) on which a target can depend: all of a row but its last.

    Args:
        all_tokens: the last one too: the class of a row depends on every token of it.
    """
    mask = batch["attention_mask"]
    if all_tokens:
        return mask.bool()
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1).bool()


def traces(
    rows: TrainingRows, sites: Sequence[LoraSite], batch: dict[str, Tensor], numbers: range, *, drawn_labels: bool
) -> dict[tuple[str, str], FactorTrace]:
    """Inputs and output gradients of every factor for the sum over rows and targets of the negative log-likelihood (nats).

    Args:
        numbers: of the batch's rows; the label drawn for a row depends on (seed, number) only.
        drawn_labels: whether labels come from the model's own distribution, instead of the rows.

    Returns:
        By (module, ``A`` or ``B``).

    Raises:
        TrainingError: a factor sees other inputs than one vector for each token.
    """
    inputs: dict[tuple[str, str], Tensor] = {}
    outputs: dict[tuple[str, str], Tensor] = {}

    def remember(key: tuple[str, str]) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[key], outputs[key] = given[0].detach(), output

        return hook

    handles = [
        container[ADAPTER].register_forward_hook(remember((site.name, side)))
        for site in sites
        for side, container in (("A", site.layer.lora_A), ("B", site.layer.lora_B))
    ]
    try:
        with torch.enable_grad():
            loss = batch_loss(rows, batch, numbers, drawn_labels=drawn_labels)
    finally:
        for handle in handles:
            handle.remove()
    for (module, _), given in inputs.items():
        if given.shape[:-1] != batch["input_ids"].shape:
            raise TrainingError(
                f"{module} sees inputs of shape {tuple(given.shape)}, not one vector for each of the {tuple(batch['input_ids'].shape)} "
                "tokens; leave it out of lora.target_modules, the Laplace approximation does not cover it"
            )
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True, materialize_grads=True)
    return {
        key: FactorTrace(inputs=inputs[key], gradients=gradient)
        for key, gradient in zip(outputs, gradients, strict=True)
    }


def batch_loss(rows: TrainingRows, batch: dict[str, Tensor], numbers: range, *, drawn_labels: bool) -> Tensor:
    """Negative log-likelihood of a batch, summed over its targets, at their labels or at drawn ones; nats."""
    targets = batch["labels"][:, 1:]
    positions = (targets != IGNORED).any(0).nonzero().squeeze(1)
    logits_BPV = logits_at(
        rows.model, batch["input_ids"], batch["attention_mask"], positions, batch.get("token_type_ids")
    )
    log_probs_BPV = torch.log_softmax(logits_BPV.float(), dim=-1)
    labels = targets[:, positions]
    if drawn_labels:
        uniform_BP = torch.zeros(labels.shape, dtype=torch.float64)
        for row, number in enumerate(numbers):
            own = (labels[row] != IGNORED).cpu()
            uniform_BP[row, own] = (
                NoiseSource(rows.seed, number, "init").uniform("", "fisher", (int(own.sum()),)).double()
            )
        labels = torch.where(labels == IGNORED, labels, draw_labels(log_probs_BPV.detach(), uniform_BP))
    known = labels != IGNORED
    return -log_probs_BPV.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)[known].sum()


def draw_labels(log_probs_BPV: Tensor, uniform_BP: Tensor) -> Tensor:
    """The inverse distribution function at uniforms on [0, 1): labels [B, P] from distributions over the vocabulary."""
    cumulative = log_probs_BPV.double().exp().cumsum(-1)
    threshold = uniform_BP.to(cumulative.device)[..., None] * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_max(cumulative.shape[-1] - 1)


def log_evidence(eigenvalues: Tensor, squared_norm: float, precision: float, *, log_likelihood: float = 0.0) -> float:
    """The Laplace marginal likelihood above, in nats.

    log det(F + lambda I) - P log lambda is the sum of log(1 + f_i / lambda) over the eigenvalues f_i of F, so zeros may be left out.

    Args:
        eigenvalues: of F, float64.
        squared_norm: |theta|^2.
        precision: lambda.
        log_likelihood: log p(D | theta), a constant in lambda.
    """
    return log_likelihood - 0.5 * float((eigenvalues / precision).log1p().sum()) - 0.5 * precision * squared_norm


def best_precision(eigenvalues: Tensor, squared_norm: float) -> float:
    """The prior precision that maximises :func:`log_evidence`: half decades first, then golden sections of the best one's neighbourhood.

    Raises:
        TrainingError: there is no maximum inside the range, for example because theta or the Fisher information is 0.
    """

    def value(log10: float) -> float:
        return log_evidence(eigenvalues, squared_norm, 10.0**log10)

    grid = [half / 2 for half in range(-2 * PRECISION_DECADES, 2 * PRECISION_DECADES + 1)]
    best = max(grid, key=value)
    if best in (grid[0], grid[-1]):
        raise TrainingError(
            f"the marginal likelihood has no maximum between the prior precisions 1e-{PRECISION_DECADES} and 1e{PRECISION_DECADES} "
            f"(|theta|^2 is {squared_norm:.3g}, the trace of the Fisher information {float(eigenvalues.sum()):.3g}); "
            "train the adapter first, or set method.prior_precision"
        )
    low, high = best - 0.5, best + 0.5
    while high - low > 1e-6:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if value(left) >= value(right) else (left, high)
    return float(10.0 ** ((low + high) / 2))
