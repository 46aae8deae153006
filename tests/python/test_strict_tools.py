"""Functions that are strict while the model may still answer in text: in every format, what a parser would take for a
call has arguments that follow the schema, and text stays possible."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from fastllm.grammar.compiler import GrammarCompiler
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.grammar.source import Preamble
from fastllm.server.tools.call_grammar import CallGrammar, without
from fastllm.server.tools.events import CallArguments, CallStart
from fastllm.server.tools.formats import GENERIC, HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, ToolFormat
from grammar_fixtures import accepts

_CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
_FUNCTIONS = [{"name": "weather", "strict": True, "parameters": _CITY}, {"name": "weather_log"}]
_FORMATS = {"hermes": HERMES, "llama": LLAMA3, "mistral": MISTRAL, "named": MISTRAL_NAMED, "json": GENERIC}
_GOOD, _BAD, _LOOSE = '{"city": "Rome"}', '{"city": "Paris"}', '{"any": [1]}'
_TEXTS = [
    "",
    "Hi",
    "a { b",
    '{"answer": 1}',
    "[1, 2]",
    "<b>",
    "``",
    "```python\nx = {'name'}",
    "<tool",
    "[TOOL",
    "é\n\n",
]


def written(form: ToolFormat, *calls: tuple[str, str]) -> str:
    before, start, end, between, after = form.written
    return before + between.join(start.replace("{name}", name) + args + end for name, args in calls) + after


@pytest.mark.parametrize("name", _FORMATS)
def test_calls_follow_the_schema_and_text_stays_free(compiler: GrammarCompiler, name: str) -> None:
    form = _FORMATS[name]
    calls = CallGrammar(form, _FUNCTIONS, {})
    grammar = compiler.compile(StructuredOutputsParams(grammar=calls.may_call(True)))
    for text in _TEXTS:
        assert accepts(grammar, text.encode()), text
    lead = "Let me see. " if form.mark else "\n"
    for call, fits in (
        (("weather", _GOOD), True),
        (("weather_log", _LOOSE), True),
        (("weather", _BAD), False),
        (("weather", _LOOSE), False),
        (("other", _GOOD), False),
    ):
        assert accepts(grammar, (lead + written(form, call)).encode()) == fits, call
    two = written(form, ("weather", _GOOD), ("weather_log", _LOOSE)).encode()
    assert accepts(grammar, two) == form.parallel
    assert not accepts(compiler.compile(StructuredOutputsParams(grammar=calls.may_call(False))), two)
    assert not accepts(grammar, written(form, ("weather", _GOOD), ("weather", _BAD)).encode())


@pytest.mark.parametrize("name", _FORMATS)
def test_a_mark_may_be_a_special_token_or_text(compiler: GrammarCompiler, name: str) -> None:
    form, special = _FORMATS[name], 256
    mark = form.mark or "<|python_tag|>"
    grammar = CallGrammar(form, _FUNCTIONS, {mark: special}).may_call(True)
    compiled = compiler.compile(StructuredOutputsParams(grammar=grammar))
    for arguments in (_GOOD, _BAD):
        text = written(form, ("weather", arguments))
        rest = text.removeprefix(mark)
        for tokens in ([special, *rest.encode()], [*text.encode()]):
            if name == "json" and tokens[0] == special:
                continue  # this format has no mark
            assert accepts(compiled, tokens) == (arguments == _GOOD), tokens


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize(
    ("before", "opened"), [("Hm <tool_call> </think>\n\n", True), ("<think>Hm</think>", False), ("", False)]
)
def test_calls_behind_reasoning_follow_the_schema(
    compiler: GrammarCompiler, name: str, before: str, opened: bool
) -> None:
    form = _FORMATS[name]
    params = StructuredOutputsParams(grammar=CallGrammar(form, _FUNCTIONS, {}, ["<think>"]).may_call(True))
    compiled = compiler.compile(params, None, Preamble("<think>", "</think>", opened))
    for answer, fits in (("Hi", True), ("<table>", True), (_GOOD, True), (_BAD, False)):
        text = before + (written(form, ("weather", answer)) if answer.startswith("{") else answer)
        mask, allowed = compiled.mask(), True
        try:
            for byte in text.encode():
                mask.accept(byte)
        except ValueError:
            allowed = False
        assert (allowed and mask.matcher.is_accepting()) == fits, text


@pytest.mark.parametrize("name", _FORMATS)
def test_no_walk_along_the_grammar_is_read_as_a_call_that_does_not_fit(
    compiler: GrammarCompiler, name: str, seed: int
) -> None:
    """Random outputs that like to look like calls, given to the parser: every call of the strict function fits."""
    rng, form = random.Random(seed), _FORMATS[name]
    compiled = compiler.compile(StructuredOutputsParams(grammar=CallGrammar(form, _FUNCTIONS, {}).may_call(True)))
    bits = np.zeros((compiler._vocab_size + 31) // 32, np.uint32)
    pieces = [
        form.mark or " ",
        "{",
        '{"name": "weather"',
        '"name"',
        "weather",
        ": ",
        ", ",
        '"arguments": ',
        '"parameters": ',
    ]
    pieces += ["[", "]", "[ARGS]", "```json", "\n", '"', "\\u006eame", _GOOD, _BAD, "}", "x", '{"name": "weather_log"']
    pieces += [written(form, ("weather", _BAD)), written(form, ("weather", _GOOD)), "<|python_tag|>"]
    calls = 0
    for attempt in range(150):
        mask, text, complete = compiled.mask(), b"", False
        for piece in [written(form, ("weather", _BAD))] * (attempt == 0) + rng.choices(pieces, k=12):
            for byte in piece.encode():
                mask.fill(bits)
                if complete or not bits[byte // 32] >> (byte % 32) & 1:
                    break
                complete = mask.accept(byte)
                text += bytes([byte])
        parser = form.parser([function["name"] for function in _FUNCTIONS])
        events = parser.feed(text.decode()) + parser.finish()
        names = [event.name for event in events if isinstance(event, CallStart)]
        for index, called in enumerate(names):
            arguments = "".join(e.text for e in events if isinstance(e, CallArguments) and e.index == index)
            if called == "weather":
                calls += 1
                written_so_far = "".join(arguments.split())
                assert any(f'{{"city":"{city}"}}'.startswith(written_so_far) for city in ("Rome", "Oslo")), text
    assert calls > 0


def test_text_without_another_text() -> None:
    rng = random.Random(5)
    for text in ("abca", "abc", "ab", '"name"', "\\u006"):
        pattern = re.compile(without(text), re.DOTALL)
        for _ in range(3000):
            tried = "".join(rng.choices([*text, text[:-1], "z"], k=rng.randint(0, 8)))
            assert bool(pattern.fullmatch(tried)) == (text not in tried), (text, tried)
