"""A real server over the null model, inside the test process or in its own, and the few questions tests ask it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp

from fastllm.async_llm import AsyncLLM
from fastllm.engine_args import EngineArgs
from fastllm.server.app import Server
from fastllm.server.state import ServerState

T = TypeVar("T")
CONTEXT = 32768  # tokens: long enough that no stream of a test ends before the test ends it


class Reply:
    """An answer read to its end."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The decoded chunks of a stream, which must be well formed and end with [DONE]."""
        parts = self.body.decode("utf-8").split("\n\n")
        assert parts.pop() == "", "the stream must end with an empty line"
        assert all(part.startswith("data: ") for part in parts)
        assert parts.pop() == "data: [DONE]"
        return [json.loads(part[6:]) for part in parts]


class RunningServer:
    """Owns a thread with an event loop; every method may be called from the test's thread."""

    def __init__(self, load: Callable[[], AsyncLLM], *, root_path: str = "", **state: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.state: ServerState = None  # type: ignore[assignment]
        self.server: Server = None  # type: ignore[assignment]
        self.port = self.run(self._start(load, root_path, state))
        self.url = f"http://127.0.0.1:{self.port}"

    async def _start(self, load: Callable[[], AsyncLLM], root_path: str, state: dict[str, Any]) -> int:
        self.state = ServerState(**state)
        self.server = Server(self.state, load, root_path=root_path)
        return await self.server.listen("127.0.0.1", 0)

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def load(self) -> None:
        self.run(self.server.load())

    def close(self) -> None:
        self.run(self.server.stop(5.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # ---- requests

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        """One request on a connection of its own. `body`: bytes as they are, anything else as JSON."""

        async def once() -> Reply:
            async with aiohttp.ClientSession() as session:
                return await ask(session, method, self.url + path, body, **options)

        return asyncio.run(once())

    def complete(self, **fields: Any) -> Reply:
        return self.ask("POST", "/v1/completions", {"model": "null", "prompt": "Hello", **fields})

    def chat(self, **fields: Any) -> Reply:
        messages = [{"role": "user", "content": "Hello"}]
        return self.ask("POST", "/v1/chat/completions", {"model": "null", "messages": messages, **fields})

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.ask("GET", "/metrics").body.decode(), name, **labels)

    # ---- what must hold after everything

    def wait_idle(self, timeout: float = 10.0) -> None:
        """Returns once nothing runs and no KV block is in use; fails after `timeout` seconds."""

        def busy() -> str:
            stats = self.state.llm.stats()
            counts = {
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "used blocks": stats.used_blocks,
                "accepted": self.state.active_requests,
                "sequences": self.state.active_sequences,
                "leaks": stats.block_leaks,
            }
            return ", ".join(f"{value} {name}" for name, value in counts.items() if value)

        wait_until(lambda: not busy(), timeout, busy)

    def check_alive(self) -> None:
        """Healthy, takes a normal request, and gives back what it used."""
        assert self.ask("GET", "/health").status == 200
        reply = self.complete(max_tokens=4, ignore_eos=True, temperature=0)
        assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 4
        self.wait_idle()


async def ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None, **options: Any) -> Reply:
    if body is not None:
        options["data"] = body if isinstance(body, bytes) else json.dumps(body).encode()
        options["headers"] = {"Content-Type": "application/json"} | options.get("headers", {})
    async with session.request(method, url, **options) as response:
        return Reply(response.status, response.headers, await response.read())


def wait_until(condition: Callable[[], bool], timeout: float, explain: Callable[[], str] = str) -> None:
    """Polls a condition that another thread will make true."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout} s: {explain()}"
        time.sleep(0.005)


def metric(text: str, name: str, **labels: str) -> float:
    """The value of one sample of a Prometheus text."""
    for line in text.splitlines():
        if line.startswith((name + "{", name + " ")) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{name} {labels} is not exposed")


def load_null(**args: Any) -> Callable[[], AsyncLLM]:
    settings = {
        "model": "null",
        "max_model_len": CONTEXT,
        "num_gpu_blocks_override": 4096,
        "check_invariants": True,
        **args,
    }
    return lambda: AsyncLLM.from_engine_args(EngineArgs(**settings))


@contextmanager
def running_server(engine: dict[str, Any] | None = None, **state: Any) -> Iterator[RunningServer]:
    server = RunningServer(load_null(**(engine or {})), log_requests=False, **state)
    try:
        server.load()
        yield server
    finally:
        server.close()


class ServerProcess:
    """`python -m MODULE --model null` on a free port, in its own process."""

    def __init__(self, module: str, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", module, "--model", "null", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def wait_ready(self) -> None:
        wait_until(lambda: any(line.startswith("ready") for line in self.lines), 60, lambda: "\n".join(self.lines))
        line = next(line for line in self.lines if line.startswith("ready"))
        self.url = re.search(r"http://\S+", line)[0].removesuffix("/v1")  # type: ignore[index]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
