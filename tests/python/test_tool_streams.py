"""Answers made of text, reasoning and calls whose arguments hold everything that could be taken for a mark or an end:
read back exactly, and the same however the bytes of the answer are cut."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from fastllm.server.chat_output import ChatOutput, message_of
from fastllm.server.reasoning import THINK, ReasoningParser
from fastllm.server.tools.formats import GENERIC, HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED

_FORMATS = {"hermes": HERMES, "llama": LLAMA3, "mistral": MISTRAL, "named": MISTRAL_NAMED, "json": GENERIC}
_NAMES = ["f", "get", "get_weather", "get_weather.v2", "name", "a-b:c"]
_NASTY = [
    '"',
    "\\",
    "\\\\",
    '\\"',
    "{",
    "}",
    "[",
    "]",
    "</tool_call>",
    "<tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "\n",
    "\t",
]
_NASTY += [
    "é",
    "日本",
    "👩\u200d🚀",
    "\u2028",
    "\x7f",
    '{"name": "f", "arguments": {}}',
    "```",
    "<|python_tag|>",
    "</think>",
]
_NASTY += ["x", " ", ", ", ": ", "null", "\\u0041", "'"]


def nasty(rng: random.Random) -> str:
    return "".join(rng.choices(_NASTY, k=rng.randint(0, 5)))


def value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {nasty(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return [nasty(rng), nasty(rng), rng.randrange(-5, 5), 1.5e-7, None, rng.random() < 0.5][kind]


def answer(rng: random.Random, name: str) -> tuple[str, str, list[tuple[str, Any]]]:
    """What a model writes, the content in it and the calls in it."""
    form = _FORMATS[name]
    before, start, end, between, after = form.written
    text = rng.choice(["", "Let me see.", "Sure { } [1] <tool", "é👩\u200d🚀: "]) if form.mark else ""
    calls: list[tuple[str, Any]] = []
    pieces = []
    for _ in range(rng.randint(1, 3)):
        calls.append((rng.choice(_NAMES), {f"k{i}{nasty(rng)}": value(rng, 2) for i in range(rng.randrange(3))}))
        indent = rng.choice([None, None, 2])
        written = json.dumps(calls[-1][1], ensure_ascii=rng.random() < 0.5, indent=indent)
        pieces.append(start.replace("{name}", calls[-1][0]) + written + end)
    joiner = between or {"llama": "; "}.get(name, "")
    return text + before + joiner.join(pieces) + after, text, calls


def read(name: str, pieces: Iterator[str], *, thinks: bool) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    form = _FORMATS[name]
    output = ChatOutput(
        form.parser(_NAMES), ReasoningParser(THINK, opened=False) if thinks else None, call_id_length=form.id_length
    )
    deltas = [delta for piece in pieces for delta in output.read(piece, [], False)] + output.read("", [], True)
    for delta in deltas:
        msgspec.json.encode(delta)  # can be sent
    message = message_of("assistant", deltas)
    ids = [call.id for call in message.tool_calls or ()]
    assert len(set(ids)) == len(ids) and all(len(i) == 9 and i.isalnum() for i in ids if form.id_length == 9)
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    reasoning = message.reasoning if isinstance(message.reasoning, str) else None
    return message.content, reasoning, calls


def cut(data: bytes, at: list[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ends = [*sorted(at), len(data)]
    for begin, end in zip([0, *ends], ends, strict=False):
        if piece := decoder.decode(data[begin:end]):
            yield piece


@pytest.mark.parametrize("name", _FORMATS)
@pytest.mark.parametrize("thinks", [False, True])
def test_calls_are_read_back_exactly_however_the_bytes_are_cut(name: str, thinks: bool, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        text, content, calls = answer(rng, name)
        thought = rng.choice(["Hm. </thin <tool_call> {", "日本 [TOOL_CALLS]", ""]) if thinks else ""
        whole = f"<think>\n{thought}\n</think>\n\n{text}" if thinks else text
        data = whole.encode()
        expected = read(name, iter([whole]), thinks=thinks)
        assert (expected[0] or "", expected[1] or "") == (content, thought), whole
        assert [(called, json.loads(arguments)) for called, arguments in expected[2]] == calls, whole
        assert read(name, cut(data, list(range(1, len(data)))), thinks=thinks) == expected
        for at in range(1, len(data)):
            assert read(name, cut(data, [at]), thinks=thinks) == expected, (at, whole)
        for _ in range(10):
            places = rng.sample(range(len(data)), min(len(data), rng.randint(2, 9)))
            assert read(name, cut(data, places), thinks=thinks) == expected, (places, whole)


@pytest.mark.parametrize("name", _FORMATS)
def test_damaged_answers_read_the_same_however_they_are_cut(name: str, seed: int) -> None:
    """Cut short, or with characters lost, doubled or put in: whatever it is taken for, cutting changes nothing."""
    rng = random.Random(seed)
    for _ in range(60):
        text = answer(rng, name)[0]
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            put = rng.choice(["", "", '"', "{", "}", "[TOOL_CALLS]", "\\ud800", " text {x} ", "<tool_call>", "\n"])
            text = text[:at] + put + text[at + rng.randrange(4) :]
        text = text[: rng.randint(1, len(text) + 1)] if text else "x"
        expected = read(name, iter([text]), thinks=False)
        data = text.encode()
        assert read(name, cut(data, list(range(1, len(data)))), thinks=False) == expected, text
        for at in range(1, len(data), 3):
            assert read(name, cut(data, [at]), thinks=False) == expected, (at, text)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("named", '[TOOL_CALLS]f[ARGS]{"a": 1} I think {x} is best.', "I think {x} is best.", [("f", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}] See {x}.', "See {x}.", [("f", "{}")]),
        ("mistral", "[TOOL_CALLS] Some set {1, 2} of numbers", "Some set {1, 2} of numbers", []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', "", [("?", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "\\ud800"}</tool_call>', "", [("f", "?")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
            "",
            [("f", '{"a": "\\ud800"}')],
        ),
        ("hermes", '<tool_call>{"na\\u006de": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
        ("json", '{"name": "get_weather", "arguments": {}}', "", [("get_weather", "{}")]),
        ("json", '{"name": "get_w", "arguments": {}}', '{"name": "get_w", "arguments": {}}', []),
    ],
)
def test_what_only_looks_like_a_call_is_text(name: str, text: str, content: str | None, calls: Any) -> None:
    for pieces in ([text], list(text)):
        shown, _, found = read(name, iter(pieces), thinks=False)
        assert found == calls and (shown or "") == (text if content is None else content)
