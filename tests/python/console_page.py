"""A page of the console in a browser, and a null model that is slow enough to be looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Locator, Page, Route, expect

from fastllm import _core
from fastllm.async_llm import AsyncLLM
from fastllm.client import EngineClient
from fastllm.config import ModelConfig
from fastllm.engine_args import EngineArgs
from fastllm.tokenizer import byte_tokenizer
from server_fixtures import CONTEXT, RunningServer

STEP_US = 2000  # about 500 tokens a second, and no end: the model has no end token
TIMEOUT = 10_000  # milliseconds


def load_endless() -> AsyncLLM:
    """The null model, slow enough to be looked at; an answer ends at its token limit or when it is stopped."""
    args = EngineArgs("null", max_model_len=CONTEXT, num_gpu_blocks_override=4096, check_invariants=True)
    tokenizer = byte_tokenizer()
    vocab = tokenizer.vocab_size
    core = _core.Engine.create_null(args.to_core(CONTEXT, vocab), vocab=vocab, max_len=CONTEXT, step_us=STEP_US)
    config = ModelConfig("null", ["null"], CONTEXT, vocab, [], core.config.dtype, family="null")
    return AsyncLLM(EngineClient(core, tokenizer, config))


@contextmanager
def serving(
    *, loaded: bool = True, load: Callable[[], AsyncLLM] = load_endless, **state: Any
) -> Iterator[RunningServer]:
    server = RunningServer(load, log_requests=False, **state)
    try:
        if loaded:
            server.load()
        yield server
    finally:
        server.close()


class Tab:
    """A page of its own, and what must not happen in any of them."""

    def __init__(self, browser: Browser, server: RunningServer, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.strangers: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.context.on("request", lambda request: self._on_request(request.url, server.url))
        self.page.goto(server.url + "/")

    def _on_console(self, message: Any) -> None:
        # The browser's own line about an answer that is no 2xx; the tests look at what the page makes of it.
        if not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def _on_request(self, url: str, own: str) -> None:
        if not url.startswith(own):
            self.strangers.append(url)

    def close(self) -> None:
        self.context.close()
        assert not self.complaints and not self.strangers


def say(page: Page, text: str, *, max_tokens: int | None = None) -> None:
    expect(page.locator("#status-text")).to_have_text("Ready")
    page.get_by_label("Max tokens").fill("" if max_tokens is None else str(max_tokens))
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator("article.assistant")


def script_answers(page: Page, *bodies: str | dict[str, Any], status: int = 200, headers: Any = None) -> list[Any]:
    """Answers chat requests of this page with `bodies` in turn, a string being a whole stream. Returns the requests."""
    requests: list[Any] = []

    def answer(route: Route) -> None:
        body = bodies[min(len(requests), len(bodies) - 1)]
        requests.append(route.request.post_data_json)
        kind = "text/event-stream" if isinstance(body, str) else "application/json"
        text = body if isinstance(body, str) else json.dumps(body)
        route.fulfill(status=status, body=text, headers={"Content-Type": kind, **(headers or {})})

    page.route("**/v1/chat/completions", answer)
    return requests


def stream(*parts: str, field: str = "content", done: bool = True) -> str:
    chunks = [{"choices": [{"index": 0, "delta": {field: part}}]} for part in parts]
    usage = {"prompt_tokens": 7, "completion_tokens": len(parts), "total_tokens": 7 + len(parts)}
    last = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks + (last if done else []))
    return text + ("data: [DONE]\n\n" if done else "")


# Every visible text with the colours it really has: [text, contrast], worst first.
CONTRASTS = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => {
    const alpha = top[3] ?? 1;
    return [0, 1, 2].map((i) => top[i] * alpha + below[i] * (1 - alpha));
  };
  const background = (node) => {
    const own = parse(getComputedStyle(node).backgroundColor);
    const alpha = own[3] ?? 1;
    if (alpha === 1 || !node.parentElement) return over(own, [255, 255, 255]);
    return over(own, background(node.parentElement));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (text, node, color) => {
    const below = background(node);
    const [high, low] = [luminance(over(parse(color), below)), luminance(below)].sort((a, b) => b - a);
    return [text.trim().slice(0, 40), (high + 0.05) / (low + 0.05)];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("script, noscript")) continue;
    found.push(contrast(walker.currentNode.data, node, getComputedStyle(node).color));
  }
  for (const field of document.querySelectorAll("input, textarea, select")) {
    found.push(contrast(field.id, field, getComputedStyle(field).color));
    found.push(contrast(`${field.id} placeholder`, field, getComputedStyle(field, "::placeholder").color));
  }
  return found.sort((a, b) => a[1] - b[1]);
}"""
