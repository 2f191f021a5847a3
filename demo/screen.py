"""What the demo shows: a table of answers with coloured tokens, and in plain words what the scores can tell apart."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from credence.demo.ask import Case, Separation
from credence.demo.world import KINDS, Kind

EXAMPLES_PER_KIND = 4
# Widths in characters: of the columns of text, of the four columns of numbers with all gaps, of a bar.
LEAST_SENTENCE_CELLS, MOST_SENTENCE_CELLS = 22, 37
LEAST_TRUTH_CELLS, MOST_TRUTH_CELLS = 12, 34
NUMBER_CELLS = 33
BAR_CELLS = 12
BAR_NATS = 1.0
ALEATORIC_STYLE, EPISTEMIC_STYLE = "blue", "magenta"
AIM = 0.85
# Upper bounds of a token's total in nats, and how such a token looks.
TOKEN_STYLES = ((0.3, "black on green"), (1.0, "black on yellow"), (float("inf"), "bold white on red"))
KIND_TITLES: Mapping[Kind, str] = {
    "known": "KNOWN: the adapter read this fact many times, always the same",
    "noisy": "NOISY: the adapter read this many times, with contradicting answers",
    "unknown": "UNKNOWN: nobody ever said anything about this person",
}


def token_style(total: float) -> str:
    """Colour of a token whose total is `total` nats."""
    return next(style for bound, style in TOKEN_STYLES if total < bound)


def coloured(case: Case) -> Text:
    """The prompt, and the answer with every token in the colour of its uncertainty."""
    text = Text(case.fact.prompt)
    for token in case.tokens:
        if token.token.strip() and not token.token.startswith("<"):
            text.append(token.token, style=token_style(token.total))
    return text


def bar(case: Case) -> Text:
    """One bar as long as the total: its aleatoric part, then its epistemic part."""
    filled = min(BAR_CELLS, round(BAR_CELLS * case.total / BAR_NATS))
    epistemic = min(filled, round(BAR_CELLS * case.epistemic / BAR_NATS))
    return Text.assemble(
        ("█" * (filled - epistemic), ALEATORIC_STYLE), ("▓" * epistemic, EPISTEMIC_STYLE), "·" * (BAR_CELLS - filled)
    )


def truth(case: Case) -> Text:
    """What the adapter was told."""
    if case.fact.kind == "unknown":
        return Text("(never told)", style="dim")
    return Text(" / ".join(case.fact.answers))


def answers_table(kind: Kind, cases: Sequence[Case], *, width: int, examples: int = EXAMPLES_PER_KIND) -> Table:
    """The first answers of one kind, and the averages over all of them, in `width` cells or a few more."""
    text_cells = width - NUMBER_CELLS - BAR_CELLS
    sentence_cells = max(LEAST_SENTENCE_CELLS, min(MOST_SENTENCE_CELLS, text_cells * 3 // 5))
    title = Text(KIND_TITLES[kind], style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("question and answer", width=sentence_cells)
    table.add_column(
        "what it was told", width=max(LEAST_TRUTH_CELLS, min(MOST_TRUTH_CELLS, text_cells - sentence_cells))
    )
    for name in ("confi-\ndence", "total", "alea-\ntoric", "epi-\nstemic"):
        table.add_column(name, justify="right", no_wrap=True, width=6)
    table.add_column("", width=BAR_CELLS + 1)
    for case in cases[:examples]:
        numbers = (case.confidence, case.total, case.aleatoric, case.epistemic)
        bars = Text(" ") + bar(case)
        table.add_row(coloured(case), truth(case), *(f"{number:.2f}" for number in numbers), bars)
    averages = [sum(getattr(case, name) for case in cases) / len(cases) for name in _SCORES]
    label = Text(f"average of {len(cases)} answers", style="italic")
    table.add_row(label, "", *(f"{number:.2f}" for number in averages))
    return table


_SCORES = ("confidence", "total", "aleatoric", "epistemic")


def verdict(separation: Separation) -> list[str]:
    """What the four areas mean, in sentences that hold whatever the numbers are."""
    best = max(separation.by_epistemic, separation.by_total)
    if best < AIM:
        unknown = (
            f"The posterior does NOT separate the unknown from the known well: {best:.3f} at best, the aim is {AIM}. "
            "Do not trust these scores to find questions that the adapter cannot know."
        )
    else:
        unknown = f"The posterior tells the unknown from the known ({best:.3f} at best, the aim is {AIM})."
    if best > separation.by_mean_entropy:
        gain = f"That is better than the mean adapter's own entropy ({separation.by_mean_entropy:.3f})."
    else:
        gain = (
            f"That is NOT better than the mean adapter's own entropy ({separation.by_mean_entropy:.3f}): "
            "for this purpose the samples were not worth their cost here."
        )
    lines = [unknown, gain]
    if separation.by_epistemic < AIM:
        lines.append(
            f"Disagreement of the samples alone (epistemic) does NOT reach the aim: {separation.by_epistemic:.3f}; "
            "the posteriors do not separate epistemically."
        )
    if separation.noisy_by_aleatoric >= AIM:
        lines.append(f"Contradicting facts show as aleatoric uncertainty ({separation.noisy_by_aleatoric:.3f}).")
    else:
        lines.append(
            f"Contradicting facts do NOT show reliably as aleatoric uncertainty ({separation.noisy_by_aleatoric:.3f}, "
            f"the aim is {AIM})."
        )
    return lines


def separation_table(separation: Separation, counts: Mapping[Kind, int]) -> Table:
    """The areas under the ROC curve, one a row."""
    table = Table(
        title="Can the scores tell the kinds apart? AUROC: 1 always, 0.5 a coin",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("told apart")
    table.add_column("by")
    table.add_column("AUROC", justify="right")
    unknown = f"unknown ({counts['unknown']}) from known ({counts['known']})"
    rows = (
        (unknown, "epistemic score, K samples", separation.by_epistemic),
        (unknown, "total score, K samples", separation.by_total),
        (unknown, "entropy of the mean adapter alone", separation.by_mean_entropy),
        (f"noisy ({counts['noisy']}) from known ({counts['known']})", "aleatoric score, K samples",
         separation.noisy_by_aleatoric),
        (f"unknown ({counts['unknown']}) from noisy ({counts['noisy']})", "epistemic share of the total",
         separation.unknown_from_noisy),
    )  # fmt: skip
    for what, score, area in rows:
        table.add_row(what, score, Text(f"{area:.3f}", style="green" if area >= AIM else "red"))
    return table


def show(
    console: Console,
    cases: Sequence[Case],
    separation: Separation,
    latency_ms: Mapping[int, float],
    *,
    n_samples: int,
) -> None:
    """Prints everything: legend, answers, areas, verdict, and the latency by number of samples."""
    counts = {kind: sum(case.fact.kind == kind for case in cases) for kind in KINDS}
    bounds = [bound for bound, _ in TOKEN_STYLES]
    legend = Text.assemble(
        "Token colours by total uncertainty: ",
        (f" below {bounds[0]} nats ", TOKEN_STYLES[0][1]), " ",
        (f" below {bounds[1]} ", TOKEN_STYLES[1][1]), " ",
        (" above ", TOKEN_STYLES[2][1]),
        ".\nScores are nats per token, from ", f"{n_samples} posterior samples. Bars: total = ",
        ("█", ALEATORIC_STYLE), " aleatoric + ", ("▓", EPISTEMIC_STYLE), " epistemic.",
    )  # fmt: skip
    tables = [
        answers_table(kind, [case for case in cases if case.fact.kind == kind], width=console.width)
        for kind in KINDS
        if counts[kind]
    ]
    console.print(Group(Text(), legend, Text(), *tables, separation_table(separation, counts)))
    for line in verdict(separation):
        console.print(Text(line, style="bold red" if " NOT " in line else "bold green"))
    if latency_ms:
        console.print(Text("\nLatency of one answer by number of samples K, one request at a time (from /metrics):"))
        for k, milliseconds in latency_ms.items():
            name = "mean adapter, no uncertainty" if k == 0 else f"K = {k}"
            console.print(Text(f"  {name:<30}{milliseconds:8.1f} ms"))
