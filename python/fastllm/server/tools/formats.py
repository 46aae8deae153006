"""How each family of chat templates has its models write calls: to recognise, to read, and to enforce."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastllm.server.tools.parsers import MistralParser, ObjectParser, TaggedParser, ToolParser


@dataclass(frozen=True)
class ToolFormat:
    """A family. marks: text that must survive detokenising even where it is a special token.

    parser: from the names on offer. written: what stands before the first call, before each, after each, between two
    of them and after the last; a `{name}` there is the function's. mark: what tells calls from the text before them;
    "": the whole answer is calls, perhaps after one of `prefixes`, or it is text. parallel: several calls in one
    answer.
    """

    name: str
    marks: tuple[str, ...]
    parser: Callable[[Collection[str]], ToolParser]
    written: tuple[str, str, str, str, str]
    mark: str = ""
    prefixes: tuple[str, ...] = ()
    parallel: bool = True
    id_length: int = 0  # characters of a call's id where the template wants just so many; 0: ours


HERMES = ToolFormat(
    "hermes",
    ("<tool_call>", "</tool_call>"),
    lambda names: TaggedParser(),
    ("", '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "\n", ""),
    mark="<tool_call>",
)
LLAMA3 = ToolFormat(
    "llama3_json",
    ("<|python_tag|>",),
    lambda names: ObjectParser(names, ("<|python_tag|>",)),
    ("", '{"name": "{name}", "parameters": ', "}", "", ""),
    prefixes=("<|python_tag|>",),
    parallel=False,
)
MISTRAL = ToolFormat(
    "mistral",
    ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    lambda names: MistralParser(),
    ("[TOOL_CALLS][", '{"name": "{name}", "arguments": ', "}", ", ", "]"),
    mark="[TOOL_CALLS]",
    id_length=9,
)
MISTRAL_NAMED = ToolFormat(
    "mistral",
    MISTRAL.marks,
    MISTRAL.parser,
    ("", "[TOOL_CALLS]{name}[ARGS]", "", "", ""),
    mark="[TOOL_CALLS]",
    id_length=9,
)
GENERIC = ToolFormat(
    "json",
    (),
    lambda names: ObjectParser(names),
    ("", '{"name": "{name}", "arguments": ', "}", "\n", ""),
)

# Names of --tool-call-parser, vLLM's among them.
BY_NAME: dict[str, ToolFormat] = {
    "hermes": HERMES,
    "qwen": HERMES,
    "qwen2_5": HERMES,
    "qwen25": HERMES,
    "qwen3": HERMES,
    "llama3_json": LLAMA3,
    "llama4_json": LLAMA3,
    "mistral": MISTRAL,
    "json": GENERIC,
}


def choose_format(template: str | None) -> ToolFormat:
    """The family a chat template belongs to; GENERIC where it shows none."""
    text = template or ""
    if "<tool_call>" in text and not re.search(r"<function=|<arg_key>", text):
        return HERMES
    if "[TOOL_CALLS]" in text:
        return MISTRAL_NAMED if "[ARGS]" in text else MISTRAL
    if "<|python_tag|>" in text or ("<|start_header_id|>" in text and "ipython" in text):
        return LLAMA3
    return GENERIC


def takes_system(template: str) -> bool:
    """The template has a place for a system message, or at least no complaint about one."""
    if "raise_exception" not in template:
        return True
    return "system" in template and not re.search(r"raise_exception\([^)]*system", template, re.IGNORECASE)


def knows_tools(template: str | None) -> bool:
    """The template shows the model what is on offer."""
    return template is not None and re.search(r"\btools\b", template) is not None
