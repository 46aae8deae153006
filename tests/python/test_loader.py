"""Checkpoints are read strictly: whatever is missing, extra, wrong or hostile is a LoadError that names it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.families import HfConfig, family_of
from fastllm.loader.gguf import read_gguf
from fastllm.loader.hub import resolve_model
from fastllm.loader.model import open_model
from fastllm.loader.safetensors import read_folder, read_safetensors

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


def spec_of(config: dict[str, Any]) -> Any:
    hf = HfConfig(config)
    return family_of(hf).build(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported. Supported are: LlamaForCausalLM"),
        ({"architectures": "Llama"}, "architectures must be a list"),
        ({"architectures": None, "model_type": "t5"}, "model_type 't5' is not supported"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number from 1 to 1048576, got '64'"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"vocab_size": 2**40}, "vocab_size must be"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number"),
        ({"hidden_act": "mish"}, "activation hidden_act='mish' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, "rope type 'spiral' is not supported"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope type"),
        ({"rope_parameters": {"rope_type": "default", "twist": 1}}, "unknown key 'twist'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"pretraining_tp": 4}, "pretraining_tp=4 is not supported"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
    ],
)
def test_config_that_would_change_the_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        spec_of({**LLAMA, **change})


def test_old_and_new_spelling_of_rope_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = spec_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}})
    new = spec_of({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    assert old == new
    assert (old.kinds[0].attn.rope.theta, old.kinds[0].attn.rope.scaling.kind) == (5e5, "llama3")


def test_qwen_windows_follow_max_window_layers() -> None:
    config = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert spec_of(config).layer_kind == [0, 0]
    spec = spec_of({**config, "use_sliding_window": True})
    assert [spec.layer(i).attn.window for i in range(2)] == [0, 8]
    spec = spec_of({**config, "layer_types": ["sliding_attention", "full_attention"]})
    assert [spec.layer(i).attn.window for i in range(2)] == [8, 0]


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model folder with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_missing_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    folder = rewritten(llama, tmp_path / "m", lambda tensors: tensors.__delitem__(name))
    with pytest.raises(LoadError, match=f"lacks 1 of the tensors that the model needs: {name}"):
        open_model(EngineArgs(model=str(folder)))


def test_unexpected_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.adapter.weight"] = tensors["model.norm.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()

    folder = rewritten(llama, tmp_path / "m", add)
    with pytest.raises(LoadError, match="has 1 tensors that a llama model .* model.layers.0.adapter.weight"):
        open_model(EngineArgs(model=str(folder)))


def test_tied_head_saved_all_the_same_is_dropped(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = rewritten(tiny_model("llama-tied-biased"), tmp_path / "m", add)
    names = [b.canonical for b in open_model(EngineArgs(model=str(folder))).bindings]
    assert "embed.tokens.weight" in names and "head.weight" not in names


def test_sharded_checkpoint_equals_the_single_file(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    loaded = read_folder(folder)
    assert set(loaded) == set(tensors)
    assert all(bytes(loaded[n].data) == t.numpy().tobytes() for n, t in tensors.items())

    (folder / "part-1.safetensors").unlink()
    with pytest.raises(LoadError, match="lacks the shard part-1.safetensors"):
        read_folder(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../escape.safetensors"}}))
    with pytest.raises(LoadError, match="not a plain file name"):
        read_folder(folder)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**63) + b"{}",
        safetensors_bytes(b"[1]"),
        safetensors_bytes(b"{"),
        safetensors_bytes(b"[" * 100000),
        safetensors_bytes({"a": 3}),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(8)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": "x", "data_offsets": None}}, bytes(8)),
        safetensors_bytes(b'{"a": {}, "a": {}}'),
    ],
)
def test_hostile_safetensors_is_a_load_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(LoadError):
        read_safetensors(file)


def test_damaged_gguf_is_read_or_is_a_load_error(demo_gguf: str, tmp_path: Path, seed: int) -> None:
    """Truncated anywhere, or with bytes of its header changed, the file never does worse than LoadError."""
    rng = random.Random(seed)
    with resolve_model(demo_gguf).open("rb") as file:
        head = bytearray(file.read(20000))
    target = tmp_path / "x.gguf"
    for _ in range(200):
        damaged = bytearray(head[: rng.randrange(len(head))]) if rng.random() < 0.5 else bytearray(head)
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        target.write_bytes(damaged)
        with pytest.raises(LoadError):
            read_gguf(target)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "There is no model at /nowhere/at/all"),
        ("./missing", "There is no model at"),
        ("package:no_such_package_here", "no installed package has this name"),
        ("package:json", "must ship exactly one .gguf file, found none"),
    ],
)
def test_model_that_is_not_there_is_a_sentence(model: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        resolve_model(model)


def test_hub_id_offline_names_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(LoadError, match="'org/name' was not found: .* Network is unreachable"):
        resolve_model("org/name", download_dir=str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_broken_config_is_a_load_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoadError, match="config.json"):
        open_model(EngineArgs(model=str(tmp_path)))


def test_dummy_weights_are_small_bf16_and_need_only_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 70_000}))
    files = open_model(EngineArgs(model=str(tmp_path), load_format="dummy"))
    tensors = {b.canonical: b.sources[0] for b in files.bindings}
    assert {t.type for t in tensors.values()} == {"BF16"} and files.checkpoint_dtype == "bfloat16"
    embed = tensors["embed.tokens.weight"]
    bits = np.frombuffer(embed.data, dtype=np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert embed.shape == (70_000, 64) and values.size == 70_000 * 64  # more than one period
    assert abs(values.mean()) < 1e-3 and 0.019 < values.std() < 0.021
    assert len(np.unique(values.reshape(70_000, 64)[:, :4], axis=0)) > 65_000  # rows differ though values repeat
    norm = np.frombuffer(tensors["final_norm.weight"].data, dtype=np.uint16)
    assert (norm == 0x3F80).all()
