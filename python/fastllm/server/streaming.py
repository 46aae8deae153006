"""Server-sent events: one `data:` line per chunk, an error event after the first byte, [DONE] only at a good end."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import msgspec
from aiohttp import web

from fastllm.server.call import current_call
from fastllm.server.connection import give_up
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
        self.silence_s = request.app[STATE_KEY].sse_keep_alive_s  # seconds until a comment is sent; 0: never
        self._written_at = 0.0  # of the event loop's clock
        self._keep_alive: asyncio.Task[None] | None = None
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
        """Idempotent."""
        if self._response.prepared:
            return
        await self._response.prepare(self._request)
        if self.silence_s:
            self._keep_alive = asyncio.create_task(self._break_silence())

    async def _break_silence(self) -> None:
        """Comments, which proxies see and clients skip, while there is nothing to say."""
        clock = asyncio.get_running_loop().time
        with suppress(ConnectionError):  # the handler finds out by itself
            while True:
                wait = self._written_at + self.silence_s - clock()
                if wait <= 0:
                    await self._write(b": keep-alive\n\n")
                    wait = self.silence_s
                await asyncio.sleep(wait)

    async def _end(self, data: bytes) -> web.StreamResponse:
        if self._keep_alive is not None:
            self._keep_alive.cancel()
        await self._write(data)
        await self._response.write_eof()
        return self._response

    async def send(self, *chunks: msgspec.Struct) -> None:
        """One write, and one packet while they fit, for all the chunks of an update."""
        await self._write(b"".join(b"data: %b\n\n" % _encode(chunk) for chunk in chunks))

    async def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        if self._keep_alive is not None:
            self._written_at = asyncio.get_running_loop().time()
        if transport.get_write_buffer_size() < _STALL_BYTES:
            await self._response.write(data)
            return
        try:
            async with time_limit(self._timeout):
                await self._response.write(data)
        except TimeoutError:
            give_up(transport)
            raise ConnectionResetError("the client stopped reading") from None

    async def fail(self, exc: Exception) -> web.StreamResponse:
        """The error as an event; no [DONE] follows, so no client takes the answer for complete."""
        return await self._end(b"data: %b\n\n" % as_api_error(exc).payload())

    async def done(self) -> web.StreamResponse:
        return await self._end(b"data: [DONE]\n\n")


def as_api_error(exc: Exception) -> ApiError:
    """What the client may know of a failure after the first byte; the log gets the rest."""
    if isinstance(exc, ApiError):
        error = exc
    else:
        logger.error("request %s failed while streaming", current_request_id(), exc_info=exc)
        error = internal_error()
    current_call().error = error.without_frames()
    return error
