"""The tokens that samples may continue with: one mask each, those of a step computed together by native threads."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_MAX_THREADS = 8
# Grammars whose every text can be read in many ways take longer with each token. A step of all requests waits for the
# slowest mask, so a mask has this much of the processor for each token, and in all so much more.
_TOKEN_S = 0.005
_MORE_S = 0.3
_PAST_LIMIT = re.compile("max is|too many|lexer error")  # in llguidance's words


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def check_mask(matcher: LLMatcher, bits: NDArray[np.int32]) -> None:
    """Raises ValueError if the grammar has come to nothing."""
    if matcher.is_error():
        raise ValueError(f"the grammar is too complex to follow: {first_line(matcher.get_error())}")
    if not bits.any():
        raise ValueError("the grammar allows no token of this model's vocabulary here")


class MaskBatch:
    """The masks that the next step will ask for. Engine thread only; the GIL is released while they are computed.

    step k      accept accept accept | submit to the device | fill: computes all three | fill | fill

    Where that took long, each of them is timed by itself the next time.
    """

    def __init__(self, executor: LLExecutor, words: int) -> None:
        self._executor = executor
        self._words = words  # of 32 tokens
        self._waiting: list[GrammarMask] = []

    def add(self, mask: GrammarMask) -> None:
        self._waiting.append(mask)

    def compute(self) -> None:
        from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

        masks, self._waiting = self._waiting, []
        bits = np.zeros((len(masks), self._words), np.int32)
        quick = [row for row, mask in enumerate(masks) if not mask.is_timed]
        begin = time.monotonic()
        if quick:
            fill_next_token_bitmask_par(self._executor, [(masks[row].matcher, row) for row in quick], bits)
        was_slow = time.monotonic() - begin > _TOKEN_S
        for row, mask in enumerate(masks):
            mask.bits = bits[row]
            if mask.is_timed:
                begin = time.thread_time()
                fill_next_token_bitmask(mask.matcher, bits, row)
                mask.is_timed = mask.spend(time.thread_time() - begin)
            else:
                mask.is_timed = was_slow


def make_batch(words: int) -> MaskBatch:
    from llguidance import LLExecutor

    return MaskBatch(LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1)), words)


class GrammarMask:
    """A `_core` token mask: the engine calls fill and accept in turn. Each sample has its own.

    bits: what may come next, one bit per token; None from accept until the batch has computed it. is_timed: what the
    batch computes for it is measured.
    """

    def __init__(self, matcher: LLMatcher, first: NDArray[np.int32], batch: MaskBatch) -> None:
        self.matcher = matcher
        self.bits: NDArray[np.int32] | None = first
        self.is_timed = False
        self._first = first
        self._batch = batch
        self._left_s = _MORE_S

    def spend(self, seconds: float) -> bool:
        """Counts what one call of the matcher took of the processor; whether that was long."""
        over = seconds - _TOKEN_S
        self._left_s -= max(over, 0.0)
        return over > 0

    def _check_time(self) -> None:
        if self._left_s < 0:
            raise ValueError("the grammar takes too long to follow; write it so that a text can be read in fewer ways")

    def fill(self, bits: NDArray[np.uint32]) -> None:
        if self.bits is None:
            self._batch.compute()
        assert self.bits is not None
        self._check_time()
        check_mask(self.matcher, self.bits)
        bits[:] = self.bits.view(np.uint32)[: len(bits)]

    def accept(self, token: int) -> bool:
        begin = time.thread_time()
        allowed = self.matcher.consume_token(token)
        self.spend(time.thread_time() - begin)
        self._check_time()
        if not allowed and _PAST_LIMIT.search(error := first_line(self.matcher.get_error())):
            raise ValueError(f"the grammar is too complex to follow: {error}")
        if not allowed:
            raise ValueError(
                f"token {token} was sampled although the grammar does not allow it: nothing that it does allow could be"
            )
        if self.matcher.is_stopped():
            return True
        if self.bits is not None:  # else the batch has it already
            self.bits = None
            self._batch.add(self)
        return False

    def clone(self) -> GrammarMask:
        return GrammarMask(self.matcher.deep_copy(), self._first, self._batch)
