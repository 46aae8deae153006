"""How the loaded model writes tool calls and reasoning: from its chat template, or as the operator says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastllm.server import reasoning
from fastllm.server.reasoning import ReasoningTags
from fastllm.server.tools import formats
from fastllm.server.tools.formats import GENERIC, ToolFormat

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM


@dataclass(frozen=True)
class Dialect:
    """tools_in_template: the template shows the tools itself. specials: special tokens, text to id."""

    tools: ToolFormat = GENERIC
    tools_in_template: bool = False
    system_in_template: bool = True
    reasoning: ReasoningTags | None = None
    reasoning_end_id: int | None = None
    specials: Mapping[str, int] = field(default_factory=dict)

    def shows_marks(self, *, with_tools: bool) -> bool:
        """Markers are special tokens here, so detokenising must keep those."""
        marks = list(self.tools.marks) if with_tools else []
        if self.reasoning is not None:
            marks += [self.reasoning.start, self.reasoning.end]
        return any(mark in self.specials for mark in marks)


def choose_dialect(llm: AsyncLLM, tool_call_parser: str | None = None, reasoning_parser: str | None = None) -> Dialect:
    tokenizer = llm.tokenizer
    some_tool: list[dict[str, Any]] = [{}]
    template = llm.model_config.chat_template or tokenizer.template_for(some_tool)
    tools = formats.BY_NAME[tool_call_parser] if tool_call_parser else formats.choose_format(template)
    tags = reasoning.BY_NAME[reasoning_parser] if reasoning_parser else reasoning.choose_tags(template)
    specials = {tokenizer.token_str(i): i for i in tokenizer.special_ids}
    return Dialect(
        tools,
        formats.knows_tools(template),
        formats.takes_system(template or ""),
        tags,
        None if tags is None else tokenizer.token_to_id(tags.end),
        specials,
    )


def add_dialect_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tool-call-parser",
        choices=sorted(formats.BY_NAME),
        default=None,
        help="how the model writes tool calls (default: what its chat template shows)",
    )
    group.add_argument(
        "--reasoning-parser",
        type=lambda text: text or None,
        choices=sorted(reasoning.BY_NAME),
        default=None,
        help="how the model marks its reasoning; none leaves it in the content (default: what its chat template shows)",
    )
