"""A time limit for a block of a coroutine that never loses a cancellation from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Raises TimeoutError when the block takes longer.

    asyncio.wait_for may drop the cancellation that a lost client causes before Python 3.12, and asyncio.timeout does
    not exist before 3.11.
    """
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if not expired:
            raise
        raise TimeoutError from None
    finally:
        timer.cancel()
