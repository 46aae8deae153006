"""Tools for models whose template does not know them: said in words, and calls and results as plain messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastllm.server.tools.request import Tools


def spelled_out(messages: Sequence[dict[str, Any]], tools: Tools | None, has_system_role: bool) -> list[dict[str, Any]]:
    """The conversation without tool calls, tool roles or a list of tools."""
    result: list[dict[str, Any]] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            lines = [json.dumps({"name": c["name"], "arguments": c["arguments"]}, ensure_ascii=False) for c in calls]
            content = "\n".join([message["content"], *lines] if message["content"] else lines)
            message = {"role": "assistant", "content": content}
        elif message["role"] in ("tool", "function"):
            name = message.get("name") or message.get("tool_call_id") or "the function"
            message = {"role": "user", "content": f"Result of {name}: {message['content']}"}
            if result and result[-1].get("is_result"):
                result[-1]["content"] += "\n" + message["content"]
                continue
            message["is_result"] = True
        result.append(dict(message))
    for message in result:
        message.pop("is_result", None)
    return result if tools is None else _with_instructions(result, _instructions(tools), has_system_role)


def _instructions(tools: Tools) -> str:
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in tools.functions)
    if tools.must_call:
        ending = "Answer with a call and nothing else."
    else:
        ending = "If no function helps, answer in plain text."
    return (
        f"You can call these functions:\n{listed}\n\nTo call one, answer only with JSON of this form, one line per "
        f'call: {{"name": "<function name>", "arguments": {{<its arguments>}}}}\n{ending}'
    )


def _with_instructions(messages: list[dict[str, Any]], text: str, has_system_role: bool) -> list[dict[str, Any]]:
    wanted = "system" if has_system_role else "user"
    first = messages[0]
    if first["role"] in (wanted, "developer") and isinstance(first["content"], str):
        joined = f"{first['content']}\n\n{text}" if has_system_role else f"{text}\n\n{first['content']}"
        return [{**first, "content": joined}, *messages[1:]]
    return [{"role": wanted, "content": text}, *messages]
