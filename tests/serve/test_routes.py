"""The table of routes: what matches and what does not."""

import pytest

from credence.serve.errors import ConfigurationError
from credence.serve.routes import ROUTES, Access, find, with_extra


def test_every_route_finds_itself() -> None:
    for route in ROUTES:
        path = route.path.replace("{name}", "triage-2.1").replace("{file}", "app.js")
        assert find(path) is route


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "//livez", "/livez/", "/LIVEZ", "/v1/completions/", "/v1/../v1/completions", "/v1/completions\n", "/v1/models/x",
        "/admin/v1/adapters/", "/admin/v1/adapters/a/b", "/admin/v1/adapters/..", "/admin/v1/adapters/../promote",
        "/admin/v1/adapters/./promote", "/playground/", "/playground/..", "/playground/a/b", "/pause", "/v1/load_lora_adapter", "/docs",
    ],
)  # fmt: skip
def test_anything_else_is_nothing(path: str) -> None:
    assert find(path) is None


def test_further_routes_are_users_routes_of_their_own() -> None:
    table = with_extra(["/v1/embeddings", "/invocations"])
    assert table[: len(ROUTES)] == ROUTES
    route = find("/invocations", table)
    assert route is not None and route.access is Access.USER and route.extra
    assert find("/invocations") is None and find("/invocations/x", table) is None


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "pause", "/pause/", "//pause", "/a/../pause", "/a/.", "/{x}", "/a b", "/a?b", "/a%2fb", "/\u00e9", "/a\n", "/admin",
        "/admin/v1/keys", "/v1/completions", "/livez", "/playground/app.js",
    ],
)  # fmt: skip
def test_what_cannot_be_a_further_route(path: str) -> None:
    with pytest.raises(ConfigurationError, match="--extra-route"):
        with_extra([path])
    with pytest.raises(ConfigurationError, match="already"):
        with_extra(["/pause", "/pause"])
