#!/usr/bin/env python3
"""Instructions of one decode step and of one token of prefill, by function, under valgrind's callgrind.

Counts hardly change from run to run, so a change of a few percent in a kernel shows on a busy machine, where times say
nothing. They do not see memory or tiles: valgrind has neither AVX-512 nor AMX, so the kernels are those for AVX2. One
thread, one sequence, a small Llama with random weights; each count is a difference of two runs that differ in
output tokens or in prompt tokens only, so that loading falls out. What waits for other threads is left out.

python bench/instructions.py --build build/release --json after.json --before before.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tables import table

PRECISIONS = ("bf16", "int8", "int4")
_PROMPT, _LONG_PROMPT = 32, 96  # tokens
_STEPS = 8  # of decode
_TIMEOUT_S = 120.0
# Of functions whose counts depend on how long another thread takes.
_WAITS = re.compile(r"wait|yield|pause|futex|notify|clock_gettime|steady_clock|EventCount|syscall|_dl_|rank_main")

Counts = dict[str, float]


def read_callgrind(text: str) -> Counter[str]:
    """Instructions by function, callees not included, of a file that callgrind wrote."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    function, skip = "", False
    for line in text.splitlines():
        if line.startswith("fn="):
            number, _, name = line[3:].partition(" ")
            function = names.setdefault(number, name)
        elif line.startswith(("cfn=", "cfi=", "cob=")):
            if line.startswith("cfn="):
                number, _, name = line[4:].partition(" ")
                names.setdefault(number, name)
        elif line.startswith("calls="):
            skip = True  # the next line is what the callee took
        elif line and (line[0].isdigit() or line[0] in "+-*"):
            if not skip:
                counts[function] += int(line.split()[1])
            skip = False
    return counts


def short_name(function: str) -> str:
    """The name without namespaces, arguments and what the compiler added."""
    name = re.sub(r"\(anonymous namespace\)::|\[clone [^]]*\]|'\d+$", "", function)
    name = re.sub(r"<.*", "", name.split("(")[0]).strip()
    return name.removeprefix("void ").removeprefix("fastllm::").removeprefix("cpu::") or function[:60]


def run(program: Path, precision: str, prompt: int, output: int) -> Counter[str]:
    options = ["--shape", "small", "--only", "single", "--input-len", str(prompt), "--output-len", str(output)]
    options += ["--cpu-threads", "1", "--async-depth", "1", "--max-model-len", "256", "--max-num-seqs", "1"]
    options += ["--quantization", "none" if precision == "bf16" else precision, "--num-blocks", "16"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "--tool=callgrind", "-q", f"--callgrind-out-file={out}", str(program), *options]
        environment = {**os.environ, "FASTLLM_CPU_ISA": "avx2"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        counts: Counter[str] = Counter()
        for function, count in read_callgrind(out.read_text("utf-8", "replace")).items():
            if not _WAITS.search(function):
                counts[short_name(function)] += count
        return counts


def difference(more: Counter[str], less: Counter[str], units: int) -> Counts:
    """Instructions a unit by function, the largest first; what is under one is noise."""
    each = {name: (more[name] - less[name]) / units for name in more}
    return dict(sorted(((n, c) for n, c in each.items() if c >= 1), key=lambda one: -one[1]))


def measure(program: Path, precision: str) -> dict[str, Counts]:
    first = run(program, precision, _PROMPT, 1)
    decode = difference(run(program, precision, _PROMPT, 1 + _STEPS), first, _STEPS)
    prefill = difference(run(program, precision, _LONG_PROMPT, 1), first, _LONG_PROMPT - _PROMPT)
    return {"decode step": decode, "prefill token": prefill}


def count_table(title: str, counts: Counts, before: Counts | None, rows: int) -> str:
    total = sum(counts.values())
    head = ["function", "instructions", "share"] + (["of before"] if before else [])

    def row(name: str, count: float, old: float | None) -> list[str]:
        cells = [name, f"{count:,.0f}", f"{count / total:.3f}"]
        return [*cells, f"{count / old:.3f}" if old else "-"] if before else cells

    lines = [row("all", total, sum(before.values()) if before else None)]
    lines += [row(name, count, (before or {}).get(name)) for name, count in list(counts.items())[:rows]]
    return table(title, head, lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=Path, default=Path("build/release"), help="CMake's build folder")
    p.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    p.add_argument("--rows", type=int, default=8, help="functions in a table; the JSON has all")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--before", type=Path, metavar="FILE", help="an earlier JSON to compare with")
    args = p.parse_args()
    before = json.loads(args.before.read_text("utf-8")) if args.before else {}
    results: dict[str, dict[str, Counts]] = {}
    for precision in args.precisions.split(","):
        results[precision] = measure(args.build / "bench" / "fastllm_bench_engine", precision)
        for what, counts in results[precision].items():
            old = before.get(precision, {}).get(what)
            print(count_table(f"{precision}: instructions of a {what}", counts, old, args.rows))
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
