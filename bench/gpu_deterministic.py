#!/usr/bin/env python3
"""What --deterministic costs: 256 requests of 128/128 tokens at once, and one sequence, with and without it.

python bench/gpu_deterministic.py --shape llama3-8b --json deterministic.json

Both engines are loaded at the same time and measured in turn; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes
from gpu_workloads import Workloads

_LENGTH, _OUTPUT, _BLOCK = 128, 128, 16  # tokens


def measure(engines: dict[str, Workloads], count: int, repeats: int, time_limit_s: float) -> dict[str, Any]:
    """Rounds end early once the time is up; every engine has had the same number of them."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.warm_up()
    start = time.perf_counter()
    while len(runs["plain"]) < repeats and (not runs["plain"] or time.perf_counter() - start < time_limit_s):
        for name, engine in engines.items():
            seconds = engine.go(engine.prompts(count, _LENGTH), [_OUTPUT] * count)
            figures = {"out_tok_s": count * _OUTPUT / seconds, **engine.one_sequence()}
            runs[name].append(figures)
            print(f"{name:<16} {figures['out_tok_s']:9.1f} out tok/s {figures['tpot_ms']:8.3f} ms a token", flush=True)
    result: dict[str, Any] = {"requests": count, "rounds": len(runs["plain"])}
    for name, rounds in runs.items():
        result[name] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    plain, deterministic = result["plain"], result["deterministic"]
    result["deterministic over plain"] = {
        "throughput": deterministic["out_tok_s"] / plain["out_tok_s"],
        "time a token of one sequence": deterministic["tpot_ms"] / plain["tpot_ms"],
        "time to first token of one sequence": deterministic["ttft_ms"] / plain["ttft_ms"],
    }
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=shapes.NAMES, required=True)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--device", default="auto")
    p.add_argument("--requests", type=int, default=256, help="at once")
    p.add_argument("--repeats", type=int, default=3, help="rounds")
    p.add_argument("--time-limit", type=float, default=45, metavar="SECONDS", help="after which no round begins")
    args = p.parse_args()
    options = {
        "load_format": "dummy",
        "device": args.device,
        "max_model_len": 512,
        "max_num_seqs": args.requests,
        "block_size": _BLOCK,
        "num_gpu_blocks_override": args.requests * ((_LENGTH + _OUTPUT) // _BLOCK + 1),
    }
    with tempfile.TemporaryDirectory() as parent:
        folder = shapes.write_folder(args.shape, Path(parent))
        engines = {
            name: Workloads(args.shape, folder, {**options, "deterministic": name == "deterministic"})
            for name in ("plain", "deterministic")
        }
    device = engines["plain"].result["device"]
    result = {"model": args.shape, "device": device, **measure(engines, args.requests, args.repeats, args.time_limit)}
    print(json.dumps(result["deterministic over plain"]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
