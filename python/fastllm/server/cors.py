"""Cross-origin requests of browsers: which pages may call the API. No origin may unless it is named."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from multidict import CIMultiDict

from fastllm.server.errors import ApiError
from fastllm.server.refusals import line_fields, note_refusal
from fastllm.server.state import STATE_KEY

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
# Browsers send these without asking.
_SAFE_HEADERS = ("Accept", "Accept-Language", "Content-Language", "Content-Type")
_EXPOSED_HEADERS = "X-Request-Id, Retry-After"
_MAX_AGE = "600"  # seconds a browser may remember a preflight's answer


@dataclass(frozen=True)
class Cors:
    origins: Sequence[str] = ()
    methods: Sequence[str] = ("*",)
    headers: Sequence[str] = ("*",)
    credentials: bool = False

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise ValueError(f"--allowed-origins: {origin!r} is not an origin such as https://example.org, nor *")

    def install(self, app: web.Application) -> None:
        """Preflights are answered before keys are checked: browsers send them without."""
        app[CORS_KEY] = self
        if self.origins:
            app.middlewares.insert(0, self._middleware())
            app.on_response_prepare.append(self._on_prepare)

    def allows(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def _middleware(self) -> Middleware:
        @web.middleware
        async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
            wanted = request.headers.get("Access-Control-Request-Method")
            if request.method == "OPTIONS" and "Origin" in request.headers and wanted is not None:
                return self._preflight(request, wanted)
            return await handler(request)

        return cors

    async def _on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        self._name_origin(request.headers.get("Origin"), response.headers)

    def _name_origin(self, origin: str | None, headers: CIMultiDict[str]) -> None:
        anybody = "*" in self.origins and not self.credentials
        if not anybody:
            headers.add("Vary", "Origin")  # caches must not give one origin's answer to another
        if origin is None or not self.allows(origin):
            return
        headers["Access-Control-Allow-Origin"] = "*" if anybody else origin
        headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
        if self.credentials:
            headers["Access-Control-Allow-Credentials"] = "true"

    def _preflight(self, request: web.Request, method: str) -> web.Response:
        asked = [name.strip() for name in request.headers.get("Access-Control-Request-Headers", "").split(",")]
        asked = [name for name in asked if name]
        methods = _METHODS if "*" in self.methods else tuple(name.upper() for name in self.methods)
        known = {name.lower() for name in (*_SAFE_HEADERS, *self.headers)}
        refused = []
        if not self.allows(request.headers["Origin"]):
            refused.append("origin")
        if method not in methods:
            refused.append("method")
        if "*" not in self.headers and any(name.lower() not in known for name in asked):
            refused.append("headers")
        if refused:
            error = ApiError(400, f"CORS does not allow this {', '.join(refused)}.", code="cors_refused")
            request_id = uuid.uuid4().hex
            fields = line_fields(request.remote, request.method, request.path, error.status, 0)
            note_refusal(request.app[STATE_KEY].http, error, request_id, fields)
            return error.response({"X-Request-Id": request_id})
        headers = {
            "Access-Control-Allow-Methods": ", ".join(methods),
            "Access-Control-Max-Age": _MAX_AGE,
        }
        names = asked if "*" in self.headers else sorted({*_SAFE_HEADERS, *self.headers})
        if names:
            headers["Access-Control-Allow-Headers"] = ", ".join(names)
        return web.Response(status=200, headers=headers)


CORS_KEY: web.AppKey[Cors] = web.AppKey("cors", Cors)
