"""Server-sent events: one `data:` line per chunk, an error event after the first byte, [DONE] only at a good end."""

from __future__ import annotations

import logging

import msgspec
from aiohttp import web

from fastllm.server.deadline import time_limit
from fastllm.server.errors import ApiError, internal_error
from fastllm.server.middleware import current_request_id
from fastllm.server.state import STATE_KEY

logger = logging.getLogger("fastllm.server")

_encode = msgspec.json.Encoder().encode
# A client that reads never has this much waiting; one that does not is given `write_timeout_s`.
_STALL_BYTES = 64 << 10


class EventStream:
    """Owned by one handler. `open` sends the headers; leaving it without `done` tells the client that it failed."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._timeout = request.app[STATE_KEY].limits.write_timeout_s
        self._response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": current_request_id(),
            }
        )

    async def open(self) -> None:
        await self._response.prepare(self._request)

    async def send(self, *chunks: msgspec.Struct) -> None:
        """One write, and one packet while they fit, for all the chunks of an update."""
        await self._write(b"".join(b"data: %b\n\n" % _encode(chunk) for chunk in chunks))

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if transport.get_write_buffer_size() < _STALL_BYTES:
            await self._response.write(data)
            return
        try:
            async with time_limit(self._timeout):
                await self._response.write(data)
        except TimeoutError:
            transport.abort()
            raise ConnectionResetError("the client stopped reading") from None

    async def fail(self, exc: Exception) -> web.StreamResponse:
        """The error as an event; no [DONE] follows, so no client takes the answer for complete."""
        if not isinstance(exc, ApiError):
            logger.error("request %s failed while streaming", current_request_id(), exc_info=exc)
            exc = internal_error()
        await self._write(b"data: %b\n\n" % exc.payload())
        await self._response.write_eof()
        return self._response

    async def done(self) -> web.StreamResponse:
        await self._write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response
