"""What the server's log looks like and how it gets out: text or JSON lines that no request can forge, flood or block.

logger -> FloodFilter (counts what it leaves out) -> formatter -> bounded queue -> LogWriter's thread -> stream
"""

from __future__ import annotations

import datetime
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

ACCESS_LOGGER = "fastllm.access"  # answered requests
REQUEST_LOGGER = "fastllm.requests"  # accepted requests, for --enable-log-requests
_WHOLE = frozenset({ACCESS_LOGGER, REQUEST_LOGGER})  # as many lines as requests, because somebody wants them
LINES_PER_SECOND = 20  # of one kind
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CONTROL_BUT_NEWLINE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_QUEUE_LINES = 10_000
_CLOSE_WAIT_S = 1.0
_FLOOD_WINDOW_S = 1.0
_FLOOD_KINDS = 1024


def escape(text: str, control: re.Pattern[str] = _CONTROL) -> str:
    """Control characters and lone surrogates as \\x1b: a line stays a line, and a terminal is not steered."""
    return control.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return escape(super().formatException(ei), _CONTROL_BUT_NEWLINE)


class JsonFormatter(logging.Formatter):
    """One object a line: ts, level, logger, message, request_id where there is one, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape(record.getMessage()),
        }
        request_id = getattr(record, "request_id", "")
        if request_id:
            line["request_id"] = request_id
        for key, value in getattr(record, "fields", {}).items():
            line[key] = escape(value) if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = escape(self.formatException(record.exc_info), _CONTROL_BUT_NEWLINE)
        return msgspec.json.encode(line).decode()


class FloodFilter(logging.Filter):
    """Lets a few lines of each kind through per second; the next one of the kind says how many were left out.

    A kind is a logger and a template, not a text. Lines that were asked for per request are never left out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, lines: int = LINES_PER_SECOND) -> None:
        """lines: of a kind in a second; 0: no limit."""
        super().__init__()
        self._clock = clock
        self._most = lines
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name in _WHOLE or not self._most:
            return True
        now = self._clock()
        with self._lock:
            key = (record.name, str(record.msg))
            kind = self._kinds.get(key)
            if kind is None:
                if len(self._kinds) >= _FLOOD_KINDS:
                    self._kinds.clear()
                kind = self._kinds[key] = _Kind(now)
            if now - kind.since >= _FLOOD_WINDOW_S:
                kind.since, kind.lines = now, 0
            kind.lines += 1
            if kind.lines > self._most:
                kind.left_out += 1
                return False
            left_out, kind.left_out = kind.left_out, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} lines like this were left out)"
            record.fields = {**getattr(record, "fields", {}), "left_out": left_out}
        return True

    def report(self) -> list[tuple[str, int]]:
        """(logger, lines left out) of the floods that are over and that no later line has told about."""
        now = self._clock()
        with self._lock:
            over = [
                (name, kind)
                for (name, _), kind in self._kinds.items()
                if kind.left_out and now - kind.since >= _FLOOD_WINDOW_S
            ]
            counts = [(name, kind.left_out) for name, kind in over]
            for _, kind in over:
                kind.left_out = 0
        return counts


class _Kind:
    __slots__ = ("left_out", "lines", "since")

    def __init__(self, since: float) -> None:
        self.since = since  # beginning of the window
        self.lines = 0  # in it
        self.left_out = 0  # and not yet told


class LogWriter(logging.Handler):
    """Formats in the caller and writes on a thread of its own: a log that nobody reads loses lines, no time."""

    def __init__(self, stream: TextIO, capacity: int = _QUEUE_LINES) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="fastllm-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        told = 0
        while (line := self._lines.get()) is not None:
            if self.dropped > told:
                line = f"{self.dropped - told} log lines were dropped: they were not read in time\n{line}"
                told = self.dropped
            try:
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # closed: nobody can be told
                continue

    def close(self) -> None:
        """Writes what is left, unless the stream is stuck."""
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=_CLOSE_WAIT_S)
                self._thread.join(_CLOSE_WAIT_S)
            except queue.Full:
                pass
        super().close()


class Logs:
    """The process's log while a server runs."""

    def __init__(
        self,
        *,
        level: str = "info",
        access_level: str = "info",
        format: str = "text",
        lines_per_second: int = LINES_PER_SECOND,
        request_id: Callable[[], str] = str,
        stream: TextIO | None = None,
    ) -> None:
        """request_id: of the request that the calling task answers, or ""."""
        self.flood = FloodFilter(lines=lines_per_second)
        self.writer = LogWriter(stream or sys.stderr)
        self.writer.setFormatter(JsonFormatter() if format == "json" else TextFormatter())

        def add_request_id(record: logging.LogRecord) -> bool:
            record.request_id = request_id()
            return True

        self.writer.addFilter(self.flood)
        self.writer.addFilter(add_request_id)
        root = logging.getLogger()
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        root.addHandler(self.writer)
        root.setLevel(level.upper())
        logging.getLogger(ACCESS_LOGGER).setLevel("DEBUG" if access_level == "trace" else access_level.upper())

    def close(self) -> None:
        self.report_floods()
        logging.getLogger().removeHandler(self.writer)
        self.writer.close()

    def report_floods(self) -> None:
        for name, count in self.flood.report():
            logging.getLogger(name).warning("%d more lines of this kind were left out", count)
