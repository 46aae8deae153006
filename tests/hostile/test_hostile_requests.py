"""Bodies and parameters that broke other servers; after each of them the server is as well as before."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from typing import Any, get_args, get_origin, get_type_hints

import aiohttp
import pytest

from fastllm.server.limits import Limits
from fastllm.server.protocol import ChatRequest, CompletionRequest
from server_fixtures import CONTEXT, Reply, RunningServer, ask, running_server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOLDEN = {"prompt": "The golden prompt", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
# What no answer may contain: internals of the server or of another request.
LEAKS = (b"Traceback", b"site-packages", b"/home", b'.py"', b"0x7f", b"golden")
ANSWER_WITHIN_S = 2.0  # after the last byte was sent; generous for a busy machine


@pytest.fixture(scope="module")
def server():
    with running_server({"max_num_seqs": 16}, limits=Limits(max_body_bytes=2 << 20, body_timeout_s=1.0)) as running:
        running.golden = running.complete(**GOLDEN).json["choices"][0]["token_ids"]  # type: ignore[attr-defined]
        yield running


@pytest.fixture(autouse=True)
def after_check(server: RunningServer):
    """After every row: healthy, ready, the same tokens as before, nothing running, every block back."""
    yield
    assert server.ask("GET", "/health").status == 200 and server.ask("GET", "/ready").status == 200
    assert server.complete(**GOLDEN).json["choices"][0]["token_ids"] == server.golden  # type: ignore[attr-defined]
    server.wait_idle()


def check(reply: Reply, statuses: tuple[int, ...], param: str | None = None) -> None:
    assert reply.status in statuses, reply.body[:300]
    assert not any(leak in reply.body for leak in LEAKS), reply.body[:300]
    assert reply.headers["X-Request-Id"]
    if reply.status != 200:
        assert len(reply.error["message"]) <= 500
        if param is not None and not (reply.error["code"] == "invalid_json" and reply.error["param"] is None):
            assert reply.error["param"] == param, reply.error  # a body of too many values has no one to blame


OK, BAD, BIG = (200,), (400,), (413,)
NESTED_OBJECT = b'{"a":' * 100_000

BODIES: list[tuple[str, bytes, tuple[int, ...]]] = [
    ("B1 empty", b"", BAD),
    ("B1 whitespace", b" \n\t ", BAD),
    ("B2 truncated", b'{"prompt": "x', BAD),
    ("B2 trailing garbage", b'{"prompt": "x"}x', BAD),
    ("B2 two documents", b'{"prompt": "x"}{"prompt": "x"}', BAD),
    ("B4 depth 60, unknown field", b'{"prompt": "x", "max_tokens": 1, "z": ' + b"[" * 60 + b"]" * 60 + b"}", OK),
    (
        "B4 depth 100, unknown field",
        b'{"prompt": "x", "max_tokens": 1, "z": ' + b"[" * 100 + b"]" * 100 + b"}",
        BAD,
    ),
    ("B4 depth 1e6", b"[" * 1_000_000, BAD),
    ("B4 depth 1e5 of objects", NESTED_OBJECT, BAD),
    ("B4 depth 1e5 closed", b'{"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}", BAD),
    ("B5 over the limit", b" " * ((2 << 20) + 1), BIG),
    ("B7 1e5 keys", json.dumps({f"k{i}": i for i in range(100_000)} | {"prompt": "x", "max_tokens": 1}).encode(), BAD),
    ("B8 invalid utf-8", b'{"prompt": "\xff\xfe"}', BAD),
    ("B8 overlong utf-8", b'{"prompt": "\xc0\xaf"}', BAD),
    ("B8 surrogate in utf-8", b'{"prompt": "\xed\xa0\x80"}', BAD),
    ("B10 lone surrogate escape", b'{"prompt": "\\ud800"}', BAD),
    ("B10 lone low surrogate", b'{"prompt": "\\udc00 x"}', BAD),
    ("B11 nul in prompt", b'{"prompt": "a\\u0000b", "max_tokens": 1}', OK),
    ("B13 NaN", b'{"prompt": "x", "temperature": NaN}', BAD),
    ("B13 Infinity", b'{"prompt": "x", "temperature": -Infinity}', BAD),
    ("B13 1e999", b'{"prompt": "x", "temperature": 1e999}', BAD),
    ("B14 5000 digits", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", BAD),
    ("B14 1e5 decimals", b'{"prompt": "x", "max_tokens": 1, "temperature": 0.' + b"1" * 100_000 + b"}", (200, 400)),
    ("B16 true for an int", b'{"prompt": "x", "max_tokens": true}', BAD),
    ("B14 -1e400", b'{"prompt": "x", "max_tokens": 1, "temperature": -1e400}', BAD),
    ("B16 text for an int", b'{"prompt": "x", "max_tokens": "5"}', BAD),
    ("B16 fraction for an int", b'{"prompt": "x", "max_tokens": 1.5}', BAD),
    ("B20 __proto__", b'{"prompt": "x", "max_tokens": 1, "__proto__": {}, "__class__": 1}', OK),
    ("B20 1 MB key", b'{"prompt": "x", "max_tokens": 1, "' + b"k" * 1_000_000 + b'": 1}', OK),
    ("duplicate keys", b'{"prompt": "x", "prompt": "y", "max_tokens": 1}', OK),
    ("byte order mark", b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}', OK),
    ("two byte order marks", b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "x"}', BAD),
    (
        "B16 whole floats",
        b'{"prompt": [72.0, 105], "max_tokens": 2.0, "n": 1e0, "seed": 3.0, "top_k": -1.0}',
        OK,
    ),
    ("depth 1e5 beside a whole float", b'{"max_tokens": 1.0, "z":' + b"[" * 100_000 + b"]" * 100_000 + b"}", BAD),
    ("utf-16", '{"prompt": "x"}'.encode("utf-16"), BAD),
]


@pytest.mark.parametrize("name, body, statuses", BODIES, ids=[row[0] for row in BODIES])
def test_body(server: RunningServer, name: str, body: bytes, statuses: tuple[int, ...]) -> None:
    started = time.monotonic()
    reply = server.ask("POST", COMPLETIONS, body)
    assert time.monotonic() - started < ANSWER_WITHIN_S
    check(reply, statuses)
    check(server.ask("POST", CHAT, body), (400, 413))


INTS = (-1, 0, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1)

FIELDS: list[tuple[str, str, list[Any], tuple[int, ...]]] = [
    # path, field, values, statuses
    (COMPLETIONS, "model", ["", "x" * 1_000_000, "../../etc/passwd", "file:///x", "a\x00b", "\u202enull"], (400, 404)),
    (COMPLETIONS, "prompt", [[-1], [2**31], [2**63], [2**64], [1.5], ["1", 1], [[1], "a"], [1, [2]], [[[1]]]], BAD),
    (COMPLETIONS, "prompt", [[True], [None], {}, 5, False, [{}], [[None]], [""], ["a", ""], [[], [1]]], BAD),
    (COMPLETIONS, "prompt", ["a" * (CONTEXT + 1), " " * 600_000, "🙂" * 100_000, "<|im_start|>" * 60_000], BAD),
    (COMPLETIONS, "prompt", [["a"] * 5000, [[1]] * 5000], BAD),
    (COMPLETIONS, "max_tokens", [*INTS, "5", 1e300], BAD),
    (COMPLETIONS, "min_tokens", [-1, 17, 2**31, 2**64], BAD),
    (COMPLETIONS, "n", [-1, 0, 1.5, 10**9, 2**64], BAD),
    (COMPLETIONS, "best_of", [-1, 0, 10**9, 2**80, "2"], BAD),
    (COMPLETIONS, "use_beam_search", [5, "yes", []], BAD),
    (COMPLETIONS, "length_penalty", [0.5, "x", 10**400, []], BAD),
    (COMPLETIONS, "early_stopping", [True, "x", 5, []], BAD),
    (COMPLETIONS, "allowed_token_ids", [[], [-1], [2**40], [2**80], ["a"], [1] * 200_000, 5], BAD),
    (COMPLETIONS, "bad_words", ["x", [1], [""], [" "], ["x"] * 1000, ["x" * 10**5]], BAD),
    (COMPLETIONS, "temperature", [-0.1, 2.1, 1e308, "1", [1]], BAD),
    (COMPLETIONS, "temperature", [1e-320, 0, 2], OK),
    (COMPLETIONS, "top_p", [0, -0.1, 1.0001, "x"], BAD),
    (COMPLETIONS, "top_p", [1e-45, 1e-300, 1], (200, 400)),
    (COMPLETIONS, "top_k", [-2, 2**31, 2**63, "1", 1.5], (200, 400)),
    (COMPLETIONS, "min_p", [-0.1, 1.1, "x"], BAD),
    (COMPLETIONS, "presence_penalty", [2.1, -2.1, 1e38], BAD),
    (COMPLETIONS, "frequency_penalty", [2.1, -2.1, 1e38], BAD),
    (COMPLETIONS, "repetition_penalty", [0, -1], BAD),
    (COMPLETIONS, "repetition_penalty", [1e-38, 1e38], (200, 400)),
    (COMPLETIONS, "seed", [2**63, 2**64, -(2**64), 1.5, "1"], BAD),
    (COMPLETIONS, "seed", [-1, 0, 2**63 - 1], OK),
    (COMPLETIONS, "logprobs", [-1, 21, 10**6, 2**64, "1", True], BAD),
    (COMPLETIONS, "prompt_logprobs", [-2, 10**6, 2**64], BAD),
    (COMPLETIONS, "stop", [["x"] * 100_000, ["x" * 1_000_000], "", [None], 5, [["x"]]], BAD),
    (COMPLETIONS, "stop_token_ids", [[-1], [2**31], [2**64], [0] * 100_000, "x"], BAD),
    (COMPLETIONS, "logit_bias", [{"abc": 1}, {"-1": 1}, {"1.5": 1}, {"9" * 12: 1}, {"5": 101}, {"5": "x"}, [1]], BAD),
    (COMPLETIONS, "logit_bias", [{str(i): 0 for i in range(50_000)}, {"٣": 1}, {"": 1}], BAD),
    (COMPLETIONS, "stream", ["yes", 1, []], BAD),
    (COMPLETIONS, "stream_options", [{"include_usage": True}, {}, [], "x"], BAD),
    (COMPLETIONS, "priority", [2**63, "high", 2**31, -(2**31) - 1], BAD),
    (COMPLETIONS, "cache_salt", ["", 5], BAD),
    (COMPLETIONS, "suffix", ["x", "x" * 1_000_000], BAD),
    (COMPLETIONS, "prompt_embeds", ["QUJD"], BAD),
    (COMPLETIONS, "kv_transfer_params", [{"do_remote_prefill": True}], BAD),
    (COMPLETIONS, "routed_experts", [[-1], {"a": 1}], OK),
    (COMPLETIONS, "ignore_eos", ["x", 1], BAD),
    (CHAT, "messages", [None, 5, [], {}, [5], [None], [[]], [{}]], BAD),
    (CHAT, "messages", [[{"role": r, "content": "x"}] for r in ("", "king", "__class__", "x" * 1_000_000)], BAD),
    (CHAT, "messages", [[{"role": "user", "content": c}] for c in (None, 5, {}, [{}], [{"type": "x"}], [5])], BAD),
    (CHAT, "messages", [[{"role": "user", "content": "x"}] * 20_000], BAD),
    (CHAT, "messages", [[{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}]], (200, 400)),
    (
        CHAT,
        "messages",
        [[{"role": "user", "content": "{{ ''.__class__ }}{% for x in range(9**9) %}", "__class__": 1}]],
        OK,
    ),
    (CHAT, "messages", [[{"role": "tool", "content": "x", "tool_call_id": "none"}]], OK),
    (CHAT, "chat_template", ["{{ 7*7 }}", "{% for x in range(10**9) %}{% endfor %}"], BAD),
    (CHAT, "chat_template_kwargs", [{"tokenize": True}, {"messages": []}, {"chat_template": "x"}, [], "x"], BAD),
    (CHAT, "tools", [[], [{}], "x", [{"type": "function"}] * 1000], BAD),
    (CHAT, "tool_choice", ["required", {"type": "function", "function": {"name": "x"}}, 5], BAD),
    (CHAT, "response_format", [{"type": "json_object"}], OK),
    (CHAT, "response_format", [{"type": "json_schema"}, {"type": "xml"}, {}, {"type": 5}, "json"], BAD),
    (CHAT, "structured_outputs", [{"regex": "(a+)+b"}, {"choice": ["a"] * 1000}], OK),
    (CHAT, "structured_outputs", [{"regex": "(a{999}){999}"}, {"json": {"$ref": "#"}}, {"json": "[" * 60_000}], BAD),
    (CHAT, "structured_outputs", [{"choice": ["a"] * 10_000}, {"json": {"enum": ["a" * 99_999]}}, 5, [], "x"], BAD),
    (CHAT, "guided_json", ["{", {"type": 5}, {"$ref": "http://169.254.169.254/"}, {"$ref": "file:///x"}, 5, []], BAD),
    (CHAT, "guided_regex", ["[", "(?=a)", r"(a)\1", "(" * 30_000, "a" * 70_000, ""], BAD),
    (CHAT, "guided_grammar", ["start: start", "(" * 60_000, "root ::= " + "(" * 10_000, "\x00", ""], BAD),
    (CHAT, "top_logprobs", [1, -1, 21, 2**64], BAD),
    (CHAT, "max_completion_tokens", [0, -1, 2**64, "x"], BAD),
]
CASES = [(path, name, value, statuses) for path, name, values, statuses in FIELDS for value in values]


def body_for(path: str) -> dict[str, Any]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 2}
    return {"prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize(
    "path, name, value, statuses", CASES, ids=[f"{row[1]}={str(row[2])[:24]!r}-{i}" for i, row in enumerate(CASES)]
)
def test_parameter(server: RunningServer, path: str, name: str, value: Any, statuses: tuple[int, ...]) -> None:
    body = body_for(path) | {name: value}
    started = time.monotonic()
    reply = server.ask("POST", path, body)
    assert time.monotonic() - started < ANSWER_WITHIN_S
    check(reply, statuses, name)
    if reply.status != 200 and name not in ("stream", "stream_options"):
        check(server.ask("POST", path, body | {"stream": True}), statuses, name)


WRONG_VALUES: tuple[Any, ...] = ("text", 7, 1.5, True, [], {}, [[]], [{}], {"a": {}})


def accepts(kind: Any, value: Any) -> bool:
    """Whether JSON of this value fits the annotation, as strict decoding sees it."""
    if kind is Any:
        return True
    if get_origin(kind) is None:
        if isinstance(kind, type) and hasattr(kind, "__struct_fields__"):
            return isinstance(value, dict)
        return type(value) is kind or (kind is float and type(value) is int)
    if get_origin(kind) in (list, dict):
        return isinstance(value, get_origin(kind))
    return any(accepts(option, value) for option in get_args(kind))


@pytest.mark.parametrize("path, kind", [(COMPLETIONS, CompletionRequest), (CHAT, ChatRequest)])
def test_wrong_type_of_every_field_is_named(server: RunningServer, path: str, kind: type) -> None:
    async def work() -> None:
        async with aiohttp.ClientSession() as session:
            for name, hint in get_type_hints(kind).items():
                for value in WRONG_VALUES:
                    if not accepts(hint, value):
                        reply = await ask(session, "POST", server.url + path, body_for(path) | {name: value})
                        check(reply, BAD, name)

    asyncio.run(work())


RAW: list[tuple[str, bytes]] = [
    ("noise", bytes(range(1, 256)) * 16 + b"\r\n\r\n"),
    ("http2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("header of 1 MB", b"GET /live HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    ("path of 1 MB", b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("negative length", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"),
    ("length with underscore", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1_0\r\n\r\n0123456789"),
    ("two lengths", b"POST /live HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456"),
    ("chunk size zz", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ("control byte in header", b"GET /live HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\x00b\r\n\r\n"),
    ("tls", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(100)),
    ("no host", b"GET /live HTTP/1.1\r\n\r\n"),
    ("line feeds", b"GET /live HTTP/1.1\nHost: a\n\n"),
    ("unknown method", b"SMASH /live HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("port that cannot be", b"GET http://a:99999/live HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("length and chunks", b"POST /live HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("unknown expectation", b"GET /live HTTP/1.1\r\nHost: a\r\nExpect: miracles\r\nConnection: close\r\n\r\n"),
    ("unknown expectation elsewhere", b"GET /x HTTP/1.1\r\nHost: a\r\nExpect: 1\r\nConnection: close\r\n\r\n"),
]


async def raw(server: RunningServer, data: bytes) -> bytes:
    """Everything the server answers until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""  # the server closed before it had read everything
    finally:
        writer.close()


@pytest.mark.parametrize("name, data", RAW, ids=[row[0] for row in RAW])
def test_raw_bytes_end_in_an_error_object_or_a_closed_connection(
    server: RunningServer, name: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = asyncio.run(raw(server, data))
    assert not [record for record in caplog.records if record.exc_info], "the log shows a stack for a client's fault"
    if not answer and len(data) > 500_000:  # reset while it was still sending
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] in (b"400", b"413", b"417", b"431"), answer[:200]
    assert b"X-Request-Id: " in head and b"aiohttp" not in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "miracle"])
def test_compressed_bodies_are_refused_before_they_grow(server: RunningServer, encoding: str) -> None:
    body = gzip.compress(b'{"prompt": "' + b"a" * 100_000_000 + b'"}')
    started = time.monotonic()
    reply = server.ask("POST", COMPLETIONS, body, headers={"Content-Encoding": encoding})
    assert time.monotonic() - started < ANSWER_WITHIN_S
    check(reply, (415,))


@pytest.mark.parametrize("data", [b"", b"GET /live HT", b"GET /live HTTP/1.1\r\nHost: a\r\n\r\nGET"])
def test_connection_that_falls_silent_is_closed(data: bytes) -> None:
    with running_server(limits=Limits(keepalive_timeout_s=0.1)) as quick:
        answer = asyncio.run(raw(quick, data))
        assert answer.count(b"HTTP/1.1 200") == data.count(b"\r\n\r\n")


def test_body_that_never_comes_ends_in_a_408(server: RunningServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
    answer = asyncio.run(raw(server, head + b"Connection: close\r\n\r\n{"))
    assert answer.split(b" ")[1] == b"408" and b"X-Request-Id" in answer


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    one = b"GET /live HTTP/1.1\r\nHost: a\r\nX-Request-Id: r%d\r\n%s\r\n"
    data = b"".join(one % (i, b"Connection: close\r\n" if i == 19 else b"") for i in range(20))
    answer = asyncio.run(raw(server, data))
    ids = [line.split(b": ")[1] for line in answer.split(b"\r\n") if line.lower().startswith(b"x-request-id")]
    assert ids == [b"r%d" % i for i in range(20)]


@pytest.mark.parametrize(
    "path",
    """/../../etc/passwd /v1/%2e%2e/x //v1/models /V1/models /v1/models/ /invocations /pause /collective_rpc
    /update_weights /shutdown /abort_requests /flush_cache /slots /debug /docs /reset_prefix_cache
    /admin/drain""".split(),
)
def test_paths_that_are_not_ours_are_404(server: RunningServer, path: str) -> None:
    for method in ("GET", "POST"):
        answer = asyncio.run(raw(server, f"{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()))
        assert answer.split(b" ")[1] in (b"404", b"405"), answer[:100]
