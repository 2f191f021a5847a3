"""Signatures: who released an artifact. Ed25519 (RFC 8032) over the exact bytes of the document that lists every file's SHA-256.

    signature.json   {"algorithm": "ed25519", "key_id": <first 16 hex digits of the SHA-256 of the public key>, "signature": <base64>}

That document is manifest.json of an artifact and credence_merged.json of a merged model. What is signed is a fixed prefix, the document's
name and its bytes, so that a signature of one kind of document, or of another program, is never one of another. A trust root is a text
file of public keys, one a line: ``ed25519 <base64 of the 32 bytes> <comment>``; a folder must be signed by one of them.
"""

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import Field

from credence.adapters.artifact import load_artifact
from credence.adapters.config import Document
from credence.adapters.errors import ArtifactError, KeyFileError
from credence.adapters.files import MANIFEST, MAX_JSON_BYTES, SIGNATURE, parse, read_file, refused, replace_file
from credence.adapters.merged import MERGED, is_merged, load_merged

ALGORITHM: Final = "ed25519"
PREFIX = b"credence signature v1\n"
MAX_SIGNATURE_BYTES = 4096


class Signature(Document):
    """signature.json; the signature has 64 bytes, which are 86 characters and two for padding."""

    algorithm: Literal["ed25519"]
    key_id: str = Field(pattern="^[0-9a-f]{16}$")
    signature: str = Field(pattern="^[A-Za-z0-9+/]{86}==$")


@dataclass(frozen=True, slots=True)
class TrustRoot:
    """The public keys whose signatures are accepted, by key id."""

    keys: Mapping[str, Ed25519PublicKey]

    @classmethod
    def load(cls, path: str | Path) -> "TrustRoot":
        """Reads a file of public keys; empty lines and lines that begin with # are skipped.

        Raises:
            KeyFileError: the file cannot be read, may be written by everybody, or holds a line that is no key, or no key at all.
        """
        try:
            with open(path, encoding="utf-8") as file:
                writable = os.fstat(file.fileno()).st_mode & stat.S_IWOTH
                lines = [line.split() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"the trust file {path} cannot be read: {_reason(error)}", path=path) from error
        if writable:
            raise KeyFileError(
                f"the trust file {path} may be written by everybody, so it proves nothing; take that right away (chmod o-w)",
                path=path,
            )
        keys = {}
        for number, words in enumerate(lines, start=1):
            if words and not words[0].startswith("#"):
                key = _public_key(words)
                if key is None:
                    raise KeyFileError(
                        f"{path}:{number} is no public key; a line is `{ALGORITHM} BASE64 comment`, as `credence keygen` writes it",
                        path=path,
                    )
                keys[key_id(key)] = key
        if not keys:
            raise KeyFileError(f"the trust file {path} holds no key; copy the line of a .pub file into it", path=path)
        return cls(keys)

    def check(self, folder: Path, document: str, data: bytes) -> str:
        """Verifies the signature that lies in ``folder`` against bytes that were read from its ``document``.

        Returns:
            The id of the key that signed.

        Raises:
            ArtifactError: there is no signature (``unsigned``), or none of a known key for these bytes (``bad_signature``).
        """
        path = folder / SIGNATURE
        known = ", ".join(sorted(self.keys))
        try:
            content = read_file(path, MAX_SIGNATURE_BYTES)
        except ArtifactError as error:
            if error.reason != "missing":
                raise
            raise refused(
                f"{folder} is not signed, and a signature of {known} is required; sign it with `credence sign`",
                "unsigned",
                path,
            ) from None
        try:
            signature = parse(Signature, content, path)
        except ArtifactError as error:
            raise refused(str(error), "bad_signature", path) from None
        key = self.keys.get(signature.key_id)
        if key is None:
            raise refused(
                f"{folder} is signed by the key {signature.key_id}, which is not trusted; trusted are {known}",
                "bad_signature",
                path,
            )
        raw = base64.b64decode(signature.signature)
        try:
            key.verify(raw, _message(document, data))
            canonical = base64.b64encode(raw).decode() == signature.signature
        except InvalidSignature:
            canonical = False
        if not canonical:
            raise refused(
                f"{path} is not the signature of {document} by the key {signature.key_id}: one of the two was changed, or it belongs to "
                "another folder",
                "bad_signature",
                path,
            )
        return signature.key_id


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the key's 32 bytes."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def generate_key() -> Ed25519PrivateKey:
    """A new private key."""
    return Ed25519PrivateKey.generate()


def save_key(path: str | Path, key: Ed25519PrivateKey, comment: str = "") -> Path:
    """Writes a private key (PEM, PKCS8, readable by its owner alone) and beside it ``<path>.pub``, its line for a trust file.

    Returns:
        The path of the public key.

    Raises:
        KeyFileError: a file cannot be written, or one is there already; none is replaced.
    """
    path = Path(path)
    public = path.with_name(path.name + ".pub")
    line = (
        f"{ALGORITHM} {_base64(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))} {comment}".rstrip()
        + "\n"
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    written: list[Path] = []
    try:
        for target, data, mode in ((path, private, 0o600), (public, line.encode(), 0o644)):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            written.append(target)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
    except OSError as error:
        for half in written:
            half.unlink(missing_ok=True)
        raise KeyFileError(f"the key {target} cannot be written: {_reason(error)}", path=target) from error
    return public


def load_key(path: str | Path) -> Ed25519PrivateKey:
    """Reads a private key that its owner alone can read.

    Raises:
        KeyFileError: others can read it too, or it is no Ed25519 key in PEM without a password.
    """
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise KeyFileError(f"the key {path} cannot be read: {_reason(error)}", path=path) from error
    if mode & 0o077:
        raise KeyFileError(
            f"the key {path} has mode {mode:04o}, others than its owner can use it: make a new one if they did, else chmod 600",
            path=path,
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"the key {path} is no private key in PEM without a password: {error}", path=path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"the key {path} is no Ed25519 key; make one with `credence keygen`", path=path)
    return key


def sign(folder: str | Path, private_key: Ed25519PrivateKey) -> str:
    """Verifies an artifact or a merged model, its weights too, and writes ``signature.json``; an older signature is replaced.

    Returns:
        The id of the key.

    Raises:
        ArtifactError: the folder is refused, or its signature cannot be written.
    """
    folder = Path(folder)
    document = MERGED if is_merged(folder) else MANIFEST
    verified = load_merged(folder).document_digest if document == MERGED else load_artifact(folder).digest
    data = read_file(folder / document, MAX_JSON_BYTES)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != verified:
        raise refused(f"{folder / document} was changed while it was signed", "hash_mismatch", folder / document)
    signature = Signature(
        algorithm=ALGORITHM,
        key_id=key_id(private_key.public_key()),
        signature=_base64(private_key.sign(_message(document, data))),
    )
    replace_file(folder / SIGNATURE, (signature.model_dump_json(indent=2) + "\n").encode())
    return signature.key_id


def verify_signature(folder: str | Path, trust: TrustRoot) -> str:
    """Verifies the signature of a folder's manifest, and nothing else; ``load_artifact(..., trust=...)`` verifies what it lists too.

    Returns:
        The id of the key that signed.

    Raises:
        ArtifactError: as :meth:`TrustRoot.check`.
    """
    folder = Path(folder)
    document = MERGED if is_merged(folder) else MANIFEST
    return trust.check(folder, document, read_file(folder / document, MAX_JSON_BYTES))


def claimed_signer(folder: str | Path) -> str | None:
    """The key id that ``signature.json`` names, without any check, or None without a file that names one."""
    path = Path(folder) / SIGNATURE
    try:
        return parse(Signature, read_file(path, MAX_SIGNATURE_BYTES), path).key_id
    except ArtifactError:
        return None


def _message(document: str, data: bytes) -> bytes:
    return PREFIX + document.encode() + b"\n" + data


def _public_key(words: list[str]) -> Ed25519PublicKey | None:
    if len(words) < 2 or words[0] != ALGORITHM:
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(words[1], validate=True))
    except (binascii.Error, ValueError):
        return None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
