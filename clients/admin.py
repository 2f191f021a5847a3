"""The adapters of a running server: list, load, unload, promote. The client's key must be an administrator's."""

import os
import re
from typing import Any

from credence.clients.calls import Question
from credence.clients.transport import AsyncTransport, Transport
from credence.clients.types import Adapter, AdapterList

DEFAULT_DRAIN_S = 30.0
# Added to the wait for requests under way, and the least for a load, which verifies, copies and draws.
_WORK_S = 120.0

_ADAPTERS = "/admin/v1/adapters"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Adapters:
    """`client.adapters`. Every method raises CredenceError (401, 403, 404, 409 and 422 among others), and ValueError for a bad name."""

    def __init__(self, transport: Transport) -> None:
        """Use the client's connections."""
        self._transport = transport

    def list(self) -> tuple[Adapter, ...]:
        """All adapters, in every state."""
        return self._transport.ask(_list())

    def get(self, name: str) -> Adapter:
        """One adapter, or the one that an alias stands for."""
        return self._transport.ask(_about("GET", name))

    def load(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> Adapter:
        """Load an artifact from a folder of the server.

        Args:
            name: Its model name.
            path: The folder, on the server.
            replace: Move a name that is served already to this artifact; requests under way end with the old one.

        Raises:
            ConflictError: The name is served, and `replace` was not asked for.
            UnprocessableError: The artifact was refused; `code` is the reason. What was served is still served.
        """
        return self._transport.ask(_load(name, path, replace))

    def unload(self, name: str, *, drain_s: float = DEFAULT_DRAIN_S) -> Adapter:
        """Take no new requests for an adapter, let those under way end, and remove it.

        Args:
            name: Its name.
            drain_s: Seconds that requests under way are given.
        """
        return self._transport.ask(_unload(name, drain_s))

    def promote(self, alias: str, target: str) -> Adapter:
        """Have requests for `alias` answered by `target` from now on, in one step; returns the alias."""
        return self._transport.ask(_promote(alias, target))


class AsyncAdapters:
    """`AsyncClient.adapters`; see `Adapters`."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the client's connections."""
        self._transport = transport

    async def list(self) -> tuple[Adapter, ...]:
        """See `Adapters.list`."""
        return await self._transport.ask(_list())

    async def get(self, name: str) -> Adapter:
        """See `Adapters.get`."""
        return await self._transport.ask(_about("GET", name))

    async def load(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> Adapter:
        """See `Adapters.load`."""
        return await self._transport.ask(_load(name, path, replace))

    async def unload(self, name: str, *, drain_s: float = DEFAULT_DRAIN_S) -> Adapter:
        """See `Adapters.unload`."""
        return await self._transport.ask(_unload(name, drain_s))

    async def promote(self, alias: str, target: str) -> Adapter:
        """See `Adapters.promote`."""
        return await self._transport.ask(_promote(alias, target))


def _list() -> Question[tuple[Adapter, ...]]:
    return Question(path=_ADAPTERS, method="GET", read=lambda reply, content: reply.parsed(AdapterList, content).data)


def _about(
    method: str, name: str, tail: str = "", *, body: dict[str, Any] | None = None, timeout_s: float = 0.0
) -> Question[Adapter]:
    return _answered_by_adapter(method, f"{_ADAPTERS}/{_checked(name)}{tail}", body, timeout_s)


def _load(name: str, path: str | os.PathLike[str], replace: bool) -> Question[Adapter]:
    body = {"name": _checked(name), "path": os.fspath(path), "replace": replace}
    return _answered_by_adapter("POST", _ADAPTERS, body, _WORK_S)


def _unload(name: str, drain_s: float) -> Question[Adapter]:
    if isinstance(drain_s, bool) or not 0.0 <= drain_s < float("inf"):
        raise ValueError(f"drain_s is {drain_s!r}; give a number of seconds, 0 or more")
    return _about("DELETE", name, f"?drain_s={drain_s:g}", timeout_s=drain_s + _WORK_S)


def _promote(alias: str, target: str) -> Question[Adapter]:
    return _about("POST", alias, "/promote", body={"target": _checked(target)}, timeout_s=_WORK_S)


def _answered_by_adapter(method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Question[Adapter]:
    return Question(
        path=path,
        method=method,
        body=body,
        read=lambda reply, content: reply.parsed(Adapter, content),
        timeout_s=timeout_s,
    )


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name of an adapter; give 1 to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit"
        )
    return name
