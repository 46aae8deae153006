"""Choosing a device and what follows from it, with a stand-in for the core: no GPU is needed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fastllm import EngineArgs, _core
from fastllm import device as device_module
from fastllm.device import Device, choose_device, default_limits, find_nvidia_libraries, memory_line
from fastllm.errors import ResourceError

GIB = 2**30
H100 = Device("cuda:0", 79 * GIB)
SMALL = Device("cuda:0", 24 * GIB)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A function that pretends the core sees `count` GPUs, with the backend's library installed."""
    monkeypatch.setenv("FASTLLM_CUBLASLT_LIB", "given")

    def pretend(count: int, why: str = "", *, plugin: bool = True) -> None:
        monkeypatch.setattr(device_module, "_plugin_exists", lambda: plugin)
        monkeypatch.setattr(_core, "cuda_device_count", lambda: (count, why))
        monkeypatch.setattr(_core, "cuda_device_memory", lambda device: (80 + device) * GIB)

    return pretend


def test_auto_takes_a_gpu_that_can_be_used(gpus, caplog: pytest.LogCaptureFixture) -> None:
    gpus(2)
    with caplog.at_level(logging.INFO):
        assert choose_device("auto") == Device("cuda:0", 80 * GIB)
        assert choose_device("cuda:1") == Device("cuda:1", 81 * GIB)
        assert choose_device("cuda", ranks=2).name == "cuda:0"
    assert [r.getMessage() for r in caplog.records] == [
        "Device: cuda:0, of 2 GPU(s).",
        "Device: cuda:1, of 2 GPU(s).",
        "Device: cuda:0 to cuda:1, of 2 GPU(s).",
    ]


def test_auto_falls_back_and_says_why(gpus, caplog: pytest.LogCaptureFixture) -> None:
    gpus(0, "there is no NVIDIA driver")
    with caplog.at_level(logging.INFO):
        assert choose_device("auto") == Device()
    assert caplog.messages == ["Device: cpu; no GPU can be used: there is no NVIDIA driver."]


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_nothing_is_probed_on_a_cpu(wanted: str, gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1, plugin=wanted == "cpu")
    monkeypatch.setattr(_core, "cuda_device_count", lambda: pytest.fail("the GPU backend was probed"))
    assert choose_device(wanted) == Device()


def test_a_gpu_that_was_asked_for_must_be_there(gpus) -> None:
    gpus(0, "the driver is too old.")
    with pytest.raises(ResourceError, match="device='cuda' cannot be used: the driver is too old.$"):
        choose_device("cuda")
    gpus(1)
    with pytest.raises(ResourceError, match=r"2 GPU\(s\) from number 0 on are wanted, 1 can be used"):
        choose_device("cuda", ranks=2)
    with pytest.raises(ResourceError, match="from number 3 on"):
        choose_device("cuda:3")


@pytest.mark.parametrize(
    ("device", "offline", "limits"),
    [
        (Device(), True, (None, None)),
        (Device(), False, (None, None)),
        (H100, True, (1024, 16384)),
        (H100, False, (1024, 8192)),
        (SMALL, True, (256, 8192)),
        (SMALL, False, (256, 2048)),
    ],
)
def test_default_limits_are_vllms(device: Device, offline: bool, limits: tuple[int | None, int | None]) -> None:
    assert default_limits(device, offline) == limits


def test_explicit_limits_win_over_the_devices() -> None:
    config = EngineArgs(model="m", max_num_seqs=7, max_num_batched_tokens=99).to_core(100, 1000, H100, offline=True)
    assert (config.max_num_seqs, config.max_step_tokens) == (7, 99)
    config = EngineArgs(model="m").to_core(100, 1000, H100)
    assert (config.device, config.max_num_seqs, config.max_step_tokens) == ("cuda:0", 1024, 8192)
    cpu = EngineArgs(model="m").to_core(100, 1000)
    assert (cpu.device, cpu.max_num_seqs, cpu.max_step_tokens) == ("cpu", 256, 2048)


def test_gpu_settings_reach_the_core() -> None:
    args = EngineArgs(
        model="m", kv_cache_dtype="fp8_e4m3", gpu_memory_utilization=0.5, enforce_eager=True, deterministic=True
    )
    config = args.to_core(100, 1000, H100)
    assert (config.kv_cache_dtype, config.gpu_memory_utilization) == ("fp8", 0.5)
    assert config.enforce_eager and config.deterministic


def test_cublaslt_in_another_site_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.delenv("FASTLLM_CUBLASLT_LIB", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    find_nvidia_libraries()
    assert os.environ["FASTLLM_CUBLASLT_LIB"] == str(file)
    monkeypatch.setenv("FASTLLM_CUBLASLT_LIB", "mine")
    find_nvidia_libraries()
    assert os.environ["FASTLLM_CUBLASLT_LIB"] == "mine"


def test_a_package_named_nvidia_without_a_path_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLM_CUBLASLT_LIB", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia", ModuleType("nvidia"))
    find_nvidia_libraries()


def test_memory_line_adds_up_what_the_core_measured() -> None:
    memory = SimpleNamespace(
        device="NVIDIA X",
        total=80 * GIB,
        weights=15 * GIB,
        activations=GIB,
        graphs=GIB // 4,
        kv_cache=55 * GIB,
        other=GIB // 2,
        free=8 * GIB + GIB // 4,
    )
    assert memory_line(memory, 450_560, 4096) == (  # type: ignore[arg-type]
        "GPU memory 80.00 GiB of NVIDIA X: 15.00 weights, 1.00 activations, 0.25 graphs, 55.00 KV cache "
        "(450,560 tokens, 110.0 x max_model_len), 0.50 other, 8.25 free."
    )
