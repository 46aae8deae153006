"""What one request may ask for before anything is allocated for it; every limit has a flag of the same name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int = 8 << 20  # bytes of one request body
    max_prompts: int = 1024  # prompts in one completions call
    max_n: int = 128  # samples of one prompt
    max_sequences: int = 1024  # prompts * n of one call
    max_stop_strings: int = 16
    max_stop_bytes: int = 1024  # bytes of one stop string
    max_stop_token_ids: int = 1024
    max_logit_bias: int = 1024  # entries
    max_bad_words: int = 256
    max_bad_word_chars: int = 256  # of one
    max_allowed_token_ids: int = 1 << 14
    max_messages: int = 10_000
    max_tools: int = 128
    max_schema_bytes: int = 64 << 10  # bytes of a JSON schema, regex or grammar
    max_schema_nodes: int = 5000  # values in a JSON schema
    max_schema_depth: int = 64  # levels of nesting in a JSON schema
    max_compile_time_s: float = 1.0  # seconds to compile a schema, regex or grammar
    max_waiting: int | None = None  # requests beyond those that run; None: four times the running ones, at least 64
    max_waiting_time_s: float | None = None  # seconds a request may wait before it starts; None: no limit
    body_timeout_s: float = 30.0  # seconds for a client to send its body
    write_timeout_s: float = 30.0  # seconds a client may leave a full socket unread
    keepalive_timeout_s: float = 75.0  # seconds an idle connection stays open

    # Longer text is tokenised on a worker thread, so the event loop never stalls.
    inline_tokenize_chars: int = 4096

    def max_prompt_chars(self, max_model_len: int) -> int:
        """Text longer than this cannot fit the context with any tokenizer worth its name."""
        return 16 * max_model_len + (64 << 10)

    def waiting_limit(self, max_num_seqs: int) -> int:
        return self.max_waiting if self.max_waiting is not None else max(64, 4 * max_num_seqs)
