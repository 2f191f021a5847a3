"""A folder whose sub-folders are adapters: what appears there is served, what changes is replaced, what vanishes is taken away."""

import asyncio
import hashlib
import logging
from collections.abc import Collection
from pathlib import Path

from credence.adapters import ArtifactError, TrustRoot, load_artifact
from credence.serve.adapter_registry import AdapterRegistry
from credence.serve.config import ADAPTER_NAME
from credence.serve.errors import ServeError, Unavailable

logger = logging.getLogger(__name__)

POLL_S = 2.0


class AdapterFolder:
    """Keeps a registry in step with a folder.

    A sub-folder is acted on when it looked the same twice in a row, so that nobody reads a copy in progress. One that was refused is tried
    again when it changes, or at the next look if the server was only too busy. Names that were not loaded from here are left alone.

    Args:
        served: names served at the start that came from this folder. They are read once more, since they may have changed while the server
            started.
    """

    def __init__(self, folder: Path, registry: AdapterRegistry, served: Collection[str] = ()) -> None:
        self.folder = folder
        self._registry = registry
        self._mine = set(served)
        self._seen = fingerprints(folder)
        self._done: dict[str, str] = {}

    async def run(self) -> None:
        """Polls until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.step()
            except Exception:
                logger.exception("The adapter folder %s could not be followed; trying again", self.folder)

    async def step(self) -> None:
        """One look at the folder."""
        seen = await asyncio.to_thread(fingerprints, self.folder)
        for name in sorted(self._mine - seen.keys()):
            self._mine.discard(name)
            self._done.pop(name, None)
            await self._try(name, None)
        for name, mark in sorted(seen.items()):
            if self._seen.get(name) != mark or self._done.get(name) == mark:
                continue
            self._done[name] = mark
            if name not in self._mine and self._registry.serves(name):
                logger.warning("%s is not served: the name %s is taken", self.folder / name, name)
                continue
            self._mine.add(name)
            await self._try(name, self.folder / name)
        self._seen = seen

    async def _try(self, name: str, folder: Path | None) -> None:
        try:
            if folder is None:
                await self._registry.remove(name)
            else:
                await self._registry.load(name, folder, replace=True)
            logger.info(
                "Adapter %s: %s", name, "vanished from its folder" if folder is None else f"loaded from {folder}"
            )
        except ServeError as error:
            logger.warning("Adapter %s of %s: %s", name, self.folder, error.message)
            if isinstance(error, Unavailable):
                self._done.pop(name, None)


def verified(folder: Path, trust: TrustRoot | None = None) -> dict[str, str]:
    """The adapters of a folder that can be read now, folder by name; the others are logged.

    Raises:
        OSError: the folder itself cannot be read.
    """
    good = {}
    for name in sorted(fingerprints(folder, must_exist=True)):
        try:
            load_artifact(folder / name, trust=trust)
        except ArtifactError as error:
            logger.warning("Adapter %s of %s is refused (%s): %s", name, folder, error.reason, error)
            continue
        good[name] = str(folder / name)
    return good


def fingerprints(folder: Path, *, must_exist: bool = False) -> dict[str, str]:
    """A digest of names, sizes and times of every complete sub-folder; the manifest is an artifact's last file to be written."""
    marks = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        if must_exist:
            raise
        return {}
    for entry in entries:
        if not ADAPTER_NAME.match(entry.name) or not (entry / "manifest.json").is_file():
            continue
        digest = hashlib.sha256()
        try:
            for file in sorted(entry.rglob("*")):
                status = file.lstat()
                digest.update(
                    repr((str(file.relative_to(entry)), status.st_size, status.st_mtime_ns, status.st_ino)).encode()
                )
        except OSError:
            continue
        marks[entry.name] = digest.hexdigest()
    return marks
