"""Lets new requests wait for each other, for --scheduler-delay. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllm import _core


class BatchWindow:
    """The first request opens a window; all that come before it closes go to the engine together.

    While nothing runs there is nothing to disturb, and nobody waits.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._closes: asyncio.Event | None = None

    async def gather(self, stats: Callable[[], _core.EngineStats]) -> None:
        if not self._delay_s:
            return
        if self._closes is None:
            if not stats().num_running:
                return
            self._closes = asyncio.Event()
            asyncio.get_running_loop().call_later(self._delay_s, self._close)
        await self._closes.wait()

    def _close(self) -> None:
        assert self._closes is not None
        self._closes.set()
        self._closes = None
