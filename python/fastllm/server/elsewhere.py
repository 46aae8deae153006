"""Work on a worker thread where it could hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from fastllm.server.state import ServerState

P = ParamSpec("P")
T = TypeVar("T")


async def worked(state: ServerState, long: bool, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """work(...), on a worker if it may take long. It must not need the call's context."""
    if not long:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(state.workers, lambda: work(*args, **kwargs))
