"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from contextlib import aclosing

import msgspec
from aiohttp import web

from fastllm.outputs import RequestOutput
from fastllm.server import admission
from fastllm.server.answer_form import AnswerForm
from fastllm.server.body import read_json
from fastllm.server.conversation import FEW_PARTS, admitted, check_parts, named, prompt, tell
from fastllm.server.elsewhere import worked
from fastllm.server.generation import Job, UsageCounter, collect, first_then_rest, run
from fastllm.server.messages_builder import MessageBuilder
from fastllm.server.messages_input import NAMES, check, to_chat
from fastllm.server.messages_protocol import Message, MessagesRequest, MessageUsage, TokensCount
from fastllm.server.protocol import ChatRequest, TypedEvent
from fastllm.server.state import STATE_KEY, ServerState
from fastllm.server.typed_events import TypedEventStream


async def create(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, MessagesRequest)
    check(body)
    long = check_parts(body.messages, state.limits, "messages") > FEW_PARTS
    with named(NAMES):
        chat = await worked(state, long, to_chat, body)
        async with admitted(state, chat, clamp_output=True) as (job, answer):
            call = _Call(state, chat, job, answer, body.max_tokens or 0)
            if body.stream:
                return await call.stream(request)
            return web.Response(body=await call.answer(), content_type="application/json", charset="utf-8")


async def count_tokens(request: web.Request) -> web.Response:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, MessagesRequest)
    check(body, counting=True)
    long = check_parts(body.messages, state.limits, "messages") > FEW_PARTS
    with named(NAMES):
        chat = await worked(state, long, to_chat, body)
        admission.check_model(state, chat.model)
        admission.check_fields(chat, state.limits)
        _, ids = await prompt(state, chat, AnswerForm.of(state, chat))
    count = msgspec.json.encode(TokensCount(len(ids)))
    return web.Response(body=count, content_type="application/json", charset="utf-8")


class _Call:
    """One admitted message. `max_tokens` is what the caller asked for; the context may leave room for less."""

    def __init__(self, state: ServerState, chat: ChatRequest, job: Job, answer: AnswerForm, max_tokens: int) -> None:
        self.state = state
        self.chat = chat
        self.job = job
        self.max_tokens = max_tokens
        self.output = answer.sample()
        self.counter = UsageCounter([job])
        id = f"msg_{uuid.uuid4().hex}"
        self.builder = MessageBuilder(Message(id=id, model=state.model_names[0], usage=self._usage(0)))

    def _usage(self, cached: int) -> MessageUsage:
        usage = self.counter.usage()
        return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)

    def _tell(self, output: RequestOutput) -> list[TypedEvent]:
        (sample,) = output.outputs
        self.counter.add(0, output)
        return tell(self.builder, self.output.read(sample.text, sample.token_ids, sample.finish_reason is not None))

    def _finish(self, output: RequestOutput) -> list[TypedEvent]:
        """The events of the end, from the last update."""
        (sample,) = output.outputs
        reason = sample.finish_reason
        if reason == "length" and self.counter.completion < self.max_tokens:
            reason = "context"
        elif reason == "stop" and self.output.called:
            reason = "tool_calls"
        return self.builder.finish(reason, sample.stop_reason, self._usage(output.num_cached_tokens))

    async def answer(self) -> bytes:
        (output,) = await collect(self.state, [self.job], self.builder.message.id, self.chat)
        self._tell(output)
        self._finish(output)
        return msgspec.json.encode(self.builder.message)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        events = TypedEventStream(request)
        last: RequestOutput | None = None
        async with aclosing(run(self.state, [self.job], self.builder.message.id, self.chat)) as updates:
            rest = await first_then_rest(updates, events)
            await events.open()
            try:
                async for _, output in rest:
                    if last is None:  # with what the first update knows of the cache
                        await events.send(*self.builder.begin(self._usage(output.num_cached_tokens)))
                    last = output
                    told = self._tell(output)
                    if told:
                        await events.send(*told)
            except ConnectionError:
                raise
            except Exception as exc:
                return await events.fail(exc)
        assert last is not None
        return await events.end(*self._finish(last))
