#!/usr/bin/env python3
"""Hugging Face Transformers on a model of random weights: one request at a time, static batches, continuous batching.

python bench/transformers_workloads.py --shape llama3-8b --json transformers.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shapes

PARTS = ("one_at_a_time", "static", "continuous")


class Transformers:
    def __init__(self, folder: Path, device: str) -> None:
        import torch
        import transformers

        self._torch, self._transformers, self._device = torch, transformers, device
        config = transformers.AutoConfig.from_pretrained(folder)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self._model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        torch.set_default_dtype(torch.float32)
        self._vocab = config.vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def one_at_a_time(self, count: int, output: int) -> dict[str, float]:
        """What a loop over generate() gives."""
        self._batch(1, 16)
        return self._rate(lambda: sum(self._batch(1, output) for _ in range(count)))

    def static(self, count: int, output: int, batch: int) -> dict[str, float]:
        self._batch(batch, 16)
        return self._rate(lambda: sum(self._batch(batch, output) for _ in range(0, count, batch)))

    def continuous(self, count: int, output: int) -> dict[str, float]:
        """generate_batch() over paged attention."""
        self._model.set_attn_implementation("paged|sdpa")
        self._continuous(8, 16)
        return self._rate(lambda: self._continuous(count, output))

    def _ids(self, count: int) -> Any:
        return self._torch.randint(10, self._vocab, (count, 128), generator=self._generator)

    def _batch(self, batch: int, output: int) -> int:
        ids = self._ids(batch).to(self._device)
        with self._torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                min_new_tokens=output,
                max_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )
        return batch * (made.shape[1] - ids.shape[1])

    def _continuous(self, count: int, output: int) -> int:
        config = self._transformers.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        done = self._model.generate_batch(
            inputs=self._ids(count).tolist(), generation_config=config, progress_bar=False
        )
        return sum(len(one.generated_tokens) for one in done.values())

    def _rate(self, run: Callable[[], int]) -> dict[str, float]:
        self._synchronize()
        start = time.perf_counter()
        tokens = run()
        self._synchronize()
        seconds = time.perf_counter() - start
        return {"s": seconds, "tokens": tokens, "out_tok_s": tokens / seconds}

    def _synchronize(self) -> None:
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=shapes.NAMES, required=True)
    p.add_argument("--only", default=",".join(PARTS), help="some of the parts (default: %(default)s)")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--device", default="cuda")
    p.add_argument("--output-len", type=int, default=256, help="tokens")
    p.add_argument("--one-at-a-time", type=int, default=2, metavar="N", help="requests of that part; it is slow")
    p.add_argument("--batches", default="64,256", help="sizes of static batches")
    p.add_argument("--requests", type=int, default=256)
    args = p.parse_args()
    result: dict[str, Any] = {"engine": "transformers", "model": args.shape}
    only = args.only.split(",")
    with tempfile.TemporaryDirectory() as parent:
        model = Transformers(shapes.write_folder(args.shape, Path(parent)), args.device)
    parts: dict[str, Callable[[], dict[str, float]]] = {}
    if "one_at_a_time" in only:
        parts["one_at_a_time"] = lambda: model.one_at_a_time(args.one_at_a_time, args.output_len)
    if "static" in only:
        for size in map(int, args.batches.split(",")):
            parts[f"static_b{size}"] = lambda size=size: model.static(args.requests, args.output_len, size)
    if "continuous" in only:
        parts["continuous"] = lambda: model.continuous(args.requests, args.output_len)
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception as error:  # the other parts may still work
            result[name] = {"failed": repr(error)}
        print(name, json.dumps(result[name]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
