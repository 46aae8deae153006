"""bench/perplexity.py: windows and sums by hand, Transformers' figure on a tiny model, llama-perplexity's output."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fastllm import _core
from reference import next_logprobs

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def perplexity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("perplexity")


def run_script(*arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(BENCH / "perplexity.py"), *arguments], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_only_whole_windows_count_and_each_begins_with_bos(perplexity: ModuleType) -> None:
    assert perplexity.cut(range(11), 4, None) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert perplexity.cut(range(8), 4, 99) == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert perplexity.cut(range(3), 4, None) == []


def test_half_a_window_is_what_llama_cpp_scores(perplexity: ModuleType) -> None:
    # Of 512 tokens the logits of 256 to 510 count: those of the tokens 257 to 511.
    assert perplexity.first_scored(512, "half") == 257
    assert perplexity.first_scored(512, "all") == 1


def test_estimate_of_three_tokens_by_hand(perplexity: ModuleType) -> None:
    figures = perplexity.estimate([[1.0, 2.0], [3.0]])
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["standard_error"] == pytest.approx(math.e**2 / math.sqrt(3))
    assert figures["tokens_scored"] == 3
    assert figures["window_nll"] == [1.5, 3.0]


def test_comparison_pairs_windows_and_refuses_another_text(perplexity: ModuleType) -> None:
    base = {"text_sha256": "a", "window": 8, "score": "half", "windows": 3, "window_nll": [1.0, 2.0, 3.0]}
    above = perplexity.compare({**base, "window_nll": [1.1, 2.2, 3.3]}, base)
    assert above["above"] == pytest.approx(math.exp(0.2) - 1)
    assert above["standard_error"] == pytest.approx(math.exp(0.2) * 0.1 / math.sqrt(3))
    with pytest.raises(ValueError, match="text_sha256 is b"):
        perplexity.compare({**base, "text_sha256": "b"}, base)


def test_fixed_text_is_the_same_every_time_and_long_enough(perplexity: ModuleType) -> None:
    missing = [file for file in perplexity.default_files() if not file.exists()]
    if missing:
        pytest.skip(f"this machine has no {missing[0]}")
    text = perplexity.read_text(perplexity.default_files())
    assert text == perplexity.read_text(perplexity.default_files())
    assert len(text) > 100_000 and not text.endswith("\n")


def test_figures_of_llama_perplexity_are_read(perplexity: ModuleType) -> None:
    output = (
        "perplexity: calculating perplexity over 16 chunks, n_ctx=512, batch_size=512, n_seq=1\n"
        "[1]16.2,[2]17.6,\nFinal estimate: PPL = 13.5106 +/- 0.10012\n"
    )
    assert perplexity.parse_llama_cpp(output) == {"windows": 16, "perplexity": 13.5106, "standard_error": 0.10012}
    with pytest.raises(SystemExit, match="no estimate"):
        perplexity.parse_llama_cpp("error: failed to load model")


@pytest.mark.parametrize("score", ["half", "all"])
def test_perplexity_of_a_tiny_model_is_that_of_transformers(
    tiny_model: Callable[[str], Path], tmp_path: Path, score: str
) -> None:
    folder = tiny_model("llama")
    text, file = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("Windows of sixteen bytes, and a rest.\n" * 3)
    arguments = ["--device", "cpu", "--dtype", "float32", "--text", str(text), "--window", "16", "--score", score]
    run_script("--model", str(folder), *arguments, "--json", str(file))
    result = json.loads(file.read_text())

    ids = list(text.read_text().rstrip("\n").encode())
    windows = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    first = 9 if score == "half" else 1
    expected = [-next_logprobs(folder, w)[i - 1, w[i]] for w in windows for i in range(first, 16)]
    assert result["windows"] == len(windows) == 7 and result["bos"] is None
    assert result["tokens_scored"] == len(expected)
    assert result["perplexity"] == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-3)


def test_transformers_peer_and_base_agree_with_the_same_model(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    text, first, second = tmp_path / "text.txt", tmp_path / "first.json", tmp_path / "second.json"
    text.write_text("The same model, asked twice, and a peer." * 4)
    common = ["--model", str(tiny_model("qwen2")), "--device", "cpu", "--dtype", "float32", "--text", str(text)]
    run_script(*common, "--window", "32", "--json", str(first))
    run_script(*common, "--window", "32", "--base", str(first), "--peer", "transformers", "--json", str(second))
    result = json.loads(second.read_text())
    assert result["to_base"]["above"] == pytest.approx(0, abs=1e-9)
    assert result["peer"]["ratio"] == pytest.approx(1, rel=1e-3)
