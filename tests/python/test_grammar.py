"""Grammars over every kind of vocabulary, without an engine: any walk along the masks is an output that fits."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.grammar.compiler import GrammarCompiler
from fastllm.grammar.limits import GrammarError, GrammarLimits, regex_size
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.grammar.source import Preamble
from fastllm.tokenizer import Tokenizer, byte_tokenizer
from schemas import SCHEMAS, fits


def sentencepiece_gguf(folder: Path) -> Tokenizer:
    """A SentencePiece vocabulary as GGUF files hold it: pieces with scores, bytes for the rest."""
    gguf = pytest.importorskip("gguf", reason="needs gguf to write the file")
    from fastllm.loader.gguf import read_gguf
    from fastllm.loader.gguf_tokenizer import gguf_tokenizer

    pieces = ["▁", "▁{", '{"', '":', '"}', "▁a", "ab", "▁true", "als", "é", *map(chr, range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(pieces)]
    types = [2, 3, 3, *([6] * 256), *([1] * (len(tokens) - 259))]
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    backend = gguf_tokenizer(read_gguf(folder / "x.gguf"))
    return Tokenizer(backend, {"eos_token": "</s>"})


def trained_bpe(folder: Path) -> Tokenizer:
    """A byte-level BPE as folders of the Hugging Face hub hold it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from fastllm.tokenizer import load_tokenizer

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"])
    backend.train_from_iterator([json.dumps(schema) for schema in SCHEMAS] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["bytes", "bpe folder", "sentencepiece gguf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return byte_tokenizer()
    return trained_bpe(folder) if request.param == "bpe folder" else sentencepiece_gguf(folder)


def make_compiler(tokenizer: Tokenizer, *, extra_rows: int = 7, eos: bool = True) -> GrammarCompiler:
    """extra_rows: rows of the model's output beyond the tokenizer's entries."""
    assert tokenizer.eos_token_id is not None
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + extra_rows, [tokenizer.eos_token_id] if eos else [])


def walk(compiler: GrammarCompiler, tokenizer: Tokenizer, rng: random.Random, **constraint: Any) -> str | None:
    """Text of random allowed tokens until the grammar ends it; None if it does not within 400 tokens."""
    mask = compiler.compile(StructuredOutputsParams(**constraint)).mask()
    bits = np.zeros((compiler._vocab_size + 31) // 32, np.uint32)
    ids: list[int] = []
    while len(ids) < 400:
        mask.fill(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        assert token < compiler._vocab_size and (token < tokenizer.vocab_size)
        complete = mask.accept(token)
        if token == tokenizer.eos_token_id:
            assert complete
            break
        ids.append(token)
        if complete:
            break
    else:
        return None
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


def test_any_walk_fits_the_schema(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    compiler = make_compiler(tokenizer)
    ended = 0
    for schema in SCHEMAS:
        text = walk(compiler, tokenizer, rng, json=schema)
        if text is not None:
            assert fits(json.loads(text), schema), (schema, text)
            ended += 1
    assert ended >= 15
    compiler.close()


def test_any_walk_matches_the_regex(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for eos in (True, False):
        compiler = make_compiler(tokenizer, eos=eos)
        for pattern in ("[ab]{3}", "é|x", "(a|bc)/d?\\n?e"):
            text = walk(compiler, tokenizer, rng, regex=pattern)
            assert text is not None and re.fullmatch(pattern, text)
        compiler.close()


def test_whitespace_is_bounded(tokenizer: Tokenizer) -> None:
    compiler = make_compiler(tokenizer)
    mask = compiler.compile(StructuredOutputsParams(json={"type": "array", "items": {"type": "null"}})).mask()
    bits = np.zeros((compiler._vocab_size + 31) // 32, np.uint32)
    for number, text in enumerate(["[", *" " * 100]):
        (token,) = (
            (i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == text.encode())
            if (tokenizer.byte_level)
            else [tokenizer.token_to_id(text if text != " " else "▁")]
        )
        mask.fill(bits)
        if not bits[token // 32] >> (token % 32) & 1:
            assert number > 1
            break
        mask.accept(token)
    else:
        pytest.fail("a hundred spaces in a row were allowed")
    compiler.close()


def test_clones_go_their_own_ways() -> None:
    compiler = make_compiler(byte_tokenizer())
    first = compiler.compile(StructuredOutputsParams(choice=["ax", "by"])).mask()
    second = first.clone()
    assert not first.accept(ord("a")) and not second.accept(ord("b"))
    assert first.accept(ord("x")) and second.accept(ord("y"))
    with pytest.raises(ValueError, match="does not allow"):
        first.clone().accept(ord("q"))
    compiler.close()


def test_reasoning_comes_before_what_is_constrained() -> None:
    tokenizer = byte_tokenizer()
    compiler = make_compiler(tokenizer)
    params = StructuredOutputsParams(choice=["yes"])
    for text, opened, fits_it in (
        ("anything </think>\n\nyes", True, True),
        ("yes", True, False),
        ("<think>a</think>yes", False, True),
        ("yes", False, True),
        ("no", False, False),
    ):
        mask = compiler.compile(params, None, Preamble("<think>", "</think>", opened)).mask()
        complete = False
        try:
            for byte in text.encode():
                complete = mask.accept(byte)
        except ValueError:
            complete = False
        assert complete == fits_it, text
    compiler.close()


def test_equal_constraints_are_compiled_once() -> None:
    compiler = make_compiler(byte_tokenizer())
    assert compiler.compile(StructuredOutputsParams(regex="a")) is compiler.compile(StructuredOutputsParams(regex="a"))
    assert compiler.compile(StructuredOutputsParams(regex="b")) is not compiler.compile(
        StructuredOutputsParams(regex="a")
    )
    compiler.close()


@pytest.mark.parametrize(
    ("constraint", "limits", "code"),
    [
        ({"json": {"enum": ["x" * 100]}}, {"max_schema_bytes": 90}, "schema_too_complex"),
        ({"json": {"enum": list(range(20))}}, {"max_schema_nodes": 20}, "schema_too_complex"),
        ({"json": {"items": {"items": {"items": {}}}}}, {"max_schema_depth": 2}, "schema_too_complex"),
        ({"regex": "a{30}"}, {"max_regex_size": 29}, "schema_too_complex"),
        ({"json": "[" * 5000}, {}, "schema_too_complex"),
        ({"json": "{"}, {}, "invalid_schema"),
        ({"json": {"enum": ["\ud800"]}}, {}, "invalid_unicode"),
        ({"regex": "\ud800"}, {}, "invalid_unicode"),
    ],
)
def test_limit_is_kept(constraint: dict[str, Any], limits: dict[str, Any], code: str) -> None:
    compiler = make_compiler(byte_tokenizer())
    with pytest.raises(GrammarError) as caught:
        compiler.compile(StructuredOutputsParams(**constraint), GrammarLimits(**limits))
    assert caught.value.code == code
    compiler.close()


def test_compile_time_is_limited() -> None:
    compiler = make_compiler(byte_tokenizer())
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    with pytest.raises(GrammarError, match="takes more than 0.001 s"):
        compiler.compile(StructuredOutputsParams(json=schema), GrammarLimits(max_compile_time_s=0.001))
    compiler.close()


# Texts of these can be read in ever more ways.
AMBIGUOUS = [
    'start: (x* y*)+\nx: "a"* "b"*\ny: "a"* "b"*\n',
    'start: s\ns: s s s | s s | "a" | "b"\n',
    "start: s\ns: " + " | ".join(f"x{i} s" for i in range(60)) + ' | "a" | "b"\n'
    "" + "\n".join(f'x{i}: "a" | "b" | x{(i + 1) % 60} x{(i + 2) % 60}' for i in range(60)),
]


@pytest.mark.parametrize("grammar", AMBIGUOUS)
def test_mask_that_takes_too_long_ends_its_own_request_only(grammar: str) -> None:
    compiler = make_compiler(byte_tokenizer())
    slow = compiler.compile(StructuredOutputsParams(grammar=grammar)).mask()
    other, alone = (compiler.compile(StructuredOutputsParams(regex="[a-z]+")).mask() for _ in range(2))
    bits, beside, expected = (np.zeros((compiler._vocab_size + 31) // 32, np.uint32) for _ in range(3))
    began, worst = time.process_time(), 0.0
    with pytest.raises(ValueError, match="takes too long|too complex"):
        for token in b"abab" * 1000:
            before = time.thread_time()
            slow.fill(bits)
            other.fill(beside)
            alone.fill(expected)
            assert (beside == expected).all()
            assert not any(mask.accept(token) for mask in (other, alone, slow))
            worst = max(worst, time.thread_time() - before)
    assert worst < 2 and time.process_time() - began < 10
    other.fill(beside)
    assert (beside == expected).all() and not other.accept(ord("c"))
    compiler.close()


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("(a{10}){10}", 100),
        ("[a{9}]{2}", 2),
        (r"\d{4}\{9}", 7),
        ("a{", 1),
        ("(a)?{2,50}", 50),
    ],
)
def test_size_of_a_regex(pattern: str, size: int) -> None:
    assert regex_size(pattern) == size
