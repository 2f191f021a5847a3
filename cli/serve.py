"""`credence serve`: vLLM's OpenAI server with Credence's plugins in it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from credence.cli.output import needs_extra, print_table

if TYPE_CHECKING:
    from credence.serve.preflight import Row


def _configure(context: typer.Context, path: Path | None) -> Path | None:
    """Makes a configuration file's values the defaults of the parameters that follow."""
    if path is not None:
        with needs_extra("serve"):
            from credence.cli import serve_file
        values = serve_file.read(context, path)
        context.meta["vllm"] = values.pop(serve_file.VLLM, [])
        context.default_map = values
    return path


def serve(
    context: typer.Context,
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE", help="Base model: a folder or hub id.", envvar="CREDENCE_BASE", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML file of these options, `adapters` and `vllm`.",
            envvar="CREDENCE_CONFIG",
            is_eager=True,
            callback=_configure,
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Verify what can be verified without an engine, print it, and exit with 0 or 2.",
            envvar="CREDENCE_CHECK",
        ),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=DIR",
            help="Serve the artifact DIR as model NAME; repeatable.",
            envvar="CREDENCE_ADAPTER",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", envvar="CREDENCE_HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on.", envvar="CREDENCE_PORT")
    ] = 8000,
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
            "--max-sequences",
            envvar="CREDENCE_MAX_SEQUENCES",
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
        int,
        typer.Option(
            "--default-samples", min=1, help="K of a request that does not say.", envvar="CREDENCE_DEFAULT_SAMPLES"
        ),
    ] = 8,
    max_samples: Annotated[
        int, typer.Option("--max-samples", min=1, help="Largest K of a request.", envvar="CREDENCE_MAX_SAMPLES")
    ] = 32,
    sample_slots: Annotated[
        int | None,
        typer.Option(
            "--sample-slots",
            min=1,
            help="Samples kept by the workers, at least the largest K.",
            envvar="CREDENCE_SAMPLE_SLOTS",
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
    max_inflight_rows: Annotated[
        int,
        typer.Option(
            "--max-inflight-rows",
            min=1,
            help="Samples x sequences being answered at once; more get 503.",
            envvar="CREDENCE_MAX_INFLIGHT_ROWS",
        ),
    ] = 1024,
    readiness_timeout: Annotated[
        float,
        typer.Option(
            "--readiness-timeout",
            min=0.1,
            help="Seconds that /readyz waits for its own small ensemble request.",
            envvar="CREDENCE_READINESS_TIMEOUT",
        ),
    ] = 5.0,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option(
            "--log-format", envvar="CREDENCE_LOG_FORMAT", help="Log as text, or as JSON lines with request ids."
        ),
    ] = "text",
) -> int:
    """Serve adapters with their uncertainty.

    Flags that are not listed here go to vLLM as they are; BASE comes before them. A value on the command line wins over the
    environment, which wins over the configuration file.

    \b
    Example:
      credence serve meta-llama/Llama-3.2-1B --adapter triage=out/triage --max-model-len 4096
      credence serve --config serve.yaml --check
    """
    extra_args = list(context.args)
    if base is not None and base.startswith("-"):
        # With BASE from elsewhere, the first word of vLLM's flags was taken for it.
        elsewhere = _base_from_elsewhere(context)
        if elsewhere is None:
            raise typer.BadParameter(
                f"BASE must come before vLLM's flags, got {base!r} first: credence serve BASE [flags]"
            )
        base, extra_args = elsewhere, [base, *extra_args]
    if base is None:
        raise typer.BadParameter(
            "no base model given: credence serve BASE --adapter NAME=DIR, or `base` in the --config file"
        )
    if "vllm" in context.meta:
        from credence.cli import serve_file

        extra_args = serve_file.joined(context.meta["vllm"], extra_args)
    adapters = _parse_adapters(adapter or [])
    if default_samples > max_samples:
        raise typer.BadParameter(
            f"--default-samples is {default_samples}, more than --max-samples {max_samples}; lower one or raise the other"
        )
    if check:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
    with needs_extra("serve"):
        from credence.adapters import is_merged
        from credence.serve.launcher import main
        from credence.serve.preflight import Checks
    if not adapters and adapter_dir is None and not is_merged(base):
        raise typer.BadParameter(
            f"no --adapter given, and {base} is no model of `credence merge`; add --adapter NAME=DIR or --adapter-dir DIR"
        )
    checks = Checks(keep_going=check)
    code = main(
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
        extra_args=extra_args,
        default_samples=default_samples,
        max_samples=max_samples,
        sample_slots=sample_slots,
        max_adapters=max_adapters,
        adapter_roots=[str(root) for root in adapter_root or ()],
        adapter_dir=None if adapter_dir is None else str(adapter_dir),
        trust=None if trust is None else str(trust),
        max_inflight_rows=max_inflight_rows,
        readiness_timeout_s=readiness_timeout,
        log_format=log_format,
        checks=checks,
    )
    if check:
        results = [
            (row.name, row.problem or row.found or "cannot be checked here", _verdict(row)) for row in checks.rows
        ]
        print_table(("check", "found", ""), results)
    return code


def _verdict(row: "Row") -> str:
    return "REFUSED" if row.problem else "ok" if row.found else "not checked"


def _base_from_elsewhere(context: typer.Context) -> str | None:
    """BASE of the environment or the configuration file."""
    given = os.environ.get("CREDENCE_BASE") or (context.default_map or {}).get("base")
    return None if given is None else str(given)


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
