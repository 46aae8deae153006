"""The tokenizer rebuilt from a GGUF file and the one in a folder are those of Transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.loader.model import open_model
from fastllm.tokenizer import byte_tokenizer, load_tokenizer
from tiny_models import save_byte_tokenizer

TEXTS = [
    "Hello world",
    "  two leading spaces, trailing  ",
    "digits 1234567890 3.14159 1e-9 2024-06-07",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n    if True:\r\n        pass",
    "naïve café Straße ÀÉÎÕÜ ﬁ",
    "日本語のテキスト 中文文本 한국어 العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 emoji 🤖",
    "don't I'll you're we've it's DON'T",
    "\u00a0nbsp\u2003em space\u200bzero width",
    "<|im_start|>user\nspecial tokens<|im_end|>\n<|endoftext|>",
    "a" * 200,
    "",
]


@pytest.fixture(scope="module")
def reference(demo_gguf: str):  # type: ignore[no-untyped-def]
    """SmolLM2's tokenizer as Transformers reads it from the file, with the original's pre-tokenizer.

    GGUF keeps only that pre-tokenizer's name: digits one by one, then GPT-2's byte-level BPE.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")
    pytest.importorskip("gguf", reason="transformers needs gguf to read the file")
    from tokenizers import decoders, pre_tokenizers

    from fastllm.loader.hub import resolve_model

    path = resolve_model(demo_gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return tokenizer


def test_demo_tokenizer_equals_transformers(demo_gguf: str, reference, seed: int) -> None:  # type: ignore[no-untyped-def]
    tokenizer = open_model(EngineArgs(model=demo_gguf)).tokenizer
    rng = random.Random(seed)
    alphabet = "".join(TEXTS)
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(200)]
    for text in texts:
        ids = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)


def test_token_bytes_join_to_the_text(demo_gguf: str) -> None:
    tokenizer = open_model(EngineArgs(model=demo_gguf)).tokenizer
    for text in TEXTS:
        assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)) == text.encode()


def test_byte_tokenizer_ids_are_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(TEXTS[:8])
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_folder_round_trip_keeps_template_and_specials(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == byte_tokenizer().eos_token_id
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


def test_named_templates_are_chosen_by_use(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages) == "plain"
    assert tokenizer.apply_chat_template(messages, tools=[{}]) == "tools"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": 3}'])
def test_broken_tokenizer_file_is_a_load_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(LoadError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_long_text_has_the_tokens_of_its_lines(seed: int) -> None:
    """Long text takes a way of its own through the tokenizer, which leaves other threads running."""
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    lines = [rng.choice(TEXTS) for _ in range(200)]
    assert len("\n".join(lines)) > 4000
    newline = tokenizer.encode("\n", add_special_tokens=False)
    expected: list[int] = []
    for number, line in enumerate(lines):
        expected += (newline if number else []) + tokenizer.encode(line, add_special_tokens=False)
    assert tokenizer.encode("\n".join(lines), add_special_tokens=False) == expected
