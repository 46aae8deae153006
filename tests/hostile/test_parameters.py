"""Parameters: rows C of the catalogue but for tools and schemas (test_constraints.py), each 20 times."""

from __future__ import annotations

import json
import time
from itertools import groupby
from typing import Any

import pytest
from harness import ANSWER_WITHIN_S, CHAT, COMPLETIONS, REPEATS, Target, check, post
from test_hostile_requests import CASES, body_for

CONTEXT = 8192  # tokens, of the target
OK, BAD = (200,), (400,)
ROW_OF = {
    **{"model": "C1", "prompt": "C4", "max_tokens": "C10", "n": "C13", "best_of": "C14", "temperature": "C16"},
    **{"top_p": "C17", "min_p": "C19", "presence_penalty": "C20", "frequency_penalty": "C20", "seed": "C23"},
    **{"repetition_penalty": "C20", "logprobs": "C25", "prompt_logprobs": "C25", "stop": "C26", "logit_bias": "C29"},
    **{"stop_token_ids": "C28", "stream": "C32", "stream_options": "C32", "priority": "C34", "suffix": "C61"},
}
GROUPS = [
    (f"{ROW_OF.get(name, 'C')} {path} {name} {'/'.join(map(str, statuses))}", list(rows))
    for (path, name, statuses), rows in groupby(CASES, key=lambda row: (row[0], row[1], row[3]))
]
# Longer ones are sent 3 times: what they cost is the client's sending.
_LONG_BYTES = 100_000


@pytest.mark.parametrize("rows", [rows for _, rows in GROUPS], ids=[name for name, _ in GROUPS])
def test_field(target: Target, rows: list[tuple[str, str, Any, tuple[int, ...]]]) -> None:
    with target.undisturbed():
        for path, name, value, statuses in rows:
            body = json.dumps(body_for(path) | {name: value}).encode()
            for _ in range(REPEATS if len(body) < _LONG_BYTES else 3):
                check(target.ask("POST", path, body), statuses, name)


def message(role: str = "user", content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 2, **fields}


def complete(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", "max_tokens": 2, **fields}


def ids(count: int) -> list[int]:
    return [7] * count


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
EMPTY: tuple[Any, ...] = ([], [[]], [""], "", None, [[], [1]])
NO_CONTENT: tuple[Any, ...] = (None, 5, {}, [{}], [5], [{"text": "x"}])
ANY = (200, 400)
ROWS: list[tuple[str, str, Any, tuple[int, ...], str | None]] = [
    *((f"C1 model {m[:20]!r}", COMPLETIONS, complete(model=m), (400, 404), "model") for m in ("", "x" * 1_000_000)),
    *((f"C1 model {m}", COMPLETIONS, complete(model=m), (404,), "model") for m in ("../../etc/passwd", "file:///x")),
    ("C2 no prompt", COMPLETIONS, {"max_tokens": 1}, BAD, "prompt"),
    *((f"C2 prompt {p!r}", COMPLETIONS, complete(prompt=p), BAD, "prompt") for p in EMPTY),
    *(
        (f"C4 token {t!r}", COMPLETIONS, complete(prompt=[5, t]), BAD, "prompt")
        for t in (-1, 100_000, 2**31, 2**63, 2**64, 1.5, "1", True, None)
    ),
    *((f"C5 {p!r}", COMPLETIONS, complete(prompt=p), BAD, "prompt") for p in (["a", 1], [1, [2]], [[[1]]], [[1, "a"]])),
    ("C7 prompt as long as the context", COMPLETIONS, complete(prompt=ids(CONTEXT), max_tokens=1), BAD, "prompt"),
    ("C7 one token shorter", COMPLETIONS, complete(prompt=ids(CONTEXT - 1), max_tokens=1), OK, None),
    *(
        (f"C8 {unit!r}", COMPLETIONS, complete(prompt=unit * (1_500_000 // len(unit.encode()))), BAD, "prompt")
        for unit in ("a", " ", "\U0001f600", "<|im_start|>", "\u6f22", "aA")
    ),
    ("C10 more than the context, completions", COMPLETIONS, complete(max_tokens=CONTEXT), BAD, "max_tokens"),
    ("C10 more than the context, chat", CHAT, chat(message(), max_tokens=2 * CONTEXT), ANY, None),
    ("C11 two limits", CHAT, chat(message(), max_completion_tokens=3), BAD, "max_completion_tokens"),
    ("C13 n times prompts", COMPLETIONS, complete(prompt=["x"] * 64, n=64), BAD, "n"),
    ("C14 best_of and stream", COMPLETIONS, complete(best_of=10**9, stream=True), BAD, None),
    ("C25 top_logprobs alone", CHAT, chat(message(), top_logprobs=2), BAD, "top_logprobs"),
    (
        "C25 echo, logprobs, a whole context",
        COMPLETIONS,
        complete(prompt=ids(4000), echo=True, logprobs=1),
        ANY,
        None,
    ),
    ("C29 300001 biases", COMPLETIONS, complete(logit_bias={str(i): 1 for i in range(150_000)}), BAD, "logit_bias"),
    ("C31 everything forbidden", COMPLETIONS, complete(logit_bias={str(i): -100 for i in range(258)}), OK, None),
    (
        "C31 what the choice allows is forbidden",
        COMPLETIONS,
        complete(guided_choice=["a"], logit_bias={str(i): -100 for i in range(258)}),
        OK,
        None,
    ),
    ("C49 template in the request", CHAT, chat(message(), chat_template="{{ 7*7 }}"), BAD, "chat_template"),
    *(
        (f"C50 {k}", CHAT, chat(message(), chat_template_kwargs=k), BAD, "chat_template_kwargs")
        for k in ({"tokenize": True}, {"messages": []}, {"tools": [1]})
    ),
    ("C50 unknown kwarg", CHAT, chat(message(), chat_template_kwargs={"x": {"y": [1]}}), ANY, None),
    ("C50 large kwarg", CHAT, chat(message(), chat_template_kwargs={"x": "y" * 1_000_000}), ANY, None),
    ("C52 unknown role", CHAT, chat(message("king")), BAD, "messages"),
    ("C52 no role", CHAT, {"messages": [{"content": "x"}]}, BAD, "messages"),
    ("C52 system in the middle", CHAT, chat(message(), message("system"), message()), ANY, None),
    ("C52 two systems", CHAT, chat(message("system"), message("system"), message()), ANY, None),
    ("C52 assistant first", CHAT, chat(message("assistant"), message()), ANY, None),
    ("C52 assistant last", CHAT, chat(message(), message("assistant")), ANY, None),
    *((f"C53 content {c!r}", CHAT, chat(message(content=c)), BAD, "messages") for c in NO_CONTENT),
    *(
        (f"C55 {text[:20]}", CHAT, chat(message(content=text)), OK, None)
        for text in ("{{ 7*7 }}", "{% for x in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}")
    ),
    (
        "C56 keys a template may read",
        CHAT,
        chat(message(name="{{ 7*7 }}", __class__="x", extra={"a": 1})),
        ANY,
        None,
    ),
    ("C58 placeholders of other models", CHAT, chat(message(content="<image><|vision_start|>[IMG]" * 50)), OK, None),
    ("C59 answer of no tool", CHAT, chat(message("tool", tool_call_id="none")), ANY, None),
    (
        "C59 arguments that are no JSON",
        CHAT,
        chat(message(), message("assistant", None, tool_calls=[CALL]), message("tool", tool_call_id="other")),
        ANY,
        None,
    ),
    ("C61 echo in a chat", CHAT, chat(message(), echo=True), BAD, "echo"),
    (
        "C62 no end but the context",
        COMPLETIONS,
        complete(prompt=ids(CONTEXT - 200), max_tokens=200, ignore_eos=True),
        OK,
        None,
    ),
    *(
        (f"C65 {name}", COMPLETIONS, complete(**{name: value}), ANY, None)
        for name, value in (
            ("prompt_embeds", "QUJD"),
            ("kv_transfer_params", {"do_remote_prefill": True}),
            ("routed_experts", [-1]),
            ("num_cached_tokens", -5),
            ("lora_request", {"path": "/etc"}),
        )
    ),
    *((f"C70 timeout {t!r}", COMPLETIONS, complete(timeout=t), ANY, None) for t in (0, -1, 1e9)),
]


@pytest.mark.parametrize("name, path, body, statuses, param", ROWS, ids=[row[0] for row in ROWS])
def test_row(target: Target, name: str, path: str, body: Any, statuses: tuple[int, ...], param: str | None) -> None:
    data = json.dumps(body, ensure_ascii=False).encode()
    with target.undisturbed():
        for _ in range(REPEATS if len(data) < _LONG_BYTES else 3):
            start = time.monotonic()
            answer = target.ask("POST", path, data)
            assert time.monotonic() - start < 2 * ANSWER_WITHIN_S
            check(answer, statuses, param)
            if name.startswith("C55"):  # the null model has a token for every byte
                tokens = json.loads(answer.body)["usage"]["prompt_tokens"]
                assert tokens > len(body["messages"][0]["content"]), "the text was rendered as a template"


def test_c67_same_seed_same_answer_beside_load(target: Target) -> None:
    body = complete(max_tokens=30, temperature=1, seed=7, ignore_eos=True, return_token_ids=True)
    with target.undisturbed():
        answers = [json.loads(target.ask("POST", COMPLETIONS, body).body)["choices"][0] for _ in range(50)]
    assert len({tuple(choice["token_ids"]) for choice in answers}) == 1


def test_c68_prefixes_are_found_within_a_salt_only(target: Target) -> None:
    def cached(salt: str, number: int) -> int:
        body = complete(prompt="You are of help. " * 20 + str(number), cache_salt=salt)
        usage = json.loads(target.ask("POST", COMPLETIONS, body).body)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    with target.undisturbed():
        for number in range(REPEATS):
            assert (cached(f"a{number}", 0), cached(f"b{number}", 0)) == (0, 0)
            assert cached(f"a{number}", 1) > 0


@pytest.mark.parametrize("path", "/v1/embeddings /embeddings /v1/rerank /v1/score /pooling /classify".split())
def test_c64_route_that_does_not_exist(target: Target, path: str) -> None:
    """There are no embeddings yet; whatever is sent gets the 404 of every unknown path."""
    inputs: tuple[Any, ...] = ("x", "", [], ["x"] * 10_000, [-1, 2**40], None, 5)
    rows: list[Any] = [{"model": "null", "input": value} for value in inputs]
    rows += [{"input": "x", "dimensions": value} for value in (0, 10**9, -1, "x")]
    rows += [{"input": "x", "encoding_format": "x"}, [], b"{", b"\xff"]
    with target.undisturbed():
        for row in rows:
            for _ in range(3):
                check(target.ask("POST", path, row), (404,))


def test_c71_the_same_request_again_after_a_disconnect(target: Target) -> None:
    body = json.dumps(complete(max_tokens=40, seed=5, temperature=1, ignore_eos=True, return_token_ids=True)).encode()
    request = post(
        COMPLETIONS, body, "Content-Type: application/json", f"Content-Length: {len(body)}", "X-Request-Id: r"
    )
    with target.undisturbed():
        answers = []
        for _ in range(REPEATS):
            with target.connect() as sock:
                sock.sendall(request)
            answers.append(json.loads(target.raw(request).body)["choices"][0]["token_ids"])
    assert all(ids == answers[0] and len(ids) == 40 for ids in answers)


def test_c70_request_header_that_asks_for_a_timeout_changes_nothing(target: Target) -> None:
    with target.undisturbed():
        for value in ("0", "-1", "1e9", "NaN"):
            for _ in range(REPEATS):
                check(target.ask("POST", COMPLETIONS, complete(), {"X-Request-Timeout": value}), (200, 400))
