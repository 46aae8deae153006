"""AWQ, GPTQ and compressed-tensors checkpoints: the numbers they stand for, computing on them, and refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm import LLM, _core
from fastllm.client import core_bindings
from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.loader.model import open_model
from packing import Variant, write_packed_model
from reference import next_logprobs
from test_quantization import compare, prompt_logprobs

_ALL = [
    Variant("awq", 4, 32),
    Variant("awq", 4, 64),
    Variant("awq", 4, 128),
    Variant("awq", 4, -1),
    Variant("gptq", 4, 32, symmetric=True),
    Variant("gptq", 4, 64),
    Variant("gptq", 4, 128, symmetric=True),
    Variant("gptq", 4, 128, scale_type="float32"),
    Variant("gptq", 4, -1, symmetric=True),
    Variant("gptq", 8, 128, symmetric=True),
    Variant("gptq", 8, 32),
    Variant("gptq", 4, 32, symmetric=True, order="shared"),
    Variant("gptq", 4, 128, order="shared"),
    Variant("gptq", 8, 64, symmetric=True, order="shared"),
    Variant("gptq", 4, 128, order="own"),
    Variant("gptq_v2", 4, 128),
    Variant("gptq_v2", 8, -1),
    Variant("pack", 4, 128, symmetric=True),
    Variant("pack", 4, 32),
    Variant("pack", 4, -1, symmetric=True),
    Variant("pack", 8, -1, symmetric=True),
    Variant("pack", 8, 64),
    Variant("pack", 4, 64, symmetric=True, order="shared"),
    Variant("int", 8, -1, symmetric=True),
    Variant("int", 8, -1),
    Variant("int", 8, 128, symmetric=True),
    Variant("int", 4, 32, symmetric=True),
]

Packed = tuple[Path, Path]


@pytest.fixture(scope="session")
def packed_model(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Variant], Packed]:
    """A packed model, and the dense one it stands for."""
    made: dict[tuple[str, str], Packed] = {}

    def get(family: str, variant: Variant) -> Packed:
        key = (family, f"{variant} {variant.config}")
        if key not in made:
            folder = tmp_path_factory.mktemp("packed")
            made[key] = folder / "packed", folder / "dense"
            write_packed_model(tiny_model(family), *made[key], variant, seed=1, transposed=family == "gpt2")
        return made[key]

    return get


def exported(folder: Path, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every canonical weight in fp32, as the core reads it."""
    from safetensors.numpy import load_file

    files = open_model(EngineArgs(model=str(folder)))
    _core.export_weights(files.spec_json, core_bindings(files), str(out), "float32")
    return load_file(out)


@pytest.mark.parametrize("variant", _ALL, ids=str)
def test_packed_weights_are_the_numbers_they_stand_for(
    variant: Variant, packed_model: Callable[[str, Variant], Packed], tmp_path: Path
) -> None:
    packed, dense = packed_model("llama-wide", variant)
    got, want = exported(packed, tmp_path / "got"), exported(dense, tmp_path / "want")
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


_FAMILIES = [
    ("gpt2", Variant("gptq", 4, 32, symmetric=True)),
    ("qwen2", Variant("awq", 4, 32)),
    ("gemma2", Variant("pack", 4, 32)),
    ("llama-tied-biased", Variant("gptq", 4, 32, order="shared")),
]


@pytest.mark.parametrize(("family", "variant"), _FAMILIES, ids=str)
def test_every_structure_of_layers_can_be_packed(
    family: str, variant: Variant, packed_model: Callable[[str, Variant], Packed], tmp_path: Path
) -> None:
    packed, dense = packed_model(family, variant)
    got, want = exported(packed, tmp_path / "got"), exported(dense, tmp_path / "want")
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("variant", [v for v in _ALL if v.order != "own"], ids=str)
def test_compressed_layers_stay_near_the_numbers(
    variant: Variant,
    packed_model: Callable[[str, Variant], Packed],
    make_llm: Callable[..., LLM],
    caplog: pytest.LogCaptureFixture,
    seed: int,
) -> None:
    """The differences are those of activations in 8 bits: the weights are the checkpoint's."""
    packed, dense = packed_model("llama-wide", variant)
    limits: dict[str, Any] = {"max_logprobs": -1}
    with caplog.at_level(logging.INFO, logger="fastllm"):
        compressed = make_llm(packed, **limits)
    assert f"{variant.bits} bit" in caplog.text and "kept compressed" in caplog.text
    assert compressed.memory.inflated == []
    reference = make_llm(dense, quantization="none", **limits)
    assert compressed.memory.weights < 0.6 * reference.memory.weights
    prompt = np.random.default_rng(seed).integers(0, 256, 200).tolist()
    mean, worst, same = compare(reference, compressed, prompt, 320, 2)
    print(f"{variant}: differences {mean:.4f} mean, {worst:.4f} at most; {same:.1%} among 2")
    assert mean < 0.2 and worst < 3 and same > 0.9


def test_layers_that_sort_their_columns_differently_are_kept_dense(
    packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    packed, dense = packed_model("llama-wide", Variant("gptq", 4, 32, symmetric=True, order="own"))
    with caplog.at_level(logging.INFO, logger="fastllm"):
        llm = make_llm(packed, max_logprobs=-1)
    why = "its parts sort their columns differently"
    wanted = [f"layers.{i}.{name}.weight: {why}" for i in range(2) for name in ("attn.qkv", "ffn.gate_up")]
    assert sorted(llm.memory.inflated) == sorted(wanted)
    assert f"Kept dense all the same: layers.0.attn.qkv.weight: {why}, and 3 more." in caplog.text
    reference = make_llm(dense, quantization="none", max_logprobs=-1)
    mean, worst, same = compare(reference, llm, list(range(200)), 320, 2)
    assert mean < 0.2 and worst < 3 and same > 0.9


def test_ranks_share_packed_layers(
    packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM]
) -> None:
    """Columns of an act-order layer cannot be cut between ranks: those layers are dense, the others stay packed."""
    packed, dense = packed_model("llama-wide", Variant("gptq", 4, 32, symmetric=True, order="shared"))
    two = make_llm(packed, tensor_parallel_size=2, max_logprobs=-1)
    why = "its sorted columns cannot be shared by ranks"
    wanted = [f"layers.{i}.{name}.weight: {why}" for i in range(2) for name in ("attn.out", "ffn.down")]
    assert sorted(two.memory.inflated) == sorted(wanted)
    mean, worst, _ = compare(make_llm(dense, quantization="none", max_logprobs=-1), two, list(range(200)), 320)
    assert mean < 0.2 and worst < 3


def test_packed_model_computed_dense_equals_the_dense_model(
    packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM], caplog: pytest.LogCaptureFixture
) -> None:
    """What GPUs do, and a CPU with quantization="none"."""
    packed, dense = packed_model("llama-wide", Variant("awq", 4, 128))
    limits: dict[str, Any] = {"max_logprobs": -1, "quantization": "none"}
    with caplog.at_level(logging.INFO, logger="fastllm"):
        first = make_llm(packed, **limits)
    assert "Weights: awq 4 bit, groups of 128, dequantised" in caplog.text
    mean, worst, _ = compare(first, make_llm(dense, **limits), list(range(200)), 320)
    assert (mean, worst) == (0, 0)


def test_gpus_hold_packed_models_dense(
    gpu_count: int, packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM]
) -> None:
    packed, dense = packed_model("llama-wide", Variant("gptq", 4, 128, order="shared"))
    limits: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "max_logprobs": -1}
    mean, worst, _ = compare(make_llm(packed, **limits), make_llm(dense, **limits), list(range(200)), 320)
    assert (mean, worst) == (0, 0)


def test_packed_model_computed_dense_has_the_logprobs_of_transformers(
    packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM], seed: int
) -> None:
    packed, dense = packed_model("llama-wide", Variant("gptq", 4, 128, order="shared"))
    ids = np.random.default_rng(seed).integers(0, 256, 60).tolist()
    made = prompt_logprobs(make_llm(packed, quantization="none", max_logprobs=-1), ids, 320)
    got = np.array([[row[token] for token in range(320)] for row in made])
    np.testing.assert_allclose(got, next_logprobs(dense, ids), atol=1e-3)


def test_checkpoint_must_be_what_was_asked_for(packed_model: Callable[[str, Variant], Packed], llama: Path) -> None:
    packed, _ = packed_model("llama-wide", Variant("gptq", 4, 32, symmetric=True))
    for wanted in ("gptq", None, "none", "int8"):
        assert open_model(EngineArgs(model=str(packed), quantization=wanted)).quantized == "gptq 4 bit, groups of 32"
    with pytest.raises(LoadError, match="quantization='awq', but .*packed is gptq"):
        open_model(EngineArgs(model=str(packed), quantization="awq"))
    with pytest.raises(LoadError, match="quantization='compressed-tensors', but .* is not quantised"):
        open_model(EngineArgs(model=str(llama), quantization="compressed-tensors"))


_AWQ, _GPTQ, _PACK, _INT = (
    Variant("awq", 4, 32),
    Variant("gptq", 4, 32, symmetric=True),
    Variant("pack", 4, 32),
    Variant("int", 8, -1, symmetric=True),
)
_W8A8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}


def _with_group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the one config group; weights__bits changes a field inside."""

    def change(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        for key, value in changes.items():
            outer, _, inner = key.partition("__")
            if inner:
                group[outer][inner] = value
            else:
                group[outer] = value

    return change


def _with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(changes)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (_AWQ, _with(quant_method="hqq"), "quant_method 'hqq'; supported are awq, gptq, compressed-tensors"),
        (_AWQ, _with(quant_method=["awq"]), "quant_method .'awq'.; supported are"),
        (_AWQ, _with(version="gemv"), "AWQ version 'gemv' is not supported"),
        (_AWQ, _with(bits=8), "AWQ of 8 bits is not supported"),
        (_AWQ, _with(zero_point=False), "zero_point=False is not supported"),
        (_AWQ, _with(group_size=0), "group_size must be -1 .* or at least 1, got 0"),
        (_AWQ, _with(group_size="32"), "group_size must be -1 .* got '32'"),
        (_GPTQ, _with(bits=3), "GPTQ of 3 bits .* is not supported; bits must be 4 or 8"),
        (_GPTQ, _with(bits=None), "bits must be a whole number"),
        (_GPTQ, _with(checkpoint_format="marlin"), "GPTQ format 'marlin' is not supported"),
        (_GPTQ, _with(dynamic={"+:(": {}}), r"malformed pattern '\+:\('"),
        (_GPTQ, _with(dynamic={"+:.*up_proj": {"bits": 2}}), "GPTQ of 2 bits .*up_proj. is not supported"),
        (_PACK, _with(format="float-quantized"), "format 'float-quantized' is not supported"),
        (_PACK, _with(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme=.* is not supported"),
        (_PACK, _with(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights are not read"),
        (_PACK, _with(transform_config={"config_groups": {}}), "transform_config is not supported"),
        (_PACK, _with(config_groups=[]), "config_groups must be an object"),
        (_PACK, _with(ignore=["re:.*up_proj"]), "up_proj is quantised, but no config group is for it"),
        (_PACK, _with(ignore=["re:("]), "malformed pattern 're:\\('"),
        (_PACK, _with_group(targets=["re:.*self_attn.*"]), "mlp.* is quantised, but no config group is for it"),
        (_PACK, _with_group(weights=None), "the type None is not supported"),
        (_PACK, _with_group(weights__type="float"), "the type 'float' is not supported"),
        (_PACK, _with_group(weights__num_bits=3), "num_bits=3 is not supported"),
        (_PACK, _with_group(weights__strategy="block"), "strategy='block' is not supported"),
        (_PACK, _with_group(weights__group_size=0), "group_size must be -1 .* got 0"),
        (_PACK, _with_group(weights__group_size=None), "the strategy 'group' needs a group_size"),
        (_INT, _with_group(input_activations=_W8A8 | {"dynamic": False}), "dynamic ones are"),
        (_INT, _with_group(input_activations=_W8A8 | {"type": "float"}), "8 bits of type 'float' are not supported"),
        (_INT, _with_group(output_activations=_W8A8), "output_activations=.* is not supported"),
        (_INT, _with_group(weights__symmetric=False), "lacks .*weight_zero_point"),
    ],
)
def test_config_that_would_change_the_numbers_is_refused(
    variant: Variant,
    change: Callable[[dict[str, Any]], None],
    message: str,
    packed_model: Callable[[str, Variant], Packed],
) -> None:
    packed, _ = packed_model("llama-wide", variant)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    change(config)
    with pytest.raises(LoadError, match=message):
        open_model(EngineArgs(model=str(packed), hf_overrides={"quantization_config": config}))


def test_other_words_for_the_same_config_are_understood(packed_model: Callable[[str, Variant], Packed]) -> None:
    int8, _ = packed_model("llama-wide", _INT)
    config = json.loads((int8 / "config.json").read_text())["quantization_config"]
    _with_group(input_activations=_W8A8, targets=["re:.*(proj|fc)$"], format="int-quantized")(config)
    config |= {"format": "mixed-precision", "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}}
    args = EngineArgs(model=str(int8), hf_overrides={"quantization_config": None, "compression_config": config})
    assert open_model(args).quantized == "compressed-tensors 8 bit, one group for each row"


_UP = "model.layers.1.mlp.up_proj."


def _without(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__delitem__(_UP + part)


def _changed(part: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({_UP + part: np.ascontiguousarray(change(tensors[_UP + part]))})


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (_AWQ, _without("qweight"), "lacks 1 of the tensors that the model needs: .*up_proj.weight"),
        (_AWQ, _without("scales"), "up_proj is quantised, but the checkpoint lacks .*up_proj.scales"),
        (_AWQ, _without("qzeros"), "lacks .*up_proj.qzeros"),
        (_AWQ, _changed("qweight", lambda x: x[:-1]), r"have shape \[255, 48\] of I32; needed is shape \[256, 48\]"),
        (_AWQ, _changed("qweight", lambda x: x.view(np.float32)), "of F32; needed is shape .* of I32"),
        (_AWQ, _changed("qzeros", lambda x: x.T), r"its zeros '.*qzeros' have shape \[48, 8\] of I32"),
        (_AWQ, _changed("scales", lambda x: x[:4]), r"have shape \[4, 384\] of F16; needed is shape \[8, 384\]"),
        (_GPTQ, _changed("scales", lambda x: x.astype(np.int32)), "of I32; needed is shape .* F16 or BF16 or F32"),
        (_GPTQ, _changed("g_idx", lambda x: x + 1), "put column 224 into group 8, but there are 8"),
        (_GPTQ, _changed("g_idx", lambda x: x - 1), "put column 0 into group -1"),
        (_GPTQ, _changed("g_idx", lambda x: x.astype(np.float32)), "of F32; needed is shape .256. of I32 or I64"),
        (_PACK, _without("weight_shape"), "lacks .*up_proj.weight_shape"),
        (_PACK, _changed("weight_shape", lambda x: x + 8), "does not hold the 392 x 264 codes"),
        (_PACK, _changed("weight_shape", lambda x: x * 2**40), "does not hold"),
        (_PACK, _changed("weight_shape", lambda x: x.astype(np.float32)), "weight_shape is F32"),
        (_PACK, _changed("weight_scale", lambda x: x.T), r"its scales '.*weight_scale' have shape \[8, 384\]"),
        (_INT, _changed("weight", lambda x: x.astype(np.int64)), "does not use: .*up_proj.weight_scale"),
        (_INT, lambda t: t.update({_UP + "weight_packed": t[_UP + "weight"]}), "lacks .*weight_shape"),
    ],
)
def test_broken_tensors_are_refused_by_name(
    variant: Variant,
    change: Callable[[dict[str, Any]], None],
    message: str,
    packed_model: Callable[[str, Variant], Packed],
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file, save_file

    packed, _ = packed_model("llama-wide", variant)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises((LoadError, _core.LoadError), match=message):
        exported(tmp_path, tmp_path / "out")


def test_biases_of_zeros_that_the_model_never_had_are_dropped(
    packed_model: Callable[[str, Variant], Packed], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    packed, _ = packed_model("llama-wide", _GPTQ)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    tensors = load_file(packed / "model.safetensors")
    tensors[_UP + "bias"] = np.zeros(384, np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_model(EngineArgs(model=str(tmp_path))).quantized
    tensors[_UP + "bias"][7] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="up_proj.bias"):
        open_model(EngineArgs(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("variant", "quantization"),
    [
        (Variant("awq", 4, 128), "int4"),
        (Variant("gptq", 4, 64), "int4"),
        (Variant("int", 8, -1, symmetric=True), "int8"),
    ],
    ids=str,
)
def test_quantising_a_packed_model_keeps_its_codes(
    variant: Variant, quantization: str, packed_model: Callable[[str, Variant], Packed], make_llm: Callable[..., LLM]
) -> None:
    """Codes of as many bits fit into groups of 32 as they are; only the logits become 8 bits."""
    packed, dense = packed_model("llama-wide", variant)
    llm = make_llm(packed, quantization=quantization, max_logprobs=-1)
    reference = make_llm(dense, quantization="none", max_logprobs=-1)
    mean, worst, same = compare(reference, llm, list(range(200)), 320, 2)
    print(f"{variant}: differences {mean:.4f} mean, {worst:.4f} at most; {same:.1%} among 2")
    assert mean < 0.2 and worst < 3 and same > 0.9
