"""Reading and replacing an artifact's folder: every byte is checked against the manifest before anything is parsed."""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from credence.adapters.config import Document, Manifest
from credence.adapters.errors import ArtifactError, ArtifactReason

MEAN_CONFIG, MEAN_TENSORS = "adapter_config.json", "adapter_model.safetensors"
POSTERIOR_CONFIG, POSTERIOR_TENSORS = "posterior.json", "posterior.safetensors"
CALIBRATION, METRICS, CARD, MANIFEST = "calibration.json", "metrics.json", "README.md", "manifest.json"
RUN_CONFIG = "config.yaml"
HEAD_TENSORS = "head.safetensors"
REQUIRED = (MEAN_CONFIG, MEAN_TENSORS, POSTERIOR_CONFIG, POSTERIOR_TENSORS)
OPTIONAL = (CALIBRATION, METRICS, CARD, RUN_CONFIG, HEAD_TENSORS)

D = TypeVar("D", bound=Document)


def refused(message: str, reason: ArtifactReason, path: Path) -> ArtifactError:
    """Builds the error of a refused artifact."""
    return ArtifactError(message, reason=reason, path=path)


def read_verified(folder: Path, max_bytes: int) -> tuple[dict[str, bytes], Manifest]:
    """Reads every file the manifest lists, each once, and checks size and SHA-256.

    Raises:
        ArtifactError: a file is missing, a symbolic link, too large, or not what the manifest describes.
    """
    if folder.is_symlink():
        raise refused(f"{folder} is a symbolic link; give the folder itself", "symlink", folder)
    if not folder.exists():
        raise refused(f"{folder} does not exist", "missing", folder)
    if not folder.is_dir():
        raise refused(f"{folder} is not a folder; an artifact is a folder holding {MANIFEST}", "not_a_folder", folder)
    contents = {MANIFEST: read_file(folder / MANIFEST, max_bytes)}
    manifest = parse(Manifest, contents[MANIFEST], folder / MANIFEST)
    unknown = set(manifest.files) - set(REQUIRED) - set(OPTIONAL)
    missing = set(REQUIRED) - set(manifest.files)
    if unknown or missing:
        raise refused(
            f"{folder / MANIFEST} lists unknown files {sorted(unknown)} and lacks {sorted(missing)}",
            "malformed",
            folder / MANIFEST,
        )
    left = max_bytes - len(contents[MANIFEST])
    for name, entry in manifest.files.items():
        data = read_file(folder / name, left)
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise refused(
                f"{folder / name} is not what the manifest describes ({len(data)} bytes, {entry.size} expected, or another SHA-256): "
                "the artifact was changed or damaged after it was written",
                "hash_mismatch",
                folder / name,
            )
        contents[name] = data
        left -= len(data)
    return contents, manifest


def read_file(
    path: Path, max_bytes: int, needs: str = f"an artifact needs {MANIFEST} and {', '.join(REQUIRED)}"
) -> bytes:
    """Reads a regular file of at most ``max_bytes``; symbolic links are not followed.

    Args:
        needs: what the error of a missing file says.

    Raises:
        ArtifactError: with the reason.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise refused(f"{path} is missing; {needs}", "missing", path) from None
    except OSError as error:
        reason: ArtifactReason = "symlink" if path.is_symlink() else "io"
        raise refused(
            f"{path} cannot be opened: {error.strerror} (symbolic links are not followed)", reason, path
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise refused(f"{path} is not a regular file", "malformed", path)
        if status.st_size > max_bytes:
            raise refused(f"{path} has {status.st_size} bytes, {max_bytes} are left of the limit", "too_large", path)
        # Only now: fdopen itself fails on a folder.
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise refused(f"{path} cannot be read: {error.strerror}", "io", path) from None
    finally:
        os.close(descriptor)
    if len(data) > max_bytes:
        raise refused(f"{path} grew beyond the limit while it was read", "too_large", path)
    return data


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object; raises ArtifactError otherwise."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refused(f"{path} is not JSON: {error}", "malformed", path) from None
    if not isinstance(document, dict):
        raise refused(f"{path} holds a JSON {type(document).__name__}, an object is needed", "malformed", path)
    return document


def parse(model: type[D], data: bytes, path: Path) -> D:
    """Parses and validates one of the artifact's documents; raises ArtifactError naming the field."""
    document = json_object(data, path)
    version = document.get("format_version", 1)
    if version != 1:
        raise refused(
            f"{path} has format version {version!r}; this release of credence reads version 1", "unsupported", path
        )
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refused(f"{path}: {where}: {first['msg']}", "malformed", path) from None


def lay_down(target: Path, contents: Mapping[str, bytes]) -> None:
    """Writes ``contents`` to ``target`` atomically, or leaves an identical copy alone."""
    if all((target / name).is_file() and (target / name).read_bytes() == data for name, data in contents.items()):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing_folder(target, replace=True) as folder:
            for name, data in contents.items():
                (folder / name).write_bytes(data)
    except OSError as error:
        raise refused(
            f"the artifact store {target.parent} cannot be written: {error.strerror}", "io", target
        ) from error


@contextmanager
def replacing_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that becomes ``path`` when the block succeeds and is deleted when it fails."""
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise refused(f"{path} exists; choose another folder or remove it first", "exists", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        fresh, old = scratch / "new", scratch / "old"
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
