"""Maps of the confidence: fits against independent optima, and what serves them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from credence.adapters import IsotonicMap, PlattMap, load_artifact, probability_correct
from credence.training.errors import MetricError
from credence.training.generate import generate
from credence.training.loop import train
from credence.training.maps import Answers, fit_map, platt
from credence.training.modeling import load_tokenizer
from credence.training.predict import Predictor
from credence.training.prompts import Example
from credence.training.release import release
from credence.training.verifiers import normalise_text
from tests.training.conftest import draws_of, quick_config

Write = Callable[..., Path]


def test_an_answer_counts_if_it_ends_and_has_the_references_words(predictor: Predictor, base: Path) -> None:
    """Case and whitespace do not count; an answer that a limit cut is wrong."""
    tokenizer, draws = load_tokenizer(base), draws_of(predictor)[:1]
    prompts = [(index + 3,) for index in range(12)]
    own = generate(predictor, prompts, draws, stop=(), max_new_tokens=3, max_length=128)
    stop = {text.tokens[-1] for text in own[:6]}
    own = generate(predictor, prompts, draws, stop=stop, max_new_tokens=3, max_length=128)
    examples = [Example(prompt, text.tokens, (), None, 0) for prompt, text in zip(prompts, own, strict=True)]
    examples[0] = Example(examples[0].prompt, (70, 71), (), None, 0)
    answers = Answers(tokenizer=tokenizer, examples=examples, stop=stop, max_new_tokens=3, max_length=128)
    result = answers.fit_map(predictor, draws, 1.0)
    assert result.rows == 12 and result.correct == sum(text.stopped for text in own[1:]) >= 5
    no_end = Answers(tokenizer=tokenizer, examples=examples, stop=(), max_new_tokens=3, max_length=128)
    assert no_end.fit_map(predictor, draws, 1.0).metrics()["reason"].endswith("so an answer has no end")
    assert normalise_text(" A \n b\tC") == normalise_text("a B c ") == "a b c" != normalise_text("ab c")


def rows_of(count: int, *, slope: float = 3.0, intercept: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    scores = -2 * generator.random(count)
    return scores, generator.random(count) < 1 / (1 + np.exp(-(slope * scores + intercept)))


def test_platt_equals_a_grid_of_its_own_objective() -> None:
    scores, correct = rows_of(60)
    positive = int(correct.sum())
    target = np.where(correct, (positive + 1) / (positive + 2), 1 / (len(correct) - positive + 2))

    def objective(slope: float, intercept: float) -> float:
        margin = slope * scores + intercept
        return float((np.logaddexp(0, -margin) * target + np.logaddexp(0, margin) * (1 - target)).sum())

    slope, intercept = platt(scores, correct)
    best = objective(slope, intercept)
    for step in (1e-3, 1e-1):
        for by, at in ((step, 0), (-step, 0), (0, step), (0, -step), (step, step), (-step, step)):
            assert objective(slope + by, intercept + at) > best
    margin = slope * scores + intercept
    residual = target - 1 / (1 + np.exp(-margin))
    assert abs(residual.sum()) < 1e-5 and abs((residual * scores).sum()) < 1e-5  # the gradient is zero


def test_platt_stays_finite_when_separable_and_never_falls() -> None:
    scores = np.linspace(-2, 0, 20)
    slope, intercept = platt(scores, scores > -1)
    assert 0 < slope < 100 and math.isfinite(intercept)
    slope, intercept = platt(scores, scores < -1)  # the likelier, the less often correct
    assert slope == 0 and 1 / (1 + math.exp(-intercept)) == pytest.approx(0.5)
    assert platt(np.full(20, -0.5), np.arange(20) < 5)[0] == 0


@pytest.mark.parametrize(("count", "kind"), [(99, PlattMap), (100, IsotonicMap)])
def test_the_number_of_rows_chooses_the_kind(count: int, kind: type) -> None:
    scores, correct = rows_of(count)
    assert isinstance(fit_map(scores, correct, np.full(count, 0.999)).fitted, kind)
    few = np.arange(count) % 10 == 0  # 10 correct rows
    assert isinstance(fit_map(np.where(few, -0.1, scores), few, np.full(count, 0.999)).fitted, PlattMap)


def test_isotonic_equals_pooled_averages() -> None:
    """The max-min formula of isotonic regression, clipped to 1 / (n + 2) from 0 and 1."""
    scores, correct = rows_of(160, slope=6.0, intercept=5.0)
    fitted = fit_map(scores, correct, np.exp(scores)).fitted
    assert isinstance(fitted, IsotonicMap)
    ordered = correct[np.argsort(scores)].astype(float)
    n = len(ordered)
    means = [[ordered[i : j + 1].mean() if j >= i else np.inf for j in range(n)] for i in range(n)]
    for position, value in enumerate(np.sort(scores)):
        expected = max(min(means[i][j] for j in range(position, n)) for i in range(position + 1))
        expected = min(max(expected, 1 / (n + 2)), 1 - 1 / (n + 2))
        assert probability_correct(fitted, float(value)) == pytest.approx(expected, abs=1e-9)


def test_scores_are_of_rows_that_the_map_was_not_fitted_on() -> None:
    """Against five folds written out; and a map fitted on noise is not used."""
    scores, correct = rows_of(60)
    fitted = fit_map(scores, correct, np.full(60, 0.9)).fitted
    assert fitted is not None and (fitted.rows, fitted.correct) == (60, int(correct.sum()))
    total_nll, total_brier = 0.0, 0.0
    for fold in range(5):
        held = np.zeros(60, dtype=bool)
        for value in (True, False):
            held[np.flatnonzero(correct == value)[fold::5]] = True
        slope, intercept = platt(scores[~held], correct[~held])
        p = 1 / (1 + np.exp(-(slope * scores[held] + intercept)))
        total_nll -= np.log(np.where(correct[held], p, 1 - p)).sum()
        total_brier += ((p - correct[held]) ** 2).sum()
    assert fitted.nll.after == pytest.approx(total_nll / 60)
    assert fitted.brier.after == pytest.approx(total_brier / 60)
    assert fitted.nll.before == pytest.approx(-np.log(np.where(correct, 0.9, 0.1)).mean())
    assert fitted.brier.before == pytest.approx(((0.9 - correct) ** 2).mean())
    true_probabilities = 1 / (1 + np.exp(-(3 * scores + 3)))
    noise = fit_map(-np.random.default_rng(0).random(60), correct, true_probabilities)
    assert noise.fitted is None and "its NLL on rows it was not fitted on" in noise.reason


def test_too_few_of_a_class_fit_no_map() -> None:
    scores = np.linspace(-2, 0, 200)
    for right in (4, 196):
        result = fit_map(scores, scores > scores[-right - 1] if right < 200 else scores > -9, np.full(200, 0.5))
        assert result.fitted is None and "5 right and 5 wrong answers are needed" in result.line()
    assert fit_map(scores, scores > scores[-6], np.full(200, 0.5)).fitted is not None
    with pytest.raises(MetricError, match="not finite"):
        fit_map([math.nan, 0.0], [True, False], [0.5, 0.5])
    with pytest.raises(MetricError, match="one length"):
        fit_map([0.0], [True, False], [0.5, 0.5])


def test_a_certain_wrong_answer_costs_a_finite_likelihood() -> None:
    scores, correct = rows_of(60)
    fitted = fit_map(scores, correct, np.ones(60)).fitted
    assert fitted is not None and 5 < fitted.nll.before < 16


def test_release_fits_maps_of_free_text(base: Path, write: Write, tmp_path: Path) -> None:
    """A completion that is learnt for half of the prompts and random for the others: the map tells them apart."""
    words = ["re", "sk", "ol", "long"]
    known = [{"prompt": "a", "completion": " x"}] * 10
    unknown = [{"prompt": f"b{i}", "completion": " " + words[i % 4]} for i in range(10)]
    data = write("d.jsonl", [row for pair in zip(known, unknown, strict=True) for row in pair])
    overrides = [
        "train.max_steps=30",
        "train.batch_size=8",
        "lora.target_modules=all-linear",
        "train.learning_rate=0.03",
    ]
    config = quick_config("map", *overrides, "release.ks=[2]", "release.map_rows=20", "release.max_new_tokens=5")
    trained = train(base, data, data, "map", tmp_path / "out", config)
    artifact = load_artifact(trained.path)
    record = trained.metrics["release"]["maps"]
    assert set(record) == {"0", "2"} and record["0"]["rows"] == 18  # " long</s>" has 6 tokens
    card = (trained.path / "README.md").read_text()
    assert f"Mean: {record['0']['correct']} of 18 greedy answers were the reference" in card
    assert 5 <= record["0"]["correct"] <= 13 and record["0"]["kind"] == "platt"
    fitted = artifact.calibration.fitted_map(0)
    assert fitted is not None and fitted == artifact.calibration.fitted_map(2)  # the map of a point is the mean's
    assert probability_correct(fitted, 0.0) > 0.5 > probability_correct(fitted, -2.0)
    again = release(trained.path, base, data, config.release, say=lambda _: None)
    assert load_artifact(again.path or "").calibration == artifact.calibration
    without = config.release.model_copy(update={"map_rows": 0})
    plain = release(trained.path, base, data, without, say=lambda _: None)
    assert plain.maps == {} and "maps" not in json.loads((trained.path / "calibration.json").read_text())
    assert plain.calibration.temperature == again.calibration.temperature and plain.tau == again.tau
