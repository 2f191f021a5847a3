"""The table of routes: what matches and what does not."""

import pytest

from credence.serve.routes import ROUTES, find


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
