"""Schemas, patterns and tools made to cost the server time or memory, beside valid streams (rows C35 to C47)."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ANSWER_WITHIN_S, CHAT, COMPLETIONS, MESSAGES, REPEATS, RESPONSES, Target, check

KEPT = 256  # compiled grammars
BAD, OK, EITHER = (400,), (200,), (200, 400)
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}
DOUBLING = {
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)} | {"d24": {"type": "string"}},
    "$ref": "#/$defs/d0",
}
# Grammars whose every text can be read in many ways: each token takes longer than the one before.
AMBIGUOUS = [
    'start: (x* y*)+\nx: "a"* "b"*\ny: "a"* "b"*\n',
    'start: s\ns: s s s | s s | "a" | "b"\n',
    "start: s\ns: " + " | ".join(f"x{i} s" for i in range(60)) + ' | "a"\n'
    "" + "\n".join(f'x{i}: "a" | x{(i + 1) % 60} x{(i + 2) % 60}' for i in range(60)),
]
ENDLESS = {"max_tokens": 4000, "min_tokens": 4000}
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


class Bait:
    """A port and a FIFO of our own that tell whether anybody opened them."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()
        self.file = folder / "x.json"
        os.mkfifo(self.file)
        self.urls = (f"http://127.0.0.1:{self.address[1]}/x.json", self.file.as_uri())

    def connected(self) -> bool:
        """Since the last call; one that has hung up meanwhile counts."""
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def opened(self) -> bool:
        """Whoever reads a FIFO waits for its writer: it cannot come and go unseen."""
        try:
            os.close(os.open(self.file, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads
                raise
            return False
        return True

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    made = Bait(tmp_path)
    yield made
    made.close()


def leading_to(url: str) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Schemas that speak of the address, and the statuses for them."""
    ref = {"$ref": url}
    references: list[dict[str, Any]] = [
        ref,
        {"$ref": f"{url}#/a"},
        {"$dynamicRef": url},
        {"type": "object", "properties": {"a": ref}, "required": ["a"]},
        {"type": "object", "additionalProperties": ref},
        {"type": "array", "items": {"anyOf": [{"type": "null"}, ref]}},
        {"$ref": "#/$defs/a", "$defs": {"a": ref}},
        {"type": "object", "$defs": {"a": ref}},
    ]
    names: list[dict[str, Any]] = [
        {"$schema": url, "type": "object"},
        {"$id": url, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}},
        {"$id": url, "$ref": "#/$defs/a", "$defs": {"a": {"$id": f"{url}/a", "type": "object"}}},
    ]
    return [(value, BAD) for value in references] + [(value, EITHER) for value in names]


def asking_for(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A request for every place where a schema can stand."""
    text = json.dumps(value)
    tags = {"structures": [{"begin": "<a>", "schema": value, "end": "</a>"}], "triggers": ["<a"]}
    tag = {"begin": "<a>", "content": {"type": "json_schema", "json_schema": value}, "end": "</a>"}
    form = {"format": {"type": "triggered_tags", "tags": [tag], "triggers": ["<a"]}}
    fields: list[dict[str, Any]] = [
        schema(value),
        {"response_format": {"type": "json_object", "schema": value}},
        *({"response_format": {"type": "structural_tag", **given}} for given in (tags, form)),
        *({"structured_outputs": {"json": given}} for given in (value, text)),
        *({"structured_outputs": {"structural_tag": given}} for given in (tags, json.dumps(form))),
        {"structured_outputs": {"grammar": f"start: %json {text}"}},
        *({"guided_json": given} for given in (value, text)),
        {"guided_grammar": f"start: %json {text}"},
    ]
    for field in fields:
        yield COMPLETIONS, complete(**field)
        yield CHAT, chat(**field)
    answer = {"type": "json_schema", "schema": value}
    yield RESPONSES, {"input": "x", "max_output_tokens": 3, "text": {"format": {"name": "x", **answer}}}
    yield MESSAGES, chat(output_config={"format": answer})
    for strict in (True, False):
        function = {"name": "f", "parameters": value, "strict": strict}
        for choice in ("auto", "required"):
            yield CHAT, chat(tools=[{"type": "function", "function": function}], tool_choice=choice)
            flat = [{"type": "function", **function}]
            yield RESPONSES, {"input": "x", "max_output_tokens": 3, "tools": flat, "tool_choice": choice}
        yield MESSAGES, chat(tools=[{"name": "f", "input_schema": value, "strict": strict}])


def test_c38_what_a_schema_refers_to_is_never_opened(target: Target, bait: Bait) -> None:
    """Each of some hundred requests once."""
    with target.undisturbed():
        for url in bait.urls:
            for value, statuses in leading_to(url):
                for path, body in asking_for(value):
                    answer = target.ask("POST", path, body)
                    assert answer.status in statuses, (path, body, answer.body[:300])
                    assert not bait.connected() and not bait.opened(), (path, body)
    with socket.create_connection(bait.address):
        assert bait.connected(), "the port would have told"
    reader = os.open(bait.file, os.O_RDONLY | os.O_NONBLOCK)
    assert bait.opened(), "the file would have told"
    os.close(reader)


@pytest.mark.parametrize("grammar", AMBIGUOUS, ids=["stars", "splits", "words"])
def test_c42_masks_that_take_ever_longer_end_their_request(target: Target, grammar: str) -> None:
    data = json.dumps(complete(guided_grammar=grammar) | ENDLESS).encode()
    with target.undisturbed():
        start = time.monotonic()
        answer = target.ask("POST", COMPLETIONS, data)
        assert time.monotonic() - start < 8
        check(answer, BAD)
        assert b"too complex to follow" in answer.body or b"takes too long to follow" in answer.body


def test_c43_many_schemas_do_not_fill_the_memory(target: Target) -> None:
    """Some are kept; once those are as many as may be, further ones take no more."""

    def send(numbers: range) -> None:
        for i in numbers:
            form = {"type": "object", "properties": {f"p{i}_{k}": {"enum": ["x" * 40 + str(k)]} for k in range(40)}}
            check(target.ask("POST", CHAT, chat(**schema(form))), OK)

    with target.undisturbed():
        target.check_memory()
        send(range(KEPT))
        taken = target.settle()
        assert taken < 128 << 20
        send(range(KEPT, KEPT + 120))
    target.check_memory()


def test_c47_code_in_a_tool_call_stays_text(target: Target, tmp_path_factory: pytest.TempPathFactory) -> None:
    harm = tmp_path_factory.mktemp("harm") / "executed"
    code = f"__import__('os').mkdir('{harm}')"
    text = json.dumps({"name": "f", "arguments": {"x": code}})
    body = chat(tools=[TOOL], guided_choice=[text], max_tokens=400)
    with target.undisturbed():
        for _ in range(REPEATS):
            answer = target.ask("POST", CHAT, body)
            check(answer, OK)
            (call,) = json.loads(answer.body)["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"x": code}
    assert not harm.exists()
