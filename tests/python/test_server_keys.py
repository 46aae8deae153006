"""API keys from a file: tiers, rates, models, expiry, reload; and what one key may learn of another."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fastllm.cli import main
from fastllm.server.app import _reload_keys
from fastllm.server.key_file import read_key_file
from server_fixtures import CONTEXT, RunningServer, ask, running_server

COMPLETIONS = "/v1/completions"


def entry(name: str, key: str, **terms: Any) -> dict[str, Any]:
    return {"name": name, "hash": "sha256:" + hashlib.sha256(key.encode()).hexdigest(), **terms}


def key_file(folder: Path, *keys: dict[str, Any], **tiers: dict[str, Any]) -> Path:
    path = folder / "keys.json"
    path.write_text(json.dumps({"keys": list(keys), "tiers": tiers}))
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def complete(server: RunningServer, key: str, **fields: Any) -> Any:
    return server.ask("POST", COMPLETIONS, {"prompt": "Hello", "max_tokens": 2, **fields}, headers=bearer(key))


def test_key_takes_its_tiers_terms_and_its_own_before_them(tmp_path: Path) -> None:
    gold = {"requests_per_minute": 10, "tokens_per_minute": 1000, "concurrent": 3, "weight": 4, "models": ["m"]}
    path = key_file(
        tmp_path,
        entry("a", "k1", tier="gold", requests_per_minute=20, expires="2031-01-02T03:04:05Z"),
        entry("b", "k2"),
        gold=gold,
    )
    a, b = read_key_file(path)
    assert (a.allowance.requests_per_minute, a.allowance.tokens_per_minute, a.allowance.weight) == (20, 1000, 4.0)
    assert a.allowance.models == {"m"} and a.allowance.expires == 1925089445.0 and a.allowance.tier == "gold"
    assert b.allowance.requests_per_minute is None and b.allowance.models is None and b.allowance.weight == 1.0


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not usable"),
        ("[]", "not usable"),
        ('{"keys": [{"name": "a", "hash": "abc"}]}', "sha256"),
        ('{"keys": [{"name": "a", "hash": "ZERO", "tier": "x"}]}', "tier 'x'"),
        ('{"keys": [{"name": "a", "hash": "ZERO", "rpm": 5}]}', "rpm"),
        ('{"keys": [{"name": "a", "hash": "ZERO", "concurrent": -1}]}', "concurrent"),
        ('{"keys": [{"name": "a", "hash": "ZERO", "expires": "soon"}]}', "expires"),
        ('{"keys": [{"name": "a", "hash": "ZERO"}, {"name": "a", "hash": "ONE"}]}', "same name"),
        ('{"keys": [{"name": "a", "hash": "ZERO"}, {"name": "b", "hash": "ZERO"}]}', "same hash"),
    ],
)
def test_unusable_file_is_refused_with_its_reason(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text.replace("ZERO", "0" * 64).replace("ONE", "1" * 64))
    with pytest.raises(ValueError, match=says) as error:
        read_key_file(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_key_file(tmp_path / "none")


def test_each_key_has_its_limits_models_and_headers(tmp_path: Path) -> None:
    path = key_file(
        tmp_path,
        entry("slow", "k-slow", requests_per_minute=2),
        entry("short", "k-short", tokens_per_minute=20),
        entry("other", "k-other", models=["other-model"]),
        entry("old", "k-old", expires="2001-01-01"),
        entry("free", "k-free"),
    )
    with running_server(api_key_file=path) as server:
        first, second, third = (complete(server, "k-slow") for _ in range(3))
        assert (first.status, second.status, third.status) == (200, 200, 429)
        assert second.headers["x-ratelimit-remaining-requests"] == "0"
        assert third.error["code"] == "requests_per_minute" and int(third.headers["Retry-After"]) in range(1, 31)
        assert server.ask("GET", "/v1/models", headers=bearer("k-slow")).status == 200  # not counted

        assert complete(server, "k-short", max_tokens=40, ignore_eos=True).status == 200  # 45 tokens of 20
        refused = complete(server, "k-short")
        assert refused.status == 429 and refused.error["code"] == "tokens_per_minute"
        assert refused.error["type"] == "rate_limit_error"
        assert refused.headers["x-ratelimit-limit-tokens"] == "20"
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"

        assert complete(server, "k-other", model="null").error["code"] == "model_not_allowed"
        assert complete(server, "k-other").status == 403
        assert server.ask("GET", "/v1/models", headers=bearer("k-other")).json["data"] == []
        assert complete(server, "k-old").error["code"] == "expired_api_key"
        free = complete(server, "k-free")
        assert free.status == 200 and not any(name.lower().startswith("x-ratelimit") for name in free.headers)
        assert server.ask("GET", "/v1/models").status == 401
        for client in server.state.keys._clients.values():
            assert client.active == 0


def test_concurrent_requests_of_one_key_are_bounded(tmp_path: Path) -> None:
    path = key_file(tmp_path, entry("a", "k", concurrent=1), entry("b", "k2"))
    with running_server(api_key_file=path) as server:

        async def work() -> None:
            long = {"prompt": "x", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}
            async with aiohttp.ClientSession() as session:
                url = server.url + COMPLETIONS
                async with session.post(url, json=long, headers=bearer("k")) as held:
                    assert held.status == 200
                    refused = await ask(session, "POST", url, {"prompt": "x"}, headers=bearer("k"))
                    assert refused.status == 429 and refused.error["code"] == "concurrent_requests"
                    assert (await ask(session, "POST", url, {"prompt": "x"}, headers=bearer("k2"))).status == 200
                    held.close()

        asyncio.run(work())
        server.wait_idle()
        assert complete(server, "k").status == 200


def test_cached_prompts_are_not_shared_between_keys_unless_told() -> None:
    def cached(server: RunningServer, key: str) -> int:
        reply = complete(server, key, prompt="x" * 200)
        return int(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    with running_server(api_keys=["a", "b"]) as server:
        assert cached(server, "a") == 0 and cached(server, "a") > 0 and cached(server, "b") == 0
    with running_server(api_keys=["a", "b"], share_prefix_cache=True) as server:
        assert cached(server, "a") == 0 and cached(server, "b") > 0


def test_reload_takes_a_good_file_and_keeps_the_keys_when_it_is_bad(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = key_file(tmp_path, entry("a", "secret-a"))
    with running_server(api_key_file=path) as server, caplog.at_level(logging.INFO):

        def reload() -> None:
            async def work() -> None:
                _reload_keys(server.state)

            server.run(work())

        key_file(tmp_path, entry("b", "secret-b"))
        assert complete(server, "secret-b").status == 401
        reload()
        assert complete(server, "secret-b").status == 200 and complete(server, "secret-a").status == 401
        path.write_text("nonsense")
        reload()
        assert complete(server, "secret-b").status == 200
        assert any(str(path) in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records)
        assert "secret" not in caplog.text
    assert hasattr(signal, "SIGHUP")


def test_command_makes_a_key_that_its_entry_lets_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["key", "alice", "--tier", "gold"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    key = err.strip().rsplit(" ", 1)[1]
    assert made == entry("alice", key, tier="gold") and key.startswith("sk-") and len(key) > 40
    monkeypatch.setattr("sys.stdin", io.StringIO("my-key\n"))
    assert main(["key", "bob", "--existing"]) == 0
    assert json.loads(capsys.readouterr().out) == entry("bob", "my-key")
