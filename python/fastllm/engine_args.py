"""Everything that can be chosen about an engine, with vLLM's names and defaults, for Python and the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastllm.arg_parser import JsonObject, OnOff, parse_length, parse_object, parse_size
from fastllm.device import Device, default_limits, is_device_name
from fastllm.environment import cpu_kv_bytes, cpu_threads
from fastllm.refused_flags import add_fixed_flags

if TYPE_CHECKING:
    from fastllm import _core

DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8", "fp8", "fp8_e4m3")
CHECKPOINT_QUANTIZATIONS = ("gguf", "awq", "gptq", "compressed-tensors")
QUANTIZATIONS = ("none", "int8", "int4", *CHECKPOINT_QUANTIZATIONS)
_SWAP_GIB = 4.0
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy", "null")


def _arg(default: Any, group: str, help: str, *, secret: bool = False, **cli: Any) -> Any:
    """A field with its place in --help; `cli` goes to add_argument."""
    metadata = {"group": group, "help": help, "cli": cli}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass
class EngineArgs:
    """Arguments of an engine; the help of each field is its documentation. Raises ValueError for a wrong value."""

    model: str = _arg(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model",
        "folder, .gguf file, hub id, package:NAME for an installed package with one .gguf file, or null",
    )
    tokenizer: str | None = _arg(None, "model", "folder or hub id of the tokenizer, if not the model's")
    served_model_name: str | list[str] | None = _arg(
        None, "model", "names used in the API; the first one is shown", nargs="+"
    )
    dtype: str = _arg("auto", "model", "weights and activations; auto: the checkpoint's 16-bit type", choices=DTYPES)
    max_model_len: int | None = _arg(
        None, "model", "tokens of prompt and output; default: the model's limit", type=parse_length
    )
    load_format: str = _arg(
        "auto", "model", "dummy: random weights; null: no model, hashes (for tests)", choices=LOAD_FORMATS
    )
    revision: str | None = _arg(None, "model", "branch, tag or commit on the hub")
    hf_token: str | bool | None = _arg(
        None,
        "model",
        "token for gated models on the hub; without a value, the one of `hf auth login`",
        type=str,
        nargs="?",
        const=True,
        secret=True,
    )
    download_dir: str | None = _arg(None, "model", "where hub downloads go; default: the hub's cache")
    hf_overrides: dict[str, Any] = _arg(
        {}, "model", "JSON object merged into config.json", type=parse_object, action=JsonObject
    )
    generation_config: str = _arg(
        "auto", "model", "default sampling parameters: auto (the model's), vllm (none), or a folder"
    )
    override_generation_config: dict[str, Any] = _arg(
        {}, "model", "JSON object merged into the generation config", type=parse_object, action=JsonObject
    )
    chat_template: str | None = _arg(None, "model", "file with a chat template, or the template itself")
    trust_remote_code: bool = _arg(False, "model", "accepted; code from a checkpoint is never run", action=OnOff)
    quantization: str | None = _arg(
        None,
        "model",
        "int8, int4: quantise linear layers when loading (CPUs only; logits with 8 bits); none: never compressed, "
        "not even checkpoints that are; gguf, awq, gptq, compressed-tensors (what the checkpoint is) or not given: as "
        "the checkpoint, compressed ones staying so on CPUs",
        short="-q",
    )
    seed: int = _arg(0, "model", "seed of requests that have none", type=int)

    device: str = _arg("auto", "device", "cpu, cuda or cuda:N; auto: a GPU if one can be used, else the CPU")
    tensor_parallel_size: int = _arg(1, "device", "ranks that share every layer", type=int, short="-tp")
    pipeline_parallel_size: int = _arg(1, "device", "accepted; only 1 is supported", type=int, short="-pp")
    cpu_threads: int = _arg(
        0, "device", "threads over all ranks; 0: the usable physical cores, or those of --cpu-bind", type=int
    )
    cpu_bind: str | None = _arg(
        None,
        "device",
        "auto: threads are bound to cores where there are several memory nodes; cores: always; none: never; or a list "
        "such as 0-7,16 with a thread bound to each, | between ranks; default: VLLM_CPU_OMP_THREADS_BIND, else auto",
    )
    gpu_memory_utilization: float = _arg(
        0.92,
        "device",
        "share of a GPU's memory for weights, activations and KV cache; unused on CPUs",
        type=float,
        alias="--device-memory-utilization",
    )
    enforce_eager: bool = _arg(False, "device", "no GPU graphs; CPUs have none", action=OnOff)
    deterministic: bool = _arg(
        False, "device", "GPU kernels whose results do not depend on the rest of the batch (slower)", action=OnOff
    )

    block_size: int | None = _arg(None, "cache", "tokens per KV block; default 16", type=int)
    kv_cache_memory_bytes: int | None = _arg(
        None, "cache", "KV cache, such as 2G; default: sized from the free memory", type=parse_size
    )
    kv_cache_dtype: str = _arg(
        "auto",
        "cache",
        "auto: as the activations; int8: half the size, a scale for each position and head, CPUs only (as are other "
        "types than the activations'); fp8: half the size, GPUs only",
        choices=KV_CACHE_DTYPES,
    )
    num_gpu_blocks_override: int | None = _arg(None, "cache", "KV blocks, instead of bytes", type=int)
    swap_space: float | None = _arg(
        None,
        "cache",
        "GiB of host memory (pinned on GPUs) for the KV blocks of preempted sequences; default 4 with "
        "--preemption-mode swap, which is the mode where a size is given",
        type=float,
    )
    enable_prefix_caching: bool = _arg(True, "cache", "reuse the KV of equal prompt beginnings", action=OnOff)

    max_num_seqs: int | None = _arg(
        None, "scheduler", "sequences that run at once; default 256, 1024 on GPUs of 70 GiB or more", type=int
    )
    max_num_batched_tokens: int | None = _arg(
        None, "scheduler", "tokens of one step; default 2048, up to 16384 on GPUs", type=parse_size
    )
    long_prefill_token_threshold: int = _arg(
        0, "scheduler", "tokens of one prompt per step; 0: no limit but the step's", type=parse_size
    )
    enable_chunked_prefill: bool | None = _arg(
        None, "scheduler", "accepted; prompts longer than a step are always chunked", action=OnOff
    )
    scheduling_policy: str = _arg("fcfs", "scheduler", "order of requests", choices=("fcfs", "priority"))
    preemption_mode: str | None = _arg(
        None,
        "scheduler",
        "when KV blocks run out; default recompute, or swap with --swap-space",
        choices=("recompute", "swap"),
    )
    stream_interval: int = _arg(1, "scheduler", "tokens between two updates of a stream, after its first", type=int)
    async_scheduling: bool = _arg(True, "scheduler", "plan a step while the last one runs", action=OnOff)
    max_logprobs: int = _arg(20, "scheduler", "most alternatives a request may ask for; -1: all", type=int)
    check_invariants: bool = _arg(False, "scheduler", "validate the scheduler after every step (slow)", action=OnOff)

    disable_log_stats: bool = _arg(False, "logging", "no periodic statistics", action=OnOff)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            choices = one.metadata["cli"].get("choices")
            value = getattr(self, one.name)
            if choices and value not in choices and value != one.default:
                raise ValueError(f"{one.name} must be one of {', '.join(choices)}, got {value!r}.")
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if not is_device_name(self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}."
            )
        if self.pipeline_parallel_size != 1:
            raise ValueError("pipeline_parallel_size must be 1; use tensor_parallel_size to split a model.")
        if self.enable_chunked_prefill is False:
            raise ValueError(
                "enable_chunked_prefill cannot be turned off: prompts longer than a step are always chunked. To see "
                "whole prompts in one step, set max_num_batched_tokens to max_model_len."
            )
        # Only the kernels differ, which are chosen by the device here.
        self.quantization = _KERNEL_NAMES.get(self.quantization or "", self.quantization)
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is not supported; known are {', '.join(QUANTIZATIONS)}."
            )

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds one option per field, grouped. Defaults are those of the class."""
        groups: dict[str, Any] = {}
        for one in dataclasses.fields(cls):
            title = one.metadata["group"]
            group = groups.setdefault(title, None) or parser.add_argument_group(title)
            groups[title] = group
            cli = dict(one.metadata["cli"])
            names = [f"--{one.name.replace('_', '-')}"]
            names += [cli.pop("alias")] if "alias" in cli else []
            short = cli.pop("short", None)
            default = {} if one.default is dataclasses.MISSING else one.default
            shown = "" if default in (None, {}) else " (default: %(default)s)"
            help_text = one.metadata["help"].replace("%", "%%") + shown
            dest = one.name
            group.add_argument(*([short] if short else []), *names, dest=dest, default=default, help=help_text, **cli)
        add_fixed_flags(parser)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
        return cls(**given)

    @property
    def served_model_names(self) -> list[str]:
        names = self.served_model_name or self.model
        return [names] if isinstance(names, str) else list(names)

    def compute_dtype(self) -> str:
        """The type the engine computes in. "auto" is bfloat16 for every checkpoint: fp32 ones are cast down."""
        return "float32" if self.dtype in ("float32", "float") else "bfloat16"

    def to_core(
        self, max_model_len: int, vocab_size: int, device: Device | None = None, *, offline: bool = False
    ) -> _core.EngineConfig:
        """The core's configuration on `device`, as choose_device() gave it (None: the CPU). offline: for batches."""
        from fastllm import _core

        device = device or Device()
        max_num_seqs, max_num_batched_tokens = default_limits(device, offline)
        config = _core.EngineConfig()
        config.device = device.name
        config.kv_cache_dtype = "fp8" if self.kv_cache_dtype == "fp8_e4m3" else self.kv_cache_dtype
        config.gpu_memory_utilization = self.gpu_memory_utilization
        config.enforce_eager = self.enforce_eager
        config.deterministic = self.deterministic
        config.dtype = self.compute_dtype()
        config.quantization = "auto" if self.quantization in (None, *CHECKPOINT_QUANTIZATIONS) else self.quantization
        config.max_model_len = max_model_len
        config.prefix_caching = self.enable_prefix_caching
        config.preemption = self.preemption_mode or ("swap" if self.swap_space else "recompute")
        config.policy = self.scheduling_policy
        swap_gib = _SWAP_GIB if self.swap_space is None else self.swap_space
        config.swap_bytes = int(swap_gib * 2**30) if config.preemption == "swap" else 0
        config.async_depth = 2 if self.async_scheduling else 1
        config.tensor_parallel_size = self.tensor_parallel_size
        config.cpu_bind = self.cpu_bind or os.environ.get("VLLM_CPU_OMP_THREADS_BIND") or "auto"
        asked_threads = cpu_threads() if config.cpu_bind == "auto" else 0
        config.cpu_threads = self.cpu_threads or (asked_threads and max(asked_threads, self.tensor_parallel_size))
        config.max_chunk = self.long_prefill_token_threshold
        config.max_logprobs = vocab_size if self.max_logprobs == -1 else self.max_logprobs
        config.seed = self.seed % 2**64
        config.check_invariants = self.check_invariants
        for ours, value in (
            ("max_num_seqs", max_num_seqs if self.max_num_seqs is None else self.max_num_seqs),
            (
                "max_step_tokens",
                max_num_batched_tokens if self.max_num_batched_tokens is None else self.max_num_batched_tokens,
            ),
            ("block_size", self.block_size),
            ("kv_cache_bytes", self.kv_cache_memory_bytes or (cpu_kv_bytes() if device.name == "cpu" else None)),
            ("num_blocks", self.num_gpu_blocks_override),
        ):
            if value is not None:
                setattr(config, ours, value)
        return config


_KERNEL_NAMES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
_MINIMUM = {
    "max_model_len": 1,
    "tensor_parallel_size": 1,
    "cpu_threads": 0,
    "block_size": 1,
    "kv_cache_memory_bytes": 1,
    "num_gpu_blocks_override": 1,
    "swap_space": 0,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "long_prefill_token_threshold": 0,
    "max_logprobs": -1,
    "stream_interval": 1,
}

AsyncEngineArgs = EngineArgs
