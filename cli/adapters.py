"""`credence adapters`: what a running server serves, changed while it runs; the key must be an administrator's."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from credence.cli.ask import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    ApiKeyFileOption,
    TimeoutOption,
    UrlOption,
    connection,
    usage_errors,
)
from credence.cli.output import JsonOption, print_table, rows, say, write_json

if TYPE_CHECKING:
    from credence.clients import Adapter

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter.", show_default=False)]

app = typer.Typer(
    rich_markup_mode=None,
    help="List, load, unload and promote the adapters of a running server, with an administrator's key.",
)


@app.command("list")
def list_(
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """List every adapter with its state."""
    with connection(url, api_key_file, timeout_s) as client:
        found = client.adapters.list()
    write_json(json_file, {"adapters": [adapter.model_dump(mode="json") for adapter in found]})
    if json_file != "-":
        _print_all(found)


@app.command("show")
def show(
    name: NameArgument,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Show everything about one adapter."""
    with connection(url, api_key_file, timeout_s) as client, usage_errors():
        _report(client.adapters.get(name), json_file)


@app.command("load")
def load(
    name: NameArgument,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The artifact, on the server.", show_default=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Move a name that is served to this artifact.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Load an artifact from a folder of the server.

    \b
    Example:
      credence adapters load triage-v2 /artifacts/triage-v2 --api-key-file admin.key
    """
    with connection(url, api_key_file, timeout_s) as client, usage_errors():
        _report(client.adapters.load(name, path, replace=replace), json_file)


@app.command("unload")
def unload(
    name: NameArgument,
    drain_s: Annotated[float, typer.Option("--drain", help="Seconds that requests under way are given.")] = 30.0,
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Take no new requests for an adapter, let those under way end, and remove it."""
    with connection(url, api_key_file, timeout_s) as client, usage_errors():
        _report(client.adapters.unload(name, drain_s=drain_s), json_file)


@app.command("promote")
def promote(
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Name that requests use.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Adapter that answers them.", show_default=False)],
    url: UrlOption = DEFAULT_URL,
    api_key_file: ApiKeyFileOption = None,
    timeout_s: TimeoutOption = DEFAULT_TIMEOUT_S,
    json_file: JsonOption = None,
) -> None:
    """Have requests for ALIAS answered by TARGET from now on, in one step.

    \b
    Example:
      credence adapters promote triage triage-v2 --api-key-file admin.key
    """
    with connection(url, api_key_file, timeout_s) as client, usage_errors():
        _report(client.adapters.promote(alias, target), json_file)


def _report(adapter: "Adapter", json_file: str | None) -> None:
    document = adapter.model_dump(mode="json")
    write_json(json_file, document)
    if json_file == "-":
        return
    if adapter.loaded_at is not None:
        document["loaded_at"] = datetime.fromtimestamp(adapter.loaded_at).astimezone().isoformat(timespec="seconds")
    say(json_file, rows({key: str(value) for key, value in document.items() if value is not None and key != "object"}))


def _print_all(adapters: "Sequence[Adapter]") -> None:
    print_table(
        ("name", "state", "requests", "method", "answered by", "digest", "reason"),
        [
            (
                adapter.name,
                adapter.state,
                str(adapter.requests_in_flight),
                adapter.method or "",
                adapter.alias_of or "",
                (adapter.digest or "").removeprefix("sha256:")[:8],
                adapter.reason or "",
            )
            for adapter in adapters
        ],
    )
