"""The tools of a request: checked, and in the form that templates, grammars and parsers take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.grammar.limits import GrammarError, GrammarLimits, check_value
from fastllm.server.errors import bad_request

_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """What a request may call. forced: the one function it must call, once; required: it must call one of them."""

    tools: list[dict[str, Any]]  # as the template wants them
    required: bool
    forced: str | None
    parallel: bool

    @property
    def functions(self) -> list[dict[str, Any]]:
        """Those that the answer may call."""
        functions = [tool["function"] for tool in self.tools]
        return [f for f in functions if f["name"] == self.forced] if self.forced else functions

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function["name"] for function in self.functions)

    @property
    def any_strict(self) -> bool:
        """The arguments of some call have to follow their schema."""
        return any(function.get("strict") for function in self.functions)

    @property
    def must_call(self) -> bool:
        return self.required or self.forced is not None


def read_tools(
    tools: Any, choice: Any, parallel: bool | None, *, max_tools: int, limits: GrammarLimits
) -> Tools | None:
    """None: nothing can be called. Raises a 400 that names the tool."""
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice is only allowed when tools are given.", "tool_choice")
        return None
    if not isinstance(tools, list) or not tools:
        raise bad_request("tools must be a list of at least one tool.", "tools")
    if len(tools) > max_tools:
        raise bad_request(f"tools takes at most {max_tools} tools, got {len(tools)}.", "tools")
    checked = [_tool(tool, f"tools[{number}]", limits) for number, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise bad_request("tools: two functions have the same name.", "tools")
    required, forced = _choice(choice, names)
    if choice == "none":
        return None
    return Tools(checked, required, forced, parallel is not False and forced is None)


def _tool(tool: Any, where: str, limits: GrammarLimits) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise bad_request(f"{where} must be an object of type 'function'.", "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise bad_request(f"{where}.function must be an object with a name.", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(
            f"{where}.function.name must be 1 to 64 letters, digits, underscores, dots, colons or dashes.", "tools"
        )
    if not isinstance(function.get("description"), str | None):
        raise bad_request(f"{where}.function.description must be a string.", "tools")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise bad_request(f"{where}.function.parameters must be a JSON schema, which is an object.", "tools")
    if not isinstance(function.get("strict"), bool | None):
        raise bad_request(f"{where}.function.strict must be true or false.", "tools")
    try:
        check_value(parameters, limits)
    except GrammarError as error:
        raise bad_request(f"{where}.function.parameters: {error}", "tools", error.code) from None
    return {**tool, "type": "function"}


def _choice(choice: Any, names: Sequence[str]) -> tuple[bool, str | None]:
    """(one must be called, the one that must be)."""
    if choice in (None, "none", "auto"):
        return False, None
    if choice == "required":
        return True, None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(choice, Mapping) or choice.get("type", "function") != "function":
        raise bad_request(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}.",
            "tool_choice",
        )
    if name not in names:
        raise bad_request(f"tool_choice: no tool is called {name[:64]!r}.", "tool_choice")
    return False, name


def with_parsed_arguments(calls: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """The calls of an assistant's message as templates take them: the arguments as an object, not as text."""
    result: list[dict[str, Any]] = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{where}.tool_calls[{number}].function must have a name.", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                arguments = None
        elif arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise bad_request(
                f"{where}.tool_calls[{number}].function.arguments must be a JSON object as text.", "messages"
            )
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result
