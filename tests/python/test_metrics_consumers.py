"""What reads /metrics finds what it asks for: Prometheus's linter, vLLM's dashboards, guides with older names."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server_fixtures import RunningServer, metric, running_server, wait_until

QUERIES = [
    line
    for line in (Path(__file__).parent / "data" / "grafana_queries.txt").read_text().splitlines()
    if not line.startswith("#")
]
# The names are vLLM's: a colon, a histogram that ends like a counter, a unit in short.
TOLERATED = (
    "metric names should not contain ':'",
    'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix',
    "_throughput_toks_per_s metric names should not contain abbreviated units",
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """After some load: finished, streamed, refused and abandoned requests."""
    with running_server(metric_aliases=True) as running:
        for n in (1, 2):
            running.complete(max_tokens=20, n=n, ignore_eos=True)
        running.complete(max_tokens=20, stream=True, ignore_eos=True)
        text = running.complete(max_tokens=20, temperature=0, ignore_eos=True).json["choices"][0]["text"]
        running.complete(max_tokens=20, temperature=0, ignore_eos=True, stop=text[5:8])
        running.complete(stop="", max_tokens=1)
        running.chat(model="no-such-model")
        running.ask("GET", "/nowhere")
        abandon(running)
        running.server._housekeeping.report()
        yield running


def abandon(server: RunningServer) -> None:
    """A client that leaves in the middle of a stream."""

    async def leave() -> None:
        body = {"prompt": "Hello", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
        async with aiohttp.ClientSession() as session, session.post(server.url + "/v1/completions", json=body) as reply:
            await reply.content.readline()
            reply.close()

    asyncio.run(leave())
    server.wait_idle()


def scrape(server: RunningServer) -> str:
    return server.ask("GET", "/metrics").body.decode()


def test_promtool_has_no_complaint_but_about_names_of_vllm(server: RunningServer) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=scrape(server), capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if not line.endswith(TOLERATED)]
    assert complaints == [] and done.returncode in (0, 3)


def test_the_text_is_strict(server: RunningServer) -> None:
    text = scrape(server)
    assert len(text) < 200_000
    families: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in families, f"{family.name} comes twice"
        assert family.documentation and family.type != "unknown", family.name
        families[family.name] = family
        seen = set()
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in seen, key
            seen.add(key)
            assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", sample.name)
            assert sample.name.endswith("_total") or family.type != "counter", sample.name
            assert "le" not in sample.labels or sample.name.endswith("_bucket")
        if family.type == "histogram":
            check_buckets(family)
    assert {"counter", "gauge", "histogram", "summary"} == {family.type for family in families.values()}
    heads = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(heads) == len(set(heads)) == 2 * len([line for line in heads if line.startswith("# TYPE")])


def check_buckets(family: Metric) -> None:
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    counts: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in family.samples:
        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
        if sample.name.endswith("_bucket"):
            series.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_count"):
            counts[labels] = sample.value
    assert series.keys() == counts.keys(), family.name
    for labels, buckets in series.items():
        assert buckets == sorted(buckets) and buckets[-1] == (float("inf"), counts[labels]), family.name


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_vllms_dashboards_returns_data(query: str, server: RunningServer) -> None:
    samples = [s for family in text_string_to_metric_families(scrape(server)) for s in family.samples]
    grouped = {name for group in re.findall(r"by ?\(([^)]*)\)", query) for name in re.split(r", ?", group)}
    grouped |= set(re.findall(r"label_values\([^,]+,(\w+)\)", query))
    selectors = re.findall(r"((?:vllm:|http_|process_)\w+)(?:\{([^}]*)\})?", query)
    assert selectors
    for name, conditions in selectors:
        wanted = dict(re.findall(r'(\w+)="([^"]*)"', conditions.replace("$model_name", "null")))
        found = [s for s in samples if s.name == name and wanted.items() <= s.labels.items()]
        assert found, f"no series of {name} has {wanted}"
        assert all(grouped <= s.labels.keys() for s in found), f"{name} has no {grouped}"
        if ("rate(" in query or "increase(" in query) and "_queue_time" not in name and "prefix_cache_hits" not in name:
            assert any(s.value > 0 for s in found), f"{name} stayed 0 under load"


def test_requests_that_were_abandoned_count_as_aborts(server: RunningServer) -> None:
    assert server.metric("vllm:request_success_total", finished_reason="abort") == 1


def test_http_requests_are_counted_by_route_and_refusals_by_reason(server: RunningServer) -> None:
    def count(handler: str, status: str, method: str = "POST") -> float:
        return server.metric("http_requests_total", handler=handler, method=method, status=status)

    assert count("/v1/completions", "2xx") == 5 and count("/v1/completions", "4xx") == 2  # one of them a 499
    assert count("none", "4xx", "GET") == 1
    assert server.metric("fastllm:requests_refused_total", code="model_not_found") == 1
    assert server.metric("http_response_size_bytes_sum", handler="/v1/completions") > 1000


def test_names_of_older_guides_agree_with_the_new_ones(server: RunningServer) -> None:
    pairs = {
        "vllm_num_requests_running": "vllm:num_requests_running",
        "vllm_num_requests_waiting": "vllm:num_requests_waiting",
        "vllm_gpu_cache_usage_perc": "vllm:kv_cache_usage_perc",
        "vllm_queue_time_seconds_count": "vllm:request_queue_time_seconds_count",
    }
    for old, new in pairs.items():
        assert server.metric(old) == server.metric(new)
    for name in ("vllm_avg_generation_throughput", "vllm_avg_time_to_first_token_seconds",
                 "vllm_avg_time_per_output_token_seconds"):  # fmt: skip
        assert server.metric(name) >= 0
    window = server.state.metrics.close_window()  # type: ignore[union-attr]
    server.complete(max_tokens=50, ignore_eos=True)
    window = server.state.metrics.close_window()  # type: ignore[union-attr]
    assert abs(window.output_tokens_s * window.seconds - 50) < 1e-6
    assert server.metric("vllm_avg_generation_throughput") == window.output_tokens_s
    assert window.first_token_s > 0 and window.inter_token_s > 0


def test_aliases_are_off_unless_asked_for() -> None:
    with running_server() as plain:
        text = scrape(plain)
    assert "vllm_" not in text and "toks_per_s" not in text


def test_a_stalled_event_loop_shows_in_its_lag(server: RunningServer) -> None:
    import time

    async def stall() -> None:
        time.sleep(0.3)

    def late() -> float:
        text = scrape(server)  # one, or a tick between two would count in one of them only
        name = "fastllm:event_loop_lag_seconds"
        return metric(text, f"{name}_count") - metric(text, f"{name}_bucket", le="0.1")

    before = late()
    server.run(stall())
    wait_until(lambda: late() > before, 5)


def test_stats_say_why_requests_wait() -> None:
    with running_server({"max_num_seqs": 1}) as server:
        assert server.ask("GET", "/stats").json["waiting_reason"] is None

        async def two() -> None:
            async with aiohttp.ClientSession() as session:
                body = {"prompt": "Hello", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
                replies = [asyncio.ensure_future(session.post(server.url + "/v1/completions", json=body))
                           for _ in range(2)]  # fmt: skip
                stats: dict = {}
                while not stats.get("waiting_reason"):
                    async with session.get(server.url + "/stats") as reply:
                        stats = await reply.json()
                assert stats["waiting_reason"] == "1 sequences run, the most that may (--max-num-seqs)."
                assert stats["scheduler"]["lacking"] == "slots" and stats["scheduler"]["waiting"] == 1
                assert 0 < stats["kv_cache"]["usage"] < 1 and stats["prefix_cache"]["enabled"] is True
                for reply in replies:
                    reply.cancel()

        asyncio.run(two())
        server.wait_idle()


def test_load_counts_accepted_requests(server: RunningServer) -> None:
    assert server.ask("GET", "/load").json == {"server_load": 0}
