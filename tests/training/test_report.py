"""The report of an evaluation: its numbers and figures against the metrics, hostile text, and data on which little is defined."""

import math
import re
import tomllib
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from credence.adapters import Artifact
from credence.training import metrics
from credence.training.data import DataFile, DataFormat, Row
from credence.training.evaluate import Entry, Evaluation, token_shares
from credence.training.predict import Prediction, score
from credence.training.prompts import Example
from credence.training.report import curves, figures
from credence.training.report.content import visible
from credence.training.report.curves import Results
from credence.training.report.write import markdown, write_report
from tests.tiny import make_artifact
from tests.training.conftest import byte_tokenizer

LABELS = ("music", "travel", "work")
Make = Callable[..., Evaluation]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An adapter whose fitted tau is 2 and whose fitted temperatures are 1.5 and 1.25."""
    path = tmp_path_factory.mktemp("report") / "adapter"
    return make_artifact(path, modules=("self_attn.q_proj",), layers=1, tau={4: 2.0}, temperature={0: 1.5, 4: 1.25})


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Three points."""
    path = tmp_path_factory.mktemp("report") / "ensemble"
    return make_artifact(path, form="ensemble", modules=("self_attn.q_proj",), layers=1)


def predicted(probs: torch.Tensor, targets: Sequence[int], rows: Sequence[int], k: int) -> Prediction:
    """A prediction whose samples are less uncertain than their average by a tenth to a fifth."""
    entropy = torch.special.entr(probs).sum(-1)
    share = torch.linspace(0.8, 0.9, len(probs), dtype=torch.float64) if k > 1 else 1.0
    return Prediction(
        k=max(k, 1),
        row=torch.tensor(rows),
        target=torch.tensor(targets),
        log_mean_PC=probs.log(),
        expected_entropy=entropy * share,
    )


def random_probs(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(count, width, generator=generator, dtype=torch.float64), -1)


def labelled(
    artifact: Artifact,
    texts: Sequence[str],
    *,
    labels: Sequence[str] = LABELS,
    answers: Sequence[int] | None = None,
    probs: torch.Tensor | None = None,
    points: Sequence[tuple[int, float]] = ((0, 0.0), (1, 2.0), (4, 2.0)),
    ood: Sequence[str] = (),
    tokens: bool = False,
) -> Evaluation:
    """An evaluation of label rows: of given probabilities, or of other random ones for every K and tau."""
    answers = [index % len(labels) for index in range(len(texts))] if answers is None else answers

    def file(name: str, found: Sequence[str], right: Sequence[int]) -> DataFile:
        rows = tuple(
            Row(line, {"text": text, "label": labels[answer]})
            for line, (text, answer) in enumerate(zip(found, right, strict=True), 1)
        )
        return DataFile(Path("secret/folder") / name, DataFormat.LABEL, rows, "0")

    def entry(k: int, tau: float, temperature: float) -> Entry:
        inside = random_probs(len(texts), len(labels), 10 * k + int(tau)) if probs is None else probs
        outside = random_probs(len(ood), len(labels), 99 + k).sqrt()
        outside = outside / outside.sum(-1, keepdim=True)
        return Entry(
            k=k,
            tau=tau,
            temperature=temperature,
            scores=score(predicted(inside, answers, range(len(texts)), k), temperature),
            ood=score(predicted(outside, [-100] * len(ood), range(len(ood)), k), temperature) if ood else None,
        )

    shares = token_shares(
        predicted(random_probs(len(texts), len(labels), 0), answers, range(len(texts)), 1), torch.rand(len(texts), 4)
    )
    examples = [Example((1,), (2,), tuple(range(len(labels))), answer, 1) for answer in answers]
    return Evaluation(
        artifact=artifact,
        encoder=SimpleNamespace(space=SimpleNamespace(labels=labels), tokenizer=None),  # type: ignore[arg-type]
        data=file("test.jsonl", texts, answers),
        ood=file("ood.jsonl", ood, [0] * len(ood)) if ood else None,
        examples=examples,
        ood_examples=[examples[0]] * len(ood),
        entries=tuple(
            entry(k, tau, temperature)
            for k, tau in points
            for temperature in (1.0, artifact.calibration.fitted_temperature(k))
        ),
        token_samples=(Entry(k=4, tau=0.0, temperature=1.0, scores=score(shares)),) if tokens else (),
    )


def free_text(artifact: Artifact, completions: Sequence[str], *, ood: bool = False, k: int = 4) -> Evaluation:
    """An evaluation of prompt and completion rows, one token a byte."""
    tokenizer = byte_tokenizer()
    targets = [tuple(tokenizer(text)["input_ids"]) for text in completions]
    rows = tuple(Row(line, {"prompt": "say", "completion": text}) for line, text in enumerate(completions, 1))
    of_row = [row for row, target in enumerate(targets) for _ in target]
    flat = [token for target in targets for token in target]
    scores = score(predicted(random_probs(len(flat), len(tokenizer), 3), flat, of_row, k))
    data = DataFile(Path("text.jsonl"), DataFormat.COMPLETION, rows, "0")
    examples = [Example((1,), target, (), None, 1) for target in targets]
    return Evaluation(
        artifact=artifact,
        encoder=SimpleNamespace(space=None, tokenizer=tokenizer),  # type: ignore[arg-type]
        data=data,
        ood=data if ood else None,
        examples=examples,
        ood_examples=examples if ood else [],
        entries=(Entry(k=k, tau=2.0, temperature=1.0, scores=scores, ood=scores if ood else None),) * 2,
    )


class Page(HTMLParser):
    """The elements of a page and the text of its cells and examples."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "use", "rect", "stop"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, attributes = self.open[-1]
            self.texts.append((tag, attributes.get("class") or "", data))

    def of(self, tag: str, name: str = "") -> list[str]:
        return [text for found, own, text in self.texts if found == tag and name in own]


def written(folder: Path, evaluation: Evaluation, resamples: int = 0, **names: str) -> tuple[str, str]:
    """Page and Markdown of an evaluation; every picture is well-formed and nothing is not a number."""
    write_report(folder, evaluation, evaluation.document(resamples), **{"name": "triage", **names})
    page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
    for picture in folder.glob("*.svg"):
        xml.etree.ElementTree.parse(picture)
        assert "var(--" not in picture.read_text()
        assert page.count(f'id="{picture.stem}-axes_1"') == 1
    for found in (page, text):
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", found)
    return page, text


KNOWN = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.4, 0.5, 0.1]], dtype=torch.float64)
"""With the answers 0, 0, 1, 0: right, right, right, wrong."""


def test_the_table_and_the_sentences_have_the_known_numbers(artifact: Artifact, tmp_path: Path) -> None:
    texts = ["a song", "play it", "a flight", "a jazz tour"]
    evaluation = labelled(artifact, texts, answers=[0, 0, 1, 0], probs=KNOWN, points=[(0, 0.0)])
    page, text = written(tmp_path, evaluation, command="credence eval x --base b")
    nll = -sum(map(math.log, (0.8, 0.6, 0.7, 0.4))) / 4
    brier = (0.04 + 0.02 + 0.16 + 0.1 + 0.04 + 0.09 + 0.01 + 0.36 + 0.25 + 0.01) / 4
    expected = [f"{nll:.3f}", f"{brier:.3f}", "1.000", "75.0 %"]
    first = Page(page).of("td")[:12]
    assert first[:3] == ["–", "1", "75.0 %"] and set(expected) <= set(first)
    line = next(line for line in text.splitlines() if line.startswith("| mean | – | 1 |"))
    assert all(number in line for number in expected)
    assert "mean + T gives the right answer for 75.0 % of 4 rows" in page
    assert "credence eval x --base b" in page and "secret/folder" not in page + text
    # The fourth row is the wrong one; the answers stand with their probabilities at the fitted temperature.
    wrong = page[page.index("Most confidently wrong") :]
    assert wrong.count("<article>") == 1 and "a jazz tour" in wrong
    tempered = np.array([0.4, 0.5, 0.1]) ** (1 / 1.5)
    shares = sorted(100 * tempered / tempered.sum(), reverse=True)
    assert re.findall(r'class="prob">(\d+) %', wrong) == [f"{share:.0f}" for share in shares]
    assert re.findall(r'class="name"[^>]*>([^<]*)<', wrong) == ["travel", "music ✓", "work"]


def test_the_table_is_the_json(artifact: Artifact, tmp_path: Path) -> None:
    """Intervals, the main tau of each K, token samples, and every other point in the long table."""
    points = [(0, 0.0), (2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0)]
    evaluation = labelled(artifact, ["a"] * 30, points=points, ood=["b"] * 9, tokens=True)
    document = evaluation.document(4)
    results = Results.of(evaluation, document)
    assert [(entry.k, entry.tau) for entry, _ in results.main[::2]] == [(0, 0.0), (2, 2.0), (4, 2.0)]
    assert results.headline == (evaluation.entries[-1], document["results"][-1])
    page, _ = written(tmp_path, evaluation, 4)
    cells = Page(page).of("td")
    for column, key in ((3, "nll"), (4, "ece15")):
        assert cells[column] == f"{document['results'][0][key]:.3f}"
    low, high = document["results"][0]["intervals"]["nll"]
    assert f"<small>{low:.3f}–{high:.3f}</small>" in page and "4 samples of the rows" in page
    assert "4 tokens of the mean" in page and "(10 lines)" in page


def test_figures_cannot_differ_from_the_table(artifact: Artifact) -> None:
    """What is drawn, read back from the axes, gives the metrics of the table."""
    evaluation = labelled(artifact, ["a"] * 200, ood=["b"] * 50)
    document = evaluation.document(4)
    results = Results.of(evaluation, document)
    entry, found = results.headline
    upper, lower = _axes(figures.draw_reliability, shown=[results.headline], unit="row")
    confidence, right = upper.lines[1].get_data()
    counts = np.array([bar.get_height() for bar in lower.patches])
    assert counts.sum() == 200 and np.abs(confidence - right) @ counts[counts > 0] / 200 == pytest.approx(
        found["ece15"]
    )
    (axis,) = _axes(figures.draw_confidence, entry=entry, unit="row")
    heights = np.array([bar.get_height() for bar in axis.patches]).reshape(15, 2).sum(0)
    assert heights.tolist() == [200 * found["accuracy"], 200 * (1 - found["accuracy"])]
    (axis,) = _axes(figures.draw_risk_coverage, shown=[results.headline])
    assert axis.lines[0].get_ydata().mean() == pytest.approx(found["aurc"])
    for name in ("nll", "error_auroc"):
        (axis,) = _axes(figures.draw_sweep, series=results.over_k(name), title="", what="", metric=name, means={})
        drawn = [line.get_ydata().tolist() for line in axis.lines]
        assert drawn == [[document["results"][i][name] for i in (2, 4)], [document["results"][i][name] for i in (3, 5)]]
        ends = document["results"][4]["intervals"][name]
        edge = axis.collections[0].get_paths()[0].vertices
        assert sorted(set(edge[edge[:, 0] == 1][:, 1].tolist())) == pytest.approx(ends)


def _axes(draw: Callable[..., None], **arguments: Any) -> Any:
    figure = Figure()
    draw(figure, **arguments)
    return figure.axes


def test_bins_and_curves_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(5000)
    correct = rng.random(5000) < confidence**2
    for bins in (10, 15):
        found = metrics.calibration_bins(confidence, correct, bins)
        gap = sum(b.count / 5000 * abs(b.accuracy - b.confidence) for b in found if b.count)  # type: ignore[operator]
        assert gap == pytest.approx(metrics.ece(confidence, correct, bins))
        assert [b.count for b in found] == np.histogram(confidence, np.linspace(0, 1, bins + 1))[0].tolist()
    (empty, *_) = metrics.calibration_bins([0.9], [1], 15)
    assert (empty.count, empty.confidence, empty.accuracy) == (0, None, None)


def test_a_long_curve_keeps_its_ends_and_no_other_values(artifact: Artifact) -> None:
    scores = labelled(artifact, ["a"] * 5000, points=[(0, 0.0)]).entries[0].scores
    coverage, risk = curves.risk_coverage(scores)
    whole = dict(zip(*metrics.risk_coverage(scores.confidence.numpy(), scores.correct.numpy()), strict=True))
    assert len(coverage) == curves.MAX_CURVE_POINTS
    assert all(whole[at] == value for at, value in zip(coverage, risk, strict=True))
    assert (coverage[0], coverage[-1]) == (1 / 5000, 1) and risk[-1] == pytest.approx(
        1 - scores.correct.double().mean().item()
    )


def test_histograms_hold_every_row(artifact: Artifact) -> None:
    entry = labelled(artifact, ["a"] * 40, ood=["b"] * 11).entries[-1]
    assert entry.ood is not None
    edges, parts = curves.histograms((entry.scores, entry.ood), "epistemic")
    assert [part.sum() for part in parts] == pytest.approx([1, 1])
    assert edges[-1] == max(entry.scores.epistemic.max(), entry.ood.epistemic.max())


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> ' & &amp; </p></article>",
    "right \u202eto left\u2066 and \u200f marks",
    "control \x00 \x07 \x1b[31m and \ud800 alone",
    "שלום עולם, emoji 👩‍👩‍👧 and {{ 7 * 7 }} {% raw %}",
    "x" * 30_000,
    "| a | b |\n|---|---|\n# title\n[a](javascript:1) ![b](http://c) `code` <b>*bold* www.example.org\\",
]


def test_user_text_does_nothing(artifact: Artifact, tmp_path: Path) -> None:
    labels = ("<script>alert(2)</script>", '"onmouseover="x', "\u202elabel|")
    evaluation = labelled(artifact, HOSTILE, labels=labels, ood=HOSTILE, points=[(0, 0.0), (4, 2.0)])
    page, text = written(tmp_path, evaluation, name="<b>\u202ename", command="credence eval '<script>' `x`")
    found = Page(page)
    assert not [tag for tag, _ in found.tags if tag in ("script", "img", "b2", "iframe", "object", "link", "form")]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert page.count("<article>") == page.count("</article>") and "49" not in found.of("p", "text")
    shown = set(found.of("p", "text"))
    for line in HOSTILE[:2] + HOSTILE[4:5]:
        assert line in shown
    assert "right ‹U+202E›to left‹U+2066› and ‹U+200F› marks" in shown
    assert "control ‹U+0000› ‹U+0007› ‹U+001B›[31m and ‹U+D800› alone" in shown
    assert any(line.endswith("… (28,000 more characters)") for line in shown)
    for dangerous in ("\u202e", "\u2066", "\x00", "\x1b", "\ud800"):
        assert dangerous not in page + text
    assert not re.search(r"(?<!\\)<", text)
    quoted = next(line for line in text.splitlines() if "a \\| b" in line)
    assert not re.search(r"(?<!\\)[|<>\[\]`*#!:]", quoted.removeprefix("1. ")) and "www\\." in quoted


def test_visible_text_and_markdown() -> None:
    assert visible("a\tb\nc é 👩‍👧") == "a\tb\nc é 👩‍👧"
    assert markdown("a\n b_c  <d>") == "a b\\_c \\<d\\>"


def test_the_page_needs_nothing_from_outside(artifact: Artifact, tmp_path: Path) -> None:
    page, _ = written(tmp_path, labelled(artifact, ["a", "b"], ood=["c"]))
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    for tag, attributes in Page(page).tags:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


CASES: dict[str, dict[str, Any]] = {
    "one row": {"texts": ["a"]},
    "one row and one from elsewhere": {"texts": ["a"], "ood": ["b"]},
    "one class": {"texts": ["a"] * 5, "labels": ("music",), "ood": ["b"] * 2},
    "all right": {"texts": ["a"] * 4, "probs": KNOWN, "answers": [0, 0, 1, 1]},
    "all wrong": {"texts": ["a"] * 4, "probs": KNOWN, "answers": [2, 2, 2, 2], "ood": ["b"]},
    "certain": {"texts": ["a"] * 2, "probs": torch.eye(3, dtype=torch.float64)[:2], "answers": [0, 1]},
    "K = 1 only": {"texts": ["a"] * 9, "points": [(1, 2.0)], "ood": ["b"] * 3},
    "the mean only": {"texts": ["a"] * 9, "points": [(0, 0.0)]},
    "several tau, none fitted": {"texts": ["a"] * 9, "points": [(4, 0.0), (4, 0.5), (4, 1e4)], "ood": ["b"] * 3},
    "many rows": {"texts": ["a"] * 5000, "ood": ["b"] * 1000},
}


@pytest.mark.parametrize("case", CASES)
def test_data_on_which_little_is_defined(artifact: Artifact, tmp_path: Path, case: str) -> None:
    page, _ = written(tmp_path, labelled(artifact, **CASES[case]), 0 if case == "many rows" else 2)
    assert len(page) < 600_000
    if case == "all right":
        assert "No test row is answered wrongly." in page
    if case == "K = 1 only":
        assert "by epistemic" not in page and "OOD AUROC epistemic" not in page


def test_an_ensemble_says_how_many_members_it_has(ensemble: Artifact, tmp_path: Path) -> None:
    page, text = written(tmp_path, labelled(ensemble, ["a"] * 9, points=[(0, 0.0), (3, 1.0), (8, 1.0)]))
    assert "3; a larger K is these 3 again" in page and "3; a larger K" in text


@pytest.mark.parametrize("k", [1, 4])
def test_tokens_carry_their_numbers_without_colour(artifact: Artifact, tmp_path: Path, k: int) -> None:
    evaluation = free_text(artifact, ["one <b>two</b>", "\u202e three", "é 👩‍👧"], ood=True, k=k)
    page, _ = written(tmp_path, evaluation)
    found = Page(page)
    assert found.of("span", "u")[:2] and "legend" in page
    (first, *_) = re.findall(r'<p><small>total:</small> <span class="tokens" dir="auto">(.*?)</span></p>', page)
    notes = re.findall(r'<span class="u[0-4]" title="([^"]*)">', first)
    assert len(notes) > 3 and all(re.match(r"total [\d.]+ nats; probability [\d.]+ %; ", note) for note in notes)
    assert ("epistemic, nats:" in page) == (k > 1)
    # Tokens that are parts of a character have no text of their own; the whole stands beside them.
    assert "\ufffd" in page and "é 👩‍👧" in found.of("span", "value")
    assert "&lt;" in page and "<b>two" not in page and "\u202e" not in page


def test_the_level_of_a_token_is_its_share_of_the_scale(artifact: Artifact, tmp_path: Path) -> None:
    page, _ = written(tmp_path, free_text(artifact, ["abcdefgh"]))
    limits = [
        float(number) for number in re.findall(r"([\d.]+) (?:to|and more)", page[page.index("total, nats:") :])[:5]
    ]
    tokens = re.findall(r'<span class="u(\d)" title="total ([\d.]+) nats', page)
    assert tokens and all(limits[int(level)] <= float(value) + 6e-4 for level, value in tokens)
    assert all(float(value) < limits[int(level) + 1] + 6e-4 for level, value in tokens if level < "4")


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _contrast(one: Sequence[float], other: Sequence[float]) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [figures.LIGHT, figures.DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    """WCAG 2.2: 4.5 for text, 3 for lines; text stays readable on the strongest colour of a token."""
    colours = {name: np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for name, text in theme.items()}
    for name, least in (("ink", 7), ("muted", 4.5), ("blue", 4.5), ("orange", 4.5), ("green", 3), ("grey", 3)):
        assert _contrast(colours[name], colours["paper"]) >= least, name
    marked = 0.36 * colours["orange"] + 0.64 * colours["paper"]
    assert _contrast(colours["ink"], marked) >= 4.5


def test_the_templates_are_package_data() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["credence.training.report"] == ["*.j2"]
