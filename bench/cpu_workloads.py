#!/usr/bin/env python3
"""One model in one precision on a CPU: prefill, one sequence, a batch; and growth over sequences and contexts.

prefill: 512 tokens in, 1 out. decode: one prompt of 32, tokens 2 to 128. batch: 64 requests of 128/64, 16 at once,
prompts included. Token-id prompts, greedy, end tokens ignored, no prefix cache. Growth: tokens 2 to 33 of 1 to 64
sequences after 128 tokens, and of one sequence after up to 16k; their prompts are in the prefix cache, so that all
sequences start together.

python bench/cpu_workloads.py --shape smollm2-135m --precision bf16 --json result.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import shapes
import throughput

PRECISIONS = ("bf16", "fp32", "int8", "int4")
PARTS = ("plain", "growth")
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 1024, 4096, 16384)
STEPS = 32  # tokens of each sequence that growth times
_LONG_S = 10.0  # a run longer than this is not repeated


def engine_options(precision: str) -> dict[str, Any]:
    """Arguments of EngineArgs. bf16 and fp32 leave the checkpoint's own compression, which GGUF files may have."""
    dtype = "float32" if precision == "fp32" else "bfloat16"
    return {"dtype": dtype} if precision in ("bf16", "fp32") else {"dtype": dtype, "quantization": precision}


def supported(precision: str) -> bool:
    from fastllm.engine_args import EngineArgs

    try:
        EngineArgs(**engine_options(precision))
    except ValueError:
        return False
    return True


class Workloads:
    """options: arguments of LLM. file: where the result goes after every figure. end: time.monotonic() of the last."""

    def __init__(self, result: dict[str, Any], options: dict[str, Any], repeats: int, file: str | None, end: float):
        self.result, self.options, self.repeats, self.file, self.end = result, options, repeats, file, end
        self.seed = 0

    def run(self, parts: list[str]) -> None:
        if "plain" in parts:
            self._on_engine({"max_num_seqs": 16, "max_model_len": 1024, "enable_prefix_caching": False}, self._plain)
        if "growth" in parts:
            self._on_engine({"max_num_seqs": max(SEQUENCES)}, self._growth)

    def _on_engine(self, options: dict[str, Any], part: Callable[[Any], None]) -> None:
        from fastllm import LLM

        start = time.perf_counter()
        llm = LLM(**self.options, **options)
        self.result.setdefault("load_s", time.perf_counter() - start)
        self.result["held_bytes"] = llm.memory.weights
        try:
            part(llm)
        finally:
            llm.shutdown()
            self.result["peak_rss_mb"] = common.peak_rss_mb()
            self._save()

    def _plain(self, llm: Any) -> None:
        self._go(llm, 1, 64, 4)
        self._go(llm, 1, 512, 2)
        self._record("prefill_tps", lambda: 512 / self._go(llm, 1, 512, 1), self.repeats + 2)
        self._record("decode_tps", lambda: self._one_sequence(llm), self.repeats)
        self._record("batch_out_tps", lambda: 64 * 64 / self._go(llm, 64, 128, 64), self.repeats)

    def _one_sequence(self, llm: Any) -> float:
        first = self._go(llm, 1, 32, 1)
        return 127 / (self._go(llm, 1, 32, 128) - first)

    def _growth(self, llm: Any) -> None:
        limit = llm.model_config.max_model_len
        cases = [("sequences", count, count, 128) for count in SEQUENCES]
        cases += [("contexts", length, 1, length) for length in CONTEXTS]
        for group, name, count, length in cases:
            figures = self.result.setdefault(group, {})
            if length + 1 + STEPS > limit or time.monotonic() > self.end:
                why = "the time is up" if time.monotonic() > self.end else f"the model's limit is {limit} tokens"
                figures[str(name)] = {"skipped": why}
                continue
            figures[str(name)] = {"tps": self._decode_rate(llm, count, length)}
            print(f"{count:3} sequences after {length:5} tokens {figures[str(name)]['tps']:9.1f} tokens/s", flush=True)
            self._save()

    def _decode_rate(self, llm: Any, count: int, length: int) -> float:
        work = self._prompts(llm, count, length)
        throughput.fastllm_run(llm, work, 1)  # fills the cache
        seconds = []
        for _ in range(self.repeats):
            first = throughput.fastllm_run(llm, work, 1)
            seconds.append(throughput.fastllm_run(llm, work, 1 + STEPS) - first)
            if seconds[-1] > _LONG_S or time.monotonic() > self.end:
                break
        return count * STEPS / statistics.median(seconds)

    def _record(self, name: str, measure: Callable[[], float], repeats: int) -> None:
        values: list[float] = []
        start = time.monotonic()
        while len(values) < repeats and (not values or start + len(values) * _LONG_S > time.monotonic() < self.end):
            values.append(measure())
        self.result[name] = statistics.median(values)
        self.result[name.replace("tps", "all")] = values
        print(f"{name:<16} {self.result[name]:9.1f} {[round(v, 1) for v in values]}", flush=True)
        self._save()

    def _go(self, llm: Any, count: int, length: int, output: int) -> float:
        return throughput.fastllm_run(llm, self._prompts(llm, count, length), output)

    def _prompts(self, llm: Any, count: int, length: int) -> list[list[int]]:
        self.seed += 1  # no two runs share a prompt
        return common.prompts(count, length, llm.model_config.vocab_size, self.seed)

    def _save(self) -> None:
        if self.file:
            Path(self.file).write_text(json.dumps(self.result, indent=1), encoding="utf-8")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=shapes.NAMES, help="random weights of this shape")
    which.add_argument("--model", help="a real model instead")
    p.add_argument("--precision", choices=PRECISIONS, default="bf16")
    p.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    p.add_argument("--cpu-threads", type=int, default=0, help="0: every core this process may use")
    p.add_argument("--repeats", type=int, default=3, help="medians are over this many runs, of prefill over 2 more")
    p.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="no new run after it")
    p.add_argument("--json", metavar="FILE", help="the result, written after every figure")
    args = p.parse_args()
    parts = args.parts.split(",")
    if unknown := sorted({*parts} - {*PARTS}):
        p.error(f"unknown parts: {', '.join(unknown)}")
    end = time.monotonic() + args.time_limit

    from fastllm.engine_args import EngineArgs
    from fastllm.loader.model import open_model

    with tempfile.TemporaryDirectory() as parent:
        options = {"device": "cpu", "cpu_threads": args.cpu_threads, **engine_options(args.precision)}
        if args.shape:
            # Rotary positions have no table that would end.
            options["hf_overrides"] = {"max_position_embeddings": 2 * max(CONTEXTS)}
            options |= {"model": str(shapes.write_folder(args.shape, Path(parent))), "load_format": "dummy"}
        else:
            options["model"] = args.model
        result: dict[str, Any] = {
            "engine": "fastllm",
            "model": args.shape or args.model,
            "precision": args.precision,
            "spec": open_model(EngineArgs(**options)).spec,
        }
        Workloads(result, options, args.repeats, args.json, end).run(parts)


if __name__ == "__main__":
    main()
