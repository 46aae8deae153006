"""A server in a process of its own, rows of bad input sent to it 20 times each, and what must hold after every row.

Beside each row eight valid streams run, whose tokens must be those of a quiet server. After it the server is healthy
and ready within a second, runs and holds nothing, has as many threads, files and processes as before in the same
process, and answers the golden prompt as before. Every refusal has a line in the log with its id, status and reason,
and is counted under that reason. No answer may show anything of the server's inside or of the streams' prompts.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from ledger import Ledger

from server_fixtures import ServerProcess, wait_until

T = TypeVar("T")
SLOW = pytest.mark.skipif(
    os.environ.get("FASTLLM_SLOW_TESTS") != "1", reason="slow; set FASTLLM_SLOW_TESTS=1 to run it"
)
REPEATS = 20
STREAMS = 8
ANSWER_WITHIN_S = 1.0  # after the last byte was sent
TEMPLATE_WORKERS = 2  # processes, with two pipes each
SPARE_THREADS = 5  # of the pools for texts and grammars, whose further workers start when several are needed at once
LOOP_LAG_S = 0.1  # of the loop's own work, in a row
HEADER_TIMEOUT_S = 2
CANARY = "canary-7f3a"  # in the prompts of the streams
LEAKS = (b"Traceback", b"site-packages", b"/home", b'.py"', b"0x7f", CANARY.encode())
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
FLAGS = (
    *("--max-model-len", "8192", "--num-gpu-blocks-override", "4096", "--max-num-seqs", "32", "--check-invariants"),
    *("--max-body-bytes", str(2 << 20), "--body-timeout", "2", "--header-timeout", str(HEADER_TIMEOUT_S)),
    *("--keepalive-timeout", "10", "--write-timeout", "1"),
    *("--disable-uvicorn-access-log", "--log-lines-per-second", "0"),
)


class Answer:
    """What came back on a connection: status 0 if it was closed without an answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error


class Target:
    """The server under attack. One test at a time."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.process = ServerProcess("fastllm.server", *FLAGS, *flags, **environment)
        self.process.wait_ready()
        self.ledger = Ledger(self.process.lines)
        self.port = int(self.process.url.rsplit(":", 1)[1])
        self.pid = self.process.process.pid
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.sent = 0  # requests
        self._connection: http.client.HTTPConnection | None = None
        self.golden = [self._tokens_of(i) for i in range(STREAMS)]
        self.run(self._streams())  # every thread that serving takes is there from now on
        self.ask("POST", COMPLETIONS, {"prompt": "a", "max_tokens": 1, "response_format": {"type": "json_object"}})
        for size in (5000, 1 << 20, 1 << 20):  # memory that large bodies take once stays with the process
            self.ask("POST", COMPLETIONS, {"prompt": " " * size, "max_tokens": 1})
            self.ask("POST", COMPLETIONS, {"prompt": ["a"] * (size // 5), "max_tokens": 1})
            self.ask("POST", COMPLETIONS, {"prompt": [[1]] * (size // 5), "max_tokens": 1})
        for _ in range(16):  # each of the threads that look at long texts once, whichever takes one
            self.ask("POST", COMPLETIONS, {"prompt": "\U0001f600" * 100_000, "max_tokens": 1})
        self.close_connection()
        self.wait_idle()
        self.threads = self._threads() + SPARE_THREADS
        self.files = self._files()
        self.rss = self._rss()

    def stop(self) -> None:
        self.close_connection()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self.process.stop()

    # ---- asking

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One well-formed request on a connection that is kept. `body`: bytes as they are, anything else as JSON."""
        self.sent += 1
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        given = {"Content-Type": "application/json"} if data is not None else {}
        try:
            self._connection.request(method, path, data, given | (headers or {}))
            response = self._connection.getresponse()
            answer = Answer(response.status, dict(response.headers.items()), response.read())
        except (ConnectionError, http.client.HTTPException):  # closed while idle, or in the middle of a large body
            self.close_connection()
            return Answer(0, {}, b"")
        if response.will_close:
            self.close_connection()
        return self._noted(answer)

    def close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def raw(self, *parts: bytes, half_close: bool = False, timeout: float = 20) -> Answer:
        """Sends bytes as they are and reads until the server closes; the first answer of what came."""
        self.sent += 1
        with self.connect(timeout) as sock:
            with suppress(ConnectionError):
                for part in parts:
                    sock.sendall(part)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            return self._noted(parse(read_all(sock)))

    def _noted(self, answer: Answer) -> Answer:
        if answer.status >= 400 and b'"error"' in answer.body:
            error = json.loads(answer.body)["error"]
            if "code" in error:  # /v1/messages has none
                self.ledger.saw(answer.headers["X-Request-Id"], answer.status, error["code"] or error["type"])
        return answer

    def connect(self, timeout: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = json.loads(self.ask("GET", "/stats").body or b"null") or self.stats()
        return stats

    # ---- what must hold

    @contextmanager
    def undisturbed(self, throughout: bool = False) -> Iterator[None]:
        """Streams beside the block, and every check after it. throughout: they start anew until the block ends."""
        lag = self.stats()["max_loop_work_s"]
        done = threading.Event()

        async def beside() -> list[list[int]]:
            ids = await self._streams()
            while throughout and not done.is_set() and ids == self.golden:
                ids = await self._streams()
            return ids

        streams = asyncio.run_coroutine_threadsafe(beside(), self._loop)
        try:
            yield
        finally:
            done.set()
        assert streams.result(60) == self.golden, "a stream beside got other tokens"
        self.check_well(lag)

    def check_well(self, lag_before: float = 0.0) -> None:
        self.close_connection()  # which may have been idle for too long
        for path in ("/health", "/ready"):
            start = time.monotonic()
            assert self.ask("GET", path).status == 200 and time.monotonic() - start < ANSWER_WITHIN_S, path
        assert self._tokens_of(0) == self.golden[0], "the golden prompt has another answer"
        self.wait_idle()
        lag = self.stats()["max_loop_work_s"]
        assert lag <= max(LOOP_LAG_S, lag_before), f"the event loop was late by {lag} s"
        self.close_connection()
        wait_until(lambda: self._files() <= self.files, 5, lambda: f"{self._files()} files of {self.files}")
        assert self._children() <= TEMPLATE_WORKERS, "processes were left behind"
        wait_until(lambda: self._threads() <= self.threads, 5, lambda: f"{self._threads()} threads of {self.threads}")
        assert self.process.process.poll() is None
        self._check_ledger()
        assert not any("Traceback" in line for line in self.process.lines), "\n".join(self.process.lines)

    def _check_ledger(self) -> None:
        def missing() -> str:
            return self.ledger.missing(self.ask("GET", "/metrics").body.decode())

        wait_until(lambda: not missing(), 5, missing)

    def wait_idle(self) -> None:
        def busy() -> str:
            stats = self.stats()
            engine = stats["engine"]
            counts = {name: engine[name] for name in ("num_running", "num_waiting", "used_blocks", "block_leaks")}
            counts |= {name: stats[name] for name in ("active_requests", "active_sequences", "queued_sequences")}
            return ", ".join(f"{value} {name}" for name, value in counts.items() if value)

        wait_until(lambda: not busy(), 10, busy)

    def check_memory(self) -> None:
        """A part for what 1,000 connections and the largest bodies take once, and one for each request."""
        allowed = (24 << 20) + self.sent * (1 << 20) // 1000
        grown = self._rss() - self.rss
        print(f"the server grew by {grown / 2**20:.1f} MiB in {self.sent} requests")
        assert grown < allowed

    def settle(self) -> int:
        """Takes the memory as it is for what the process needs. Returns by how many bytes it has grown."""
        grown = self._rss() - self.rss
        self.rss += grown
        return grown

    def _tokens_of(self, number: int) -> list[int]:
        answer = self.ask("POST", COMPLETIONS, golden(number, stream=False))
        ids: list[int] = json.loads(answer.body)["choices"][0]["token_ids"]
        return ids

    async def _streams(self) -> list[list[int]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return await asyncio.gather(*(self._stream(session, number) for number in range(STREAMS)))

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> list[int]:
        url = f"http://127.0.0.1:{self.port}{COMPLETIONS}"
        ids: list[int] = []
        async with session.post(url, json=golden(number, stream=True)) as response:
            lines = [line async for line in response.content if line.startswith(b"data: ")]
        assert lines.pop() == b"data: [DONE]\n", "a stream beside was cut"
        for line in lines:
            ids += json.loads(line[6:])["choices"][0]["token_ids"]
        return ids

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60) -> T:
        """A coroutine, on the loop of the streams."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _files(self) -> int:
        """Without the two pipes to each of its processes."""
        return len(os.listdir(f"/proc/{self.pid}/fd")) - 2 * self._children()

    def _children(self) -> int:
        count = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(FileNotFoundError):  # a thread that ends just now
                count += len((task / "children").read_text().split())
        return count

    def _threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def _rss(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def golden(number: int, stream: bool) -> dict[str, Any]:
    prompt = f"{CANARY} {number}"
    fields = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": prompt, "stream": stream, **fields}


def read_all(sock: socket.socket) -> bytes:
    """What comes until the server closes; nothing if it resets the connection."""
    data = b""
    with suppress(ConnectionError):
        while more := sock.recv(1 << 16):
            data += more
    return data


def parse(data: bytes) -> Answer:
    """The first final answer among the bytes of a connection."""
    while data.startswith(b"HTTP/1.1 100"):
        data = data.partition(b"\r\n\r\n")[2]
    if not data.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")):
        assert not data, data[:200]
        return Answer(0, {}, b"")
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.title(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split(" ")[1]), headers, rest[: int(headers.get("Content-Length", len(rest)))])


def check(answer: Answer, statuses: tuple[int, ...], param: str | None = None) -> None:
    """One of the statuses (0: closed without an answer), in the one shape of errors, with an id and without leaks."""
    assert answer.status in statuses, (answer.status, answer.body[:300])
    assert not any(leak in answer.body for leak in LEAKS), answer.body[:300]
    if answer.status == 0:
        return
    assert {name.lower() for name in answer.headers} >= {"x-request-id"}, answer.headers
    if answer.status >= 400:
        assert len(answer.error["message"]) <= 500
        too_much = answer.error["message"].startswith("The request body has ")  # for which no field is to blame
        if param is not None and not too_much:
            assert answer.error["param"] == param, answer.error


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    """A whole request as bytes; `headers` replace Content-Type and Content-Length."""
    lines = headers or ("Content-Type: application/json", f"Content-Length: {len(body)}")
    end = ("Connection: close",) if close else ()
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: a", *lines, *end, "", "")).encode("latin-1") + body


def get(path: str, *headers: str, close: bool = True) -> bytes:
    end = ("Connection: close",) if close else ()
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: a", *headers, *end, "", "")).encode("latin-1")
