"""The scripts that measure loading and count instructions: they run, and read what they are given."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from fastllm import _core

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("instructions")


CALLGRIND = """version: 1
positions: line
events: Ir

ob=(1) /bin/x
fl=(1) a.cc
fn=(1) fastllm::cpu::isa_avx2::(anonymous namespace)::gemm_f32(fastllm::GemmArgs const&, long)
0 100
+3 20
cfn=(2) memcpy
calls=4 0
0 5000
fn=(2)
0 5000
fn=(1)
* 7
totals: 5127
"""


def test_calls_are_counted_in_the_callee_only(instructions: ModuleType) -> None:
    counts = instructions.read_callgrind(CALLGRIND)
    assert sorted(counts.values()) == [127, 5000] and counts["memcpy"] == 5000


@pytest.mark.parametrize(
    ("function", "short"),
    [
        (
            "fastllm::cpu::isa_avx2::(anonymous namespace)::gemm_f32(fastllm::GemmArgs const&, long)",
            "isa_avx2::gemm_f32",
        ),
        ("void fastllm::ThreadPool::run<fastllm::cpu::X::{lambda(int)#1}>(x)::{lambda(int)#1}", "ThreadPool::run"),
        ("fastllm::Scheduler::schedule(fastllm::StepPlan&)'2", "Scheduler::schedule"),
        ("__memcpy_avx_unaligned_erms", "__memcpy_avx_unaligned_erms"),
    ],
)
def test_names_are_shortened_to_what_tells_functions_apart(instructions: ModuleType, function: str, short: str) -> None:
    assert instructions.short_name(function) == short


def test_a_difference_is_a_unit_s_share_and_drops_what_did_not_grow(instructions: ModuleType) -> None:
    more, less = Counter(load=900, gemm=1800, norm=90), Counter(load=900, gemm=200, norm=10)
    assert instructions.difference(more, less, 8) == {"gemm": 200, "norm": 10}


def test_counts_are_set_beside_earlier_ones(instructions: ModuleType) -> None:
    text = instructions.count_table("t", {"gemm": 150.0, "new": 50.0}, {"gemm": 300.0}, 8)
    assert "| all | 200 | 1.000 | 0.667 |" in text
    assert "| gemm | 150 | 0.750 | 0.500 |" in text and "| new | 50 | 0.250 | - |" in text


def test_loading_is_measured_beside_reading(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    command = [sys.executable, str(BENCH / "cpu_load.py"), f"{llama}@bf16,int8", "--repeats", "1", "--json", str(file)]
    env = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [one["precision"] for one in results] == ["bf16", "int8"]
    for one in results:
        assert one["file_bytes"] == sum(f.stat().st_size for f in llama.glob("*.safetensors")) > 0
        assert one["of_read_speed"] == pytest.approx(one["read_s"] / one["load_s"])
        assert 0 < one["held_bytes"] and 0 < one["keep_s"]
    assert "| bf16 |" in done.stdout and "| int8 |" in done.stdout
