"""The tokens of a model as llguidance wants them, whatever file the tokenizer came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class _Tokens:
    """What llguidance's TokenizerWrapper reads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: int, specials: Sequence[int]) -> None:
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = list(specials)
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text, False)


def build_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """vocab_size: rows of the model's output, which may be more or fewer than the tokenizer's entries.

    Takes about a second for a vocabulary of 150,000 tokens.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
    # A model without an end gets one that it can never sample; an output that is complete ends all the same.
    size = vocab_size if eos else vocab_size + 1
    eos = eos or [vocab_size]
    specials = sorted({token for token in tokenizer.special_ids if token < size} | set(eos))
    wrapper = TokenizerWrapper(_Tokens(tokenizer, size, eos[0], specials))
    return LLTokenizer(wrapper, n_vocab=size, eos_token=eos)
