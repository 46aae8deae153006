"""The one place that opens a model's files: regular files of a sane size, mapped or read."""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastllm.errors import LoadError

MAX_JSON_BYTES = 256 << 20  # the largest tokenizers take 40 MB


@contextmanager
def _regular(path: Path) -> Iterator[tuple[int, int]]:
    """A file descriptor and the size in bytes. Never waits: a pipe or a device in a folder is refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError(f"{path} is not a regular file.")
        if status.st_size == 0:
            raise LoadError(f"{path} is empty.")
        yield descriptor, status.st_size
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def map_file(path: Path) -> memoryview:
    """The whole file, read-only, mapped; the mapping lives as long as a view of it."""
    with _regular(path) as (descriptor, _):
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises LoadError if it is missing, no regular file, huge or not an object."""
    with _regular(path) as (descriptor, size):
        _check_size(path, size)
        with os.fdopen(os.dup(descriptor), "rb") as file:
            text = file.read()
    return json_object(text, str(path))


def _check_size(path: Path, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise LoadError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read.")


def check_file(path: Path) -> None:
    """For a file that a library reads: raises LoadError unless it is a regular one of a size worth reading."""
    with _regular(path) as (_, size):
        _check_size(path, size)


def json_object(text: bytes, what: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """The object that `text` holds. Raises LoadError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise LoadError(f"{what} names the same key twice.")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique if unique_keys else None)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise LoadError(f"{what} is not a JSON object.")
    return value
