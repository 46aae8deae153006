"""What the benchmark scripts share: flags, prompts, statistics, printing."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import sys
from collections.abc import Iterable
from typing import Any


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", required=True, help="Hugging Face folder, GGUF file, hub id or package:NAME")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--cpu-threads", type=int, default=0, help="0: every core this process may use")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--repeats", type=int, default=5, help="medians are over this many runs")
    p.add_argument("--json", metavar="FILE", help="also write the result here")
    return p


def make_llm(args: argparse.Namespace, **overrides: Any) -> Any:
    from fastllm import LLM

    options: dict[str, Any] = {"dtype": args.dtype, "cpu_threads": args.cpu_threads, "enable_prefix_caching": False}
    return LLM(args.model, **{**options, **overrides})


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random ids without the first thousand, where special tokens live."""
    rng = random.Random(seed)
    low = min(1000, vocab // 2)
    return [[rng.randrange(low, min(30000, vocab)) for _ in range(length)] for _ in range(count)]


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, and the ends of what was seen."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
    }


def percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def report(title: str, rows: list[tuple[str, str]], result: dict[str, Any], path: str | None) -> None:
    """A table for people, then one line of JSON for programs."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    text = json.dumps(result)
    print(text)
    sys.stdout.flush()
    if path:
        with open(os.fspath(path), "w", encoding="utf-8") as f:
            f.write(text + "\n")
