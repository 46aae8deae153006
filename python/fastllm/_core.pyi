"""The C++ engine as Python sees it: tokens in, tokens out. Built from cpp/bindings; see cpp/include/fastllm/*.h."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm.outputs import TokenIds

__version__: str

class FastllmError(RuntimeError): ...
class InvalidArgument(FastllmError, ValueError): ...
class LoadError(FastllmError): ...
class ResourceError(FastllmError): ...

class EngineConfig:
    """fastllm::EngineConfig: every field is a keyword and an attribute, with C++'s default (see fastllm/types.h)."""

    device: str
    dtype: str
    quantization: str  # "auto" | "none" | "int8" | "int4"
    max_model_len: int
    max_num_seqs: int
    max_step_tokens: int
    max_chunk: int
    block_size: int
    kv_cache_bytes: int
    num_blocks: int
    swap_bytes: int
    kv_cache_dtype: str  # "auto" | "fp8"
    gpu_memory_utilization: float
    enforce_eager: bool
    deterministic: bool
    preemption: str  # "recompute" | "swap"
    policy: str  # "fcfs" | "priority"
    prefix_caching: bool
    async_depth: int
    tensor_parallel_size: int
    cpu_threads: int
    cpu_bind: str
    max_logprobs: int
    max_waiting: int
    seed: int
    check_invariants: bool
    def __init__(self, **fields: Any) -> None: ...

class SamplingParams:
    """fastllm::SamplingParams: every field is a keyword and an attribute (see fastllm/types.h)."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    n: int
    beam_width: int
    seed: int | None
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_ids: list[int]
    length_penalty: float
    early_stopping: str  # "no" | "yes" | "never"
    logit_bias: list[tuple[int, float]]
    allowed_ids: list[int]
    bad_words: list[list[int]]
    logprobs: int
    prompt_logprobs: int
    def __init__(self, **fields: Any) -> None: ...

class SourceTensor:
    """One checkpoint tensor; `data` is any object with the buffer protocol and is kept alive, never copied."""

    def __init__(
        self,
        name: str,
        type: str,
        shape: Sequence[int],
        data: Any,
        interleaved_head_dim: int = 0,
        packing: Packing | None = None,
    ) -> None: ...

class Packing:
    """What belongs to the codes of a tensor: layout "gptq" | "awq" | "rows", bits, columns of a group (0: all)."""

    def __init__(
        self,
        layout: str,
        bits: int,
        group: int,
        zeros_less_one: bool,
        scales: SourceTensor,
        zeros: SourceTensor | None = None,
        group_of: SourceTensor | None = None,
    ) -> None: ...

class WeightBinding:
    """transform: "copy" | "transpose" | "qkv_concat" | "qkv_grouped" | "gate_up_concat"."""

    def __init__(
        self, canonical: str, sources: Sequence[SourceTensor], transform: str = "copy", add_one: bool = False
    ) -> None: ...

# (token, logprob, rank)
LogprobEntry = tuple[int, float, int]
# (the token that stands there, its alternatives best first)
PositionLogprobs = tuple[LogprobEntry, list[LogprobEntry]]

class TokenDelta:
    """What became known of one sequence since the last poll."""

    id: int
    index: int
    tokens: list[int]
    logprobs: list[PositionLogprobs]
    num_prompt_logprobs: int
    finish: str | None  # None | "stop" | "length" | "abort" | "error"
    stop_token: int | None
    cached_tokens: int
    num_preemptions: int
    error: str
    error_kind: str | None  # None | "invalid" | "overloaded" | "timeout" | "engine"
    # time.monotonic() seconds: arrival, first scheduled, first token, finished; 0.0 while unknown
    times: tuple[float, float, float, float]

    def prompt_logprobs(self, begin: int, count: int) -> list[PositionLogprobs]:
        """`count` of them from `begin` on, or what there is."""

class EngineStats:
    """fastllm::EngineStats, a snapshot."""

    num_running: int
    num_waiting: int
    num_swapped: int
    wait_reason: str | None  # None | "slots" | "blocks" | "tokens" | "prompt"
    total_blocks: int
    used_blocks: int
    peak_used_blocks: int  # since the start or the last reset_prefix_cache()
    cached_blocks: int
    num_steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int
    num_finished: int
    num_aborted: int
    nan_rows: int  # results that were not numbers, each of which ended a request
    block_leaks: int
    host_s: float  # the engine thread's time outside its waits
    last_step_age_s: float
    healthy: bool

class Heartbeat:
    """fastllm::Heartbeat: the engine thread's sign of life."""

    count: int  # advances at the begin and the end of every step
    busy: bool  # False while there is nothing to do
    age_s: float  # since count last advanced

class EngineMemory:
    """fastllm::EngineMemory: what the memory of the first GPU went to, in bytes; on CPUs only weights is known."""

    device: str
    total: int
    weights: int
    activations: int
    graphs: int
    kv_cache: int
    other: int
    free: int
    inflated: list[str]  # weights packed in the checkpoint that a CPU keeps dense, "canonical name: why"

class Engine:
    @staticmethod
    def create(
        config: EngineConfig,
        spec_json: str,
        weights: Sequence[WeightBinding],
        progress: Callable[[int, int], None] | None = None,
    ) -> Engine: ...
    @staticmethod
    def open(config: EngineConfig, bundle_dir: str, progress: Callable[[int, int], None] | None = None) -> Engine: ...
    @staticmethod
    def create_null(
        config: EngineConfig, vocab: int = 32000, max_len: int = 4096, eos: Sequence[int] = (), step_us: int = 0
    ) -> Engine: ...
    def submit(
        self,
        id: int,
        prompt: TokenIds,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        cache_salt: str = "",
        logits_processor: Callable[[list[int], list[int], NDArray[np.float32]], Any] | None = None,
        mask: Any | None = None,
    ) -> None:
        """Never blocks. logits_processor(prompt_ids, output_ids, logits) changes the row in place or returns a new one.

        mask: an object with fill(bits: NDArray[uint32]), accept(token: int) -> bool and clone(); see TokenMask.
        """
    def abort(self, id: int, index: int | None = None) -> None:
        """Ends a request, or one sample of it."""
    def poll(self, timeout_s: float = 0.0, until_end: bool = False) -> list[TokenDelta]:
        """Everything since the last poll, one delta per sequence; the GIL is released while it waits.

        until_end: waits for the end of a sequence, not for any token.
        """
    def event_fd(self) -> int: ...
    def stats(self) -> EngineStats: ...
    def heartbeat(self) -> Heartbeat: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def memory(self) -> EngineMemory: ...
    @property
    def spec_json(self) -> str: ...
    def reset_prefix_cache(self) -> None: ...
    def drain(self, timeout_s: float) -> bool: ...
    def shutdown(self) -> None: ...

def dequantize(type: str, data: Any, rows: int, cols: int) -> NDArray[np.float32]:
    """[rows, cols] fp32 from checkpoint rows of a SourceType, for tests and conversion."""

def group_bits(type: str) -> int:
    """Bits of the codes that a SourceType keeps when it is computed on as it is; 0 if it is not."""

def export_weights(spec_json: str, weights: Sequence[WeightBinding], path: str, dtype: str) -> None:
    """Writes canonical tensors as safetensors, one at a time. dtype: "float32" | "bfloat16" | "float16"."""

def first_outside(ids: TokenIds, vocab: int) -> int | None:
    """The index of the first element that is not an int of at least 0 and below vocab."""

class JsonBody:
    """A request body as read_json_body() found it.

    most: depth, keys of one object, elements of one array; each with the top-level field it was found in. values: JSON
    values in known fields, less those cut. unknown: the first 16 unknown fields. error: why it is no JSON, or "".
    error_field: in which a number is out of range, if that is the error. bad_id: (list, index, text) of the first
    element of a long list of ids that is none; list is -1 outside of lists of lists. small: the body without long
    values. cuts: (place, key or index, long value), whose mark is in `small`. places: (place, key or index) of what
    cuts are in; -1 is the body.
    """

    @property
    def most(self) -> list[tuple[int, str | None]]: ...
    @property
    def values(self) -> int: ...
    @property
    def unknown(self) -> list[str]: ...
    @property
    def error(self) -> str: ...
    @property
    def error_field(self) -> str | None: ...
    @property
    def bad_id(self) -> tuple[int, int, bytes] | None: ...
    @property
    def small(self) -> bytes: ...
    @property
    def places(self) -> list[tuple[int, str | int]]: ...
    @property
    def cuts(self) -> list[tuple[int, str | int, str | memoryview]]: ...

def read_json_body(text: bytes | bytearray, *, fields: Sequence[str], ids_field: str = "", mark: str) -> JsonBody:
    """Checks JSON and takes long values out of it, without the GIL. Value i leaves `mark` and i.

    fields: those that are read; others are checked and dropped. ids_field: may hold token ids, or lists of them; they
    become memoryviews of 32-bit ints, and their mark a list of one number. mark: decimal digits.
    """

def usable_cores() -> int: ...
def cuda_device_count() -> tuple[int, str]:
    """GPUs that can be used, and what is missing when there are none. Loads the GPU backend if it is there."""

def cuda_device_memory(device: int) -> int:
    """Bytes of a GPU. Raises ResourceError if it cannot be used."""

def cpu_isa() -> str: ...
