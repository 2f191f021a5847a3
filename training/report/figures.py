"""The figures of a report, as SVG.

Text stays text and colours are CSS variables, so that a page can draw them for a light or a dark background; lines also differ by dash
and marker, areas by hatching. Colours after Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from credence.training.evaluate import Entry
from credence.training.report import curves
from credence.training.report.curves import Results, Series

FONT = "system-ui, sans-serif"
# Matplotlib draws with these; each then becomes the variable of its name, or the light theme's colour in a file.
KEYS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "paper": "#040404",
    "blue": "#050505",
    "orange": "#060606",
    "green": "#070707",
    "grey": "#080808",
}
LIGHT = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d8dee4",
    "paper": "#ffffff",
    "blue": "#0072b2",
    "orange": "#c2510a",
    "green": "#00795a",
    "grey": "#6b7480",
}
DARK = {
    "ink": "#e8ecf1",
    "muted": "#a9b4c0",
    "grid": "#3a434e",
    "paper": "#161b22",
    "blue": "#56b4e9",
    "orange": "#ff9d4d",
    "green": "#3fcfa0",
    "grey": "#9aa5b1",
}
STYLES = (("blue", "-", "o"), ("orange", "--", "s"), ("green", ":", "^"))
SWEPT = {
    "nll": ("NLL, nats", "lower is better"),
    "ece15": ("ECE, 15 bins", "lower is better"),
    "error_auroc": ("error AUROC", "higher is better"),
    "ood_auroc_total": ("OOD AUROC, total", "higher is better"),
}
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "credence",
    "font.size": 11.5,
    "axes.edgecolor": KEYS["muted"],
    "axes.labelcolor": KEYS["ink"],
    "axes.titlesize": 11.5,
    "text.color": KEYS["ink"],
    "xtick.color": KEYS["muted"],
    "ytick.color": KEYS["muted"],
    "grid.color": KEYS["grid"],
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: of its file, without ending.
        title, caption: what it shows and how to read it, plain text.
        svg: the drawing; its colours are CSS variables.
    """

    name: str
    title: str
    caption: str
    svg: str

    def file(self) -> str:
        """The SVG as a file of its own, on white."""
        text = re.sub(r"var\(--(\w+)\)", lambda match: LIGHT[match[1]], self.svg)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + text


def pictures(results: Results, unit: str) -> Iterator[Picture]:
    """Yields the figures that the measured entries allow.

    Args:
        unit: what one prediction is, "row" or "token".
    """
    headline, has_ood = results.headline[0], results.headline[0].ood is not None
    headline_name, shown = entry_name(results.headline), _compared(results)
    yield Picture(
        "reliability",
        "Does a confidence of 80 % mean 80 % right?",
        f"Reliability diagram in the 15 bins of the ECE. On the diagonal the confidence is right; below it the adapter promises too "
        f"much. Below: how many {unit}s of {headline_name} lie in each bin.",
        _draw("reliability", partial(draw_reliability, shown=shown, unit=unit), 3.6),
    )
    yield Picture(
        "confidence",
        "Are wrong answers less confident?",
        f"Confidence of right and wrong {unit}s, {headline_name}. Good: right ones at the right end, wrong ones at the left.",
        _draw("confidence", partial(draw_confidence, entry=headline, unit=unit)),
    )
    yield Picture(
        "risk-coverage",
        "How many errors if only confident answers are used?",
        f"Error rate of the most confident share of the {unit}s. Lower is better; a curve that falls to the left means that confidence "
        "can be used to pass hard cases on.",
        _draw("risk-coverage", partial(draw_risk_coverage, shown=shown)),
    )
    if has_ood:
        for score, meaning in (
            ("total", "all uncertainty"),
            ("epistemic", "what the samples disagree about"),
        ):
            if results.headline[1][f"ood_auroc_{score}"] is not None:
                yield Picture(
                    f"ood-{score}",
                    f"Do rows from elsewhere look unfamiliar? ({score})",
                    f"{score.capitalize()} uncertainty of test and OOD rows ({meaning}), {headline_name}. The less they overlap, the "
                    f"better it finds foreign rows: AUROC {results.headline[1][f'ood_auroc_{score}']:.3f} (0.5 is chance).",
                    _draw(f"ood-{score}", partial(draw_ood, entry=headline, score=score)),
                )
    means = {entry_name(pair): pair[1] for pair in results.mean}
    unscaled = {name: document for name, document in means.items() if document["temperature"] == 1}
    lines = "; horizontal lines are the mean adapter" if means else ""
    taus = {entry.tau for entry, _ in results.all if entry.k == headline.k}
    sweeps = (
        ("K", "samples K", "K is the number of samples averaged", results.over_k, len(results.sample_counts), means),
        (
            "tau",
            "tau",
            f"tau scales the posterior's variance, K = {headline.k}, T = 1",
            results.over_tau,
            len(taus),
            unscaled,
        ),
    )
    for what, label, meaning, over, count, bars in sweeps:
        for metric, (title, direction) in SWEPT.items() if count > 1 else ():
            series, name = over(metric), f"{what.lower()}-{metric.replace('_', '-')}"
            if series:
                yield Picture(
                    name,
                    f"{title} against {what}",
                    f"{direction.capitalize()}. {meaning}{lines}.",
                    _draw(name, partial(draw_sweep, series=series, title=title, what=label, metric=metric, means=bars)),
                )


def entry_name(pair: curves.Pair) -> str:
    """How the report calls an entry."""
    entry, document = pair
    # Of the two entries of a K the second is the one at the fitted temperature, even where that is 1.
    name = f"K = {entry.k}" if entry.k else "mean"
    return name if document["temperature"] == 1 else f"{name} + T"


def theme(colours: Mapping[str, str]) -> str:
    """A theme as CSS declarations."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _compared(results: Results) -> list[curves.Pair]:
    """The mean, the mean with T, and the headline, each once."""
    pairs = {entry_name(pair): pair for pair in (*results.mean, results.headline)}
    return list(pairs.values())


def _draw(name: str, draw: Callable[[Figure], None], height: float = 2.9) -> str:
    """Draws at 350 units wide, the width of a telephone: there the text has its nominal size."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(350 / 72, height), layout="constrained", facecolor=KEYS["paper"])
        FigureCanvasSVG(figure)
        draw(figure)
        for axis in figure.axes:
            axis.set_facecolor("none")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Ids must differ between the figures of one page.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, svg)
    for key, colour in KEYS.items():
        svg = svg.replace(colour, f"var(--{key})")
    return svg


def _line(index: int) -> dict[str, Any]:
    colour, style, marker = STYLES[index % len(STYLES)]
    return {"color": KEYS[colour], "linestyle": style, "marker": marker, "markersize": 4.5, "linewidth": 1.8}


def _order(index: int, count: int) -> int:
    """Style of a compared entry: the headline, which comes last, always has the first."""
    return (index + 1) % count


def draw_reliability(figure: Figure, shown: list[curves.Pair], unit: str) -> None:
    """Share right against confidence of every entry, and how many predictions of the last one lie in each bin."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color=KEYS["muted"], linewidth=1, linestyle=(0, (1, 2)))
    for index, pair in enumerate(shown):
        filled = [(found.confidence, found.accuracy) for found in curves.bins(pair[0].scores) if found.count]
        upper.plot(*zip(*filled, strict=True), **_line(_order(index, len(shown))), label=entry_name(pair))
    for found in curves.bins(shown[-1][0].scores):
        width = found.high - found.low
        lower.bar(found.low, found.count, width * 0.9, align="edge", color=KEYS["blue"])
    upper.set(ylim=(-0.03, 1.03), xlim=(0, 1), ylabel="share right")
    lower.set(xlabel="confidence", ylabel=f"{unit}s")
    for axis in (upper, lower):
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    upper.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(upper)
    _finish(lower, legend=False)


def draw_confidence(figure: Figure, entry: Entry, unit: str) -> None:
    """Right and wrong predictions by confidence, one on the other."""
    axis = figure.subplots()
    for found in curves.bins(entry.scores):
        width, wrong = found.high - found.low, found.count - found.right
        style: dict[str, Any] = {"align": "edge", "width": width * 0.9, "edgecolor": KEYS["paper"], "linewidth": 0.5}
        label = {"right": "right", "wrong": "wrong"} if not found.low else {}
        axis.bar(found.low, found.right, color=KEYS["blue"], label=label.get("right"), **style)
        axis.bar(
            found.low, wrong, bottom=found.right, color=KEYS["orange"], hatch="////", label=label.get("wrong"), **style
        )
    axis.set(xlim=(0, 1), xlabel="confidence", ylabel=f"{unit}s")
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axis)


def draw_risk_coverage(figure: Figure, shown: list[curves.Pair]) -> None:
    """Error rate of the most confident share, of every entry."""
    axis = figure.subplots()
    for index, pair in enumerate(shown):
        style = {**_line(_order(index, len(shown))), "markevery": 0.2}
        coverage, risk = curves.risk_coverage(pair[0].scores)
        style = style if len(coverage) > 1 else {**style, "markevery": None}
        axis.plot(coverage, risk, **style, label=entry_name(pair))
    axis.set(xlim=(0, 1.02), xlabel="share answered, most confident first", ylabel="share wrong of these")
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axis)


def draw_ood(figure: Figure, entry: Entry, score: str) -> None:
    """A score of test rows and of rows from elsewhere."""
    assert entry.ood is not None
    axis = figure.subplots()
    edges, (inside, outside) = curves.histograms((entry.scores, entry.ood), score)
    axis.stairs(inside, edges, fill=True, color=KEYS["blue"], alpha=0.35)
    axis.stairs(inside, edges, color=KEYS["blue"], linewidth=1.8, label="test rows")
    axis.stairs(outside, edges, color=KEYS["orange"], linewidth=1.8, linestyle="--", hatch="///", label="OOD rows")
    axis.set(xlabel=f"{score} uncertainty, nats", ylabel="share of rows", xlim=(0, edges[-1]))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(axis)


def draw_sweep(
    figure: Figure, series: list[Series], title: str, what: str, metric: str, means: Mapping[str, Mapping[str, Any]]
) -> None:
    """A metric over K or tau, both at equal distances: they are chosen on a logarithmic grid, and tau may be 0."""
    axis = figure.subplots()
    positions = {x: index for index, x in enumerate(sorted({point.x for line in series for point in line.points}))}
    for (name, document), style in zip(means.items(), ((0, (1, 1)), (0, (5, 2, 1, 2))), strict=False):
        if document[metric] is not None:
            axis.axhline(document[metric], color=KEYS["grey"], linestyle=style, linewidth=1.6, label=name)
    for index, line in enumerate(series):
        points = [(positions[point.x], point.value) for point in line.points if point.value is not None]
        axis.plot(*zip(*points, strict=True), **_line(index), label=line.name)
        ends = [(positions[point.x], *point.interval) for point in line.points if point.interval is not None]
        if ends:
            x, low, high = zip(*ends, strict=True)
            axis.fill_between(x, low, high, color=KEYS[STYLES[index][0]], alpha=0.13, linewidth=0)
    axis.set_xticks(list(positions.values()), [f"{float(f'{x:.3g}'):,.10g}" for x in positions])
    axis.set(xlabel=what, ylabel=title)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    _finish(axis)


def _finish(axis: Axes, legend: bool = True) -> None:
    axis.grid(True, axis="y")
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    if legend and len(labels) > 1:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=2.2, columnspacing=1.2)
