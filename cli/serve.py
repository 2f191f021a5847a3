"""`credence serve`: vLLM's OpenAI server with Credence's plugins in it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from credence.cli.output import needs_extra


def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="Base model: a folder or hub id.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="Serve the artifact DIR as model NAME; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="File with the key that requests must send.", show_default="open server"),
    ] = None,
    default_samples: Annotated[
        int, typer.Option("--default-samples", min=1, help="K of a request that does not say.")
    ] = 8,
    max_samples: Annotated[int, typer.Option("--max-samples", min=1, help="Largest K of a request.")] = 32,
    sample_slots: Annotated[
        int | None,
        typer.Option(
            "--sample-slots",
            min=1,
            help="Samples kept by the workers, at least the largest K.",
            show_default="every adapter's default samples and one request of the largest K",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option(
            "--log-format", envvar="CREDENCE_LOG_FORMAT", help="Log as text, or as JSON lines with request ids."
        ),
    ] = "text",
) -> int:
    """Serve adapters with their uncertainty.

    Flags that are not listed here go to vLLM as they are; BASE comes before them.

    \b
    Example:
      credence serve meta-llama/Llama-3.2-1B --adapter triage=out/triage --max-model-len 4096
    """
    if base.startswith("-"):
        raise typer.BadParameter(f"BASE must come before vLLM's flags, got {base!r} first: credence serve BASE [flags]")
    adapters = _parse_adapters(adapter or [])
    if default_samples > max_samples:
        raise typer.BadParameter(
            f"--default-samples is {default_samples}, more than --max-samples {max_samples}; lower one or raise the other"
        )
    with needs_extra("serve"):
        from credence.adapters import is_merged
        from credence.serve.launcher import main
    if not adapters and not is_merged(base):
        raise typer.BadParameter(
            f"no --adapter given, and {base} is no model of `credence merge`; add --adapter NAME=DIR"
        )
    return main(
        base=base,
        adapters=adapters,
        host=host,
        port=port,
        api_key_file=None if api_key_file is None else str(api_key_file),
        extra_args=list(context.args),
        default_samples=default_samples,
        max_samples=max_samples,
        sample_slots=sample_slots,
        log_format=log_format,
    )


def _parse_adapters(given: list[str]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for item in given:
        name, equals, directory = item.partition("=")
        if not name or not equals or not directory:
            raise typer.BadParameter(f"--adapter is {item!r}; give NAME=DIR, for example triage=out/triage")
        if name in adapters:
            raise typer.BadParameter(f"--adapter {name} is given twice; names must differ")
        adapters[name] = directory
    return adapters
