"""The tokens that samples may continue with: one mask each, those of a step computed together by native threads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_MAX_THREADS = 8


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def check_mask(matcher: LLMatcher, bits: NDArray[np.int32]) -> None:
    """Raises ValueError if the grammar has come to nothing."""
    if matcher.is_error():
        raise ValueError(first_line(matcher.get_error()))
    if not bits.any():
        raise ValueError("the grammar allows no token of this model's vocabulary here")


class MaskBatch:
    """The masks that the next step will ask for. Engine thread only; the GIL is released while they are computed.

    step k      accept accept accept | submit to the device | fill: computes all three | fill | fill
    """

    def __init__(self, executor: LLExecutor, words: int) -> None:
        self._executor = executor
        self._words = words  # of 32 tokens
        self._waiting: list[GrammarMask] = []

    def add(self, mask: GrammarMask) -> None:
        self._waiting.append(mask)

    def compute(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask_par

        masks, self._waiting = self._waiting, []
        bits = np.zeros((len(masks), self._words), np.int32)
        fill_next_token_bitmask_par(self._executor, [(mask.matcher, row) for row, mask in enumerate(masks)], bits)
        for row, mask in enumerate(masks):
            mask.bits = bits[row]


def make_batch(words: int) -> MaskBatch:
    from llguidance import LLExecutor

    return MaskBatch(LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1)), words)


class GrammarMask:
    """A `_core` token mask: the engine calls fill and accept in turn. Each sample has its own.

    bits: what may come next, one bit per token; None from accept until the batch has computed it.
    """

    def __init__(self, matcher: LLMatcher, first: NDArray[np.int32], batch: MaskBatch) -> None:
        self.matcher = matcher
        self.bits: NDArray[np.int32] | None = first
        self._first = first
        self._batch = batch

    def fill(self, bits: NDArray[np.uint32]) -> None:
        if self.bits is None:
            self._batch.compute()
        assert self.bits is not None
        check_mask(self.matcher, self.bits)
        bits[:] = self.bits.view(np.uint32)[: len(bits)]

    def accept(self, token: int) -> bool:
        if not self.matcher.consume_token(token):
            raise ValueError(
                f"token {token} was sampled although the grammar does not allow it: nothing that it does allow could be"
            )
        if self.matcher.is_stopped():
            return True
        self.bits = None
        self._batch.add(self)
        return False

    def clone(self) -> GrammarMask:
        return GrammarMask(self.matcher.deep_copy(), self._first, self._batch)
