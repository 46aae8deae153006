"""Watches the engine, the event loop and the memory: a busy engine is not dead, a frozen one is not alive.

The engine's heartbeat advances at the begin and the end of every step. One that is busy and has not advanced for the
step's time limit is hung; one that failed says so itself. Either is final: every request ends with an error, and the
process makes way for its supervisor's next one.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from typing import TYPE_CHECKING

from fastllm.server.errors import ApiError

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM
    from fastllm.server.state import ServerState

logger = logging.getLogger("fastllm.server")

_PERIOD_S = 0.05
_SATURATED_AFTER_S = 1.0  # of a full queue, before /ready says so


class EngineStatus(enum.Enum):
    OK = "ok"
    HUNG = "hung"
    FAILED = "failed"


def engine_status(llm: AsyncLLM, step_limit_s: float) -> EngineStatus:
    """Never waits for the engine."""
    if not llm.healthy:
        return EngineStatus.FAILED
    beat = llm.heartbeat()
    hung = step_limit_s > 0 and beat.busy and beat.age_s > step_limit_s
    return EngineStatus.HUNG if hung else EngineStatus.OK


class Watch:
    """Owned by the Server; runs from the load to the stop. Event loop only."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self.status = EngineStatus.OK
        self.faulted = asyncio.Event()
        self.loop_lag_s = 0.0  # how late the loop was last
        self.max_loop_lag_s = 0.0
        self.max_loop_work_s = 0.0  # most of it that was the loop's own work, not a wait for a processor
        self.saturated = False  # the queue has been full for a while
        self._full_since: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        limit = self._state.limits.step_limit(self._state.llm.engine_config.device)
        while self.status is EngineStatus.OK:
            due, worked = loop.time() + _PERIOD_S, time.thread_time()
            await asyncio.sleep(_PERIOD_S)
            now = loop.time()
            self.loop_lag_s = max(0.0, now - due)
            self.max_loop_lag_s = max(self.max_loop_lag_s, self.loop_lag_s)
            self.max_loop_work_s = max(self.max_loop_work_s, min(self.loop_lag_s, time.thread_time() - worked))
            self._look_at_queue(now)
            await self._state.memory.look()
            self.status = engine_status(self._state.llm, limit)
        self._end_everything(limit)

    def _look_at_queue(self, now: float) -> None:
        if not self._state.queue_full:
            self._full_since = None
        elif self._full_since is None:
            self._full_since = now
        self.saturated = self._full_since is not None and now - self._full_since >= _SATURATED_AFTER_S

    def _end_everything(self, limit: float) -> None:
        if self.status is EngineStatus.HUNG:
            reason = f"The engine has not finished a step for {limit:g} s."
        else:
            reason = "The engine has stopped after a fault."
        logger.critical("%s Every request ends with an error; %d are open.", reason, self._state.active_requests)
        self._state.gate.fail(ApiError(503, reason, code="engine_unhealthy", retry_after=10))
        self._state.llm.fail(reason)
        self.faulted.set()
