"""Flags of vLLM that have no choice to offer here: what they may say, and why nothing else.

A `Fixed` flag asks for what happens anyway when it has one of its `same` values, and is an error otherwise. The flags
of `_ABSENT` are errors whatever their value. Nothing is ignored silently.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastllm.arg_parser import JsonObject, OnOff, parse_object


@dataclass(frozen=True)
class Fixed:
    names: str  # the flag and its short form
    kind: Callable[[str], Any] | None  # None: a switch
    default: Any  # vLLM's, where that is what happens
    same: tuple[Any, ...]
    reason: str


_REPLICAS = "one process serves one replica; start several behind a proxy"
_HOSTS = "a model runs on one host; --tensor-parallel-size splits it over that host's devices"
_IMAGES = "images, audio and video are not served"
_LORA = "LoRA adapters are not served"
_NOT_COMPILED = "no graph is compiled; --enforce-eager turns recorded GPU steps off"
_DRAFTS = "speculative decoding is not supported"
_OFFLOAD = "weights stay on the device; --swap-space moves KV blocks to host memory"
_TRANSFER = "KV blocks are not moved between servers"

FIXED: tuple[Fixed, ...] = (
    # ---- parallelism
    Fixed("--data-parallel-size -dp", int, 1, (1,), _REPLICAS),
    Fixed("--api-server-count -asc", int, None, (1,), "one process answers HTTP"),
    Fixed("--nnodes -n", int, 1, (1,), _HOSTS),
    Fixed("--node-rank -r", int, 0, (0,), _HOSTS),
    Fixed("--master-addr", str, "127.0.0.1", ("127.0.0.1", "localhost"), _HOSTS),
    Fixed("--headless", None, False, (False,), _HOSTS),
    Fixed("--enable-expert-parallel -ep", None, False, (False,), "mixtures of experts are not supported"),
    Fixed("--disable-custom-all-reduce", None, True, (True,), "ranks on GPUs reduce through NCCL"),
    Fixed(
        "--distributed-executor-backend",
        str,
        None,
        ("mp", "uni", "ray"),  # all of them run the ranks of one host on that host
        "ranks are threads of this process, and need no launcher",
    ),
    Fixed("--worker-use-ray", None, False, (False,), "ranks are threads of this process and need no Ray"),
    # ---- model and weights
    Fixed("--tokenizer-mode", str, "auto", ("auto", "hf", "fast"), "only fast Hugging Face tokenizers are read"),
    Fixed("--skip-tokenizer-init", None, False, (False,), "stop strings, chat and text answers need the tokenizer"),
    Fixed("--runner", str, "auto", ("auto", "generate"), "only models that generate text are served"),
    Fixed("--convert", str, "auto", ("auto", "none"), "only models that generate text are served"),
    Fixed("--task", str, "auto", ("auto", "generate"), "only models that generate text are served"),
    Fixed("--model-impl", str, "auto", ("auto",), "models are described by families/, not by classes"),
    Fixed("--cpu-offload-gb", float, 0.0, (0.0,), _OFFLOAD),
    Fixed("--use-tqdm-on-load", None, True, (True,), "progress is drawn on terminals only"),
    Fixed("--enable-sleep-mode", None, False, (False,), "weights are never unloaded; stop the server instead"),
    # ---- cache and scheduler
    Fixed(
        "--prefix-caching-hash-algo",
        str,
        "sha256",
        ("sha256", "sha256_cbor"),
        "cached blocks are compared token by token; no weaker hash is offered",
    ),
    Fixed("--kv-offloading-backend", str, "native", ("native",), _OFFLOAD),
    Fixed("--num-scheduler-steps", int, 1, (1,), "every step is scheduled; --async-scheduling hides its cost"),
    Fixed("--use-v2-block-manager", None, True, (True,), "there is one block manager"),
    Fixed("--max-num-partial-prefills", int, 1, (1,), "--long-prefill-token-threshold lets short prompts pass"),
    Fixed("--scheduler-delay-factor", float, 0.0, (0.0,), "--scheduler-delay takes the delay itself, in seconds"),
    Fixed("--tokenizer-pool-type", str, "thread", ("thread",), "tokenizers work on threads"),
    # ---- execution
    Fixed("--compilation-config -cc", parse_object, {}, ({},), _NOT_COMPILED),
    Fixed("--optimization-level -O", str, "2", ("2", "O2"), _NOT_COMPILED),
    Fixed("--performance-mode", str, "balanced", ("balanced",), "--max-num-seqs and --max-num-batched-tokens decide"),
    Fixed("--attention-backend", str, None, ("auto",), "each device has one set of attention kernels"),
    Fixed(
        "--logprobs-mode", str, "raw_logprobs", ("raw_logprobs",), "logprobs are taken before penalties and temperature"
    ),
    Fixed("--profiler-config", parse_object, {}, ({},), "there is no built-in profiler"),
    # ---- API
    Fixed("--chat-template-content-format", str, "auto", ("auto", "string"), "templates are given content as a string"),
    Fixed(
        "--enable-auto-tool-choice", None, True, (True,), "tool calls are found by the chat template; no flag is needed"
    ),
    Fixed("--enable-reasoning", None, True, (True,), "reasoning is split off where the chat template has it"),
    Fixed("--enable-request-id-headers", None, True, (True,), "every answer carries X-Request-Id"),
    Fixed("--enable-prompt-tokens-details", None, True, (True,), "usage always has prompt_tokens_details"),
    Fixed("--return-tokens-as-token-ids", None, False, (False,), "a request gets the ids with return_token_ids: true"),
    Fixed("--enable-server-load-tracking", None, True, (True,), "/load always counts"),
    Fixed("--disable-frontend-multiprocessing", None, True, (True,), "one process answers HTTP and runs the engine"),
    Fixed("--enable-log-outputs", None, False, (False,), "answers are never logged"),
    Fixed(
        "--structured-outputs-config",
        parse_object,
        {},
        ({}, {"backend": "auto"}, {"backend": "guidance"}),
        "llguidance checks all grammars",
    ),
    Fixed("--allowed-local-media-path", str, "", ("",), _IMAGES),
    Fixed("--limit-mm-per-prompt", parse_object, {}, ({}, {"image": 0}, {"image": 0, "video": 0}), _IMAGES),
    Fixed("--language-model-only", None, True, (True,), _IMAGES),
    # ---- LoRA
    Fixed("--enable-lora", None, None, (False,), _LORA),
    Fixed("--max-loras", int, 1, (1,), _LORA),
    Fixed("--max-lora-rank", int, 16, (16,), _LORA),
)

# Flags, or their common beginnings ("--mm-*") -> why.
_ABSENT: dict[str, str] = {
    "--mm-* --enable-mm-embeds --media-io-kwargs --interleave-mm-strings "
    "--skip-mm-profiling --video-* --allowed-media-domains --trust-request-mm-kwargs --disable-chunked-mm-input "
    "--image-*": _IMAGES,
    "--lora-* --max-cpu-loras --fully-sharded-loras --default-mm-loras --enable-tower-connector-lora "
    "--specialize-active-lora --enable-mixed-moe-lora-format --enable-moe-shared-loras --max-lora-cls-labels": _LORA,
    "--speculative-* -sc --spec-* --num-speculative-tokens --ngram-* --per-request-spec-decode-metrics": _DRAFTS,
    "--kv-transfer-config --kv-events-config --ec-* --kv-connector-*": _TRANSFER,
    "--kv-offloading-size --offload-* --cpu-offload-params": _OFFLOAD,
    "--data-parallel-* -dpn -dpr -dpl -dpa -dpp -dpb -dph -dpe -dpm --dp-* --aggregate-engine-logging "
    "--disable-nccl-for-dp-synchronization": _REPLICAS,
    "--master-port --distributed-timeout-seconds --cpu-distributed-timeout-seconds --enable-fault-tolerance "
    "--fault-tolerance-config --ray-workers-use-nsight": _HOSTS,
    "--decode-context-* -dcp --dcp-* --cp-* --prefill-context-* -pcp": "a sequence's context is not split over ranks",
    "--all2all-backend --*eplb* --expert-* --enable-elastic-ep --elastic-ep-* --enable-ep-weight-filter --moe-backend "
    "--enable-return-routed-experts": "mixtures of experts are not supported",
    "--mamba-* --enable-mamba-* --gdn-* --kda-* --replayssm-* --use-replayssm": "state-space models are not supported",
    "--enable-dbo --dbo-* --ubatch-size --enable-hc-sp --enable-batch-sharded-sampling --enable-shm-tensor-arena": (
        "batches are not split"
    ),
    "--numa-bind --numa-bind-*": "--cpu-bind places threads and their memory",
    "--device-ids": "--device cuda:N chooses the GPU, CUDA_VISIBLE_DEVICES which are seen",
    "--max-parallel-loading-workers --safetensors-* --model-loader-extra-config --ignore-patterns "
    "--pt-load-map-location": "weights are mapped from their files; there is nothing to tune",
    "--cudagraph-capture-sizes --max-cudagraph-capture-size --cuda-graph-sizes --max-seq-len-to-capture "
    "--cudagraph-metrics --jit-monitor-*": "GPU steps are recorded for the sizes that occur",
    "--attention-config -ac --kernel-config --linear-backend --ir-op-priority --enable-flashinfer-autotune "
    "--monokernel --sparse-indexer-topk-backend --disable-cascade-attn --use-fp64-gumbel": (
        "each device has one set of kernels"
    ),
    "--additional-config --engram-config --diffusion-config -dc --aux-output-config --weight-transfer-config "
    "--watermark-config --reasoning-config --watchdog-config --enable-flash-late-interaction "
    "--sleep-* --enable-cumem-allocator --enable-nccl-comm-suspend": "this engine has no such part",
    "--worker-cls --worker-extension-cls --scheduler-cls --model-class-overrides --middleware --io-processor-plugin "
    "--tool-parser-plugin --reasoning-parser-plugin --logits-processors": (
        "the server loads no code by name; LLM.generate takes a logits processor per request"
    ),
    "--code-revision": "code that comes with a model is never run",
    "--hf-config-path --config-format --tokenizer-revision --quantization-config --allow-deprecated-quantization": (
        "config and tokenizer come from the model's folder; see --hf-overrides, --revision and --tokenizer"
    ),
    "--rope-scaling --rope-theta": "write it as --hf-overrides.rope_scaling or --hf-overrides.rope_theta",
    "--pooler-config --override-pooler-config": "only models that generate text are served",
    "--enable-prompt-embeds": "prompts are text or token ids",
    "--disable-sliding-window --disable-hybrid-kv-cache-manager --swa-bounded-replay": "windows are the model's",
    "--return-sampling-mask --enable-trace-replay": "samples are chosen by the sampling parameters alone",
    "--kv-cache-dtype-skip-layers --kv-sharing-fast-prefill --prefix-cache-retention-interval --prefix-match-unit": (
        "all layers share one kind of KV cache"
    ),
    "--max-num-queued-reqs --max-num-queued-tokens": "--max-waiting limits the sequences that wait for those that run",
    "--max-num-scheduled-tokens": "--max-num-batched-tokens limits a step",
    "--max-num-active-seqs": "--max-num-seqs limits the sequences that run",
    "--long-prefill-token-threshold-adaptive --scheduler-reserve-full-isl --watermark --prefill-schedule-interval": (
        "admission is not tunable beyond --max-num-seqs, --max-num-batched-tokens and --long-prefill-token-threshold"
    ),
    "--grpc --grpc-port": "requests come over HTTP",
    "--h11-*": "--max-body-bytes limits bodies; lines of a header end at 8190 bytes",
    "--disable-fastapi-docs --enable-offline-docs --enable-scale-out --tokens-only --cohere-* "
    "--enable-tokenizer-info-endpoint --enable-per-request-metrics": "this server has no such endpoint or field",
    "--fingerprint-*": "system_fingerprint is the version",
    "--trust-request-chat-template": "a request cannot bring a template",
    "--default-chat-template-kwargs --reasoning-effort-map --anthropic-disabled-thinking-effort": (
        "requests set chat_template_kwargs themselves"
    ),
    "--exclude-tools-when-tool-choice-none --tool-strict-level --tool-server": (
        "tools follow the request; none are run by the server"
    ),
    "--guided-decoding-backend": "llguidance checks all grammars; --structured-outputs-config.backend takes guidance",
    "--enable-log-deltas": "answers are never logged",
    "--log-error-stack": "the log has the stack of internal errors, and no other error has one",
    "--logging-config --log-config-file": "--log-level, --log-format and --uvicorn-log-level configure logs",
    "--otlp-traces-endpoint --collect-detailed-traces --enable-layerwise-nvtx-tracing": "traces are not exported",
    "--show-hidden-metrics-for-version": "--metric-aliases adds the older names",
    "--custom-histogram-buckets --kv-cache-metrics --kv-cache-metrics-sample --enable-mfu-metrics "
    "--enable-logging-iteration-details": "the metrics are those of /metrics and /stats",
    "--fail-on-environ-validation": "variables without effect are named at the start",
}


def reason_for(flag: str) -> str | None:
    """Why the server does not have `flag`, or None if that is no flag of vLLM's."""
    bare = "--" + flag.partition(".")[0].removeprefix("--").removeprefix("no-") if flag.startswith("--") else flag
    for names, reason in _ABSENT.items():
        if any(_matches(name, variant) for name in names.split() for variant in _variants(bare)):
            return reason
    return None


def _variants(flag: str) -> tuple[str, str]:
    """--disable-x is the negation of --enable-x, and the other way round."""
    if flag.startswith("--disable-"):
        return flag, "--enable-" + flag.removeprefix("--disable-")
    return flag, "--disable-" + flag.removeprefix("--enable-") if flag.startswith("--enable-") else flag


def _matches(name: str, flag: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(flag, name)


def add_fixed_flags(parser: argparse.ArgumentParser) -> None:
    for row in FIXED:
        if row.names.split()[0] in parser._option_string_actions:
            continue  # this parser has a real one
        action: type[argparse.Action] = _FixedValue
        settings: dict[str, Any] = {"type": row.kind}
        if row.kind is None:
            action, settings = _FixedSwitch, {}
        elif row.kind is parse_object:
            action = _FixedObject
        parser.add_argument(
            *row.names.split(), action=action, default=row.default, help=argparse.SUPPRESS, fixed=row, **settings
        )


class _FixedValue(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, fixed: Fixed, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self._fixed = fixed

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        _check(parser, self._fixed, values)
        setattr(namespace, self.dest, values)


class _FixedObject(JsonObject):
    def __init__(self, option_strings: Sequence[str], dest: str, fixed: Fixed, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self._fixed = fixed

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        super().__call__(parser, namespace, values, option)
        _check(parser, self._fixed, getattr(namespace, self.dest))


class _FixedSwitch(OnOff):
    def __init__(self, option_strings: Sequence[str], dest: str, fixed: Fixed, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        self._fixed = fixed

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        super().__call__(parser, namespace, values, option)
        if getattr(namespace, self.dest) not in self._fixed.same:
            parser.error(f"{option}: {self._fixed.reason}")


def _check(parser: argparse.ArgumentParser, fixed: Fixed, value: Any) -> None:
    if value in fixed.same:
        return
    shown = json.dumps(value) if isinstance(value, dict) else value
    allowed = " or ".join(json.dumps(v) if isinstance(v, dict) else str(v) for v in fixed.same if v != "")
    only = f" (only {allowed} is accepted)" if allowed else ""
    parser.error(f"{fixed.names.split()[0]} {shown}: {fixed.reason}{only}")


def explain() -> str:
    """The whole table, for --help=refused."""
    lines = ["Flags of vLLM that accept only what happens anyway:"]
    for row in FIXED:
        values = "off" if row.same == (False,) else "on" if row.same == (True,) else ", ".join(map(str, row.same))
        lines.append(f"  {row.names.split()[0]} ({values or 'empty'}): {row.reason}")
    lines.append("Flags of vLLM that are refused:")
    for names, reason in _ABSENT.items():
        lines += [f"  {name}: {reason}" for name in names.split()]
    return "\n".join(lines)
