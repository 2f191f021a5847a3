"""What a report says besides its figures: facts, the table, sentences, and the rows worth reading."""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from credence.training.evaluate import Evaluation
from credence.training.report.curves import Pair, Results
from credence.training.report.figures import entry_name
from credence.training.rows import entry_documents, question

EXAMPLES = 8
MAX_TEXT = 2000
"""Longest text of an example, characters."""
MAX_TOKENS = 400
LEVELS = 5
"""Steps of the colours of tokens."""
BIDI_CONTROLS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table: its key in the JSON, its title, which end is better, and what it means in plain words."""

    key: str
    title: str
    better: Callable[[Sequence[float]], float]
    meaning: str
    percent: bool = False

    def text(self, value: float | None) -> str:
        """A value as the table has it."""
        if value is None:
            return "–"
        return _percent(value) if self.percent else f"{value:.3f}"


COLUMNS = (
    Column(key="accuracy", title="accuracy", better=max, percent=True, meaning="share of right answers"),
    Column(
        key="nll",
        title="NLL",
        better=min,
        meaning="mean negative log-likelihood of the right answer, nats: punishes confident errors",
    ),
    Column(
        key="ece15", title="ECE15", better=min, meaning="mean distance between confidence and share right, over 15 bins"
    ),
    Column(
        key="brier",
        title="Brier",
        better=min,
        meaning="mean squared distance of the probabilities from the truth, 0 to 2",
    ),
    Column(
        key="error_auroc",
        title="error AUROC",
        better=max,
        meaning="chance that a wrong answer is less confident than a right one; 0.5 says nothing",
    ),
    Column(key="aurc", title="AURC", better=min, meaning="mean error rate over all shares of most confident answers"),
    Column(
        key="coverage_at_risk_5",
        title="coverage at 5 % risk",
        better=max,
        percent=True,
        meaning="largest share that can be answered with at most 5 % errors",
    ),
    Column(
        key="coverage_at_risk_10", title="coverage at 10 % risk", better=max, percent=True, meaning="the same with 10 %"
    ),
    Column(
        key="ood_auroc_total",
        title="OOD AUROC total",
        better=max,
        meaning="chance that a row from elsewhere has a larger total uncertainty than a test row",
    ),
    Column(
        key="ood_auroc_epistemic",
        title="OOD AUROC epistemic",
        better=max,
        meaning="the same of the epistemic uncertainty: what the samples disagree about",
    ),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of the table, the interval under it, and whether it is the best of its column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table."""

    name: str
    tau: str
    temperature: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A token of free text: what it is, how uncertain (level 0 to 4), and the numbers in words."""

    text: str
    level: int
    note: str


@dataclass(frozen=True, slots=True)
class Example:
    """A row worth reading; texts are safe to show, not escaped.

    Attributes:
        mark: "right", "wrong" or "OOD".
        predicted: None for free text.
        top: the most likely answers, each with its probability and whether it is the right one.
        tokens: free text by score.
    """

    where: str
    text: str
    mark: str
    answer: str
    predicted: str | None
    numbers: Mapping[str, str]
    top: tuple[tuple[str, float, bool], ...]
    tokens: Mapping[str, tuple[Token, ...]]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows chosen by one rule."""

    title: str
    note: str
    examples: tuple[Example, ...]


def columns(results: Results) -> tuple[Column, ...]:
    """The columns that some entry has a value for."""
    documents = [document for _, document in (*results.all, *results.token_samples)]
    return tuple(column for column in COLUMNS if any(document[column.key] is not None for document in documents))


def table(pairs: Sequence[Pair], shown: Sequence[Column], token_samples: Sequence[Pair] = ()) -> list[Line]:
    """The lines of entries and, after them, of token samples."""
    documents = [document for _, document in (*pairs, *token_samples)]
    best = {
        column.key: column.better([document[column.key] for document in documents if document[column.key] is not None])
        for column in shown
        if any(document[column.key] is not None for document in documents)
    }

    def line(name: str, tau: str, temperature: str, document: Mapping[str, Any]) -> Line:
        cells = []
        for column in shown:
            value, ends = document[column.key], document.get("intervals", {}).get(column.key)
            interval = f"{column.text(ends[0]).removesuffix(' %')}–{column.text(ends[1])}" if ends else ""
            is_best = value is not None and len(documents) > 1 and column.text(value) == column.text(best[column.key])
            cells.append(Cell(column.text(value), interval, is_best))
        return Line(name, tau, temperature, tuple(cells))

    return [
        *(
            line(f"K = {e.k}" if e.k else "mean", f"{e.tau:.4g}" if e.k else "–", f"{e.temperature:.3g}", document)
            for e, document in pairs
        ),
        *(
            line(f"{entry.k} token{'s' if entry.k > 1 else ''} of the mean", "–", "1", document)
            for entry, document in token_samples
        ),
    ]


def facts(evaluation: Evaluation, name: str, command: str | None) -> dict[str, str]:
    """What was evaluated."""
    config, unit = evaluation.artifact.config, unit_of(evaluation)
    positions = len(evaluation.entries[0].scores.row)
    tokens = f", {positions:,} tokens" if unit == "token" else ""
    found = {
        "Adapter": name,
        "Method": f"{config.method} (posterior kind {config.kind})",
        "Digest": evaluation.artifact.digest,
        "Base model": config.base_model.name,
        "Test rows": f"{len(evaluation.examples):,} of {evaluation.data.path.name} ({evaluation.data.format} rows{tokens})",
    }
    if evaluation.ood is not None:
        found["OOD rows"] = f"{len(evaluation.ood_examples):,} of {evaluation.ood.path.name}"
    most = evaluation.artifact.num_distinct_samples
    if most is not None and most > 1:
        found["Members"] = f"{most}; a larger K is these {most} again"
    if command:
        found["Command"] = command
    return {key: visible(value) for key, value in found.items()}


def sentences(evaluation: Evaluation, results: Results) -> list[str]:
    """The findings in plain words: the headline beside the scaled mean."""
    (entry, found), unit = results.headline, unit_of(evaluation)
    name, count = entry_name(results.headline), len(entry.scores.row)
    what = "right answer" if unit == "row" else "right next token"
    lines = [
        f"{name} gives the {what} for {_percent(found['accuracy'])} of {count:,} {unit}{'s' if count > 1 else ''}, at a mean confidence of "
        f"{_percent(found['mean_confidence'])}. Confidence and share right differ by {100 * found['ece15']:.1f} points on average (ECE15)."
    ]
    if results.mean and entry.k:
        bar = results.mean[-1]
        lines.append(
            f"Its NLL is {found['nll']:.3f} nats, that of the {entry_name(bar)} {bar[1]['nll']:.3f}: a difference of "
            f"{found['nll'] - bar[1]['nll']:+.3f} (negative: the samples are better). "
            "The temperature-scaled mean is the bar to pass, because it costs nothing."
        )
    lines.append(
        f"With at most 5 % errors {_percent(found['coverage_at_risk_5'])} of the {unit}s can be answered, with at most 10 % "
        f"{_percent(found['coverage_at_risk_10'])}: the most confident ones."
    )
    if found["error_auroc"] is not None:
        lines.append(
            f"A wrong answer is less confident than a right one in {_percent(found['error_auroc'])} of all pairs (50 % is chance)."
        )
    if found["ood_auroc_total"] is not None:
        epistemic = found["ood_auroc_epistemic"]
        also = f", by epistemic uncertainty in {_percent(epistemic)}" if epistemic is not None else ""
        lines.append(
            f"A row from elsewhere is more uncertain than a test row in {_percent(found['ood_auroc_total'])} of all pairs by total "
            f"uncertainty{also} (50 % is chance)."
        )
    return lines


def unit_of(evaluation: Evaluation) -> str:
    """What one prediction is."""
    return "row" if evaluation.data.format.has_candidates else "token"


def groups(evaluation: Evaluation, results: Results) -> tuple[list[Group], dict[str, float]]:
    """The rows worth reading under the headline entry, and the score at which the colours of tokens end."""
    entry = results.headline[0]
    rows = list(entry_documents(evaluation, entry))
    inside, outside = [row for row in rows if not row["ood"]], [row for row in rows if row["ood"]]
    asked = {
        (is_ood, row.line): row
        for is_ood, data in ((False, evaluation.data), (True, evaluation.ood))
        if data is not None
        for row in data.rows
    }
    tops = _token_tops(rows)

    def example(row: Mapping[str, Any]) -> Example:
        data = evaluation.ood if row["ood"] else evaluation.data
        assert data is not None
        text = question(data, asked[row["ood"], row["line"]])
        return Example(
            where=f"{visible(row['file'])}, line {row['line']}",
            text=visible(_clipped(text)),
            mark="OOD" if row["ood"] else "right" if row["correct"] else "wrong",
            answer=visible(_clipped(row["answer"])),
            predicted=None if row["predicted"] is None else visible(_clipped(row["predicted"], 200)),
            numbers={
                "confidence": _percent(row["confidence"]),
                "total": f"{row['total']:.3f} nats",
                **({"epistemic": f"{row['epistemic']:.4f} nats"} if "epistemic" in scores else {}),
            },
            top=tuple(
                (
                    visible(_clipped(found["answer"], 200)),
                    found["prob"],
                    not row["ood"] and found["answer"] == row["answer"],
                )
                for found in row.get("top", ())
            ),
            tokens={name: _tokens(row["tokens"], name, tops[name]) for name in scores} if "tokens" in row else {},
        )

    scores = [name for name in ("epistemic", "total") if any(row[name] > 0 for row in rows)]
    found = []
    for name in scores:
        meaning = (
            "the samples disagree most: what the adapter has not learned"
            if name == "epistemic"
            else "the averaged answer is least decided"
        )
        ranked = sorted(inside, key=itemgetter(name), reverse=True)[:EXAMPLES]
        found.append(Group(f"Most uncertain by {name}", f"Test rows of which {meaning}.", tuple(map(example, ranked))))
    wrong = sorted((row for row in inside if not row["correct"]), key=lambda row: -_wrong_confidence(row))[:EXAMPLES]
    note = "Test rows answered wrongly with the largest confidence." if unit_of(evaluation) == "row" else (
        "Test rows with the most confident wrong token: the adapter was sure of another one."
    )  # fmt: skip
    found.append(
        Group(
            "Most confidently wrong", note if wrong else "No test row is answered wrongly.", tuple(map(example, wrong))
        )
    )
    if outside:
        sure = sorted(outside, key=lambda row: row["total"])[:EXAMPLES]
        note = "OOD rows with the smallest total uncertainty: nothing warns of these."
        found.append(Group("From elsewhere, and not noticed", note, tuple(map(example, sure))))
    return found, tops


def visible(text: str) -> str:
    """Text in which control characters, direction marks and lone surrogates are shown as ‹U+202E›, so that they do nothing."""
    return "".join(
        f"‹U+{ord(character):04X}›"
        if character in BIDI_CONTROLS or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")
        else character
        for character in text
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _clipped(text: str, most: int = MAX_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _wrong_confidence(row: Mapping[str, Any]) -> float:
    """Of free text that of its most confident wrong token; a token is wrong if another one is the most likely."""
    if "tokens" not in row:
        return float(row["confidence"])
    return max((token["confidence"] for token in row["tokens"] if not token["correct"]), default=0.0)


def _token_tops(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where the colours end, by score: 99 of 100 tokens lie below."""
    found = {}
    for name in ("epistemic", "total"):
        values = sorted(token[name] for row in rows for token in row.get("tokens", ()))
        found[name] = values[int(0.99 * (len(values) - 1))] or values[-1] if values else 0.0
    return found


def _tokens(tokens: Sequence[Mapping[str, Any]], name: str, top: float) -> tuple[Token, ...]:
    shown = [
        Token(
            visible(token["token"]) or "∅",
            min(int(LEVELS * token[name] / top), LEVELS - 1) if top else 0,
            f"{name} {token[name]:.3f} nats; probability {_percent(math.exp(token['log_prob']))}; "
            + (
                "the most likely token"
                if token["correct"]
                else f"more likely: {visible(token['predicted'])!r}, {_percent(token['confidence'])}"
            ),
        )
        for token in tokens[:MAX_TOKENS]
    ]
    if len(tokens) > MAX_TOKENS:
        shown.append(Token(f" … ({len(tokens) - MAX_TOKENS:,} more tokens)", 0, "left out"))
    return tuple(shown)
