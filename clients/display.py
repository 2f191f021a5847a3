"""Answers in a notebook: the text with its tokens coloured by their scores, and a line about all of it."""

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from credence.clients.types import TokenUncertainty, Uncertainty

# Scores at which a token has its full colour: the epistemic one as a share of its largest value ln K, the total in nats.
FULL_SHARE = 0.1
FULL_NATS = 2.0
# Orange that is seen on white and on black, and leaves text of either colour legible.
_RGB, _LARGEST_ALPHA = "230,100,0", 0.55


def token_spans(text: str, tokens: "tuple[TokenUncertainty, ...]") -> "Iterator[tuple[str, TokenUncertainty | None]]":
    """Cut a text into its tokens, and what lies between them (None).

    Tokens are looked up in the text, because a token decoded alone may lack its space; one that is not found is left out.
    """
    shown = 0
    for token in tokens:
        start = text.find(token.token, shown)
        if start >= 0:
            if start > shown:
                yield text[shown:start], None
            yield token.token, token
            shown = start + len(token.token)
    if shown < len(text):
        yield text[shown:], None


def html(text: str | None, scores: "Uncertainty | None") -> str:
    """One choice as HTML without scripts or style sheets, legible on light and dark.

    Args:
        text: What was said; None takes the tokens' own texts.
        scores: Its uncertainty, if there is one.
    """
    tokens = scores.tokens if scores is not None and scores.tokens else ()
    spans = token_spans("".join(token.token for token in tokens) if text is None else text, tokens)
    num_samples = 0 if scores is None else scores.n_effective
    shown = "".join(escape(part) if token is None else _token(part, token, num_samples) for part, token in spans)
    lines = [f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7">{shown}</div>'] if shown else []
    if scores is not None:
        about = " · ".join(_facts(scores))
        lines.append(f'<div style="font-size:85%;opacity:0.75">{escape(about)}</div>')
    return f'<div style="margin:0.4em 0">{"".join(lines)}</div>'


def _token(part: str, token: "TokenUncertainty", num_samples: int) -> str:
    facts = {
        "epistemic": token.epistemic,
        "total": token.total,
        "aleatoric": token.aleatoric,
        "log-probability": token.logprob,
    }
    title = "\n".join(f"{name} {value:.4f} nats" for name, value in facts.items() if value is not None)
    if token.variation_ratio is not None:
        title += f"\nvariation ratio {token.variation_ratio:.3f}"
    if num_samples > 1:
        strength = token.epistemic / (FULL_SHARE * math.log(num_samples))
    else:
        strength = token.total / FULL_NATS
    alpha = _LARGEST_ALPHA * min(1.0, max(0.0, strength))
    style = f"background:rgba({_RGB},{alpha:.2f});border-radius:3px"
    return f'<span style="{style}" title="{escape(title)}">{escape(part)}</span>'


def _facts(scores: "Uncertainty") -> Iterator[str]:
    if scores.confidence is None:
        yield "no confidence"
    else:
        yield f"confidence {scores.confidence:.3f} ({'calibrated' if scores.calibrated else 'not calibrated'})"
    if scores.flag is not None and scores.flag != "ok":
        yield scores.flag
    for choice in scores.choices or ():
        yield f"{choice.label!r} {choice.prob:.3f}" + ("" if choice.std is None else f" ± {choice.std:.3f}")
    if scores.total is not None and scores.aleatoric is not None and scores.epistemic is not None:
        yield f"total {scores.total:.3f} {scores.unit}: aleatoric {scores.aleatoric:.3f}, epistemic {scores.epistemic:.3f}"
    yield f"{scores.n_effective} of {scores.n_samples} samples, mode {scores.mode}"
    if scores.tokens:
        if scores.n_effective > 1:
            full = FULL_SHARE * math.log(scores.n_effective)
            yield f"colour: epistemic, full from {full:.2f} nats ({FULL_SHARE:.0%} of ln {scores.n_effective})"
        else:
            yield f"colour: total, full from {FULL_NATS:g} nats"
