"""From a Responses request to the chat request it amounts to. Pure functions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from fastllm.server import admission
from fastllm.server.conversation import common_fields
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.protocol import ChatMessage, ChatRequest, ContentPart, ResponseFormat
from fastllm.server.responses_protocol import FunctionTool, InputItem, InputPart, ResponsesRequest, TextFormat

# What the fields of a chat request are called here, for errors.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
_UNSUPPORTED = {
    "conversation": "conversation objects (previous_response_id continues a response)",
    "prompt": "prompt templates",
    "max_tool_calls": "built-in tools",
    "moderation": "moderation",
    "context_management": "context management",
    "best_of": "several answers to one request",
    "prompt_logprobs": "log probabilities of the prompt in this API",
    "return_token_ids": "token ids in this API",
}
_LOGPROBS = "message.output_text.logprobs"
# Agents offer these along with their functions; the model here is not told of them.
_HOSTED = frozenset({"code_interpreter", "file_search", "image_generation", "web_search", "web_search_preview"})
# Parts of answers that only built-in tools or images produce: asking for them adds nothing.
_NEVER_THERE = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
_ROLES = frozenset({"user", "assistant", "system", "developer"})
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_MAX_METADATA = 16  # pairs; OpenAI's, like the two lengths
_MAX_METADATA_KEY = 64  # characters
_MAX_METADATA_VALUE = 512  # characters


def check(body: ResponsesRequest) -> None:
    """What this API refuses beyond what the chat refuses."""
    admission.refuse_set_fields(body, _UNSUPPORTED)
    if body.max_tokens is not None:
        raise bad_request("Send max_output_tokens instead of max_tokens.", "max_tokens", "unsupported_parameter")
    if body.n not in (None, 1):
        raise bad_request("n must be 1: a response has one answer.", "n", "unsupported_parameter")
    if body.truncation not in (None, "disabled"):
        raise bad_request(
            "truncation must be 'disabled': this server refuses input that does not fit the context.",
            "truncation",
            "unsupported_parameter",
        )
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise bad_request("text.verbosity: this server cannot steer it; say so in the instructions.", "text")
    if body.reasoning is not None and body.reasoning.summary not in (None, "auto"):
        raise bad_request("reasoning.summary: this server does not summarise reasoning.", "reasoning")
    unknown = [name for name in body.include or () if name != _LOGPROBS and name not in _NEVER_THERE]
    if unknown:
        raise bad_request(f"include does not know {unknown[0][:60]!r}.", "include", "invalid_value")
    metadata = body.metadata or {}
    if len(metadata) > _MAX_METADATA:
        raise bad_request(f"metadata takes at most {_MAX_METADATA} pairs, got {len(metadata)}.", "metadata")
    if any(len(key) > _MAX_METADATA_KEY or len(value) > _MAX_METADATA_VALUE for key, value in metadata.items()):
        raise bad_request(
            f"metadata keys take at most {_MAX_METADATA_KEY} characters and values {_MAX_METADATA_VALUE}.", "metadata"
        )


def to_messages(given: str | Sequence[InputItem]) -> list[ChatMessage]:
    """The input as chat messages; calls that follow each other become one message, as templates expect."""
    if isinstance(given, str):
        return [ChatMessage("user", given)]
    messages: list[ChatMessage] = []
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if item.type == "message":
            messages.append(_message(item, where))
        elif item.type == "function_call":
            _add_call(messages, item, where)
        elif item.type == "function_call_output":
            if item.call_id is None or item.output is None:
                raise _refused(where, "needs call_id and output")
            messages.append(ChatMessage("tool", _content(item.output, where), tool_call_id=item.call_id))
        elif item.type != "reasoning":  # what the model thought in an earlier turn is not shown to it again
            raise _refused(where, f"has the type {item.type[:40]!r}, which this server does not take")
    return messages


def _message(item: InputItem, where: str) -> ChatMessage:
    if item.role not in _ROLES:
        allowed = ", ".join(sorted(_ROLES))
        raise _refused(where, f"must have one of the roles {allowed}, got {(item.role or '')[:40]!r}")
    if item.content is None:
        raise _refused(where, "needs content")
    return ChatMessage(item.role, _content(item.content, where))


def _content(content: str | Sequence[InputPart], where: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    parts: list[ContentPart] = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is None:
            raise _refused(f"{where}.content[{number}]", f"must be text, got {part.type[:40]!r}; the model reads text")
        parts.append(ContentPart("text", text))
    return parts


def _add_call(messages: list[ChatMessage], item: InputItem, where: str) -> None:
    if item.call_id is None or item.name is None or item.arguments is None:
        raise _refused(where, "needs call_id, name and arguments")
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage("assistant"))
    call = {
        "id": item.call_id,
        "type": "function",
        "function": {"name": item.name, "arguments": item.arguments},
    }
    messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]


def _refused(where: str, what: str) -> ApiError:
    return bad_request(f"{where} {what}.", "input", "invalid_value")


def to_chat(body: ResponsesRequest, conversation: Sequence[ChatMessage]) -> ChatRequest:
    """`conversation`: the messages so far, without the instructions."""
    instructions = [ChatMessage("system", body.instructions)] if body.instructions is not None else []
    fields = common_fields(body)
    fields["stream_options"] = None  # obfuscation is all they could ask for here
    fields["response_format"] = _response_format(body.text.format if body.text else None) or body.response_format
    return ChatRequest(
        **fields,
        messages=[*instructions, *conversation],
        max_completion_tokens=body.max_output_tokens,
        logprobs=wants_logprobs(body) or None,
        top_logprobs=body.top_logprobs,
        tools=_tools(body.tools),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or _LOGPROBS in (body.include or ())


def _response_format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    wanted: dict[str, Any] = {"type": given.type}
    if given.type == "json_schema":
        wanted["json_schema"] = {key: value for key, value in msgspec.to_builtins(given).items() if key != "type"}
    return msgspec.convert(wanted, ResponseFormat)


def _tools(tools: Sequence[FunctionTool] | None) -> list[dict[str, Any]] | None:
    """Chat nests what this API has flat. Tools that the server itself would run are left out: no answer needs them."""
    functions: list[FunctionTool] = []
    for index, tool in enumerate(tools or ()):
        if tool.type in _HOSTED:
            continue
        if tool.type != "function" or not tool.name:
            raise bad_request(
                f"tools[{index}] must be a function with a name, got the type {tool.type[:40]!r}.",
                "tools",
                "unsupported_parameter",
            )
        functions.append(tool)
    return [
        {"type": "function", "function": {k: v for k, v in msgspec.to_builtins(tool).items() if k != "type"}}
        for tool in functions
    ] or None


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def listed_items(given: str | Sequence[InputItem]) -> list[dict[str, Any]]:
    """The input as /input_items tells it."""
    if isinstance(given, str):
        given = [InputItem(role="user", content=given)]
    items: list[dict[str, Any]] = []
    for item in given:
        listed: dict[str, Any] = msgspec.to_builtins(item)
        if isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            listed["content"] = [{"type": kind, "text": item.content}]
        items.append({**listed, "type": item.type, "id": item.id or f"msg_{uuid.uuid4().hex}", "status": "completed"})
    return items
