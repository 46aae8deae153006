"""The body of a request, within the limits of size and time."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import TypeVar

import msgspec
from aiohttp import web

from fastllm.server.call import current_call
from fastllm.server.deadline import time_limit
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.json_body import decode
from fastllm.server.limits import Limits
from fastllm.server.state import STATE_KEY

T = TypeVar("T", bound=msgspec.Struct)

_FREE_SECONDS = 5.0  # before the rate of a body counts
_CHUNKS_A_TURN = 500  # of a body, between turns of others


@lru_cache(maxsize=16)
def field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(kind.__struct_fields__)


async def read_json(request: web.Request, kind: type[T]) -> T:
    state = request.app[STATE_KEY]
    content_type = request.headers.getall("Content-Type", [])
    if len(content_type) > 1:
        raise bad_request("Send one Content-Type header.")
    if content_type and request.content_type != "application/json":
        raise ApiError(415, "Send the body as application/json.")
    if content_type and (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "Send the body as UTF-8.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "Send the body as it is: compressed bodies are not accepted.")
    if request.content_length is not None and request.content_length > state.limits.max_body_bytes:
        raise _too_large(state.limits.max_body_bytes)
    try:
        async with time_limit(state.limits.body_timeout_s):
            body = await _read(request, state.limits)
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.") from None
    except web.RequestPayloadError:
        raise bad_request("The request body cannot be read: its framing is broken.", code="invalid_body") from None
    current_call().body_bytes = len(body)
    return await decode(body, kind, state)


async def _read(request: web.Request, limits: Limits) -> bytearray:
    """The whole body, unless it grows too large, too slowly or in too many pieces."""
    body = bytearray()  # grows without copies; joining the parts of a large body would be one
    if not request.body_exists:  # aiohttp's empty body yields chunks without end
        return body
    loop = asyncio.get_running_loop()
    start = loop.time()
    chunks = 0
    while True:
        data, chunk_ended = await request.content.readchunk()
        if not data and not chunk_ended:
            return body
        body += data
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits.max_body_bytes)
        if chunk_ended:
            chunks += 1
            if chunks > limits.max_body_chunks:
                raise ApiError(413, f"The request body comes in more than {limits.max_body_chunks} chunks.")
            if chunks % _CHUNKS_A_TURN == 0:
                await asyncio.sleep(0)
        seconds = loop.time() - start
        if seconds > _FREE_SECONDS and len(body) < limits.min_body_rate * seconds:
            raise TimeoutError


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes, the most this server accepts.")
