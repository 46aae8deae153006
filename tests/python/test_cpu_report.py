"""The report on a CPU: its arithmetic by hand, its tables, and a tiny model measured in the end."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastllm import _core

BENCH = Path(__file__).resolve().parents[2] / "bench"
CEILINGS = {
    "benchmarks": [
        {
            "name": "Ceilings/iterations:1",
            "read_1t_GB/s": 10.0,
            "read_GB/s": 20.0,
            "fp32_GFLOP/s": 200.0,
            "bf16_GFLOP/s": 4000.0,
            "int8_GOP/s": 0.0,
            "int8_vnni_GOP/s": 800.0,
            "threads": 2,
        }
    ]
}


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_module("cpu_roofline", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_module("cpu_tables", monkeypatch)


def script_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module(name)


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    command = [sys.executable, str(BENCH / "cpu_report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def spec(tied: bool) -> dict[str, Any]:
    """Two layers of width 8 with 2 heads of 4, one of them for keys and values, and a vocabulary of 100."""
    attention = {"heads": 2, "kv_heads": 1, "head_dim": 4}
    return {
        "embed": {"vocab": 100, "hidden": 8},
        "layer_kind": [0, 0],
        "kinds": [{"attn": attention, "ffn": {"inner": 16, "gated": True}}],
        "head": {"tied": tied},
    }


def test_a_models_numbers_are_those_counted_by_hand(roofline: ModuleType) -> None:
    model = roofline.Model.of_spec(spec(tied=False))
    # q, k, v and out: 8 x (8 + 4 + 4 + 8); gate, up and down: 3 x 8 x 16.
    assert model.linear == 2 * (8 * 24 + 3 * 8 * 16)
    assert (model.head, model.embedding) == (800, 800)
    assert model.kv == 2 * 2 * 4
    assert model.attention == 2 * 4 * 2 * 4
    assert roofline.Model.of_spec(spec(tied=True)).embedding == 0
    assert model.prefill_operations(3) == 2 * 3 * model.linear + 2 * 800 + 6 * model.attention


def test_a_step_reads_all_weights_but_an_embedding_of_its_own(roofline: ModuleType) -> None:
    untied, tied = (roofline.Model.of_spec(spec(tied)) for tied in (False, True))
    assert untied.bytes_per_step("bf16") == (untied.linear + 800) * 2
    assert untied.bytes_per_step("int8", held=10_000) == 10_000 - 1600
    assert tied.bytes_per_step("int8", held=10_000) == 10_000
    assert tied.bytes_per_step("int8") == 0  # not known


def test_the_floor_is_the_slower_of_memory_and_arithmetic(roofline: ModuleType) -> None:
    machine, model = roofline.Machine.of_benchmark(CEILINGS), roofline.Model.of_spec(spec(tied=True))
    weights = model.bytes_per_step("bf16")
    assert machine.step_s(model, "bf16", weights, 1, 0) == pytest.approx(weights / 20e9)
    cached = 1000 * model.kv * 2
    assert machine.step_s(model, "bf16", weights, 1, 1000) == pytest.approx((weights + cached) / 20e9)
    many = machine.step_s(model, "fp32", 2 * weights, 1000, 0)
    assert many == pytest.approx(1000 * 2 * (model.linear + model.head) / 200e9)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 4e12), ("fp32", 2e11), ("int8", 8e11), ("int4", 8e11)])
def test_every_precision_has_its_peak(roofline: ModuleType, precision: str, peak: float) -> None:
    assert roofline.Machine.of_benchmark(CEILINGS).peak(precision) == peak


def test_without_tiles_bf16_has_the_peak_of_fp32(roofline: ModuleType) -> None:
    plain = {**CEILINGS["benchmarks"][0], "bf16_GFLOP/s": 0.0, "int8_vnni_GOP/s": 0.0}
    machine = roofline.Machine.of_benchmark({"benchmarks": [plain]})
    assert machine.peak("bf16") == machine.peak("int8") == 2e11
    assert roofline.Machine.of_benchmark({}) is None


def test_shares_are_floors_over_measured_times(tables: ModuleType, roofline: ModuleType) -> None:
    machine = roofline.Machine.of_benchmark(CEILINGS)
    model = roofline.Model.of_spec(spec(tied=True))
    weights = model.bytes_per_step("bf16")
    result = {
        "precision": "bf16",
        "spec": spec(tied=True),
        "decode_tps": 0.5 * 20e9 / weights,
        "prefill_tps": 512 * 0.25 / machine.prefill_s(model, "bf16", 512),
        "batch_out_tps": 64 * 64 * 0.5 / machine.batch_s(model, "bf16", weights, 64, 16, (128, 64)),
        "sequences": {"4": {"tps": 4 * 0.5 / machine.step_s(model, "bf16", weights, 4, 128)}, "8": {"skipped": "late"}},
    }
    seen = tables.shares(result, machine)
    assert seen["decode_tps"] == pytest.approx(0.5)
    assert seen["prefill_tps"] == pytest.approx(0.25)
    assert seen["batch_out_tps"] == pytest.approx(0.5)
    assert seen["sequences"] == {"4": pytest.approx(0.5)}
    assert tables.shares({**result, "precision": "int4"}, machine) == {}


def test_peers_come_one_or_several_in_a_file(tables: ModuleType) -> None:
    one, other = {"model": "a", "dtype": "int8", "decode_tps": 1}, {"model": "a", "dtype": "bf16", "decode_tps": 2}
    lines = "\n".join(json.dumps(row) for row in (one, other, {"model": "b"}))

    def of_a(result: dict[str, Any]) -> bool:
        return result["model"] == "a"

    assert tables.read_peers(json.dumps(one, indent=1), "X", of_a) == [("X", one)]
    assert tables.read_peers(lines, "X", of_a) == [("X int8", one), ("X bf16", other)]


def test_tables_show_shares_and_the_ratio_of_the_best(tables: ModuleType) -> None:
    results = {"bf16": {"decode_tps": 50.0}, "int8": {"decode_tps": 90.0, "contexts": {"128": {"tps": 80.0}}}}
    peers = [("A", {"decode_tps": 60.0}), ("B", {"decode_tps": 45.0})]
    of_ceiling = {"bf16": {"decode_tps": 0.5}, "int8": {"decode_tps": 0.6, "contexts": {"128": 0.7}}}
    text = tables.workload_table("x", results, peers, of_ceiling)
    assert "| one sequence, tokens/s | 50.0 | 90.0 | 60.0 | 45.0 | 1.50x |" in text
    assert "| of the ceiling | 50 % | 60 % |  |  |  |" in text
    assert "| memory read, all threads, GB/s | 20 |" in tables.ceiling_table(CEILINGS)
    assert "| int8 tiles, GOP/s | - |" in tables.ceiling_table(CEILINGS)


def test_a_tiny_model_is_measured_and_reported(tmp_path: Path) -> None:
    (tmp_path / "ceilings.json").write_text(json.dumps(CEILINGS))
    peer = tmp_path / "peer.json"
    peer.write_text(json.dumps({"model": "/m/tiny", "decode_tps": 1.0, "sequences": {"2": {"tps": 1.5}}}))
    what = ["--models", "tiny", "--precisions", "bf16", "--repeats", "1", "--only", "workloads,growth"]
    done = run_report("--out", str(tmp_path), *what, "--peer", f"X={peer}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = json.loads((tmp_path / "cpu_report.json").read_text())
    result = report["tiny"]["results"]["bf16"]
    assert min(result["prefill_tps"], result["decode_tps"], result["batch_out_tps"]) > 0
    assert set(result["sequences"]) == {"1", "2", "4", "8", "16", "32", "64"}
    assert result["contexts"]["16384"]["tps"] > 0
    assert report["tiny"]["of_ceiling"]["bf16"]["decode_tps"] > 0
    text = (tmp_path / "cpu_report.md").read_text()
    assert "| one sequence, tokens/s |" in text and "| sequences | bf16 | X | best to best peer |" in text


def test_a_failing_part_does_not_stop_the_tables(tmp_path: Path) -> None:
    done = run_report("--out", str(tmp_path), "--build", str(tmp_path / "nothing"), "--only", "ceilings")
    assert done.returncode == 1 and "failed" in done.stdout
    assert (tmp_path / "cpu_report.md").exists()


def test_loading_is_measured_where_there_are_files(llama: Path, tmp_path: Path) -> None:
    what = ["--models", f"tiny,{llama}", "--precisions", "int8", "--repeats", "1", "--only", "load"]
    done = run_report("--out", str(tmp_path), *what)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (load,) = json.loads((tmp_path / "cpu_report.json").read_text())["load"]
    assert (load["model"], load["precision"]) == (str(llama), "int8")
    assert "Loading from the page cache" in (tmp_path / "cpu_report.md").read_text()
