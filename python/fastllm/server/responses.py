"""POST /v1/responses, and what can be asked about stored ones."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from fastllm.outputs import CompletionOutput, RequestOutput
from fastllm.server import admission
from fastllm.server.answer_form import AnswerForm
from fastllm.server.body import read_json
from fastllm.server.call import current_call
from fastllm.server.conversation import FEW_PARTS, admitted, check_parts, named, prompt, tell
from fastllm.server.elsewhere import worked
from fastllm.server.errors import bad_request
from fastllm.server.generation import Job, UsageCounter, collect, first_then_rest, run
from fastllm.server.logprobs import TokenNames, chat_logprobs
from fastllm.server.long_answer import FEW_ITEMS, json_response, long_answer
from fastllm.server.protocol import ChatMessage, ChatRequest, TokenLogprob
from fastllm.server.responses_builder import ResponseBuilder
from fastllm.server.responses_input import NAMES, check, listed_items, to_chat, to_messages, wants_logprobs
from fastllm.server.responses_protocol import (
    DeletedResponse,
    InputTokens,
    ItemList,
    NumberedEvent,
    ReasoningConfig,
    ResponseObject,
    ResponsesRequest,
    TextConfig,
    TextFormat,
)
from fastllm.server.responses_store import StoredResponse, conversation_bytes
from fastllm.server.state import STATE_KEY, ServerState
from fastllm.server.streaming import as_api_error
from fastllm.server.typed_events import TypedEventStream

_LOGPROB_BYTES = 256  # what one alternative of one position takes
_LIST_LIMIT = 100  # input items of one page


async def create(request: web.Request) -> web.StreamResponse:
    state, body, conversation, long = await _read(request)
    if body.store and state.responses.capacity == 0:
        raise bad_request("store must be false: this server keeps no responses (--responses-store 0).", "store")
    if body.background and (body.stream or body.store is False or state.responses.capacity == 0):
        raise bad_request("background needs a stored response and no stream.", "background")
    async with AsyncExitStack() as stack:
        with named(NAMES):
            chat = to_chat(body, conversation)
            job, answer = await stack.enter_async_context(admitted(state, chat))
            kept = await worked(state, long, _to_keep, body, conversation)
            call = _Call(state, body, chat, job, answer, conversation, kept, current_call().client.name)
            if body.background:
                return _json(call.start(stack.pop_all()))
            if body.stream:
                return await call.stream(request)
            return _json(await call.answer())


async def _read(request: web.Request) -> tuple[ServerState, ResponsesRequest, list[ChatMessage], bool]:
    """The request with the whole conversation it continues, and whether that is long."""
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, ResponsesRequest)
    check(body)
    long = False
    if not isinstance(body.input, str):
        long = check_parts(body.input, state.limits, "input") > FEW_PARTS
    earlier: list[ChatMessage] = []
    if body.previous_response_id is not None:
        entry = state.responses.get(body.previous_response_id, current_call().client.name, "previous_response_id")
        if entry.task is not None:
            raise bad_request("The previous response is still in progress.", "previous_response_id")
        earlier = entry.conversation
    conversation = [*earlier, *await worked(state, long, to_messages, body.input)]
    return state, body, conversation, len(conversation) > FEW_PARTS or long


def _to_keep(body: ResponsesRequest, conversation: Sequence[ChatMessage]) -> tuple[list[dict[str, Any]], int]:
    """The input as items, and what it takes with the conversation, bytes."""
    return listed_items(body.input), 2 * conversation_bytes(conversation)  # the items repeat what is new of it


async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens."""
    state, body, conversation, _ = await _read(request)
    with named(NAMES):
        chat = to_chat(body, conversation)
        admission.check_model(state, body.model)
        admission.check_fields(chat, state.limits)
        _, ids = await prompt(state, chat, AnswerForm.of(state, chat))
    return _json(InputTokens(len(ids)))


async def retrieve(request: web.Request) -> web.Response:
    if request.query.get("stream", "false").lower() == "true":
        raise bad_request("A stored response cannot be streamed.", "stream", "unsupported_parameter")
    return _json(_stored(request).response)


async def delete(request: web.Request) -> web.Response:
    id = request.match_info["id"]
    request.app[STATE_KEY].responses.delete(id, current_call().client.name)
    return _json(DeletedResponse(id))


async def cancel(request: web.Request) -> web.Response:
    entry = _stored(request)
    if not entry.response.background:
        raise bad_request("Only background responses can be cancelled; closing its connection stops any other.")
    task = entry.task
    if task is not None:
        task.cancel()
        await asyncio.wait({task})
    return _json(entry.response)


async def input_items(request: web.Request) -> web.Response:
    """Newest first unless ?order=asc; ?after=ID goes on behind that item."""
    items = _stored(request).items
    if request.query.get("order", "desc") != "asc":
        items = items[::-1]
    limit = request.query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= _LIST_LIMIT:
        raise bad_request(f"limit must be from 1 to {_LIST_LIMIT}.", "limit")
    ids = [str(item["id"]) for item in items]
    after = request.query.get("after")
    if after is not None and after not in ids:
        raise bad_request("after names no item of this response.", "after")
    start = ids.index(after) + 1 if after is not None else 0
    page = items[start : start + int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return _json(ItemList(page, first, last, has_more=start + len(page) < len(items)))


def _stored(request: web.Request) -> StoredResponse:
    return request.app[STATE_KEY].responses.get(request.match_info["id"], current_call().client.name)


def _json(value: Any) -> web.Response:
    return json_response(msgspec.json.encode(value))


class _Call:
    """One admitted response."""

    def __init__(
        self,
        state: ServerState,
        body: ResponsesRequest,
        chat: ChatRequest,
        job: Job,
        answer: AnswerForm,
        conversation: list[ChatMessage],
        kept: tuple[list[dict[str, Any]], int],
        owner: str,
    ) -> None:
        """kept: what _to_keep() returns."""
        self.state = state
        self.chat = chat
        self.job = job
        self.output = answer.sample()
        self.counter = UsageCounter([job])
        self.top_logprobs = (body.top_logprobs or 0) if wants_logprobs(body) else None
        response = ResponseObject(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            model=state.model_names[0],
            status="queued",
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning=body.reasoning or ReasoningConfig(),
            store=body.store is not False and state.responses.capacity > 0,
            temperature=job.params.temperature,
            text=TextConfig(body.text.format if body.text and body.text.format else TextFormat("text")),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=job.params.top_p,
            user=body.user,
        )
        self.builder = ResponseBuilder(response)
        # Anyone may ask for the stored response while a worker still writes the builder's.
        self.entry = StoredResponse(owner, msgspec.structs.replace(response, output=[]), conversation, *kept)

    def _tell(self, output: RequestOutput) -> list[NumberedEvent]:
        (sample,) = output.outputs
        deltas = self.output.read(sample.text, sample.token_ids, sample.finish_reason is not None)
        self.counter.add(0, output)
        self.counter.reasoning = self.output.reasoning_tokens
        self.builder.score(self._logprobs(sample))
        return tell(self.builder, deltas)

    def _logprobs(self, sample: CompletionOutput) -> list[TokenLogprob]:
        if self.top_logprobs is None or not sample.logprobs:
            return []
        names = TokenNames(self.state.llm.tokenizer)
        return chat_logprobs(names, sample.token_ids, sample.logprobs, self.top_logprobs).content

    def _keep(self) -> None:
        """The answer becomes part of the conversation that a later request may continue."""
        if not self.entry.response.store:
            return
        answer = self.builder.answer()
        self.entry.conversation.append(answer)
        alternatives = self.counter.completion * (1 + self.top_logprobs) if self.top_logprobs is not None else 0
        size = self.entry.size + conversation_bytes([answer]) + alternatives * _LOGPROB_BYTES
        self.state.responses.add(replace(self.entry, response=self.builder.response, size=size, task=None))

    async def answer(self) -> ResponseObject:
        (output,) = await collect(self.state, [self.job], self.entry.response.id, self.chat)
        await worked(self.state, long_answer([output], self.chat), self._complete, output)
        self._keep()
        return self.builder.response

    def _complete(self, output: RequestOutput) -> None:
        self._tell(output)
        self._finish(output.outputs[0].finish_reason)

    def _finish(self, reason: str | None) -> list[NumberedEvent]:
        return self.builder.finish(reason, self.counter.usage(), int(time.time()))

    async def stream(self, request: web.Request) -> web.StreamResponse:
        events = TypedEventStream(request)
        builder = self.builder
        async with aclosing(run(self.state, [self.job], self.entry.response.id, self.chat)) as updates:
            rest = await first_then_rest(updates, events)
            await events.open()
            try:
                await events.send(*builder.begin())
                reason: str | None = None
                async for _, output in rest:
                    reason = output.outputs[0].finish_reason
                    told = self._tell(output)
                    if told:
                        await events.send(*told)
            except ConnectionError:
                raise
            except Exception as exc:
                return await events.end(*builder.fail(as_api_error(exc)))
        scored = self.counter.completion if self.top_logprobs is not None else 0
        last = await worked(self.state, scored > FEW_ITEMS, self._finish, reason)
        self._keep()
        return await events.end(*last)

    def start(self, held: AsyncExitStack) -> ResponseObject:
        """Goes on without the client; `held` is left when the answer is there."""
        self.entry.task = asyncio.create_task(self._in_background(held))
        self.state.responses.add(self.entry)
        return self.entry.response

    async def _in_background(self, held: AsyncExitStack) -> None:
        response = self.entry.response
        async with held:
            response.status = "in_progress"
            try:
                await self.answer()
            except asyncio.CancelledError:
                response.status = "cancelled"
                raise
            except Exception as exc:
                self.builder.fail(as_api_error(exc))
                self.entry.response = self.builder.response
            finally:
                self.entry.task = None
