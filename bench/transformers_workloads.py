#!/usr/bin/env python3
"""Hugging Face Transformers on a model of random weights: one request at a time, static batches, continuous batching.

python bench/transformers_workloads.py --shape llama3-8b --json transformers.json

Prompts of 128 token ids, greedy, no end tokens, scaled-dot-product attention (paged where it batches continuously).
Every workload is warmed up with its own batch. `static` holds each size of batch, `best_static` names the fastest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import shapes

PARTS = ("one_at_a_time", "static", "continuous")
_PROMPT, _WARM_UP = 128, 8  # tokens


class Transformers:
    def __init__(self, folder: Path, device: str, output: int) -> None:
        import torch
        import transformers

        start = time.perf_counter()
        self._torch, self._transformers, self._device, self._output = torch, transformers, device, output
        config = transformers.AutoConfig.from_pretrained(folder)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            self._model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        torch.set_default_dtype(torch.float32)
        self._model.generation_config.eos_token_id = None
        self._vocab = config.vocab_size
        self._generator = torch.Generator().manual_seed(0)
        self._synchronize()
        weight = next(self._model.parameters())
        self.facts = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "weights": f"{self._model.num_parameters():,} {weight.dtype} on {weight.device}",
            "load_s": time.perf_counter() - start,
        }

    def one_at_a_time(self, count: int) -> dict[str, Any]:
        """What a loop over generate() gives."""
        self._batch(1, _WARM_UP)
        return self._rate(count, lambda: sum(self._batch(1, self._output) for _ in range(count)))

    def static(self, batch: int) -> dict[str, Any]:
        """One batch."""
        self._batch(batch, _WARM_UP)
        return self._rate(batch, lambda: self._batch(batch, self._output))

    def continuous(self, count: int) -> dict[str, Any]:
        """generate_batch() over paged attention; the first call sets the cache up, the second is measured."""
        self._model.set_attn_implementation("paged|sdpa")  # for good: nothing static may follow
        self._continuous(count, _WARM_UP)
        return self._rate(count, lambda: self._continuous(count, self._output))

    def _ids(self, count: int) -> Any:
        return self._torch.randint(10, self._vocab, (count, _PROMPT), generator=self._generator)

    def _batch(self, batch: int, output: int) -> int:
        ids = self._ids(batch).to(self._device)
        with self._torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )
        return batch * int(made.shape[1] - ids.shape[1])

    def _continuous(self, count: int, output: int) -> int:
        config = self._transformers.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        done = self._model.generate_batch(
            inputs=self._ids(count).tolist(),
            generation_config=config,
            max_new_tokens=output,  # the kept manager goes by its first configuration
            progress_bar=False,
            persistent_manager=True,
        )
        return sum(len(one.generated_tokens) for one in done.values())

    def _rate(self, requests: int, run: Callable[[], int]) -> dict[str, Any]:
        self._synchronize()
        start = time.perf_counter()
        tokens = run()
        self._synchronize()
        seconds = time.perf_counter() - start
        if tokens != requests * self._output:
            raise RuntimeError(f"{tokens} tokens came, {requests * self._output} were asked for")
        return {"requests": requests, "s": seconds, "out_tok_s": tokens / seconds}

    def _synchronize(self) -> None:
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize()


def best_static(static: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest of the batches that ran, keyed by their size."""
    ran = {size: one["out_tok_s"] for size, one in static.items() if "out_tok_s" in one}
    if not ran:
        return {}
    size = max(ran, key=lambda s: ran[s])
    return {"batch": int(size), "out_tok_s": ran[size]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=shapes.NAMES, required=True)
    p.add_argument("--only", default=",".join(PARTS), help="some of the parts (default: %(default)s)")
    p.add_argument("--json", metavar="FILE", help="the result, written after every workload")
    p.add_argument("--device", default="cuda")
    p.add_argument("--output-len", type=int, default=64, help="tokens")
    p.add_argument("--one-at-a-time", type=int, default=2, metavar="N", help="requests of that part; it is slow")
    p.add_argument("--batches", default="64,128,256", help="sizes of static batches")
    p.add_argument("--requests", type=int, default=128, help="of continuous batching")
    p.add_argument("--time-limit", type=float, default=150, metavar="SECONDS", help="after which no workload begins")
    args = p.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        model = Transformers(shapes.write_folder(args.shape, Path(parent)), args.device, args.output_len)
    result: dict[str, Any] = {
        "engine": "transformers",
        "model": args.shape,
        **model.facts,
        "prompt_tokens": _PROMPT,
        "output_tokens": args.output_len,
    }
    print(json.dumps(result), flush=True)

    def measure(into: dict[str, Any], name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            late = time.perf_counter() - start > args.time_limit
            into[name] = {"skipped": "the time was up"} if late else run()
        except Exception as error:  # the other workloads may still work
            into[name] = {"failed": repr(error)}
        print(name, json.dumps(into[name]), flush=True)
        if "static" in result:
            result["best_static"] = best_static(result["static"])
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")

    only = args.only.split(",")
    if "one_at_a_time" in only:
        measure(result, "one_at_a_time", lambda: model.one_at_a_time(args.one_at_a_time))
    if "static" in only:
        result["static"] = {}
        for size in args.batches.split(","):
            measure(result["static"], size, partial(model.static, int(size)))
    if "continuous" in only:
        measure(result, "continuous", lambda: model.continuous(args.requests))


if __name__ == "__main__":
    main()
