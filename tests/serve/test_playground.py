"""The playground's files as text; test_playground_page.py opens them in a browser."""

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from credence.serve import playground


@pytest.fixture(scope="module")
def static() -> TestClient:
    app = FastAPI()
    app.include_router(playground.router())
    return TestClient(app)


def test_the_table_is_the_folder() -> None:
    there = {path.name for path in playground.FOLDER.iterdir() if path.suffix not in (".py", "") and path.is_file()}
    assert there == {*playground.FILES, playground.PAGE}


@pytest.mark.parametrize("name", [None, *playground.FILES])
def test_every_file_has_its_type_and_the_policy(static: TestClient, name: str | None) -> None:
    answer = static.get("/playground" if name is None else f"/playground/{name}")
    assert answer.status_code == 200 and answer.text
    assert answer.headers["content-type"] == f"{playground.FILES.get(name or '', 'text/html')}; charset=utf-8"
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'self'" and "unsafe" not in str(policy)
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/playground/", "/playground/index.html", "/playground/__init__.py", "/playground/../schemas.py", "/playground/%2e%2e%2fschemas.py",
        "/playground/..%2f..%2fpyproject.toml", "/playground/..", "/playground/app.js/", "/playground//app.js", "/playground/APP.JS",
        "/playground/app.js%00", "/playground/.%2fapp.js", "/playground/app.js%20",
    ],
)  # fmt: skip
def test_nothing_else_is_served(static: TestClient, path: str) -> None:
    # Starlette would redirect from a path with a slash at its end; the gate in front of it answers 404.
    assert static.get(path, follow_redirects=False).status_code in (404, 307)


def test_no_file_asks_for_anything_from_elsewhere_or_makes_markup_of_text() -> None:
    for name in (*playground.FILES, playground.PAGE):
        text = (playground.FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|[\"'(]//|@import|\burl\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            name
        )
    page = (playground.FOLDER / playground.PAGE).read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert set(re.findall(r'(?:src|href)="playground/([^"]+)"', page)) <= set(playground.FILES)
