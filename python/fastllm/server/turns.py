"""So that requests which come all at once begin a few in each turn of the event loop, and others go on in between."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets a few through in each turn; the rest wait, first come first served. Event loop only."""

    def __init__(self, a_turn: int) -> None:
        self._a_turn = a_turn
        self._free = a_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False  # whether the next turn will let more through

    async def take(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next_turn, loop)
        if self._free and not self._waiting:
            self._free -= 1
            return
        self._waiting.append(loop.create_future())
        await self._waiting[-1]

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._free = self._a_turn
        while self._free and self._waiting:
            future = self._waiting.popleft()
            if not future.done():  # its request was cancelled
                future.set_result(None)
                self._free -= 1
        self._counting = self._free < self._a_turn
        if self._counting:
            loop.call_soon(self._next_turn, loop)
