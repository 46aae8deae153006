"""The engine for asyncio: one wake-up per engine step, one stream per request.

    engine thread --eventfd--> loop reader -> poll -> states change -> streams wake
A stream holds no queue: it takes from its request's state whatever it has not seen, so a slow consumer gets fewer,
larger updates. What a poll brings is handed out a slice a turn of the loop, so that many streams do not keep the loop
from new requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastllm import _core
from fastllm.client import EngineClient, PromptType
from fastllm.config import ModelConfig
from fastllm.engine_args import EngineArgs
from fastllm.errors import RequestError
from fastllm.grammar.compiler import GrammarCompiler
from fastllm.output_processor import RequestState
from fastllm.outputs import RequestMetrics, RequestOutput
from fastllm.sampling import SamplingParams
from fastllm.tokenizer import Tokenizer

log = logging.getLogger("fastllm")

_LONG_TEXT = 2000  # characters; longer ones are tokenised in a worker thread
_FEW_POSITIONS = 100  # of a prompt; log-probabilities of more are looked at in a worker thread
_SLICE = 8  # samples handed out in one turn of the loop; each costs up to 0.2 ms until its event is written


@dataclass
class FinishedRequest:
    """What is known of a request when it ends, for metrics."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int  # over all samples
    finish_reasons: list[str]
    params: SamplingParams
    metrics: RequestMetrics


@dataclass
class StepReport:
    """What one poll brought. Times are seconds."""

    num_generated_tokens: int = 0
    num_prompt_tokens: int = 0  # of the requests that got their first token
    num_cached_tokens: int = 0  # of those, served by the prefix cache
    first_token_s: list[float] = field(default_factory=list)  # arrival to first token
    inter_token_s: list[tuple[float, int]] = field(default_factory=list)  # mean seconds per token, tokens
    finished: list[FinishedRequest] = field(default_factory=list)


class _Stream:
    """A request's consumer: event is set when there is something to take."""

    def __init__(self, state: RequestState) -> None:
        self.state = state
        self.event = asyncio.Event()
        self.num_announced = 0  # tokens when the consumer was last woken
        self.num_reported = 0  # tokens already in a StepReport
        self.last_token_at = 0.0

    def announce(self, interval: int) -> None:
        """Wakes the consumer for the first token, then for every `interval` tokens, and for the end."""
        new = self.num_reported - self.num_announced
        if interval > 1 and self.num_announced and new < interval and not self.state.finished:
            return
        self.num_announced = self.num_reported
        self.event.set()


class AsyncLLM:
    """Lives on one event loop; every method but from_engine_args is called there."""

    def __init__(self, client: EngineClient, *, stream_interval: int = 1) -> None:
        self._client = client
        self._stream_interval = stream_interval
        self._streams: dict[int, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._observers: list[Callable[[StepReport], None]] = []
        self._stopped = False
        self._continuing = False  # the rest of a poll is scheduled

    @classmethod
    def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        usage_context: Any = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> AsyncLLM:
        """Loads the model; blocks. Raises LoadError or ValueError with a sentence. on_progress as in EngineClient."""
        return cls(EngineClient.load(args, on_progress=on_progress), stream_interval=args.stream_interval)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self._client.model_config

    @property
    def grammars(self) -> GrammarCompiler:
        return self._client.grammars

    @property
    def engine_config(self) -> _core.EngineConfig:
        return self._client.core.config

    @property
    def healthy(self) -> bool:
        return not self._stopped and self._client.core.stats().healthy

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        mask: Any | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams the outputs of one request, in the form of sampling_params.output_kind.

        priority: lower runs first under the priority policy. cache_salt: requests share cached prefixes only within
        one salt. queue_timeout: seconds it may wait before it starts. Closing or cancelling the generator aborts the
        request and frees its blocks. Raises RequestError.
        """
        self._attach()
        if self._stopped:
            raise RequestError("The engine is shut down.", "engine")
        try:
            params = sampling_params.clone()
            text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
            chars = len(text) if isinstance(text, str) else 0
            if params.structured_outputs or chars + sum(map(len, params.bad_words or ())) > _LONG_TEXT:
                prepared = await asyncio.to_thread(self._client.prepare, prompt, params)
            else:
                prepared = self._client.prepare(prompt, params)
            state = self._client.submit(
                request_id,
                prepared,
                params,
                priority=priority,
                cache_salt=cache_salt,
                timeout_s=queue_timeout,
                mask=mask,
            )
        except ValueError as error:
            raise RequestError(str(error), "invalid") from error
        stream = self._streams[state.core_id] = _Stream(state)
        try:
            while True:
                await stream.event.wait()
                stream.event.clear()
                if state.num_unscored > _FEW_POSITIONS:
                    await asyncio.to_thread(state.score_prompt)
                output = state.take()
                if output is not None:
                    yield output
                    # Not state.finished: while the consumer was busy, more may have come than this output holds.
                    if output.finished:
                        return
                    if state.error is not None:
                        stream.event.set()
        finally:
            self._streams.pop(state.core_id, None)
            self._client.forget(state)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self._client.abort(request_id)

    def stats(self) -> _core.EngineStats:
        return self._client.core.stats()

    async def reset_prefix_cache(self) -> None:
        self._client.core.reset_prefix_cache()

    def add_step_observer(self, callback: Callable[[StepReport], None]) -> None:
        """callback is called on the event loop after every poll that brought something."""
        self._observers.append(callback)

    async def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits up to `timeout` seconds for the accepted ones; True if all finished."""
        self._attach()
        done = await asyncio.to_thread(self._client.core.drain, timeout)
        self._on_results()
        while self._client.has_unread:
            self._on_results()
        return done

    def heartbeat(self) -> _core.Heartbeat:
        """Never waits, whatever the engine is doing."""
        return self._client.core.heartbeat()

    def fail(self, sentence: str) -> None:
        """Ends every request with this error and uses the engine no more, without asking it: it may be stuck."""
        if self._stopped:
            return
        self._stopped = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._client.core.event_fd())
        for stream in self._streams.values():
            if not stream.state.finished:
                stream.state.error = RequestError(sentence, "engine")
            stream.event.set()

    async def aclose(self) -> None:
        """Ends what is left with an error and stops the engine without blocking the event loop."""
        self.fail("The engine was shut down.")
        await asyncio.to_thread(self._client.shutdown)

    def shutdown(self) -> None:
        """Aborts what is left and stops the engine. Idempotent."""
        if self._stopped:
            return
        self.fail("The engine was shut down.")
        self._client.shutdown()

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop or self._stopped:
            return
        if self._loop is not None and not self._loop.is_closed():
            if self._streams:
                raise RequestError("This AsyncLLM is in use on another event loop.", "engine")
            self._loop.remove_reader(self._client.core.event_fd())
        self._loop = loop
        loop.add_reader(self._client.core.event_fd(), self._on_event)

    def _on_event(self) -> None:
        if not self._continuing:
            self._on_results()

    def _continue(self) -> None:
        self._continuing = False
        self._on_results()

    def _on_results(self) -> None:
        if self._stopped:
            return
        report = StepReport()
        changed = self._client.poll(limit=_SLICE)
        now = time.monotonic()  # not before: the engine went on until the poll
        if self._client.has_unread and self._loop is not None and not self._continuing:
            self._continuing = True
            self._loop.call_soon(self._continue)
        for state in changed:
            stream = self._streams.get(state.core_id)
            if stream is None:
                continue
            _report(report, stream, now)
            stream.announce(self._stream_interval)
        if self._observers and (report.num_generated_tokens or report.finished):
            for observer in self._observers:
                observer(report)


def _report(report: StepReport, stream: _Stream, now: float) -> None:
    state = stream.state
    total = state.num_generated_tokens
    new = total - stream.num_reported
    report.num_generated_tokens += new
    if new and stream.num_reported == 0:
        report.num_prompt_tokens += len(state.prompt_token_ids)
        report.num_cached_tokens += state.num_cached_tokens
        report.first_token_s.append(max(0.0, state.metrics.first_token_time - state.metrics.arrival_time))
        count = state.params.num_reported
        if new > count:  # one of each sequence began it
            report.inter_token_s.append(((now - state.metrics.first_token_time) * count / (new - count), new - count))
    elif new:
        report.inter_token_s.append(((now - stream.last_token_at) * state.params.num_reported / new, new))
    if new:
        stream.last_token_at, stream.num_reported = now, total
    if state.finished:
        reasons = [s.finish_reason or "error" for s in state.sequences]
        report.finished.append(
            FinishedRequest(
                state.request_id,
                len(state.prompt_token_ids),
                state.num_cached_tokens,
                total,
                reasons,
                state.params,
                state.metrics,
            )
        )


AsyncLLMEngine = AsyncLLM
