"""What requests and connections may ask for before anything is allocated; every limit has a flag of its name."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any


def _limit(default: Any, metavar: str, help: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": help})


@dataclass(frozen=True)
class Limits:
    """Names that end in _s are seconds. 0 turns a limit of time, rate or connections off."""

    # ---- one request
    max_body_bytes: int = _limit(8 << 20, "BYTES", "largest request body; more gets 413")
    max_json_depth: int = _limit(64, "N", "deepest nesting of a JSON body; more gets 400")
    max_json_keys: int = _limit(10_000, "N", "most keys of one JSON object; more get 400")
    max_json_items: int = _limit(
        100_000, "N", "longest JSON array; more get 400; the context's length is always allowed, for token ids"
    )
    max_json_values: int = _limit(
        32_768, "N", "most values of a JSON body, long lists of token ids aside; more get 400"
    )
    max_prompts: int = _limit(1024, "N", "most prompts in one completions call")
    max_n: int = _limit(128, "N", "largest n of a request")
    max_sequences: int = _limit(1024, "N", "most prompts * n in one call")
    max_messages: int = _limit(10_000, "N", "most messages of a conversation")
    max_stop_strings: int = _limit(16, "N", "most stop strings of a request")
    max_stop_bytes: int = _limit(1024, "BYTES", "longest stop string")
    max_stop_token_ids: int = _limit(1024, "N", "most stop token ids of a request")
    max_logit_bias: int = _limit(1024, "N", "most entries of logit_bias")
    max_bad_words: int = _limit(256, "N", "most bad_words of a request")
    max_bad_word_chars: int = _limit(256, "N", "longest of them, in characters")
    max_allowed_token_ids: int = _limit(1 << 14, "N", "most allowed_token_ids of a request")
    max_tools: int = _limit(128, "N", "most tools of a request")
    max_schema_bytes: int = _limit(64 << 10, "BYTES", "largest JSON schema, regex or grammar")
    max_schema_nodes: int = _limit(5000, "N", "most values in a JSON schema")
    max_schema_depth: int = _limit(64, "N", "most levels of nesting in a JSON schema")
    max_compile_time_s: float = _limit(1.0, "SECONDS", "time to compile a JSON schema, regex or grammar; more gets 400")
    max_logprob_cells: int = _limit(
        2_000_000, "N", "most log-probabilities one call may ask for: positions times alternatives"
    )
    # ---- all of them together
    max_waiting: int | None = _limit(
        None, "N", "sequences that may wait beyond --max-num-seqs; more get 429 (default: 4 x, at least 64)"
    )
    max_waiting_tokens: int | None = _limit(
        None,
        "N",
        "prompt tokens that may wait; more get 429 (default: 1024 for each sequence that may wait, or 8 x "
        "the context where that is more)",
    )
    max_waiting_time_s: float = _limit(
        120.0, "SECONDS", "time a request may wait before it starts; then, or when that can be foreseen, it gets 503"
    )
    max_memory_percent: int = _limit(
        95,
        "PERCENT",
        "memory held, of what the container or the machine has; beyond it new requests get 503; 0: any",
    )
    max_request_time_s: float = _limit(3600.0, "SECONDS", "time from admission to the last token; then it gets 504")
    # ---- connections
    max_connections: int = _limit(
        4096, "N", "open connections; beyond them the longest idle one makes room, or the new one gets 503"
    )
    max_connections_per_address: int = _limit(2048, "N", "the same for the connections of one client address")
    header_timeout_s: float = _limit(10.0, "SECONDS", "time for a client to send a whole request head")
    body_timeout_s: float = _limit(30.0, "SECONDS", "time for a client to send its body; then it gets 408")
    min_body_rate: int = _limit(1024, "BYTES", "bytes a second at which a body must arrive after its first 5 seconds")
    max_body_chunks: int = _limit(65_536, "N", "most chunks of a chunked body; more get 413")
    write_timeout_s: float = _limit(30.0, "SECONDS", "time a client may leave an answer unread before it is dropped")
    keepalive_timeout_s: float = _limit(75.0, "SECONDS", "time an idle connection stays open between requests")
    # ---- the engine
    step_timeout_s: float | None = _limit(
        None,
        "SECONDS",
        "time one engine step may take before the engine counts as hung (default: 60 on GPUs, else 300)",
    )

    # Longer text is tokenised on a worker thread, so the event loop never stalls.
    inline_tokenize_chars: int = 4096

    def max_prompt_chars(self, max_model_len: int) -> int:
        """Text longer than this cannot fit the context with any tokenizer worth its name."""
        return 16 * max_model_len + (64 << 10)

    def waiting_limit(self, max_num_seqs: int) -> int:
        return self.max_waiting if self.max_waiting is not None else max(64, 4 * max_num_seqs)

    def waiting_tokens_limit(self, max_num_seqs: int, max_model_len: int) -> int:
        if self.max_waiting_tokens is not None:
            return self.max_waiting_tokens
        return max(8 * max_model_len, 1024 * self.waiting_limit(max_num_seqs))

    def step_limit(self, device: str) -> float:
        """Seconds; 0: none."""
        if self.step_timeout_s is not None:
            return self.step_timeout_s
        return 60.0 if device.startswith("cuda") else 300.0

    def in_force(self, max_num_seqs: int, max_model_len: int, device: str) -> dict[str, int | float]:
        """Every limit by its flag's name, those chosen from the engine's included."""
        values = {flag_name(limit): getattr(self, limit.name) for limit in flags()}
        values["max-waiting"] = self.waiting_limit(max_num_seqs)
        values["max-waiting-tokens"] = self.waiting_tokens_limit(max_num_seqs, max_model_len)
        values["step-timeout"] = self.step_limit(device)
        values["max-json-items"] = max(self.max_json_items, max_model_len)
        return values


def flags() -> list[Field[Any]]:
    """The fields of Limits that users can set."""
    return [one for one in fields(Limits) if "help" in one.metadata]


def flag_name(limit: Field[Any]) -> str:
    """As on the command line, without its dashes in front."""
    return limit.name.removesuffix("_s").replace("_", "-")
