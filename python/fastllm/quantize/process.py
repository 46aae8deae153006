"""Layer by layer: measure the inputs, round the weights, hand the rounded layer's outputs to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastllm.errors import InvalidArgument
from fastllm.progress import Progress
from fastllm.quantize.awq import best_bounds, best_scale, squared_error
from fastllm.quantize.calibration import Calibration
from fastllm.quantize.config import GROUP_SIZES, QuantizeConfig
from fastllm.quantize.decoder import Call, DecoderModel
from fastllm.quantize.folds import find_folds
from fastllm.quantize.gptq import gptq
from fastllm.quantize.grid import QuantizedWeight, grid_of, round_to_nearest
from fastllm.quantize.inputs import InputStatistics, input_groups, input_statistics
from fastllm.quantize.packing import pack


@dataclass
class Measured:
    """Errors are norms of an output's error over norms of the output, one number a layer; all tokens count the same."""

    error: dict[str, list[float]] = field(default_factory=dict)  # by kind of linear layer, as "q_proj"
    rounding_error: dict[str, list[float]] = field(default_factory=dict)  # what rounding to nearest would have had
    perplexity_before: float = math.nan  # of the held-out windows
    perplexity_after: float = math.nan

    def note(self, name: str, error: float, rounding_error: float) -> None:
        kind = name.rpartition(".")[2]
        self.error.setdefault(kind, []).append(error)
        self.rounding_error.setdefault(kind, []).append(rounding_error)


@dataclass
class QuantizedModel:
    """packed: full name of a linear layer to its tensors. changed: full names of other weights that took a scale."""

    packed: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    changed: dict[str, torch.Tensor] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)


def check_shapes(decoder: DecoderModel, config: QuantizeConfig) -> list[str]:
    """Full names of all linear layers that will be quantised. Raises InvalidArgument for one that does not fit."""
    linears = {
        decoder.full_name(index, name): linear
        for index in range(len(decoder.layers))
        for name, linear in decoder.linears(index).items()
    }
    per_word = 32 // config.bits
    for name, linear in linears.items():
        inputs, outputs = linear.in_features, linear.out_features
        if config.group_size != -1 and inputs % config.group_size:
            sizes = [s for s in GROUP_SIZES if s == -1 or all(one.in_features % s == 0 for one in linears.values())]
            raise InvalidArgument(
                f"{name} has {inputs} inputs, which is no multiple of the group size {config.group_size}, as every "
                f"reader of such checkpoints expects; --group-size {' or '.join(map(str, sizes))} fits this model."
            )
        if inputs % per_word or outputs % per_word:
            raise InvalidArgument(
                f"{name} is {outputs} by {inputs}, but words of {per_word} codes of {config.bits} bits need multiples "
                f"of {per_word}."
            )
    return list(linears)


def quantize_layers(
    decoder: DecoderModel, texts: Calibration, config: QuantizeConfig, progress: Progress
) -> QuantizedModel:
    """Quantises every linear layer of the decoder layers, whose weights are gone afterwards."""
    with torch.no_grad():
        return _quantize_layers(decoder, texts, config, progress)


def _quantize_layers(
    decoder: DecoderModel, texts: Calibration, config: QuantizeConfig, progress: Progress
) -> QuantizedModel:
    result = QuantizedModel()
    windows = decoder.embed(texts.windows)
    held_out = decoder.embed(texts.held_out)  # through the layers as they will be written
    original = list(held_out)  # and as they were
    begun = time.monotonic()

    def show_next() -> None:
        done = progress.done + 1
        left = (time.monotonic() - begun) / done * (progress.total - done)
        note = f"layer {index + 1} of {len(decoder.calls)}, about {_duration(left)} left"
        progress.update(done, note=note if done < progress.total else "")

    for index, call in enumerate(decoder.calls):
        layer = decoder.open(index)
        original = [call.run(layer, hidden) for hidden in original]
        step = _LayerStep(layer, call, windows, config, result.measured, show_next)
        step.run(decoder.head_dim, decoder.stored)
        for name, weight in step.quantized.items():
            result.packed[decoder.full_name(index, name)] = pack(weight, config)
        for name, value in step.changed(decoder.stored).items():
            result.changed[decoder.full_name(index, name)] = value
        for states in (windows, held_out):
            for i, hidden in enumerate(states):  # in place: one layer's activations are held
                states[i] = call.run(layer, hidden)
        decoder.close(index)
    result.measured.perplexity_before = _perplexity(decoder, texts.held_out, original)
    result.measured.perplexity_after = _perplexity(decoder, texts.held_out, held_out)
    return result


class _LayerStep:
    """One decoder layer; its linear layers hold the weights that were written once they are in `quantized`."""

    def __init__(
        self,
        layer: Any,
        call: Call,
        windows: Sequence[torch.Tensor],
        config: QuantizeConfig,
        measured: Measured,
        after_each: Callable[[], None],  # linear layer
    ) -> None:
        self._layer = layer
        self._call = call
        self._windows = windows
        self._config = config
        self._measured = measured
        self._after_each = after_each
        self._grid = grid_of(config)
        self._touched: set[str] = set()  # norms and linear layers that took a scale
        self.quantized: dict[str, QuantizedWeight] = {}

    def run(self, head_dim: int, stored: torch.dtype) -> None:
        """stored: the type in which the checkpoint keeps norms and biases."""
        groups = input_groups(self._layer, self._call, self._windows[0])
        if self._config.method == "gptq":
            for names in groups:
                self._gptq(names)
        else:
            self._awq(groups, head_dim, stored)

    def changed(self, stored: torch.dtype) -> dict[str, torch.Tensor]:
        """Weights besides the quantised ones that are no longer the checkpoint's, by their names in the layer."""
        found = {}
        for module in sorted(self._touched):
            for name, parameter in self._layer.get_submodule(module).named_parameters(recurse=False):
                if not (name == "weight" and module in self.quantized):
                    found[f"{module}.{name}"] = parameter.detach().to(stored)
        return found

    def _gptq(self, names: Sequence[str]) -> None:
        """Layers with the same input share its Hessian, and their outputs stand beside each other."""
        (inputs,) = input_statistics(self._layer, self._call, self._windows, names[:1])
        weight = self._weight(names)
        config = self._config
        quantized = gptq(
            weight,
            inputs.gram,
            self._grid,
            config.groups(len(weight)),
            desc_act=config.desc_act,
            damp=config.damp_percent,
        )
        begin = 0
        for name in names:
            end = begin + self._layer.get_submodule(name).out_features
            self._put(name, quantized.columns(begin, end), inputs, self._rounding_error(name, inputs))
            begin = end

    def _awq(self, groups: Sequence[Sequence[str]], head_dim: int, stored: torch.dtype) -> None:
        """All scales before any rounding, as a scale may change the layer before, too."""
        folds = find_folds(self._layer, self._call, self._windows[0], groups, head_dim)
        statistics = input_statistics(self._layer, self._call, self._windows, [names[0] for names in groups])
        rounding = {
            name: self._rounding_error(name, inputs)
            for names, inputs in zip(groups, statistics, strict=True)
            for name in names
        }
        for names, inputs in zip(groups, statistics, strict=True):
            fold = folds.get(names[0])
            if fold is not None:
                weight = self._weight(names)
                scale = best_scale(weight, inputs, fold, self._grid, self._config.groups(len(weight)))
                of_inputs = fold.apply(self._layer, scale, stored)
                inputs.gram.div_(of_inputs[:, None]).div_(of_inputs)
                self._touched |= {fold.producer}
        for names, inputs in zip(groups, statistics, strict=True):
            for name in names:
                weight = self._weight([name])
                count = self._config.groups(len(weight))
                bounds = best_bounds(weight, inputs.gram, self._grid, count)
                self._put(name, round_to_nearest(weight, self._grid, count, bounds), inputs, rounding[name])

    def _weight(self, names: Sequence[str]) -> torch.Tensor:
        """[in, out of all]."""
        return torch.cat([self._layer.get_submodule(name).weight.T for name in names], 1).contiguous()

    def _rounding_error(self, name: str, inputs: InputStatistics) -> float:
        weight = self._weight([name])
        rounded = round_to_nearest(weight, self._grid, self._config.groups(len(weight)))
        return _relative_error(weight, rounded.dequantized(), inputs.gram)

    def _put(self, name: str, weight: QuantizedWeight, inputs: InputStatistics, rounding_error: float) -> None:
        dequantized = weight.dequantized()
        self._measured.note(name, _relative_error(self._weight([name]), dequantized, inputs.gram), rounding_error)
        self._layer.get_submodule(name).weight.copy_(dequantized.T)
        self.quantized[name] = weight
        self._after_each()


def _relative_error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    whole = squared_error(weight, gram)
    return math.sqrt(max(squared_error(other - weight, gram), 0.0) / whole) if whole > 0 else 0.0


def _perplexity(decoder: DecoderModel, windows: Sequence[Sequence[int]], hidden: Sequence[torch.Tensor]) -> float:
    scores = [decoder.log_likelihoods(ids, states) for ids, states in zip(windows, hidden, strict=True)]
    return math.exp(-float(torch.cat(scores).mean()))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
