"""The routes under /admin/v1/adapters: what is served, changed while the server runs. The gate asks for the admin key."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from credence.serve.adapter_registry import DEFAULT_DRAIN_S, AdapterRegistry
from credence.serve.errors import BadRequest, Forbidden, ServeError

BodyT = TypeVar("BodyT", bound=BaseModel)
MAX_DRAIN_S = 3600.0


class LoadRequest(BaseModel):
    """Body of ``POST /admin/v1/adapters``.

    Attributes:
        name: served name.
        path: artifact folder, as the server sees it, below one of its adapter roots.
        replace: move the name if it is served already.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(max_length=64)]
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    replace: bool = False


class PromoteRequest(BaseModel):
    """Body of ``POST /admin/v1/adapters/{alias}/promote``; ``target`` is a served name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    target: Annotated[str, Field(max_length=64)]


def router(
    registry_of: Callable[[Request], AdapterRegistry], roots_of: Callable[[Request], tuple[str, ...]]
) -> APIRouter:
    """The routes; registry and adapter roots exist only once the engine is up."""
    routes = APIRouter(prefix="/admin/v1/adapters")

    @routes.get("")
    async def listing(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": registry_of(request).list()})

    @routes.get("/{name}")
    async def one(name: str, request: Request) -> JSONResponse:
        async def answer() -> dict[str, Any]:
            return registry_of(request).get(name)

        return await _answered(answer())

    @routes.post("")
    async def load(request: Request) -> JSONResponse:
        registry, replaces = registry_of(request), False

        async def answer() -> dict[str, Any]:
            nonlocal replaces
            asked = await _body(request, LoadRequest)
            folder = below_a_root(asked.path, roots_of(request))
            replaces = registry.serves(asked.name)
            return await registry.load(asked.name, folder, replace=asked.replace)

        response = await _answered(answer())
        if response.status_code == 200 and not replaces:
            response.status_code = 201
        return response

    @routes.post("/{alias}/promote")
    async def promote(alias: str, request: Request) -> JSONResponse:
        async def answer() -> dict[str, Any]:
            return await registry_of(request).promote(alias, (await _body(request, PromoteRequest)).target)

        return await _answered(answer())

    @routes.delete("/{name}")
    async def remove(name: str, request: Request) -> JSONResponse:
        async def answer() -> dict[str, Any]:
            return await registry_of(request).remove(name, _drain_s(request))

        return await _answered(answer())

    return routes


def below_a_root(path: str, roots: tuple[str, ...]) -> Path:
    """The folder that ``path`` names, if it lies below one of the roots after every link is followed.

    Raises:
        Forbidden: the server has no roots, or the folder lies elsewhere (existing or not: nothing is told of what is there).
    """
    if not roots:
        raise Forbidden("this server loads no adapters at run time; start it with --adapter-root DIR", param="path")
    try:
        folder = Path(path).resolve()
        allowed = any(folder.is_relative_to(Path(root).resolve()) for root in roots)
    except (OSError, ValueError, RuntimeError):
        allowed = False
    if not allowed:
        raise Forbidden(f"path {path!r:.120} is not below an adapter root of this server", param="path")
    return folder


async def _answered(work: Awaitable[dict[str, Any]]) -> JSONResponse:
    try:
        return JSONResponse(await work)
    except ServeError as error:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _body(request: Request, kind: type[BodyT]) -> BodyT:
    """Reads and validates a body; raises BadRequest."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        fields = ", ".join(kind.model_fields)
        raise BadRequest(f"{param or 'the body'}: {first['msg']}; the fields are {fields}", param=param) from None


def _drain_s(request: Request) -> float:
    given = request.query_params.get("drain_s")
    if given is None:
        return DEFAULT_DRAIN_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_DRAIN_S:
        raise BadRequest(f"drain_s is {given!r:.40}; give 0 to {MAX_DRAIN_S:g} seconds", param="drain_s")
    return seconds
