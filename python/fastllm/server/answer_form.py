"""What the answer to a chat request may hold: tool calls, reasoning, a form that it must have."""

from __future__ import annotations

from dataclasses import replace

from fastllm.grammar.compiler import CompiledGrammar
from fastllm.grammar.limits import GrammarError, GrammarLimits
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.grammar.source import Preamble
from fastllm.sampling import SamplingParams
from fastllm.server.chat_output import ChatOutput
from fastllm.server.errors import ApiError, bad_request
from fastllm.server.protocol import ChatRequest
from fastllm.server.reasoning import ReasoningParser, ReasoningTags, is_opened
from fastllm.server.state import ServerState
from fastllm.server.structured import compile_constraint, grammar_limits, read_constraint
from fastllm.server.tools.call_grammar import CallGrammar
from fastllm.server.tools.request import Tools, read_tools

# A grammar of all tools may have as many bytes as this many schemas.
_TOOLS_PER_SCHEMA = 8


class AnswerForm:
    """Owned by one request. Made by of() before anything is allocated; see_prompt() once the prompt is rendered."""

    def __init__(
        self,
        state: ServerState,
        tools: Tools | None,
        constraint: tuple[StructuredOutputsParams, str] | None,
        show_reasoning: bool,
    ) -> None:
        self.tools = tools
        self.reasoning: ReasoningTags | None = state.dialect.reasoning
        self._state = state
        self._constraint = constraint
        self._show_reasoning = show_reasoning
        self._opened = False  # the prompt ends inside the reasoning
        self._closed = False  # the prompt ends behind the reasoning: the model is not to think

    @classmethod
    def of(cls, state: ServerState, body: ChatRequest) -> AnswerForm:
        """Raises a 400 that names the field."""
        limits = grammar_limits(state.limits)
        tools = read_tools(
            body.tools, body.tool_choice, body.parallel_tool_calls, max_tools=state.limits.max_tools, limits=limits
        )
        constraint = read_constraint(body)
        if tools is not None and tools.must_call and constraint is not None:
            if constraint[1] != "response_format":
                raise bad_request(f"{constraint[1]} cannot be set when tool_choice asks for a call.", constraint[1])
            constraint = None  # it is the form of a text, and the answer is a call
        return cls(state, tools, constraint, body.include_reasoning is not False)

    def see_prompt(self, text: str) -> None:
        if self.reasoning is not None:
            self._opened = is_opened(text, self.reasoning)
            self._closed = text.rstrip().endswith(self.reasoning.end)

    def adjust(self, params: SamplingParams) -> None:
        """Has the marks reach the parsers where they are special tokens."""
        if self._state.dialect.shows_marks(with_tools=self.tools is not None):
            params.skip_special_tokens = False

    async def compile(self) -> CompiledGrammar | None:
        preamble = None
        if self.reasoning is not None and not self._closed:
            preamble = Preamble(self.reasoning.start, self.reasoning.end, self._opened)
        if self._constraint is not None:
            return await compile_constraint(self._state, *self._constraint, preamble=preamble)
        if self.tools is None or not (self.tools.must_call or self.tools.any_strict):
            return None
        limits = grammar_limits(self._state.limits)
        limits = replace(limits, max_schema_bytes=_TOOLS_PER_SCHEMA * limits.max_schema_bytes)
        try:
            return await self._compile_calls(self.tools, preamble, limits)
        except ApiError:
            if not self.tools.must_call:
                raise
        # Of functions that are not strict a schema is a wish.
        return await self._compile_calls(self.tools, preamble, limits, loosely=True)

    async def _compile_calls(
        self, tools: Tools, preamble: Preamble | None, limits: GrammarLimits, *, loosely: bool = False
    ) -> CompiledGrammar:
        starts = [] if preamble is None else [preamble.start]
        calls = CallGrammar(self._state.dialect.tools, tools.functions, self._state.dialect.specials, starts)
        try:
            grammar = (
                calls.must_call(tools.parallel, loosely=loosely) if tools.must_call else calls.may_call(tools.parallel)
            )
        except GrammarError as error:
            raise bad_request(f"tools: {error}", "tools", error.code) from None
        params = StructuredOutputsParams(grammar=grammar)
        return await compile_constraint(self._state, params, "tools", preamble=preamble, limits=limits)

    def sample(self) -> ChatOutput:
        dialect = self._state.dialect
        return ChatOutput(
            dialect.tools.parser(self.tools.names) if self.tools is not None else None,
            ReasoningParser(self.reasoning, self._opened) if self.reasoning is not None else None,
            show_reasoning=self._show_reasoning,
            max_calls=None if self.tools is None or self.tools.parallel else 1,
            call_id_length=dialect.tools.id_length,
            reasoning_end_id=dialect.reasoning_end_id,
        )
