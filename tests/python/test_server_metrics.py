"""/metrics, /stats and the small endpoints: the names dashboards ask for, and figures that add up."""

from __future__ import annotations

import pytest

from server_fixtures import CONTEXT, RunningServer, running_server

# What vLLM v1's own test suite expects to find.
EXPECTED = """
num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total admission_rejections_total prompt_tokens_total generation_tokens_total
cache_config_info request_success_total
""".split()
EXPECTED_HISTOGRAMS = """
iteration_tokens_total request_prompt_tokens request_generation_tokens request_params_n request_params_max_tokens
time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds
request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds request_num_preemptions
""".split()


@pytest.fixture
def server():
    with running_server() as running:
        yield running


def test_every_name_is_there_and_zero_from_the_start(server: RunningServer) -> None:
    reply = server.ask("GET", "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    text = reply.body.decode()
    for name in EXPECTED + [f"{h}_{part}" for h in EXPECTED_HISTOGRAMS for part in ("sum", "count", "bucket")]:
        assert f"\nvllm:{name}{{" in text, name
    constant = ("config_info", "_created", 'sleep_state="awake"')
    lines = [line for line in text.splitlines() if line.startswith("vllm:")]
    samples = [line for line in lines if not any(name in line for name in constant)]
    assert all(line.endswith(" 0.0") for line in samples)
    for reason in ("stop", "length", "abort", "error"):
        assert server.metric("vllm:request_success_total", finished_reason=reason, model_name="null", engine="0") == 0


def test_counters_equal_what_clients_were_told(server: RunningServer) -> None:
    fields = {"max_tokens": 30, "ignore_eos": True}
    whole = server.complete(**fields, n=2).json["usage"]
    server.complete(**fields, stream=True)
    assert server.metric("vllm:prompt_tokens_total") == 2 * whole["prompt_tokens"]
    assert server.metric("vllm:generation_tokens_total") == whole["completion_tokens"] + 30
    assert server.metric("vllm:request_success_total", finished_reason="length") == 2
    assert server.metric("vllm:time_to_first_token_seconds_count") == 2
    assert server.metric("vllm:e2e_request_latency_seconds_count") == 2
    assert server.metric("vllm:request_generation_tokens_sum") == 90
    assert server.metric("vllm:request_params_n_sum") == 3
    assert server.metric("vllm:request_params_max_tokens_bucket", le="50.0") == 2
    assert server.metric("vllm:request_params_max_tokens_bucket", le="20.0") == 0
    # The first token of a sample has no gap before it.
    assert 29 <= server.metric("vllm:inter_token_latency_seconds_count") <= 30 * 3 - 2
    steps = server.metric("vllm:iteration_tokens_total_count")
    assert steps == server.metric("fastllm:engine_steps_total") > 0
    assert server.metric("fastllm:kv_block_leaks_total") == 0


def test_exposition_parses_and_counters_only_grow(server: RunningServer) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def scrape() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = server.ask("GET", "/metrics").body.decode()
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation and family.type in ("counter", "gauge", "histogram", "summary"), family.name
            # These have a series for every route that was asked for, and for every reason that there was.
            if family.name.startswith(("http_", "fastllm:requests_refused")):
                continue
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in values, f"{key} twice"
                values[key] = sample.value
                kinds[sample.name] = family.type
            if family.type == "histogram":
                buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
                assert buckets == sorted(buckets)
                assert buckets[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))
        return values

    kinds: dict[str, str] = {}
    before = scrape()
    for stream in (False, True):
        server.complete(max_tokens=20, n=2, stream=stream)
        server.complete(max_tokens=0)
        after = scrape()
        assert before.keys() == after.keys(), "series come and go"
        for key, value in after.items():
            if kinds[key[0]] != "gauge":
                assert value >= before[key], key
        before = after
    server.wait_idle()
    for (name, _), value in scrape().items():
        if name.startswith(
            ("vllm:num_requests", "vllm:kv_cache_usage", "vllm:gpu_cache_usage", "fastllm:kv_blocks_used")
        ):
            assert value == 0, name


def test_both_generations_of_names_agree(server: RunningServer) -> None:
    server.complete(max_tokens=20, ignore_eos=True)
    new, old = (
        server.metric(f"vllm:{name}_count") for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")
    )
    assert new == old > 0
    sources = [
        server.metric("vllm:prompt_tokens_by_source_total", source=source)
        for source in ("local_compute", "local_cache_hit")
    ]
    assert sum(sources) == server.metric("vllm:prompt_tokens_total") > 0


def test_no_label_comes_from_a_request(server: RunningServer) -> None:
    server.complete(user="canary", cache_salt="canary", max_tokens=1)
    server.ask("GET", "/canary")
    server.complete(model="canary")
    assert b"canary" not in server.ask("GET", "/metrics").body


def test_models_list_has_the_fields_clients_read(server: RunningServer) -> None:
    body = server.ask("GET", "/v1/models").json
    assert body["object"] == "list"
    (card,) = body["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("null", "model", CONTEXT)
    assert card["permission"][0]["object"] == "model_permission"


def test_tokenize_and_detokenize_are_inverse(server: RunningServer) -> None:
    text = "Grüße, 世界 🙂"
    tokens = server.ask("POST", "/tokenize", {"prompt": text, "return_token_strs": True}).json
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) and tokens["max_model_len"] == CONTEXT
    assert server.ask("POST", "/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": text}


def test_long_text_is_tokenised_like_short_text(server: RunningServer) -> None:
    text = "ab" * 5000  # beyond what is tokenised on the event loop
    assert server.ask("POST", "/tokenize", {"prompt": text}).json["tokens"] == list(text.encode())
    assert server.ask("POST", "/detokenize", {"tokens": list(text.encode())}).json["prompt"] == text


def test_version_stats_and_probes(server: RunningServer) -> None:
    from fastllm import __version__

    assert server.ask("GET", "/version").json == {"version": __version__}
    stats = server.ask("GET", "/stats").json
    assert stats["phase"] == "ready" and stats["engine"]["num_running"] == 0 and stats["engine"]["total_blocks"] > 0
    for path in ("/live", "/health", "/ready", "/ping"):
        assert server.ask("GET", path).status == 200
    assert server.ask("POST", "/ping").status == 200
