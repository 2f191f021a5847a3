"""`credence serve`: vLLM's OpenAI server with Credence's plugins in it."""

from pathlib import Path
from typing import Annotated

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
        typer.Option(
            "--api-key-file",
            envvar="CREDENCE_API_KEY_FILE",
            help="Users' keys: records of `credence keys`, or one plain key.",
            show_default="open server",
        ),
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-key-file",
            envvar="CREDENCE_ADMIN_KEY_FILE",
            help="Keys of /admin, in the same format.",
            show_default="/admin is closed",
        ),
    ] = None,
    extra_route: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-route",
            envvar="CREDENCE_EXTRA_ROUTE",
            metavar="PATH",
            help="Open a further route of vLLM's to users, without limits; repeatable.",
        ),
    ] = None,
    return_samples: Annotated[
        bool,
        typer.Option(
            "--return-samples/--no-return-samples",
            envvar="CREDENCE_RETURN_SAMPLES",
            help="Whether uncertainty.return_samples is permitted at all.",
        ),
    ] = True,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            "--max-sequences-per-request",
            envvar="CREDENCE_MAX_SEQUENCES_PER_REQUEST",
            min=1,
            help="Largest n x (1 + K) x prompts of a request.",
            show_default="2048",
        ),
    ] = None,
    audit_log: Annotated[
        Path | None,
        typer.Option(
            "--audit-log",
            envvar="CREDENCE_AUDIT_LOG",
            help="Append a line per request to this file.",
            show_default="none",
        ),
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
    max_adapters: Annotated[
        int | None,
        typer.Option(
            "--max-adapters",
            min=1,
            envvar="CREDENCE_MAX_ADAPTERS",
            help="Adapters served at once.",
            show_default="those given; at least 8 with --adapter-root or --adapter-dir",
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter-root",
            envvar="CREDENCE_ADAPTER_ROOT",
            help="Folder below which artifacts may be loaded at run time; repeatable.",
        ),
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapter-dir",
            envvar="CREDENCE_ADAPTER_DIR",
            help="Folder whose sub-folders are adapters: what changes there is loaded, replaced and taken away.",
        ),
    ] = None,
    trust: Annotated[
        Path | None,
        typer.Option(
            "--trust",
            envvar="CREDENCE_TRUST",
            help="File of public keys, one of which must have signed what is served.",
            show_default="signatures are not required",
        ),
    ] = None,
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
    if not adapters and adapter_dir is None and not is_merged(base):
        raise typer.BadParameter(
            f"no --adapter given, and {base} is no model of `credence merge`; add --adapter NAME=DIR or --adapter-dir DIR"
        )
    return main(
        base=base,
        adapters=adapters,
        host=host,
        port=port,
        api_key_file=None if api_key_file is None else str(api_key_file),
        admin_key_file=None if admin_key_file is None else str(admin_key_file),
        extra_routes=extra_route or [],
        return_samples=return_samples,
        max_sequences=max_sequences,
        audit_log=None if audit_log is None else str(audit_log),
        extra_args=list(context.args),
        default_samples=default_samples,
        max_samples=max_samples,
        sample_slots=sample_slots,
        max_adapters=max_adapters,
        adapter_roots=[str(root) for root in adapter_root or ()],
        adapter_dir=None if adapter_dir is None else str(adapter_dir),
        trust=None if trust is None else str(trust),
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
