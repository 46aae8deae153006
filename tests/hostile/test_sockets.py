"""HTTP and sockets: rows A of the catalogue. A row is sent 20 times unless it says how often."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from contextlib import suppress

import pytest
from harness import (
    ANSWER_WITHIN_S,
    CHAT,
    COMPLETIONS,
    HEADER_TIMEOUT_S,
    REPEATS,
    Target,
    check,
    get,
    parse,
    post,
    read_all,
)
from ledger import Ledger

from server_fixtures import ServerProcess

BODY = json.dumps({"prompt": "x", "max_tokens": 2}).encode()
JSON = "Content-Type: application/json"
CHUNKED = ("Transfer-Encoding: chunked", JSON)
BAD = (400,)
# Where the server may also reset the connection because it stops reading.
BAD_OR_RESET = (0, 400, 413, 431)


def length(value: str) -> bytes:
    return post(COMPLETIONS, BODY, JSON, f"Content-Length: {value}")


def chunk(size: str) -> bytes:
    return post(COMPLETIONS, size.encode() + b"\r\nx\r\n", *CHUNKED)


ROWS: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("A1 random bytes", os.urandom(4096).replace(b"\n", b"") + b"\r\n\r\n", BAD),
    ("A2 http2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    ("A4 header of 1 MB", get("/live", "X: " + "a" * 1_000_000), BAD_OR_RESET),
    ("A5 1000 headers", get("/live", *(f"X-{i}: 1" for i in range(1000))), BAD),
    *((f"A11 length {v!r}", length(v), BAD) for v in ("-1", "+5", "1_0", "0x10", "5,5", "", "9" * 20)),
    ("A13 two lengths", post(COMPLETIONS, BODY, JSON, "Content-Length: 30", "Content-Length: 31"), BAD),
    ("A13 length and chunks", post(COMPLETIONS, b"0\r\n\r\n", *CHUNKED, "Content-Length: 5"), BAD),
    ("A14 two hosts", get("/live", "Host: b"), BAD),
    ("A16 two types", post(COMPLETIONS, BODY, JSON, JSON, f"Content-Length: {len(BODY)}"), BAD),
    *((f"A17 chunk size {v!r}", chunk(v), BAD) for v in ("zz", "-1", " 5", "5 ;x", "f" * 20)),
    ("A25 NUL in a header", get("/live", "X: a\x00b"), BAD),
    ("A25 CR in a header", get("/live", "X: a\rb"), BAD),
    ("A25 0x01 in a header", get("/live", "X: a\x01b"), BAD),
    ("A29 unknown Expect", get("/live", "Expect: miracles"), (417,)),
    *((f"A31 {p}", get(p), (404, 400)) for p in ("/../../etc/passwd", "/v1/%2e%2e/x", "//v1/models", "/V1/models")),
    *((f"A31 {p}", get(p), (404, 400)) for p in ("/v1%2fchat", "/v1/models/", "/%00", "/v1/models/../../x")),
    ("A31 NUL in the path", get("/v1\x00"), (400, 404)),
    *(
        (f"A32 {method} {path}", request(path), (404, 405))
        for path in "/invocations /pause /collective_rpc /update_weights /shutdown /abort_requests /flush_cache /slots "
        "/debug /docs /reset_prefix_cache /admin/drain".split()
        for method, request in (("GET", get), ("POST", lambda p: post(p, b"{}")))
    ),
    (
        "A34 multipart",
        post(COMPLETIONS, b"x", "Content-Type: multipart/form-data; boundary=x", "Content-Length: 1"),
        (415,),
    ),
    (
        "A34 urlencoded",
        post(COMPLETIONS, b"x", "Content-Type: application/x-www-form-urlencoded", "Content-Length: 1"),
        (415,),
    ),
    ("A35 no type", post(COMPLETIONS, BODY, f"Content-Length: {len(BODY)}"), (200,)),
    ("A35 text", post(COMPLETIONS, BODY, "Content-Type: text/plain", f"Content-Length: {len(BODY)}"), (415,)),
    ("A35 utf-16", post(COMPLETIONS, BODY, JSON + "; charset=utf-16", f"Content-Length: {len(BODY)}"), (415,)),
    ("A43 query of 1 MB", get("/live?" + "a" * 1_000_000), BAD_OR_RESET),
    ("A43 path of 1 MB", get("/" + "a" * 1_000_000), BAD_OR_RESET),
    ("tls hello", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(100), BAD),
    ("no host", b"GET /live HTTP/1.1\r\n\r\n", BAD),
    ("line feeds only", b"GET /live HTTP/1.1\nHost: a\n\n", BAD),
    ("unknown method", b"SMASH /live HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("port that cannot be", b"GET http://a:99999/live HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    ("folded header", get("/live", "X: a\r\n b"), (200, 400)),
]


@pytest.mark.parametrize("name, data, statuses", ROWS, ids=[row[0] for row in ROWS])
def test_bytes(target: Target, name: str, data: bytes, statuses: tuple[int, ...]) -> None:
    with target.undisturbed():
        for _ in range(REPEATS):
            start = time.monotonic()
            check(target.raw(data), statuses)
            assert time.monotonic() - start < ANSWER_WITHIN_S + 2, "no answer in time"


def test_a7_slow_heads_are_cut_off_and_slow_nobody(target: Target) -> None:
    """Once, with 500 connections that send a byte now and then: it waits for a time limit, which no byte may renew."""
    with target.undisturbed():
        loris = {}
        closed = select.poll()
        for _ in range(500):
            sock = target.connect()
            sock.sendall(b"GET /live HTTP/1.1\r\nX: ")
            loris[sock.fileno()] = sock
            closed.register(sock, select.POLLIN)
        deadline = time.monotonic() + 5 * HEADER_TIMEOUT_S
        while loris:
            start = time.monotonic()
            assert target.ask("GET", "/live").status == 200 and time.monotonic() - start < ANSWER_WITHIN_S
            assert start < deadline, f"{len(loris)} slow connections are still open"
            for number, _ in closed.poll(100):
                closed.unregister(number)
                with loris.pop(number) as sock:
                    assert read_all(sock) == b""
            for sock in loris.values():
                with suppress(ConnectionError):
                    sock.send(b"a")


def test_a8_a41_1000_idle_sockets_do_not_slow_a_new_request(target: Target) -> None:
    """Once, half of them silent from the start and half after a request."""
    with target.undisturbed():
        idle = [target.connect() for _ in range(1000)]
        for sock in idle[::2]:
            sock.sendall(get("/live", close=False))
        for _ in range(REPEATS):
            start = time.monotonic()
            check(target.ask("POST", COMPLETIONS, BODY), (200,))
            assert time.monotonic() - start < ANSWER_WITHIN_S
        for sock in idle:
            sock.close()


@pytest.mark.parametrize("half_close", [True, False])
def test_a10_a20_body_that_ends_too_early(target: Target, half_close: bool) -> None:
    """Without the half-close it waits for the body's time limit: once."""
    short = post(COMPLETIONS, b"{", JSON, "Content-Length: 1000")
    unfinished = post(COMPLETIONS, b"5\r\n{    \r\n", *CHUNKED)
    with target.undisturbed():
        for _ in range(REPEATS if half_close else 1):
            socks = [target.connect() for _ in range(2)]
            for sock, data in zip(socks, (short, unfinished), strict=True):
                sock.sendall(data)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            for sock in socks:
                check(parse(read_all(sock)), (0, 400) if half_close else (408,))
                sock.close()


def test_a19_million_chunks_of_a_byte(target: Target) -> None:
    """Once: a million chunks take a while to send."""
    body = b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n"
    with target.undisturbed():
        check(target.raw(post(COMPLETIONS, body, *CHUNKED)), (0, 408, 413))


def test_a22_pipelined_requests_are_answered_in_order(target: Target) -> None:
    one = [get("/live", f"X-Request-Id: r{i}", close=i == 19) for i in range(20)]
    with target.undisturbed():
        for _ in range(REPEATS):
            with target.connect() as sock:
                sock.sendall(b"".join(one))
                lines = read_all(sock).decode().lower().split("\r\n")
            ids = [line.split(": ")[1] for line in lines if line.startswith("x-request-id")]
            assert ids == [f"r{i}" for i in range(20)]


def test_a23_flood_of_pipelined_requests_whose_answers_nobody_reads(target: Target) -> None:
    """3 times."""
    with target.undisturbed():
        for _ in range(3):
            with target.connect(timeout=0.3) as sock, suppress(OSError):
                sock.sendall(get("/metrics", close=False) * 100_000)
    target.check_memory()


def test_a26_bytes_that_are_no_text_in_a_key(keyed: Target) -> None:
    for value in (b"Bearer \xff\xfe", "Bearer käse".encode(), b"Bearer " + b"a" * 8000, b"Bearer", b"\x80"):
        for _ in range(REPEATS):
            head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
            answer = keyed.raw(head)
            check(answer, (401,))
            assert KEY not in answer.body
    assert not any(KEY.decode() in line for line in keyed.process.lines)


@pytest.mark.parametrize("path", ["/shutdown", "/collective_rpc", "/v1/models", "/metrics", "/stats", "/nope", "/.env"])
def test_a31_a32_without_a_key_every_path_is_a_401(keyed: Target, path: str) -> None:
    for _ in range(REPEATS):
        check(keyed.raw(get(path)), (401,))
        check(keyed.raw(post(path, b"{}")), (401,))


KEY = b"sk-canary-of-the-key"


@pytest.fixture(scope="module")
def keyed():
    running = KeyedTarget()
    yield running
    running.process.stop()


class KeyedTarget(Target):
    """With a key, and without the checks that ask without one."""

    def __init__(self) -> None:
        self.process = ServerProcess("fastllm.server", FASTLLM_API_KEY=KEY.decode())
        self.process.wait_ready()
        self.ledger = Ledger(self.process.lines)
        self.sent = 0
        self.port = int(self.process.url.rsplit(":", 1)[1])


@pytest.mark.parametrize(
    "host, origin",
    [
        ("evil.example", "Origin: http://evil.example"),
        ("evil.example", "X: no origin"),
        ("127.0.0.1", "Origin: http://evil.example"),
        ("localhost", "Origin: null"),
        ("localhost@evil.example", "Origin: https://localhost.evil.example"),
    ],
)
def test_a28_page_of_another_site(target: Target, host: str, origin: str) -> None:
    """It posts across origins without a preflight, or had its name rebound to this machine."""
    for path in (COMPLETIONS, CHAT, "/v1/nowhere"):
        head = post(path, BODY, origin, f"Content-Length: {len(BODY)}").replace(b"Host: a", f"Host: {host}".encode())
        with target.undisturbed():
            for _ in range(REPEATS):
                check(target.raw(head), (403,))
    for path in ("/stats", "/v1/models", "/metrics"):
        check(target.raw(get(path, origin).replace(b"Host: a", f"Host: {host}".encode())), (403,))


def test_a29_body_that_is_waited_for_in_vain(target: Target) -> None:
    """Once: it waits for the body's time limit."""
    head = post(COMPLETIONS, b"", JSON, "Content-Length: 100", "Expect: 100-continue")
    with target.undisturbed():
        with target.connect() as sock:
            sock.sendall(head)
            data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        check(parse(data), (408,))


def test_a37_client_that_closes_its_side_after_the_request_is_served_or_cancelled(target: Target) -> None:
    with target.undisturbed():
        for _ in range(REPEATS):
            check(target.raw(post(COMPLETIONS, BODY), half_close=True), (0, 200))


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1, 200, 2000])
def test_a38_reset_at_any_byte_of_the_answer(target: Target, stream: bool, after: int) -> None:
    long = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    request = post(COMPLETIONS, json.dumps(long).encode())
    with target.undisturbed():
        for _ in range(REPEATS):
            sock = target.connect()
            sock.sendall(request)
            if stream:
                left = after
                while left > 0 and (data := sock.recv(left)):
                    left -= len(data)
            reset(sock)
        start = time.monotonic()
        target.wait_idle()
        assert time.monotonic() - start < 2


def test_a38_reset_at_any_byte_of_the_request(target: Target) -> None:
    request = post(CHAT, json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 500}).encode())
    with target.undisturbed():
        for end in range(1, len(request), 7):
            sock = target.connect()
            sock.sendall(request[:end])
            reset(sock)


def test_a40_client_that_stops_reading_its_stream(target: Target) -> None:
    """Once, with 2 clients: it waits for the write's time limit."""
    long = {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True, "logprobs": 5}
    stuck = []
    with target.undisturbed():
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", target.port))
            sock.sendall(post(COMPLETIONS, json.dumps(long).encode(), close=False) * 4)
            stuck.append(sock)
        for sock in stuck:
            hung_up = select.poll()
            hung_up.register(sock, 0)
            assert hung_up.poll(30_000), "the server still waits for a client that reads nothing"
    for sock in stuck:
        sock.close()
    target.check_memory()


A44 = ["a\x1b[31mb", "../../etc", "a" * 129, "a b", 'x"}\\n', "é", "<script>"]


@pytest.mark.parametrize("given", A44, ids=range(len(A44)))
def test_a44_request_id_that_is_not_harmless_is_replaced(target: Target, given: str) -> None:
    with target.undisturbed():
        for _ in range(REPEATS):
            answer = target.raw(get("/v1/models", f"X-Request-Id: {given}"))
            check(answer, (200, 400))
            assert answer.headers["X-Request-Id"] != given and answer.headers["X-Request-Id"].isalnum()


def test_a44_d4_one_request_id_for_many_at_once(target: Target) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 50, "ignore_eos": True}).encode()
    request = post(COMPLETIONS, body, JSON, f"Content-Length: {len(body)}", "X-Request-Id: same")
    with target.undisturbed():
        socks = [target.connect() for _ in range(REPEATS)]
        for sock in socks:
            sock.sendall(request)
        for sock in socks:
            answer = parse(read_all(sock))
            check(answer, (200,))
            assert answer.headers["X-Request-Id"] == "same"
            assert json.loads(answer.body)["usage"]["completion_tokens"] == 50
            sock.close()
