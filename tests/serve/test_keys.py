"""Key files: what is accepted, and how they change under a running server."""

import os
from argparse import Namespace
from pathlib import Path

import pytest

from credence.serve.errors import ConfigurationError
from credence.serve.keys import (
    KeyRecord,
    KeyRing,
    KeyTable,
    hash_of,
    new_token,
    plain_key,
    read_keys,
    take_vllm_keys,
    write_table,
)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def record(name: str = "team", token: str = "t", **changes: object) -> KeyRecord:
    return KeyRecord.model_validate({"name": name, "hash": hash_of(token), **changes})


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_are_random_and_found_by_their_hash_alone() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("credence-") and len(token) >= 9 + 43 for token in tokens), "43 characters are 256 bits"
    token = tokens.pop()
    ring = KeyRing(None, [record(token=token)])
    assert ring.find(token) == record(token=token)
    for other in ("", token[:-1], token + "x", token.upper(), hash_of(token)):
        assert ring.find(other) is None


def test_without_keys_nothing_is_guarded() -> None:
    assert not KeyRing(None).guards
    assert KeyRing(None, [record()]).guards


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_file_is_written_and_read(tmp_path: Path, name: str) -> None:
    table = KeyTable(
        keys=(
            record("a", "1", adapters=("triage",), max_samples=4, requests_per_minute=60, tenant="acme"),
            record("b", "2", return_samples=True, sample_tokens_per_minute=1000),
        )
    )
    path = tmp_path / name
    write_table(path, table)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_keys(path) == table.keys
    path.chmod(0o640)
    write_table(path, table)
    assert path.stat().st_mode & 0o777 == 0o640, "the mode of an old file stays"
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing is left beside it"


@pytest.mark.parametrize("text", ["secret", "secret\n", "\n  secret  \n", "12345", "true", "~", "a:b"])
def test_one_plain_key_on_one_line(tmp_path: Path, text: str) -> None:
    [key] = read_keys(write(tmp_path / "key", text))
    assert key == plain_key(text.strip(), name="default")
    assert key.return_samples and key.sees_all and key.max_samples is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file"),
        ("one two", "the file"),
        ("one\ntwo\n", "the file"),
        ("keys: [", "line 1"),
        ("keys:\n- name: a\n", "keys.0.hash"),
        ("keys:\n- {name: a, hash: 'sha256:00'}\n", "keys.0.hash"),
        (f"keys:\n- {{name: 'a b', hash: '{hash_of('x')}'}}\n", "keys.0.name"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}', limit: 3}}\n", "keys.0.limit"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}', max_samples: 0}}\n", "keys.0.max_samples"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}', adapters: []}}\n", "keys.0.adapters"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}'}}\n- {{name: a, hash: '{hash_of('y')}'}}\n", "name a stands in two"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}'}}\n- {{name: b, hash: '{hash_of('x')}'}}\n", "stands in two"),
        (f"keys:\n- {{name: a, hash: '{hash_of('x')}', admin: true}}\n", "--admin-key-file"),
        ("other: 1\n", "keys"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match="key file") as caught:
        read_keys(write(tmp_path / "keys.yaml", text))
    assert said in str(caught.value)


def test_no_message_shows_what_the_file_holds(tmp_path: Path) -> None:
    """A key that was put where a hash belongs must not end up in a log."""
    with pytest.raises(ConfigurationError) as caught:
        read_keys(write(tmp_path / "keys.yaml", "keys:\n- {name: a, hash: credence-SECRET}\n"))
    assert "SECRET" not in str(caught.value)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    for mode in (0o620, 0o602, 0o666):
        with pytest.raises(ConfigurationError, match="chmod go-w"):
            read_keys(write(tmp_path / "key", "secret", mode))


def test_a_plain_key_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_keys(write(tmp_path / "key", "secret", 0o644))
    assert "chmod o-r" in caplog.text and "secret" not in caplog.text


def test_the_admin_file_holds_admin_keys_only(tmp_path: Path) -> None:
    path = tmp_path / "admin.yaml"
    write_table(path, KeyTable(keys=(record(),)))
    with pytest.raises(ConfigurationError, match="no admin key"):
        read_keys(path, admin=True)
    assert read_keys(write(tmp_path / "key", "secret"), admin=True)[0].admin


def test_a_missing_or_empty_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyRing(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match="no key"):
        KeyRing(write(tmp_path / "keys.yaml", "keys: []\n"))


def test_a_changed_file_is_read_again_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    write_table(path, KeyTable(keys=(record("a", "1"), record("b", "2"))))
    ring = KeyRing(path, [record("fixed", "0")], clock=clock)
    write_table(path, KeyTable(keys=(record("b", "2"), record("c", "3"))))
    assert ring.find("1") and not ring.find("3"), "the file is not looked at for every request"
    clock.now_s += 1.0
    assert not ring.find("1")
    assert ring.find("3") and ring.find("2") and ring.find("0")


def test_signal_reads_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "key", "old")
    ring = KeyRing(path, clock=Clock())
    write(path, "new")
    ring.reload()
    assert ring.find("new") and not ring.find("old")


@pytest.mark.parametrize("broken", ["keys: [", "", None])
def test_a_broken_file_keeps_the_old_keys_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    path, clock = write(tmp_path / "keys.yaml", "old"), Clock()
    ring = KeyRing(path, clock=clock)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    for _ in range(3):
        clock.now_s += 2
        assert ring.find("old") is not None
    assert caplog.text.count("The keys stay as they were") == 1
    write(path, "better")
    clock.now_s += 2
    assert ring.find("better") is not None and ring.find("old") is None


def test_a_file_from_which_all_keys_were_revoked_lets_nobody_in(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    write_table(path, KeyTable(keys=(record("a", "1"),)))
    ring = KeyRing(path, clock=clock)
    write_table(path, KeyTable(keys=()))
    clock.now_s += 2
    assert ring.find("1") is None
    assert ring.guards


def test_a_clock_that_goes_back_is_harmless(tmp_path: Path) -> None:
    clock = Clock()
    ring = KeyRing(write(tmp_path / "key", "old"), clock=clock)
    clock.now_s -= 1000
    assert ring.find("old") is not None


@pytest.mark.parametrize(
    ("flag", "variable", "taken"),
    [(None, None, []), (["a", "b", ""], "c", ["a", "b"]), (None, "c", ["c"]), ([], "c", ["c"]), (None, "", [])],
)
def test_vllms_own_keys_are_taken_from_it(
    monkeypatch: pytest.MonkeyPatch, flag: list[str] | None, variable: str | None, taken: list[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    args = Namespace(api_key=flag)
    assert take_vllm_keys(args) == [hash_of(key) for key in taken]
    assert args.api_key is None and "VLLM_API_KEY" not in os.environ
