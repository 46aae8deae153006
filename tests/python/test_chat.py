"""Chat templates render as Transformers renders them, in a sandbox."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastllm.chat import render_chat
from fastllm.template_renderer import TemplateRenderer
from fastllm.tokenizer import byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello "}]


def test_generation_prompt_is_added() -> None:
    text = byte_tokenizer().apply_chat_template(MESSAGES[:1])
    assert text == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\n"


def test_final_message_can_be_continued() -> None:
    text = byte_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert text == "<|im_start|>user\nHi <b><|im_end|>\n<|im_start|>assistant\nHello"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | tojson }}", '"Hi <b>"'),
        ("{{ tools | tojson(indent=1) }}", '[\n {\n  "name": "é"\n }\n]'),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% for m in messages %}\n    {{ m.role }}\n{% endfor %}", "    user\n    assistant\n"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}|", "Hello |"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ extra }}", "value"),
    ],
)
def test_template_helper(template: str, text: str) -> None:
    assert render_chat(template, MESSAGES, tools=[{"name": "é"}], extra="value") == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{% if %}", "not valid Jinja, line 1"),
        ("{{ messages.__class__.__mro__ }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ 1 + 'a' }}", "refused"),
    ],
)
def test_wrong_template_is_a_sentence(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat(template, MESSAGES)


def test_empty_conversation_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one message"):
        render_chat("x", [])


def test_template_equals_transformers(demo_gguf: str, tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")
    from fastllm.engine_args import EngineArgs
    from fastllm.loader.model import open_model

    tokenizer = open_model(EngineArgs(model=demo_gguf)).tokenizer
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    for generate in (True, False):
        assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=generate) == reference.apply_chat_template(
            MESSAGES, chat_template=tokenizer.chat_template, tokenize=False, add_generation_prompt=generate
        )


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    made = TemplateRenderer(max_cpu_s=0.1)
    yield made
    made.close()


def test_renderer_gives_what_the_template_gives(renderer: TemplateRenderer) -> None:
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ x.y }}\udcff"
    settings = {"x": {"y": "é"}, "add_generation_prompt": False, "continue_final_message": True}
    assert renderer.render(template, MESSAGES, **settings) == render_chat(template, MESSAGES, **settings)
    with pytest.raises(ValueError, match="no chat template"):
        renderer.render(None, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '%9999999999d' | format(1) }}",
        "{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ([1] * 99999) | map('string') | list * 99999 }}",
        "{{ 'a' | center(9999999999) }}",
    ],
)
def test_greedy_template_is_stopped(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        renderer.render(template, MESSAGES)
    assert renderer.render("{{ messages[0].role }}", MESSAGES) == "user"


def test_template_sees_no_secret_of_the_process(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLLM_API_KEY", "secret")
    other = TemplateRenderer()
    other.warm()
    (worker,) = other._idle
    with open(f"/proc/{worker._process.pid}/environ", "rb") as environment:
        assert b"secret" not in environment.read()
    other.close()
    assert worker._process.returncode is not None


def test_a_worker_that_was_ended_from_outside_is_replaced(renderer: TemplateRenderer) -> None:
    renderer.warm()
    for worker in list(renderer._idle):
        worker._process.kill()
        worker._process.wait()
    assert renderer.render("{{ messages[0].role }}", MESSAGES) == "user"
