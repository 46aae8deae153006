"""API keys: compared in constant time, stored as digests, never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from aiohttp import web

from fastllm.server.console.routes import PATHS as CONSOLE_PATHS
from fastllm.server.errors import ApiError

# Answered without a key: what a load balancer asks, and a page that asks for the key itself.
OPEN_PATHS = frozenset({"/live", "/health", "/ready", *CONSOLE_PATHS})
ROOT_PATH: web.AppKey[str] = web.AppKey("root_path", str)  # a prefix that every path may have; "" for none


class ApiKeys:
    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys if key]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: web.Request) -> None:
        """Raises a 401 unless no key is set, the path is open or the request carries a valid one."""
        if not self._digests or request.path.removeprefix(request.app[ROOT_PATH]) in OPEN_PATHS:
            return
        header = request.headers.get("Authorization", "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            token = request.headers.get("X-Api-Key", "")
        # Header bytes that are no UTF-8 arrive as surrogates.
        digest = _digest(token.strip().encode("utf-8", "surrogateescape"))
        valid = False
        for known in self._digests:  # every key is compared, so the time says nothing about which one matched
            valid |= hmac.compare_digest(known, digest)
        if not valid:
            raise ApiError(401, "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
