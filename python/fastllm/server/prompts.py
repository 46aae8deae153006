"""From text or messages to prompt tokens, on a worker thread where it could hold up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from fastllm.server.admission import check_text_length, check_tokens
from fastllm.server.errors import bad_request
from fastllm.server.protocol import ChatMessage, ChatRequest, TokenizeRequest
from fastllm.server.state import ServerState
from fastllm.server.template_kwargs import check_documents, check_template_kwargs
from fastllm.server.tools.prompt import spelled_out
from fastllm.server.tools.request import Tools, with_parsed_arguments

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
HasMessages = ChatRequest | TokenizeRequest


async def encode_text(state: ServerState, text: str, add_special_tokens: bool, param: str) -> list[int]:
    check_text_length(state, len(text), param)
    encode = state.llm.tokenizer.encode
    try:
        if len(text) <= state.limits.inline_tokenize_chars:
            return encode(text, add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(state.workers, encode, text, add_special_tokens)
    except UnicodeEncodeError:
        raise bad_request(f"{param} contains characters that are no valid Unicode.", param, "invalid_unicode") from None


async def encode_prompt(
    state: ServerState, prompt: str | list[int], add_special_tokens: bool, truncate: int | None, room: int
) -> list[int]:
    """One prompt of a completions call; for `truncate` and `room` see truncate_ids()."""
    if isinstance(prompt, str):
        ids = await encode_text(state, prompt, add_special_tokens, "prompt")
    else:
        ids = prompt
    ids = truncate_ids(state, ids, truncate, room)
    check_tokens(state, ids, "prompt")
    return ids


def truncate_ids(state: ServerState, ids: list[int], truncate: int | None, room: int) -> list[int]:
    """The last `truncate` tokens; -1: as many as leave `room` positions of the context for the output."""
    if truncate is None:
        return ids
    if truncate < -1 or truncate == 0:
        raise bad_request(f"truncate_prompt_tokens must be -1 or at least 1, got {truncate}.", "truncate_prompt_tokens")
    keep = max(1, state.llm.model_config.max_model_len - room) if truncate == -1 else truncate
    return ids[-keep:]


async def encode_messages(
    state: ServerState, request: HasMessages, add_special_tokens: bool, tools: Tools | None = None
) -> tuple[str, list[int]]:
    """The rendered prompt and its tokens. tools: what the model may call."""
    messages = [_for_template(message, index) for index, message in enumerate(request.messages or ())]
    chars = sum(len(message["content"] or "") for message in messages)
    check_text_length(state, chars, "messages")
    kwargs = request.chat_template_kwargs or {}
    check_template_kwargs(state, kwargs)
    check_documents(state, request.documents)
    variables = kwargs if request.documents is None else {**kwargs, "documents": request.documents}
    continue_final = bool(request.continue_final_message)
    if request.add_generation_prompt is None:
        add_generation_prompt = not continue_final
    else:
        add_generation_prompt = request.add_generation_prompt
    if continue_final and messages[-1]["role"] != "assistant":
        raise bad_request("continue_final_message needs a last message of the assistant.", "continue_final_message")
    tokenizer = state.llm.tokenizer
    if not state.dialect.tools_in_template:
        messages, tools = spelled_out(messages, tools, state.dialect.system_in_template), None
    if isinstance(request, ChatRequest) and request.reasoning_effort is not None:
        thinks = request.reasoning_effort != "none"
        kwargs = {"reasoning_effort": request.reasoning_effort, "enable_thinking": thinks} | kwargs

    def render_and_encode() -> tuple[str, list[int]]:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else tools.tools,
            continue_final_message=continue_final,
            chat_template=state.llm.model_config.chat_template,
            **variables,
        )
        check_text_length(state, len(text), "messages")
        return text, tokenizer.encode(text, add_special_tokens)

    try:
        return await asyncio.get_running_loop().run_in_executor(state.workers, render_and_encode)
    except UnicodeEncodeError:
        raise bad_request("messages contain characters that are no valid Unicode.", "messages") from None
    except (ValueError, TypeError, RecursionError) as exc:
        raise bad_request(str(exc), "messages") from None


def _for_template(message: ChatMessage, index: int) -> dict[str, Any]:
    if message.role not in ROLES:
        allowed = ", ".join(sorted(ROLES))
        raise bad_request(f"messages[{index}].role must be one of {allowed}, got {message.role[:40]!r}.", "messages")
    content = message.content
    if isinstance(content, list):
        texts: list[str] = []
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise bad_request(
                    f"messages[{index}].content[{number}] must be a text part ({{'type': 'text', 'text': ...}}), got "
                    f"type {part.type[:40]!r}; this model only reads text.",
                    "messages",
                )
            texts.append(part.text)
        content = "\n".join(texts)
    elif content is None and not (message.role == "assistant" and message.tool_calls):
        raise bad_request(f"messages[{index}].content must be a string or a list of text parts.", "messages")
    result: dict[str, Any] = msgspec.to_builtins(message)
    result["content"] = content or ""
    if message.tool_calls:
        result["tool_calls"] = with_parsed_arguments(message.tool_calls, f"messages[{index}]")
    return result


def prompt_text(state: ServerState, prompt: str | Sequence[int]) -> str:
    """What `echo` repeats."""
    return prompt if isinstance(prompt, str) else state.llm.tokenizer.decode(list(prompt), skip_special_tokens=False)
