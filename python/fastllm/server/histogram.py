"""A histogram for the event loop: one bisection per observation, no locks, several equal observations at once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_REQUEST_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKEN_LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)  # seconds
# Name without prefix -> (bucket bounds, help). Bounds None: the 1-2-5 series up to the context's length.
HISTOGRAMS: dict[str, tuple[Sequence[float] | None, str]] = {
    "time_to_first_token_seconds": (_FIRST_TOKEN, "Seconds from arrival to the first token."),
    "inter_token_latency_seconds": (_TOKEN_LATENCY, "Seconds between output tokens."),
    "request_time_per_output_token_seconds": (_TOKEN_LATENCY, "Mean seconds per output token of a request."),
    "e2e_request_latency_seconds": (_REQUEST_LATENCY, "Seconds from arrival to the last token."),
    "request_queue_time_seconds": (_REQUEST_LATENCY, "Seconds a request waited before its first step."),
    "request_inference_time_seconds": (_REQUEST_LATENCY, "Seconds from the first step to the last token."),
    "request_prefill_time_seconds": (_REQUEST_LATENCY, "Seconds from the first step to the first token."),
    "request_decode_time_seconds": (_REQUEST_LATENCY, "Seconds from the first token to the last."),
    "iteration_tokens_total": (tuple(1 if i == 0 else 4 << i for i in range(13)), "Tokens of one engine step."),
    "request_params_n": ((1, 2, 5, 10, 20), "The n of requests."),
    "request_num_preemptions": ((1, 2, 3, 4, 5, 10, 20), "Preemptions of a request."),
    "request_prompt_tokens": (None, "Prompt tokens of a request."),
    "request_generation_tokens": (None, "Output tokens of a request."),
    "request_max_num_generation_tokens": (None, "Output tokens of a request's longest sample."),
    "request_params_max_tokens": (None, "The max_tokens of requests."),
    "request_prefill_kv_computed_tokens": (None, "Prompt tokens computed, prefix cache hits not counted."),
}


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)  # per bucket, not cumulative; the last one is +Inf
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    @property
    def total(self) -> int:
        """Observations."""
        return sum(self.counts)


def one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, ... up to `limit`."""
    values: list[float] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > limit:
                return values
            values.append(digit * scale)
        scale *= 10


def make_histograms(max_model_len: int) -> dict[str, Histogram]:
    return {
        name: Histogram(one_two_five(max_model_len) if bounds is None else bounds)
        for name, (bounds, _) in HISTOGRAMS.items()
    }
