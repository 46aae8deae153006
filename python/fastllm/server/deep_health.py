"""GET /health/deep: whether the model still says what it said, by one token of a fixed prompt.

For a monitor that asks once a minute. Never a liveness probe: it waits for its turn in the engine like any request.
"""

from __future__ import annotations

import asyncio
import itertools

from aiohttp import web

from fastllm.errors import RequestError
from fastllm.sampling import SamplingParams
from fastllm.server.info import answer_json, unhealthy
from fastllm.server.state import STATE_KEY, ServerState

_PROMPT = "One, two, three, four,"  # too short for the prefix cache: it is computed each time
_ANSWER_WITHIN_S = 5.0
# Tokens that come this near to the best one may win beside other requests, whose company changes the last bits.
_NEAR = 0.1  # of a logprob


class GoldenToken:
    """Event loop only. The first answer after the start is what the later ones are compared with."""

    def __init__(self) -> None:
        self._wanted: frozenset[int] | None = None
        self._asking: asyncio.Task[tuple[int, frozenset[int]]] | None = None
        self._serial = itertools.count()

    async def ask(self, state: ServerState) -> tuple[int, frozenset[int]]:
        """The token, and those that are right. Who asks meanwhile gets the same answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._generate(state))
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may wait for it
        return await asyncio.shield(self._asking)

    async def _generate(self, state: ServerState) -> tuple[int, frozenset[int]]:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=min(2, state.llm.engine_config.max_logprobs))
        outputs = state.llm.generate(_PROMPT, params, f"health-{next(self._serial)}", queue_timeout=_ANSWER_WITHIN_S)
        got, near = -1, frozenset[int]()
        async for output in outputs:
            for sample in output.outputs:
                if sample.token_ids:
                    got = sample.token_ids[0]
                    row = sample.logprobs[0] if sample.logprobs else {}
                    near = frozenset({got, *(id for id, one in row.items() if one.logprob >= row[got].logprob - _NEAR)})
        if self._wanted is None:
            self._wanted = near
        return got, self._wanted


GOLDEN_KEY: web.AppKey[GoldenToken] = web.AppKey("golden", GoldenToken)


async def handle(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    if not state.loaded:
        return answer_json({"status": "starting"}, 503, {"Retry-After": "5"})
    sick = unhealthy(state)
    if sick is not None:
        return sick
    try:
        got, wanted = await asyncio.wait_for(request.app[GOLDEN_KEY].ask(state), _ANSWER_WITHIN_S)
    except (asyncio.TimeoutError, RequestError) as exc:
        status = exc.kind if isinstance(exc, RequestError) else "timeout"
        return answer_json({"status": status}, 503)
    if got not in wanted:
        return answer_json({"status": "wrong", "got": got, "wanted": sorted(wanted)}, 503)
    return answer_json({"status": "ok"})
