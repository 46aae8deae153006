"""Prometheus metrics with vLLM v1's names, types, labels and buckets, so that its dashboards work unchanged.

Gauges and totals are read from the engine when somebody scrapes; everything else comes from the report of each poll
and costs nothing per token. Event loop only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fastllm.server.histogram import HISTOGRAMS, Histogram, make_histograms

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM, FinishedRequest, StepReport

__all__ = ["CONTENT_TYPE", "Metrics"]

FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")
REJECTION_REASONS = ("max_num_queued_reqs", "max_num_queued_tokens")


class Metrics(Collector):
    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._name = llm.model_config.served_model_names[0]
        self._histograms = make_histograms(llm.model_config.max_model_len)
        self._success = dict.fromkeys(FINISHED_REASONS, 0)
        self._rejections = dict.fromkeys(REJECTION_REASONS, 0)
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._seen_steps = 0  # engine steps and tokens already in iteration_tokens_total
        self._seen_tokens = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
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

    def render(self) -> bytes:
        return generate_latest(self._registry)

    # ---- scrape

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.stats()
        self._observe_steps(stats.num_steps, stats.prompt_tokens + stats.generated_tokens)
        waiting = stats.num_waiting + stats.num_swapped
        yield self._gauge("num_requests_running", "Sequences that run.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait.", waiting)
        by_reason = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait, by reason.",
            labels=["model_name", "engine", "reason"],
        )
        by_reason.add_metric([self._name, "0", "capacity"], stats.num_waiting)
        by_reason.add_metric([self._name, "0", "deferred"], stats.num_swapped)
        yield by_reason
        usage = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        yield self._gauge("gpu_cache_usage_perc", "The older name of kv_cache_usage_perc.", usage)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that produced a token.", self._prompt_tokens)
        yield self._counter("prompt_tokens_cached", "Prompt tokens from the prefix cache.", self._cached_tokens)
        by_source = {"local_compute": self._prompt_tokens - self._cached_tokens, "local_cache_hit": self._cached_tokens}
        yield self._labelled("prompt_tokens_by_source", "Prompt tokens by where their KV is from.", "source", by_source)
        yield self._counter("generation_tokens", "Output tokens.", stats.generated_tokens)
        yield self._counter("num_preemptions", "Preemptions.", stats.num_preemptions)
        yield self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits)
        yield self._labelled("request_success", "Finished requests.", "finished_reason", self._success)
        rejections = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused before they ran.", labels=["model_name", "reason"]
        )
        for reason, count in self._rejections.items():
            rejections.add_metric([self._name, reason], count)
        yield rejections
        yield self._config_info(stats.total_blocks)
        for name, histogram in self._histograms.items():
            yield self._histogram(name, HISTOGRAMS[name][1], histogram)
        tokens = self._histograms["inter_token_latency_seconds"]
        yield self._histogram("time_per_output_token_seconds", "The older name of inter_token_latency_seconds.", tokens)
        yield self._counter("kv_block_leaks", "Blocks in use while idle; stays 0.", stats.block_leaks, "fastllm")
        yield self._counter("engine_steps", "Engine steps.", stats.num_steps, "fastllm")
        yield self._gauge("kv_blocks", "KV blocks.", stats.total_blocks, "fastllm")
        yield self._gauge("kv_blocks_used", "KV blocks held by sequences.", stats.used_blocks, "fastllm")
        yield self._gauge("kv_blocks_cached", "Unused KV blocks that can be matched.", stats.cached_blocks, "fastllm")
        yield self._gauge("last_step_age_seconds", "Since the engine's last turn.", stats.last_step_age_s, "fastllm")

    def _observe_steps(self, steps: int, tokens: int) -> None:
        """Steps since the last scrape share one mean, so count and sum are exact at no cost per step."""
        new_steps = steps - self._seen_steps
        if new_steps > 0:
            self.observe("iteration_tokens_total", (tokens - self._seen_tokens) / new_steps, new_steps)
            self._seen_steps, self._seen_tokens = steps, tokens

    def _gauge(self, name: str, text: str, value: float, prefix: str = "vllm") -> Metric:
        family = GaugeMetricFamily(f"{prefix}:{name}", text, labels=["model_name", "engine"])
        family.add_metric([self._name, "0"], value)
        return family

    def _counter(self, name: str, text: str, value: float, prefix: str = "vllm") -> Metric:
        family = CounterMetricFamily(f"{prefix}:{name}", text, labels=["model_name", "engine"])
        family.add_metric([self._name, "0"], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
        family.add_metric([self._name, "0"], histogram.cumulative(), histogram.sum)
        return family

    def _labelled(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine", label])
        for key, count in values.items():
            family.add_metric([self._name, "0", key], count)
        return family

    def _config_info(self, total_blocks: int) -> Metric:
        config = self._llm.engine_config
        tokens = total_blocks * config.block_size
        values = {
            "engine": "0",
            "block_size": config.block_size,
            "cache_dtype": config.dtype,
            "enable_prefix_caching": config.prefix_caching,
            "num_gpu_blocks": total_blocks,
            "kv_cache_size_tokens": tokens,
            "kv_cache_max_concurrency": round(tokens / self._llm.model_config.max_model_len, 2),
            "swap_space_bytes": config.swap_bytes,
            "device": config.device,
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=list(values))
        family.add_metric([str(value) for value in values.values()], 1)
        return family
