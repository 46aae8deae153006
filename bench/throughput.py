#!/usr/bin/env python3
"""Offline throughput: many requests at once, output tokens a second, prompt processing included.

python bench/throughput.py --model DIR --num-prompts 64 --input-len 128 --output-len 64 --max-num-seqs 16
python bench/throughput.py ... --peer transformers     # the same work by static batches of generate(), in turn
"""

from __future__ import annotations

import time
from typing import Any

import common


def fastllm_run(llm: Any, work: list[list[int]], output_len: int) -> float:
    from fastllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in work], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    if made != len(work) * output_len:
        raise SystemExit(f"{made} tokens came back, {len(work) * output_len} were asked for")
    return seconds


class Transformers:
    """generate() of Hugging Face in static batches: all requests have one length, which flatters it."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(self, work: list[list[int]], output_len: int, batch: int) -> float:
        start = time.perf_counter()
        for begin in range(0, len(work), batch):
            ids = self.torch.tensor(work[begin : begin + batch])
            with self.torch.inference_mode():
                self.model.generate(
                    ids,
                    attention_mask=self.torch.ones_like(ids),
                    min_new_tokens=output_len,
                    max_new_tokens=output_len,
                    do_sample=False,
                )
        return time.perf_counter() - start


def main() -> None:
    p = common.parser(__doc__ or "")
    p.add_argument("--num-prompts", type=int, default=64)
    p.add_argument("--input-len", type=int, default=128, help="tokens")
    p.add_argument("--output-len", type=int, default=64, help="tokens")
    p.add_argument("--max-num-seqs", type=int, default=16, help="sequences running at once")
    p.add_argument("--max-num-batched-tokens", type=int, default=2048)
    p.add_argument(
        "--peer", choices=["none", "transformers"], default="none", help="run it alternately, print the ratio"
    )
    args = p.parse_args()

    llm = common.make_llm(
        args,
        max_model_len=args.input_len + args.output_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    vocab = llm.get_tokenizer().vocab_size
    peer = Transformers(args.model, args.dtype) if args.peer == "transformers" else None
    total = args.num_prompts * args.output_len
    fastllm_run(llm, common.prompts(args.max_num_seqs, args.input_len, vocab, args.seed), args.output_len)  # warm up
    ours: list[float] = []
    theirs: list[float] = []
    for repeat in range(args.repeats):
        work = common.prompts(args.num_prompts, args.input_len, vocab, args.seed + 1 + repeat)
        ours.append(total / fastllm_run(llm, work, args.output_len))
        if peer:
            theirs.append(total / peer.run(work, args.output_len, args.max_num_seqs))

    result: dict[str, Any] = {
        "benchmark": "throughput",
        "model": args.model,
        "dtype": args.dtype,
        "num_prompts": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "max_num_seqs": args.max_num_seqs,
        "output_tokens_per_s": common.summary(ours),
        "peak_rss_mb": round(common.peak_rss_mb()),
    }
    rows = [
        ("output tokens/s, median", f"{result['output_tokens_per_s']['median']:.1f}"),
        (
            "all tokens/s, median",
            f"{result['output_tokens_per_s']['median'] * (1 + args.input_len / args.output_len):.1f}",
        ),
        ("runs", ", ".join(f"{x:.1f}" for x in ours)),
        ("peak RSS", f"{result['peak_rss_mb']} MB"),
    ]
    if theirs:
        ratio = result["output_tokens_per_s"]["median"] / common.summary(theirs)["median"]
        result["peer"] = {"name": args.peer, "output_tokens_per_s": common.summary(theirs), "ratio": ratio}
        rows += [("transformers", f"{common.summary(theirs)['median']:.1f}"), ("ratio", f"{ratio:.2f}x")]
    common.report(f"{args.num_prompts} x {args.input_len}/{args.output_len} on {args.model}", rows, result, args.json)


if __name__ == "__main__":
    main()
