"""Draws the dashboard's panels from a Prometheus server, without Grafana: `render.py URL OUT.png --minutes 10`.

Each panel's own queries are run and drawn with matplotlib, to see that every panel says something. It is no picture of Grafana.
"""

import argparse
import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as dates
import matplotlib.pyplot as plt
from PIL import Image

DASHBOARD = Path(__file__).parent / "dashboards" / "credence.json"
COLUMNS = 3
STEPS = 120


def query(url: str, expression: str, start: float, end: float, *, instant: bool) -> list[dict[str, Any]]:
    """The series of an expression; raises httpx.HTTPStatusError if Prometheus refuses it."""
    minutes = max(1, round((end - start) / 60))
    for name, value in {"$__rate_interval": "1m", "$__range": f"{minutes}m", "$adapter": ".*"}.items():
        expression = expression.replace(name, value)
    path, times = ("query", {"time": end}) if instant else ("query_range", {"start": start, "end": end})
    parameters = {"query": expression, **times, **({} if instant else {"step": (end - start) / STEPS})}
    response = httpx.get(f"{url}/api/v1/{path}", params=parameters)
    response.raise_for_status()
    series: list[dict[str, Any]] = response.json()["data"]["result"]
    return series


def legend(template: str, labels: dict[str, str]) -> str:
    """A legend with its ``{{label}}`` filled in."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def draw(panel: dict[str, Any], axes: Any, url: str, start: float, end: float) -> int:
    """Draws one panel; returns how many values it shows."""
    instant = panel["type"] in ("bargauge", "stat")
    found = [
        (legend(target["legendFormat"], series["metric"]), series, target["refId"])
        for target in panel["targets"]
        for series in query(url, target["expr"], start, end, instant=instant)
    ]
    found.sort(key=lambda entry: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", entry[0])])
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    unit = {"s": "s", "reqps": "1/s", "percentunit": "share"}.get(panel["fieldConfig"]["defaults"]["unit"], "")
    shown = 0
    if instant:
        bars = [(name, float(series["value"][1]), series["metric"].get("k", "0"), ref) for name, series, ref in found]
        bars = sorted((bar for bar in bars if math.isfinite(bar[1])), key=lambda bar: (bar[3], int(bar[2])))
        axes.barh([name for name, *_ in bars], [value for _, value, *_ in bars], color="tab:blue")
        axes.invert_yaxis()
        axes.set_xlabel(unit, fontsize=7)
        for row, bar in enumerate(bars):
            axes.text(bar[1], row, f" {bar[1]:.3g}", va="center", fontsize=7)
        axes.margins(x=0.15)
        shown = len(bars)
    else:
        for name, series, _ in found:
            points = [(float(at), float(value)) for at, value in series["values"] if math.isfinite(float(value))]
            if points:
                axes.plot([at / 86400 for at, _ in points], [v for _, v in points], label=name)
                shown += len(points)
        axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
        axes.set_xlim(start / 86400, end / 86400)
        axes.set_ylabel(unit, fontsize=7)
        axes.set_ylim(bottom=0)
        if shown:
            axes.legend(fontsize=6, ncols=2, loc="best", framealpha=0.6)
    if not shown:
        reason = panel["description"] or "no data"
        axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes, fontsize=7, wrap=True)
    return shown


def main() -> None:
    """Draws all panels and says which are empty."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="Prometheus, e.g. http://127.0.0.1:9090")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--minutes", type=float, default=10, help="time range, up to now")
    given = parser.parse_args()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    end = time.time()
    start = end - 60 * given.minutes
    rows = math.ceil(len(panels) / COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(15, 2.6 * rows), layout="constrained")
    for panel, axes in zip(panels, grid.flat, strict=False):
        shown = draw(panel, axes, given.url, start, end)
        print(f"{shown:6d} values  {panel['title']}")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(
        "Panels of deploy/grafana/dashboards/credence.json, drawn by deploy/grafana/render.py (not Grafana)",
        fontsize=10,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=75)
    Image.open(picture).convert("RGB").quantize(64).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
