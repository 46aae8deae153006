"""Bodies and JSON: rows B of the catalogue, each 20 times, or as often as it says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from harness import CHAT, COMPLETIONS, REPEATS, Target, check, post
from test_hostile_requests import BODIES, accepts, body_for

OK, BAD = (200,), (400,)
BIG = (0, 413)  # the server may stop reading, so that sending fails
LIMIT = 2 << 20  # bytes, of the target


def chat(content: str) -> bytes:
    return b'{"messages": [{"role": "user", "content": %b}], "max_tokens": 1}' % content.encode()


ROWS: list[tuple[str, str, bytes, tuple[int, ...]]] = [
    *((f"{name}", COMPLETIONS, body, statuses if statuses != (413,) else BIG) for name, body, statuses in BODIES),
    ("B4 depth 1000", CHAT, b'{"messages": ' + b"[" * 1000 + b"]" * 1000 + b"}", BAD),
    ("B5 body over the limit", COMPLETIONS, b'{"prompt": "' + b"a" * LIMIT + b'"}', BIG),
    ("B7 many keys", CHAT, b"{" + b",".join(b'"%x":1' % i for i in range(150_000)) + b"}", BAD),
    ("B7 many keys inside", CHAT, b'{"z": {' + b",".join(b'"%x":1' % i for i in range(150_000)) + b"}}", BAD),
    ("B7 a million elements", COMPLETIONS, b'{"prompt": [' + b"1," * 900_000 + b"1]}", BAD),
    *(
        (
            f"B10 lone surrogate in {name}",
            CHAT,
            json.dumps({"messages": [message], "max_tokens": 1} | extra).encode(),
            BAD,
        )
        for name, message, extra in (
            ("content", {"role": "user", "content": "\ud800"}, {}),
            ("role", {"role": "\udfff", "content": "x"}, {}),
            ("model", {"role": "user", "content": "x"}, {"model": "\ud800"}),
            ("stop", {"role": "user", "content": "x"}, {"stop": ["\ud800"]}),
            ("a key", {"role": "user", "content": "x"}, {"logit_bias": {"\ud800": 1}}),
        )
    ),
    ("B11 NUL in content", CHAT, chat('"a\\u0000b"'), OK),
    ("B11 NUL in a model", COMPLETIONS, b'{"prompt": "x", "model": "null\\u0000"}', (400, 404)),
    ("B17 unknown field", COMPLETIONS, b'{"prompt": "x", "max_tokens": 1, "frobnicate": {"a": [1]}}', OK),
    *(
        (f"B20 {name}", COMPLETIONS, json.dumps({"prompt": "x", "max_tokens": 1, name: {}}).encode(), OK)
        for name in ("__proto__", "constructor", "__class__", "k" * 1_000_000)
    ),
    ("an array", COMPLETIONS, b"[]", BAD),
    ("a string", COMPLETIONS, b'"x"', BAD),
    ("null", CHAT, b"null", BAD),
]


@pytest.mark.parametrize("name, path, body, statuses", ROWS, ids=[row[0] for row in ROWS])
def test_body(target: Target, name: str, path: str, body: bytes, statuses: tuple[int, ...]) -> None:
    with target.undisturbed():
        for _ in range(REPEATS):
            check(target.ask("POST", path, body), statuses)


def test_b5_body_over_the_limit_in_chunks(target: Target) -> None:
    """Twice: the server reads on for 2 s, so that the client gets its answer."""
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    head = post(COMPLETIONS, b"", "Transfer-Encoding: chunked", "Content-Type: application/json")
    with target.undisturbed():
        for _ in range(2):
            check(target.raw(head, *[chunk] * (LIMIT // 0x10000 + 1)), BIG)
    target.check_memory()


WRONG: tuple[Any, ...] = ("text", 7, 1.5, True, [], {}, [[]], [{}], {"a": {}}, None)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_b19_every_field_with_every_wrong_type(target: Target, path: str) -> None:
    """Twice each: some 400 requests."""
    from typing import get_type_hints

    from fastllm.server.protocol import ChatRequest, CompletionRequest

    hints = get_type_hints(CompletionRequest if path == COMPLETIONS else ChatRequest)
    with target.undisturbed():
        for _ in range(2):
            for name, hint in hints.items():
                for value in WRONG:
                    if value is not None and not accepts(hint, value):
                        check(target.ask("POST", path, body_for(path) | {name: value}), BAD, name)


def test_b23_bit_flips(target: Target) -> None:
    """500 of them."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "logprobs": 2,
        "n": 2,
        "seed": 1,
        "logit_bias": {"5": 1},
    }
    valid = json.dumps(body_for(COMPLETIONS) | fields).encode()
    with target.undisturbed():
        for _ in range(500):
            body = bytearray(valid)
            for _ in range(rng.randint(1, 3)):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            check(target.ask("POST", COMPLETIONS, bytes(body)), (200, 400, 404))
