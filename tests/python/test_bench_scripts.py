"""The GPU and front-end benchmark scripts, with a tiny model or none: they run, and tables say what results say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastllm import _core

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def gpu_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_module("gpu_tables", monkeypatch)


def script_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


def run_script(name: str, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(BENCH / name), *arguments], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_workloads_of_a_tiny_shape_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    run_script("gpu_workloads.py", "--shape", "tiny", "--device", "cpu", "--only", "latency,batch", "--json", str(file))
    result = json.loads(file.read_text())
    assert "failed" not in result
    assert result["bs1_128_128"]["tpot_ms"] > 0 and result["ttft_4000"] > 0
    batch = result["static_b256_128_128"]
    assert batch["reqs"] == 256 and batch["steps"] >= 128
    assert batch["out_tok_s"] == pytest.approx(256 * 128 / batch["s"])
    assert 0 < result["bs1_128_128"]["host_us_per_step"]
    assert 0 < batch["host_us_per_step"] < batch["us_per_step"]


@pytest.mark.parametrize("kind", ["", "--chat"])
def test_streams_of_the_front_end_carry_every_token(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = ["--streams", "8", "--tokens", "50", "--repeats", "1", "--json", str(file)]
    run_script("front_end.py", *options, *([kind] if kind else []))
    (run,) = json.loads(file.read_text())
    assert run["tokens"] == 8 * 50
    assert 1 <= run["tokens_per_event"] <= 50 and run["server_us_per_event"] > 0


def test_shared_system_prompt_is_the_sentence_fifty_times_before_three_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = script_module("gpu_prefix", monkeypatch).make_prompts(20, 512)
    assert len(prompts) == 30 and {len(ids) for ids in prompts} == {50 * 20 + 12}
    assert all(ids[:1000] == prompts[0][:20] * 50 for ids in prompts)
    assert len({tuple(ids) for ids in prompts}) == 3


def test_shared_system_prompt_is_computed_once(tmp_path: Path) -> None:
    file = tmp_path / "prefix.json"
    run_script(
        "gpu_prefix.py",
        *("--shape", "tiny", "--device", "cpu", "--sentence-tokens", "4,2", "--repeats", "1", "--json", str(file)),
    )
    result = json.loads(file.read_text())
    case = result["50 x 4 + 12 tokens"]
    assert case["prompt_tokens"] == 212
    for way in ("all at once", "one by one"):
        # The first computes all; the first of each other question the 12 of it and what no whole block of 16 held.
        assert case[way]["hit_rate"] == pytest.approx((2 * 192 + 27 * 208) / (30 * 212))
        assert case[way]["speedup"] > 0 and case[way]["ttft_speedup"] > 0
    assert case["all at once"]["kv_saved"] > 0.4
    assert set(result["50 x 2 + 12 tokens"]) == {"requests", "prompt_tokens", "output_tokens", "all at once"}


def test_cost_of_deterministic_is_measured_beside_plain(tmp_path: Path) -> None:
    file = tmp_path / "deterministic.json"
    arguments = ("--shape", "tiny", "--device", "cpu", "--requests", "4", "--repeats", "2", "--json", str(file))
    run_script("gpu_deterministic.py", *arguments)
    result = json.loads(file.read_text())
    assert result["rounds"] == 2
    ratio = result["deterministic"]["out_tok_s"] / result["plain"]["out_tok_s"]
    assert result["deterministic over plain"]["throughput"] == pytest.approx(ratio)


def test_cases_of_the_kv_cache_share_what_they_should(tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    run_script("gpu_cases.py", "--shape", "tiny", "--device", "cpu", "--max-num-seqs", "16", "--json", str(file))
    result = json.loads(file.read_text())
    assert 0.9 < result["kv_utilisation"]["median"] <= 1
    assert result["shared_samples"]["saved"] > 0.7
    assert result["beam_search"]["saved"] >= 0.55


def test_report_goes_on_after_a_failing_part(tmp_path: Path) -> None:
    (tmp_path / "workloads_tiny.json").write_text(json.dumps({"static_b8_128_128": {"out_tok_s": 300.0}}))
    peer = tmp_path / "peer.json"
    peer.write_text(json.dumps({"model": "/m/tiny", "static_b8_128_128": {"out_tok_s": 200.0}}))
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_report.py"), "--build", str(tmp_path / "nothing"), "--out", str(tmp_path)]
        + ["--only", "kernels", "--shapes", "tiny", "--peer", f"vLLM={peer}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "failed" in done.stdout
    assert "| 8 x 128/128, output tokens/s | 300 | 200 | 1.50x |" in (tmp_path / "report.md").read_text()


def test_a_part_that_takes_too_long_is_ended_and_leaves_no_old_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = script_module("gpu_report", monkeypatch)
    old = tmp_path / "old.json"
    old.write_text("{}")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert not report.run(sleep, old, 0.2)
    assert not old.exists()
    assert report.run([sys.executable, "-c", ""], old, 60)
    assert not report.run([sys.executable, "-c", ""], old, -1)


def test_kernel_results_that_were_cut_off_count_up_to_the_last_whole_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = script_module("gpu_report", monkeypatch)
    file = tmp_path / "kernels.json"
    whole = json.dumps({"context": {}, "benchmarks": [{"name": name, "us": 1.0} for name in "abc"]}, indent=1)
    file.write_text(whole[: whole.index('"c"')])
    assert [one["name"] for one in report.read_json(file)["benchmarks"]] == ["a", "b"]
    file.write_text("")
    assert report.read_json(file) == {}


def test_transformers_table_names_the_best_batch_and_compares_the_same_lengths(gpu_tables: ModuleType) -> None:
    ours = {"static_b1_128_64": {"out_tok_s": 180.0}, "static_b128_128_64": {"out_tok_s": 8000.0}}
    theirs = {
        "transformers": "5.17.0",
        "output_tokens": 64,
        "one_at_a_time": {"requests": 2, "out_tok_s": 10.0},
        "static": {"64": {"out_tok_s": 700.0}, "128": {"out_tok_s": 1000.0}, "256": {"failed": "out of memory"}},
        "best_static": {"batch": 128, "out_tok_s": 1000.0},
        "continuous": {"requests": 128, "out_tok_s": 500.0},
    }
    table = gpu_tables.transformers_table("x", ours, theirs)
    assert "Transformers 5.17.0" in table
    assert "| one at a time | 10.0 | 180.0 | 18.0x |" in table
    assert "| static batch of 64 | 700.0 |  |  |" in table
    assert "| static batch of 128 (best) | 1,000.0 | 8,000.0 | 8.0x |" in table
    assert "| continuous batching of 128 | 500.0 | 8,000.0 | 16.0x |" in table
    failures = gpu_tables.failure_table("x", {"transformers": theirs})
    assert "| transformers, static, 256, failed | out of memory |" in failures
    assert gpu_tables.transformers_table("x", ours, {}) == ""


def test_step_table_says_what_share_of_a_step_is_the_hosts(gpu_tables: ModuleType) -> None:
    result = {"tp_256x128_256": {"s": 2.0, "steps": 400, "out_tok_s": 1.0, "host_us_per_step": 250.0}}
    table = gpu_tables.step_table("x", [("fastllm", result), ("vLLM", {"tp_256x128_256": {"s": 3.0}})])
    assert "| 256 x 128/256 | fastllm | 5,000 | 250.0 | 5.0 % |" in table and "vLLM" not in table


def test_concurrency_counts_one_sequence_with_its_prompt(gpu_tables: ModuleType) -> None:
    result = {"bs1_128_128": {"e2e_ms": 640.0}, "static_b64_128_128": {"out_tok_s": 7000.0}}
    assert gpu_tables.concurrency(result) == [(1, 200.0), (64, 7000.0)]


def test_plots_come_out_as_png(gpu_tables: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kernels = {"benchmarks": [{"name": "norm/64/manual_time", "us": 2.5, "floor": 0.9}]}
    columns = [("fastllm", {"bs1_128_128": {"e2e_ms": 640.0}, "static_b8_128_128": {"out_tok_s": 1000.0}})]
    gpu_tables.plot_kernels(kernels, tmp_path / "kernels.png")
    gpu_tables.plot_concurrency("x", columns, tmp_path / "concurrency.png")
    for name in ("kernels.png", "concurrency.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_plotted_without_matplotlib(
    gpu_tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not gpu_tables.has_matplotlib()
    gpu_tables.plot_concurrency("x", [("fastllm", {"static_b8_128_128": {"out_tok_s": 1.0}})], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_ratios_compare_with_the_best_peer_in_the_right_direction(gpu_tables: ModuleType) -> None:
    columns = [
        ("fastllm", {"bs1_128_128": {"tpot_ms": 5.0}, "tp_100x128_256": {"out_tok_s": 900.0}}),
        ("native", {"bs1_128_128": {"tpot_ms": 1.0}}),
        ("A", {"bs1_128_128": {"tpot_ms": 6.0}, "tp_100x128_256": {"out_tok_s": 600.0}}),
        ("B", {"bs1_128_128": {"tpot_ms": 10.0}}),
    ]
    table = gpu_tables.workload_table("x", columns)
    assert "| one sequence, ms a token | 5.00 | 1.00 | 6.00 | 10.00 | 1.20x |" in table
    assert "| 100 x 128/256, output tokens/s | 900 |  | 600 |  | 1.50x |" in table


def test_kernel_table_reads_google_benchmarks_json(gpu_tables: ModuleType) -> None:
    kernels = {
        "benchmarks": [
            {"name": "norm/64/manual_time", "run_type": "iteration", "us": 2.5, "GB/s": 1234.5, "floor": 0.9},
            {"name": "broken", "run_type": "iteration", "error_occurred": True},
            {"name": "norm/64_mean", "run_type": "aggregate", "us": 1},
        ]
    }
    table = gpu_tables.kernel_table(kernels)
    assert "| norm/64 | 2.50 | 1,234.50 |  | 90 % |" in table
    assert "broken" not in table and "mean" not in table


@pytest.mark.parametrize(
    ("model", "shape", "same"),
    [("/m/l8b", "llama3-8b", True), ("/x/l1b_w", "llama3-8b", False), ("/y/smol135", "smollm2-135m", True)],
)
def test_a_peers_result_is_matched_to_its_shape(gpu_tables: ModuleType, model: str, shape: str, same: bool) -> None:
    assert gpu_tables.belongs({"model": model}, shape) is same
