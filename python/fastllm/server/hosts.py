"""Against pages of other sites, on a server that only this machine reaches and that asks for no key.

Such a server trusts its callers by where they are, and a browser on this machine brings along every page it shows: one
that posts across origins, or one that has its own name resolve to 127.0.0.1 and then talks to us from "the same
origin" (DNS rebinding). The first shows in Origin, the second in Host too. Who is no browser sends no Origin and a Host
of this machine. Pages of this machine pass, and so do those behind a proxy that speaks https: a rebound name has no
certificate here. --allowed-origins names further ones.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from aiohttp import web

from fastllm.server.auth import OPEN_PATHS, ROOT_PATH
from fastllm.server.cors import CORS_KEY, Cors
from fastllm.server.errors import ApiError
from fastllm.server.state import ServerState

# Names that no site can register.
_PRIVATE_ENDINGS = (".localhost", ".local", ".internal", ".home.arpa", ".test")


def check_host(state: ServerState, request: web.Request) -> None:
    """Raises a 403."""
    if not state.loopback_only or state.keys or request.path.removeprefix(request.app[ROOT_PATH]) in OPEN_PATHS:
        return
    origin, cors = request.headers.get("Origin"), request.app[CORS_KEY]
    host = _split(f"//{request.headers.get('Host', 'localhost')}").hostname or ""
    if origin is not None:
        if not cors.allows(origin) and not _may_call(origin, host):
            raise ApiError(
                403,
                f"Pages of {origin[:100]!r} may not use this server. Name it with --allowed-origins, or set --api-key.",
                code="origin_not_allowed",
            )
    elif request.remote and not _is_private(host) and not _is_named(host, cors):  # a Unix socket has no address
        raise ApiError(
            403,
            f"The name {host[:100]!r} is not one of this machine. Ask for localhost, or set --api-key, --host or "
            "--allowed-origins.",
            code="host_not_allowed",
        )


def _may_call(origin: str, host: str) -> bool:
    """host: that the page asked for."""
    page = _split(origin)
    if page.scheme not in ("http", "https"):
        return page.scheme != ""  # an application or an extension; "null" may be a sandboxed frame of any site
    name = page.hostname or ""
    if name == "localhost" or name.endswith(".localhost") or _is_loopback(name):
        return True
    return name == host and (page.scheme == "https" or _is_private(host))


def _is_named(host: str, cors: Cors) -> bool:
    return cors.allows("*") or any(_split(origin).hostname == host for origin in cors.origins)


def _is_private(host: str) -> bool:
    """A page cannot take the address of another machine, nor a name without a registry."""
    return (host != "" and "." not in host) or host.endswith(_PRIVATE_ENDINGS) or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _split(url: str) -> SplitResult:
    """Without parts where it cannot be read."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
