"""A compiler of grammars over bytes, and whether a grammar accepts a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from fastllm.grammar.compiler import CompiledGrammar, GrammarCompiler
from fastllm.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    tokenizer = byte_tokenizer()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.eos_token_id or 0])
    yield compiler
    compiler.close()


def accepts(grammar: CompiledGrammar, tokens: Iterable[int]) -> bool:
    """All of the tokens, which are bytes but for special ones, and that the text may end there."""
    mask = grammar.mask()
    complete = False
    try:
        for token in tokens:
            complete = mask.accept(token)
    except ValueError:
        return False
    return complete or bool(mask.matcher.is_accepting())
