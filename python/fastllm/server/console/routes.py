"""Sends the console's files: read once, kept as bytes, revalidated by ETag. They hold no secret and need no key."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import ETag, web

_INDEX = "index.html"
_ASSETS = (
    *("console.css", "chat.css", "gauges.css", "icon.svg", "console.js", "api.js", "chart.js", "chat.js", "dom.js"),
    *("gauges.js", "histogram.js", "markdown.js", "monitor.js", "settings.js", "turn.js"),
)
# Where the files are, relative to the server's root.
PATHS = {"/": _INDEX} | {f"/console/{name}": name for name in _ASSETS}

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Trusted types turn every attempt to parse a string as HTML into an error: what a model says can only be text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Always asked, seldom sent again: files of two versions never meet in one page.
    "Cache-Control": "no-cache",
}


class _File:
    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._type = _TYPES[path.suffix]
        self._etag = ETag(hashlib.sha256(self._body).hexdigest()[:32])

    async def get(self, request: web.Request) -> web.Response:
        known = request.if_none_match or ()
        if any(etag.value in (self._etag.value, "*") for etag in known):
            response = web.Response(status=304, headers=_HEADERS)
        else:
            response = web.Response(body=self._body, content_type=self._type, charset="utf-8", headers=_HEADERS)
        response.etag = self._etag
        return response


def add_console(app: web.Application, prefixes: list[str]) -> None:
    """Serves the console at the root of every prefix."""
    folder = Path(__file__).parent
    for path, name in PATHS.items():
        file = _File(folder / name)
        for prefix in prefixes:
            app.router.add_get(prefix + path, file.get)
