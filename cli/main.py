"""The command `credence`: one typer application, and the one place that turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (typer's own). An error is one sentence on standard error;
`--debug`, anywhere on the command line, adds the traceback. Only typer is imported here, so `credence --help` is fast
and needs no extra.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from credence.cli import (
    adapters,
    artifact,
    bench,
    complete,
    data,
    export,
    harness,
    importer,
    keys,
    openapi,
    reproduce,
    robustness,
    score,
    serve,
    signing,
    training,
)
from credence.cli.output import CommandError

FAILED = 1
USAGE = 2

# Plain help: the examples keep their line breaks, and the text can be copied.
app = typer.Typer(name="credence", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("train")(training.train)
app.command("release")(training.release)
app.command("import")(importer.import_)
app.command("inspect")(artifact.inspect)
app.command("draw")(artifact.draw)
app.command("merge")(artifact.merge)
app.command("keygen")(signing.keygen)
app.command("sign")(signing.sign)
app.command("eval")(training.evaluate)
app.command("data")(data.data)
app.command("reproduce")(reproduce.reproduce)
app.command("robustness")(robustness.robustness)
app.command(
    "serve",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)(serve.serve)
app.command("openapi")(openapi.openapi)
app.command("complete")(complete.complete)
app.command("score")(score.score)
app.command("export")(export.export)
app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)(harness.lm_eval)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")
app.add_typer(keys.app, name="keys")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"credence {version('credence')}")
        raise typer.Exit


@app.callback()
def credence(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error; works anywhere.")] = False,
) -> None:
    """Train Bayesian LoRA adapters, release and inspect them, and serve their uncertainty on vLLM."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but the code and the output leaves this function."""
    rest, debug = _take_debug(arguments)
    try:
        result = app(rest, prog_name="credence", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.TyperException as error:
        return _fail(error, _usage_sentence(error), error.exit_code, debug)
    except BrokenPipeError:
        # The reader of our output went away (`credence inspect DIR | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _fail(error, _sentence(error), FAILED, debug)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the arguments, wherever it is before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before, after = arguments[:end], arguments[end:]
    return [argument for argument in before if argument != "--debug"] + list(after), "--debug" in before


def _usage_sentence(error: typer.TyperException) -> str:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message}; see `{context.command_path} --help`"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # The packages' own errors are written for users, and so are ValueErrors; anything else is a bug or a broken environment.
    if isinstance(error, CommandError | ValueError | OSError) or type(error).__module__.startswith("credence."):
        return str(error) or type(error).__name__
    return f"unexpected {type(error).__name__}: {error}; run again with --debug to see where"


def _fail(error: Exception, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"credence: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":  # torchrun -m credence.cli.main
    main()
