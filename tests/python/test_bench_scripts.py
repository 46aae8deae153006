"""The GPU benchmark scripts, on a tiny model on the CPU: they run, and their tables say what the results say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastllm

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def gpu_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_tables")


def run_script(name: str, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(fastllm._core.__file__).parents[1])}
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


def test_cases_of_the_kv_cache_share_what_they_should(tmp_path: Path) -> None:
    file = tmp_path / "cases.json"
    run_script("gpu_cases.py", "--shape", "tiny", "--device", "cpu", "--max-num-seqs", "16", "--json", str(file))
    result = json.loads(file.read_text())
    assert result["prefix_caching"]["one after the other"]["hit_rate"] > 0.9
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
