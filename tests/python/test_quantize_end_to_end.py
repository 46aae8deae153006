"""A checkpoint that this package wrote, loaded by this package, says what its dense weights say in Transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastllm import LLM
from fastllm.quantize import QuantizeConfig, quantize
from quantized_reader import transformers_model
from reference import generate_all_logprobs, logprob_rows, rms
from tiny_models import VOCAB

torch = pytest.importorskip("torch", reason="quantising takes it")
pytest.importorskip("transformers", reason="quantising takes it")

TEXT = "Some words to calibrate with, and a few more of them. " * 20
PROMPT = list(b"Once upon a time there was a model")
CONFIGS = {
    "gptq": QuantizeConfig(group_size=32, num_samples=6, sample_length=32, calibration=TEXT),
    "gptq-asymmetric": QuantizeConfig(sym=False, group_size=32, num_samples=6, sample_length=32, calibration=TEXT),
    "gptq-desc-act": QuantizeConfig(desc_act=True, group_size=32, num_samples=6, sample_length=32, calibration=TEXT),
    "gptq-8-bit": QuantizeConfig(bits=8, group_size=32, num_samples=6, sample_length=32, calibration=TEXT),
    "awq": QuantizeConfig(method="awq", group_size=32, num_samples=6, sample_length=32, calibration=TEXT),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_engine_computes_what_the_dense_weights_say(
    name: str, family: str, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    quantize(str(tiny_model(family)), tmp_path / "out", CONFIGS[name])
    model = transformers_model(tmp_path / "out")
    (output,) = generate_all_logprobs(make_llm(tmp_path / "out", max_logprobs=VOCAB), [PROMPT], 8)
    rows = logprob_rows(output)
    ids = [*PROMPT, *output.outputs[0].token_ids]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids[:-1]])).logits[0].double(), -1).numpy()
    print(f"error {rms(rows - expected) / rms(expected - expected.mean(-1, keepdims=True)):.4f} of the spread")
    assert rms(rows - expected) < 0.05 * rms(expected - expected.mean(-1, keepdims=True))
    lost = expected.max(-1) - np.take_along_axis(expected, rows.argmax(-1, keepdims=True), -1)[:, 0]
    assert lost.max() < 0.3  # the engine's choice is the best or as good as that
