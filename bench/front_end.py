"""What the HTTP path carries: streams over loopback, and how long other requests wait meanwhile.

The server, here of the null model, and the clients share the machine's cores, as a user's would. Each stream is a plain
socket whose events are counted, not decoded, so that the client costs little; tokens are what the usage chunk says.

python bench/front_end.py --streams 256 --tokens 2000
FASTLLM_NULL_STEP_US=12000 python bench/front_end.py    # the pace of a real model: a token of each stream every 12 ms
python bench/front_end.py --port 8000 --model NAME --prompt-tokens 128 --tokens 256    # a server that runs already
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
from functools import partial

from common import percentile


class Stream(asyncio.Protocol):
    """One streamed completion: counts events, remembers when the first came and what the last said."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.events = 0
        self.first = 0.0
        self.tail = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.start = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        found = data.count(b"data: {")
        if found and not self.events:
            self.first = time.perf_counter() - self.start
        self.events += found
        self.tail = (self.tail + data)[-1024:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    @property
    def tokens(self) -> int:
        match = re.search(rb'"completion_tokens":(\d+)', self.tail)
        if match is None or b"[DONE]" not in self.tail:
            raise SystemExit(f"a stream broke off: {self.tail[-300:]!r}")
        return int(match[1])


def request_bytes(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


async def probe(port: int, lags: list[float], stop: asyncio.Event) -> None:
    """What a small request waits while the streams run, seconds."""
    while not stop.is_set():
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /live HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        lags.append(time.perf_counter() - start)
        await asyncio.sleep(0.02)


def loop_lags(port: int) -> dict[float, int]:
    """How often the event loop was late by at most so many seconds, of the ticks it has counted so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r'fastllm:event_loop_lag_seconds_bucket\{le="([^"]+)"[^}]*\} (\S+)', text)
    return {float(bound): int(float(count)) for bound, count in found}


def cpu_seconds(pid: int | None) -> float:
    """Of the process and all its threads so far; Linux. Zero for a server that is not ours."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(server: int | None, port: int, args: argparse.Namespace) -> dict[str, float]:
    body: dict[str, object] = {
        "model": args.model,
        "stream": True,
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    if args.chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Hello there"}]
    else:
        path = "/v1/completions"
    rng = random.Random(args.seed)

    def request() -> bytes:
        if not args.chat:
            body["prompt"] = [rng.randrange(100, 200) for _ in range(args.prompt_tokens)]
        return request_bytes(path, body)

    loop = asyncio.get_running_loop()
    lags: list[float] = []
    stop = asyncio.Event()
    probing = asyncio.create_task(probe(port, lags, stop))
    requests = [request() for _ in range(args.streams)]
    before = await asyncio.to_thread(loop_lags, port)
    start, cpu = time.perf_counter(), cpu_seconds(server)
    streams = [(await loop.create_connection(partial(Stream, data), "127.0.0.1", port))[1] for data in requests]
    await asyncio.gather(*(stream.done for stream in streams))
    seconds, cpu = time.perf_counter() - start, cpu_seconds(server) - cpu
    stop.set()
    await probing
    ticks = {bound: count - before[bound] for bound, count in (await asyncio.to_thread(loop_lags, port)).items()}
    counted = ticks[math.inf] or math.nan  # none: it was over before the first
    tokens, events = sum(s.tokens for s in streams), sum(s.events for s in streams)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "events_per_s": events / seconds,
        "tokens_per_event": tokens / events,
        "server_us_per_event": cpu / events * 1e6,
        "first_event_p99_ms": percentile([s.first for s in streams], 0.99) * 1e3,
        "loop_within_10ms_percent": ticks[0.01] / counted * 100,
        "loop_within_20ms_percent": ticks[0.02] / counted * 100,
        "live_p50_ms": percentile(lags, 0.5) * 1e3,
        "live_p99_ms": percentile(lags, 0.99) * 1e3,
    }


def start_server(extra: list[str]) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "fastllm.server", "--model", "null", "--port", "0", "--disable-log-requests"]
    server = subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if match := re.search(r"http://[\d.]+:(\d+)", line):
            port = int(match[1])
            break
    else:
        raise SystemExit("the server did not start")
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return server, port
        except OSError:
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2000, help="of each stream")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of each stream, random ids; not with --chat")
    parser.add_argument("--port", type=int, help="of a server that runs already")
    parser.add_argument("--model", default="null", help="its model's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="passed on, last")
    args = parser.parse_args()
    if args.port:
        runs = [asyncio.run(load(None, args.port, args)) for _ in range(args.repeats)]
    else:
        server, port = start_server(["--max-num-seqs", str(args.streams), *args.server_args])
        try:
            runs = [asyncio.run(load(server.pid, port, args)) for _ in range(args.repeats)]
        finally:
            server.terminate()
            server.communicate(timeout=60)
    for run in runs:
        print("  ".join(f"{name} {value:,.1f}" for name, value in run.items()))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(runs, file, indent=2)


if __name__ == "__main__":
    main()
