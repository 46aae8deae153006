"""Growth beside peers: the table by hand, the plot, and llama.cpp's figures read from a program like its own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RESULTS: dict[str, Any] = {
    "bf16": {"sequences": {"1": {"tps": 10.0}, "2": {"tps": 19.0}, "4": {"skipped": "late"}}},
    "int8": {"sequences": {"1": {"tps": 18.0}}, "contexts": {"128": {"tps": 1234.5}}},
}
OF_CEILING: dict[str, Any] = {"bf16": {"sequences": {"1": 0.5, "2": 0.4}}}
PEERS: list[tuple[str, dict[str, Any]]] = [
    ("A", {"sequences": {"1": {"tps": 9.0}, "8": {"tps": 40.0}}}),
    ("B", {"decode_tps": 7.0}),
    ("C", {"sequences": {"1": {"tps": 12.0}, "2": {"tps": 20.0}}}),
]
# As llama-batched-bench: a line of JSON for each length and count, among messages.
PROGRAM = """#!{python}
import json, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lengths, counts = ([int(n) for n in flag[name].split(",")] for name in ("-npp", "-npl"))
assert int(flag["-c"]) == max(counts) * (max(lengths) + int(flag["-ntg"]))
print("a message")
for pp in lengths:
    for pl in counts:
        print(json.dumps({{"pp": pp, "tg": int(flag["-ntg"]), "pl": pl, "speed_pp": 1.0, "speed_tg": pl * 1e6 / pp}}))
"""


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cpu_growth")


def test_table_has_shares_and_the_ratio_to_the_best_peer(growth: ModuleType) -> None:
    lines = growth.growth_table("x", "sequences", RESULTS, PEERS, OF_CEILING).strip().splitlines()
    assert lines[2] == "| sequences | bf16 | int8 | A | C | best to best peer |"
    assert lines[4:] == [
        "| 1 | 10.0 (50 %) | 18.0 | 9.0 | 12.0 | 1.50x |",
        "| 2 | 19.0 (40 %) |  |  | 20.0 | 0.95x |",
        "| 4 | late |  |  |  |  |",
        "| 8 |  |  | 40.0 |  |  |",
    ]


def test_table_without_peers_has_no_ratio(growth: ModuleType) -> None:
    text = growth.growth_table("x", "contexts", RESULTS, PEERS, OF_CEILING)
    assert text.strip().splitlines()[2:] == [
        "| contexts | bf16 | int8 |",
        "| --- | --- | --- |",
        "| 128 |  | 1,234.5 |",
    ]
    assert growth.growth_table("x", "contexts", {}, [], {}) == ""


def test_plot_is_a_png(growth: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "growth.png"
    growth.plot_growth("x", "sequences", RESULTS, PEERS, OF_CEILING, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def run_llama_cpp(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "llama_cpp_growth.py"), "--program", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_llama_cpp_becomes_a_peer_of_the_same_work(growth: ModuleType, tmp_path: Path) -> None:
    program, file = tmp_path / "bench", tmp_path / "peer.json"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    done = run_llama_cpp(program, "--model", "x-Q8_0.gguf", "--as", "x", "--repeats", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    workloads = importlib.import_module("cpu_workloads")
    assert (result["model"], result["file"]) == ("x", "x-Q8_0.gguf")
    assert {int(key) for key in result["sequences"]} == set(workloads.SEQUENCES)
    assert {int(key) for key in result["contexts"]} == set(workloads.CONTEXTS)
    assert result["sequences"]["4"] == {"tps": 4e6 / 128, "all": [4e6 / 128] * 2}
    assert result["contexts"]["4096"]["tps"] == 1e6 / 4096


def test_llama_cpp_that_fails_is_a_sentence(tmp_path: Path) -> None:
    program = tmp_path / "bench"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)
    done = run_llama_cpp(program, "--model", "x.gguf", "--json", str(tmp_path / "peer.json"))
    assert done.returncode == 1 and "ended with status 3: no such model" in done.stderr
