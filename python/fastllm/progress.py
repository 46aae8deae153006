"""Progress on stderr: a bar that redraws itself on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_WIDTH = 30  # characters
_REDRAW_S = 0.1
_LINE_EVERY_S = 10.0  # without a terminal


class Progress:
    """Counts up to a total. unit: "B" is shown as MiB, anything else as it is. One thread at a time.

    listener(done, total) is told of every update.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        stream: TextIO | None = None,
        listener: Callable[[int, int], None] | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._listener = listener
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._shown_at = 0.0

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        self.done = done
        self.total = self.total if total is None else total
        self.note = note
        if self._listener is not None:
            self._listener(self.done, self.total)
        now = time.monotonic()
        interval = _REDRAW_S if self._terminal else _LINE_EVERY_S
        if now - max(self._shown_at, 0.0 if self._terminal else self._start) >= interval:
            self._show("\r" if self._terminal else "", "" if self._terminal else "\n")
            self._shown_at = now

    def close(self) -> None:
        self._show("\r" if self._terminal else "", "\n")

    def _show(self, start: str, end: str) -> None:
        elapsed = max(time.monotonic() - self._start, 1e-6)
        share = min(1.0, self.done / self.total) if self.total else 1.0
        scale = 1 << 20 if self.unit == "B" else 1
        unit = "MiB" if self.unit == "B" else self.unit
        bar = ""
        if self._terminal:
            filled = int(share * _BAR_WIDTH)
            bar = f" |{'#' * filled}{'.' * (_BAR_WIDTH - filled)}|"
        counts = f"{self.done / scale:.0f}/{self.total / scale:.0f} {unit}"
        rate = f"{elapsed:.1f} s, {self.done / scale / elapsed:.1f} {unit}/s"
        note = f", {self.note}" if self.note else ""
        self._stream.write(f"{start}{self.title}: {share:4.0%}{bar} {counts} [{rate}{note}]{end}")
        self._stream.flush()
