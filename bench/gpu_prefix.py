#!/usr/bin/env python3
"""What the prefix cache saves: a system prompt of one sentence repeated 50 times, three questions ten times each, 100
output tokens.

python bench/gpu_prefix.py --shape llama3-8b --json prefix.json

cold: prefix cache off. warm: on and empty at first, so that only the first request computes the system prompt. filled:
on, right after warm, so that nobody does. Both engines are loaded at the same time and measured in turn. `speedup` is
cold over warm in total time, `ttft_speedup` in the requests' mean time to first token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes

REPEATED, QUESTIONS, ASKED = 50, 3, 10
QUESTION_TOKENS, OUTPUT_TOKENS = 12, 100
_BLOCK = 16  # tokens


def make_prompts(sentence_tokens: int, vocab: int) -> list[list[int]]:
    rng = random.Random(sentence_tokens)

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, vocab) for _ in range(count)]

    system = ids(sentence_tokens) * REPEATED
    return [system + question for question in [ids(QUESTION_TOKENS) for _ in range(QUESTIONS)] for _ in range(ASKED)]


@dataclass
class Run:
    seconds: float
    ttft_s: list[float]  # one per request


class Side:
    """One engine, with or without the prefix cache, that has room for all prompts at once."""

    def __init__(self, folder: Path, device: str, longest: int, caching: bool) -> None:
        from fastllm import LLM

        requests, length = QUESTIONS * ASKED, longest + OUTPUT_TOKENS
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            device=device,
            max_model_len=length + 1,
            max_num_seqs=64,
            block_size=_BLOCK,
            num_gpu_blocks_override=requests * (length // _BLOCK + 2),
            enable_prefix_caching=caching,
        )

    def run(self, prompts: list[list[int]]) -> Run:
        from fastllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(one.outputs[0].token_ids) != OUTPUT_TOKENS for one in done):
            raise RuntimeError("not every request got its tokens")
        return Run(seconds, [one.metrics.first_token_time - one.metrics.arrival_time for one in done])

    def forget(self) -> None:
        """Starts with an empty cache, and counts the most blocks in use anew."""
        self.llm.reset_prefix_cache()

    def looked_up(self) -> tuple[int, int]:
        """Prompt tokens found in the cache, and all."""
        stats = self.llm.stats()
        return stats.prefix_hits, stats.prefix_queries


def at_once(cold: Side, warm: Side, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """All requests together; medians."""
    sides: dict[str, list[Run]] = {"cold": [], "warm": [], "filled": []}
    blocks: dict[str, int] = {}
    for _ in range(repeats):
        cold.forget()
        warm.forget()
        sides["cold"].append(cold.run(prompts))
        before = warm.looked_up()
        sides["warm"].append(warm.run(prompts))
        hits, asked = (b - a for a, b in zip(before, warm.looked_up(), strict=True))
        blocks = {"cold": cold.llm.stats().peak_used_blocks, "warm": warm.llm.stats().peak_used_blocks}
        sides["filled"].append(warm.run(prompts))
    seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in sides.items()}
    ttft = {name: statistics.median(statistics.mean(run.ttft_s) for run in runs) for name, runs in sides.items()}
    return {
        **_figures(seconds, ttft, hits / max(asked, 1)),
        "peak_kv_blocks": blocks,
        "kv_saved": 1 - blocks["warm"] / blocks["cold"],
    }


def one_by_one(cold: Side, warm: Side, prompts: list[list[int]], time_limit_s: float) -> dict[str, Any]:
    """Each request alone, first cold, then warm. Ends early once the time is up; sums are over the same requests."""
    cold.forget()
    warm.forget()
    before = warm.looked_up()
    runs: dict[str, list[Run]] = {"cold": [], "warm": []}
    start = time.perf_counter()
    for prompt in prompts:
        runs["cold"].append(cold.run([prompt]))
        runs["warm"].append(warm.run([prompt]))
        if time.perf_counter() - start > time_limit_s:
            break
    hits, asked = (b - a for a, b in zip(before, warm.looked_up(), strict=True))
    seconds = {name: sum(run.seconds for run in of) for name, of in runs.items()}
    ttft = {name: statistics.mean(run.ttft_s[0] for run in of) for name, of in runs.items()}
    return {"requests": len(runs["cold"]), **_figures(seconds, ttft, hits / max(asked, 1))}


def _figures(seconds: dict[str, float], ttft: dict[str, float], hit_rate: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "s": seconds,
        "mean_ttft_ms": {name: value * 1e3 for name, value in ttft.items()},
        "speedup": seconds["cold"] / seconds["warm"],
        "ttft_speedup": ttft["cold"] / ttft["warm"],
    }
    if "filled" in seconds:
        figures["speedup_filled"] = seconds["cold"] / seconds["filled"]
        figures["ttft_speedup_filled"] = ttft["cold"] / ttft["filled"]
    return {**figures, "hit_rate": hit_rate}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=shapes.NAMES, required=True)
    p.add_argument("--json", metavar="FILE", help="the result, written as it grows")
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--sentence-tokens",
        default="20,40",
        help="lengths of the repeated sentence; all but the first only all at once, and once (default: %(default)s)",
    )
    p.add_argument("--repeats", type=int, default=3, help="of all at once")
    p.add_argument("--time-limit", type=float, default=40, metavar="SECONDS", help="of one by one")
    args = p.parse_args()
    sentences = [int(one) for one in args.sentence_tokens.split(",")]
    longest = max(sentences) * REPEATED + QUESTION_TOKENS
    with tempfile.TemporaryDirectory() as parent:
        folder = shapes.write_folder(args.shape, Path(parent))
        cold, warm = (Side(folder, args.device, longest, caching) for caching in (False, True))
    vocab = warm.llm.model_config.vocab_size
    for side in (cold, warm):
        side.run([ids[:64] for ids in make_prompts(1, vocab)])  # warm-up
    result: dict[str, Any] = {"model": args.shape, "device": warm.llm.memory.device or args.device}

    def record(name: str, key: str, figures: dict[str, Any]) -> None:
        result[name][key] = figures
        print(f"{name}, {key}: {json.dumps(figures)}", flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")

    for i, sentence in enumerate(sentences):
        prompts = make_prompts(sentence, vocab)
        name = f"{REPEATED} x {sentence} + {QUESTION_TOKENS} tokens"
        result[name] = {"requests": len(prompts), "prompt_tokens": len(prompts[0]), "output_tokens": OUTPUT_TOKENS}
        print(f"{name}: {json.dumps(result[name])}", flush=True)
        record(name, "all at once", at_once(cold, warm, prompts, 1 if i else args.repeats))
        if i == 0:
            record(name, "one by one", one_by_one(cold, warm, prompts, args.time_limit))


if __name__ == "__main__":
    main()
