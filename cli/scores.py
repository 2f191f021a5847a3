"""How uncertainty is shown: a few lines for the whole answer, tables for labels, answers and samples, colours for tokens."""

import math
import re
import sys
from typing import TYPE_CHECKING

from credence.cli.output import print_table, rows

if TYPE_CHECKING:
    from credence.clients import SampleAnswer, TokenUncertainty, Uncertainty

# Epistemic score of a token, as a share of its largest value ln K, from which it is shown in yellow, and in red.
YELLOW_SHARE, RED_SHARE = 0.02, 0.1
UNDERLINE_NATS = 1.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show_text(text: str, scores: "Uncertainty | None" = None) -> None:
    """Print an answer: its tokens with their scores where there are any, else its text."""
    if scores is not None and scores.tokens:
        _print_tokens(text, scores.tokens, scores.n_effective)
    else:
        print(for_screen(text))


def show_scores(scores: "Uncertainty") -> None:
    """Print everything about an answer but its text and tokens."""
    print(_describe(scores))
    if scores.choices:
        spreads = ("" if choice.std is None else f"{choice.std:.3f}" for choice in scores.choices)
        labels = [(_one_line(choice.label), f"{choice.prob:.3f}") for choice in scores.choices]
        print_table(
            ("label", "probability", "std over samples"),
            [(*label, spread) for label, spread in zip(labels, spreads, strict=True)],
        )
    if scores.answers:
        print_table(
            ("answer", "count", "share"),
            [(_one_line(answer.answer), str(answer.count), f"{answer.share:.3f}") for answer in scores.answers],
        )
    if scores.samples:
        print_table(("sample", "mean logprob", "said"), [_sample_row(sample) for sample in scores.samples])


def print_token_table(tokens: "tuple[TokenUncertainty, ...]") -> None:
    """Print a line for each token, with tabs between its scores (nats) and the token."""
    print("\nlogprob\ttotal\tepistemic\ttoken")
    for token in tokens:
        print(f"{token.logprob:.4f}\t{token.total:.4f}\t{token.epistemic:.4f}\t{token.token!r}")


def for_screen(text: str) -> str:
    """Show control characters instead of obeying them on a terminal: a model's text must not drive it. Elsewhere keep them."""
    return _harmless(text) if sys.stdout.isatty() else text


def _describe(scores: "Uncertainty") -> str:
    lines = {}
    if scores.confidence is not None:
        calibrated = "calibrated" if scores.calibrated else "not calibrated"
        flag = f", flag {scores.flag}" if scores.flag else ""
        lines["confidence"] = f"{scores.confidence:.3f} ({calibrated}{flag})"
    if scores.agreement is not None:
        lines["agreement"] = f"{scores.agreement:.3f} of the samples gave this answer"
    if scores.total is not None and scores.aleatoric is not None and scores.epistemic is not None:
        lines["total"] = (
            f"{scores.total:.4f} {scores.unit} = aleatoric {scores.aleatoric:.4f} + epistemic {scores.epistemic:.4f}"
        )
    if scores.choices_mass is not None:
        lines["labels"] = f"{scores.choices_mass:.3f} of the model's probability is on them"
    seed = "" if scores.seed is None else f", seed {scores.seed}"
    lines["samples"] = f"{scores.n_effective} of {scores.n_samples}, mode {scores.mode}, tau {scores.tau:g}{seed}"
    if scores.auto is not None:
        outcome = "settled" if scores.auto.settled else "not settled"
        lines["auto"] = f"{outcome} after {', '.join(map(str, scores.auto.stages))} samples"
    if scores.adapter is not None:
        lines["adapter"] = f"{scores.adapter.name} {scores.adapter.digest}"
    return rows(lines)


def _sample_row(sample: "SampleAnswer") -> tuple[str, str, str]:
    said = "" if sample.text is None else _one_line(sample.text)
    if sample.probs:
        label, prob = max(sample.probs.items(), key=lambda item: item[1])
        said = f"{_one_line(label)} ({prob:.3f})"
    return str(sample.index), "" if sample.mean_logprob is None else f"{sample.mean_logprob:.4f}", said


def _print_tokens(text: str, tokens: "tuple[TokenUncertainty, ...]", num_samples: int) -> None:
    """Colour the tokens on a terminal; anywhere else print the text and a line for each token."""
    from rich.console import Console
    from rich.text import Text

    from credence.clients.display import token_spans

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        print(text)
        print_token_table(tokens)
        return
    # Model output goes through Text.append, so that square brackets in it are not read as markup.
    line = Text()
    for part, token in token_spans(text, tokens):
        line.append(_harmless(part), style="" if token is None else _style(token, num_samples))
    console.print(line)
    console.print(
        Text.assemble(
            "epistemic: ",
            (f"from {YELLOW_SHARE:.0%} of ln K", "yellow"),
            ", ",
            (f"from {RED_SHARE:.0%}", "red"),
            "; total: ",
            (f"from {UNDERLINE_NATS:g} nat", "underline"),
        )
    )


def _harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _one_line(text: str) -> str:
    """The text as it stands in a table: without control characters and line breaks, its outer spaces visible."""
    shown = _harmless(text).replace("\n", "\\n").replace("\t", "\\t")
    return repr(shown) if shown != shown.strip() or not shown else shown


def _style(token: "TokenUncertainty", num_samples: int) -> str:
    share = token.epistemic / math.log(num_samples) if num_samples > 1 else 0.0
    colour = "red" if share >= RED_SHARE else "yellow" if share >= YELLOW_SHARE else ""
    underline = "underline" if token.total >= UNDERLINE_NATS else ""
    return f"{colour} {underline}".strip()
