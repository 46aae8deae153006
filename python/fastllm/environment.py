"""Environment variables: FASTLLM_X, or VLLM_X for those who come from there, where no flag says otherwise.

Only the names below are read. A Kubernetes service called `fastllm` or `vllm` injects FASTLLM_PORT and the like, which
mean something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

_PREFIXES = ("FASTLLM_", "VLLM_")  # the first one wins


def _level(text: str) -> str:
    level = text.lower()
    if level not in ("debug", "info", "warning", "error", "critical"):
        raise ValueError("a log level: debug, info, warning, error or critical")
    return level


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    value = _number(text)
    if value is None:
        raise ValueError("seconds, 0 or more")
    return value


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,9}(\.\d*)?", text) else None


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise ValueError("0 or 1")
    return text.lower() in ("1", "true")


# Name without its prefix -> (where its flag's value goes, how it is read)
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "LOGGING_LEVEL": ("log_level", _level),
    "LOG_STATS_INTERVAL": ("log_stats_interval", _seconds),
    "HTTP_TIMEOUT_KEEP_ALIVE": ("keepalive_timeout_s", _seconds),
    "MAX_N_SEQUENCES": ("max_n", _count),
    "MAX_COMPLETION_PROMPTS": ("max_prompts", _count),
    "MAX_STOP_STRINGS": ("max_stop_strings", _count),
    "BATCH_INVARIANT": ("deterministic", _switch),
}
_ALSO_READ = frozenset({"VLLM_API_KEY", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"})
_FROM_KUBERNETES = re.compile(r"VLLM_(SERVICE_.*|PORT|PORT_.*)")


def defaults_from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The defaults that variables give, by the name of the flag's value. Raises ValueError naming the variable."""
    defaults: dict[str, Any] = {}
    for name, (dest, read) in _VARIABLES.items():
        for variable in (prefix + name for prefix in _PREFIXES):
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                defaults.setdefault(dest, read(text))
            except ValueError as error:
                raise ValueError(f"{variable} must be {error}, got {text[:40]!r}") from None
    return defaults


def cpu_kv_bytes(environ: Mapping[str, str] = os.environ) -> int | None:
    """The KV cache of CPUs, from GiB. Raises ValueError naming the variable."""
    for variable in (prefix + "CPU_KVCACHE_SPACE" for prefix in _PREFIXES):
        text = environ.get(variable, "").strip()
        if text:
            value = _number(text)
            if value is None:
                raise ValueError(f"{variable} must be GiB, 0 or more, got {text[:40]!r}")
            return int(value * 2**30) or None
    return None


def cpu_threads(environ: Mapping[str, str] = os.environ) -> int:
    """What OMP_NUM_THREADS asks for, at most the usable CPUs; 0: nothing."""
    match = re.match(r"\d+", environ.get("OMP_NUM_THREADS", "").strip())
    return min(int(match[0]), len(os.sched_getaffinity(0))) if match else 0


def explain() -> str:
    """The variables, for --help=environment."""
    flags = {"keepalive_timeout_s": "keepalive-timeout"}
    lines = ["Environment variables, FASTLLM_ before VLLM_; a flag on the command line or in --config wins:"]
    lines += [f"  FASTLLM_{n}, VLLM_{n}: --{flags.get(d, d.replace('_', '-'))}" for n, (d, _) in _VARIABLES.items()]
    lines += [
        "  FASTLLM_API_KEY, VLLM_API_KEY: one more --api-key",
        "  FASTLLM_CPU_KVCACHE_SPACE, VLLM_CPU_KVCACHE_SPACE: --kv-cache-memory-bytes on CPUs, in GiB",
        "  VLLM_CPU_OMP_THREADS_BIND: --cpu-bind",
        "  OMP_NUM_THREADS: --cpu-threads, unless --cpu-bind is given",
        "  HF_HOME, HF_TOKEN, HF_HUB_OFFLINE: as the Hugging Face hub's library reads them",
    ]
    return "\n".join(lines)


def without_effect(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of vLLM's variables that are set and mean nothing here."""
    known = _ALSO_READ | {f"VLLM_{name}" for name in _VARIABLES}
    names = (name for name in environ if name.startswith("VLLM_") and name not in known)
    return sorted(name for name in names if not _FROM_KUBERNETES.fullmatch(name))
