"""The log: a line per refusal with its reason, JSON on demand, nothing that a client wrote, no flood, no blocking."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from fastllm.server.json_log import FloodFilter, JsonFormatter, Logs, LogWriter, TextFormatter, escape
from fastllm.server.limits import Limits
from fastllm.server.request_log import RequestLog
from server_fixtures import RunningServer, load_null, wait_until
from server_process import server_process


class Capture(logging.Handler):
    """What the server logs, as both formats write it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, logger: str = "") -> list[str]:
        text = TextFormatter()
        return [text.format(record).split(" ", 2)[2] for record in self.records if record.name.startswith(logger)]

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(JsonFormatter().format(record)) for record in self.records]


@pytest.fixture
def log() -> Iterator[Capture]:
    capture = Capture()
    root = logging.getLogger()
    level = root.level
    root.addHandler(capture)
    root.setLevel("DEBUG")
    yield capture
    root.removeHandler(capture)
    root.setLevel(level)


def start(**state: Any) -> RunningServer:
    server = RunningServer(load_null(), **state)
    server.load()
    return server


def test_every_refusal_has_one_line_with_its_reason_and_nothing_of_the_request(log: Capture) -> None:
    server = start(log_requests=False, api_keys=["sesame"])
    key = {"Authorization": "Bearer sesame"}
    try:

        def ask(path: str, body: Any, **options: Any) -> Any:
            return server.ask("POST", path, body, headers=key, **options)

        canary = "canary-of-the-prompt"
        completions = "/v1/completions"
        refusals = [
            (server.complete(max_tokens=1), "401", "invalid_api_key: The API key is missing or wrong"),
            (ask(completions, {"model": canary, "prompt": canary}), "404", "model_not_found (model)"),
            (ask(completions, {"prompt": canary, "n": 0}), "400", "invalid_request_error (n)"),
            (ask(completions, {"prompt": canary, "temperature": canary}), "400", "invalid_type (temperature)"),
            (ask(completions, {"prompt": [canary, 1]}), "400", "invalid_request_error (prompt)"),
            (ask(completions, canary.encode()), "400", "invalid_json"),
            (ask("/v1/nowhere", {}), "404", "not_found"),
            (server.ask("PUT", completions, headers=key), "405", "method_not_allowed"),
            (ask(completions, b"x" * (9 << 20)), "413", "content_too_large: The request body is larger"),
        ]
        lines = log.lines("fastllm.refused")
        assert len(lines) == len(refusals)
        for (reply, status, reason), line in zip(refusals, lines, strict=True):
            assert f" {status} " in line and f"refused: {reason}" in line, line
            assert f"id={reply.headers['X-Request-Id']} " in line
        assert not any(canary in line or "sesame" in line for line in log.lines())
        assert server.ask("GET", "/v1/models", headers=key).status == 200
        assert log.lines("fastllm.access") == [], "answered requests are only logged where that is asked for"
    finally:
        server.close()


def test_json_lines_carry_the_request_id_and_fields(log: Capture) -> None:
    server = start()
    try:
        body = {"prompt": "Hello", "max_tokens": 1}
        server.ask("POST", "/v1/completions", body, headers={"X-Request-Id": "chosen-id"})
        server.complete(n=0)
        (answered,) = [one for one in log.objects() if one["logger"] == "fastllm.access"]
        (refused,) = [one for one in log.objects() if one["logger"] == "fastllm.refused"]
    finally:
        server.close()
    assert answered["level"] == "info" and answered["ts"].endswith("Z")
    assert (answered["method"], answered["path"], answered["status"]) == ("POST", "/v1/completions", 200)
    assert answered["ms"] > 0 and "id=chosen-id" in answered["message"]
    assert refused["status"] == 400 and refused["reason"] == "invalid_request_error (n)"


def test_bytes_that_are_no_request_have_a_line_and_are_counted(log: Capture) -> None:
    server = start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"SMASH \x1b[31m\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(4096), b"")).decode()
        assert server.metric("fastllm:requests_refused_total", code="invalid_http") == 1
        (refused,) = [one for one in log.objects() if one["logger"] == "fastllm.refused"]
    finally:
        server.close()
    assert (refused["status"], refused["method"], refused["reason"]) == (400, "-", "invalid_http")
    assert f"X-Request-Id: {refused['request_id']}\r\n" in answer and "\x1b" not in refused["message"]


def test_stream_that_fails_has_a_line(log: Capture) -> None:
    server = start(log_requests=False, limits=Limits(max_request_time_s=0.1))
    try:
        reply = server.complete(max_tokens=20_000, ignore_eos=True, stream=True)
        wait_until(lambda: bool(log.lines("fastllm.refused")), 5)
        (line,) = log.lines("fastllm.refused")
    finally:
        server.close()
    assert " 200 " in line and f"id={reply.headers['X-Request-Id']} refused: request_timeout" in line


def test_no_path_forges_a_line(log: Capture) -> None:
    server = start()
    try:
        server.ask("GET", "/v1/x%0d%0aINFO%20forged%1b%5b31m%c2%85%e2%80%a8")
        wait_until(lambda: bool(log.lines("fastllm.refused")), 5)
        (line,) = log.lines("fastllm.refused")
    finally:
        server.close()
    assert line.isprintable() and "\\r\\nINFO forged\\x1b[31m\\x85\\u2028" in line


def test_quiet_paths_have_no_line(log: Capture) -> None:
    server = start(quiet_paths=frozenset({"/version"}))
    try:
        for path in ("/version", "/health"):
            server.ask("GET", path)
        assert [line for line in log.lines("fastllm.access") if "/version" in line] == []
        assert len([line for line in log.lines("fastllm.access") if "/health" in line]) == 1
    finally:
        server.close()


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_prompts_are_logged_only_at_debug_and_only_when_asked_for(log: Capture, level: str) -> None:
    logging.getLogger("fastllm.requests").setLevel(level)
    canary = "the quick brown canary"
    server = start(request_log=RequestLog(max_len=9))
    try:
        server.complete(prompt=canary, stop=["secret stop"], temperature=0.5, max_tokens=1)
        text = "\n".join(log.lines())
    finally:
        server.close()
        logging.getLogger("fastllm.requests").setLevel(logging.NOTSET)
    assert "temperature=0.5" in text and "max_tokens=1" in text and "1 stop" in text
    assert "secret stop" not in text and canary not in text
    assert ("the quick" in text) == (level == "DEBUG")


def test_escape_leaves_text_and_takes_control() -> None:
    assert escape("Grüße 世界") == "Grüße 世界"
    assert escape("a\nb\x1b[0m\x7f\x9b\u2028\ud800") == "a\\nb\\x1b[0m\\x7f\\x9b\\u2028\\ud800"


def record(template: str, *args: object, logger: str = "fastllm.refused") -> logging.LogRecord:
    return logging.LogRecord(logger, logging.INFO, "file", 1, template, args, None)


def test_a_flood_is_counted_and_other_lines_go_through() -> None:
    now = 100.0
    flood = FloodFilter(lambda: now)
    passed = sum(flood.filter(record("refused %d", number)) for number in range(100_000))
    assert passed == 20
    assert flood.filter(record("another kind")) and flood.report() == []
    assert all(flood.filter(record("%d", number, logger="fastllm.access")) for number in range(1000))
    now = 101.0
    next_one = record("refused %d", 7)
    assert flood.filter(next_one)
    assert next_one.getMessage() == "refused 7 (99980 lines like this were left out)"
    assert json.loads(JsonFormatter().format(next_one))["left_out"] == 99980
    for number in range(30):
        flood.filter(record("refused %d", number))
    now = 102.5
    assert flood.report() == [("fastllm.refused", 11)] and flood.report() == []


def test_kinds_of_lines_that_are_remembered_are_bounded() -> None:
    flood = FloodFilter()
    for number in range(5000):
        assert flood.filter(record(f"template {number}"))
    assert len(flood._kinds) <= 1024


def test_a_log_that_nobody_reads_blocks_nobody() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream, open(reader) as pipe:
        handler = LogWriter(stream, capacity=100)
        handler.setFormatter(logging.Formatter("%(message)s"))
        for _ in range(300):
            handler.emit(record("x" * 1000))
        assert handler.dropped > 0
        lines: list[str] = []
        drain = threading.Thread(target=lambda: lines.extend(pipe), daemon=True)
        drain.start()
        wait_until(lambda: len(lines) >= 50, 10)
        wait_until(handler._lines.empty, 10)
        handler.emit(record("after"))
        handler.close()
        stream.close()
        drain.join(10)
    assert lines[-1] == "after\n" and any("log lines were dropped" in line for line in lines)


def test_logs_write_what_is_left_when_they_close() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        logs = Logs(format="json", access_level="error", request_id=lambda: "abc", stream=stream)
        logging.getLogger("fastllm.access").info("not shown")
        for number in range(30):
            logging.getLogger("fastllm.server").info("line %d\nof one", number)
        logs.close()
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("fastllm.access").setLevel(logging.NOTSET)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 20 and {line["request_id"] for line in lines} == {"abc"}
    assert lines[3]["message"] == "line 3\\nof one"


def test_a_server_with_json_logs_says_everything_in_json() -> None:
    flags = ("--model", "null", "--port", "0", "--log-format", "json", "--log-stats-interval", "0.1")
    with server_process("fastllm.server", *flags) as server:
        address = server.wait_ready()
        request = urllib.request.Request(address + "/v1/completions", b'{"prompt": "Hello", "max_tokens": 100}')
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=30).read()
        server.wait_for("output tokens/s")
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    assert {"fastllm.server", "fastllm.access", "fastllm.stats"} <= {line["logger"] for line in lines}
    assert next(line for line in lines if line["logger"] == "fastllm.access")["request_id"]
