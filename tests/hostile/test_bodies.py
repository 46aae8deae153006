"""Bodies and JSON: rows B of the catalogue, each 20 times, or as often as it says."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp
import pytest
from harness import CHAT, COMPLETIONS, LEAKS, REPEATS, Target, check, post
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


FULL: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "seed": 1}),
    (COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 2, "logprobs": 2, "n": 2, "logit_bias": {"5": 1}}),
    (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2, "echo": True, "ignore_eos": True, "priority": 0}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "guided_regex": "[ab]+", "min_p": 0.1, "top_k": 3}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "frequency_penalty": 0.5}),
    (CHAT, {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], "max_tokens": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "system": [{"type": "text", "text": "x"}]},
    ),
    (
        "/v1/responses",
        {"input": "x", "max_output_tokens": 2, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}},
    ),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]


def test_b23_bit_flips_of_10000_valid_requests(target: Target) -> None:
    """One to three bits of each; all of them are answered before they are changed."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def work() -> Counter[int]:
        statuses: Counter[int] = Counter()
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(f"http://127.0.0.1:{target.port}", headers=headers) as session:

            async def send(path: str, body: bytes) -> int:
                async with session.post(path, data=body) as response:
                    data = await response.read()
                    assert response.status in (200, 400, 404), (path, body, data)
                    assert not any(leak in data for leak in LEAKS), (path, body, data)
                    return response.status

            assert {await send(path, json.dumps(body).encode()) for path, body in FULL} == {200}
            rows = iter(range(10_000))

            async def send_flipped() -> None:
                for row in rows:
                    path, fields = FULL[row % len(FULL)]
                    body = bytearray(json.dumps(fields).encode())
                    for _ in range(rng.randint(1, 3)):
                        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
                    statuses[await send(path, bytes(body))] += 1

            await asyncio.gather(*(send_flipped() for _ in range(16)))
        return statuses

    with target.undisturbed():
        statuses = target.run(work(), timeout=120)
    print(statuses)
    assert statuses.total() == 10_000 and min(statuses[200], statuses[400]) > 1000
    target.check_memory()
