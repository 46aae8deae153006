"""Schemas, patterns and tools made to cost the server time or memory, beside valid streams (rows C35 to C47)."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from harness import ANSWER_WITHIN_S, CHAT, COMPLETIONS, REPEATS, Target, check

BAD, OK, EITHER = (400,), (200,), (200, 400)
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
DOUBLING = {
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)} | {"d24": {"type": "string"}},
    "$ref": "#/$defs/d0",
}
MUTUAL = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": 3, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, **fields}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


ROWS: list[tuple[str, str, dict[str, Any], tuple[int, ...], str | None]] = [
    ("C35 unknown type", CHAT, chat(response_format={"type": "magic"}), BAD, "response_format"),
    ("C35 no schema", CHAT, chat(response_format={"type": "json_schema"}), BAD, "response_format"),
    *((f"C35 schema {s!r}", CHAT, chat(**schema(s)), BAD, "response_format") for s in ([], "x", 5, None)),
    *((f"C35 schema {s!r}", CHAT, chat(**schema(s)), EITHER, None) for s in (True, False)),
    ("C37 itself", CHAT, chat(**schema({"$ref": "#"})), BAD, "response_format"),
    ("C37 each other", CHAT, chat(**schema(MUTUAL)), BAD, "response_format"),
    ("C37 doubling", CHAT, chat(**schema(DOUBLING)), EITHER, None),
    ("C37 deep", CHAT, chat(**schema(DEEP)), BAD, "response_format"),
    *(
        (f"C38 {ref[:7]}", CHAT, chat(**schema({"$ref": ref})), BAD, "response_format")
        for ref in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "//x/y", "a.json#/b")
    ),
    *((f"C40 {r}", COMPLETIONS, complete(guided_regex=r), BAD, "guided_regex") for r in ("[", "(", "a{99999999}")),
    *((f"C40 {r}", COMPLETIONS, complete(guided_regex=r), EITHER, None) for r in ("(a+)+b", "(a|a)*$", "(.*){50}")),
    *(
        (f"C41 {r}", COMPLETIONS, complete(guided_regex=r), BAD, "guided_regex")
        for r in ("(?=a)a", "(?<!b)a", r"(a)\1", "(?<=x)y")
    ),
    ("C44 endless text", CHAT, chat(**schema({"type": "string"})), OK, None),
    ("C46 required without tools", CHAT, chat(tool_choice="required"), BAD, "tool_choice"),
    (
        "C46 unknown function",
        CHAT,
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        BAD,
        "tool_choice",
    ),
    ("C46 too many tools", CHAT, chat(tools=[TOOL] * 129), BAD, "tools"),
]


@pytest.mark.parametrize("name, path, body, statuses, param", ROWS, ids=[row[0] for row in ROWS])
def test_row(target: Target, name: str, path: str, body: Any, statuses: tuple[int, ...], param: str | None) -> None:
    data = json.dumps(body).encode()
    with target.undisturbed():
        for _ in range(REPEATS):
            start = time.monotonic()
            answer = target.ask("POST", path, data)
            assert time.monotonic() - start < 2 * ANSWER_WITHIN_S
            check(answer, statuses, param)


def test_c43_many_schemas_do_not_fill_the_memory(target: Target) -> None:
    with target.undisturbed():
        for i in range(300):
            form = {"type": "object", "properties": {f"p{i}_{k}": {"enum": ["x" * 40 + str(k)]} for k in range(40)}}
            check(target.ask("POST", CHAT, chat(**schema(form))), OK)
    target.check_memory()


def test_c47_code_in_a_tool_call_stays_text(target: Target, tmp_path_factory: pytest.TempPathFactory) -> None:
    harm = tmp_path_factory.mktemp("harm") / "executed"
    code = f"__import__('os').mkdir('{harm}')"
    text = json.dumps({"name": "f", "arguments": {"x": code}})
    body = chat(tools=[TOOL], guided_choice=[text, f"[f(x={code})]"], max_tokens=200)
    with target.undisturbed():
        for _ in range(REPEATS):
            check(target.ask("POST", CHAT, body), EITHER)
    assert not harm.exists()
