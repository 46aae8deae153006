"""A conversation of any API's shape, admitted as the chat request it amounts to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol, TypeVar

from fastllm.outputs import TokenIds
from fastllm.server import admission
from fastllm.server.answer_form import AnswerForm
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.generation import Job, accepted
from fastllm.server.limits import Limits
from fastllm.server.params import output_room, sampling_params
from fastllm.server.prompts import encode_messages, truncate_ids
from fastllm.server.protocol import ChatRequest, CommonRequest, Delta, FunctionDelta
from fastllm.server.state import ServerState

FEW_PARTS = 200  # of a conversation, that the event loop looks at itself
Told = TypeVar("Told", covariant=True)


class Builder(Protocol[Told]):
    """What an API makes of an answer, as events."""

    def say(self, text: str) -> Sequence[Told]: ...
    def think(self, text: str) -> Sequence[Told]: ...
    def call(self, call_id: str, name: str) -> Sequence[Told]: ...
    def argue(self, arguments: str) -> Sequence[Told]: ...


class HasContent(Protocol):
    @property
    def content(self) -> Any: ...


@asynccontextmanager
async def admitted(
    state: ServerState, body: ChatRequest, *, clamp_output: bool = False
) -> AsyncIterator[tuple[Job, AnswerForm]]:
    """What is to be generated, and how it is read. It counts as an active request until the block is left.

    clamp_output: a limit on the output that goes beyond the context is cut to it instead of refused.
    """
    admission.check_model(state, body.model)
    admission.check_fields(body, state.limits)
    admission.check_priority(state, body.priority)
    sequences = admission.check_sequences(1, body, state.limits)
    answer = AnswerForm.of(state, body)
    admission.check_open(state)
    admission.check_queue(state, sequences)
    with accepted(state, sequences):
        text, ids = await prompt(state, body, answer, fits=body.truncate_prompt_tokens is None)
        room = state.llm.model_config.max_model_len - len(ids)
        if clamp_output and body.max_tokens is not None and body.max_tokens > room > 0:
            body.max_tokens = room
        job = Job(ids, sampling_params(state, body, len(ids), "messages"))
        answer.see_prompt(text)
        answer.adjust(job.params)
        job.grammar = await answer.compile()
        yield job, answer


async def prompt(
    state: ServerState, body: ChatRequest, answer: AnswerForm, *, fits: bool = False
) -> tuple[str, TokenIds]:
    """The rendered conversation and its tokens. fits: what leaves no room in the context is refused."""
    text, ids = await encode_messages(state, body, bool(body.add_special_tokens), answer.tools, fits=fits)
    kept = truncate_ids(state, ids, body.truncate_prompt_tokens, output_room(body))
    admission.check_tokens(state, kept, "messages")
    return text, kept


def check_parts(pieces: Sequence[HasContent], limits: Limits, param: str) -> int:
    """The messages and parts of messages; refuses too many."""
    count = len(pieces)
    if count <= limits.max_messages:
        count += sum(len(piece.content) for piece in pieces if isinstance(piece.content, list))
    if count > limits.max_messages:
        raise bad_request(f"{param} takes at most {limits.max_messages} messages and parts, got {count}.", param)
    return count


def tell(builder: Builder[Told], deltas: Sequence[Delta]) -> list[Told]:
    """What the deltas of a chat answer add to the answer of another API."""
    told: list[Told] = []
    for delta in deltas:
        if isinstance(delta.reasoning, str):
            told += builder.think(delta.reasoning)
        if isinstance(delta.content, str) and delta.content:
            told += builder.say(delta.content)
        for call in delta.tool_calls or ():
            function = call.function or FunctionDelta()
            if isinstance(call.id, str) and isinstance(function.name, str):
                told += builder.call(call.id, function.name)
            if isinstance(function.arguments, str) and function.arguments:
                told += builder.argue(function.arguments)
    return told


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a chat's field speak of the caller's field instead. `names`: chat's name -> the caller's."""
    try:
        yield
    except ApiError as exc:
        raise exc.renamed(names) from None


def common_fields(body: CommonRequest) -> dict[str, Any]:
    """The fields that every shape shares, to build a chat request from."""
    return {name: getattr(body, name) for name in CommonRequest.__struct_fields__}
