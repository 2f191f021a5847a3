"""Release: tau and T against closed forms and brute force, on a posterior whose predictive is known."""

import ast
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from credence.adapters.artifact import load_artifact
from credence.adapters.config import BaseModelRef, Calibration, Fit, PosteriorConfig
from credence.adapters.kinds import DiagPosterior, PointPosterior
from credence.adapters.posterior import LoraFactors, Posterior
from credence.training import release as release_module
from credence.training.card import model_card
from credence.training.config import LoraSettings, ReleaseSettings
from credence.training.data import read_data
from credence.training.errors import DataError, ModelError
from credence.training.evaluate import evaluate
from credence.training.loop import train
from credence.training.modeling import add_lora, get_factors, load_base
from credence.training.predict import Predictor, log_likelihood, score, temper
from credence.training.prompts import Example
from credence.training.release import TEMPERATURES, fit, fit_and_check, held_out_rows, precision_check, release
from tests.training.conftest import label_rows, quick_config

Write = Callable[..., Path]


@pytest.fixture
def predictor(base: Path) -> Predictor:
    torch.manual_seed(2)
    model, sites = add_lora(load_base(base, "float32"), LoraSettings(r=4, alpha=8))
    for site in sites:
        torch.nn.init.normal_(site.mean.B, std=0.3)
    return Predictor(model, sites, pad_token=0, batch_size=3)


def examples(count: int = 20) -> list[Example]:
    """Choice rows of different lengths with random right answers."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(count):
        prompt = torch.randint(3, 200, (3 + index % 5,), generator=generator)
        answer = int(torch.randint(0, 3, (1,), generator=generator))
        rows.append(Example(tuple(prompt.tolist()), (), (40, 41, 42), answer, index))
    return rows


def wide(mean: dict[str, LoraFactors], log_sd: float) -> dict[str, DiagPosterior]:
    return {
        name: DiagPosterior(log_sd_A=torch.full_like(f.A, log_sd), log_sd_B=torch.full_like(f.B, log_sd))
        for name, f in mean.items()
    }


def test_batches_and_padding_do_not_change_a_prediction(predictor: Predictor) -> None:
    mean = get_factors(predictor.sites)
    rows = examples()
    together = {
        int(i): p
        for batch in predictor.predict(rows, [mean], [1])
        for i, p in zip(batch.row, batch.log_mean_PC, strict=True)
    }
    predictor.batch_size = 1
    for batch in predictor.predict(rows, [mean], [1]):
        torch.testing.assert_close(together[int(batch.row[0])], batch.log_mean_PC[0], rtol=0, atol=1e-5)


def test_averages_are_over_probabilities_and_prefixes_agree(predictor: Predictor) -> None:
    mean = get_factors(predictor.sites)
    draws = [{n: LoraFactors(A=f.A + 0.2 * i, B=f.B) for n, f in mean.items()} for i in range(4)]
    rows = examples(3)  # one batch
    single = [next(predictor.predict(rows, [d], [1])).log_mean_PC.exp() for d in draws]
    by_k = {p.k: p for p in predictor.predict(rows, draws, [2, 4])}
    for k in (2, 4):
        torch.testing.assert_close(by_k[k].log_mean_PC.exp(), torch.stack(single[:k]).mean(0), rtol=1e-9, atol=1e-12)
        entropies = torch.stack([-(p * p.log()).sum(-1) for p in single[:k]])
        torch.testing.assert_close(by_k[k].expected_entropy, entropies.mean(0), rtol=1e-9, atol=1e-12)
        scores = score(by_k[k])
        torch.testing.assert_close(scores.epistemic, scores.total - entropies.mean(0), rtol=1e-6, atol=1e-9)
        assert bool((scores.epistemic >= 0).all() and (scores.epistemic <= math.log(k)).all())
    with pytest.raises(ValueError, match="ks must be within"):
        next(predictor.predict(rows, draws, [5]))


def test_rows_with_fewer_choices_have_fewer_candidates(predictor: Predictor) -> None:
    rows = [Example((5, 6), (), (40, 41, 42), 2, 1), Example((5, 6), (), (40, 41), 1, 2)]
    prediction = next(predictor.predict(rows, [get_factors(predictor.sites)], [1]))
    probs = prediction.log_mean_PC.exp()
    torch.testing.assert_close(probs.sum(1), torch.ones(2, dtype=torch.float64))
    assert float(probs[1, 2]) == 0
    for temperature in (1.0, 3.0):
        scores = score(prediction, temperature)
        assert bool(torch.isfinite(scores.total).all() and torch.isfinite(scores.brier).all())
        torch.testing.assert_close(
            temper(prediction.log_mean_PC, temperature).exp().sum(1), torch.ones(2, dtype=torch.float64)
        )


def test_free_text_is_scored_token_by_token(predictor: Predictor) -> None:
    rows = [Example((5, 6, 7), (8, 9), (), None, 1), Example((5,), (6, 7, 8, 1), (), None, 2)]
    prediction = next(predictor.predict(rows, [get_factors(predictor.sites)], [1]))
    assert prediction.row.tolist() == [0, 0, 1, 1, 1, 1] or prediction.row.tolist() == [1, 1, 1, 1, 0, 0]
    for index, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt, *row.target]])
        with torch.no_grad():
            log_probs = predictor.model(input_ids=ids).logits[0].double().log_softmax(-1)
        expected = [float(log_probs[len(row.prompt) - 1 + i, t]) for i, t in enumerate(row.target)]
        got = log_likelihood(prediction)[prediction.row == index]
        assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_temperature_equals_brute_force(predictor: Predictor) -> None:
    mean, rows = get_factors(predictor.sites), examples()
    calibration = fit(predictor, rows, mean, {n: PointPosterior() for n in mean}, ReleaseSettings(ks=(2,))).calibration
    log_probs = torch.cat([p.log_mean_PC for p in predictor.predict(rows, [mean], [1])])
    targets = torch.cat([p.target for p in predictor.predict(rows, [mean], [1])])
    best = min(
        (float(-torch.log_softmax(log_probs / t, -1)[torch.arange(len(rows)), targets].mean()), t)
        for t in torch.linspace(0.25, 8, 2000).tolist()
    )
    fitted = calibration.temperature[0]
    assert fitted.nll == pytest.approx(best[0], abs=1e-3)
    assert fitted.value in TEMPERATURES and len(fitted.curve) == len(TEMPERATURES)
    assert calibration.temperature[2] == fitted  # a point mass: every K is the mean


def test_tau_is_the_best_of_its_curve_and_refined(predictor: Predictor) -> None:
    mean, rows = get_factors(predictor.sites), examples()
    settings = ReleaseSettings(ks=(2, 4), taus=(0.1, 10.0, 1000.0))
    lines: list[str] = []
    fitted = fit(predictor, rows, mean, wide(mean, -3.0), settings, say=lines.append)
    tau, calibration = fitted.tau, fitted.calibration
    for k in (2, 4):
        values = [point.value for point in tau[k].curve]
        assert values[0] == 0 and {0.1, 10.0} <= set(values)
        assert tau[k].nll == min(point.nll for point in tau[k].curve)
        assert tau[k].value == next(point.value for point in tau[k].curve if point.nll == tau[k].nll)
        assert calibration.temperature[k].nll <= tau[k].nll
    assert any(abs(math.log10(v) % 1) > 0.01 for v in values[1:]) or tau[4].value == 0 or len(values) > 4
    assert lines[0].startswith("mean: held-out NLL")


def test_useless_noise_is_turned_off(predictor: Predictor) -> None:
    """A posterior that only destroys is released at tau 0, and the search stops before the end of its grid."""
    mean = get_factors(predictor.sites)
    rows = examples(60)
    best = torch.cat([p.log_mean_PC for p in predictor.predict(rows, [mean], [1])]).argmax(1)
    order = torch.cat([p.row for p in predictor.predict(rows, [mean], [1])])
    answers = dict(zip(order.tolist(), best.tolist(), strict=True))
    right = [Example(r.prompt, r.target, r.candidates, answers[i], r.line) for i, r in enumerate(rows)]
    settings = ReleaseSettings(ks=(2,), taus=(1.0, 10.0, 100.0, 1000.0))
    tau = fit(predictor, right, mean, wide(mean, 1.0), settings).tau
    assert tau[2].value == 0
    values = [point.value for point in tau[2].curve]
    assert values[0] == 0 and max(values) == 10
    assert min(values[1:]) < 0.1  # it also looked for smaller noise that does not hurt


class Recorded:
    """Stands for the search: the NLL of every K is a function of tau, and what was measured is kept."""

    def __init__(self, nll: Callable[[float], float]) -> None:
        self.ks = (2, 4)
        self.function = nll
        self.nll: dict[tuple[float, int], float] = {}
        self.posteriors: dict[str, Posterior] = {}

    def measure(self, tau: float) -> None:
        for k in (0, *self.ks) if tau == 0 else self.ks:
            self.nll[tau, k] = self.function(tau)

    tau_fit = release_module._Search.tau_fit

    def temperature_fit(self, tau: float, k: int) -> Fit:
        return Fit(value=1.0, nll=self.nll[tau, k])


@pytest.mark.parametrize("best", [3e-4, 1e-2, 1.0, 30.0, 1e4, 1e6])
def test_the_grid_of_tau_follows_its_minimum(best: float) -> None:
    """A minimum up to four steps of ten outside the grid is found to within half a step."""
    search = Recorded(lambda tau: 1 + 0.2 * math.log10(max(tau, 1e-9) / best) ** 2)
    settings = ReleaseSettings(ks=search.ks, taus=(1.0, 10.0, 100.0))
    tau, _ = release_module._fit_tau_and_temperature(search, None, settings, lambda line: None)  # type: ignore[arg-type]
    assert abs(math.log10(tau[4].value / best)) <= 0.3


def test_noise_too_small_to_be_felt_does_not_end_the_search() -> None:
    """TFB on an over-fitted adapter: below tau = 1000 the likelihood only wavers, and at 10^5 it is far better."""
    search = Recorded(lambda tau: 2 + 1e-4 * math.sin(7 * tau) - (0.5 if 3e4 < tau < 3e5 else 0))
    settings = ReleaseSettings(ks=search.ks, taus=(0.1, 1.0, 10.0))
    tau, _ = release_module._fit_tau_and_temperature(search, None, settings, lambda line: None)  # type: ignore[arg-type]
    assert tau[2].value == pytest.approx(1e5)


def test_a_best_tau_at_the_end_of_the_search_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    search = Recorded(lambda tau: 2 - 0.1 * math.log10(1 + tau))
    settings = ReleaseSettings(ks=search.ks, taus=(1.0,))
    release_module._fit_tau_and_temperature(search, None, settings, lambda line: None)  # type: ignore[arg-type]
    assert "the best tau is the largest that was tried" in caplog.text


@pytest.fixture
def unreleased(base: Path, train_file: Path, tmp_path: Path) -> Path:
    config = quick_config("ivon", "train.max_steps=2")
    return train(base, train_file, None, "ivon", tmp_path / "adapter", config).path


def test_release_of_an_artifact_equals_release_in_training(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path, unreleased: Path
) -> None:
    before = load_artifact(unreleased)
    settings = quick_config("ivon").release
    result = release(unreleased, base, validation_file, settings, say=lambda _: None)
    after = load_artifact(unreleased)
    assert after.digest == result.digest != before.digest
    assert after.config.tau == result.tau and set(result.tau) == {2, 4}
    assert after.calibration == result.calibration
    assert after.metrics["train"] == before.metrics["train"] and after.metrics["release"]["rows"] == 12
    for name, factors in before.mean.items():
        assert torch.equal(after.mean[name].A, factors.A) and torch.equal(after.mean[name].B, factors.B)
    config = quick_config("ivon", "train.max_steps=2")
    trained = train(base, train_file, validation_file, "ivon", tmp_path / "other", config)
    assert load_artifact(trained.path).config.tau == after.config.tau
    assert "K | tau | NLL at T = 1 (nats/row) | T |" in (unreleased / "README.md").read_text()


@pytest.mark.parametrize("method", ["ivon", "map", "ensemble"])
def test_accuracy_and_ece_are_those_of_an_evaluation(
    method: str, base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    """The numbers of the release's own passes are those of a second pass at the fitted tau and temperature."""
    trained = train(base, train_file, validation_file, method, tmp_path / "out", quick_config(method))
    found = trained.metrics["release"]
    ks = [int(k) for k in found["temperature"]]
    results = evaluate(trained.path, base, validation_file, ks=ks)["results"]
    for k, result in zip(ks, results[1::2], strict=True):
        assert found["accuracy"][str(k)] == result["accuracy"], k
        assert found["ece15"][str(k)] == pytest.approx(result["ece15"], abs=1e-9), k
        assert found["nll"][str(k)] == pytest.approx(result["nll"], abs=1e-9), k
    assert found["maps"] == {}  # labels have a temperature


def test_the_card_says_what_was_measured_and_how_to_serve_it(
    base: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    trained = train(base, train_file, validation_file, "ivon", tmp_path / "out", quick_config("ivon"))
    card, found = (trained.path / "README.md").read_text(), trained.metrics["release"]
    artifact = load_artifact(trained.path)
    at_one = next(p.nll for p in artifact.calibration.temperature[4].curve if p.value == 1)
    row = [
        "4",
        f"{found['tau']['4']:.3g}",
        f"{at_one:.4f}",
        f"{found['temperature']['4']:.3g}",
        f"{found['nll']['4']:.4f}",
        f"{found['accuracy']['4']:.3f}",
        f"{found['ece15']['4']:.3f}",
    ]
    assert f"| {' | '.join(row)} |" in card
    assert "the 12 held-out rows of `validation.jsonl`; the numbers are of these same rows" in card
    for file in trained.path.iterdir():
        if file.name not in ("README.md", "manifest.json"):
            assert f"| `{file.name}` | {file.stat().st_size:,} |" in card
    assert "Versions: credence" in card and "## Licence" in card and "4 optimiser steps" in card
    assert "fitted for K = 2, 4. Any other K, such as one below 2, takes the fit of the nearest" in card
    commands = [shlex.split(line) for line in card.splitlines() if line.startswith(("credence serve", "curl"))]
    assert commands[0] == ["credence", "serve", "tiny", "--adapter", "tiny-ivon=."]
    body = json.loads(commands[1][-1])
    assert body["uncertainty"] == {"n_samples": 4} and body["model"] == "tiny-ivon" and body["max_tokens"] == 1
    assert body["prompt"] == "Text: ...\nLabel:"
    program = card.split("```python\n")[1].split("```")[0]
    ast.parse(program)
    assert json.dumps(body["prompt"]) in program


def test_the_card_of_an_artifact_that_was_never_measured() -> None:
    config = PosteriorConfig(
        kind="diag",
        method="ivon",
        credence_version="0",
        base_model=BaseModelRef(name="Some/It's Base"),
        rank=4,
        lora_alpha=8,
        target_modules=("q_proj",),
        training={"format": "messages"},
    )
    card = model_card(config, Calibration(), {})
    assert "Not released" in card and "Nothing is calibrated" in card and "## Files" not in card
    commands = [shlex.split(line) for line in card.splitlines() if line.startswith(("credence serve", "curl"))]
    assert commands[0] == ["credence", "serve", "Some/It's Base", "--adapter", "it-s-base-ivon=."]
    assert commands[1][1].endswith("/v1/chat/completions") and "messages" in json.loads(commands[1][-1])
    assert "client.chat(" in card


def test_the_card_warns_of_noise_that_bfloat16_does_not_hold(predictor: Predictor) -> None:
    mean = get_factors(predictor.sites)
    settings = ReleaseSettings(ks=(2,), taus=(1.0,))
    for log_sd, warned in ((-14.0, True), (-1.0, False)):
        result = fit_and_check(predictor, examples(), mean, wide(mean, log_sd), settings, scaling=2.0, tokenizer=None)
        config = PosteriorConfig(
            kind="diag",
            method="ivon",
            credence_version="0",
            base_model=BaseModelRef(name="b"),
            rank=4,
            lora_alpha=8,
            target_modules=("q_proj",),
        )
        card = model_card(config, result.calibration, {"release": result.metrics()})
        assert ("Serve with `--dtype float32`" in card) is warned
        assert ("no factor's noise is below one ulp" in card) is not warned


def test_a_failed_release_leaves_the_artifact(base: Path, write: Write, unreleased: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in unreleased.iterdir()}
    with pytest.raises(DataError, match="needs at least 8"):
        release(unreleased, base, write("v.jsonl", label_rows(4)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        release(unreleased, tmp_path, write("v.jsonl", label_rows(9)))
    assert {path.name: path.read_bytes() for path in unreleased.iterdir()} == before


def test_held_out_rows_are_spread_over_the_file(write: Write) -> None:
    data = read_data(write("v.jsonl", label_rows(100)))
    assert [row.line for row in held_out_rows(data, 10)] == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]
    assert len(held_out_rows(data, 500)) == 100


def test_the_precision_check_warns(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    mean = get_factors(predictor.sites)
    assert not precision_check(mean, wide(mean, -1.0), scaling=2.0, tau={}).below_one_ulp("bfloat16")
    assert caplog.records == []
    report = precision_check(mean, wide(mean, -14.0), scaling=2.0, tau={})
    assert report.below_one_ulp("bfloat16")
    assert "below one ulp of bfloat16" in caplog.text


def test_evaluate_report(base: Path, unreleased: Path, validation_file: Path, write: Write) -> None:
    ood = write("ood.jsonl", [{"text": f"?{i} zzz", "label": "unknown"} for i in range(9)])
    report = evaluate(unreleased, base, validation_file, ood, ks=[0, 4], tau=3.0)
    assert report["adapter"] == {"method": "ivon", "digest": load_artifact(unreleased).digest}
    assert report["data"] == {"file": "validation.jsonl", "rows": 12, "ood_rows": 9}
    assert [(e["k"], e["tau"]) for e in report["results"]] == [(0, 0.0), (0, 0.0), (4, 3.0), (4, 3.0)]
    keys = {
        "k", "tau", "temperature", "accuracy", "nll", "ece10", "ece15", "ece_equal_mass", "brier", "error_auroc", "aurc",
        "ood_auroc_total", "ood_auroc_epistemic", "ood_fpr95", "mean_confidence",
    }  # fmt: skip
    documented = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for entry in report["results"]:
        assert keys <= set(entry)
        for name in set(entry) - keys:
            assert f"`{name}`" in documented or f"`{name.rpartition('_')[0]}_S`" in documented
        assert all(value is None or math.isfinite(value) for value in entry.values())
    assert report["results"][0]["ood_auroc_epistemic"] is None  # the mean has no epistemic score
    assert report["results"][2]["ood_auroc_epistemic"] is not None
    bootstrap = evaluate(unreleased, base, validation_file, ood, ks=[0, 4], tau=3.0, resamples=20)
    assert bootstrap["bootstrap"] == {"resamples": 20, "level": 0.95, "seed": 0}
    for entry, plain in zip(bootstrap["results"], report["results"], strict=True):
        found = entry.pop("intervals")
        assert entry == plain and set(found) == set(plain) - {"k", "tau", "temperature"}
        low, high = found["nll"]
        assert low < plain["nll"] < high


def test_evaluate_uses_what_was_fitted(base: Path, unreleased: Path, validation_file: Path) -> None:
    result = release(unreleased, base, validation_file, quick_config("ivon").release, say=lambda _: None)
    report = evaluate(unreleased, base, validation_file, ks=[4, 0])
    by_k = {(e["k"], i % 2): e for i, e in enumerate(report["results"])}
    assert by_k[4, 0]["tau"] == result.tau[4].value
    assert by_k[4, 0]["nll"] == pytest.approx(result.tau[4].nll, rel=1e-6)
    assert by_k[4, 1]["temperature"] == result.calibration.temperature[4].value
    assert by_k[4, 1]["nll"] == pytest.approx(result.calibration.temperature[4].nll, rel=1e-6)
    assert by_k[0, 1]["nll"] == pytest.approx(result.calibration.temperature[0].nll, rel=1e-6)
    at_zero = evaluate(unreleased, base, validation_file, ks=[0, 4], tau=0.0)["results"]
    assert at_zero[0]["nll"] == at_zero[2]["nll"]


def test_evaluate_on_another_base_model_is_refused(chat_base: Path, unreleased: Path, write: Write) -> None:
    with pytest.raises(DataError, match=r"is a .*completion.* row, .*label.* is needed"):
        evaluate(unreleased, chat_base, write("c.jsonl", [{"prompt": "a", "completion": "b"}]))


def test_a_map_adapter_has_no_samples(base: Path, train_file: Path, validation_file: Path, tmp_path: Path) -> None:
    path = train(
        base, train_file, validation_file, "map", tmp_path / "m", quick_config("map", "train.max_steps=1")
    ).path
    first, _, third, _ = evaluate(path, base, validation_file, ks=[0, 10])["results"]
    assert third["tau"] == 0 and first["nll"] == third["nll"]
