"""Against DNS rebinding: a page of another site that a browser takes for this server.

Such a page has its own name resolve to 127.0.0.1 and then talks to us from "the same origin": the browser sends that
name as Host and, with every POST, as Origin. Only a server that nobody but this machine reaches and that asks for no
key trusts its callers by where they are, so only there, and only for browsers, names are checked. Pages behind a proxy
that speaks https pass: a rebound name has no certificate here.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from fastllm.server.errors import ApiError
from fastllm.server.state import ServerState


def check_host(state: ServerState, request: web.Request) -> None:
    origin = request.headers.get("Origin")
    if origin is None or not state.loopback_only or state.keys:
        return
    try:
        page = urlsplit(origin)
        host = urlsplit(f"//{request.host}").hostname or ""
        same = page.scheme == "http" and (page.hostname or "") == host
    except ValueError:
        return
    if same and not _is_own(host):
        raise ApiError(
            403,
            f"The name {host[:100]!r} is not one of this machine. Ask for localhost, or set --api-key or --host.",
            code="host_not_allowed",
        )


def _is_own(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True  # a page cannot take the address of another site
