"""Release: fits tau, then the temperature, on held-out data for every number of samples K, and checks the noise's size.

tau scales the posterior's variance; it is chosen by the held-out negative log-likelihood of the K-sample average at temperature 1,
over a coarse log grid that includes 0, continued while the best value lies at an end and refined by half a grid step beside each K's
best. T is a temperature on the averaged probabilities, chosen after tau. The samples of K are the indices 0, ..., K-1 of seed 0, so one
pass over the largest K serves all.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from credence.adapters.artifact import Artifact, load_artifact, num_distinct_samples, write_artifact
from credence.adapters.config import Calibration, CurvePoint, Fit
from credence.adapters.kinds import EnsemblePosterior
from credence.adapters.posterior import LoraFactors, Posterior, draw
from credence.adapters.precision import PrecisionReport, measure_precision
from credence.adapters.sampling import NoiseSource
from credence.training import metrics
from credence.training.card import model_card
from credence.training.config import ReleaseSettings
from credence.training.data import DataFile, Row, read_data
from credence.training.errors import DataError, TrainingError
from credence.training.generate import stop_tokens
from credence.training.maps import Answers, MapResult
from credence.training.modeling import context_length
from credence.training.predict import Factors, Prediction, Predictor, Scores, log_likelihood, score
from credence.training.prompts import Example
from credence.training.session import open_session

logger = logging.getLogger(__name__)

SERVING_DTYPE = "bfloat16"
PRECISION_DRAWS = 4

TEMPERATURES: tuple[float, ...] = tuple(float(2 ** (i / 12)) for i in range(-24, 37))
"""Grid of temperatures, 0.25 to 8 in steps of 6 %: the likelihood's loss from rounding T to it is below 1e-3 nats."""

MEMBERS_ALONE = 1e-12
"""Of an ensemble tau = 0 is the one mean adapter; at this tau its samples are the members' means."""

CLEAR = 0.01
"""A difference of held-out NLL, nats, that says something about tau; below it values are as good as equal."""

MAX_EXTENSIONS = 4
"""Most steps of ten that the grid of tau grows by when its best value lies at an end."""

Say = Callable[[str], None]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseResult:
    """What was fitted.

    Attributes:
        tau: by K (empty for kind ``point``).
        rows: held-out rows used.
        accuracy, ece15: of these rows by K, at the fitted tau and temperature; empty for free text.
        maps: of the confidence by K, tried or fitted; empty for rows with labels or choices.
        digest, path: of the artifact it was written to; empty while a training run has not written one.
    """

    tau: dict[int, Fit]
    calibration: Calibration
    precision: PrecisionReport
    rows: int
    accuracy: dict[int, float] = field(default_factory=dict)
    ece15: dict[int, float] = field(default_factory=dict)
    maps: dict[int, MapResult] = field(default_factory=dict)
    digest: str = ""
    path: Path | None = None

    def metrics(self) -> dict[str, Any]:
        """The release's part of metrics.json."""
        return {
            "rows": self.rows,
            "tau": {str(k): fit.value for k, fit in self.tau.items()},
            "temperature": {str(k): fit.value for k, fit in self.calibration.temperature.items()},
            "nll": {str(k): fit.nll for k, fit in self.calibration.temperature.items()},
            "accuracy": {str(k): value for k, value in self.accuracy.items()},
            "ece15": {str(k): value for k, value in self.ece15.items()},
            "maps": {str(k): result.metrics() for k, result in self.maps.items()},
            "precision": precision_record(self.precision),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """tau (empty where the posterior is a point), calibration and measured numbers by K, as in :class:`ReleaseResult`."""

    tau: dict[int, Fit]
    calibration: Calibration
    accuracy: dict[int, float] = field(default_factory=dict)
    ece15: dict[int, float] = field(default_factory=dict)
    maps: dict[int, MapResult] = field(default_factory=dict)


class _Search:
    """Mean held-out NLL by (tau, K) and temperature, measured as it is asked for.

    With a few candidates a row every temperature is measured in the pass that measures tau. On a whole vocabulary a temperature costs
    as much as a forward pass, so they are measured at the chosen tau only, in a second pass.
    """

    def __init__(
        self,
        predictor: Predictor,
        examples: Sequence[Example],
        mean: Mapping[str, LoraFactors],
        posteriors: Mapping[str, Posterior],
        ks: Sequence[int],
        seed: int,
    ) -> None:
        self.predictor = predictor
        self.examples = examples
        self.mean = mean
        self.posteriors = posteriors
        self.ks = ks
        self.seed = seed
        self.nll: dict[tuple[float, int], float] = {}
        self.tempered: dict[tuple[float, int], list[float]] = {}
        self.predictions: dict[tuple[float, int], list[Prediction]] = {}

    def measure(self, tau: float, *, temperatures: bool = False) -> None:
        """Measures every K at ``tau``; at tau 0 all K are the mean. Does nothing if it is known."""
        if (tau, self.ks[0]) in (self.tempered if temperatures else self.nll):
            return
        has_candidates = bool(self.examples[0].candidates)
        grid = TEMPERATURES if temperatures or has_candidates else (1.0,)
        # A few numbers a row; on a whole vocabulary they would be gigabytes.
        kept: dict[int, list[Prediction]] | None = {} if has_candidates else None
        if tau == 0:
            values = nll_by_temperature(self.predictor, self.examples, [self.mean], [1], grid, kept)[1]
            by_k = dict.fromkeys((0, *self.ks), values)
            kept = dict.fromkeys(by_k, kept[1]) if kept else None
        else:
            by_k = nll_by_temperature(self.predictor, self.examples, self.draws(tau, max(self.ks)), self.ks, grid, kept)
        self.predictions.update({(tau, k): predictions for k, predictions in (kept or {}).items()})
        for k, values in by_k.items():
            self.nll[tau, k] = values[grid.index(1.0)]
            if not math.isfinite(self.nll[tau, k]):
                raise TrainingError(
                    f"the held-out NLL is {self.nll[tau, k]} at tau {tau:g}: lower train.learning_rate, or use train.dtype=float32"
                )
            if len(grid) > 1:
                self.tempered[tau, k] = values

    def tau_fit(self, k: int) -> Fit:
        """The best tau measured."""
        curve = [CurvePoint(value=tau, nll=nll) for (tau, other), nll in sorted(self.nll.items()) if other == k]
        best = min(curve, key=lambda point: point.nll)
        return Fit(value=best.value, nll=best.nll, curve=tuple(curve))

    def temperature_fit(self, tau: float, k: int) -> Fit:
        """The best temperature at ``tau``."""
        self.measure(tau, temperatures=True)
        pairs = zip(TEMPERATURES, self.tempered[tau, k], strict=True)
        curve = [CurvePoint(value=temperature, nll=nll) for temperature, nll in pairs]
        best = min(curve, key=lambda point: point.nll)
        return Fit(value=best.value, nll=best.nll, curve=tuple(curve))

    def scores(self, tau: float, k: int, temperature: float) -> Scores | None:
        """Scores of the rows at a tau that was measured; None for free text."""
        predictions = self.predictions.get((tau, k))
        return Scores.concatenate([score(p, temperature) for p in predictions]) if predictions else None

    def draws(self, tau: float, count: int) -> list[Factors]:
        """Samples 0, ..., count - 1; at tau 0 the mean alone."""
        if tau == 0:
            return [self.mean]
        sources = [NoiseSource(self.seed, index) for index in range(count)]
        return [
            {name: draw(self.posteriors[name], factors, source, name, tau) for name, factors in self.mean.items()}
            for source in sources
        ]


def fit(
    predictor: Predictor,
    examples: Sequence[Example],
    mean: Mapping[str, LoraFactors],
    posteriors: Mapping[str, Posterior],
    settings: ReleaseSettings,
    *,
    seed: int = 0,
    tokenizer: Any = None,
    say: Say = logger.info,
) -> Fitted:
    """Fits tau and T for K = 0 and every K in ``settings.ks``, and of free text the maps of the confidence.

    Args:
        tokenizer: decodes the answers that the maps are fitted on; None fits no map.
    """
    distinct = num_distinct_samples(posteriors)
    ks = settings.ks if distinct is None else tuple(sorted({min(k, distinct) for k in settings.ks}))
    search = _Search(predictor, examples, mean, posteriors, ks, seed)
    tau, temperature = _fit_tau_and_temperature(search, distinct, settings, say)
    used = {k: tau[k].value if k in tau else 0.0 for k in temperature}
    scores = {k: search.scores(used[k], k if k in ks else 0, fit.value) for k, fit in temperature.items()}
    known = {k: found for k, found in scores.items() if found is not None}
    maps: dict[int, MapResult] = {}
    if tokenizer is not None and settings.map_rows and not examples[0].candidates:
        answers = _answers(predictor, examples, tokenizer, settings)
        for k in (0, max(temperature)):
            if k and used[k] == 0 and temperature[k].value == temperature[0].value:
                maps[k] = maps[0]  # the samples are the mean: the same answers
                continue
            maps[k] = answers.fit_map(predictor, search.draws(used[k], k), temperature[k].value)
            say(f"{f'K = {k}' if k else 'mean'}: {maps[k].line()}")
    fitted = {k: result.fitted for k, result in maps.items() if result.fitted is not None}
    return Fitted(
        tau=tau,
        calibration=Calibration(temperature=temperature, maps=fitted),
        accuracy={k: metrics.accuracy(found.correct.numpy()) for k, found in known.items()},
        ece15={k: metrics.ece(found.confidence.numpy(), found.correct.numpy(), bins=15) for k, found in known.items()},
        maps=maps,
    )


def _answers(predictor: Predictor, examples: Sequence[Example], tokenizer: Any, settings: ReleaseSettings) -> Answers:
    possible = [example for example in examples if len(example.target) <= settings.max_new_tokens]
    return Answers(
        tokenizer=tokenizer,
        examples=evenly_spaced(possible, settings.map_rows),
        stop=stop_tokens(predictor.model, tokenizer),
        max_new_tokens=settings.max_new_tokens,
        max_length=context_length(predictor.model),
    )


def _fit_tau_and_temperature(
    search: _Search, distinct: int | None, settings: ReleaseSettings, say: Say
) -> tuple[dict[int, Fit], dict[int, Fit]]:
    ks = search.ks
    search.measure(0.0)
    temperature = {0: search.temperature_fit(0.0, 0)}
    say(f"mean: held-out NLL {search.nll[0.0, 0]:.4f}, with T = {temperature[0].value:.2f} {temperature[0].nll:.4f}")
    if distinct == 1:
        return {}, {0: temperature[0], **dict.fromkeys(settings.ks, temperature[0])}
    if distinct is not None:
        # Members without posteriors: there is no variance that tau could scale.
        search.measure(1.0)
        fits = {k: Fit(value=1.0, nll=search.nll[1.0, k]) for k in ks}
        return fits, {**temperature, **{k: search.temperature_fit(1.0, k) for k in ks}}

    def measure(tau: float) -> None:
        if (tau, ks[0]) not in search.nll:
            search.measure(tau)
            say(f"tau {tau:g}: held-out NLL " + ", ".join(f"{search.nll[tau, k]:.4f} (K = {k})" for k in ks))

    if any(isinstance(posterior, EnsemblePosterior) for posterior in search.posteriors.values()):
        measure(MEMBERS_ALONE)
    grid: list[float] = []
    worse = 0
    for tau in settings.taus:
        measure(tau)
        grid.append(tau)
        # Noise only destroys from here on: stop after two values that every K clearly loses by.
        worse = worse + 1 if all(search.nll[tau, k] > search.tau_fit(k).nll + CLEAR for k in ks) else 0
        if worse == 2:
            break
    for _ in range(MAX_EXTENSIONS):
        added = _beyond(grid, search)
        for tau in added:
            measure(tau)
        if not added:
            break
        grid = sorted([*grid, *added])
    for k in ks:
        for tau in _beside(grid, search.tau_fit(k).value):
            measure(tau)
    tau_fits = {k: search.tau_fit(k) for k in ks}
    for k in ks:
        if tau_fits[k].value == max(tau for tau, _ in search.nll):
            logger.warning(
                "K = %d: the best tau is the largest that was tried, %g; larger noise may be better still: give release.taus larger "
                "values",
                k,
                tau_fits[k].value,
            )
        temperature[k] = search.temperature_fit(tau_fits[k].value, k)
        say(f"K = {k}: tau {tau_fits[k].value:g}, T {temperature[k].value:.2f}, held-out NLL {temperature[k].nll:.4f}")
    return tau_fits, temperature


def release(
    path: str | Path,
    base: str | Path,
    validation: str | Path,
    settings: ReleaseSettings | None = None,
    *,
    dtype: str | None = None,
    batch_size: int = 64,
    say: Say = logger.info,
) -> ReleaseResult:
    """Fits tau and calibration of an existing artifact on held-out rows and writes them into it, as one step.

    Args:
        path: artifact folder; replaced by the released artifact (a new digest), or left as it was on any failure.
        dtype: of the base model; None takes the one it was trained with.
        say: receives one line per step of progress.

    Raises:
        DataError, ModelError, ArtifactError: with the reason.
    """
    settings = settings or ReleaseSettings()
    artifact = load_artifact(path)
    with open_session(artifact, base, dtype=dtype, batch_size=batch_size) as session:
        data = read_data(validation, expected=session.format)
        examples = session.encoder.encode(data, rows=held_out_rows(data, settings.max_rows))
        result = fit_and_check(
            session.predictor,
            examples,
            artifact.mean,
            artifact.posteriors,
            settings,
            scaling=artifact.config.lora_alpha / artifact.config.rank,
            tokenizer=session.encoder.tokenizer,
            seed=artifact.config.default_seed,
            say=say,
        )
    digest = _rewrite(artifact, path, result, data)
    return replace(result, digest=digest, path=Path(path))


def fit_and_check(
    predictor: Predictor,
    examples: Sequence[Example],
    mean: Mapping[str, LoraFactors],
    posteriors: Mapping[str, Posterior],
    settings: ReleaseSettings,
    *,
    scaling: float,
    tokenizer: Any,
    seed: int = 0,
    say: Say = logger.info,
) -> ReleaseResult:
    """Fits everything (:func:`fit`) and checks the noise (:func:`precision_check`); writes nothing."""
    fitted = fit(predictor, examples, mean, posteriors, settings, seed=seed, tokenizer=tokenizer, say=say)
    return ReleaseResult(
        tau=fitted.tau,
        calibration=fitted.calibration,
        precision=precision_check(mean, posteriors, scaling=scaling, tau=fitted.tau, seed=seed),
        rows=len(examples),
        accuracy=fitted.accuracy,
        ece15=fitted.ece15,
        maps=fitted.maps,
    )


def held_out_rows(data: DataFile, limit: int) -> list[Row]:
    """At most ``limit`` rows, evenly spaced over the file (a file sorted by label stays balanced)."""
    count = len(data.rows)
    if count < 8:
        raise DataError(f"holds {count} rows; fitting tau and a temperature needs at least 8", file=data.path)
    return evenly_spaced(data.rows, limit)


def evenly_spaced(items: Sequence[_T], limit: int) -> list[_T]:
    """At most ``limit`` of the items, at equal distances."""
    take = min(limit, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * take)] for i in range(take)]


def precision_check(
    mean: Mapping[str, LoraFactors],
    posteriors: Mapping[str, Posterior],
    *,
    scaling: float,
    tau: Mapping[int, Fit],
    seed: int = 0,
) -> PrecisionReport:
    """Measures the noise at the smallest fitted tau above 0 against the serving dtypes, and warns where bfloat16 does not hold it."""
    fitted = [fit.value for fit in tau.values() if fit.value > 0]
    report = measure_precision(
        mean, posteriors, scaling=scaling, tau=min(fitted, default=1.0), seed=seed, num_draws=PRECISION_DRAWS
    )
    small = report.below_one_ulp(SERVING_DTYPE)
    if small:
        logger.warning(
            "the noise of %d of %d factors is below one ulp of %s at tau %g (e.g. %s): samples served in that dtype differ "
            "from the mean by rounding only",
            len(small),
            len(report.factors),
            SERVING_DTYPE,
            report.tau,
            small[0],
        )
    return report


def precision_record(report: PrecisionReport) -> dict[str, Any]:
    """The precision check's part of metrics.json: medians over the factors, and the names that bfloat16 does not hold."""
    dtypes = sorted(report.factors[0].sd_over_ulp) if report.factors else []
    relative = [entry.sd_over_rms for entry in report.factors if entry.sd_over_rms is not None]
    return {
        "tau": report.tau,
        "sd_over_ulp": {dtype: report.median_sd_over_ulp(dtype) for dtype in dtypes},
        "sd_over_rms": median(relative) if relative else None,
        f"below_one_ulp_{SERVING_DTYPE}": list(report.below_one_ulp(SERVING_DTYPE)),
    }


def _rewrite(artifact: Artifact, path: str | Path, result: ReleaseResult, data: DataFile) -> str:
    training = {
        **artifact.config.training,
        "validation": {"file": data.path.name, "sha256": data.sha256, "rows": result.rows},
    }
    config = artifact.config.model_copy(update={"tau": result.tau, "training": training})
    measured = {**artifact.metrics, "release": result.metrics()}
    return write_artifact(
        path,
        adapter_config=artifact.adapter_config,
        mean=artifact.mean,
        posteriors=artifact.posteriors,
        config=config,
        calibration=result.calibration,
        metrics=measured,
        card=lambda sizes: model_card(config, result.calibration, measured, sizes),
        run_config=artifact.run_config,
        head=artifact.head,
        replace=True,
    )


def nll_by_temperature(
    predictor: Predictor,
    examples: Sequence[Example],
    draws: Sequence[Factors],
    ks: Sequence[int],
    temperatures: Sequence[float],
    kept: dict[int, list[Prediction]] | None = None,
) -> dict[int, list[float]]:
    """Mean negative log-likelihood (nats a position) of the average over the first K draws, at each temperature, by K.

    Args:
        kept: receives the predictions by K, if given.
    """
    sums = {k: torch.zeros(len(temperatures), dtype=torch.float64) for k in ks}
    counts = dict.fromkeys(ks, 0)
    for prediction in predictor.predict(examples, draws, ks):
        counts[prediction.k] += len(prediction.row)
        if kept is not None:
            kept.setdefault(prediction.k, []).append(prediction)
        sums[prediction.k] += torch.stack([-log_likelihood(prediction, t).sum() for t in temperatures])
    return {k: (sums[k] / counts[k]).tolist() for k in ks}


def _beyond(grid: Sequence[float], search: _Search) -> list[float]:
    """A step out of each end of the grid that the best value may lie beyond, lowest first.

    That is the low end if some K's best value is there (or 0) and its noise makes a clear difference, and the high end if some K's best
    value is there or no K feels the noise yet.
    """
    best = [search.tau_fit(k).value for k in search.ks]
    without = MEMBERS_ALONE if (MEMBERS_ALONE, search.ks[0]) in search.nll else 0.0
    low, high = (
        [abs(search.nll[tau, k] - search.nll[without, k]) > CLEAR for k in search.ks] for tau in (grid[0], grid[-1])
    )
    below = [grid[0] / 10] if any(felt and tau <= grid[0] for felt, tau in zip(low, best, strict=True)) else []
    above = [grid[-1] * 10] if grid[-1] in best or not any(high) else []
    return [*below, *above]


def _beside(taus: Sequence[float], best: float) -> list[float]:
    """Geometric midpoints between ``best`` and its neighbours on the grid (below the smallest: half a step down from it)."""
    if best == 0:
        return [taus[0] / 10**0.5]
    if best not in taus:
        return []
    index = taus.index(best)
    below = taus[index - 1] if index > 0 else best / 10
    above = taus[index + 1] if index + 1 < len(taus) else best * 10
    return [(below * best) ** 0.5, (best * above) ** 0.5]


__all__ = [
    "Fitted",
    "ReleaseResult",
    "evenly_spaced",
    "fit",
    "fit_and_check",
    "held_out_rows",
    "nll_by_temperature",
    "precision_check",
    "release",
]
