"""A bundle computes what the model it was made from computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm import LLM, SamplingParams
from fastllm.errors import InvalidArgument
from fastllm.export import export


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_bundle_generates_the_same(
    family: str, tmp_path: Path, tiny_model: Callable[[str], Path], make_llm: Callable[..., LLM]
) -> None:
    folder = tiny_model(family)
    bundle = export(str(folder), tmp_path / "bundle", "float32")
    assert {"spec.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in bundle.iterdir()}
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    original, copy = (make_llm(source).generate("Hello", params, use_tqdm=False)[0] for source in (folder, bundle))
    assert original.outputs[0].token_ids == copy.outputs[0].token_ids
    assert original.outputs[0].text == copy.outputs[0].text


def test_bundle_keeps_template_and_end_tokens(llama: Path, tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(export(str(llama), tmp_path / "bundle"))
    assert llm.model_config.eos_token_ids == [258]
    assert llm.get_tokenizer().apply_chat_template([{"role": "user", "content": "x"}]).startswith("<|im_start|>user")


def test_wrong_export_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="dtype must be one of"):
        export(str(llama), tmp_path / "x", "int3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InvalidArgument, match="not an empty folder"):
        export(str(llama), tmp_path / "full")
