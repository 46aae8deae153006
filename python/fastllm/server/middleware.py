"""Around every request: its id, its key, its log line, and the shape of whatever goes wrong."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar

from aiohttp import web

from fastllm.server import admission
from fastllm.server.call import Call, begin_call
from fastllm.server.errors import ApiError, api_error, from_http_exception, internal_error
from fastllm.server.hosts import check_host
from fastllm.server.json_log import ACCESS_LOGGER
from fastllm.server.refusals import line_fields, note_refusal
from fastllm.server.state import STATE_KEY, Phase, ServerState

access_log = logging.getLogger(ACCESS_LOGGER)
logger = logging.getLogger("fastllm.server")

# Set by the outermost middleware for the task that answers the request.
_request_id: ContextVar[str] = ContextVar("request_id")
_VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def current_request_id() -> str:
    """The id of the request this task answers; a fresh one where the middleware was never reached."""
    return _request_id.get("") or uuid.uuid4().hex


def known_request_id() -> str:
    """The id of the request this task answers, or "" outside of requests."""
    return _request_id.get("")


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
    size = 0
    error: ApiError | None = None
    call: Call | None = None
    try:
        try:
            if request.method == "POST":
                await state.turns.take()
                if state.phase is Phase.DRAINING:
                    admission.check_open(state)
            check_host(state, request)
            client = state.keys.client_of(request)
            call = begin_call(client)
            with client.serving() if request.method == "POST" else nullcontext():
                response = await handler(request)
        except ApiError as exc:
            error, response = exc.without_frames(), exc.response(path=request.path)
        except web.HTTPException as exc:
            error = api_error(exc, request)
            response = from_http_exception(exc, request)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("request %s failed", request_id)
            error = internal_error()
            response = error.response(path=request.path)
        status = response.status
        size = response.content_length or (response.body_length if response.prepared else 0)
        if not response.prepared:
            response.headers["X-Request-Id"] = request_id
        return response
    finally:
        seconds = time.monotonic() - start
        resource = request.match_info.route.resource
        handler_name = resource.canonical if resource is not None else "none"
        state.http.answered(handler_name, request.method, status, seconds, request.content_length or 0, size)
        _log(state, request, status, seconds, request_id, error or (call.error if call else None))


def _log(
    state: ServerState, request: web.Request, status: int, seconds: float, request_id: str, error: ApiError | None
) -> None:
    fields = line_fields(request.remote, request.method, request.path, status, seconds)
    if error is not None:
        note_refusal(state.http, error, request_id, fields)
    elif state.log_requests and request.path not in state.quiet_paths:
        access_log.info("%s %s %s %d %.0f ms id=%s", *fields.values(), request_id, extra={"fields": fields})
