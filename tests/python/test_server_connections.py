"""Connections: how many, how slow, how long; each limit with small numbers."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

import pytest

from fastllm.server import body as body_module
from fastllm.server.limits import Limits
from server_fixtures import CONTEXT, RunningServer, running_server, wait_until

LIVE = b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    with suppress(ConnectionError):
        while more := sock.recv(65536):
            data += more
    return data


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """One answer with a Content-Length; (0, b"") if the connection was closed instead."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return 0, b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(rest) < length:
        rest += sock.recv(65536)
    return int(head.split(b" ")[1]), rest


def stream_head(**fields: Any) -> bytes:
    fields = {"prompt": "x", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True, **fields}
    body = json.dumps(fields).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def open_connections(server: RunningServer) -> int:
    return len(server.server._runner.open_connections)


@pytest.mark.parametrize("first", [b"", LIVE])
def test_head_that_never_ends_is_cut_off_also_on_a_used_connection(first: bytes) -> None:
    with running_server(limits=Limits(header_timeout_s=0.15)) as server:
        loris = [connect(server) for _ in range(50)]
        for sock in loris:
            if first:
                sock.sendall(first)
                assert read_answer(sock)[0] == 200
            sock.sendall(b"GET /live HT")
        assert server.ask("GET", "/live").status == 200
        for sock in loris:
            assert read_all(sock) == b""
            sock.close()
        wait_until(lambda: open_connections(server) == 0, 5)


def test_connection_between_requests_may_be_silent_for_longer_than_a_head() -> None:
    with running_server(limits=Limits(header_timeout_s=0.05, keepalive_timeout_s=0.5)) as server:
        with connect(server) as sock:
            sock.sendall(LIVE)
            assert read_answer(sock)[0] == 200
            sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            sock.settimeout(5)
            sock.sendall(LIVE)
            assert read_answer(sock)[0] == 200


def test_body_that_trickles_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "_FREE_SECONDS", 0.02)
    with running_server() as server, connect(server) as sock:
        sock.sendall(POST + b"Content-Length: 100000\r\n\r\n")
        with suppress(ConnectionError, TimeoutError):
            while True:
                sock.sendall(b"{")
                sock.settimeout(0.01)
                with suppress(TimeoutError):
                    if answer := sock.recv(4096):
                        break
        assert answer.split(b" ")[1] == b"408"


def test_body_in_too_many_chunks_is_a_413() -> None:
    with running_server(limits=Limits(max_body_chunks=1000)) as server:
        for chunks, status in ((900, b"200"), (5000, b"413")):
            body = json.dumps({"prompt": "x", "max_tokens": 1}).ljust(chunks).encode()
            with connect(server) as sock:
                head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                with suppress(ConnectionError):
                    sock.sendall(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
                assert read_all(sock).split(b" ")[1] == status


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_address"])
def test_idle_connections_make_room_and_busy_ones_do_not(name: str) -> None:
    with running_server(limits=Limits(**{name: 4})) as server:  # type: ignore[arg-type]
        idle = [connect(server) for _ in range(4)]
        wait_until(lambda: open_connections(server) == 4, 5)
        assert server.ask("GET", "/live").status == 200
        assert read_all(idle[0]) == b"", "the longest idle one is closed"
        idle[3].sendall(LIVE)
        assert read_answer(idle[3])[0] == 200

        busy = [connect(server) for _ in range(4)]
        for sock in busy:
            sock.sendall(stream_head())
        wait_until(lambda: server.state.active_requests == 4, 5)
        with connect(server) as late:
            late.sendall(LIVE)
            answer = read_all(late)
            assert answer.split(b" ")[1] == b"503" and b"X-Request-Id" in answer and b"Retry-After" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        for sock in [*idle, *busy]:
            sock.close()
        server.wait_idle()
        wait_until(lambda: open_connections(server) == 0, 5)
        server.check_alive()


@pytest.mark.parametrize(
    "request_bytes", [stream_head(logprobs=20, max_tokens=16_000), b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 500]
)
def test_client_that_stops_reading_is_dropped(request_bytes: bytes) -> None:
    with running_server(limits=Limits(write_timeout_s=0.2)) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(request_bytes)
        wait_until(lambda: open_connections(server) == 1, 5)
        wait_until(lambda: open_connections(server) == 0, 20)
        server.wait_idle()
        sock.close()


def test_client_that_reads_slowly_is_served_to_the_end() -> None:
    with running_server(limits=Limits(write_timeout_s=0.3)) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.settimeout(10)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 99)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert read_all(sock).count(b"HTTP/1.1 200") == 100
        sock.close()


def test_too_many_headers_are_a_400(server: RunningServer) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: a\r\n" + b"".join(b"x-%d: 1\r\n" % i for i in range(1000)) + b"\r\n")
        answer = read_all(sock)
        assert answer.split(b" ")[1] == b"400" and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_flood_of_pipelined_requests_is_answered_in_order_with_bounded_memory(server: RunningServer) -> None:
    count = 5000

    async def work() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        flood = asyncio.ensure_future(_send(writer, LIVE * 100, count // 100))
        answers = 0
        while answers < count:
            data = await reader.readuntil(b'"alive"}')
            assert data.startswith(b"HTTP/1.1 200")
            answers += 1
        await flood
        writer.close()
        return answers

    assert asyncio.run(work()) == count


async def _send(writer: asyncio.StreamWriter, data: bytes, times: int) -> None:
    for _ in range(times):
        writer.write(data)
        await writer.drain()


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def loopback():
    with running_server(loopback_only=True) as running:
        yield running


@pytest.mark.parametrize(
    "host, origin, status",
    [
        ("evil.example:8000", "http://evil.example:8000", 403),  # a name that was rebound to this machine
        ("evil.example", "http://evil.example", 403),
        ("127.0.0.1.evil.example", "http://127.0.0.1.evil.example", 403),
        ("evil.example", None, 403),
        ("127.0.0.1:8000", "http://evil.example", 403),  # a page that posts across origins
        ("localhost:8000", "https://evil.example", 403),
        ("localhost:8000", "http://192.0.2.1", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "http://[", 403),
        ("[", None, 403),
        ("localhost:8000", None, 200),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "http://127.0.0.1:3000", 200),  # a program on this machine
        ("app.localhost", "http://app.localhost", 200),
        ("fastllm:8000", None, 200),  # a name among containers
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("192.0.2.1:8000", "http://192.0.2.1:8000", 200),  # no page has the address of another machine
        ("api.example", "https://api.example", 200),  # a proxy with a certificate in front
        ("localhost:8000", "vscode-webview://x", 200),  # no site
    ],
)
def test_pages_of_other_sites_are_refused(
    loopback: RunningServer, server: RunningServer, host: str, origin: str | None, status: int
) -> None:
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
    reply = loopback.ask("POST", "/v1/completions", body, headers=headers)
    assert reply.status == status
    assert status == 200 or reply.error["code"] == ("origin_not_allowed" if origin else "host_not_allowed")
    for path in ("/", "/health"):
        assert loopback.ask("GET", path, headers=headers).status == 200, "nothing to be learned there"
    assert server.ask("POST", "/v1/completions", body, headers=headers).status == 200
