"""Reading and replacing an artifact's folder: every byte is checked against the manifest before anything is parsed."""

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections import Counter
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
RUN_CONFIG, SIGNATURE = "config.yaml", "signature.json"
HEAD_TENSORS = "head.safetensors"
REQUIRED = (MEAN_CONFIG, MEAN_TENSORS, POSTERIOR_CONFIG, POSTERIOR_TENSORS)
OPTIONAL = (CALIBRATION, METRICS, CARD, RUN_CONFIG, HEAD_TENSORS)
# What some tool would load from the folder, as weights or as code; none of it may lie beside the files of the manifest.
LOADABLE = (
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".py", ".safetensors", ".so",
)  # fmt: skip
MAX_JSON_BYTES, MAX_JSON_DEPTH = 16 * 2**20, 64

D = TypeVar("D", bound=Document)


def refused(message: str, reason: ArtifactReason, path: Path) -> ArtifactError:
    """Builds the error of a refused artifact."""
    return ArtifactError(message, reason=reason, path=path)


def read_manifest(folder: Path, max_bytes: int) -> bytes:
    """Reads manifest.json of a folder that is no symbolic link.

    Raises:
        ArtifactError: there is no such folder or manifest.
    """
    try:
        mode = folder.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise refused(f"{folder} does not exist", "missing", folder) from None
    except OSError as error:
        raise refused(f"{folder} cannot be read: {error.strerror}", "io", folder) from None
    if stat.S_ISLNK(mode):
        raise refused(f"{folder} is a symbolic link; give the folder itself", "symlink", folder)
    if not stat.S_ISDIR(mode):
        raise refused(f"{folder} is not a folder; an artifact is a folder holding {MANIFEST}", "not_a_folder", folder)
    return read_file(folder / MANIFEST, min(max_bytes, MAX_JSON_BYTES))


def read_listed(folder: Path, manifest_bytes: bytes, max_bytes: int) -> tuple[dict[str, bytes], Manifest]:
    """Reads every file the manifest lists, each once, and checks size and SHA-256.

    Args:
        max_bytes: limit for all files together, the manifest included.

    Returns:
        The bytes by name, the manifest's among them, and the manifest.

    Raises:
        ArtifactError: a file is missing, a symbolic link, too large, or not what the manifest describes; or one that some tool would load
            lies beside them.
    """
    manifest = parse(Manifest, manifest_bytes, folder / MANIFEST)
    unknown = set(manifest.files) - set(REQUIRED) - set(OPTIONAL)
    missing = set(REQUIRED) - set(manifest.files)
    if unknown or missing:
        raise refused(
            f"{folder / MANIFEST} lists unknown files {sorted(unknown)} and lacks {sorted(missing)}",
            "malformed",
            folder / MANIFEST,
        )
    _check_unlisted(folder, manifest)
    contents = {MANIFEST: manifest_bytes}
    left = max_bytes - len(manifest_bytes)
    for name, entry in manifest.files.items():
        data = read_file(folder / name, min(left, MAX_JSON_BYTES) if name.endswith(".json") else left)
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


def _check_unlisted(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError if a file beside the listed ones could be taken for a part of the artifact. Others are left where they are."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise refused(f"{folder} cannot be read: {error.strerror}", "io", folder) from None
    strange = sorted(
        name for name in names - set(manifest.files) if name in OPTIONAL or name.lower().endswith(LOADABLE)
    )
    if strange:
        raise refused(
            f"{folder} holds {', '.join(strange)}, which {MANIFEST} does not list and some tool would load; move it elsewhere",
            "unsupported",
            folder / strange[0],
        )


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


def json_object(data: bytes, path: Path, *, strict: bool = True) -> dict[str, Any]:
    """Parses a JSON object in UTF-8; raises ArtifactError otherwise.

    Args:
        strict: refuse what programs read in different ways: a key that occurs twice, numbers that are not finite, half characters, and
            deep nesting. Documents of other programs may have some of it.
    """
    try:
        if strict:
            document = json.loads(
                data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite
            )
            _check_values(document)
        else:
            document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refused(f"{path} is not JSON: {error}", "malformed", path) from None
    if not isinstance(document, dict):
        raise refused(f"{path} holds a JSON {type(document).__name__}, an object is needed", "malformed", path)
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _check_values(value: object, depth: int = 0) -> None:
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair has no UTF-8
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_values(key)
            _check_values(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, depth + 1)


def parse(model: type[D], data: bytes, path: Path) -> D:
    """Parses and validates one of the artifact's documents; raises ArtifactError naming the field."""
    document = json_object(data, path)
    version = document.get("format_version", 1)
    if type(version) is not int or version != 1:
        raise refused(
            f"{path} has format version {version!r}; this release of credence reads version 1", "unsupported", path
        )
    try:
        # From the bytes: only there a strict model takes a list for a tuple. Strict: "3" and true are no numbers.
        return model.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refused(f"{path}: {where}: {first['msg']}", "malformed", path) from None


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file in one step, in place of an older one; raises ArtifactError if that fails."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise refused(f"{path} cannot be written: {error.strerror}", "io", path) from error


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
