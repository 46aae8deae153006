"""Written checkpoints hold what the formats say, and their models lose less than rounding to nearest does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.quantize import QuantizeConfig, quantize
from quantized_reader import awq_codes, dequantized, gptq_codes, read_checkpoint, transformers_model

torch = pytest.importorskip("torch", reason="quantising takes it")
pytest.importorskip("transformers", reason="quantising takes it")

TEXT = " ".join(f"{i} times {i} is {i * i}, and the root of that is {i} again;" for i in range(400))
FAST = {"num_samples": 24, "sample_length": 64, "calibration": TEXT, "group_size": 32}
CONFIGS = {
    "gptq": QuantizeConfig(**FAST),
    "gptq-asymmetric": QuantizeConfig(sym=False, **FAST),
    "gptq-desc-act": QuantizeConfig(desc_act=True, **FAST),
    "gptq-rows": QuantizeConfig(**FAST | {"group_size": -1}),
    "gptq-8-bit": QuantizeConfig(bits=8, **FAST),
    "awq": QuantizeConfig(method="awq", **FAST),
}


@pytest.fixture(scope="module")
def outliers(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which some channels are far larger than others after every norm, as in models of size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model("llama")
    folder = tmp_path_factory.mktemp("outliers") / "llama"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::13] *= 12
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, ::13] *= 0.3
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, ::13] *= 0.3
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(outliers: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("quantized") / name
            quantize(str(outliers), made[name], CONFIGS[name])
        return made[name]

    return get


def calibration_ids() -> Any:
    ids = torch.tensor(list(TEXT.encode()))
    return ids[: len(ids) // 64 * 64].reshape(-1, 64)[:64]


def rounded(folder: Path, config: QuantizeConfig) -> Any:
    """The model with every weight of its decoder layers at the nearest number of its group."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    top = (1 << config.bits) - 1
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name:
            size = parameter.shape[1] if config.group_size == -1 else config.group_size
            groups = parameter.data.reshape(parameter.shape[0], -1, size)
            if config.symmetric:
                scale = groups.abs().amax(-1, keepdim=True) * 2 / top
                codes = (torch.round(groups / scale) + (top + 1) // 2).clamp(0, top)
                parameter.data = ((codes - (top + 1) // 2) * scale).reshape(parameter.shape)
            else:
                low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
                scale = (high - low) / top
                zero = torch.round(-low / scale)
                codes = (torch.round(groups / scale) + zero).clamp(0, top)
                parameter.data = ((codes - zero) * scale).reshape(parameter.shape)
    return model


def logits_error(model: Any, reference: Any) -> float:
    with torch.no_grad():
        ids = calibration_ids()
        expected, got = (torch.log_softmax(m(ids).logits, -1) for m in (reference, model))
    return float((got - expected).square().mean().sqrt())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_model_is_nearer_to_the_original_than_rounding(
    name: str, written: Callable[[str], Path], outliers: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float32).eval()
    ours = logits_error(transformers_model(written(name)), reference)
    plain = logits_error(rounded(outliers, CONFIGS[name]), reference)
    print(f"{name}: {ours:.4f}, rounded {plain:.4f}")
    assert 0 < ours < 0.95 * plain


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_kind_of_layer_has_less_error_than_rounding(name: str, outliers: Path, tmp_path: Path) -> None:
    report = quantize(str(outliers), tmp_path / "out", CONFIGS[name])
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(report.measured.error) == kinds
    for kind, errors in report.measured.error.items():
        assert len(errors) == 3
        assert np.mean(errors) < np.mean(report.measured.rounding_error[kind]), kind
    assert report.measured.perplexity_after == pytest.approx(report.measured.perplexity_before, rel=0.2)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_tensors_and_config_are_the_formats(name: str, written: Callable[[str], Path], outliers: Path) -> None:
    config, layers, others = read_checkpoint(written(name))
    chosen = CONFIGS[name]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == chosen.method and quantization["bits"] == chosen.bits
    assert quantization["group_size"] == chosen.group_size
    _, none, source = read_checkpoint(outliers)
    linears = {n.removesuffix(".weight"): t for n, t in source.items() if n.endswith("_proj.weight")}
    assert not none and layers.keys() == linears.keys()
    for layer, dense in linears.items():
        out, inputs = dense.shape
        groups = 1 if chosen.group_size == -1 else inputs // 32
        tensors = layers[layer]
        assert tensors["scales"].shape == (groups, out) and tensors["scales"].dtype == np.float16
        if chosen.method == "awq":
            assert set(tensors) == {"qweight", "qzeros", "scales"}
            assert tensors["qweight"].shape == (inputs, out // 8) and tensors["qzeros"].shape == (groups, out // 8)
        else:
            per_word = 32 // chosen.bits
            assert tensors["qweight"].shape == (inputs // per_word, out)
            assert tensors["qzeros"].shape == (groups, out // per_word)
            assert tensors["g_idx"].shape == (inputs,)
        assert all(t.dtype == np.int32 for part, t in tensors.items() if part != "scales")
    for other, tensor in others.items():
        assert tensor.dtype == source[other].dtype
        assert "norm" in other and chosen.method == "awq" or torch.equal(tensor, source[other])


def test_symmetric_zeros_are_the_middle(written: Callable[[str], Path]) -> None:
    for name, middle in (("gptq", 8), ("gptq-8-bit", 128)):
        _, layers, _ = read_checkpoint(written(name))
        for tensors in layers.values():
            codes, zeros = gptq_codes(tensors, CONFIGS[name].bits)
            assert (zeros == middle).all() and codes.max() > middle > codes.min()


@pytest.mark.parametrize("method, bits", [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_packed_codes_come_back(method: str, bits: int, seed: int) -> None:
    from fastllm.quantize.grid import QuantizedWeight
    from fastllm.quantize.packing import pack

    rng = np.random.default_rng(seed)
    top = 1 << bits
    codes = rng.integers(0, top, (64, 40)).astype(np.uint8)
    zeros = rng.integers(1, top, (2, 40)).astype(np.uint8)
    g_idx = rng.permutation(np.arange(64) // 32).astype(np.int32)
    scales = rng.random((2, 40)).astype(np.float16)
    weight = QuantizedWeight(*map(torch.from_numpy, (codes, scales, zeros, g_idx)))
    tensors = {part: t.numpy() for part, t in pack(weight, QuantizeConfig(method=method, bits=bits)).items()}
    read_codes, read_zeros = gptq_codes(tensors, bits) if method == "gptq" else awq_codes(tensors)
    assert (read_codes == codes).all() and (read_zeros == zeros).all()
    if method == "gptq":
        assert (dequantized(tensors, {"quant_method": method, "bits": bits}) == weight.dequantized().T.numpy()).all()


def test_activation_order_groups_inputs_by_falling_energy(written: Callable[[str], Path], outliers: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, layers, _ = read_checkpoint(written("gptq-desc-act"))
    assert json.loads((written("gptq-desc-act") / "config.json").read_text())["quantization_config"]["desc_act"] is True
    for tensors in layers.values():
        counts = np.bincount(tensors["g_idx"])
        assert (counts == 32).all() and (np.diff(tensors["g_idx"]) < 0).any()
    model = AutoModelForCausalLM.from_pretrained(outliers, dtype=torch.float32).eval()
    seen: list[Any] = []
    linear = model.model.layers[0].self_attn.q_proj
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().square().mean((0, 1)).numpy()))
    model(calibration_ids())
    by_group = [seen[0][layers["model.layers.0.self_attn.q_proj"]["g_idx"] == g].mean() for g in (0, 1)]
    assert by_group[0] > 3 * by_group[1]
    for part in ("k_proj", "v_proj"):
        other = layers[f"model.layers.0.self_attn.{part}"]["g_idx"]
        assert (other == layers["model.layers.0.self_attn.q_proj"]["g_idx"]).all()


@pytest.mark.parametrize("name", ["gptq-desc-act", "awq"])
def test_same_seed_writes_the_same_bytes(
    name: str, written: Callable[[str], Path], outliers: Path, tmp_path: Path
) -> None:
    quantize(str(outliers), tmp_path / "again", CONFIGS[name])
    first, again = written(name), tmp_path / "again"
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in again.iterdir())
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_groups_without_spread_keep_their_value() -> None:
    from fastllm.quantize.grid import Grid, round_to_nearest

    weight = torch.zeros(32, 3)
    weight[:, 1], weight[:, 2] = 0.7, -0.7
    for sym, least_zero in ((True, 1), (False, 1), (False, 0)):
        result = round_to_nearest(weight, Grid(4, sym, least_zero), 1)
        assert int(result.zeros.min()) >= least_zero
        assert result.dequantized()[:, 0].abs().max() == 0
        assert torch.allclose(result.dequantized(), weight, rtol=0.07 if sym else 1e-3)
