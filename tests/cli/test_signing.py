import json
from pathlib import Path

from tests.cli.conftest import Command, write


def test_make_a_key_sign_and_inspect(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    assert "signature" in credence("inspect", tmp_path / "a").out and "none" in credence("inspect", tmp_path / "a").out
    made = credence("keygen", "--output", tmp_path / "key", "--comment", "release\n2026", "--json", "-")
    identity = json.loads(made.out)["key_id"]
    assert (made.code, made.err) == (
        0,
        f"wrote {tmp_path / 'key'} (keep it secret) and {tmp_path / 'key.pub'}, key {identity}\n",
    )
    assert (tmp_path / "key.pub").read_text().endswith(" release 2026\n")

    unsigned = credence("inspect", tmp_path / "a", "--trust", tmp_path / "key.pub")
    assert unsigned.code == 1 and "is not signed, and a signature of" in unsigned.err
    signed = credence("sign", tmp_path / "a", "--key", tmp_path / "key")
    assert (signed.code, signed.out) == (0, f"signed {tmp_path / 'a'} with the key {identity}\n")

    assert f"by the key {identity} (not checked: give --trust FILE)" in credence("inspect", tmp_path / "a").out
    verified = credence("inspect", tmp_path / "a", "--trust", tmp_path / "key.pub", "--json", tmp_path / "out.json")
    assert verified.code == 0 and f"by the key {identity} (verified)" in verified.out
    assert json.loads((tmp_path / "out.json").read_text())["signature"] == {"key_id": identity, "verified": True}

    credence("keygen", "--output", tmp_path / "other")
    refused = credence("inspect", tmp_path / "a", "--trust", tmp_path / "other.pub")
    assert refused.code == 1 and f"signed by the key {identity}, which is not trusted" in refused.err


def test_files_that_cannot_be_used(tmp_path: Path, credence: Command) -> None:
    write(tmp_path / "a")
    assert credence("keygen", "--output", tmp_path / "key").code == 0
    again = credence("keygen", "--output", tmp_path / "key")
    assert again.code == 1 and "key cannot be written: File exists" in again.err
    (tmp_path / "key").chmod(0o644)
    outcome = credence("sign", tmp_path / "a", "--key", tmp_path / "key")
    assert outcome.code == 1 and "has mode 0644" in outcome.err and not (tmp_path / "a/signature.json").exists()
    assert credence("inspect", tmp_path / "a", "--trust", tmp_path / "nothing").code == 1
    assert credence("keygen").code == 2 and credence("sign", tmp_path / "a").code == 2
