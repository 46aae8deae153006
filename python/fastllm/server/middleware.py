"""Around every request: its id, its key, its log line, and the shape of whatever goes wrong."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

from aiohttp import web

from fastllm.server.errors import ApiError, from_http_exception, internal_error
from fastllm.server.state import STATE_KEY

access_log = logging.getLogger("fastllm.access")
logger = logging.getLogger("fastllm.server")

# Set by the outermost middleware for the task that answers the request.
_request_id: ContextVar[str] = ContextVar("request_id")
_VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")
# Asked every second by probes and scrapers: not worth a line each.
_QUIET_PATHS = frozenset({"/live", "/health", "/ready", "/ping", "/metrics", "/stats"})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def current_request_id() -> str:
    """The id of the request this task answers; a fresh one where the middleware was never reached."""
    return _request_id.get("") or uuid.uuid4().hex


def harmless_id(given: str | None) -> str | None:
    """An id that a client chose, if it may stand in logs, headers and answers."""
    return given if given and _VALID_ID.match(given) else None


@web.middleware
async def outermost(request: web.Request, handler: Handler) -> web.StreamResponse:
    state = request.app[STATE_KEY]
    request_id = harmless_id(request.headers.get("X-Request-Id")) or uuid.uuid4().hex
    _request_id.set(request_id)
    start = time.monotonic()
    status = 499  # the client went away before there was an answer
    try:
        try:
            state.keys.check(request)
            response = await handler(request)
        except ApiError as exc:
            response = exc.response()
        except web.HTTPException as exc:
            response = from_http_exception(exc, request)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("request %s failed", request_id)
            response = internal_error().response()
        status = response.status
        if not response.prepared:
            response.headers["X-Request-Id"] = request_id
        return response
    finally:
        if state.log_requests and request.path not in _QUIET_PATHS:
            milliseconds = (time.monotonic() - start) * 1e3
            # repr keeps control characters of the path out of the log
            access_log.info(
                "%s %s %s %d %.0f ms id=%s",
                request.remote,
                request.method[:16],
                repr(request.path[:200])[1:-1],
                status,
                milliseconds,
                request_id,
            )
