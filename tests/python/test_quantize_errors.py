"""What cannot be quantised is refused with a sentence, and nothing half written stays behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllm.errors import InvalidArgument, LoadError
from fastllm.quantize import QuantizeConfig, quantize
from tiny_models import VOCAB, save_tiny_model

torch = pytest.importorskip("torch", reason="quantising takes it")
pytest.importorskip("transformers", reason="quantising takes it")

TEXT = "A text to calibrate with, said again and again. " * 20
SMALL = {"group_size": 32, "num_samples": 4, "sample_length": 32, "calibration": TEXT}


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def changed_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"method": "rtn"}, "method must be one of gptq, awq"),
        ({"bits": 3}, "bits must be one of 4, 8"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, -1"),
        ({"method": "awq", "bits": 8}, "bits=8 needs method gptq"),
        ({"method": "awq", "desc_act": True}, "desc_act needs method gptq"),
        ({"method": "awq", "sym": True}, "sym needs method gptq"),
        ({"num_samples": 0}, "samples must be at least 1"),
        ({"sample_length": 4}, "length must be at least 16"),
        ({"damp_percent": 0.0}, "damp_percent must be between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        QuantizeConfig(**fields)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"group_size": 128}, "has 64 inputs, which is no multiple of the group size 128.*--group-size 32 or -1 fits"),
        ({"group_size": 64}, "down_proj has 96 inputs"),
        ({"calibration": "too short"}, "too short: 9 tokens do not fill 2 windows of 32"),
        ({"calibration": "/no/such/file.txt"}, "no calibration file '/no/such/file.txt'"),
        ({"sample_length": 100_000}, "exceeds the model's context"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    fields: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        quantize(str(llama), tmp_path / "out", QuantizeConfig(**{**SMALL, **fields}))
    assert list(tmp_path.iterdir()) == []


def test_quantized_model_is_not_quantized_again(model: Path, tmp_path: Path) -> None:
    changed_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(LoadError, match="quantised already .*gptq.*start from the 16-bit model"):
        quantize(str(model), tmp_path / "out", QuantizeConfig(**SMALL))


def test_unknown_architecture_is_a_sentence(model: Path, tmp_path: Path) -> None:
    changed_config(model, model_type="no-such-model", architectures=["NoSuchModel"])
    with pytest.raises(LoadError, match="Transformers cannot open .*no-such-model"):
        quantize(str(model), tmp_path / "out", QuantizeConfig(**SMALL))


def test_missing_weights_are_a_sentence(model: Path, tmp_path: Path) -> None:
    changed_config(model, num_hidden_layers=4)
    with pytest.raises(LoadError, match=r"lacks 'model\.layers\.3"):
        quantize(str(model), tmp_path / "out", QuantizeConfig(**SMALL))


def test_gpt2_and_files_that_are_no_folder_are_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="Conv1D"):
        quantize(str(tiny_model("gpt2")), tmp_path / "out", QuantizeConfig(**SMALL))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LoadError, match="is a GGUF file"):
        quantize(str(tmp_path / "model.gguf"), tmp_path / "out", QuantizeConfig(**SMALL))


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    save_tiny_model(("MixtralConfig", sizes | {"num_local_experts": 2}), tmp_path / "model")
    with pytest.raises(LoadError, match="mixture of experts"):
        quantize(str(tmp_path / "model"), tmp_path / "out", QuantizeConfig(**SMALL))


def test_weights_that_are_not_finite_are_named(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="layer 1 holds weights that are NaN or infinite"):
        quantize(str(model), tmp_path / "out", QuantizeConfig(**SMALL))


def test_only_another_models_folder_is_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    config = QuantizeConfig(**SMALL)
    with pytest.raises(InvalidArgument, match="not an empty folder"):
        quantize(str(model), out, config)
    with pytest.raises(InvalidArgument, match="is not a model's folder"):
        quantize(str(model), out, config, overwrite=True)
    with pytest.raises(InvalidArgument, match="holds the model that is read"):
        quantize(str(model), model, config, overwrite=True)
    (out / "config.json").write_text("{}")
    quantize(str(model), out, config, overwrite=True)
    assert not (out / "notes.txt").exists() and (out / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_failure_leaves_the_old_folder_and_nothing_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="takes .* GB, but the disk has 0.00 GB"):
        quantize(str(model), out, QuantizeConfig(**SMALL), overwrite=True)
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_library_failing_to_write_is_an_os_error(tmp_path: Path) -> None:
    from fastllm.quantize import checkpoint

    with pytest.raises(OSError, match="writing failed"):
        checkpoint._save({"a": torch.zeros(4)}, tmp_path / "missing" / "model.safetensors")


def test_large_models_are_written_in_shards(llama: Path, tmp_path: Path) -> None:
    from fastllm.loader.safetensors import read_folder
    from fastllm.quantize.checkpoint import write_checkpoint

    tensors = read_folder(llama)
    total = write_checkpoint(tmp_path, llama, tensors, {}, {}, {"quant_method": "none"}, max_shard=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    written = read_folder(tmp_path)  # checks the index
    assert list(sorted(written)) == list(sorted(tensors)) and total == sum(len(t.data) for t in written.values())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"  # matrices of 32 bits are narrowed
    assert written["model.embed_tokens.weight"].type == "F16" and written["model.norm.weight"].type == "F32"


def test_missing_extra_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastllm.quantize import config

    monkeypatch.setattr(config, "_NEEDED", ("torch", "surely_not_installed"))
    with pytest.raises(InvalidArgument, match=r"needs surely_not_installed: pip install 'fastllm-engine\[quantize\]'"):
        quantize(str(llama), tmp_path / "out", QuantizeConfig(**SMALL))


def test_command_shows_progress_and_a_summary(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastllm", "quantize", str(llama), str(tmp_path / "out"), "--method", "awq"]
    flags = ["--group-size", "32", "--calibration-samples", "4", "--calibration-length", "32"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in (
        "Quantizing: 100% 21/21 matrices",
        "Python's own help texts",
        "bits per quantised weight",
        "q_proj: ",
    ):
        assert words in done.stderr
    again = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


def test_command_does_not_load_torch_for_its_help() -> None:
    code = "import sys, fastllm.cli\ntry: fastllm.cli.main(['quantize', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--group-size" in done.stdout, done.stderr
