"""The console in a real browser: Debian's Chromium, headless, driven by Playwright, against the null model."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from server_fixtures import RunningServer, wait_until

pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from console_page import CONTRASTS, TIMEOUT, Tab, answers, load_endless, say, script_answers, serving, stream

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        # No name resolves: whatever the page or the browser might want from elsewhere fails and is seen.
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        running = playwright.chromium.launch(executable_path=BROWSER, args=[rules])
        yield running
        running.close()


@pytest.fixture
def open_tab(browser: Browser, server: RunningServer) -> Iterator[Callable[..., Page]]:
    tabs: list[Tab] = []

    def open_one(where: RunningServer = server, **options: Any) -> Page:
        tabs.append(Tab(browser, where, **options))
        return tabs[-1].page

    yield open_one
    for tab in tabs:
        tab.close()


@pytest.fixture
def page(open_tab: Callable[..., Page]) -> Page:
    return open_tab()


def test_an_answer_streams_in_and_says_its_count_and_speed(page: Page) -> None:
    say(page, "Hello", max_tokens=800)
    prose = answers(page).locator(".prose")
    expect(prose).not_to_be_empty()
    early = len(prose.text_content())
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert len(prose.text_content()) > early > 0
    expect(answers(page).locator(".meta")).to_have_text(
        re.compile(r"^800 tokens · [\d,.]+ tokens/s · first after [\d.]+ (ms|s) · \d+ prompt tokens.* · cut off")
    )
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#announcer")).to_have_text("Answer ended: 800 tokens, cut off at the token limit")
    # The conversation outlives a reload, in this tab.
    page.reload()
    expect(answers(page).locator(".meta")).to_have_text(re.compile("800 tokens"))
    assert page.evaluate("localStorage.length") == 0 and page.evaluate("document.cookie") == ""


def test_stop_button_and_escape_free_the_server(page: Page, server: RunningServer) -> None:
    for stop in (
        lambda: page.get_by_role("button", name="Stop").click(),
        lambda: page.keyboard.press("Escape"),
    ):
        say(page, "Never end")
        wait_until(lambda: server.state.llm.stats().num_running == 1, 10)
        expect(answers(page).last.locator(".prose")).not_to_be_empty()
        stop()
        expect(answers(page).last.locator(".meta")).to_have_text(re.compile(r"^\d+ tokens? .*stopped by you$"))
        expect(page.get_by_label("Message", exact=True)).to_be_focused()
        server.wait_idle()


def test_gauges_follow_the_load(page: Page, server: RunningServer) -> None:
    def figure(name: str) -> Any:
        return page.locator(f"#gauge-{name} .figure")

    expect(figure("running")).to_have_text("0")
    say(page, "Never end " * 500)
    expect(figure("running")).to_have_text("1")
    expect(figure("kv")).to_have_text(re.compile(r"^[1-9]\d*(\.\d)? %$|^0\.[1-9] %$"))
    expect(figure("rate")).to_have_text(re.compile(r"^[1-9][\d,.]* /s$"))
    expect(figure("first")).to_have_text(re.compile(r"^[\d.]+ (µs|ms|s)$"))
    expect(figure("next")).to_have_text(re.compile(r"^[\d.]+ (µs|ms|s)$"))
    expect(page.locator("#gauge-next .note")).to_have_text(re.compile(r"99 %: [\d.]+ (µs|ms|s)$"))
    for name in ("running", "kv", "rate"):
        expect(page.locator(f"#gauge-{name} path.line-0")).to_have_attribute("d", re.compile(r"^M[\d. ]+(L[\d. ]+)+$"))
    page.keyboard.press("Escape")
    server.wait_idle()
    expect(figure("running")).to_have_text("0")
    expect(figure("kv")).to_have_text("0 %")


def test_a_wrong_key_is_told_and_a_right_one_stays_in_the_tab(open_tab: Callable[..., Page]) -> None:
    with serving(api_keys=["right"]) as locked:
        page = open_tab(locked)
        expect(page.locator("#status-text")).to_have_text("Locked")
        expect(page.locator("#notice")).to_have_text(re.compile("wants an API key"))
        key = page.get_by_label("API key")
        expect(key).to_have_attribute("aria-invalid", "true")
        key.fill("wrong")
        page.get_by_label("Message", exact=True).fill("Hello")
        page.keyboard.press("Control+Enter")
        error = page.get_by_role("alert").filter(has_text="API key")
        expect(error).to_contain_text("The API key is missing or wrong")
        key.fill("spa ce")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.get_by_role("alert").filter(has_text="header")).to_contain_text("an HTTP header cannot carry")
        key.fill("right")
        key.press("Tab")
        expect(page.locator("#status-text")).to_have_text("Ready")
        expect(page.locator("#notice")).to_be_hidden()
        expect(key).to_have_attribute("aria-invalid", "false")
        say(page, "Hello again", max_tokens=5)
        expect(answers(page).last.locator(".meta")).to_have_text(re.compile("^5 tokens"))
        assert page.evaluate("Object.entries(sessionStorage).filter(([, v]) => v.includes('right'))") == [
            ["fastllm.key", "right"]
        ]
        assert page.evaluate("localStorage.length") == 0 and "right" not in page.url
        expect(open_tab(locked).locator("#status-text")).to_have_text("Locked")


HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>\n\n# <b>big</b>\n\n- <svg onload=alert(3)>\n\n"
    "[here](javascript:alert(4)) `<i>` **<u>** https://example.org/?<a href=x>\n\n```html\n<iframe srcdoc=x>\n```\n"
)


def test_what_the_model_says_is_text_whatever_it_is(page: Page) -> None:
    parts = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]
    script_answers(page, stream(*parts, field="reasoning"), stream(*parts))
    say(page, "Think")
    page.get_by_text("Thinking").click()
    expect(page.locator(".thought")).to_have_text(HOSTILE)
    say(page, "<em>me</em> <img src=y onerror=alert(5)>")
    expect(answers(page)).to_have_count(2)
    log = page.get_by_role("log")
    for tag in (
        "<img src=x onerror=alert(1)>",
        "<svg onload=alert(3)>",
        "<iframe srcdoc=x>",
        "<em>me</em>",
        "<a href=x>",
    ):
        expect(log).to_contain_text(tag)
    made = log.locator("article").locator("img, script, svg, iframe, a, b, i, u, em, [onerror], [onload]")
    assert made.count() == 0
    # What comes from elsewhere in the API is treated alike.
    script_answers(page, {"error": {"message": "<img src=z onerror=alert(6)>"}}, status=400)
    say(page, "again")
    expect(page.get_by_role("alert").last).to_contain_text("<img src=z onerror=alert(6)>")


def test_prose_becomes_paragraphs_lists_and_code(page: Page) -> None:
    text = "# Title\nOne *two* **three** `four`\nnext line\n\n1. first\n2. second\n   more\n   - inner\n> said\n\n"
    text += "```python\nif a:\n\n    b *= 1\n```\nEnd, 2 * 3 * 4, snake_case_name"
    script_answers(page, stream(*text))
    say(page, "Hi")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    blocks = answers(page).locator(".prose > *")
    assert blocks.evaluate_all("nodes => nodes.map(n => n.className || n.tagName)") == [
        *("heading", "P", "UL", "BLOCKQUOTE", "code", "P")
    ]
    assert blocks.nth(1).inner_text() == "One two three four\nnext line"
    assert blocks.nth(1).locator("em, strong, code").all_inner_texts() == ["two", "three", "four"]
    items = blocks.nth(2).locator("li").all_inner_texts()
    assert [re.sub(r"\s+", " ", item) for item in items] == ["1. first", "2. second more", "• inner"]
    assert blocks.nth(4).locator("pre").inner_text() == "if a:\n\n    b *= 1"
    assert blocks.nth(5).inner_text() == "End, 2 * 3 * 4, snake_case_name"


FAILURES: list[tuple[Any, int, dict[str, str], str, str]] = [
    ({"error": {"message": "Too many."}}, 429, {"Retry-After": "7"}, "The server is busy", "Too many. Try again in 7 "),
    ({"error": {"message": "Stopping."}}, 503, {}, "The server takes no requests now", "Stopping."),
    ({}, 500, {}, "The server failed", "answered 500 without a reason"),
    (stream("half", done=False), 200, {}, "No connection", "ended before the answer did"),
    (stream("a", done=False) + 'data: {"error": {"message": "Lost."}}\n\n', 200, {}, "The server failed", "Lost."),
]


def test_failures_are_told_in_words(page: Page) -> None:
    for body, status, headers, title, sentence in FAILURES:
        script_answers(page, body, status=status, headers=headers)
        say(page, "Hello")
        expect(page.get_by_role("alert")).to_contain_text(title)
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        requests = script_answers(page, stream("fine"))
        say(page, "And now?")
        expect(answers(page).last.locator(".prose")).to_have_text("fine")
        # An exchange without a word of the model is not shown to it: roles always alternate.
        roles = [message["role"] for message in requests[0]["messages"]]
        assert roles == (["user"] if status != 200 else ["user", "assistant", "user"])
        page.get_by_role("button", name="Clear conversation").click()


def test_settings_reach_the_request_and_empty_ones_do_not(page: Page) -> None:
    requests = script_answers(page, stream("fine"))
    say(page, "Hello")
    expect(answers(page).locator(".prose")).to_have_text("fine")
    plain = {"model": "null", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    assert requests == [plain | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}]
    page.get_by_role("button", name="Clear conversation").click()
    values = {"Temperature": "0.3", "Top p": "0.9", "Top k": "40", "Seed": "-5", "Stop strings": "END\n\\n\\nUser:"}
    for label, value in (values | {"System prompt": "Be brief."}).items():
        page.get_by_label(label).fill(value)
    say(page, "Hello", max_tokens=64)
    expect(answers(page).locator(".prose")).to_have_text("fine")
    wanted = {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "seed": -5, "max_tokens": 64}
    assert {name: requests[1].get(name) for name in wanted} == wanted
    assert requests[1]["stop"] == ["END", "\n\nUser:"]
    assert requests[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.get_by_role("button", name="Reset to defaults").click()
    assert page.get_by_label("Temperature").input_value() == page.get_by_label("System prompt").input_value() == ""


def test_copy_edit_regenerate_and_clear(open_tab: Callable[..., Page]) -> None:
    page = open_tab(permissions=["clipboard-read", "clipboard-write"])
    requests = script_answers(page, stream("one"), stream("two"), stream("three"), stream("```\nfour\n```"))
    say(page, "First")
    expect(answers(page).locator(".prose")).to_have_text("one")
    say(page, "Second")
    expect(answers(page).locator(".prose")).to_have_text(["one", "two"])
    page.get_by_role("button", name="Copy the answer").last.click()
    expect(page.get_by_text("Copied", exact=True).first).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "two"
    page.get_by_role("button", name="Regenerate").last.click()
    expect(answers(page).locator(".prose")).to_have_text(["one", "three"])
    assert requests[2]["messages"] == requests[1]["messages"]
    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_label("Edit your message")
    expect(box).to_be_focused()
    box.press("Escape")
    expect(page.get_by_role("button", name="Edit").first).to_be_focused()
    page.get_by_role("button", name="Edit").first.click()
    box.fill("Changed")
    box.press("Control+Enter")
    expect(answers(page).locator("pre")).to_have_text("four")
    assert requests[3]["messages"] == [{"role": "user", "content": "Changed"}]
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copy code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "four"
    page.unroute("**/v1/chat/completions")
    say(page, "Never end")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Clear conversation").click()
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("article")).to_have_count(0)
    expect(page.get_by_text("Ask null something.")).to_be_visible()


def test_loading_draining_and_gone(open_tab: Callable[..., Page]) -> None:
    gate = threading.Event()

    def load() -> AsyncLLM:
        gate.wait(30)
        return load_endless()

    with serving(loaded=False, load=load) as server:
        loading = threading.Thread(target=server.load)
        loading.start()
        page = open_tab(server)
        expect(page.locator("#status")).to_have_text(re.compile(r"^\s*Loading \d+ s\s*$"))
        expect(page.locator("#notice")).to_contain_text("The model is loading")
        server.state.on_load_progress(3, 8)
        expect(page.locator("#status")).to_have_text(re.compile(r"^\s*Loading 37 %, \d+ s\s*$"))
        page.get_by_label("Message", exact=True).fill("Early")
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("article")).to_have_count(0)
        gate.set()
        loading.join(30)
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        expect(page.get_by_label("Model", exact=True)).to_have_value("null")
        page.keyboard.press("Control+Enter")
        expect(answers(page).locator(".prose")).not_to_be_empty()
        server.state.begin_drain()
        expect(page.locator("#status-text")).to_have_text("Stopping")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        server.wait_idle()
    expect(page.locator("#status-text")).to_have_text("Unreachable")
    expect(page.locator("#gauge-running .figure")).to_have_text("–")


def test_text_has_contrast_in_light_and_dark(page: Page) -> None:
    script_answers(page, stream("# Head\n\nSome `code`, **bold**\n\n> quote\n\n- item\n\n```c\nint x;\n```\n"))
    say(page, "Hello")
    expect(answers(page).locator("pre")).to_have_text("int x;")
    script_answers(page, {"error": {"message": "No."}}, status=400)
    say(page, "Hello")
    expect(page.get_by_role("alert").last).to_contain_text("No.")
    page.evaluate("document.getElementById('notice').hidden = false")
    page.evaluate("document.getElementById('notice').textContent = 'A notice'")
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 50 and any("int x;" in text for text, _ in found)
        assert [(scheme, text, ratio) for text, ratio in found if ratio < 4.5] == []
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_everything_can_be_done_with_the_keyboard(page: Page, server: RunningServer) -> None:
    expect(page.locator("#status-text")).to_have_text("Ready")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("Never end")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("please")
    page.keyboard.press("Control+Enter")
    expect(page.locator("article.user p")).to_have_text("Never end\nplease")
    expect(answers(page).locator(".prose")).not_to_be_empty()
    page.keyboard.press("Escape")
    server.wait_idle()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.locator(".skip").focus()
    seen: list[dict[str, Any]] = []
    for _ in range(30):
        here = page.evaluate(
            """() => {
              const node = document.activeElement;
              const style = getComputedStyle(node);
              const label = node.getAttribute("aria-label") ?? node.labels?.[0]?.textContent ?? node.textContent;
              return { id: node.id, tag: node.tagName, label: label.trim(), ring: style.outlineStyle !== "none" };
            }"""
        )
        if here["tag"] == "BODY" or here in seen:
            break
        seen.append(here)
        page.keyboard.press("Tab")
    names = [stop["id"] or stop["label"] for stop in seen]
    assert names == [
        *("Skip to the message box", "model", "log", "Copy your message", "Edit", "Copy the answer", "Regenerate"),
        *("prompt", "clear", "send", "system", "temperature", "top-p", "top-k", "max-tokens", "seed", "stop"),
        *("reset", "api-key"),
    ]
    assert all(stop["label"] and stop["ring"] for stop in seen)
    page.locator(".skip").press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_narrow_screens_fold_the_settings_away(page: Page) -> None:
    script_answers(page, stream("wide " * 3 + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n"))
    say(page, "Hello")
    expect(answers(page).locator("pre")).to_be_visible()
    for width in (800, 390, 320):
        page.set_viewport_size({"width": width, "height": 700})
        expect(page.get_by_label("Temperature")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("#log").evaluate("log => log.scrollWidth <= log.clientWidth")
        toggle = page.get_by_role("button", name="Settings")
        toggle.press("Enter")
        expect(toggle).to_have_attribute("aria-expanded", "true")
        expect(page.get_by_label("System prompt")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.get_by_label("Temperature")).to_be_hidden()
        expect(toggle).to_be_focused()


def test_percentiles_are_prometheus_ones(page: Page) -> None:
    lines = [("0.1", 10), ("0.2", 30), ("0.4", 40), ("+Inf", 50)]
    text = "".join(f'x_bucket{{engine="0",le="{le}",model_name="m"}} {count}.0\n' for le, count in lines)
    script = """async ({ text, qs }) => {
      const { parseHistogram, difference, quantile } = await import("./console/histogram.js");
      const now = parseHistogram(text + "x_sum 3\\nxy_bucket{le=\\"0.1\\"} 9\\n", "x");
      const later = now.map(([bound, total]) => [bound, total * 2]);
      return [...qs.map((q) => quantile(q, now)), quantile(0.5, difference(later, now)), quantile(0.5, [])];
    }"""
    # As histogram_quantile() does: linear inside the bucket, the highest finite bound beyond it.
    expected = [0.05, 0.1, 0.175, 0.4, 0.4, 0.175, None]
    found = page.evaluate(script, {"text": text, "qs": [0.1, 0.2, 0.5, 0.8, 0.99]})
    assert found == [value if value is None else pytest.approx(value) for value in expected]
