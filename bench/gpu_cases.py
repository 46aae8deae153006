#!/usr/bin/env python3
"""What the paged KV cache is for, measured: blocks that are nearly full, and parallel samples and beams that share what
they have in common. gpu_prefix.py has shared system prompts.

python bench/gpu_cases.py --shape llama3-8b --json cases.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import shapes


class Cases:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from fastllm import EngineArgs, LLMEngine

        engine_args = EngineArgs(
            model=str(folder),
            load_format="dummy",
            device=args.device,
            max_model_len=4096,
            max_num_seqs=args.max_num_seqs,
            gpu_memory_utilization=0.85,
        )
        self.engine = LLMEngine.from_engine_args(engine_args)
        self.vocab = self.engine.model_config.vocab_size
        self.block_size = self.engine.engine_config.block_size
        self._random = random.Random(0)
        self._last_id = 0

    def kv_utilisation(self) -> dict[str, Any]:
        """Share of allocated KV slots that hold a token, over the steps in which every resident sequence decodes."""
        count = self.engine.engine_config.max_num_seqs * 2
        for i in range(count):
            self._add(self._ids(self._random.randint(32, 512)), self._random.randint(64, 256), salt=str(i))
        shares = []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            stats = self.engine.stats()
            tokens = [self._tokens_of(o) for o in outputs if not o.finished and o.outputs[0].token_ids]
            if stats.used_blocks and len(tokens) == stats.num_running > 1:
                shares.append(sum(tokens) / (stats.used_blocks * self.block_size))
        if not shares:
            raise RuntimeError("no step had every resident sequence decoding")
        return {"median": statistics.median(shares), "least": min(shares), "samples": len(shares), "requests": count}

    def shared_samples(self) -> dict[str, Any]:
        """Most KV blocks in use: eight samples of one prompt of 512 tokens, 64 tokens each."""
        prompt = self._ids(512)
        self._restart_peak()
        self._add(prompt, 64, n=8, temperature=1.0)
        self._finish()
        return self._against_unshared(prompt, 64, 8)

    def beam_search(self) -> dict[str, Any]:
        """Most KV blocks in use: four beams of one prompt of 512 tokens, 64 tokens each."""
        prompt = self._ids(512)
        self._restart_peak()
        start = time.perf_counter()
        self._add(prompt, 64, n=4, use_beam_search=True, temperature=0.0)
        self._finish()
        seconds = time.perf_counter() - start
        return {**self._against_unshared(prompt, 64, 4), "ms_per_token": 1000 * seconds / 64}

    def _against_unshared(self, prompt: list[int], num_output: int, count: int) -> dict[str, Any]:
        """The peak since _restart_peak() beside that of as many requests that share nothing."""
        shared = self.engine.stats().peak_used_blocks
        self._restart_peak()
        for i in range(count):
            self._add(prompt, num_output, temperature=1.0, salt=f"own {i}")
        self._finish()
        own = self.engine.stats().peak_used_blocks
        return {"shared_blocks": shared, "own_blocks": own, "saved": 1 - shared / own}

    def _restart_peak(self) -> None:
        self.engine.reset_prefix_cache()

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    @staticmethod
    def _tokens_of(output: Any) -> int:
        return len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1  # the newest is not in the cache

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(10, self.vocab) for _ in range(count)]

    def _add(self, ids: list[int], max_tokens: int, *, salt: str = "", **sampling: Any) -> None:
        from fastllm import SamplingParams

        params = SamplingParams(
            **{"temperature": 0.0, **sampling}, max_tokens=max_tokens, ignore_eos=True, detokenize=False, seed=0
        )
        self.engine.add_request(str(self._new_id()), {"prompt_token_ids": ids, "cache_salt": salt}, params)

    def _finish(self) -> list[Any]:
        """Runs until nothing is left; the outputs of what finished."""
        outputs = []
        while self.engine.has_unfinished_requests():
            outputs += [output for output in self.engine.step() if output.finished]
        for output in outputs:
            if output.outputs[0].finish_reason == "error":
                raise RuntimeError(str(output.outputs[0].stop_reason))
        return outputs


CASES = ("kv_utilisation", "shared_samples", "beam_search")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=shapes.NAMES, required=True)
    p.add_argument("--only", default=",".join(CASES), help="some of the cases (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="the result, written after every case")
    p.add_argument("--device", default="auto")
    p.add_argument("--max-num-seqs", type=int, default=256)
    args = p.parse_args()
    result: dict[str, Any] = {"model": args.shape}
    with tempfile.TemporaryDirectory() as parent:
        cases = Cases(args, shapes.write_folder(args.shape, Path(parent)))
        for name in args.only.split(","):
            try:
                result[name] = getattr(cases, name)()
            except Exception as error:  # the other cases may still work
                result[name] = {"failed": repr(error)}
            print(name, json.dumps(result[name]), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
