"""The two files of a batch: requests in, one JSON line each, and answers out, which a later run can go on with.

Memory is bounded: lines are read one at a time, and of the lines that were seen only 8 bytes each are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from fastllm.errors import RequestError

MAX_LINE_BYTES = 64 << 20

Keys = npt.NDArray[np.uint64]


class _WireLine(msgspec.Struct):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Body(msgspec.Struct):
    stream: Any = None


class BatchError(msgspec.Struct):
    """Why a line has no answer. `line` counts from 1."""

    code: str
    message: str
    line: int


class BatchAnswer(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchResult(msgspec.Struct):
    """One line of the output. Exactly one of response and error is set."""

    id: str
    custom_id: str | None
    response: BatchAnswer | None = None
    error: BatchError | None = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


@dataclass(frozen=True)
class BatchLine:
    """One request; `error` instead of url and body where the line cannot be used."""

    number: int  # from 1
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: BatchError | None = None

    @property
    def key(self) -> int:
        return _key(self.custom_id, self.number)


def _key(custom_id: str | None, line: int) -> int:
    name = f"line {line}" if custom_id is None else f"id {custom_id}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def read_lines(path: Path, urls: frozenset[str]) -> Iterator[BatchLine]:
    """The requests in their order; empty lines are skipped. `urls`: what a line may ask for."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number += 1
            whole = raw.endswith(b"\n") or len(raw) < MAX_LINE_BYTES
            if not whole:
                _skip_rest(file)
                yield _bad(number, None, "line_too_long", f"is longer than {MAX_LINE_BYTES} bytes")
            elif raw.strip():
                yield _parse(raw, number, urls)


def _skip_rest(file: BinaryIO) -> None:
    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
        pass


def _parse(raw: bytes, number: int, urls: frozenset[str]) -> BatchLine:
    try:
        raw.decode("utf-8")
        line = msgspec.json.decode(raw, type=_WireLine)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        return _bad(number, None, "invalid_line", f"cannot be read: {exc}")
    if line.method != "POST":
        return _bad(number, line.custom_id, "invalid_method", f"has the method {line.method[:40]!r}; it must be POST")
    if line.url not in urls:
        allowed = ", ".join(sorted(urls))
        return _bad(
            number, line.custom_id, "invalid_url", f"has the url {line.url[:80]!r}; it must be one of {allowed}"
        )
    try:
        if msgspec.json.decode(line.body, type=_Body).stream:
            return _bad(number, line.custom_id, "stream_not_supported", "asks for a stream; a batch has none")
    except (msgspec.MsgspecError, RecursionError):
        return _bad(number, line.custom_id, "invalid_body", "has a body that is no JSON object")
    return BatchLine(number, line.custom_id, line.url, bytes(line.body))


def _bad(number: int, custom_id: str | None, code: str, what: str) -> BatchLine:
    return BatchLine(number, custom_id, error=BatchError(code, f"Line {number} {what}.", number))


def check_input(path: Path, urls: frozenset[str]) -> Keys:
    """The keys of all requests, sorted. Raises RequestError when two of them have one custom_id."""
    keys = array("Q", (line.key for line in read_lines(path, urls)))
    ordered = np.sort(np.frombuffer(keys, np.uint64))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        same = [line for line in read_lines(path, urls) if line.key == int(twice[0])]
        raise RequestError(
            f"{path}: lines {same[0].number} and {same[1].number} have the same custom_id "
            f"{(same[0].custom_id or '')[:80]!r}; every line needs its own.",
            "invalid",
        )
    return ordered


class BatchOutput:
    """The output file, locked for this run. Every answer is written at once, as one whole line."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Raises RequestError when the file holds something else, or when another run has it."""
        self.path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        self.num_failed = 0  # of all answers in the file
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if overwrite:
                self._file.truncate(0)
            self._done = self._read()
        except BlockingIOError:
            self._file.close()
            raise RequestError(f"{path}: another run is writing this file.", "invalid") from None
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> Keys:
        """The keys of what is there already, sorted; a torn last line is cut off."""
        keys = array("Q")
        end = 0  # bytes of whole lines
        for number, raw in enumerate(self._file, 1):
            try:
                result = msgspec.json.decode(raw, type=BatchResult)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                if not raw.endswith(b"\n"):
                    break
                raise RequestError(
                    f"{self.path}: line {number} is no answer of a batch. Choose another file, or --overwrite it.",
                    "invalid",
                ) from None
            if not raw.endswith(b"\n"):
                break
            keys.append(_key(result.custom_id, result.error.line if result.error else 0))
            self.num_failed += result.failed
            end += len(raw)
        self._file.truncate(end)
        self._file.seek(end)
        return np.sort(np.frombuffer(keys, np.uint64)) if keys else np.empty(0, np.uint64)

    def has(self, line: BatchLine) -> bool:
        """An earlier run has answered this line."""
        key = np.uint64(line.key)
        at = int(np.searchsorted(self._done, key))
        return at < len(self._done) and bool(self._done[at] == key)

    def count(self, keys: Keys) -> int:
        """How many of these requests an earlier run has answered."""
        return int(np.isin(keys, self._done).sum())

    def write(self, result: BatchResult) -> None:
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()
        self.num_failed += result.failed

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
