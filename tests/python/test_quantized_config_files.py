"""Checkpoints of older tools, which describe their codes in a file of its own beside config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm.engine_args import EngineArgs
from fastllm.errors import LoadError
from fastllm.loader.model import open_model
from fastllm.quantize import QuantizeConfig, quantize
from packing import Variant, write_packed_model
from test_quantized_checkpoints import exported

_AWQ, _GPTQ = Variant("awq", 4, 32), Variant("gptq", 4, 32, symmetric=True)
_OLD_GPTQ = {
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "sym": True,
    "damp_percent": 0.01,
    "model_name_or_path": None,
}
_OLD_AWQ = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}


@pytest.fixture(scope="session")
def packed_model(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Variant], Path]:
    made: dict[str, Path] = {}

    def get(variant: Variant) -> Path:
        if str(variant) not in made:
            folder = tmp_path_factory.mktemp("packed")
            made[str(variant)] = folder / "packed"
            write_packed_model(
                tiny_model("llama-wide"), folder / "packed", folder / "dense", variant, seed=1, transposed=False
            )
        return made[str(variant)]

    return get


def _as_of_old(packed: Path, out: Path, **files: Any) -> Path:
    """The model with these files, of text or JSON, in place of the quantization_config."""
    shutil.copytree(packed, out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (out / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return out


@pytest.mark.parametrize(
    ("variant", "files"),
    [
        (_GPTQ, {"quantize_config": _OLD_GPTQ}),
        (_GPTQ, {"quantize_config": _OLD_GPTQ | {"quant_method": "gptq", "checkpoint_format": "gptq"}}),
        (_GPTQ, {"quantize_config": _OLD_GPTQ | {"quant_method": None}}),
        (_AWQ, {"quant_config": _OLD_AWQ}),
        (_AWQ, {"quant_config": {"bits": 4, "group_size": 32}}),
        (_AWQ, {"quantize_config": _OLD_AWQ}),
    ],
)
def test_config_in_a_file_of_its_own_gives_the_same_weights(
    variant: Variant, files: dict[str, Any], packed_model: Callable[[Variant], Path], tmp_path: Path
) -> None:
    packed = packed_model(variant)
    old = _as_of_old(packed, tmp_path / "old", **files)
    assert open_model(EngineArgs(model=str(old))).quantized == f"{variant.method} 4 bit, groups of 32"
    want = exported(packed, tmp_path / "want.safetensors")
    got = exported(old, tmp_path / "got.safetensors")
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_config_json_goes_before_a_file_of_its_own(packed_model: Callable[[Variant], Path], tmp_path: Path) -> None:
    packed = packed_model(_AWQ)
    both = shutil.copytree(packed, tmp_path / "both")
    (both / "quantize_config.json").write_text("of another model")
    assert open_model(EngineArgs(model=str(both))).quantized == "awq 4 bit, groups of 32"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"quantize_config": "{"}, "quantize_config.json is not valid JSON"),
        ({"quantize_config": [1]}, "quantize_config.json is not a JSON object"),
        ({"quantize_config": {}}, "quantize_config.json: bits must be a whole number"),
        ({"quantize_config": _OLD_GPTQ | {"bits": "4"}}, "quantize_config.json: bits must be a whole number"),
        ({"quantize_config": _OLD_GPTQ | {"bits": 3}}, "quantize_config.json: GPTQ of 3 bits .* is not supported"),
        ({"quantize_config": _OLD_GPTQ | {"group_size": 0}}, "quantize_config.json: group_size must be -1"),
        ({"quantize_config": _OLD_GPTQ | {"quant_method": "hqq"}}, "quantize_config.json has the quant_method 'hqq'"),
        ({"quant_config": _OLD_AWQ | {"q_group_size": 0}}, "quant_config.json: group_size must be -1"),
        ({"quant_config": _OLD_AWQ | {"bits": 8}}, "quant_config.json: w_bit is 4, but bits is 8"),
        ({"quant_config": _OLD_AWQ | {"version": "GEMV"}}, "quant_config.json: the AWQ version 'GEMV'"),
        ({"quant_config": _OLD_AWQ, "quantize_config": _OLD_GPTQ}, "both quantize_config.json and quant_config.json"),
        ({"quant_config": _OLD_AWQ | {"q_group_size": 64}}, "model.layers.0"),
    ],
)
def test_malformed_config_in_a_file_of_its_own_is_refused(
    files: dict[str, Any], message: str, packed_model: Callable[[Variant], Path], tmp_path: Path
) -> None:
    packed = packed_model(_AWQ)
    with pytest.raises(LoadError, match=message):
        exported(_as_of_old(packed, tmp_path / "old", **files), tmp_path / "out.safetensors")


def test_quantized_model_of_old_is_not_quantized_again(packed_model: Callable[[Variant], Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    old = _as_of_old(packed_model(_GPTQ), tmp_path / "old", quantize_config=_OLD_GPTQ)
    with pytest.raises(LoadError, match="quantised already .*gptq"):
        quantize(str(old), tmp_path / "out", QuantizeConfig())
