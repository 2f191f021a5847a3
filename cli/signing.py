"""`credence keygen` and `sign`: a key of one's own, and its signature under an artifact or a merged model."""

from pathlib import Path
from typing import Annotated

import typer

from credence.cli.output import JsonOption, needs_extra, say, write_json


def keygen(
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="New file of the private key.")],
    comment: Annotated[
        str, typer.Option("--comment", help="Whose key it is; the last words of the public key's line.")
    ] = "",
    json_file: JsonOption = None,
) -> None:
    """Make a key that signs artifacts.

    FILE is the private key (PEM, readable by its owner alone); FILE.pub is its line for a trust file. No file is replaced.

    \b
    Example:
      credence keygen --output release-key --comment "release 2026"
      cat release-key.pub >> trusted-keys
    """
    with needs_extra("adapters"):
        from credence.adapters import generate_key, save_key
        from credence.adapters.signature import key_id
    key = generate_key()
    public = save_key(output, key, " ".join(comment.split()))
    identity = key_id(key.public_key())
    write_json(json_file, {"key_id": identity, "private_key": str(output), "public_key": str(public)})
    say(json_file, f"wrote {output} (keep it secret) and {public}, key {identity}")


def sign(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The artifact, or a merged model.", show_default=False)
    ],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The private key.", show_default=False)],
    json_file: JsonOption = None,
) -> None:
    """Verify an artifact and sign it.

    The signature goes to DIR/signature.json and replaces an older one; no other file changes. Whatever is written into
    DIR later needs a new signature, `credence release` included.

    \b
    Example:
      credence sign out/triage --key release-key
      credence serve BASE --adapter triage=out/triage --trust trusted-keys
    """
    with needs_extra("adapters"):
        from credence.adapters import load_key
        from credence.adapters import sign as sign_folder
    identity = sign_folder(directory, load_key(key))
    write_json(json_file, {"path": str(directory), "key_id": identity})
    say(json_file, f"signed {directory} with the key {identity}")
