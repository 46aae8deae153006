#!/usr/bin/env python3
"""One model through LLM.generate: single-stream latency, batches, many requests, mixed lengths, prefill.

Token-id prompts, greedy, end tokens ignored, no text, prefix cache off; the prompts and their order are those of the
scripts that measure vLLM and TurboMind, and so are the keys of the result. `short` is what transformers_workloads.py
asks of Transformers. `host` is the engine thread's time per step outside its waits; what is left of the step's time is
the device's.

python bench/gpu_workloads.py --shape llama3-8b --json ours.json
python bench/gpu_workloads.py --shape tiny --device cpu --only latency,batch
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes

PARTS = ("latency", "batch", "short", "throughput", "mixed", "prefill")


class Workloads:
    """options: arguments of LLM. file: where the result goes after every workload."""

    def __init__(self, name: str, folder: Path, options: dict[str, Any], file: str | None = None) -> None:
        from fastllm import LLM

        start = time.perf_counter()
        self.llm = LLM(str(folder), enable_prefix_caching=False, **options)
        load_s = time.perf_counter() - start
        self.file = file
        self.vocab = self.llm.model_config.vocab_size
        self.limit = self.llm.model_config.max_model_len
        self._random = random.Random(0)
        config, memory = self.llm.engine_config, self.llm.memory
        self.result: dict[str, Any] = {
            "engine": "fastllm",
            "model": name,
            "device": memory.device or config.device,
            "load_s": load_s,
            "cfg": {
                name: getattr(config, name)
                for name in ("max_num_seqs", "max_step_tokens", "max_model_len", "block_size", "num_blocks")
            },
            "memory": {
                name: getattr(memory, name)
                for name in ("total", "weights", "activations", "graphs", "kv_cache", "other", "free")
            },
        }
        print(f"{self.result['model']} on {self.result['device']}: loaded in {load_s:.1f} s, {self.result['cfg']}")

    def run(self, only: list[str]) -> None:
        self.warm_up()
        parts: dict[str, Callable[[], None]] = {name: getattr(self, f"_{name}") for name in PARTS}
        for name, part in parts.items():
            if name not in only:
                continue
            try:
                part()
            except Exception as error:  # the other parts may still work
                print(f"{name} failed: {error}", flush=True)
                self.result.setdefault("failed", {})[name] = repr(error)
            self._save()

    def warm_up(self) -> None:
        self.go(self.prompts(8, 128), [16] * 8)

    def _save(self) -> None:
        if self.file:
            Path(self.file).write_text(json.dumps(self.result, indent=1), encoding="utf-8")

    def _prompt(self, length: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self._random.randrange(10, self.vocab) for _ in range(length)]}

    def prompts(self, count: int, length: int) -> list[dict[str, list[int]]]:
        return [self._prompt(length) for _ in range(count)]

    def go(self, prompts: list[dict[str, list[int]]], outputs: list[int]) -> float:
        """Seconds that one call of generate took. Raises unless every request got its tokens."""
        from fastllm import SamplingParams

        start = time.perf_counter()
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outputs]
        done = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        made = [len(o.outputs[0].token_ids) for o in done]
        if made != outputs:
            raise RuntimeError(f"{sum(made)} tokens came, {sum(outputs)} were asked for")
        return seconds

    def one_sequence(self) -> dict[str, float]:
        """Milliseconds of a request of 128 tokens in and out, until its first token, and per token after that."""
        e2e = self.go([self._prompt(128)], [128]) * 1e3
        ttft = self.go([self._prompt(128)], [1]) * 1e3
        return {"e2e_ms": e2e, "ttft_ms": ttft, "tpot_ms": (e2e - ttft) / 127}

    def _latency(self) -> None:
        before = self.llm.stats()
        runs = [self.one_sequence() for _ in range(3)]
        figures = {key: statistics.median(run[key] for run in runs) for key in ("e2e_ms", "ttft_ms")}
        figures["tpot_ms"] = (figures["e2e_ms"] - figures["ttft_ms"]) / 127
        figures["host_us_per_step"] = self._host_us(before, self.llm.stats())
        self.result["bs1_128_128"] = figures
        print(
            f"{'bs1_128_128':<32} {figures['tpot_ms']:8.3f} ms a token, first after {figures['ttft_ms']:.2f} ms"
            f" {figures['host_us_per_step']:6.1f} us host",
            flush=True,
        )
        for length in (512, 2048, 4000):
            if length + 1 > self.limit:
                continue
            ms = statistics.median(self.go([self._prompt(length)], [1]) for _ in range(5)) * 1e3
            self.result[f"ttft_{length}"] = ms
            print(f"{f'ttft_{length}':<32} {ms:8.2f} ms", flush=True)

    def _batch(self) -> None:
        for count in (8, 32, 64, 128, 256):
            self._same(f"static_b{count}_128_128", count, 128, 128)

    def _short(self) -> None:
        for count in (1, 64, 128, 256):
            self._same(f"static_b{count}_128_64", count, 128, 64)

    def _throughput(self) -> None:
        for count in (100, 256, 1000):
            self._same(f"tp_{count}x128_256", count, 128, 256)

    def _mixed(self) -> None:
        lengths = random.Random(1)
        inputs = [lengths.randint(32, 1024) for _ in range(512)]
        outputs = [lengths.randint(32, 512) for _ in range(512)]
        self._record("mixed_512_in32-1024_out32-512", [self._prompt(n) for n in inputs], outputs)

    def _prefill(self) -> None:
        self._same("prefill_64x2048", 64, 2048, 1)

    def _same(self, name: str, count: int, length: int, output: int) -> None:
        self._record(name, self.prompts(count, length), [output] * count)

    def _record(self, name: str, prompts: list[dict[str, list[int]]], outputs: list[int]) -> None:
        before = self.llm.stats()
        seconds = self.go(prompts, outputs)
        after = self.llm.stats()
        steps = after.num_steps - before.num_steps
        made, given = sum(outputs), sum(len(p["prompt_token_ids"]) for p in prompts)
        figures = {
            "s": seconds,
            "reqs": len(prompts),
            "out_tok_s": made / seconds,
            "total_tok_s": (made + given) / seconds,
            "req_s": len(prompts) / seconds,
            "steps": steps,
            "us_per_step": seconds / max(steps, 1) * 1e6,
            "host_us_per_step": self._host_us(before, after),
            "preemptions": after.num_preemptions - before.num_preemptions,
        }
        self.result[name] = figures
        self._save()
        print(
            f"{name:<32} {seconds:7.2f} s {figures['out_tok_s']:9.1f} out tok/s {figures['total_tok_s']:9.1f} tot tok/s"
            f" {figures['req_s']:7.2f} req/s {figures['us_per_step']:9.1f} us a step"
            f" {figures['host_us_per_step']:6.1f} us host",
            flush=True,
        )

    @staticmethod
    def _host_us(before: Any, after: Any) -> float:
        seconds, steps = after.host_s - before.host_s, after.num_steps - before.num_steps
        return float(seconds / max(steps, 1) * 1e6)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=shapes.NAMES, help="random weights of this shape")
    which.add_argument("--model", help="a real model instead")
    p.add_argument("--only", default=",".join(PARTS), help="some of the parts (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="the result, written after every workload")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--max-model-len", type=int, default=4096)
    p.add_argument("--max-num-seqs", type=int, default=256)
    p.add_argument("--max-num-batched-tokens", type=int, help="default: the device's")
    p.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    p.add_argument("--kv-cache-dtype", default="auto")
    p.add_argument("--tensor-parallel-size", type=int, default=1)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--deterministic", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(args.model) if args.model else shapes.write_folder(args.shape, Path(parent))
        options = {
            "load_format": "auto" if args.model else "dummy",
            "dtype": args.dtype,
            "device": args.device,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": args.max_num_batched_tokens,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "kv_cache_dtype": args.kv_cache_dtype,
            "enforce_eager": args.enforce_eager,
            "deterministic": args.deterministic,
            "tensor_parallel_size": args.tensor_parallel_size,
        }
        Workloads(args.model or args.shape, folder, options, args.json).run(args.only.split(","))


if __name__ == "__main__":
    main()
