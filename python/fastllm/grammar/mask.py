"""The tokens that one sample may continue with, computed by a pool of threads while the device works."""

from __future__ import annotations

from concurrent.futures import Executor, Future, TimeoutError
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

# A step of the whole batch waits for its slowest mask, so a grammar that takes longer ends its own request.
_MAX_WAIT_S = 5.0


def allowed_tokens(matcher: LLMatcher) -> NDArray[np.uint32]:
    """One bit per token, 1 = allowed. Raises ValueError if the grammar has come to nothing. Releases the GIL."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
    if matcher.is_error():
        raise ValueError(first_line(matcher.get_error()))
    if not bits.any():
        raise ValueError("the grammar allows no token of this model's vocabulary here")
    return bits


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


class GrammarMask:
    """A `_core` token mask: the engine thread calls fill and accept in turn. Each sample has its own.

    engine thread   accept(token) -----------------> submit step -> fill: waits only for what is left
    pool                     \\-> mask of the next token --------/
    """

    def __init__(self, matcher: LLMatcher, first: NDArray[np.uint32], pool: Executor) -> None:
        self._matcher = matcher
        self._first = first
        self._pool = pool
        self._next: Future[NDArray[np.uint32]] | None = None  # None: nothing was accepted yet

    def fill(self, bits: NDArray[np.uint32]) -> None:
        if self._next is None:
            allowed = self._first
        else:
            try:
                allowed = self._next.result(_MAX_WAIT_S)
            except TimeoutError:
                raise ValueError(f"the grammar took longer than {_MAX_WAIT_S:g} s for one token") from None
        bits[:] = allowed[: len(bits)]

    def accept(self, token: int) -> bool:
        if not self._matcher.consume_token(token):
            raise ValueError(
                f"token {token} was sampled although the grammar does not allow it: nothing that it does allow could be"
            )
        if self._matcher.is_stopped():
            return True
        self._next = self._pool.submit(allowed_tokens, self._matcher)
        return False

    def clone(self) -> GrammarMask:
        return GrammarMask(self._matcher.deep_copy(), self._first, self._pool)
