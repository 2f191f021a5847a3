"""Writes the report of an evaluation: report.html, which needs nothing beside it, and report.md with its figures."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from credence.training.evaluate import Evaluation
from credence.training.report import content, figures
from credence.training.report.curves import Results

# What CommonMark and GitHub give a meaning inside a line; a colon and the full stop of "www." open automatic links.
MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~$&@!:]|(?<=www)\.", re.IGNORECASE)


def write_report(
    directory: Path, evaluation: Evaluation, document: Mapping[str, Any], *, name: str, command: str | None = None
) -> Path:
    """Writes report.html, report.md and the figures; files of these names are replaced.

    Args:
        directory: is made if it is not there.
        document: ``Evaluation.document`` of this evaluation; its numbers and intervals are those of the table.
        name: of the adapter.
        command: shown as what repeats the evaluation.

    Returns:
        The page.

    Raises:
        OSError: a file cannot be written.
    """
    results, unit = Results.of(evaluation, document), content.unit_of(evaluation)
    shown, pictures = content.columns(results), list(figures.pictures(results, unit))
    groups, tops = content.groups(evaluation, results)
    values = {
        "name": content.visible(name),
        "facts": content.facts(evaluation, name, command),
        "sentences": content.sentences(evaluation, results),
        "columns": shown,
        "lines": content.table(results.main, shown, results.token_samples),
        "all_lines": content.table(results.all, shown) if len(results.all) > len(results.main) else [],
        "resamples": document.get("bootstrap", {}).get("resamples"),
        "headline": figures.entry_name(results.headline),
        "headline_k": results.headline[0].k,
        "pictures": pictures,
        "groups": groups,
        "legends": {score: top for score, top in tops.items() if top > 0},
        "levels": content.LEVELS,
        "unit": unit,
        "light": Markup(figures.theme(figures.LIGHT)),
        "dark": Markup(figures.theme(figures.DARK)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda template: template == "page.html.j2",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = markdown
    environment.filters["svg"] = Markup
    for picture in pictures:
        _write(directory / f"{picture.name}.svg", picture.file())
    _write(directory / "report.md", environment.get_template("page.md.j2").render(values))
    page = directory / "report.html"
    _write(page, environment.get_template("page.html.j2").render(values))
    return page


def markdown(text: str) -> str:
    """Text as one line of Markdown that shows it and does nothing else."""
    return MARKDOWN.sub(lambda match: "\\" + match[0], " ".join(text.split()))


def _write(path: Path, text: str) -> None:
    path.write_text("\n".join(line.rstrip() for line in text.split("\n")), encoding="utf-8", newline="\n")
