#!/usr/bin/env python3
"""Everything measured on one GPU, in one folder: tables, JSON, and plots where matplotlib is installed.

python bench/gpu_report.py --build build/release --out results --shapes llama3-8b,llama3.2-1b \\
    --peer vLLM=vllm_l8b.json --peer TurboMind=lm_l8b.json --time-limit 570
python bench/gpu_report.py --build build/release --out results --only workloads --shapes llama3-8b
python bench/gpu_report.py --out results --only tables --peer vLLM=vllm_l8b.json     # from what is in the folder

Every part is a process of its own that leaves a file in the folder as it goes; one that fails or takes too long does
not stop the rest, and one that is not asked for keeps its last file. report.json holds all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_tables
import shapes

HERE = Path(__file__).parent
# part -> seconds after which one of its processes is ended
PARTS = {
    "workloads": 150,
    "prefix": 100,
    "deterministic": 100,
    "cases": 60,
    "engine": 150,
    "kernels": 240,
    "transformers": 200,
}
_SCRIPTS = {
    "workloads": "gpu_workloads.py",
    "prefix": "gpu_prefix.py",
    "deterministic": "gpu_deterministic.py",
    "cases": "gpu_cases.py",
    "transformers": "transformers_workloads.py",
}


def run(command: list[str], file: Path, timeout_s: float) -> bool:
    """True if it ended well in time; its output is shown as it comes. file: what it leaves, of now or not at all."""
    print("$", " ".join(command), flush=True)
    if timeout_s <= 0:
        print("skipped: the time is up", flush=True)
        return False
    file.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        status = subprocess.run(command, timeout=timeout_s, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
    except OSError as error:
        print(f"failed: {error}", flush=True)
        return False
    except subprocess.TimeoutExpired:
        print(f"ended after {timeout_s:.0f} s", flush=True)
        return False
    print(f"{f'failed with status {status}' if status else 'done'} in {time.monotonic() - start:.1f} s", flush=True)
    return status == 0


def commands(part: str, args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """The file that a part leaves and what it runs: once, or once per shape."""
    bench = args.build / "bench"
    if part == "kernels":
        kernels = args.out / "kernels.json"
        out = [f"--benchmark_out={kernels}", "--benchmark_out_format=json"]
        chosen = [f"--benchmark_filter={args.kernel_filter}"] if args.kernel_filter else []
        return [(kernels, [str(bench / "fastllm_bench_cuda"), *out, *chosen])]
    each: list[tuple[Path, list[str]]] = []
    for shape in args.shapes:
        file = args.out / f"{part}_{shape}.json"
        program = [sys.executable, str(HERE / _SCRIPTS[part])] if part in _SCRIPTS else []
        program = program or [str(bench / "fastllm_bench_engine")]
        if part in ("workloads", "cases", "engine"):
            program += ["--max-num-seqs", str(args.max_num_seqs)]
        each.append((file, [*program, "--device", args.device, "--shape", shape, "--json", str(file)]))
    return each


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is none. What Google Benchmark was ended in the middle of counts up to its last whole entry."""
    try:
        text = path.read_text("utf-8")
    except OSError:
        return {}
    for end in ("", text[: text.rfind("},") + 1] + "]}"):
        try:
            value = json.loads(end or text)
        except ValueError:
            continue
        return value if isinstance(value, dict) else {}
    return {}


def tables(args: argparse.Namespace) -> None:
    """Prints, plots and gathers what the folder and the peers' files hold."""
    kernels = read_json(args.out / "kernels.json")
    everything: dict[str, Any] = {"kernels": kernels}
    text = gpu_tables.kernel_table(kernels)
    peers = [(name, read_json(Path(file))) for name, _, file in (one.partition("=") for one in args.peer)]
    for shape in args.shapes:
        ours = {part: read_json(args.out / f"{part}_{shape}.json") for part in PARTS if part != "kernels"}
        theirs = [(name, result) for name, result in peers if gpu_tables.belongs(result, shape)]
        columns = [("fastllm", ours["workloads"]), ("native", ours["engine"]), *theirs]
        columns = [(name, result) for name, result in columns if result]
        text += gpu_tables.workload_table(shape, columns)
        text += gpu_tables.step_table(shape, columns)
        text += gpu_tables.transformers_table(shape, ours["workloads"], ours["transformers"])
        for part, title in (("prefix", "prefix cache"), ("deterministic", "--deterministic"), ("cases", "KV cache")):
            text += gpu_tables.plain_table(f"{shape}: {title}", ours[part])
        text += gpu_tables.failure_table(f"{shape}: not measured", ours)
        everything[shape] = {**ours, "peers": dict(theirs)}
        gpu_tables.plot_concurrency(shape, columns, args.out / f"concurrency_{shape}.png")
    gpu_tables.plot_kernels(kernels, args.out / "kernels.png")
    print(text)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if not gpu_tables.has_matplotlib():
        print("No plots: matplotlib is not installed.")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=Path, default=Path("build/release"), help="CMake's build folder")
    p.add_argument("--out", type=Path, required=True, help="folder for results")
    p.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, tables (default: all)")
    p.add_argument("--shapes", default="llama3-8b", help=f"of {', '.join(shapes.NAMES)}")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="a peer's result; repeatable")
    p.add_argument("--device", default="cuda")
    p.add_argument("--max-num-seqs", type=int, default=256)
    p.add_argument("--kernel-filter", default="", help="--benchmark_filter of the kernels")
    p.add_argument("--timeout", type=float, metavar="SECONDS", help="of one process (default: the part's)")
    p.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="of everything")
    args = p.parse_args()
    args.shapes = args.shapes.split(",")
    only = args.only.split(",")
    unknown = sorted({*only} - {*PARTS, "tables"}) + sorted({*args.shapes} - {*shapes.NAMES})
    if unknown:
        p.error(f"unknown: {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.time_limit
    ok = [
        run(command, file, min(args.timeout or limit, end - time.monotonic()))
        for part, limit in PARTS.items()
        if part in only
        for file, command in commands(part, args)
    ]
    tables(args)
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main())
