"""API keys: compared in constant time, kept as digests, never logged."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable
from pathlib import Path

from aiohttp import web

from fastllm.server.client import ANONYMOUS, Allowance, Client
from fastllm.server.console.routes import PATHS as CONSOLE_PATHS
from fastllm.server.errors import ApiError
from fastllm.server.key_file import KnownKey, digest_of, read_key_file

# Answered without a key: what a load balancer asks, and a page that asks for the key itself.
OPEN_PATHS = frozenset({"/live", "/health", "/ready", *CONSOLE_PATHS})
ROOT_PATH: web.AppKey[str] = web.AppKey("root_path", str)  # a prefix that every path may have; "" for none


class ApiKeys:
    """Keys of the command line and of a file. Event loop only."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        """Raises ValueError if the file cannot be used."""
        self._file = file
        self._given = [
            KnownKey(digest_of(key.encode()), f"api-key-{number}", Allowance())
            for number, key in enumerate((key for key in keys if key), 1)
        ]
        self._anybody = Client(ANONYMOUS)
        self._clients: dict[str, Client] = {}  # by name; a reload keeps what they have used
        self._known: list[KnownKey] = []
        self.reload()

    def __bool__(self) -> bool:
        """Whether requests need a key."""
        return bool(self._given) or self._file is not None

    def __len__(self) -> int:
        return len(self._known)

    def reload(self) -> None:
        """Reads the file again. Raises ValueError and changes nothing if it cannot be used."""
        known = self._given + (read_key_file(self._file) if self._file is not None else [])
        clients: dict[str, Client] = {}
        for key in known:
            client = self._clients.get(key.name) or Client(key.name)
            client.set_allowance(key.allowance)
            clients[key.name] = client
        self._known, self._clients = known, clients

    def client_of(self, request: web.Request) -> Client:
        """Raises a 401 unless no key is set, the path is open or the request carries a valid key."""
        if not self or request.path.removeprefix(request.app[ROOT_PATH]) in OPEN_PATHS:
            return self._anybody
        header = request.headers.get("Authorization", "")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            token = request.headers.get("X-Api-Key", "")
        # Header bytes that are no UTF-8 arrive as surrogates.
        digest = digest_of(token.strip().encode("utf-8", "surrogateescape"))
        found: KnownKey | None = None
        for known in self._known:  # every key is compared, so the time says nothing about which one matched
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise ApiError(401, "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.")
        expires = found.allowance.expires
        if expires is not None and time.time() >= expires:
            raise ApiError(401, "This API key has expired.", code="expired_api_key")
        return self._clients[found.name]
