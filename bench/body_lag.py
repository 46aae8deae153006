"""How long a large body, or a large answer, keeps the server's event loop from everybody else.

Sends each class of bodies to a server of the null model a few times, one after the other, and prints of each class the
median over its requests of
  work  the longest turn of the event loop, ms of its thread's processor time
  late  the most a timer of 1 ms came too late, ms: it also waits for other threads that hold the interpreter's lock,
        and for a processor, so it says something on a quiet machine only

python bench/body_lag.py
python bench/body_lag.py --only messages --repeats 20 --server-args --max-json-values 100000
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import socket
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
BYTES = 8_000_000  # of the largest bodies: the default limit is 8 MiB
CONTEXT = 131_072  # tokens
TEXTS = {
    "ascii": b"a cat sat. ",
    "cjk": "好好学习。".encode(),
    "escapes": b"\\u597d\\n",
    "mixed": b'a\\"\xf0\x9f\x98\x80',
}


def text_of(kind: str, size: int) -> bytes:
    return b'"' + TEXTS[kind] * (size // len(TEXTS[kind])) + b'"'


def around(path: str, text: bytes) -> bytes:
    """The smallest body of a path that carries this JSON string as its text."""
    message = b'[{"role":"user","content":%b}]' % text
    fields = {COMPLETIONS: b'"prompt":' + text, TOKENIZE: b'"prompt":' + text, RESPONSES: b'"input":' + text}
    fields[CHAT] = b'"messages":' + message
    fields[MESSAGES] = b'"max_tokens":1,"messages":' + message
    extra = b',"max_tokens":1' if path in (COMPLETIONS, CHAT) else b""
    return b"{%b%b}" % (fields[path], extra)


def ids(count: int, rng: random.Random) -> bytes:
    return b"[%b]" % b",".join([b"%d" % rng.randrange(256) for _ in range(1000)] * (count // 1000))


def many(item: bytes, count: int) -> bytes:
    return b"[%b]" % b",".join([item] * count)


def classes(rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body)"""
    yield "small prompt", COMPLETIONS, b'{"prompt":"hello","max_tokens":1}'
    for name, prompt in {
        "2 M ids": ids(2_000_000, rng),
        "32 prompts of 62 k ids": many(ids(62_000, rng), 32),
        "130 k ids": ids(130_000, rng),
        "1000 prompts of 1 k ids": many(ids(1000, rng), 1000),
        "2 M ids, then 1.5": ids(2_000_000, rng)[:-1] + b",1.5]",
        "2 M ids as 1.0": many(b"1.0", 2_000_000),
        "32 prompts of 250 kB": many(text_of("ascii", 250_000), 32),
        "100 k strings": many(b'"a"', 100_000),
        "8000 strings of 1 kB": many(text_of("cjk", 1000), 8000),
    }.items():
        yield name, COMPLETIONS, b'{"prompt":%b,"max_tokens":1}' % prompt
    for count, field, value in (
        (130_000, b"echo", b"true"),
        (130_000, b"return_token_ids", b"true"),
        (10_000, b"prompt_logprobs", b"1"),
    ):
        extra = b'"max_tokens":1,"%b":%b' % (field, value)
        yield f"{count} ids, {field.decode()}", COMPLETIONS, b'{"prompt":%b,%b}' % (ids(count, rng), extra)
    for path in (COMPLETIONS, CHAT, RESPONSES, MESSAGES, TOKENIZE):
        for kind in TEXTS:
            yield f"8 MB of {kind}", path, around(path, text_of(kind, BYTES))
        yield "2 MB of ascii", path, around(path, text_of("ascii", 2_000_000))
        yield "130 kB of ascii", path, around(path, text_of("ascii", 130_000))
        whole = around(path, b'"a"')[:-1]
        yield "unknown text", path, whole + b',"zz":%b}' % text_of("cjk", BYTES)
        yield "unknown numbers", path, whole + b',"zz":{"a":%b}}' % ids(2_000_000, rng)
        yield "unknown names", path, whole + b"".join(b',"z%d":1' % i for i in range(9000)) + b"}"
        yield "spaces", path, whole + b" " * BYTES + b"}"
        yield "an error at the end", path, whole + b',"zz":%b,}' % text_of("ascii", BYTES)
        yield "a wrong type at the end", path, whole + b',"zz":%b,"model":7}' % text_of("ascii", BYTES)
        yield "bad UTF-8 at the end", path, whole + b',"user":%b\xff"}' % text_of("ascii", BYTES)[:-1]
    for path, field in ((CHAT, b"messages"), (TOKENIZE, b"messages"), (RESPONSES, b"input"), (MESSAGES, b"messages")):
        extra = b',"max_tokens":1' if path in (CHAT, MESSAGES) else b""
        kind = b"input_text" if path == RESPONSES else b"text"
        for count in (5_000, 9_900, 100_000):
            message = b'{"role":"user","content":"a"}'
            yield f"{count} messages", path, b'{"%b":%b%b}' % (field, many(message, count), extra)
            part = b'{"type":"%b","text":"a"}' % kind
            message = b'[{"role":"user","content":%b}]' % many(part, count)
            yield f"{count} parts", path, b'{"%b":%b%b}' % (field, message, extra)
        message = b'{"role":"user","content":%b}' % text_of("cjk", 4000)
        yield "2000 messages of 4 kB", path, b'{"%b":%b%b}' % (field, many(message, 2000), extra)
    for count in (100, 5000, 60_000):
        values = b"{%b}" % b",".join(b'"k%d":{}' % i for i in range(count))
        schema = b'{"type":"json_schema","json_schema":{"name":"a","schema":{"properties":%b}}}' % values
        tool = b'{"type":"function","function":{"name":"f","parameters":{"properties":%b}}}' % values
        for name, field in (("schema", b'"response_format":' + schema), ("tool", b'"tools":[%b]' % tool)):
            yield f"{name} of {count}", CHAT, around(CHAT, b'"a"')[:-1] + b",%b}" % field
    for count in (100_000, 130_000, 1_000_000):
        yield f"{count} ids", DETOKENIZE, b'{"tokens":%b}' % ids(count, rng)
    yield "2 M ids", DETOKENIZE, b'{"tokens":%b}' % ids(2_000_000, rng)


class Turns:
    """In the server's process: what the turns of an event loop took; by default of the first that turns."""

    def __init__(self, loop: Any = None) -> None:
        self.work = self.late = 0.0  # seconds
        self.loop = loop
        self._ticking = False
        run_once = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]

        def timed(loop: Any) -> None:
            if self.loop is None:
                self.loop = loop
            if self.loop is not loop:
                run_once(loop)
                return
            if not self._ticking:
                self._ticking = True
                loop.call_soon(self._tick, loop.time())
            start = time.thread_time()
            run_once(loop)
            self.work = max(self.work, time.thread_time() - start)

        asyncio.BaseEventLoop._run_once = timed  # type: ignore[attr-defined]

    def _tick(self, due: float) -> None:
        now = self.loop.time()
        self.late = max(self.late, now - due)
        self.loop.call_at(now + 0.001, self._tick, now + 0.001)

    def answer(self, pipe: Connection) -> None:
        while pipe.recv():
            pipe.send((self.work, self.late))
            self.work = self.late = 0.0


def serve(flags: list[str], pipe: Connection) -> None:
    from fastllm.server.run import main

    threading.Thread(target=Turns().answer, args=(pipe,), daemon=True).start()
    sys.exit(main(flags))


def send(port: int, path: str, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def wait_ready(port: int) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the server did not start")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def measure(port: int, pipe: Connection, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, path, body in classes(random.Random(args.seed)):
        if args.only not in f"{path} {name}":
            continue
        works: list[float] = []
        lates: list[float] = []
        for _ in range(args.repeats):
            pipe.send(True)
            pipe.recv()
            status = send(port, path, body)
            pipe.send(True)
            work, late = pipe.recv()
            works.append(work * 1e3)
            lates.append(late * 1e3)
        times = {"work_ms": statistics.median(works), "late_ms": statistics.median(lates)}
        yield {"path": path, "name": name, "bytes": len(body), "status": status, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="classes whose path or name has this in it")
    parser.add_argument("--repeats", type=int, default=5, help="requests of each class")
    parser.add_argument("--above", type=float, default=0.0, metavar="MS", help="print classes of more work only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="passed on, last")
    args = parser.parse_args()
    port = free_port()
    flags = ["--model", "null", "--port", str(port), "--disable-log-requests", "--max-model-len", str(CONTEXT)]
    flags += ["--num-gpu-blocks-override", str(4 * CONTEXT // 16), "--max-waiting-tokens", "100000000"]
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=([*flags, *args.server_args], theirs))
    server.start()
    rows: list[dict[str, Any]] = []
    try:
        wait_ready(port)
        print(f"{'path':22s}{'class':28s}{'bytes':>10s}{'status':>8s}{'work':>8s}{'late':>8s}")
        for row in measure(port, pipe, args):
            rows.append(row)
            if row["work_ms"] >= args.above:
                head = f"{row['path']:22s}{row['name']:28s}{row['bytes']:10,d}{row['status']:8d}"
                print(f"{head}{row['work_ms']:8.1f}{row['late_ms']:8.1f}", flush=True)
    finally:
        server.terminate()
        server.join(60)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
