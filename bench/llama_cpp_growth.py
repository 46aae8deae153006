#!/usr/bin/env python3
"""llama.cpp's decoding over sequences and contexts, by its llama-batched-bench, as a peer's file for cpu_report.py.

python bench/llama_cpp_growth.py --program build/bin/llama-batched-bench --model smollm2-Q8_0.gguf --as smollm2-135m \\
    --json q8_0.json
python bench/cpu_report.py --out results --only tables --models smollm2-135m --peer "llama.cpp Q8_0=q8_0.json"

The work is that of cpu_workloads.py: 32 tokens of each sequence after 128 tokens, or of one after a longer context;
prompts are not in the time. Every run goes through all counts or lengths; figures are medians over runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cpu_workloads

Rates = dict[str, list[float]]  # count or length -> tokens/s of each run


def command(args: argparse.Namespace, contexts: Sequence[int], sequences: Sequence[int]) -> list[str]:
    """llama-batched-bench for all pairs. Its room for tokens is divided evenly among the most sequences."""
    room = max(sequences) * (max(contexts) + cpu_workloads.STEPS)
    work = {"-npp": contexts, "-ntg": [cpu_workloads.STEPS], "-npl": sequences}
    lists = [word for flag, values in work.items() for word in (flag, ",".join(map(str, values)))]
    threads = str(args.cpu_threads or len(os.sched_getaffinity(0)))
    return [args.program, "-m", str(args.model), "-c", str(room), "-t", threads, *lists, "--output-format", "jsonl"]


def parse(output: str) -> list[dict[str, Any]]:
    """The lines that are measurements; others are messages."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]


def collect(rates: Rates, lines: Iterable[dict[str, Any]], key: str) -> None:
    """key: "pl", the number of sequences, or "pp", the length of the context."""
    for line in lines:
        rates.setdefault(str(line[key]), []).append(float(line["speed_tg"]))


def run(words: list[str], timeout_s: float) -> str:
    """What it printed, also where it had to be ended; messages of a failure go to stderr."""
    print("$", " ".join(words), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(words, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        print(f"ended after {timeout_s:.0f} s", file=sys.stderr, flush=True)
        return (expired.stdout or b"").decode(errors="replace")
    if done.returncode:
        raise SystemExit(
            f"{words[0]} ended with status {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}"
        )
    return done.stdout.decode(errors="replace")


def figures(rates: Rates) -> dict[str, Any]:
    return {key: {"tps": statistics.median(values), "all": values} for key, values in rates.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--program", required=True, help="llama-batched-bench")
    p.add_argument("--model", type=Path, required=True, help="GGUF file")
    p.add_argument("--as", dest="name", help="the name that cpu_report.py knows the model by (default: the file's)")
    p.add_argument("--cpu-threads", type=int, default=0, help="0: every core this process may use")
    p.add_argument("--repeats", type=int, default=3, help="medians are over this many runs")
    p.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="of one run")
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="the result, written after every run")
    args = p.parse_args()
    groups: dict[str, Rates] = {"sequences": {}, "contexts": {}}
    for _ in range(args.repeats):
        few, one = cpu_workloads.CONTEXTS[:1], cpu_workloads.SEQUENCES[:1]
        for group, key, work in (
            ("sequences", "pl", (few, cpu_workloads.SEQUENCES)),
            ("contexts", "pp", (cpu_workloads.CONTEXTS, one)),
        ):
            collect(groups[group], parse(run(command(args, *work), args.timeout)), key)
            result = {"engine": "llama.cpp", "model": args.name or args.model.name, "file": args.model.name}
            result |= {name: figures(rates) for name, rates in groups.items()}
            args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(args.json.read_text("utf-8"), end="")


if __name__ == "__main__":
    main()
