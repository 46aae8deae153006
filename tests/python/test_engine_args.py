"""EngineArgs: what vLLM users type is understood, and wrong values are refused."""

from __future__ import annotations

import argparse

import pytest

from fastllm import LLM, EngineArgs
from fastllm.arg_parser import FlexibleArgumentParser, parse_size


def parse(*arguments: str) -> EngineArgs:
    return EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(arguments))


def test_defaults_of_command_line_and_class_agree() -> None:
    assert parse() == EngineArgs()


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--max_model_len", "4k"], "max_model_len", 4000),
        (["--max-model-len=4K"], "max_model_len", 4096),
        (["--max-model-len", "-1"], "max_model_len", None),
        (["--max-model-len", "auto"], "max_model_len", None),
        (["--kv-cache-memory-bytes", "2G"], "kv_cache_memory_bytes", 2**31),
        (["-tp", "2"], "tensor_parallel_size", 2),
        (["--enable-prefix-caching"], "enable_prefix_caching", True),
        (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
        (["--disable-prefix-caching"], "enable_prefix_caching", False),
        (["--no-async-scheduling"], "async_scheduling", False),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--gpu-memory-utilization", "0.85"], "gpu_memory_utilization", 0.85),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8"),
        (["--kv-cache-dtype", "int8"], "kv_cache_dtype", "int8"),
        (["--quantization", "int4"], "quantization", "int4"),
        (["--enforce-eager"], "enforce_eager", True),
        (["--cpu-bind", "0-3|4-7"], "cpu_bind", "0-3|4-7"),
        (["--deterministic"], "deterministic", True),
        (["--swap-space", "8"], "swap_space", 8.0),
        (["--served-model-name", "a", "b"], "served_model_name", ["a", "b"]),
        (["--hf-overrides", '{"rope_theta": 1e6}'], "hf_overrides", {"rope_theta": 1e6}),
    ],
)
def test_flag_is_understood(arguments: list[str], field: str, value: object) -> None:
    assert getattr(parse(*arguments), field) == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"scheduling_policy": "lottery"}, "scheduling_policy must be one of fcfs, priority, got 'lottery'"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size must be 1"),
        ({"quantization": "hqq"}, "quantization='hqq' is not supported"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda or cuda:N"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be above 0 and at most 1, got 1.5"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, bfloat16, float16, float32, int8, fp8"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_wrong_value_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineArgs(**fields)  # type: ignore[arg-type]


def test_binding_follows_the_flag_then_the_variable_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert EngineArgs().to_core(64, 10).cpu_bind == "auto"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert EngineArgs().to_core(64, 10).cpu_bind == "nobind"
    assert EngineArgs(cpu_bind="cores").to_core(64, 10).cpu_bind == "cores"


def test_binding_that_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cpu_bind is '0-', but must be auto, none, cores, or lists of CPUs"):
        LLM("null", cpu_bind="0-")


@pytest.mark.parametrize("text", ["", "k", "4q", "1.5", "1.0001k", "--"])
def test_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)
