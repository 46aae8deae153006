"""The native side, built and run with CMake: the C++ tests, the two embedding examples, and a stranger's project that
finds the installed library. Needs a compiler, CMake 3.27, ninja and GoogleTest; skips with the reason otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "release"

pytestmark = pytest.mark.timeout(1800)


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def native_build() -> Path:
    for tool in ("cmake", "ninja", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    version = run("cmake", "--version").split()[2]
    if tuple(int(x) for x in version.split(".")[:2]) < (3, 27):
        pytest.skip(f"CMake {version} is older than 3.27 (pip install cmake)")
    if not any(Path(p, "gtest/gtest.h").exists() for p in ("/usr/include", "/usr/local/include")):
        pytest.skip("GoogleTest is not installed (apt-get install libgtest-dev libbenchmark-dev)")
    run("cmake", "--preset", "release", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", "--preset", "release", "-j", str(os.cpu_count()))
    return BUILD


def test_cpp_tests_pass(native_build: Path) -> None:
    out = run("ctest", "--preset", "release")
    assert "100% tests passed" in out and "No tests were found" not in out


def test_engine_benchmark_measures_a_tiny_model(native_build: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    program = native_build / "bench" / "fastllm_bench_engine"
    run(program, "--shape", "tiny", "--only", "latency,prefix", "--prefix-caching", "1", "--json", file)
    result = json.loads(file.read_text())
    assert "failed" not in result and result["bs1_128_128"]["tpot_ms"] > 0
    assert result["prefix_64x1024+32_32"]["prefix_hit_tokens"] >= 63 * 1024


@pytest.fixture(scope="session")
def bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastllm.export import export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(str(llama), str(out), dtype="float32")
    return out


PROMPT = [3, 17, 42, 5, 99, 23, 7]


@pytest.fixture(scope="session")
def python_tokens(llama: Path) -> list[int]:
    from fastllm import LLM, SamplingParams

    llm = LLM(str(llama), dtype="float32", max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=24, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return list(out.outputs[0].token_ids)


@pytest.mark.parametrize("example", ["fastllm_generate", "fastllm_generate_c"])
def test_embedding_examples_give_the_tokens_python_gives(
    native_build: Path, bundle: Path, python_tokens: list[int], example: str
) -> None:
    out = run(native_build / "cpp" / example, bundle, "24", *[str(t) for t in PROMPT])
    assert [int(line) for line in out.split()] == python_tokens
    assert len(python_tokens) > 0


@pytest.mark.parametrize("example", ["fastllm_generate", "fastllm_generate_c"])
def test_embedding_examples_report_a_missing_bundle(native_build: Path, tmp_path: Path, example: str) -> None:
    done = subprocess.run(
        [str(native_build / "cpp" / example), str(tmp_path / "nowhere"), "4", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr


def test_another_project_finds_and_links_the_installed_library(
    native_build: Path, bundle: Path, python_tokens: list[int], tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    run("cmake", "--install", native_build, "--prefix", prefix, "--component", "sdk")
    project = tmp_path / "host"
    project.mkdir()
    shutil.copy(ROOT / "cpp" / "examples" / "generate.cc", project)
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.27)\n"
        "project(host CXX)\n"
        "find_package(fastllm 0.1 REQUIRED)\n"
        "add_executable(host generate.cc)\n"
        "target_link_libraries(host PRIVATE fastllm::fastllm)\n"
    )
    run("cmake", "-G", "Ninja", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", project / "build")
    out = run(project / "build" / "host", bundle, "24", *[str(t) for t in PROMPT])
    assert [int(line) for line in out.split()] == python_tokens
