"""What the commands that ask a running server share: their options, the connection, and texts from files."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from credence.cli.output import CommandError

if TYPE_CHECKING:
    from credence.clients import Client

ModelOption = Annotated[str, typer.Option("--model", help="Name of the adapter.", show_default=False)]
NumSamplesOption = Annotated[
    str | None,
    typer.Option("--n-samples", metavar="K|auto", help="Posterior samples; auto takes as few as settle the decision."),
]
StopConfidenceOption = Annotated[
    float | None,
    typer.Option("--stop-confidence", help="With auto: how sure it must be that all samples decide the same."),
]
MinSamplesOption = Annotated[
    int | None, typer.Option("--min-samples", help="Accept as few samples as this when some fail.")
]
TauOption = Annotated[float | None, typer.Option("--tau", help="Posterior temperature, 0 is the mean.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Posterior seed.")]
GranularityOption = Annotated[str | None, typer.Option("--granularity", help="sequence, or token for scores by token.")]
ReturnSamplesOption = Annotated[bool, typer.Option("--return-samples", help="Show what each sample said.")]
ThresholdOption = Annotated[
    float | None, typer.Option("--threshold", help="Confidence below which the answer is flagged.")
]
UncalibratedOption = Annotated[
    bool, typer.Option("--uncalibrated", help="Leave the adapter's stored calibration out of the confidence.")
]
UrlOption = Annotated[str, typer.Option("--url", envvar="CREDENCE_URL", help="The server.")]
ApiKeyFileOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the key.", show_default="$CREDENCE_API_KEY")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Longest wait for the answer, in seconds.")]

DEFAULT_URL = "http://localhost:8000"
DEFAULT_TIMEOUT_S = 60.0


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the client's refusal of an argument into wrong usage.

    Raises:
        typer.BadParameter: An argument was refused; nothing was sent.
    """
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def connection(url: str, api_key_file: Path | None, timeout_s: float) -> "Iterator[Client]":
    """Open a client of the server at `url`, with the key from the file or from $CREDENCE_API_KEY.

    Raises:
        CommandError: The file does not hold one key.
        typer.BadParameter: An argument is not usable.
    """
    from credence.clients import Client

    key = _api_key(api_key_file)
    with usage_errors():
        client = Client(url, api_key=key, timeout_s=timeout_s)
    with client:
        yield client


def uncertainty_options(
    *,
    n_samples: str | None,
    stop_confidence: float | None,
    min_samples: int | None,
    tau: float | None,
    seed: int | None,
    granularity: str | None,
    return_samples: bool,
    threshold: float | None,
    uncalibrated: bool,
) -> dict[str, Any]:
    """Return the client's arguments for the options that the commands share; what was not given is left out.

    Raises:
        typer.BadParameter: `n_samples` is neither a number nor `auto`.
    """
    options = {
        "n_samples": _num_samples(n_samples),
        "stop_confidence": stop_confidence,
        "min_samples": min_samples,
        "tau": tau,
        "seed": seed,
        "granularity": granularity,
        "return_samples": return_samples or None,
        "threshold": threshold,
        "calibrated": False if uncalibrated else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def read_text(argument: str) -> str:
    """Return the text that an argument names: standard input for `-`, a file for `@FILE`, else the argument itself.

    A text that begins with @ is written with two of them. A file is taken as it is, with its last line end.

    Raises:
        CommandError: The file cannot be read.
    """
    if argument == "-":
        return sys.stdin.read()
    if argument.startswith("@@") or not argument.startswith("@"):
        return argument.removeprefix("@")
    return read_file(argument[1:], hint=f"; a text that begins with @ is written @{argument}")


def read_file(path: str, *, hint: str = "") -> str:
    """Return the text in a file, every byte of it.

    Raises:
        CommandError: The file cannot be read; the message ends with `hint`.
    """
    try:
        # Not Path.read_text, which would change the line ends.
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} cannot be read: it is not UTF-8") from error


def _num_samples(value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"--n-samples is {value!r}; give a whole number or auto") from None


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
