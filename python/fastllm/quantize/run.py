"""From a model's folder to a quantised one: checks that cost nothing first, then the work, then the files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm.errors import LoadError
from fastllm.families import HfConfig
from fastllm.loader.files import read_json
from fastllm.loader.hub import resolve_model
from fastllm.loader.quantized import quantization_of
from fastllm.loader.safetensors import read_folder
from fastllm.loader.tensors import FileTensor
from fastllm.progress import Progress
from fastllm.quantize.calibration import calibration
from fastllm.quantize.checkpoint import check_disk, new_folder, write_checkpoint
from fastllm.quantize.config import QuantizeConfig, require_extra
from fastllm.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from fastllm.quantize.process import Measured

log = logging.getLogger("fastllm")


@dataclass(frozen=True)
class QuantizeReport:
    bits_per_weight: float  # of the quantised layers, with scales, zeros and order
    bytes_before: int  # all tensors
    bytes_after: int
    calibration: str  # in words
    measured: Measured

    def lines(self) -> list[str]:
        """A summary for people."""
        measured = self.measured
        rows = [
            f"{self.bits_per_weight:.2f} bits per quantised weight; "
            f"{self.bytes_before / 1e6:.0f} MB before, {self.bytes_after / 1e6:.0f} MB after",
            f"perplexity of held-out text: {measured.perplexity_before:.3f} before, "
            f"{measured.perplexity_after:.3f} after",
            "output error, mean over layers (in brackets: rounding to nearest):",
        ]
        for kind, errors in measured.error.items():
            rounding = measured.rounding_error[kind]
            rows.append(f"  {kind}: {_mean(errors):.2%} ({_mean(rounding):.2%})")
        return rows


def quantize(
    model: str, out: str | Path, config: QuantizeConfig | None = None, *, overwrite: bool = False
) -> QuantizeReport:
    """Writes the model in folder (or hub id) `model`, 16 or 32 bits, to the folder `out` as `config` says.

    All linear layers of the decoder layers are quantised; embeddings and head stay as they are. `out` appears when it
    is whole. Raises InvalidArgument for settings that do not fit, LoadError for a model that cannot be quantised,
    OSError if the files cannot be written.
    """
    config = config or QuantizeConfig()
    require_extra()
    source = resolve_model(model)
    checkpoint = _check_source(source)
    tensors = read_folder(source)
    with new_folder(Path(out), overwrite, source) as folder:
        longest = checkpoint.get("max_position_embeddings")
        texts = calibration(config, load_tokenizer(source), longest if isinstance(longest, int) else 1 << 30)
        log.info(
            "Calibrating with %d windows of %d tokens from %s.", len(texts.windows), config.sample_length, texts.source
        )
        from fastllm.quantize.decoder import DecoderModel
        from fastllm.quantize.process import check_shapes, quantize_layers

        decoder = DecoderModel(source)
        weights = [f"{name}.weight" for name in check_shapes(decoder, config)]
        _check_names(weights, tensors, source)
        check_disk(folder, _size_estimate(weights, tensors, config))
        progress = Progress("Quantizing", len(weights), "matrices")
        result = quantize_layers(decoder, texts, config, progress)
        progress.close()
        size = write_checkpoint(folder, source, tensors, result.packed, result.changed, config.as_json())
    packed_bytes = sum(t.numel() * t.element_size() for parts in result.packed.values() for t in parts.values())
    elements = sum(_elements(tensors[name]) for name in weights)
    before = sum(len(tensor.data) for tensor in tensors.values())
    return QuantizeReport(8 * packed_bytes / elements, before, size, texts.source, result.measured)


def _check_source(source: Path) -> dict[str, Any]:
    """The config.json of a folder that can be quantised."""
    if source.is_file():
        raise LoadError(f"{source} is a GGUF file: only a Hugging Face folder of safetensors can be quantised.")
    if (source / "spec.json").is_file():
        raise LoadError(f"{source} is a fastllm bundle: quantise the model that it was made from.")
    if not (source / "config.json").is_file():
        raise LoadError(f"{source} is not a model folder: it has no config.json.")
    config = read_json(source / "config.json")
    present = quantization_of(HfConfig(config, str(source / "config.json")), source)
    if present is not None:
        raise LoadError(f"{source} is quantised already ({present.get('quant_method')}): start from the 16-bit model.")
    return config


def _check_names(weights: list[str], tensors: dict[str, FileTensor], source: Path) -> None:
    for name in weights:
        if name not in tensors:
            raise LoadError(
                f"{source} has no tensor {name!r}, which is Transformers' name of a weight: checkpoints that name or "
                "split their weights differently cannot be quantised."
            )


def _size_estimate(weights: list[str], tensors: dict[str, FileTensor], config: QuantizeConfig) -> int:
    """Bytes; a little too high."""
    quantized = sum(_elements(tensors[name]) for name in weights)
    rest = sum(len(tensor.data) for tensor in tensors.values()) - sum(len(tensors[name].data) for name in weights)
    return int(quantized * (config.bits + 1) / 8) + rest


def _elements(tensor: FileTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
