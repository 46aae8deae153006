#!/usr/bin/env python3
"""Everything measured on one GPU, in one folder: tables, JSON, and plots where matplotlib is installed.

python bench/gpu_report.py --build build/release --out results --shapes llama3-8b,llama3.2-1b \\
    --peer vLLM=vllm_l8b.json --peer TurboMind=lm_l8b.json
python bench/gpu_report.py --build build/release --out results --only workloads --shapes llama3-8b
python bench/gpu_report.py --out results --only tables --peer vLLM=vllm_l8b.json     # from what is in the folder

Every part is a process of its own that leaves a file in the folder; one that fails does not stop the rest, and one
that is not run again keeps its last file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_tables
import shapes

HERE = Path(__file__).parent
PARTS = ("kernels", "engine", "workloads", "cases", "transformers")


def run(command: list[str], timeout_s: float) -> bool:
    """True if it ended well in time; its output is shown as it comes."""
    print("$", " ".join(command), flush=True)
    try:
        status = subprocess.run(command, timeout=timeout_s).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"failed: {error}", flush=True)
        return False
    if status:
        print(f"failed with status {status}", flush=True)
    return status == 0


def commands(part: str, args: argparse.Namespace) -> list[list[str]]:
    """What a part runs: once, or once per shape."""
    bench = args.build / "bench"
    if part == "kernels":
        out = [f"--benchmark_out={args.out / 'kernels.json'}", "--benchmark_out_format=json"]
        chosen = [f"--benchmark_filter={args.kernel_filter}"] if args.kernel_filter else []
        return [[str(bench / "fastllm_bench_cuda"), *out, *chosen]]
    each: list[list[str]] = []
    for shape in args.shapes:
        file = ["--shape", shape, "--json", str(args.out / f"{part}_{shape}.json")]
        if part == "engine":
            program = [str(bench / "fastllm_bench_engine"), "--device", args.device]
            each.append([*program, "--max-num-seqs", str(args.max_num_seqs), *file])
        elif part == "transformers":
            each.append([sys.executable, str(HERE / "transformers_workloads.py"), "--device", args.device, *file])
        else:
            script = "gpu_workloads.py" if part == "workloads" else "gpu_cases.py"
            limits = ["--max-num-seqs", str(args.max_num_seqs)]
            each.append([sys.executable, str(HERE / script), "--device", args.device, *limits, *file])
    return each


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def tables(args: argparse.Namespace) -> None:
    """Prints and plots what the folder and the peers' files hold."""
    kernels = read_json(args.out / "kernels.json")
    text = gpu_tables.kernel_table(kernels)
    peers = [(name, read_json(Path(file))) for name, _, file in (one.partition("=") for one in args.peer)]
    for shape in args.shapes:
        columns = [
            ("fastllm", read_json(args.out / f"workloads_{shape}.json")),
            ("native", read_json(args.out / f"engine_{shape}.json")),
            *[(name, result) for name, result in peers if gpu_tables.belongs(result, shape)],
        ]
        columns = [(name, result) for name, result in columns if result]
        text += gpu_tables.workload_table(shape, columns)
        text += gpu_tables.plain_table(f"{shape}: KV cache", read_json(args.out / f"cases_{shape}.json"))
        text += gpu_tables.plain_table(f"{shape}: Transformers", read_json(args.out / f"transformers_{shape}.json"))
        gpu_tables.plot_concurrency(shape, columns, args.out / f"concurrency_{shape}.png")
    gpu_tables.plot_kernels(kernels, args.out / "kernels.png")
    print(text)
    (args.out / "report.md").write_text(text, encoding="utf-8")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=Path, default=Path("build/release"), help="CMake's build folder")
    p.add_argument("--out", type=Path, required=True, help="folder for results")
    p.add_argument("--only", default="kernels,engine,workloads,cases", help=f"of {', '.join(PARTS)}, tables")
    p.add_argument("--shapes", default="llama3-8b", help=f"of {', '.join(shapes.NAMES)}")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="a peer's result; repeatable")
    p.add_argument("--device", default="cuda")
    p.add_argument("--max-num-seqs", type=int, default=256)
    p.add_argument("--kernel-filter", default="", help="--benchmark_filter of the kernels")
    p.add_argument("--timeout", type=float, default=580, metavar="SECONDS", help="of one process")
    args = p.parse_args()
    args.shapes = args.shapes.split(",")
    only = args.only.split(",")
    unknown = sorted({*only} - {*PARTS, "tables"}) + sorted({*args.shapes} - {*shapes.NAMES})
    if unknown:
        p.error(f"unknown: {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    ok = [run(command, args.timeout) for part in PARTS if part in only for command in commands(part, args)]
    tables(args)
    return 0 if all(ok) else 1


if __name__ == "__main__":
    sys.exit(main())
