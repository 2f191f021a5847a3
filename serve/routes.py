"""The closed table of what the server answers: vLLM registers more routes than a public server may have, and guards only /v1.

What is not in the table does not exist (404), whatever application lies behind; a path is matched as it was sent, without any
normalisation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from credence.serve.errors import ConfigurationError

SCORE_PATH = "/v1/uncertainty/score"
UNCERTAINTY_PATHS = ("/v1/completions", "/v1/chat/completions", SCORE_PATH)
"""Where ``uncertainty`` is served."""


class Access(Enum):
    """Who may call a route."""

    OPEN = "open"
    """Anybody: probes, metrics, static pages."""
    USER = "user"
    """Whoever holds an API key, if the server has keys."""
    ADMIN = "admin"
    """Whoever holds the admin key; nobody on a server without one."""


@dataclass(frozen=True, slots=True)
class Route:
    """A path, whose ``{name}`` parts stand for one segment each, its methods, and who may call it."""

    path: str
    methods: tuple[str, ...]
    access: Access
    extra: bool = False
    """Whether the operator has opened it (``--extra-route``): the door knows nothing of its bodies."""

    def matches(self, path: str) -> bool:
        """Whether ``path`` is of this route."""
        return path == self.path or ("{" in self.path and re.fullmatch(_pattern(self.path), path) is not None)


ROUTES = (
    Route("/v1/completions", ("POST",), Access.USER),
    Route("/v1/chat/completions", ("POST",), Access.USER),
    Route(SCORE_PATH, ("POST",), Access.USER),
    Route("/v1/models", ("GET",), Access.USER),
    Route("/tokenize", ("POST",), Access.USER),
    Route("/detokenize", ("POST",), Access.USER),
    Route("/version", ("GET",), Access.USER),
    Route("/openapi.json", ("GET",), Access.USER),
    Route("/health", ("GET",), Access.OPEN),
    Route("/ping", ("GET", "POST"), Access.OPEN),
    Route("/livez", ("GET",), Access.OPEN),
    Route("/readyz", ("GET",), Access.OPEN),
    Route("/metrics", ("GET",), Access.OPEN),
    Route("/playground", ("GET",), Access.OPEN),
    Route("/playground/{file}", ("GET",), Access.OPEN),
    Route("/admin/v1/adapters", ("GET", "POST"), Access.ADMIN),
    Route("/admin/v1/adapters/{name}", ("GET", "DELETE"), Access.ADMIN),
    Route("/admin/v1/adapters/{name}/promote", ("POST",), Access.ADMIN),
)


EXTRA_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""Methods of a route that the operator has opened: vLLM decides which it has."""


def with_extra(paths: Iterable[str]) -> tuple[Route, ...]:
    """The table with further routes of vLLM's, for keys that may ask for every model.

    Raises:
        ConfigurationError: a path is none, is in the table already, or would be an admin's.
    """
    table: tuple[Route, ...] = ROUTES
    for path in paths:
        if not re.fullmatch(r"(/[A-Za-z0-9_.-]+)+", path) or re.search(r"/\.{1,2}(/|$)", path):
            raise ConfigurationError(
                f"--extra-route {path!r} is no path; give one as vLLM has it, for example /v1/embeddings"
            )
        if path == "/admin" or path.startswith("/admin/") or find(path, table) is not None:
            raise ConfigurationError(f"--extra-route {path} is in the table of routes already; leave it out")
        table = (*table, Route(path, EXTRA_METHODS, Access.USER, extra=True))
    return table


def find(path: str, routes: Iterable[Route] = ROUTES) -> Route | None:
    """The route of a path, or None."""
    return next((route for route in routes if route.matches(path)), None)


def _pattern(path: str) -> str:
    """Regular expression of a path; a segment is anything without a slash that is not a dot or two."""
    return re.sub(r"\\\{\w+\\\}", r"(?!\\.{1,2}(?:/|$))[^/]+", re.escape(path))
