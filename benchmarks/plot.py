"""The K-curve as a picture: latency and CPU time of one request against K, with the alternatives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERIES = (
    ("", "credence", "#1f5fa8", "o", "-"),
    ("token_samples_", "n = K answers of the mean (stock vLLM)", "#7f7f7f", "s", "--"),
    ("hf_batched_", "transformers + PEFT, mixed batch", "#e0902f", "^", "-."),
    ("hf_loop_", "transformers + PEFT, loop over samples", "#b3282d", "v", ":"),
)
PANELS = (("p50_ms", "latency of a request, ms (median)"), ("cpu_ms", "CPU time of a request, ms (median)"))


def plot_k_curve(result: Mapping[str, Any], path: Path) -> None:
    """Draws a result document of ``run_k_curve`` as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows, stock, model, tokens = result["rows"], result["stock_vllm"], result["model"], result["tokens"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    positions = {row["k"]: position for position, row in enumerate(rows)}
    for axis, (what, title) in zip(axes, PANELS, strict=True):
        for prefix, label, colour, marker, style in SERIES:
            points = [(positions[row["k"]], row[prefix + what]) for row in rows if row[prefix + what] is not None]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), style, color=colour, marker=marker, label=label)
            x, y = points[-1]
            axis.annotate(
                f"{y:.0f}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", color=colour, size=8
            )
        axis.axhline(stock[what], color="black", linewidth=1, label="one answer of the mean (stock vLLM)")
        axis.set_xticks(list(positions.values()), [str(k) for k in positions])
        axis.set_xlabel("posterior samples K (0 = mean adapter)")
        axis.set_title(title, size=10)
        axis.set_yscale("log")
        axis.margins(y=0.12)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"{model['parameters'] / 1e6:.0f} M parameters, {model['dtype']}, {tokens['prompt']} + {tokens['new']} tokens, {result['machine']}",
        size=11,
    )
    figure.savefig(path, dpi=130)
