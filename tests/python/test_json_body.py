"""Bodies that are read natively: what comes out is what any JSON parser says, and nothing else is accepted."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from fastllm import _core
from fastllm.server.errors import ApiError
from fastllm.server.json_body import decode
from fastllm.server.limits import Limits
from fastllm.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

ALPHABET = 'ab "\\/\n\t\x00\x7fäß好\U0001f600'


def state(strict: bool = False, **limits: Any) -> Any:
    ignored: set[str] = set()
    fields = {"loaded": False, "strict_params": strict, "workers": None, "note_unknown_fields": ignored.update}
    return SimpleNamespace(limits=Limits(**limits), ignored=ignored, **fields)


def read(body: bytes, kind: Any = CompletionRequest, **settings: Any) -> Any:
    return asyncio.run(decode(body, kind, state(**settings)))


def plain(value: Any) -> Any:
    if isinstance(value, memoryview):
        assert value.format == "i"
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return random.Random(seed)


def text_like(rng: random.Random) -> str:
    size = rng.choice([0, 1, 10, 100, 17_000])
    return "".join(rng.choices(rng.choice([ALPHABET, ALPHABET[:8], "aä", "a好", "a"]), k=size))


def value_like(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth < 4 else 2)
    if kind == 0:
        return rng.choice([None, True, 0, -7, 2**40, 1.5, -2.5e-7])
    if kind == 1:
        return text_like(rng)
    if kind == 2:
        return [value_like(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {text_like(rng)[:20]: value_like(rng, depth + 1) for _ in range(rng.randrange(5))}


def test_long_values_come_back_where_they_were(rng: random.Random) -> None:
    for _ in range(60):
        fields = {"guided_json": value_like(rng), "user": text_like(rng), "zz": value_like(rng), "best_of": 3}
        fields["prompt"] = rng.choice([[1] * 63, list(range(200)), [[5] * 70, [6], [-1] * 64], [text_like(rng)] * 3])
        dumped = json.dumps(fields, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        try:
            body = dumped.encode()
        except UnicodeEncodeError:
            continue
        found = read(body)
        assert found.guided_json == fields["guided_json"]
        assert (found.user, found.best_of, plain(found.prompt)) == (fields["user"], 3, fields["prompt"])


def test_no_other_json_is_accepted_than_msgspec_accepts(rng: random.Random) -> None:
    """Of texts with a few bytes changed. msgspec looks at the text of unknown fields less closely."""
    mark = {"fields": CompletionRequest.__struct_fields__, "ids_field": "prompt", "mark": "123456789012"}
    for _ in range(40):
        fields = {"guided_json": value_like(rng, 2), "prompt": list(range(70)), "user": "\U0001f600 \u00e4\n"}
        valid = json.dumps(fields, ensure_ascii=rng.random() < 0.5).encode()
        for _ in range(50):
            body = bytearray(valid)
            for _ in range(rng.randint(1, 3)):
                body[rng.randrange(len(body))] = rng.choice(b'"\\{}[],:0123456789.eE+-untrfl \n\x00\x80\xff\xc3\xe5ab')
            try:
                msgspec.json.decode(body)
                bytes(body).decode()
                wrong = ""
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                wrong = str(exc)
            if "out of range" in wrong:  # a number too large for its type is still JSON
                continue
            found = _core.read_json_body(body, **mark)
            assert bool(found.error) == bool(wrong), (bytes(body), found.error, wrong)


@pytest.mark.parametrize(
    "body, prompt",
    [
        ('{"prompt": LONG, "prompt": "x"}', "x"),
        ('{"prompt": "x", "prompt": LONG}', "LONG"),
        ('{"prompt": TEXT, "prompt": LONG}', "LONG"),
        ('{"prompt": LONG, "prompt": TEXT}', "TEXT"),
        ('{"prompt": [LONG, LONG, LONG], "prompt": [[7]]}', [[7]]),
        ('{"prompt": [[7]], "prompt": ["a", TEXT]}', ["a", "TEXT"]),
        ('{"prompt": LONG, "prompt": null}', None),
    ],
)
def test_last_of_two_equal_keys_counts(body: str, prompt: Any) -> None:
    longs = {"LONG": list(range(100)), "TEXT": "ab" * 10_000}
    for name, value in longs.items():
        body = body.replace(name, json.dumps(value))
    want = (
        [longs.get(item, item) if isinstance(item, str) else item for item in prompt]
        if isinstance(prompt, list)
        else None
    )
    if want is None:
        want = longs.get(prompt, prompt) if isinstance(prompt, str) else prompt
    assert plain(read(body.encode()).prompt) == want


def test_text_that_looks_like_a_mark_stays_what_it_is() -> None:
    found = read(json.dumps({"prompt": [1] * 100, "user": "1234567890120", "stop": "x" * 20_000}).encode())
    assert (found.user, found.stop, len(found.prompt)) == ("1234567890120", "x" * 20_000, 100)


@pytest.mark.parametrize(
    "kind, body, param, code, says",
    [
        (
            CompletionRequest,
            '{"prompt": [IDS, 1.5]}',
            "prompt",
            "invalid_type",
            "prompt[100] must be an integer, got a nu",
        ),
        (
            CompletionRequest,
            '{"prompt": [IDS, "a"]}',
            "prompt",
            "invalid_type",
            "prompt[100] must be an integer, got a st",
        ),
        (
            CompletionRequest,
            '{"prompt": [[1], [IDS, null]]}',
            "prompt",
            "invalid_type",
            "prompt[1][100] must be an integer",
        ),
        (
            CompletionRequest,
            '{"prompt": [IDS, 9999999999]}',
            "prompt",
            "invalid_value",
            "token id 9999999999 is out of vo",
        ),
        (
            DetokenizeRequest,
            '{"tokens": [IDS, true]}',
            "tokens",
            "invalid_type",
            "tokens[100] must be an integer, got true",
        ),
        (DetokenizeRequest, '{"tokens": [IDS, 1', None, "invalid_json", "end of input"),
        (
            ChatRequest,
            '{"messages": [{"role": "user", "content": [IDS]}]}',
            "messages",
            "invalid_type",
            "messages[0].content",
        ),
        (ChatRequest, '{"messages": "TEXT"}', "messages", "invalid_type", "messages must be an array, got a string"),
        (
            ChatRequest,
            '{"messages": [], "seed": "TEXT"}',
            "seed",
            "invalid_type",
            "seed must be an integer or null, got a",
        ),
        (CompletionRequest, '["TEXT"]', None, "invalid_type", "The request body must be an object, got an array"),
        (CompletionRequest, '"TEXT"', None, "invalid_type", "The request body must be an object, got a string"),
    ],
)
def test_wrong_long_value_is_refused_by_name(kind: Any, body: str, param: str | None, code: str, says: str) -> None:
    body = body.replace("IDS", ", ".join(map(str, range(100)))).replace("TEXT", "a" * 20_000)
    with pytest.raises(ApiError) as caught:
        read(body.encode(), kind)
    error = caught.value
    assert (error.status, error.body.param, error.body.code) == (400, param, code), error.body
    assert says in error.body.message, error.body.message


def test_whole_floats_are_integers_in_long_lists_too() -> None:
    found = read(b'{"prompt": [%b], "max_tokens": 16.0}' % b", ".join([b"7.0"] * 100))
    assert (found.max_tokens, plain(found.prompt)) == (16, [7] * 100)


def test_values_are_counted_without_long_lists_of_ids() -> None:
    assert len(read(b'{"prompt": [%b]}' % b",".join([b"1"] * 1000), max_json_values=10).prompt) == 1000
    assert read(b'{"zz": [%b]}' % b",".join([b"{}"] * 1000), max_json_values=10).prompt is None
    with pytest.raises(ApiError, match="has 1002 values, long lists of token ids aside; at most 10 are accepted"):
        read(b'{"stop": [%b]}' % b",".join([b'"a"'] * 1000), max_json_values=10)


@pytest.mark.parametrize("padding", [0, 100_000])
def test_unknown_fields_are_refused_only_when_asked_for(padding: int) -> None:
    body = b'{"prompt": "x", "user": "%b", "zz\\u00e4": {"a": [1]}, "yy": 1}' % (b"a" * padding)
    lenient = state()
    lenient.workers = None
    found = asyncio.run(decode(body, CompletionRequest, lenient))
    assert (found.prompt, len(found.user), lenient.ignored) == ("x", padding, {"zzä", "yy"})
    with pytest.raises(ApiError, match="Unknown parameter: 'zzä'") as caught:
        read(body, strict=True)
    assert (caught.value.status, caught.value.body.param, caught.value.body.code) == (400, "zzä", "unknown_parameter")
