"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from contextlib import aclosing

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from fastllm.outputs import CompletionOutput, RequestOutput
from fastllm.server import admission
from fastllm.server.answer_form import AnswerForm
from fastllm.server.body import read_json
from fastllm.server.chat_output import message_of
from fastllm.server.completions import wire_id
from fastllm.server.conversation import admitted
from fastllm.server.elsewhere import worked
from fastllm.server.generation import Job, UsageCounter, collect, first_then_rest, run
from fastllm.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from fastllm.server.long_answer import json_response, long_answer, raw_array
from fastllm.server.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    Delta,
    Usage,
)
from fastllm.server.state import STATE_KEY, ServerState
from fastllm.server.streaming import EventStream


async def handle(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, ChatRequest)
    async with admitted(state, body) as (job, answer):
        call = _Call(state, body, job, answer, wire_id("chatcmpl", request, body.request_id))
        if body.stream:
            return await call.stream(request)
        return json_response(await call.answer())


class _Call:
    """One admitted conversation."""

    def __init__(self, state: ServerState, body: ChatRequest, job: Job, answer: AnswerForm, id: str) -> None:
        self.state = state
        self.body = body
        self.job = job
        self.id = id
        self.created = int(time.time())
        self.model = state.model_names[0]
        self.names = TokenNames(state.llm.tokenizer, bool(body.return_tokens_as_token_ids))
        continues = body.continue_final_message or body.add_generation_prompt is False
        self.role = body.messages[-1].role if continues else state.response_role
        self.counter = UsageCounter([job])
        self.form = answer
        self.samples = [answer.sample() for _ in range(body.n or 1)]

    def _count(self, output: RequestOutput) -> None:
        self.counter.add(0, output)
        if self.form.reasoning is not None:
            self.counter.reasoning = sum(sample.reasoning_tokens or 0 for sample in self.samples)

    async def answer(self) -> bytes:
        (output,) = await collect(self.state, [self.job], self.id, self.body)
        return await worked(self.state, long_answer([output], self.body), self._answer, output)

    def _answer(self, output: RequestOutput) -> bytes:
        choices = [
            ChatChoice(
                sample.index,
                message_of(self.role, self.samples[sample.index].read(sample.text, sample.token_ids, True)),
                self._logprobs(sample),
                self._finish_reason(sample),
                sample.stop_reason,
                list(sample.token_ids) if self.body.return_token_ids else None,
            )
            for sample in output.outputs
        ]
        self._count(output)
        wants_prompt = self.body.prompt_logprobs is not None
        return msgspec.json.encode(
            ChatResponse(
                id=self.id,
                created=self.created,
                model=self.model,
                choices=choices,
                system_fingerprint=self.state.fingerprint,
                usage=self.counter.usage(),
                prompt_logprobs=raw_array(prompt_logprobs(self.names, output.prompt_logprobs))
                if wants_prompt
                else None,
                prompt_token_ids=list(self.job.prompt_ids) if self.body.return_token_ids else None,
            )
        )

    def _finish_reason(self, sample: CompletionOutput) -> str | None:
        """OpenAI says "stop" after a call that the request itself named."""
        called = self.samples[sample.index].called and not (self.form.tools and self.form.tools.forced)
        return "tool_calls" if called and sample.finish_reason == "stop" else sample.finish_reason

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if not self.body.logprobs or sample.logprobs is None:
            return None
        return chat_logprobs(self.names, sample.token_ids, sample.logprobs, self.body.top_logprobs or 0)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None | UnsetType) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        options = self.body.stream_options
        include_usage = self.state.force_include_usage or bool(options and options.include_usage)
        continuous = include_usage and bool(options and options.continuous_usage_stats)
        events = EventStream(request)

        def usage() -> Usage | None | UnsetType:
            return self.counter.usage() if continuous else None if include_usage else UNSET

        async with aclosing(run(self.state, [self.job], self.id, self.body)) as updates:
            rest = await first_then_rest(updates, events)
            await events.open()
            try:
                opening = [ChatChunkChoice(index, Delta(self.role, "")) for index in range(self.body.n or 1)]
                chunks = [self._chunk([choice], usage()) for choice in opening]
                for chunk in chunks:
                    chunk.prompt_token_ids = chunk.prompt_text = None
                if self.body.return_token_ids:
                    chunks[0].prompt_token_ids = list(self.job.prompt_ids)
                await events.send(*chunks)
                async for _, output in rest:
                    choices = [choice for sample in output.outputs for choice in self._delta_choices(sample)]
                    self._count(output)
                    if choices:
                        await events.send(*(self._chunk([choice], usage()) for choice in choices))
            except ConnectionError:
                raise
            except Exception as exc:
                return await events.fail(exc)
        if include_usage:
            chunk = self._chunk([], self.counter.usage())
            chunk.system_fingerprint = self.state.fingerprint
            await events.send(chunk)
        return await events.done()

    def _delta_choices(self, sample: CompletionOutput) -> list[ChatChunkChoice]:
        """OpenAI's order: what the text adds while there is some, then an empty delta with the finish reason."""
        choices: list[ChatChunkChoice] = []
        logprobs = self._logprobs(sample) if sample.token_ids else None
        token_ids = list(sample.token_ids) if self.body.return_token_ids and sample.token_ids else None
        finished = sample.finish_reason is not None
        deltas = self.samples[sample.index].read(sample.text, sample.token_ids, finished)
        if not deltas and (logprobs is not None or token_ids is not None):
            deltas = [Delta(content="")]  # text that is held back has tokens all the same
        for number, delta in enumerate(deltas):
            choices.append(ChatChunkChoice(sample.index, delta))
            if number == 0:
                choices[-1].logprobs, choices[-1].token_ids = logprobs, token_ids
        if finished:
            reason = self._finish_reason(sample)
            choices.append(
                ChatChunkChoice(
                    sample.index, Delta(), finish_reason=reason, stop_reason=sample.stop_reason, token_ids=None
                )
            )
        return choices
