"""API keys: the records of a key file, and who a token belongs to.

A key is ``credence-`` and 256 random bits. Its record holds the SHA-256 alone: nobody can try 2**256 tokens, so the slow, salted hashes
that passwords need would protect nothing here. Tokens are looked up by their hash in a dictionary. That takes a time that depends on the
hash, not on the token, and nobody can choose tokens by a hash, so the time tells nothing about the stored keys.

There are two files with the same format: the keys that open the users' routes, and the keys that open /admin. A token that is to open
both must be in both.
"""

import hashlib
import json
import logging
import os
import secrets
import stat
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from credence.serve.errors import ConfigurationError

logger = logging.getLogger(__name__)

PREFIX = "credence-"
CHECK_INTERVAL_S = 1.0
"""The file is looked at for changes at most this often."""
ANY = "*"


class KeyRecord(BaseModel):
    """One key: its hash, and what it permits.

    Attributes:
        name: stands for the key in the audit log.
        hash: ``sha256:`` and the hexadecimal SHA-256 of the token.
        adapters: served names that the key may ask for; ``*`` stands for all, the base model included.
        max_samples: largest K; None for the server's.
        requests_per_minute: None without limit.
        sample_tokens_per_minute: tokens under posterior samples, K x (prompt + completion) of each request; None without limit.
        return_samples: whether ``uncertainty.return_samples`` is permitted.
        admin: whether it is a key of the admin file.
        tenant: keys of one tenant share cached prefixes; None: the key is a tenant of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    adapters: Annotated[tuple[str, ...], Field(min_length=1)] = (ANY,)
    max_samples: Annotated[int, Field(ge=1)] | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    sample_tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    return_samples: bool = False
    admin: bool = False
    tenant: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @property
    def sees_all(self) -> bool:
        """Whether the key may ask for every served name."""
        return ANY in self.adapters

    def sees(self, model: str) -> bool:
        """Whether the key may ask for ``model``."""
        return self.sees_all or model in self.adapters

    def owner(self) -> str:
        """Whose cached prefixes the key shares; a tenant and a key of the same name are two."""
        return f"key:{self.name}" if self.tenant is None else f"tenant:{self.tenant}"


class KeyTable(BaseModel):
    """Content of a key file; names and hashes differ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyRecord, ...]

    @model_validator(mode="after")
    def _distinct(self) -> "KeyTable":
        for field in ("name", "hash"):
            values = [getattr(key, field) for key in self.keys]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"the {field} {twice[0]} stands in two records; names and hashes must differ")
        return self


def new_token() -> str:
    """A new key."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """What a record holds of a token."""
    return "sha256:" + hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def plain_key(token: str, *, name: str, admin: bool = False) -> KeyRecord:
    """Record of a key that was given without one: it may do everything its routes offer."""
    return KeyRecord(name=name, hash=hash_of(token), return_samples=True, admin=admin)


def take_vllm_keys(args: Namespace) -> list[str]:
    """Takes vLLM's own keys out of its arguments and its environment.

    Args:
        args: vLLM's; ``--api-key`` goes before ``VLLM_API_KEY``, as in vLLM.

    Returns:
        Their hashes.
    """
    from_environment = os.environ.pop("VLLM_API_KEY", None)
    given = args.api_key or [from_environment]
    args.api_key = None
    return [hash_of(key) for key in given if key]


def read_keys(path: Path, *, admin: bool = False) -> tuple[KeyRecord, ...]:
    """Reads a key file: records in YAML or JSON, or one plain key on one line.

    Args:
        admin: whether it is the file of the admin keys.

    Raises:
        ConfigurationError: unreadable, writable for others, not valid, or with records of the other kind.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigurationError(
                f"the key file {path} can be written by its group or by everybody, who could add keys; run `chmod go-w {path}`"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the key file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"the key file {path} is not UTF-8 text") from None
    lines = text.split()
    if len(lines) == 1 and not lines[0].startswith(("{", "[", "keys:")):
        if path.stat().st_mode & stat.S_IROTH:
            logger.warning("The key file %s holds a plain key and everybody can read it; run `chmod o-r` on it", path)
        return (plain_key(lines[0], name="admin" if admin else "default", admin=admin),)
    table = parse_table(text, path)
    wrong = [key.name for key in table.keys if key.admin != admin]
    if wrong:
        raise ConfigurationError(
            f"the key file {path}: the key {wrong[0]} is {'no admin key, and this is the file' if admin else 'an admin key: it belongs'}"
            f"{' of --admin-key-file' if admin else ' in --admin-key-file'}; a user key never opens /admin"
        )
    return table.keys


def parse_table(text: str, path: Path) -> KeyTable:
    """Reads records; raises ConfigurationError that names the first that is not valid, but never shows a value of the file."""
    try:
        document = yaml.safe_load(text)
        return KeyTable.model_validate(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(
            f"the key file {path}{where} is neither YAML nor JSON, nor one plain key on one line"
        ) from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigurationError(
            f"the key file {path}: {where}: {first['msg']}; it holds `keys:`, a list of records, see docs/security.md"
        ) from None


def write_table(path: Path, table: KeyTable) -> None:
    """Replaces a key file in one step, readable by its owner alone if it is new; JSON if its name ends so, else YAML."""
    document = {"keys": [key.model_dump(mode="json", exclude_defaults=True) for key in table.keys]}
    text = (
        json.dumps(document, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(document, sort_keys=False)
    )
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class KeyRing:
    """The keys of one kind: those of a file, which is read again when it changes, and fixed ones.

    A new file that cannot be used changes nothing: the keys that were read last stay valid, and the log says so.

    Args:
        path: the file; None for none.
        fixed: records that are in no file.

    Raises (constructor):
        ConfigurationError: the file cannot be used, or has no key.
    """

    def __init__(
        self,
        path: Path | None,
        fixed: Iterable[KeyRecord] = (),
        *,
        admin: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._admin = admin
        self._fixed = tuple(fixed)
        self._clock = clock
        self._checked_s = clock()
        self._state = self._look()
        self._by_hash: dict[str, KeyRecord] = {}
        records = () if path is None else read_keys(path, admin=admin)
        if path is not None and not records:
            raise ConfigurationError(f"the key file {path} holds no key; make one with `credence keys new`")
        self._take(records)

    @property
    def guards(self) -> bool:
        """Whether keys are asked for at all. Once they are, a file from which all keys were taken lets nobody in."""
        return self._path is not None or bool(self._fixed)

    def find(self, token: str) -> KeyRecord | None:
        """The key that a token is, or None."""
        if self._clock() - self._checked_s >= CHECK_INTERVAL_S:
            self.reload(only_if_changed=True)
        return self._by_hash.get(hash_of(token))

    def reload(self, *, only_if_changed: bool = False) -> None:
        """Reads the file again."""
        self._checked_s = self._clock()
        state = self._look()
        if self._path is None or (only_if_changed and state == self._state):
            return
        self._state = state
        try:
            self._take(read_keys(self._path, admin=self._admin))
        except ConfigurationError as error:
            logger.error("The keys stay as they were: %s", error)
        else:
            logger.info("The key file %s was read again: %d keys", self._path, len(self._by_hash) - len(self._fixed))

    def _look(self) -> Any:
        """What tells that the file is another one."""
        try:
            seen = os.stat(self._path) if self._path is not None else None
        except OSError:
            return None
        return seen and (seen.st_ino, seen.st_mtime_ns, seen.st_size, seen.st_mode)

    def _take(self, records: Iterable[KeyRecord]) -> None:
        self._by_hash = {key.hash: key for key in (*records, *self._fixed)}
