"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from aiohttp import web
from msgspec import UNSET

from fastllm.outputs import CompletionOutput, RequestOutput, TokenIds
from fastllm.server import admission
from fastllm.server.body import read_json
from fastllm.server.elsewhere import worked
from fastllm.server.generation import Job, UsageCounter, accepted, collect, first_then_rest, run
from fastllm.server.logprobs import Position, TextPlace, TokenNames, completion_logprobs, prompt_logprobs
from fastllm.server.long_answer import json_response, long_answer, raw_array
from fastllm.server.middleware import harmless_id
from fastllm.server.params import output_room, sampling_params
from fastllm.server.prompts import encode_prompt, prompt_text
from fastllm.server.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from fastllm.server.state import STATE_KEY, ServerState
from fastllm.server.streaming import EventStream
from fastllm.server.structured import compile_constraint, read_constraint


def wire_id(prefix: str, request: web.Request, given: str | None) -> str:
    """`prefix-` and the client's own id, from its header or else its body; 16 hex digits where it sent none."""
    own = harmless_id(request.headers.get("X-Request-Id")) or harmless_id(given)
    return f"{prefix}-{own or uuid.uuid4().hex[:16]}"


async def handle(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE_KEY]
    admission.check_open(state)
    body = await read_json(request, CompletionRequest)
    admission.check_model(state, body.model)
    admission.check_fields(body, state.limits)
    prompts = admission.split_prompts(body, state.limits)
    constraint = read_constraint(body)
    admission.check_priority(state, body.priority)
    sequences = admission.check_sequences(len(prompts), body, state.limits)
    admission.check_open(state)
    admission.check_queue(state, sequences)
    with accepted(state, sequences):
        jobs: list[Job] = []
        grammar = await compile_constraint(state, *constraint) if constraint else None
        for prompt in prompts:
            jobs.append(await _job(state, body, prompt))
            jobs[-1].grammar = grammar
            await asyncio.sleep(0)  # between the prompts of a batch others get their turn
        call = _Call(state, body, jobs, wire_id("cmpl", request, body.request_id))
        if body.stream:
            return await call.stream(request)
        return json_response(await call.answer())


async def _job(state: ServerState, body: CompletionRequest, prompt: str | TokenIds) -> Job:
    special = body.add_special_tokens is not False
    ids = await encode_prompt(state, prompt, special, body.truncate_prompt_tokens, output_room(body))
    params = sampling_params(state, body, len(ids), "prompt")
    return Job(ids, params, await prompt_text(state, prompt) if body.echo else None)


class _Call:
    """One admitted request and the choices it has produced so far."""

    def __init__(self, state: ServerState, body: CompletionRequest, jobs: list[Job], id: str) -> None:
        self.state = state
        self.body = body
        self.jobs = jobs
        self.n = body.n or 1
        self.id = id
        self.created = int(time.time())
        self.model = state.model_names[0]
        self.names = TokenNames(state.llm.tokenizer, bool(body.return_tokens_as_token_ids))
        self.drop_output = bool(body.echo) and body.max_tokens == 0
        self.counter = UsageCounter(jobs)

    def _response(self, choices: list[CompletionChoice]) -> CompletionResponse:
        return CompletionResponse(
            id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices
        )

    async def answer(self) -> bytes:
        outputs = await collect(self.state, self.jobs, self.id, self.body)
        return await worked(self.state, long_answer(outputs, self.body), self._answer, outputs)

    def _answer(self, outputs: Sequence[RequestOutput]) -> bytes:
        choices: list[CompletionChoice] = []
        for number, (job, output) in enumerate(zip(self.jobs, outputs, strict=True)):
            self._count(number, output)
            for sample in output.outputs:
                choices.append(self._final_choice(number, job, output, sample))
        response = self._response(choices)
        response.service_tier = response.kv_transfer_params = response.ec_transfer_params = response.metrics = None
        response.system_fingerprint = self.state.fingerprint
        response.usage = self.counter.usage()
        return msgspec.json.encode(response)

    def _count(self, number: int, output: RequestOutput) -> None:
        self.counter.add(number, output)
        if self.drop_output:
            self.counter.completion = 0

    def _final_choice(self, number: int, job: Job, output: RequestOutput, sample: CompletionOutput) -> CompletionChoice:
        text, tokens = ("", []) if self.drop_output else (sample.text, list(sample.token_ids))
        positions = sample.logprobs or []
        choice = CompletionChoice(number * self.n + sample.index, text)
        choice.finish_reason = "length" if self.drop_output else sample.finish_reason
        choice.stop_reason = None if self.drop_output else sample.stop_reason
        if self.body.echo:
            choice.text = (job.text or "") + text
        if self.body.logprobs is not None:
            place = TextPlace()
            lead = self._prompt_part(job, output, place) if self.body.echo else None
            choice.logprobs = self._logprobs(tokens, positions, place)
            if lead is not None:
                _extend(lead, choice.logprobs)
                choice.logprobs = lead
        choice.routed_experts = None
        wants_prompt = self.body.prompt_logprobs is not None
        choice.prompt_logprobs = (
            raw_array(prompt_logprobs(self.names, output.prompt_logprobs)) if wants_prompt else None
        )
        if self.body.return_token_ids:
            choice.token_ids = tokens
            choice.prompt_token_ids = list(job.prompt_ids)
        return choice

    def _logprobs(
        self, tokens: Sequence[int], positions: Sequence[Position | None], place: TextPlace
    ) -> CompletionLogprobs:
        return completion_logprobs(self.names, tokens, positions, self.body.logprobs or 0, place)

    def _prompt_part(self, job: Job, output: RequestOutput, place: TextPlace) -> CompletionLogprobs:
        positions = output.prompt_logprobs or [None] * len(job.prompt_ids)
        return self._logprobs(job.prompt_ids, positions, place)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        options = self.body.stream_options
        include_usage = self.state.force_include_usage or bool(options and options.include_usage)
        continuous = include_usage and bool(options and options.continuous_usage_stats)
        events = EventStream(request)
        places = [TextPlace() for _ in range(len(self.jobs) * self.n)]  # of each choice
        started = [False] * len(places)
        async with aclosing(run(self.state, self.jobs, self.id, self.body)) as updates:
            rest = await first_then_rest(updates, events)
            await events.open()
            try:
                async for number, output in rest:
                    self._count(number, output)
                    usage = self.counter.usage() if continuous else None if include_usage else UNSET
                    chunks: list[CompletionResponse] = []
                    for sample in output.outputs:
                        choice = self._delta_choice(number, output, sample, places, started)
                        if choice is not None:
                            chunks.append(self._response([choice]))
                            chunks[-1].usage = usage
                    if chunks:
                        await events.send(*chunks)
            except ConnectionError:
                raise
            except Exception as exc:
                return await events.fail(exc)
        if include_usage:
            chunk = self._response([])
            chunk.usage = self.counter.usage()
            chunk.system_fingerprint = self.state.fingerprint
            await events.send(chunk)
        return await events.done()

    def _delta_choice(
        self,
        number: int,
        output: RequestOutput,
        sample: CompletionOutput,
        places: list[TextPlace],
        started: list[bool],
    ) -> CompletionChoice | None:
        """The choice of one chunk; none while its text is held back and nobody asked for tokens."""
        index = number * self.n + sample.index
        text, tokens = ("", []) if self.drop_output else (sample.text, list(sample.token_ids))
        choice = CompletionChoice(index, text, prompt_logprobs=UNSET)
        choice.finish_reason = "length" if self.drop_output and sample.finish_reason else sample.finish_reason
        choice.stop_reason = None if self.drop_output else sample.stop_reason
        lead: CompletionLogprobs | None = None
        job = self.jobs[number]
        if not started[index]:
            started[index] = True
            if self.body.echo:
                choice.text = (job.text or "") + text
                lead = self._prompt_part(job, output, places[index]) if self.body.logprobs is not None else None
            if self.body.return_token_ids:
                choice.prompt_token_ids = list(job.prompt_ids)
        if self.body.logprobs is not None and (tokens or lead):
            part = self._logprobs(tokens, sample.logprobs or [], places[index])
            if lead is not None:
                _extend(lead, part)
            choice.logprobs = lead or part
        if self.body.return_token_ids:
            choice.token_ids = tokens
        has_tokens = bool(tokens) and (self.body.logprobs is not None or bool(self.body.return_token_ids))
        return choice if choice.text or choice.finish_reason or has_tokens else None


def _extend(first: CompletionLogprobs, second: CompletionLogprobs) -> None:
    first.text_offset += second.text_offset
    first.token_logprobs += second.token_logprobs
    first.tokens += second.tokens
    first.top_logprobs += second.top_logprobs
