#!/usr/bin/env python3
"""Everything measured on one CPU, in one folder: tables, JSON, and plots where matplotlib is installed.

python bench/cpu_report.py --build build/release --out results --models smollm2-135m,llama3.2-1b
python bench/cpu_report.py --out results --models FOLDER --precisions bf16,int8 --peer vLLM=vllm.json --time-limit 900
python bench/cpu_report.py --out results --only tables --peer llama.cpp=llama.jsonl    # from what is in the folder

The ceilings come from fastllm_bench_ops, loading from cpu_load.py for models that have files, everything else from
cpu_workloads.py, a process per part, model and precision; one that fails or takes too long does not stop the rest.
Shares of the ceiling: weights and cached keys and values over the read bandwidth, or operations over the peak of the
matrix units, whichever takes longer. A peer's file names its model and has prefill_tps, decode_tps and batch_out_tps of
the same work, or growth as cpu_growth.py says (llama_cpp_growth.py measures llama.cpp's), or both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import cpu_growth
import cpu_load
import cpu_tables
import shapes
from cpu_roofline import Machine
from cpu_workloads import PRECISIONS, supported
from gpu_report import read_json, run
from gpu_tables import belongs
from tables import find_pyplot

PARTS = ("ceilings", "load", "workloads", "growth")
_CEILINGS_S = 60.0
_WORKLOADS_S = 300.0  # of one model in one precision
_RUNS = {"workloads": "plain", "growth": "growth"}  # part -> what cpu_workloads.py calls it


def file_of(out: Path, model: str, precision: str, part: str) -> Path:
    suffix = "" if part == "workloads" else f"_{part}"
    return out / f"cpu_{Path(model).name.replace(':', '_')}_{precision}{suffix}.json"


def result_of(out: Path, model: str, precision: str) -> dict[str, Any]:
    """Both parts in one; what a load took and held is of the workloads where these were measured."""
    growth, workloads = (read_json(file_of(out, model, precision, part)) for part in ("growth", "workloads"))
    return growth | workloads


def ceilings_command(args: argparse.Namespace) -> list[str]:
    program = str(args.build / "bench" / "fastllm_bench_ops")
    file = args.out / "ceilings.json"
    return [program, "--benchmark_filter=Ceilings", f"--benchmark_out={file}", "--benchmark_out_format=json"]


def load_command(args: argparse.Namespace, models: list[str]) -> list[str]:
    program = [sys.executable, str(Path(__file__).parent / "cpu_load.py")]
    precisions = ",".join(args.precisions)
    cases = [f"{model}@{'gguf' if Path(model).is_file() else precisions}" for model in models]
    options = ["--cpu-threads", str(args.cpu_threads), "--repeats", str(args.repeats)]
    return [*program, *cases, *options, "--json", str(args.out / "load.json")]


def workload_command(args: argparse.Namespace, model: str, precision: str, part: str, seconds: float) -> list[str]:
    program = [sys.executable, str(Path(__file__).parent / "cpu_workloads.py")]
    which = ["--shape" if model in shapes.NAMES else "--model", model, "--precision", precision, "--parts", _RUNS[part]]
    # It stops by itself before it is ended.
    limits = ["--time-limit", str(round(0.7 * seconds)), "--repeats", str(args.repeats)]
    file = file_of(args.out, model, precision, part)
    return [*program, *which, *limits, "--cpu-threads", str(args.cpu_threads), "--json", str(file)]


def measure(args: argparse.Namespace) -> bool:
    """Runs the parts asked for; False if one of them failed."""
    end = time.monotonic() + args.time_limit
    ok = True
    if "ceilings" in args.only:
        seconds = min(_CEILINGS_S, end - time.monotonic())
        ok &= run(ceilings_command(args), args.out / "ceilings.json", seconds)
    stored = [model for model in args.models if cpu_load.weight_files(Path(model))]
    if "load" in args.only and stored:
        seconds = min(args.timeout * len(stored), end - time.monotonic())
        ok &= run(load_command(args, stored), args.out / "load.json", seconds)
    for part in (part for part in _RUNS if part in args.only):
        for model, precision in itertools.product(args.models, args.precisions):
            seconds = min(args.timeout, end - time.monotonic())
            command = workload_command(args, model, precision, part, max(seconds, 0))
            ok &= run(command, file_of(args.out, model, precision, part), seconds)
    return ok


def tables(args: argparse.Namespace) -> None:
    """Prints, plots and gathers what the folder and the peers' files hold."""
    ceilings = read_json(args.out / "ceilings.json")
    machine = Machine.of_benchmark(ceilings)
    loads = read_json(args.out / "load.json").get("results", [])
    everything: dict[str, Any] = {"ceilings": ceilings, "load": loads}
    text = cpu_tables.ceiling_table(ceilings) + (cpu_load.load_table(loads) if loads else "")
    for model in args.models:
        name = Path(model).name
        results = {precision: result_of(args.out, model, precision) for precision in args.precisions}
        results = {precision: result for precision, result in results.items() if result}
        of_ceiling = {p: cpu_tables.shares(result, machine) for p, result in results.items()} if machine else {}
        peers: cpu_tables.Rows = []
        for label, _, file in (one.partition("=") for one in args.peer):
            content = Path(file).read_text("utf-8")
            peers += cpu_tables.read_peers(content, label, lambda result, name=name: belongs(result, name))
        text += cpu_tables.workload_table(name, results, peers, of_ceiling)
        for group, (title, _) in cpu_growth.GROUPS.items():
            heading = f"{name}: {title}, tokens/s (share of the ceiling)"
            text += cpu_growth.growth_table(heading, group, results, peers, of_ceiling)
            plot = args.out / f"cpu_{name}_{group}.png"
            cpu_growth.plot_growth(name, group, results, peers, of_ceiling, plot)
        everything[name] = {"results": results, "of_ceiling": of_ceiling, "peers": dict(peers)}
    print(text)
    (args.out / "cpu_report.md").write_text(text, encoding="utf-8")
    (args.out / "cpu_report.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    if find_pyplot() is None:
        print("No plots: matplotlib is not installed.")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=Path, default=Path("build/release"), help="CMake's build folder")
    p.add_argument("--out", type=Path, required=True, help="folder for results")
    p.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, tables (default: all)")
    p.add_argument("--models", default="smollm2-135m", help=f"folders, GGUF files, or of {', '.join(shapes.NAMES)}")
    p.add_argument("--precisions", help=f"of {', '.join(PRECISIONS)} (default: all of fewer than 32 bits)")
    p.add_argument("--peer", action="append", default=[], metavar="NAME=FILE", help="a peer's result; repeatable")
    p.add_argument("--cpu-threads", type=int, default=0, help="0: every core this process may use")
    p.add_argument("--repeats", type=int, default=3, help="medians are over this many runs")
    p.add_argument("--timeout", type=float, default=_WORKLOADS_S, metavar="SECONDS", help="of one model and precision")
    p.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="of everything")
    args = p.parse_args()
    args.only, args.models = args.only.split(","), args.models.split(",")
    chosen = args.precisions.split(",") if args.precisions else [p for p in PRECISIONS if p != "fp32" and supported(p)]
    unknown = sorted({*args.only} - {*PARTS, "tables"}) + sorted({*chosen} - {*PRECISIONS})
    if unknown:
        p.error(f"unknown: {', '.join(unknown)}")
    args.precisions = chosen
    args.out.mkdir(parents=True, exist_ok=True)
    ok = measure(args)
    tables(args)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
