"""What /stats says: scheduler, KV cache and prefix cache as they are, and why requests wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastllm.server.state import ServerState

if TYPE_CHECKING:
    from fastllm import _core

# The engine's word for what the head of the line lacks -> a sentence for operators.
_WHY = {
    "slots": "{config.max_num_seqs} sequences run, the most that may (--max-num-seqs).",
    "blocks": "{free} of {stats.total_blocks} KV blocks are free, too few for the next request: give the KV cache more "
    "memory (--kv-cache-memory-bytes, --gpu-memory-utilization), or lower --max-num-seqs.",
    "tokens": "Each step computes {config.max_step_tokens} tokens (--max-num-batched-tokens), and requests that came "
    "before use them up.",
    "prompt": "Samples wait for the prompt that they share, or for steps under way.",
}


def waiting_reason(stats: _core.EngineStats, config: _core.EngineConfig) -> str | None:
    """Why the first request in line did not start with the last step; None if nobody waits."""
    if stats.wait_reason is None:
        return None
    return _WHY[stats.wait_reason].format(stats=stats, config=config, free=stats.total_blocks - stats.used_blocks)


def _numbers(snapshot: object) -> dict[str, int | float | bool]:
    values = {name: getattr(snapshot, name) for name in dir(snapshot) if not name.startswith("_")}
    return {name: value for name, value in values.items() if isinstance(value, (int, float, bool))}


def describe(state: ServerState) -> dict[str, Any]:
    """`engine` is null, and what is read from it missing, until the model is loaded."""
    server = {
        "phase": state.phase.value,
        "uptime_s": round(time.monotonic() - state.started, 3),
        "load_progress": state.load_progress,
        "active_requests": state.active_requests,
        "active_sequences": state.active_sequences,
        "queued_sequences": state.gate.waiting_sequences,
        "queued_tokens": state.gate.waiting_tokens,
        "loop_lag_s": round(state.watch.loop_lag_s, 4),
        "max_loop_lag_s": round(state.watch.max_loop_lag_s, 4),
        "max_loop_work_s": round(state.watch.max_loop_work_s, 4),
    }
    return server | (_describe_engine(state) if state.loaded else {"engine": None})


def _describe_engine(state: ServerState) -> dict[str, Any]:
    stats, config = state.llm.stats(), state.llm.engine_config
    return {
        "waiting_reason": waiting_reason(stats, config),
        "scheduler": {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "swapped": stats.num_swapped,
            "lacking": stats.wait_reason,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_step_tokens,
            "policy": config.policy,
            "steps": stats.num_steps,
            "preemptions": stats.num_preemptions,
            "finished_requests": stats.num_finished,
            "aborted_requests": stats.num_aborted,
            "nan_rows": stats.nan_rows,
        },
        "kv_cache": {
            "blocks": stats.total_blocks,
            "used_blocks": stats.used_blocks,
            "cached_blocks": stats.cached_blocks,
            "usage": round(stats.used_blocks / stats.total_blocks, 6) if stats.total_blocks else 0.0,
            "block_size": config.block_size,
            "tokens": stats.total_blocks * config.block_size,
            "dtype": config.kv_cache_dtype,
            "leaked_blocks": stats.block_leaks,
        },
        "prefix_cache": {
            "enabled": config.prefix_caching,
            "queried_tokens": stats.prefix_queries,
            "hit_tokens": stats.prefix_hits,
            "hit_rate": round(stats.prefix_hits / stats.prefix_queries, 6) if stats.prefix_queries else 0.0,
        },
        "engine": _numbers(stats),
    }
