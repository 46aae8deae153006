"""The console as files: what is sent, under which headers, and what is not in it. See test_console_browser.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastllm.server.console.routes as routes
from fastllm.async_llm import AsyncLLM
from fastllm.engine_args import EngineArgs
from fastllm.server.app import create_app
from fastllm.server.args import make_parser
from fastllm.server.state import ServerState
from server_fixtures import RunningServer, load_null, running_server
from tiny_models import ENGINE

FOLDER = Path(routes.__file__).parent
FILES = {name: (FOLDER / name).read_text() for name in routes.PATHS.values()}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Locked and still loading: the console needs neither a key nor a model."""
    running = RunningServer(load_null(), log_requests=False, api_keys=["secret"])
    yield running
    running.close()


@pytest.mark.parametrize("path", routes.PATHS)
def test_every_file_is_sent_with_strict_headers(server: RunningServer, path: str) -> None:
    reply = server.ask("GET", path)
    assert reply.status == 200 and reply.body == FILES[routes.PATHS[path]].encode()
    suffix = Path(routes.PATHS[path]).suffix
    media = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}[suffix]
    assert reply.headers["Content-Type"] == f"{media}; charset=utf-8"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Cache-Control"] == "no-cache"
    policy = dict(part.split(" ", 1) for part in reply.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    sources = {name: value for name, value in policy.items() if name.endswith("-src") and name != "default-src"}
    assert set(sources.values()) == {"'self'"}, "nothing inline, nothing from elsewhere"

    head = server.ask("HEAD", path)
    assert head.status == 200 and head.body == b"" and head.headers["Content-Length"] == str(len(reply.body))
    for known in (reply.headers["ETag"], "W/" + reply.headers["ETag"], f'"other", {reply.headers["ETag"]}', "*"):
        again = server.ask("GET", path, headers={"If-None-Match": known})
        assert again.status == 304 and again.body == b"" and again.headers["ETag"] == reply.headers["ETag"]
    assert server.ask("GET", path, headers={"If-None-Match": '"other"'}).status == 200


def test_only_get_only_these_files_and_nothing_else_is_open(server: RunningServer) -> None:
    refused = server.ask("POST", "/", {})
    assert refused.status == 405 and "GET" in refused.headers["Allow"] and refused.error["code"] == "method_not_allowed"
    paths = ("/console/", "/console/routes.py", "/console/../auth.py", "/console/%2e%2e/auth.py", "/index.html")
    for path in paths:
        assert server.ask("GET", path).status == 401, path
        assert server.ask("GET", path, headers={"Authorization": "Bearer secret"}).status == 404, path


def test_a_prefix_and_the_flag_that_turns_it_off() -> None:
    def paths(**options: object) -> set[str]:
        app = create_app(ServerState(), "/llm/", **options)  # type: ignore[arg-type]
        return {resource.canonical for resource in app.router.resources()}

    assert paths() >= {prefix + path for prefix in ("", "/llm") for path in routes.PATHS}
    assert not paths(console=False) & {prefix + path for prefix in ("", "/llm") for path in routes.PATHS}
    parser = make_parser("fastllm serve", positional_model=False)
    assert parser.parse_args([]).console is True
    assert parser.parse_args(["--disable-console"]).console is False
    with running_server(api_keys=["secret"], root_path="/llm") as server:
        for open_path in ("/llm/", "/llm/console/console.js", "/llm/live", "/live"):
            assert server.ask("GET", open_path).status == 200, open_path
        for closed_path in ("/llm/stats", "/llm/v1/models", "/llm//", "/llm/llm/"):
            assert server.ask("GET", closed_path).status == 401, closed_path


def test_stats_tell_the_phase_while_the_model_loads(server: RunningServer) -> None:
    def stats() -> Any:
        return server.ask("GET", "/stats", headers={"Authorization": "Bearer secret"}).json

    assert stats()["phase"] == "loading" and stats()["engine"] is None and stats()["uptime_s"] >= 0
    assert stats()["load_progress"] is None
    server.state.on_load_progress(1, 4)
    assert stats()["load_progress"] == 0.25


def test_loading_reports_bytes_up_to_the_last(llama: Path) -> None:
    reports: list[tuple[int, int]] = []
    engine = EngineArgs(str(llama), **ENGINE)
    llm = AsyncLLM.from_engine_args(engine, on_progress=lambda done, total: reports.append((done, total)))
    llm.shutdown()
    done, total = zip(*reports, strict=True)
    assert sorted(done) == list(done) and done[-1] == total[-1] > 0 and len(set(total)) == 1


def test_every_asset_is_listed_and_referenced() -> None:
    present = {path.name for path in FOLDER.iterdir() if path.suffix in routes._TYPES}
    assert present == set(FILES)
    for name in present - {"index.html"}:
        others = "".join(text for other, text in FILES.items() if other != name)
        assert f"/{name}" in others, f"nothing uses {name}"


def test_assets_name_no_other_host_and_nothing_inline() -> None:
    for name, text in FILES.items():
        urls = re.findall(r"""\b(?:https?|wss?)://[^\s"'<>)]*|["'(=]//[^\s"'<>)]+""", text)
        assert set(urls) <= {SVG_NAMESPACE}, name
        assert len(text.splitlines()) < 400, f"{name} is too long to be read"
    html = FILES["index.html"]
    assert not re.search(r"<[^>]*\s(on\w+|style)\s*=", html) and "<style" not in html
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", html))
    code = "".join(text for name, text in FILES.items() if name.endswith(".js"))
    parses_text = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc"
    assert not re.search(parses_text, code)
    assert "localStorage" not in code and "document.cookie" not in code


def test_every_field_has_a_label() -> None:
    html = FILES["index.html"]
    labels = set(re.findall(r'<label for="([^"]+)"', html))
    fields = set(re.findall(r'<(?:input|textarea|select) id="([^"]+)"', html))
    assert fields and labels == fields
