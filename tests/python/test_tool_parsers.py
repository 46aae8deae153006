"""Tool calls are found in text however it is cut into pieces: whole, by character, and at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from fastllm.server.tools.events import CallArguments, CallStart, Text
from fastllm.server.tools.formats import (
    BY_NAME,
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    ToolFormat,
    choose_format,
    takes_system,
)
from fastllm.server.tools.parsers import ToolParser

NAMES = ("weather", "time")
Calls = list[tuple[str, str]]

# format, text of the model, content, calls
TABLE: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, "Just text <b> and < tool.", "Just text <b> and < tool.", []),
    (
        HERMES,
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("weather", '{"city": "Paris"}')],
    ),
    (
        HERMES,
        'Let me look.\n<tool_call>{"arguments": {"a": [1, {"b": "}]"}]}, "name": "weather"}</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n',
        "Let me look.\n",
        [("weather", '{"a": [1, {"b": "}]"}]}'), ("time", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "time"}</tool_call> Done.', "Done.", [("time", "{}")]),
    (HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", [("time", "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "time", "arguments": "{\\"zone\\": \\"UTC\\"}"}</tool_call>',
        "",
        [("time", '{"zone": "UTC"}')],
    ),
    (HERMES, "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    (HERMES, '<tool_call>{"noname": 1}</tool_call>', '<tool_call>{"noname": 1}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    (HERMES, "text <tool_ca", "text <tool_ca", []),
    (HERMES, '<tool_call>{"name": "we', '<tool_call>{"name": "we', []),
    (
        HERMES,
        '<tool_call>{"name": "py", "arguments": {"code": "__import__(\\"os\\")"}}</tool_call>',
        "",
        [("py", '{"code": "__import__(\\"os\\")"}')],
    ),
    (LLAMA3, '{"name": "weather", "parameters": {"city": "Rome"}}', "", [("weather", '{"city": "Rome"}')]),
    (LLAMA3, '<|python_tag|>{"name": "time", "parameters": {}}', "", [("time", "{}")]),
    (
        LLAMA3,
        '{"name": "weather", "parameters": {"a": 1}}; {"type": "function", "name": "time", "parameters": {"b": 2}}',
        "",
        [("weather", '{"a": 1}'), ("time", '{"b": 2}')],
    ),
    (LLAMA3, '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    (LLAMA3, '{"answer": 42} and more', '{"answer": 42} and more', []),
    (LLAMA3, "The weather is {nice}.", "The weather is {nice}.", []),
    (MISTRAL, "Hello [TOOL] you", "Hello [TOOL] you", []),
    (
        MISTRAL,
        'Ok.[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Nice"}}, {"name": "time", "arguments": {}}]',
        "Ok.",
        [("weather", '{"city": "Nice"}'), ("time", "{}")],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]weather[ARGS]{"city": "Nice"}[TOOL_CALLS]time[ARGS]{}',
        "",
        [("weather", '{"city": "Nice"}'), ("time", "{}")],
    ),
    (MISTRAL, '[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"x": "}"}', "", [("weather", '{"x": "}"}')]),
    (MISTRAL, "[TOOL_CALLS] nothing", "nothing", []),
    (GENERIC, '{"name": "weather", "arguments": {"a": "é\\u00e9"}}', "", [("weather", '{"a": "é\\u00e9"}')]),
    (
        GENERIC,
        '```json\n[{"name": "weather", "arguments": {}}, {"name": "time", "arguments": {"z": 1}}]\n```',
        "",
        [("weather", "{}"), ("time", '{"z": 1}')],
    ),
    (
        GENERIC,
        '{"name": "weather", "arguments": {}}\n{"name": "time", "arguments": {}}',
        "",
        [("weather", "{}"), ("time", "{}")],
    ),
    (GENERIC, "```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    (GENERIC, "[1, 2]", "[1, 2]", []),
    (GENERIC, "", "", []),
]


def read(parser: ToolParser, pieces: Iterator[str]) -> tuple[str, Calls]:
    content, names, arguments = "", [], {}
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    for event in events:
        if isinstance(event, Text):
            assert event.text
            content += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(names) and event.name
            names.append(event.name)
            arguments[event.index] = ""
        elif isinstance(event, CallArguments):
            assert event.index == len(names) - 1, "arguments belong to the call that has begun last"
            arguments[event.index] += event.text
    return content, [(name, arguments[i]) for i, name in enumerate(names)]


def pieces_of(text: str, size: Callable[[], int]) -> Iterator[str]:
    at = 0
    while at < len(text):
        step = size()
        yield text[at : at + step]
        at += step


@pytest.mark.parametrize(("form", "text", "content", "calls"), TABLE)
def test_calls_are_the_same_in_every_chunking(
    form: ToolFormat, text: str, content: str, calls: Calls, seed: int
) -> None:
    expected = (content, calls)
    assert read(form.parser(NAMES), iter([text])) == expected
    assert read(form.parser(NAMES), iter(text)) == expected
    rng = random.Random(seed)
    for _ in range(20):
        assert read(form.parser(NAMES), pieces_of(text, lambda: rng.randint(1, 9))) == expected


def test_random_text_loses_nothing_and_never_fails(seed: int) -> None:
    rng = random.Random(seed)
    bits = [
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        ":",
        '"f"',
        ",",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[",
        "]",
        " ",
        "x",
    ]
    bits += ['"arguments"', '"', "\\", "<|python_tag|>", "\n", "```json", "é"]
    for _ in range(300):
        text = "".join(rng.choices(bits, k=rng.randint(1, 20)))
        for form in BY_NAME.values():
            whole = read(form.parser(["f"]), iter([text]))
            assert whole == read(form.parser(["f"]), iter(text)), (form.name, text)


def test_long_arguments_take_linear_time() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 200_000 + '"}}</tool_call>'
    _, ((_, arguments),) = read(HERMES.parser([]), iter([text]))
    assert len(arguments) == 200_000 + len('{"a": ""}')


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        ("{{ messages[0].role }}", True),
        ("{% if m.role == 'system' %}{{ m.content }}{% else %}{{ raise_exception('Unknown role') }}{% endif %}", True),
        ("{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", False),
        ("{{ raise_exception('Conversation roles must alternate user/assistant') }}", False),
    ],
)
def test_the_template_tells_whether_it_takes_a_system_message(template: str, takes: bool) -> None:
    assert takes_system(template) == takes


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<tool_call>' }}{{ tools }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("{{ '<|start_header_id|>ipython' }}", "llama3_json"),
        ("{{ messages }}", "json"),
        (None, "json"),
    ],
)
def test_the_template_tells_the_family(template: str | None, form: str) -> None:
    assert choose_format(template).name == form
