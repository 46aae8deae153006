"""Tokens to text as they arrive: whole characters only, and never text that may yet become a stop string.

all text so far:   "....................|......|"
                    given out (emitted)  held: may begin a stop string
plus, not yet text: bytes or tokens of an unfinished character
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from fastllm.sampling import SamplingParams
from fastllm.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8  # tokens kept back for one character; no character takes more


class _ByteStream:
    """For byte-level tokenizers: a UTF-8 decoder over each token's bytes. Constant time per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self.add_all((token_id,))

    def add_all(self, ids: Sequence[int]) -> str:
        piece, skip = self._tokenizer.stream_bytes, self._skip
        return self._decoder.decode(b"".join([piece(id) for id in ids if id not in skip]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For any tokenizer: decodes a window that starts at a place where text was complete, and returns what is new.

    tokens:  ... | shown: already text | pending: not yet text |
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown: list[int] = []
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._pending.append(token_id)
        return self._new_text(force=len(self._pending) >= _MAX_PENDING)

    def finish(self) -> str:
        return self._new_text(force=True)

    def _new_text(self, force: bool) -> str:
        before = self._tokenizer.decode(self._shown, self._skip)
        after = self._tokenizer.decode(self._shown + self._pending, self._skip)
        if not force and (after.endswith(_REPLACEMENT) or len(after) <= len(before)):
            return ""
        # Empty tokens stay in the window until text follows: a decoder strips the space that starts its input.
        if len(after) > len(before):
            self._shown, self._pending = self._pending, []
        return after[len(before) :]


class IncrementalDetokenizer:
    """The text of one sequence, token by token. Not thread-safe; one owner.

    text: everything final so far. stop_reason: the stop string found, else None; once it is set no more text comes.
    num_tokens: tokens taken in; those after the one that completed a stop string are not.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        stream = _ByteStream if tokenizer.byte_level else _WindowStream
        self._stream: _ByteStream | _WindowStream = stream(tokenizer, params.skip_special_tokens)
        self._stops = tuple(params.stop or ())
        self._longest_stop = max((len(s) for s in self._stops), default=0)
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._all = ""  # emitted and held
        self._emitted = 0  # characters
        self._searchable_from = 0  # characters; a stop string may not begin in the text of the first min_tokens
        self.num_tokens = 0
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        return self.text_from(0)

    def text_from(self, start: int) -> str:
        return self._all[start : self._emitted]

    @property
    def num_chars(self) -> int:
        return self._emitted

    def add(self, ids: Sequence[int]) -> str:
        """Takes new tokens and returns the text that has become final."""
        if not self._stops and isinstance(self._stream, _ByteStream):  # no token may end the text
            self.num_tokens += len(ids)
            self._append(self._stream.add_all(ids))
            return self._emit(len(self._all))
        for token_id in ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            self._append(self._stream.add(token_id))
        return self._emit(len(self._all) - self._held())

    def finish(self) -> str:
        """Returns what was held back: the sequence has ended."""
        if self.stop_reason is None:
            self._append(self._stream.finish())
        return self._emit(len(self._all))

    def _append(self, new: str) -> None:
        start = len(self._all)
        self._all += new
        if self.num_tokens <= self._min_tokens:
            self._searchable_from = len(self._all)
        elif new and self._stops:
            self._find_stop(max(self._searchable_from, start - self._longest_stop + 1))

    def _find_stop(self, start: int) -> None:
        """Ends the text at the stop string that is complete first; of those complete together, the leftmost."""
        found = [(self._all.find(s, start) + len(s), len(s), s) for s in self._stops if s in self._all[start:]]
        if found:
            end, length, self.stop_reason = min(found, key=lambda f: (f[0], -f[1]))
            self._all = self._all[: end if self._include_stop else end - length]

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stop_reason is not None or self._include_stop:
            return 0
        for length in range(min(self._longest_stop - 1, len(self._all) - self._emitted), 0, -1):
            tail = self._all[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def _emit(self, end: int) -> str:
        new = self._all[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return new
