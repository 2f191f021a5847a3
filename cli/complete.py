"""`credence complete`: one prompt to a running server, and its answer with the scores."""

import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from credence.cli.output import CommandError, JsonOption, rows, write_json

if TYPE_CHECKING:
    from credence.clients import TokenUncertainty, Uncertainty

# Epistemic score of a token, as a share of its largest value ln K, from which it is shown in yellow, and in red.
YELLOW_SHARE, RED_SHARE = 0.02, 0.1
UNDERLINE_NATS = 1.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def complete(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")],
    model: Annotated[str, typer.Option("--model", help="Name of the adapter.", show_default=False)],
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Ask for the uncertainty of the answer.")] = False,
    n_samples: Annotated[int | None, typer.Option("--n-samples", help="K, posterior samples.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="How uncertainty is computed.")] = None,
    tau: Annotated[float | None, typer.Option("--tau", help="Posterior temperature, 0 is the mean.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Posterior seed.")] = None,
    granularity: Annotated[
        str | None, typer.Option("--granularity", help="sequence, or token for scores by token.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest answer.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sampling temperature, 0 is greedy.")
    ] = None,
    url: Annotated[str, typer.Option("--url", envvar="CREDENCE_URL", help="The server.")] = "http://localhost:8000",
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the key.", show_default="$CREDENCE_API_KEY")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest wait for the answer, in seconds.")] = 60.0,
    json_file: JsonOption = None,
) -> None:
    """Ask a running server, and show how sure it is.

    \b
    Example:
      credence complete $'Text: hello\\nLabel:' --model triage --uncertainty --max-tokens 1
    """
    from credence.clients import Client

    text = sys.stdin.read() if prompt == "-" else prompt
    key = _api_key(api_key_file)
    try:
        with Client(url, api_key=key, timeout_s=timeout_s) as client:
            completion = client.complete(
                text,
                model=model,
                uncertainty=uncertainty,
                n_samples=n_samples,
                mode=mode,  # type: ignore[arg-type]  # the client checks it and names the allowed ones
                tau=tau,
                seed=seed,
                granularity=granularity,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=temperature,
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    write_json(json_file, completion.model_dump(mode="json", exclude_none=True))
    if json_file == "-":
        return
    scores = completion.uncertainty
    if scores is not None and scores.tokens:
        _print_tokens(completion.text, scores.tokens, scores.n_effective)
    else:
        print(_harmless(completion.text) if sys.stdout.isatty() else completion.text)
    if scores is None:
        return
    print()
    print(describe(scores))


def describe(scores: "Uncertainty") -> str:
    """Lay out the scores of an answer in a few lines."""
    lines = {}
    if scores.confidence is not None:
        calibrated = "calibrated" if scores.calibrated else "not calibrated"
        flag = f", flag {scores.flag}" if scores.flag else ""
        lines["confidence"] = f"{scores.confidence:.3f} ({calibrated}{flag})"
    if scores.total is not None and scores.aleatoric is not None and scores.epistemic is not None:
        lines["total"] = (
            f"{scores.total:.4f} {scores.unit} = aleatoric {scores.aleatoric:.4f} + epistemic {scores.epistemic:.4f}"
        )
    for choice in scores.choices or ():
        spread = "" if choice.std is None else f" +- {choice.std:.3f}"
        lines[f"p({choice.label})"] = f"{choice.prob:.3f}{spread}"
    seed = "" if scores.seed is None else f", seed {scores.seed}"
    lines["samples"] = f"{scores.n_effective} of {scores.n_samples}, mode {scores.mode}, tau {scores.tau:g}{seed}"
    if scores.adapter is not None:
        lines["adapter"] = f"{scores.adapter.name} {scores.adapter.digest}"
    return rows(lines)


def _print_tokens(text: str, tokens: "tuple[TokenUncertainty, ...]", num_samples: int) -> None:
    """Colour the tokens on a terminal; anywhere else print the text and a line for each token."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        print(text)
        print("\nlogprob\ttotal\tepistemic\ttoken")
        for token in tokens:
            print(f"{token.logprob:.4f}\t{token.total:.4f}\t{token.epistemic:.4f}\t{token.token!r}")
        return
    # Model output goes through Text.append, so that square brackets in it are not read as markup. Tokens are looked up in the
    # text, because a token decoded alone may lack its space.
    line = Text()
    shown = 0
    for token in tokens:
        start = text.find(token.token, shown)
        if start >= 0:
            line.append(_harmless(text[shown:start]))
            line.append(_harmless(token.token), style=_style(token, num_samples))
            shown = start + len(token.token)
    line.append(_harmless(text[shown:]))
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
    """Show control characters instead of obeying them: a model's text must not drive the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _style(token: "TokenUncertainty", num_samples: int) -> str:
    share = token.epistemic / math.log(num_samples) if num_samples > 1 else 0.0
    colour = "red" if share >= RED_SHARE else "yellow" if share >= YELLOW_SHARE else ""
    underline = "underline" if token.total >= UNDERLINE_NATS else ""
    return f"{colour} {underline}".strip()


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("CREDENCE_API_KEY") or None
    try:
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--api-key-file {file} cannot be read: {error}") from error
    if len(lines) != 1:
        raise CommandError(f"--api-key-file {file} must hold one key on one line, it holds {len(lines)}")
    return lines[0]
