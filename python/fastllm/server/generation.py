"""Runs the prompts of one call: an accepted request from its first token to its last, however it ends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from fastllm.errors import RequestError
from fastllm.grammar.compiler import CompiledGrammar
from fastllm.outputs import RequestOutput, TokenIds
from fastllm.sampling import SamplingParams
from fastllm.server import admission
from fastllm.server.body import field_names
from fastllm.server.call import current_call
from fastllm.server.cost import Cost, cost_of, total
from fastllm.server.errors import ENGINE_ERROR_STATUS, ApiError, from_value_error
from fastllm.server.protocol import CommonRequest, CompletionTokensDetails, PromptTokensDetails, Usage
from fastllm.server.state import Phase, ServerState
from fastllm.server.streaming import EventStream

# Updates of several prompts that may wait for a slow client; behind them each stream merges its own.
_MERGE_QUEUE = 16
_COSTS_A_TURN = 200  # prompts, between turns of others
_serial = itertools.count()


@dataclass
class Job:
    """One prompt with its parameters."""

    prompt_ids: TokenIds
    params: SamplingParams
    text: str | None = None  # what echo repeats
    grammar: CompiledGrammar | None = None  # what the output must look like


@contextmanager
def accepted(state: ServerState, sequences: int) -> Iterator[None]:
    """Counts a request from its admission to its answer, so that a drain waits for it."""
    state.enter(sequences)
    try:
        yield
    finally:
        state.leave(sequences)


def from_engine_error(state: ServerState, request: CommonRequest, exc: RequestError) -> ApiError:
    if state.phase is Phase.DRAINING and exc.kind == "engine":
        return ApiError(503, "The server stopped before this request was finished.", code="draining", retry_after=5)
    if exc.kind == "invalid":
        return from_value_error(exc, field_names(type(request)))
    status = ENGINE_ERROR_STATUS.get(exc.kind, 500)
    retry = 1 if status in (429, 503) else None
    code = {"overloaded": "queue_full", "timeout": "queue_timeout"}.get(exc.kind)
    return ApiError(status, str(exc), code=code, retry_after=retry)


def _cost(state: ServerState, job: Job) -> Cost:
    config = state.llm.engine_config
    return cost_of(
        job,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        vocab=state.llm.model_config.vocab_size,
        masked=job.grammar is not None,
    )


async def _one(
    state: ServerState, job: Job, request_id: str, request: CommonRequest
) -> AsyncGenerator[RequestOutput, None]:
    """One prompt: its turn in the queue, then its outputs, until the last one or the time limit."""
    client, limits = current_call().client, state.limits
    await state.batch_window.gather(state.llm.stats)
    if state.request_log is not None:
        state.request_log.received(request_id, job, state.llm.tokenizer)
    # The engine's id is our own: two clients may send the same X-Request-Id at once.
    engine_id = f"{request_id}-{next(_serial)}"
    finished = expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        asyncio.ensure_future(state.llm.abort(engine_id))

    limit = limits.max_request_time_s
    timer = asyncio.get_running_loop().call_later(limit, expire) if limit else None
    try:
        async with state.gate.turn(client, _cost(state, job), request.priority or 0, limits.max_waiting_time_s) as turn:
            client.use_tokens(len(job.prompt_ids))
            outputs = state.llm.generate(
                job.prompt_ids,
                job.params,
                engine_id,
                priority=request.priority or 0,
                cache_salt=state.cache_salt(client, request.cache_salt),
                queue_timeout=max(0.001, limits.max_waiting_time_s - turn.waited_s)
                if limits.max_waiting_time_s
                else None,
                mask=None if job.grammar is None else job.grammar.mask(),
            )
            async with aclosing(outputs):
                async for output in outputs:
                    new = sum(len(sample.token_ids) for sample in output.outputs)
                    turn.generated += new
                    client.use_tokens(new)
                    finished = output.finished
                    if finished and expired:
                        raise ApiError(504, f"The request took longer than {limit:g} s.", code="request_timeout")
                    yield output
    except RequestError as exc:
        finished = True
        raise from_engine_error(state, request, exc) from None
    except ApiError:
        finished = True
        raise
    finally:
        if timer is not None:
            timer.cancel()
        if not finished and state.metrics is not None:
            state.metrics.aborted()


async def run(
    state: ServerState, jobs: list[Job], request_id: str, request: CommonRequest
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """(prompt number, update) until every prompt is finished; closing it aborts what still runs."""
    costs: list[Cost] = []
    for number, job in enumerate(jobs, 1):
        costs.append(_cost(state, job))
        if number % _COSTS_A_TURN == 0:
            await asyncio.sleep(0)
    admission.check_cost(state, total(costs))
    if len(jobs) == 1:
        async with aclosing(_one(state, jobs[0], request_id, request)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue(_MERGE_QUEUE)

    async def pump(number: int, job: Job) -> None:
        try:
            async with aclosing(_one(state, job, request_id, request)) as outputs:
                async for output in outputs:
                    await queue.put((number, output))
        except Exception as exc:
            await queue.put((number, exc))
        else:
            await queue.put((number, None))

    tasks: list[asyncio.Task[None]] = []
    try:
        for number, job in enumerate(jobs):
            tasks.append(asyncio.create_task(pump(number, job)))
            await asyncio.sleep(0)  # one submission a turn: other requests go on in between
        left = len(tasks)
        while left:
            number, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        going = [task for task in tasks if not task.done()]
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)


async def collect(state: ServerState, jobs: list[Job], request_id: str, request: CommonRequest) -> list[RequestOutput]:
    """The final output of every prompt, in their order."""
    finals: dict[int, RequestOutput] = {}
    async with aclosing(run(state, jobs, request_id, request)) as updates:
        async for number, output in updates:
            if output.finished:
                finals[number] = output
    return [finals[number] for number in range(len(jobs))]


class UsageCounter:
    """Token counts of one call, from final outputs or from deltas."""

    def __init__(self, jobs: list[Job]) -> None:
        self.prompt = sum(len(job.prompt_ids) for job in jobs)
        self.completion = 0
        self.reasoning: int | None = None  # None: the model does not reason
        self._cached = [0] * len(jobs)
        self._ranks = jobs[0].params.ranks

    def add(self, number: int, output: RequestOutput) -> None:
        returned = sum(len(sample.token_ids) for sample in output.outputs)
        # Samples that were made to choose from (best_of) count, and come with the last output.
        self.completion += output.num_generated_tokens if self._ranks else returned
        self._cached[number] = output.num_cached_tokens or 0

    def usage(self) -> Usage:
        return Usage(
            self.prompt,
            self.prompt + self.completion,
            self.completion,
            PromptTokensDetails(cached_tokens=sum(self._cached)),
            None if self.reasoning is None else CompletionTokensDetails(self.reasoning),
        )


async def first_then_rest(
    updates: AsyncGenerator[tuple[int, RequestOutput], None], events: EventStream | None = None
) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Waits for the first update, so that a refusal of the engine is still an HTTP status and not an event.

    With --sse-keep-alive-interval it waits no longer than that: then `events` opens, and comments fill the silence.
    """
    waiting = asyncio.ensure_future(anext(updates))
    try:
        await asyncio.wait({waiting}, timeout=(events and events.silence_s) or None)
    except asyncio.CancelledError:
        waiting.cancel()  # a generator cannot be closed while it runs
        await asyncio.gather(waiting, return_exceptions=True)
        raise
    if waiting.done():
        waiting.result()
    elif events is not None:
        await events.open()

    async def chain() -> AsyncIterator[tuple[int, RequestOutput]]:
        yield await waiting
        async for item in updates:
            yield item

    return chain()
