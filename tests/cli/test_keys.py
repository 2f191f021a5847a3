"""`credence keys`: what it writes and prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from credence.serve.keys import KeyRing
from tests.cli.conftest import Command


def test_the_command_makes_lists_and_revokes(credence: Command, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    made = credence(
        "keys", "new", "team-a", "--adapter", "triage", "--adapter", "base", "--max-samples", 4, "--requests-per-minute", 60,
        "--tenant", "acme", "--file", path,
    )  # fmt: skip
    assert made.code == 0, made.err
    token = made.out.strip()
    assert "only time" in made.err
    other = credence("keys", "new", "team-b", "--return-samples", "--file", path).out.strip()
    assert token not in path.read_text() and other not in path.read_text()
    ring = KeyRing(path)
    key = ring.find(token)
    assert key is not None
    assert (key.name, key.adapters, key.max_samples, key.tenant) == ("team-a", ("triage", "base"), 4, "acme")
    assert not key.return_samples and not key.admin
    listed = credence("keys", "list", "--file", path, "--json", "-")
    assert [entry["name"] for entry in json.loads(listed.out)["keys"]] == ["team-a", "team-b"]
    assert "sha256" not in listed.out
    shown = credence("keys", "list", "--file", path).out
    assert "team-a" in shown and "triage, base" in shown
    assert credence("keys", "revoke", "team-a", "--file", path).code == 0
    ring.reload()
    assert ring.find(token) is None and ring.find(other) is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "there"], "has a key there already"),
        (["new", "a b"], "name is 'a b'"),
        (["new", "boss", "--admin"], "two files"),
        (["revoke", "absent"], "has no key absent; it has there"),
    ],
)
def test_the_command_says_what_is_wrong(
    credence: Command,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    path = tmp_path / "keys.yaml"
    credence("keys", "new", "there", "--file", path)
    before = path.read_bytes()
    outcome = credence("keys", *arguments, "--file", path)
    assert outcome.code != 0
    assert said in outcome.err
    assert path.read_bytes() == before


def test_the_command_leaves_plain_and_missing_files_alone(credence: Command, tmp_path: Path) -> None:
    assert "cannot be read" in credence("keys", "list", "--file", tmp_path / "absent").err
    path = tmp_path / "key"
    path.write_text("secret")
    assert credence("keys", "new", "a", "--file", path).code == 1
    assert path.read_text() == "secret"
    assert list(tmp_path.iterdir()) == [path]
