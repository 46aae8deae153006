"""Which device an engine computes on, and what depends on its size. Nothing here touches a GPU unless one is asked for
or the GPU backend is installed."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.errors import InvalidArgument, ResourceError

if TYPE_CHECKING:
    from fastllm import _core

log = logging.getLogger("fastllm")

_PLUGIN = "libfastllm_cuda.so"  # beside _core
_PLUGIN_VARIABLE = "FASTLLM_CUDA_PLUGIN"  # or where this says
_LARGE_GPU = 70 << 30  # bytes
_CUBLASLT = ("cu13/lib/libcublasLt.so.13", "cublas/lib/libcublasLt.so.12")  # in the folders of NVIDIA's wheels
_CUBLASLT_VARIABLE = "FASTLLM_CUBLASLT_LIB"


@dataclass(frozen=True)
class Device:
    """name: as the core takes it. memory: bytes of a GPU, 0 on the CPU."""

    name: str = "cpu"
    memory: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.name.startswith("cuda")


def is_device_name(name: str) -> bool:
    return name in ("auto", "cpu", "cuda") or (name.startswith("cuda:") and name[5:].isdecimal())


def choose_device(wanted: str, ranks: int = 1) -> Device:
    """The device for "auto", "cpu", "cuda" or "cuda:N", said in one log line; `ranks` GPUs from N on are needed.

    Raises ResourceError if a GPU was asked for and cannot be used, saying why.
    """
    from fastllm import _core

    if not is_device_name(wanted):
        raise InvalidArgument(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}.")
    if wanted == "cpu" or (wanted == "auto" and not _plugin_exists()):
        log.info("Device: cpu.")
        return Device()
    find_nvidia_libraries()
    count, why = _core.cuda_device_count()
    first = int(wanted[5:]) if wanted.startswith("cuda:") else 0
    if first + ranks <= count:
        name = f"cuda:{first}"
        log.info("Device: %s%s, of %d GPU(s).", name, f" to cuda:{first + ranks - 1}" if ranks > 1 else "", count)
        return Device(name, _core.cuda_device_memory(first))
    if count:
        why = f"{ranks} GPU(s) from number {first} on are wanted, {count} can be used"
    if wanted == "auto":
        log.info("Device: cpu; no GPU can be used: %s.", why.rstrip("."))
        return Device()
    raise ResourceError(f"device={wanted!r} cannot be used: {why.rstrip('.')}.")


def default_limits(device: Device, offline: bool) -> tuple[int | None, int | None]:
    """max_num_seqs and max_num_batched_tokens where the user chose none, vLLM's for such a device; None: the core's.

    offline: a batch of prompts wants throughput, a server also short steps.
    """
    if not device.is_gpu:
        return None, None
    if device.memory >= _LARGE_GPU:
        return 1024, 16384 if offline else 8192
    return 256, 8192 if offline else 2048


def find_nvidia_libraries() -> None:
    """Names cuBLASLt for the GPU backend where it does not look by itself: NVIDIA's wheels in another site folder."""
    if os.environ.get(_CUBLASLT_VARIABLE):
        return
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return
    own = Path(__file__).parent.parent / "nvidia"
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    if own in folders:
        return
    for file in (folder / name for name in _CUBLASLT for folder in folders):
        if file.is_file():
            os.environ[_CUBLASLT_VARIABLE] = str(file)
            return


def memory_line(memory: _core.EngineMemory, kv_tokens: int, max_model_len: int) -> str:
    """What took how much of a GPU, for the log."""

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f}"

    return (
        f"GPU memory {gib(memory.total)} GiB of {memory.device}: {gib(memory.weights)} weights, "
        f"{gib(memory.activations)} activations, {gib(memory.graphs)} graphs, {gib(memory.kv_cache)} KV cache "
        f"({kv_tokens:,} tokens, {kv_tokens / max_model_len:.1f} x max_model_len), {gib(memory.other)} other, "
        f"{gib(memory.free)} free."
    )


def _plugin_exists() -> bool:
    from fastllm import _core

    return bool(os.environ.get(_PLUGIN_VARIABLE)) or Path(_core.__file__).with_name(_PLUGIN).is_file()
