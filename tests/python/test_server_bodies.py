"""Large requests and large answers: they are answered like small ones, and leave the event loop to others."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server_fixtures import RunningServer, running_server

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

LONG = 8000  # tokens
WORK_S = 0.05  # of one turn of the event loop: ten times what is meant, as tests run beside each other
ROUTES = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
}
GREEDY = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server({"max_model_len": 140_000, "num_gpu_blocks_override": 40_000}) as running:
        yield running


@pytest.fixture
def ids() -> list[int]:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [rng.randrange(32, 127) for _ in range(LONG)]


def text_of(ids: list[int]) -> str:
    return bytes(ids).decode()


def test_long_ids_and_their_text_are_the_same_prompt(server: RunningServer, ids: list[int]) -> None:
    fields = GREEDY | {"return_token_ids": True, "echo": True, "logprobs": 1}
    one, two = (server.complete(prompt=prompt, **fields).json["choices"][0] for prompt in (ids, text_of(ids)))
    assert one["prompt_token_ids"] == two["prompt_token_ids"] == ids
    assert one["token_ids"] == two["token_ids"] and one["text"] == two["text"]
    assert one["text"].startswith(text_of(ids))
    assert one["logprobs"]["tokens"][:LONG] == list(text_of(ids)) == two["logprobs"]["tokens"][:LONG]
    assert one["logprobs"]["token_logprobs"] == two["logprobs"]["token_logprobs"]
    streamed = server.complete(prompt=ids, stream=True, return_token_ids=True, **GREEDY).events
    assert streamed[0]["choices"][0]["prompt_token_ids"] == ids
    assert [token for event in streamed for token in event["choices"][0]["token_ids"]] == one["token_ids"]


def test_long_prompts_of_a_batch_are_answered_in_order(server: RunningServer, ids: list[int]) -> None:
    prompts = [ids[:100], ids[:3], ids[:5000], ids]
    together = server.complete(prompt=prompts, **GREEDY).json
    alone = [server.complete(prompt=prompt, **GREEDY).json["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in together["choices"]] == alone
    assert together["usage"]["prompt_tokens"] == sum(map(len, prompts))


def test_long_ids_are_cut_from_the_left(server: RunningServer, ids: list[int]) -> None:
    fields = GREEDY | {"return_token_ids": True}
    cut = server.complete(prompt=ids, truncate_prompt_tokens=100, **fields).json["choices"][0]
    assert cut["prompt_token_ids"] == ids[-100:]
    assert cut["token_ids"] == server.complete(prompt=ids[-100:], **fields).json["choices"][0]["token_ids"]


@pytest.mark.parametrize("bad, says", [(-1, "Token id -1 is out of vocabulary"), (259, "Token id 259 is out of vocab")])
def test_long_ids_outside_of_the_vocabulary_are_refused(
    server: RunningServer, ids: list[int], bad: int, says: str
) -> None:
    for reply, param in (
        (server.complete(prompt=[*ids, bad]), "prompt"),
        (server.complete(prompt=[[1], [*ids, bad]]), "prompt"),
        (server.ask("POST", "/detokenize", {"tokens": [*ids, bad]}), "tokens"),
    ):
        assert reply.status == 400 and says in reply.error["message"] and reply.error["param"] == param


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("unit", ["a cat. ", "ä", "好", "\U0001f600\n", '"\\'])
def test_long_text_arrives_as_it_was_sent(server: RunningServer, unit: str, escaped: bool) -> None:
    text = unit * (120_000 // len(unit.encode()))
    body = {"prompt": text, "max_tokens": 0, "echo": True}
    data = json.dumps(body, ensure_ascii=escaped).encode()
    answer = server.ask("POST", "/v1/completions", data).json
    assert answer["choices"][0]["text"] == text
    tokens = server.ask("POST", "/tokenize", json.dumps({"prompt": text}, ensure_ascii=escaped).encode()).json["tokens"]
    assert bytes(tokens) == text.encode() and answer["usage"]["prompt_tokens"] == len(tokens)
    assert server.ask("POST", "/detokenize", {"tokens": tokens}).json == {"prompt": text}


def test_long_answers_of_tokenize_are_whole(server: RunningServer) -> None:
    text = "a b" * 200_000
    answer = server.ask("POST", "/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert bytes(answer["tokens"]).decode() == text and answer["count"] == len(text)
    assert answer["token_strs"][:4] == ["a", "Ġ", "b", "a"] and len(answer["token_strs"]) == len(text)


@pytest.mark.parametrize(
    "path, field", [("/v1/chat/completions", "messages"), ("/v1/messages", "messages"), ("/v1/responses", "input")]
)
def test_long_conversation_is_the_same_in_pieces(server: RunningServer, path: str, field: str) -> None:
    """The same text as one string, as a part, and in a body that is padded with blanks."""
    content = "word " * 8000
    parts = [{"type": "input_text" if path == "/v1/responses" else "text", "text": content}]
    counts: set[int] = set()
    for given, padding in ((content, b""), (parts, b""), (content, b" " * 100_000)):
        fields = ROUTES[path] | {field: [{"role": "user", "content": given}]}
        usage = server.ask("POST", path, json.dumps(fields).encode() + padding).json["usage"]
        cached = usage.get("cache_read_input_tokens", 0)  # which /v1/messages counts apart
        counts.add(usage.get("prompt_tokens", usage.get("input_tokens")) + cached)
    (count,) = counts
    assert count > len(content)


def test_text_beyond_the_context_is_refused_by_its_tokens(server: RunningServer) -> None:
    text = "a" * 150_000
    for reply, param in (
        (server.complete(prompt=text), "prompt"),
        (server.chat(messages=[{"role": "user", "content": text}]), "messages"),
        (server.ask("POST", "/v1/responses", {"input": text}), "input"),
        (server.ask("POST", "/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": text}]}), None),
    ):
        error = reply.json["error"]
        assert reply.status == 400 and "maximum context length is 140000" in error["message"], error
        assert error.get("param") == param
    counted = server.ask("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": text}]})
    assert counted.json["input_tokens"] > 150_000


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("padding", [0, 300_000])
def test_unknown_fields_are_ignored_unless_parameters_are_strict(
    path: str, padding: int, strict: RunningServer, server: RunningServer
) -> None:
    known = json.dumps(ROUTES[path]).encode()
    body = known[:-1] + b', "frobnicate": [1], "zz": "' + b"a" * padding + b'"}'
    ignored = server.metric("fastllm:unknown_request_fields_total")
    assert server.ask("POST", path, body).status == 200
    assert server.metric("fastllm:unknown_request_fields_total") == ignored + 2
    assert strict.ask("POST", path, known + b" " * padding).status == 200
    refused = strict.ask("POST", path, body)
    error = refused.json["error"]
    assert refused.status == 400 and error["message"] == "Unknown parameter: 'frobnicate'.", error
    if path not in ("/v1/messages", "/v1/messages/count_tokens"):  # whose errors have neither
        assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    with running_server(strict_params=True) as running:
        yield running


def test_no_large_body_keeps_the_event_loop(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from body_lag import Turns, around, many, send, text_of

    big = 7_000_000  # bytes
    ids = many(b"77", 100_000)
    message = b'{"role":"user","content":"a"}'
    parts = b'{"role":"user","content":%b}' % many(b'{"type":"text","text":"a"}', 9900)
    parameters = b'{"properties":{%b}}' % b",".join(b'"k%d":{}' % i for i in range(60_000))
    tools = b'[{"type":"function","function":{"name":"f","parameters":%b}}]' % parameters
    rows = [
        ("/v1/completions", b'{"prompt":%b}' % many(b"77", big // 3), 400),
        ("/v1/completions", b'{"prompt":%b,"max_tokens":1}' % many(ids, 10), 200),
        ("/v1/completions", b'{"prompt":%b,1.5]}' % many(b"77", big // 3)[:-1], 400),
        ("/v1/completions", b'{"prompt":%b}' % many(text_of("cjk", 1000), big // 1000), 400),
        ("/v1/completions", around("/v1/completions", text_of("ascii", big)), 400),
        ("/v1/chat/completions", around("/v1/chat/completions", text_of("cjk", big)), 400),
        ("/v1/messages", around("/v1/messages", text_of("mixed", big)), 400),
        ("/v1/responses", around("/v1/responses", text_of("ascii", 100_000) + b" " * big), 200),
        ("/v1/completions", b'{"prompt":"a","max_tokens":1,"zz":%b}' % text_of("cjk", big), 200),
        ("/v1/responses", b'{"input":"a","zz":%b,}' % text_of("ascii", big), 400),
        ("/v1/messages", b'{"messages":[],"zz":%b,"max_tokens":"x"}' % text_of("ascii", big), 400),
        ("/v1/chat/completions", b'{"messages":%b,"max_tokens":1}' % many(message, 9900), 200),
        ("/v1/chat/completions", b'{"messages":%b,"max_tokens":1}' % many(message, 90_000), 400),
        ("/v1/responses", b'{"input":%b,"max_output_tokens":1}' % many(message, 3000), 200),
        ("/v1/messages", b'{"messages":[%b],"max_tokens":1}' % parts, 200),
        ("/v1/chat/completions", b'{"messages":[%b],"tools":%b}' % (message, tools), 400),
        ("/tokenize", b'{"prompt":%b}' % text_of("ascii", 1_000_000), 200),
        ("/detokenize", b'{"tokens":%b}' % ids, 200),
    ]

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    monkeypatch.setattr(asyncio.BaseEventLoop, "_run_once", asyncio.BaseEventLoop._run_once)  # type: ignore[attr-defined]
    turns = Turns(server.run(loop()))
    gc.collect()
    gc.freeze()  # as `fastllm serve` does: collections would look at everything the tests have loaded
    try:
        for path, body, status in rows:
            works: list[float] = []
            while not works or (works[-1] >= WORK_S and len(works) < 3):  # what a body costs, it costs each time
                turns.work = 0.0
                assert send(server.port, path, body) == status, (path, body[:60])
                works.append(turns.work)
            assert min(works) < WORK_S, (path, body[:60], works)
    finally:
        gc.unfreeze()
