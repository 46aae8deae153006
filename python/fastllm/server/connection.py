"""One TCP connection: what its client gets when the bytes are no HTTP, or when they never come."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import struct
import uuid
from contextlib import suppress
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from fastllm.server.errors import ApiError, api_error, from_http_exception, internal_error
from fastllm.server.http_metrics import HttpMetrics
from fastllm.server.limits import Limits
from fastllm.server.refusals import line_fields, note_refusal
from fastllm.server.state import STATE_KEY

logger = logging.getLogger("fastllm.server")

_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s
_READ_BYTES = 64 << 10  # from a socket at once


def allow_open_files(count: int) -> None:
    """Raises the process's own limit towards `count`; the usual one is far below what a server needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < count:
        logger.warning("this process may open %d files only; lower --max-connections, or raise ulimit -n", wanted)


class Connections:
    """The open connections of one server, and which of them may stay when there are too many. Event loop only."""

    def __init__(self, limits: Limits, metrics: HttpMetrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._idle: dict[Connection, None] = {}  # in the order in which they fell idle
        self._open: set[Connection] = set()
        self._by_address: dict[str, set[Connection]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> bool:
        """False if there is no room for it, not even after closing the longest idle one."""
        address = connection.address
        peers = self._by_address.setdefault(address, set())
        per_address, in_all = self.limits.max_connections_per_address, self.limits.max_connections
        if per_address and len(peers) >= per_address and not self._close_idle(peers):
            return False
        if in_all and len(self._open) >= in_all and not self._close_idle(self._open):
            return False
        self._open.add(connection)
        peers.add(connection)
        self._by_address[address] = peers
        self._idle[connection] = None
        return True

    def _close_idle(self, among: set[Connection]) -> bool:
        victim = next((one for one in self._idle if one in among), None)
        if victim is None:
            return False
        self.remove(victim)
        victim.force_close()
        return True

    def set_idle(self, connection: Connection, idle: bool) -> None:
        self._idle.pop(connection, None)
        if idle and connection in self._open:
            self._idle[connection] = None

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        peers = self._by_address.get(connection.address)
        if peers is not None:
            peers.discard(connection)
            if not peers:
                del self._by_address[connection.address]


class Connection(web.RequestHandler):
    """aiohttp's protocol with our errors and time limits. Event loop only.

        connect -- head --> request -- body --> answer -- idle --> next head ...
           header_timeout     body_timeout       keepalive_timeout, and header_timeout from the first byte on
    While an answer waits for its reader, write_timeout runs.
    """

    __slots__ = ("_connections", "_head_timer", "_in_request", "_progress", "_write_timer", "address")

    def __init__(self, manager: web.Server, connections: Connections, **options: Any) -> None:
        super().__init__(manager, **options)
        self._connections = connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_request = False
        self._progress = 0  # what the client had taken when the timer was set
        self.address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        # A flood of tiny chunks is parsed in portions that do not hold up the loop.
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES
        super().connection_made(transport)
        if not self._connections.add(self):
            error = ApiError(503, "The server has as many connections as it takes.", code="too_many_connections")
            request_id = uuid.uuid4().hex
            self._note(error, request_id)
            if isinstance(transport, asyncio.WriteTransport):
                transport.write(_bare_response(error, request_id))
            self.force_close()
            return
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.remove(self)
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # After an answer the client may stay silent for the keep-alive time, but not dawdle over a head.
        if self._head_timer is None and not self._in_request:
            self._expect_head()

    def _expect_head(self) -> None:
        limit = self._connections.limits.header_timeout_s
        if limit:
            self._head_timer = asyncio.get_running_loop().call_later(limit, self.force_close)

    def request_began(self) -> None:
        """Its head is complete."""
        self._in_request = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._connections.set_idle(self, False)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Writes what the handler left to write; after that the connection is idle."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._in_request = False
            self._connections.set_idle(self, True)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_writing(self) -> None:
        limit = self._connections.limits.write_timeout_s
        if limit and self.transport is not None:
            self._progress = _taken(self.transport)
            self._write_timer = asyncio.get_running_loop().call_later(limit, self._check_writing)

    def _check_writing(self) -> None:
        """A slow reader is served on; one that took nothing in all this time is not."""
        if self.transport is None:
            return
        if _taken(self.transport) <= self._progress:
            give_up(self.transport)
        else:
            self._watch_writing()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """aiohttp's last resort. Reading the rest of a body after its client has gone is nobody's fault."""
        if self.transport is None and isinstance(kw.get("exc_info"), RuntimeError):
            logger.debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)

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
        else:
            error = internal_error()
            logger.error("request %s failed", request_id, exc_info=exc)
        self._note(error, request_id)
        response = error.response({"X-Request-Id": request_id, "Server": "fastllm"})
        response.force_close()
        return response

    def _note(self, error: ApiError, request_id: str) -> None:
        """Of bytes that became no request, so there is no method and no path."""
        note_refusal(self._connections.metrics, error, request_id, line_fields(self.address, "-", "-", error.status, 0))


def _not_http(status: int, exc: HttpProcessingError) -> ApiError:
    if isinstance(exc, LineTooLong):
        return ApiError(431, "The request line or one of the headers is longer than this server accepts.")
    # The parser's sentence goes on with the offending bytes; its first line is enough.
    reason = exc.message.partition("\n")[0].rstrip(":.")[:80]
    return ApiError(status, f"The request is not valid HTTP: {reason}.", code="invalid_http")


def give_up(transport: asyncio.Transport) -> None:
    """Closes a connection whose client reads nothing, together with what the kernel would go on keeping for it."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with suppress(OSError):  # closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def _taken(transport: asyncio.Transport) -> int:
    """Grows when the client takes bytes: those its TCP acknowledged, or where nobody counts, fewer that wait."""
    try:
        info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0])
    except (AttributeError, OSError, struct.error):
        return -transport.get_write_buffer_size()


def _bare_response(error: ApiError, request_id: str) -> bytes:
    """For a connection that gets no handler."""
    body = error.payload()
    head = (
        f"HTTP/1.1 {error.status} Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nX-Request-Id: {request_id}\r\nServer: fastllm\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


class _Server(web.Server):
    def __init__(self, handler: Any, connections: Connections, **options: Any) -> None:
        super().__init__(handler, **options)
        self._limited = connections

    def __call__(self) -> Connection:
        return Connection(self, self._limited, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """An AppRunner whose connections are ours: limited, and answered in JSON whatever they send."""

    def __init__(self, app: web.Application, limits: Limits, **options: Any) -> None:
        super().__init__(app, **options)
        self.open_connections = Connections(limits, app[STATE_KEY].http)

    async def _make_server(self) -> _Server:
        plain = await super()._make_server()
        metrics = self.open_connections.metrics

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            connection = request.protocol
            if not isinstance(connection, Connection):
                return await plain.request_handler(request)
            connection.request_began()
            try:
                return await plain.request_handler(request)
            except web.HTTPException as exc:  # raised before the middleware: an unknown Expect header
                response, request_id = from_http_exception(exc, request), uuid.uuid4().hex
                fields = line_fields(request.remote, request.method, request.path, exc.status, 0)
                note_refusal(metrics, api_error(exc, request), request_id, fields)
                response.headers["X-Request-Id"] = request_id
                return response

        return _Server(handle, self.open_connections, request_factory=plain.request_factory, **self._kwargs)
