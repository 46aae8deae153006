#!/usr/bin/env python3
"""How fast a model loads on a CPU beside reading its file from the page cache, and the memory that takes at its peak.

The file is read once to warm the cache, then by two threads: over and over into one small buffer, which is the page
cache's own speed, and into fresh memory of the file's size, huge pages where the system grants them, which is the least
that anything takes that keeps the weights. Each load is a process of its own with `LLM(...)` timed whole, configuration
and tokenizer included; the best of the repeats counts on all sides, in turn. Peak: the largest resident size after the
imports' own, mapped pages of the checkpoint included. Held: packed weights, as the engine reports them; the KV cache is
taken on first use and hardly begun at this point.

python bench/cpu_load.py FOLDER@bf16,int8,int4 MODEL.gguf@gguf --json load.json
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tables import table

_CHUNK = 4 << 20  # bytes
_TIMEOUT_S = 300.0


def weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def _read_part(file: Path, begin: int, end: int, keep: mmap.mmap | None) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    fd = os.open(file, os.O_RDONLY)
    try:
        while begin < end:
            size = min(_CHUNK, end - begin)
            begin += os.preadv(fd, [memoryview(keep)[begin : begin + size] if keep else buffer[:size]], begin)
    finally:
        os.close(fd)


def read_seconds(files: list[Path], keep: bool = False, threads: int = 2) -> float:
    """Wall time of reading the files, each cut into a part per thread; keep: into fresh memory."""
    start = time.perf_counter()
    for file in files:
        size = file.stat().st_size
        memory = mmap.mmap(-1, size) if keep else None
        if memory and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        cuts = [size * i // threads for i in range(threads + 1)]
        parts = [(file, begin, end, memory) for begin, end in zip(cuts, cuts[1:], strict=False)]
        workers = [threading.Thread(target=_read_part, args=part) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return time.perf_counter() - start


def _resident(field: str) -> int:
    """Bytes that /proc/self/status gives for VmHWM or VmRSS."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def load(model: str, precision: str, cpu_threads: int) -> dict[str, float]:
    """Loads the model in this process, which ought to be a fresh one."""
    from cpu_workloads import engine_options

    from fastllm import LLM

    options = {"dtype": "bfloat16", "quantization": "gguf"} if precision == "gguf" else engine_options(precision)
    options |= {"device": "cpu", "cpu_threads": cpu_threads, "max_num_seqs": 4}
    before = _resident("VmRSS")
    start = time.perf_counter()
    llm = LLM(model, **options)
    seconds = time.perf_counter() - start
    result = {"load_s": seconds, "peak_bytes": _resident("VmHWM") - before, "held_bytes": llm.memory.weights}
    result["resident_bytes"] = _resident("VmRSS") - before
    llm.shutdown()
    return result


def measure(model: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    files = weight_files(Path(model))
    read_seconds(files)  # warms the cache
    command = [sys.executable, __file__, f"{model}@{precision}", "--one", "--cpu-threads", str(args.cpu_threads)]
    reads, keeps, loads = [], [], []
    for _ in range(args.repeats):
        reads.append(read_seconds(files))
        keeps.append(read_seconds(files, keep=True))
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=True, text=True)
        loads.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(loads, key=lambda one: one["load_s"])
    size = sum(file.stat().st_size for file in files)
    rates = {
        "read_s": min(reads),
        "keep_s": min(keeps),
        "file_bytes": size,
        "of_read_speed": min(reads) / best["load_s"],
        "of_keep_speed": min(keeps) / best["load_s"],
        "peak_of_held": best["peak_bytes"] / best["held_bytes"],
    }
    return {"model": model, "precision": precision, **best, **rates}


def load_table(results: list[dict[str, Any]]) -> str:
    head = ["model", "precision", "file GB", "read s", "read and keep s", "load s", "of read speed", "of keep speed"]
    head += ["held GB", "peak GB", "peak / held"]
    rows = [
        [
            Path(one["model"]).name,
            one["precision"],
            f"{one['file_bytes'] / 1e9:.2f}",
            f"{one['read_s']:.2f}",
            f"{one['keep_s']:.2f}",
            f"{one['load_s']:.2f}",
            f"{one['of_read_speed']:.2f}",
            f"{one['of_keep_speed']:.2f}",
            f"{one['held_bytes'] / 1e9:.2f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
            f"{one['peak_of_held']:.2f}",
        ]
        for one in results
    ]
    return table("Loading from the page cache", head, rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", metavar="MODEL@PRECISION,...", help="of bf16, fp32, int8, int4, gguf")
    p.add_argument("--cpu-threads", type=int, default=0, help="0: every core this process may use")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a load, in this process
    args = p.parse_args()
    cases = [(m, one) for m, _, names in (case.rpartition("@") for case in args.models) for one in names.split(",")]
    if args.one:
        ((model, precision),) = cases
        print(json.dumps(load(model, precision, args.cpu_threads)))
        return
    results = []
    for model, precision in cases:
        results.append(measure(model, precision, args))
        if args.json:
            Path(args.json).write_text(json.dumps({"results": results}, indent=1), encoding="utf-8")
    print(load_table(results))


if __name__ == "__main__":
    main()
