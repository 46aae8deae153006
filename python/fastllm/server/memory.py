"""The memory of the process: what it may have, what it holds, what it gives back, and what happens when it runs out.

Above its share of the limit the server refuses new requests, drops what it only keeps to be faster, and takes requests
again once there is room: the kernel would end the process, and every request with it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

logger = logging.getLogger("fastllm.server")

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 256 << 10  # bytes
_RECOVERED = 0.98  # of the allowed share
_NO_LIMIT = 1 << 60  # bytes; cgroup v1 has such a number where there is none
_PAGE = os.sysconf("SC_PAGE_SIZE")


def return_large_blocks() -> None:
    """Has the allocator give every large block back to the system when it is freed.

    glibc by itself stops doing so after the first one: bodies of megabytes would then lie among small objects that
    stay, and what they took once could not be returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def return_free_blocks() -> None:
    """Also of small ones, as far as whole pages are free. May take some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held_bytes() -> int:
    """Without pages of files, such as mapped weights, which the kernel takes back by itself."""
    _, resident, of_files = Path("/proc/self/statm").read_bytes().split()[:3]
    return (int(resident) - int(of_files)) * _PAGE


def limit_bytes(root: Path = Path("/")) -> int:
    """Of the container or control group that this process runs in, or of the machine; 0 if nobody says.

    root: of the file system.
    """
    limits = []
    groups = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):  # number:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = Path(path.strip("/"))
        # In a container the path may be the host's, while the files lie at the top.
        for folder in {Path(), own, *own.parents}:
            limits += [int(text) for text in _lines(top / folder / name) if text.isdigit()]
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) << 10)
    return min((limit for limit in limits if limit < _NO_LIMIT), default=0)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


class MemoryGuard:
    """Event loop only."""

    def __init__(self, percent: int, limit: int, relieve: Callable[[], Awaitable[None]]) -> None:
        """percent of limit, in bytes; 0 is none. relieve: called once whenever memory gets short."""
        self._allowed = limit * percent // 100  # bytes
        self._relieve = relieve
        self.held: Callable[[], int] = held_bytes
        self.short = False

    async def look(self) -> None:
        """Takes about 20 us."""
        if not self._allowed:
            return
        held = self.held()
        if not self.short and held > self._allowed:
            self.short = True
            logger.warning("%d MiB are held of %d allowed: new requests are refused", held >> 20, self._allowed >> 20)
            await self._relieve()
        elif self.short and held < self._allowed * _RECOVERED:
            self.short = False
            logger.warning("%d MiB are held: requests are taken again", held >> 20)
