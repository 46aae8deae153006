"""Compiles grammars for one model, within limits, and remembers the recent ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastllm.grammar.limits import GrammarError, GrammarLimits, too_complex
from fastllm.grammar.mask import GrammarMask, MaskBatch, check_mask, first_line, make_batch
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.grammar.source import Preamble, grammar_source
from fastllm.grammar.vocabulary import build_vocabulary
from fastllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 256
_CACHED_BYTES = 16 << 20  # of the texts of cached grammars; what is compiled from them grows with it
_MAX_LEXER_STATES = 100_000  # about 1.5 KB each
_MAX_GRAMMAR_SIZE = 200_000  # symbols
# What one mask may take; a request that needs more ends with an error.
_MAX_STEP_ITEMS = 25_000  # of Earley's algorithm, of all texts that tokens stand for
_MAX_ROW_ITEMS = 2000  # the same at one character; time grows with their square
_MAX_STEP_FUEL = 200_000  # expressions made while lexing


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar at its beginning. Immutable; mask() may be called from any thread, once per request."""

    matcher: LLMatcher
    first: NDArray[np.int32]  # what may begin an output
    batch: MaskBatch

    def mask(self) -> GrammarMask:
        return GrammarMask(self.matcher.deep_copy(), self.first, self.batch)


class GrammarCompiler:
    """Thread-safe. Costs nothing before the first grammar, which has llguidance read the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()  # of the cache and its size
        self._cache: OrderedDict[tuple[str, Preamble | None], CompiledGrammar] = OrderedDict()
        self._cached_bytes = 0
        self._loading = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._specials: dict[str, int] = {}
        self._batch: MaskBatch | None = None
        # A compilation that ran out of its time keeps a thread until it ends by itself.
        self._compiling = ThreadPoolExecutor(2, thread_name_prefix="fastllm-grammar")

    def cached(self, params: StructuredOutputsParams, preamble: Preamble | None = None) -> CompiledGrammar | None:
        key = (params.key, preamble)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
            return found

    def compile(
        self,
        params: StructuredOutputsParams,
        limits: GrammarLimits | None = None,
        preamble: Preamble | None = None,
    ) -> CompiledGrammar:
        """Blocks until the grammar is compiled. Raises GrammarError with a sentence if it is wrong or too complex."""
        limits = limits or GrammarLimits()
        try:
            found = self.cached(params, preamble)
        except RecursionError:
            raise too_complex(f"The {_NAMES[params.kind]} is nested too deeply.") from None
        if found is not None:
            return found
        vocabulary = self._load_vocabulary()
        source = grammar_source(params, limits, self._specials, preamble)
        started = threading.Event()

        def work() -> CompiledGrammar:
            started.set()
            return self._compile(vocabulary, source, params.kind)

        future = self._compiling.submit(work)
        started.wait(10 * limits.max_compile_time_s)
        try:
            compiled = future.result(limits.max_compile_time_s)
        except TimeoutError:
            future.cancel()
            raise too_complex(
                f"The {_NAMES[params.kind]} takes more than {limits.max_compile_time_s:g} s to compile; simplify it."
            ) from None
        self._remember((params.key, preamble), compiled)
        return compiled

    def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _load_vocabulary(self) -> LLTokenizer:
        with self._loading:
            if self._vocabulary is None:
                specials = {self._tokenizer.backend.id_to_token(i): i for i in sorted(self._tokenizer.special_ids)}
                self._specials = {text: i for text, i in specials.items() if text and i < self._vocab_size}
                self._vocabulary = build_vocabulary(self._tokenizer, self._vocab_size, self._eos)
            return self._vocabulary

    def _compile(self, vocabulary: LLTokenizer, source: str, kind: str) -> CompiledGrammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            step_max_items=_MAX_STEP_ITEMS,
            max_items_in_row=_MAX_ROW_ITEMS,
            step_lexer_fuel=_MAX_STEP_FUEL,
            verbose_errors=False,
        )
        matcher = LLMatcher(vocabulary, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), kind)
        try:
            first = np.frombuffer(matcher.compute_bitmask(), np.int32)
            check_mask(matcher, first)
        except ValueError as error:
            name = _NAMES[kind]
            raise too_complex(f"The {name} has no output that ends ({error}); does it refer to itself?") from None
        return CompiledGrammar(matcher, first, self._masks(vocabulary))

    def _masks(self, vocabulary: LLTokenizer) -> MaskBatch:
        with self._loading:
            if self._batch is None:
                self._batch = make_batch((vocabulary.vocab_size + 31) // 32)
            return self._batch

    def _remember(self, key: tuple[str, Preamble | None], compiled: CompiledGrammar) -> None:
        with self._lock:
            if key not in self._cache:
                self._cached_bytes += len(key[0])
            self._cache[key] = compiled
            while len(self._cache) > _CACHED_GRAMMARS or self._cached_bytes > _CACHED_BYTES:
                (text, _), _ = self._cache.popitem(last=False)
                self._cached_bytes -= len(text)


_NAMES = {
    "json": "JSON schema",
    "json_object": "JSON schema",
    "regex": "regex",
    "choice": "list of choices",
    "grammar": "grammar",
    "structural_tag": "structural tag",
}


def _refusal(error: str, kind: str) -> GrammarError:
    """llguidance's error as ours: the first line that says something, without its state and positions."""
    lines = [line.strip() for line in error.splitlines()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), first_line(error))
    lowered = error.lower()
    if "look-around" in lowered or "lookaround" in lowered:
        return GrammarError("The regex uses look-around, which is not supported.", "unsupported_regex")
    if "backreference" in lowered:
        return GrammarError("The regex uses back-references, which are not supported.", "unsupported_regex")
    if "unimplemented" in lowered or "not supported" in lowered:
        return GrammarError(f"The {_NAMES[kind]} uses what is not supported: {told}", "unsupported_schema")
    if "too complex" in lowered or "limit" in lowered or "too large" in lowered or "too many" in lowered:
        return too_complex(f"The {_NAMES[kind]} is too complex: {told}")
    code = {"regex": "invalid_regex", "grammar": "invalid_grammar"}.get(kind, "invalid_schema")
    return GrammarError(f"The {_NAMES[kind]} cannot be used: {told}", code)
