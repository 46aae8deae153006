"""One TCP connection: what its client gets when the bytes are no HTTP, or when they never come."""

from __future__ import annotations

import asyncio
import logging
import uuid

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from fastllm.server.errors import ApiError, from_http_exception, internal_error

logger = logging.getLogger("fastllm.server")


class Connection(web.RequestHandler):
    """aiohttp's protocol with our errors. Event loop only."""

    __slots__ = ("_deadline",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # aiohttp's own timer starts after the first answer.
        self._deadline = asyncio.get_running_loop().call_later(self.keepalive_timeout, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def request_came(self) -> None:
        self._deadline.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what never reached a handler; the connection closes after it."""
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError("nobody can be told: the answer has begun or the client is gone") from exc
        request_id = uuid.uuid4().hex
        if isinstance(exc, HttpProcessingError):
            error = _not_http(status, exc)
            logger.info("refused bytes of %s that are no HTTP request: %s", request.remote, type(exc).__name__)
        else:
            error = internal_error()
            logger.error("request %s failed", request_id, exc_info=exc)
        response = error.response({"X-Request-Id": request_id, "Server": "fastllm"})
        response.force_close()
        return response


def _not_http(status: int, exc: HttpProcessingError) -> ApiError:
    if isinstance(exc, LineTooLong):
        return ApiError(431, "The request line or one of the headers is longer than this server accepts.")
    # The parser's sentence goes on with the offending bytes; its first line is enough.
    reason = exc.message.partition("\n")[0].rstrip(":.")[:80]
    return ApiError(status, f"The request is not valid HTTP: {reason}.", code="invalid_http")


class _Server(web.Server):
    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """An AppRunner whose connections are ours, so that every answer is JSON."""

    async def _make_server(self) -> _Server:
        plain = await super()._make_server()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if isinstance(request.protocol, Connection):
                request.protocol.request_came()
            try:
                return await plain.request_handler(request)
            except web.HTTPException as exc:  # raised before the middleware: an unknown Expect header
                return from_http_exception(exc, request)

        return _Server(handle, request_factory=plain.request_factory, **self._kwargs)
