"""Metrics under the names of older guides and dashboards, for --metric-aliases.

`vllm_*` are the names of a deployment guide; the rest are vLLM's own of before its v1. Averages are over the last
window that `StatsWindow` closed, 0 where nothing happened in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastllm.server.exposition import Page
from fastllm.server.histogram import Histogram
from fastllm.server.stats_window import WindowFigures

if TYPE_CHECKING:
    from fastllm import _core


def write_aliases(
    page: Page,
    stats: _core.EngineStats,
    queued: int,  # sequences that wait outside the engine
    figures: WindowFigures,
    queue_time: Histogram,
    params_n: Histogram,
) -> None:
    waiting = queued + stats.num_waiting + stats.num_swapped
    usage = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
    hit_rate = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
    for name, help, value in (
        ("vllm_num_requests_running", "The same as vllm:num_requests_running.", stats.num_running),
        ("vllm_num_requests_waiting", "The same as vllm:num_requests_waiting.", waiting),
        ("vllm_queue_size", "The same as vllm:num_requests_waiting.", waiting),
        ("vllm_gpu_cache_usage_perc", "The same as vllm:kv_cache_usage_perc: 0 to 1.", usage),
        ("vllm_avg_prompt_throughput", "Prompt tokens per second.", figures.prompt_tokens_s),
        ("vllm_avg_generation_throughput", "Output tokens per second.", figures.output_tokens_s),
        ("vllm_avg_time_to_first_token_seconds", "Mean seconds to the first token.", figures.first_token_s),
        ("vllm_avg_time_per_output_token_seconds", "Mean seconds between tokens.", figures.inter_token_s),
        ("vllm:avg_prompt_throughput_toks_per_s", "Prompt tokens per second.", figures.prompt_tokens_s),
        ("vllm:avg_generation_throughput_toks_per_s", "Output tokens per second.", figures.output_tokens_s),
        ("vllm:num_requests_swapped", "Sequences whose KV blocks are in host memory.", stats.num_swapped),
        ("vllm:gpu_prefix_cache_hit_rate", "Share of looked-up tokens found, since the start.", hit_rate),
    ):
        page.gauge(name, help, value)
    page.histogram("vllm_queue_time_seconds", "The same as vllm:request_queue_time_seconds.", queue_time)
    page.histogram("vllm:request_params_best_of", "The same as vllm:request_params_n.", params_n)
