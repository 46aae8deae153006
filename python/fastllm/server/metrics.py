"""Prometheus metrics with vLLM v1's names, types, labels and buckets, so that its dashboards work unchanged.

Gauges and totals are read from the engine when somebody scrapes; everything else comes from the report of each poll
and costs nothing per token. Event loop only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest

from fastllm.server.exposition import CONTENT_TYPE, Labels, Page
from fastllm.server.histogram import HISTOGRAMS, make_histograms
from fastllm.server.http_metrics import HttpMetrics
from fastllm.server.metric_aliases import write_aliases
from fastllm.server.stats_window import StatsWindow, WindowFigures

if TYPE_CHECKING:
    from fastllm import _core
    from fastllm.async_llm import AsyncLLM, FinishedRequest, StepReport

__all__ = ["CONTENT_TYPE", "Metrics"]

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTION_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens", "queue_time")
_CACHE_SOURCES = ("device", "host", "p2p", "disk", "external_unspecified")
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


class Metrics:
    def __init__(self, llm: AsyncLLM, http: HttpMetrics | None = None, *, aliases: bool = False) -> None:
        """aliases: the names of older guides and dashboards, too."""
        self._llm = llm
        self.queued: Callable[[], int] = lambda: 0  # sequences that wait outside the engine
        self._http = http or HttpMetrics()
        self._aliases = aliases
        self._name = llm.model_config.served_model_names[0]
        self._created = time.time()
        self._histograms = make_histograms(llm.model_config.max_model_len)
        self._window = StatsWindow(
            self._histograms["time_to_first_token_seconds"], self._histograms["inter_token_latency_seconds"]
        )
        self.close_window()
        self._success = dict.fromkeys(FINISHED_REASONS, 0)
        self._rejections = dict.fromkeys(REJECTION_REASONS, 0)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._seen_steps = 0  # engine steps and tokens already in iteration_tokens_total
        self._seen_tokens = 0
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        llm.add_step_observer(self.on_step)

    def rejected(self, reason: str) -> None:
        self._rejections[reason] += 1

    def observe(self, name: str, value: float, count: int = 1) -> None:
        self._histograms[name].observe(value, count)

    def aborted(self) -> None:
        """A client went away before its request was finished."""
        self._success["abort"] += 1

    def on_step(self, report: StepReport) -> None:
        self._prompt_tokens += report.num_prompt_tokens
        self._cached_tokens += report.num_cached_tokens
        for seconds in report.first_token_s:
            self.observe("time_to_first_token_seconds", seconds)
        for seconds, tokens in report.inter_token_s:
            self.observe("inter_token_latency_seconds", seconds, tokens)
        for request in report.finished:
            self._finished(request)

    def _finished(self, request: FinishedRequest) -> None:
        reason = request.finish_reasons[0]  # a request counts once; its samples nearly always end alike
        self._success[reason if reason in self._success else "error"] += 1
        if reason == "error":
            return
        params, times = request.params, request.metrics
        per_sample = request.num_generated_tokens / params.n
        self.observe("request_prompt_tokens", request.num_prompt_tokens)
        self.observe("request_generation_tokens", request.num_generated_tokens)
        self.observe("request_max_num_generation_tokens", math.ceil(per_sample))
        self.observe("request_prefill_kv_computed_tokens", request.num_prompt_tokens - request.num_cached_tokens)
        self.observe("request_params_n", params.n)
        self.observe("request_num_preemptions", times.num_preemptions)
        if params.max_tokens is not None:
            self.observe("request_params_max_tokens", params.max_tokens)
        if not (times.arrival_time and times.first_scheduled_time and times.first_token_time):
            return
        # A stop string ends a request before the engine knows that it is over.
        end = times.finished_time or time.monotonic()
        decode = end - times.first_token_time
        self.observe("e2e_request_latency_seconds", end - times.arrival_time)
        self.observe("request_queue_time_seconds", times.first_scheduled_time - times.arrival_time)
        self.observe("request_inference_time_seconds", end - times.first_scheduled_time)
        self.observe("request_prefill_time_seconds", times.first_token_time - times.first_scheduled_time)
        self.observe("request_decode_time_seconds", decode)
        if per_sample > 1:
            self.observe("request_time_per_output_token_seconds", decode / (per_sample - 1))

    def close_window(self) -> WindowFigures:
        """Ends the window of the averages and begins the next."""
        return self._window.close(self._llm.stats(), time.monotonic())

    # ---- scrape

    def render(self) -> bytes:
        stats = self._llm.stats()
        self._observe_steps(stats.num_steps, stats.prompt_tokens + stats.generated_tokens)
        page = Page((("engine", "0"), ("model_name", self._name)), self._created)
        self._write_gauges(page, stats)
        self._write_counters(page, stats)
        for name, histogram in self._histograms.items():
            page.histogram(f"vllm:{name}", HISTOGRAMS[name][1], histogram)
        tokens = self._histograms["inter_token_latency_seconds"]
        page.histogram("vllm:time_per_output_token_seconds", "The older name of inter_token_latency_seconds.", tokens)
        self._write_own(page, stats)
        if self._aliases:
            queue_time, params_n = (self._histograms[n] for n in ("request_queue_time_seconds", "request_params_n"))
            write_aliases(page, stats, self.queued(), self._window.figures, queue_time, params_n)
        server = Page((), self._created)
        rejections = [((("model_name", self._name), ("reason", r)), n) for r, n in self._rejections.items()]
        server.counters("vllm:admission_rejections", "Requests refused before they ran.", rejections)
        server.gauges("vllm:cache_config_info", "The KV cache's configuration.", [(self._config(stats), 1)])
        self._http.write(server)
        return page.encode() + server.encode() + generate_latest(self._process)

    def _write_gauges(self, page: Page, stats: _core.EngineStats) -> None:
        page.gauge("vllm:num_requests_running", "Sequences that run.", stats.num_running)
        unstarted = stats.num_waiting + self.queued()
        page.gauge("vllm:num_requests_waiting", "Sequences that wait.", unstarted + stats.num_swapped)
        by_reason = {"capacity": unstarted, "deferred": stats.num_swapped}
        page.gauges("vllm:num_requests_waiting_by_reason", "Sequences that wait, by reason.", _by("reason", by_reason))
        usage = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        page.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        page.gauge("vllm:gpu_cache_usage_perc", "The older name of kv_cache_usage_perc.", usage)
        states = {state: int(state == "awake") for state in _SLEEP_STATES}
        page.gauges("vllm:engine_sleep_state", "The engine never sleeps.", _by("sleep_state", states))

    def _write_counters(self, page: Page, stats: _core.EngineStats) -> None:
        prompt, cached = self._prompt_tokens, self._cached_tokens
        page.counter("vllm:prompt_tokens", "Prompt tokens of requests that produced a token.", prompt)
        page.counter("vllm:prompt_tokens_cached", "Prompt tokens from the prefix cache.", cached)
        by_source = {"local_compute": prompt - cached, "local_cache_hit": cached, "external_kv_transfer": 0}
        page.counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV is from.", _by("source", by_source)
        )
        by_cache = dict.fromkeys(_CACHE_SOURCES, 0) | {"device": cached}
        page.counters(
            "vllm:prompt_tokens_cached_by_source", "Prompt tokens from caches, by cache.", _by("source", by_cache)
        )
        page.counter("vllm:generation_tokens", "Output tokens.", stats.generated_tokens)
        page.counter("vllm:num_preemptions", "Preemptions.", stats.num_preemptions)
        page.counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries)
        page.counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits)
        for cache in ("external_prefix", "mm"):
            page.counter(f"vllm:{cache}_cache_queries", "There is no such cache.", 0)
            page.counter(f"vllm:{cache}_cache_hits", "There is no such cache.", 0)
        page.counters("vllm:request_success", "Finished requests.", _by("finished_reason", self._success))

    def _write_own(self, page: Page, stats: _core.EngineStats) -> None:
        page.counter("fastllm:kv_block_leaks", "Blocks in use while idle; stays 0.", stats.block_leaks)
        page.counter("fastllm:nan_rows", "Requests ended because their logits were not numbers.", stats.nan_rows)
        page.counter("fastllm:engine_steps", "Engine steps.", stats.num_steps)
        page.gauge("fastllm:kv_blocks", "KV blocks.", stats.total_blocks)
        page.gauge("fastllm:kv_blocks_used", "KV blocks held by sequences.", stats.used_blocks)
        page.gauge("fastllm:kv_blocks_cached", "Unused KV blocks that can be matched.", stats.cached_blocks)
        page.gauge("fastllm:last_step_age_seconds", "Since the engine's last turn.", stats.last_step_age_s)

    def _observe_steps(self, steps: int, tokens: int) -> None:
        """Steps since the last scrape share one mean, so count and sum are exact at no cost per step."""
        new_steps = steps - self._seen_steps
        if new_steps > 0:
            self.observe("iteration_tokens_total", (tokens - self._seen_tokens) / new_steps, new_steps)
            self._seen_steps, self._seen_tokens = steps, tokens

    def _config(self, stats: _core.EngineStats) -> Labels:
        config = self._llm.engine_config
        tokens = stats.total_blocks * config.block_size
        values = {
            "engine": "0",
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "enable_prefix_caching": config.prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "num_gpu_blocks": stats.total_blocks,
            "kv_cache_size_tokens": tokens,
            "kv_cache_max_concurrency": round(tokens / self._llm.model_config.max_model_len, 2),
            "prefix_caching_hash_algo": "exact",
            "swap_space_bytes": config.swap_bytes,
            "device": config.device,
        }
        return tuple((name, str(value)) for name, value in values.items())


def _by(label: str, values: dict[str, int]) -> list[tuple[Labels, float]]:
    return [(((label, key),), count) for key, count in values.items()]
