"""What the server does by the clock: watches its own event loop, writes the line of statistics, reports log floods and
takes over renewed certificates. One task on the event loop, microseconds a turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastllm.server.state import ServerState
    from fastllm.server.stats_window import WindowFigures

logger = logging.getLogger("fastllm.stats")

TICK_S = 0.1


class Housekeeping:
    def __init__(
        self,
        state: ServerState,
        *,
        stats_interval: float = 10.0,
        log_stats: bool = True,
        each_second: tuple[Callable[[], object], ...] = (),
    ) -> None:
        """each_second: further chores, which must not block."""
        self._state = state
        self._stats_interval = max(stats_interval, TICK_S)
        self._log_stats = log_stats
        self._each_second = each_second

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        chores_at = loop.time() + 1.0
        stats_at = loop.time() + self._stats_interval
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            now = loop.time()
            self._state.http.event_loop_lag.observe(max(0.0, now - due))
            if now >= chores_at:
                chores_at = now + 1.0
                for chore in self._each_second:
                    chore()
            if now >= stats_at:
                stats_at = now + self._stats_interval
                self.report()

    def report(self) -> None:
        """Ends the window of the averages, and logs it unless nothing happened in it."""
        metrics = self._state.metrics
        if metrics is None:
            return
        figures = metrics.close_window()
        if self._log_stats and (figures.prompt_tokens_s or figures.output_tokens_s or self._state.active_requests):
            logger.info("%s", self._line(figures))

    def _line(self, figures: WindowFigures) -> str:
        stats = self._state.llm.stats()
        waiting = stats.num_waiting + stats.num_swapped + self._state.gate.waiting_sequences
        usage = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        why = f" for {stats.wait_reason}" if stats.wait_reason else ""
        return (
            f"{figures.prompt_tokens_s:.1f} prompt and {figures.output_tokens_s:.1f} output tokens/s; "
            f"{stats.num_running} sequences run, {waiting} wait{why}; KV cache {usage:.1%} in use, "
            f"{figures.hit_rate:.1%} of looked-up tokens found"
        )
