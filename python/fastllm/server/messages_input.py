"""From a Messages request to the chat request it amounts to. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from fastllm.server import admission
from fastllm.server.conversation import common_fields
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.messages_protocol import (
    Block,
    MessageParam,
    MessagesRequest,
    OutputConfig,
    OutputFormat,
    Thinking,
    ToolChoice,
    ToolParam,
)
from fastllm.server.protocol import ChatMessage, ChatRequest, ContentPart, ResponseFormat

# What the fields of a chat request are called here, for errors.
NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
_UNSUPPORTED = {
    "container": "containers",
    "mcp_servers": "MCP servers",
    "best_of": "several answers to one request",
    "prompt_logprobs": "log probabilities in this API",
    "return_token_ids": "token ids in this API",
}
_ROLES = frozenset({"user", "assistant", "system"})


def check(body: MessagesRequest, *, counting: bool = False) -> None:
    """What this API refuses beyond what the chat refuses. `counting`: nothing will be generated."""
    admission.refuse_set_fields(body, _UNSUPPORTED)
    if body.max_tokens is None and not counting:
        raise bad_request("max_tokens is required.", "max_tokens", "missing_required_parameter")
    if body.n not in (None, 1):
        raise bad_request("n must be 1: a message has one answer.", "n", "unsupported_parameter")
    if body.thinking is not None and body.thinking.type not in ("enabled", "disabled", "adaptive"):
        raise bad_request("thinking.type must be 'enabled', 'disabled' or 'adaptive'.", "thinking")


def to_chat(body: MessagesRequest) -> ChatRequest:
    messages = [ChatMessage("system", _texts(body.system, "system"))] if body.system is not None else []
    for index, message in enumerate(body.messages):
        messages += _to_messages(message, f"messages[{index}]")
    prefilled = bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls
    fields = common_fields(body)
    fields["stop"] = body.stop_sequences if body.stop_sequences is not None else body.stop
    fields["stream_options"] = None
    fields["user"] = body.user or (body.metadata.user_id if body.metadata else None)
    config = body.output_config or OutputConfig()
    if config.format is not None:
        fields["response_format"] = _response_format(config.format)
    return ChatRequest(
        **fields,
        messages=messages,
        continue_final_message=prefilled or None,  # the answer goes on where the caller's text stops
        tools=_tools(body.tools),
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=not body.tool_choice.disable_parallel_tool_use if body.tool_choice else None,
        reasoning_effort=_effort(body.thinking, config),
        include_reasoning=False if body.thinking is not None and body.thinking.type == "disabled" else None,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _to_messages(message: MessageParam, where: str) -> list[ChatMessage]:
    if message.role not in _ROLES:
        allowed = ", ".join(sorted(_ROLES))
        raise _refused(f"{where}.role", f"must be one of {allowed}, got {message.role[:40]!r}")
    if isinstance(message.content, str):
        return [ChatMessage(message.role, message.content)]
    if message.role == "assistant":
        return [_assistant(message.content, where)]
    messages: list[ChatMessage] = []
    texts: list[Block] = []
    for number, block in enumerate(message.content):
        if block.type != "tool_result":
            texts.append(block)
            continue
        if block.tool_use_id is None:
            raise _refused(f"{where}.content[{number}]", "needs tool_use_id")
        if texts:
            messages.append(ChatMessage(message.role, _texts(texts, where)))
            texts = []
        result = _texts(block.content or "", f"{where}.content[{number}].content")
        messages.append(ChatMessage("tool", result, tool_call_id=block.tool_use_id))
    if texts or not messages:
        messages.append(ChatMessage(message.role, _texts(texts, where)))
    return messages


def _assistant(blocks: Sequence[Block], where: str) -> ChatMessage:
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    texts: list[Block] = []
    for number, block in enumerate(blocks):
        if block.type == "tool_use":
            if block.id is None or block.name is None:
                raise _refused(f"{where}.content[{number}]", "needs id and name")
            function = {"name": block.name, "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(block)
    content = _texts(texts, where) if texts or not calls else None
    return ChatMessage("assistant", content, tool_calls=calls or None, reasoning_content="\n".join(thoughts) or None)


def _texts(content: str | Iterable[Block], where: str) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    parts: list[ContentPart] = []
    for block in content:
        if block.type != "text" or block.text is None:
            raise _refused(where, f"must hold text blocks, got {block.type[:40]!r}; the model reads text")
        parts.append(ContentPart("text", block.text))
    return parts


def _refused(where: str, what: str) -> ApiError:
    return bad_request(f"{where} {what}.", "messages", "invalid_value")


def _effort(thinking: Thinking | None, config: OutputConfig) -> str | None:
    """A budget of thoughts is a target only; max_tokens bounds thoughts and answer together."""
    if thinking is None:
        return config.effort
    return "none" if thinking.type == "disabled" else config.effort or "medium"


def _response_format(given: OutputFormat) -> ResponseFormat:
    wanted: dict[str, Any] = {"type": given.type}
    if given.type == "json_schema":
        wanted["json_schema"] = {"name": "answer", "schema": given.schema, "strict": True}
    return msgspec.convert(wanted, ResponseFormat)


def _tools(tools: Sequence[ToolParam] | None) -> list[dict[str, Any]] | None:
    """The same functions in chat's words."""
    if not tools:
        return None
    for index, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            raise bad_request(
                f"tools[{index}].type must be 'custom', got {(tool.type or '')[:40]!r}; this server has no built-in "
                "tools.",
                "tools",
                "unsupported_parameter",
            )
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema,
                **({} if tool.strict is None else {"strict": tool.strict}),
            },
        }
        for tool in tools
    ]


def _tool_choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"any": "required"}.get(choice.type, choice.type)
