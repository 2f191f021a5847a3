"""The playground: one page to try a server on, served as it lies here. No build step, nothing from elsewhere.

The page is static text and needs no key; its calls carry the key that the user types into it. The policy below lets the browser load
and ask this server alone, and run no script that is not one of these files.
"""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

FOLDER = Path(__file__).parent
PAGE = "index.html"
FILES = {
    "api.js": "text/javascript",
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "metrics.js": "text/javascript",
    "request.js": "text/javascript",
    "style.css": "text/css",
    "tokens.js": "text/javascript",
}
"""Content type of each file of the page; nothing else is served."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def router() -> APIRouter:
    """The routes /playground and /playground/{file}."""
    routes = APIRouter()

    @routes.get("/playground")
    async def page() -> Response:
        return _response(PAGE, "text/html")

    @routes.get("/playground/{file}")
    async def file(file: str) -> Response:
        if file not in FILES:
            raise HTTPException(404, f"the playground has no file {file[:80]!r}")
        return _response(file, FILES[file])

    return routes


def _response(name: str, content_type: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=f"{content_type}; charset=utf-8", headers=HEADERS)
