"""`credence keys`: makes, lists and revokes the API keys of a server's key file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from credence.cli.output import CommandError, JsonOption, needs_extra, print_table, say, warn, write_json

if TYPE_CHECKING:
    from credence.serve.keys import KeyTable

app = typer.Typer(help="Make, list and revoke the API keys of a server (docs/security.md).", no_args_is_help=True)

FileOption = Annotated[
    Path, typer.Option("--file", help="Key file of the server, YAML, or JSON if its name ends in .json.")
]


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called in lists and in the audit log.")],
    file: FileOption,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A model the key may ask for; repeatable.", show_default="all"),
    ] = None,
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1, help="Largest K.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    sample_tokens_per_minute: Annotated[
        int | None,
        typer.Option("--sample-tokens-per-minute", min=1, help="Tokens under posterior samples."),
    ] = None,
    return_samples: Annotated[
        bool, typer.Option("--return-samples", help="Permit uncertainty.return_samples.")
    ] = False,
    admin: Annotated[bool, typer.Option("--admin", help="A key of /admin, for --admin-key-file.")] = False,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Keys of one tenant share cached prefixes.", show_default="the key alone"),
    ] = None,
) -> None:
    """Make a key, print it once, and add its record to the key file.

    The file holds the key's hash only: a key that is lost is revoked and made anew. A running server takes the new file within a second.

    \b
    Example:
      credence keys new team-a --adapter triage --max-samples 16 --requests-per-minute 60 --file keys.yaml
    """
    with needs_extra("serve"):
        from pydantic import ValidationError

        from credence.serve.keys import KeyRecord, KeyTable, hash_of, new_token, write_table
    token = new_token()
    old = _read(file).keys if file.exists() else ()
    if any(key.name == name for key in old):
        raise CommandError(f"{file} has a key {name} already; revoke it first, or choose another name")
    try:
        record = KeyRecord(
            name=name,
            hash=hash_of(token),
            adapters=tuple(adapter or ["*"]),
            max_samples=max_samples,
            requests_per_minute=requests_per_minute,
            sample_tokens_per_minute=sample_tokens_per_minute,
            return_samples=return_samples,
            admin=admin,
            tenant=tenant,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{first['loc'][0]} is {first['input']!r:.80}: {first['msg']}") from None
    if any(key.admin != admin for key in old):
        raise CommandError(f"{file} has keys of {'users' if admin else '/admin'}; keep the two kinds in two files")
    write_table(file, KeyTable(keys=(*old, record)))
    warn("this is the only time that the key is shown")
    print(token)


@app.command("list")
def list_(file: FileOption, json_file: JsonOption = None) -> None:
    """List the keys of a file: what they may do, never the keys themselves."""
    table = _read(file)
    records = [key.model_dump(mode="json", exclude={"hash"}) for key in table.keys]
    write_json(json_file, {"keys": records})
    if json_file == "-":
        return

    def shown(value: object) -> str:
        return "" if value in (None, False) else "yes" if value is True else str(value)

    print_table(
        ["name", "adapters", "max K", "requests/min", "sample tokens/min", "return samples", "admin", "tenant"],
        [[", ".join(r["adapters"]) if n == "adapters" else shown(r[n]) for n in _COLUMNS] for r in records],
    )


_COLUMNS = (
    "name", "adapters", "max_samples", "requests_per_minute", "sample_tokens_per_minute", "return_samples", "admin", "tenant",
)  # fmt: skip


@app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")], file: FileOption) -> None:
    """Take a key out of the key file. A running server refuses it within a second."""
    table = _read(file)
    with needs_extra("serve"):
        from credence.serve.keys import KeyTable, write_table
    kept = tuple(key for key in table.keys if key.name != name)
    if len(kept) == len(table.keys):
        known = ", ".join(key.name for key in table.keys) or "none"
        raise CommandError(f"{file} has no key {name}; it has {known}")
    write_table(file, KeyTable(keys=kept))
    say(None, f"revoked {name}, {len(kept)} left")


def _read(file: Path) -> "KeyTable":
    """The records of a key file; raises CommandError for a file with a plain key, which has none."""
    with needs_extra("serve"):
        from credence.serve.keys import parse_table
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--file {file} cannot be read: {error.strerror}") from error
    return parse_table(text, file)
