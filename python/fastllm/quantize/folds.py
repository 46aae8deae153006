"""Where a scale of a linear layer's inputs can be moved into what makes them, found by trying.

Dividing the producer's channel c by s_c and multiplying the consumers' weights of that input by s_c leaves the layer as
it was, if the path between them is linear and nobody else reads it. Rather than know every family, each pair whose
sizes fit is tried with random powers of two, which floating point multiplies exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastllm.quantize.decoder import Call
from fastllm.quantize.inputs import attached

_TOLERANCE = 1e-3  # of the output's norm; a wrong fold is off by tens of percent


@dataclass(frozen=True)
class Fold:
    """producer: a norm or a linear layer, by its name. consumers: linear layers that share their input."""

    producer: str
    consumers: tuple[str, ...]
    channel_of: torch.Tensor  # [in] the producer's channel behind each input; heads that share values share channels
    one_added: bool = False  # the norm multiplies by 1 + weight

    @property
    def channels(self) -> int:
        return int(self.channel_of.max()) + 1

    def apply(self, layer: Any, scale: torch.Tensor, stored: torch.dtype | None = None) -> torch.Tensor:
        """Scales both sides in place; returns the scale of every input, [in].

        scale: [channels]. stored: the type that the weights of norms are kept in; what rounding to it takes from the
        norm is given to the consumers.
        """
        producer = layer.get_submodule(self.producer)
        if isinstance(producer, torch.nn.Linear):
            producer.weight.div_(scale[:, None])
        else:
            offset = 1.0 if self.one_added else 0.0
            before = producer.weight + offset
            producer.weight.copy_((before / scale - offset).to(stored or torch.float32))
            after = producer.weight + offset
            scale = torch.where((before == 0) | (after == 0), scale, before / after)
        if getattr(producer, "bias", None) is not None:
            producer.bias.copy_((producer.bias / scale).to(stored or torch.float32))
        of_inputs = scale[self.channel_of]
        for name in self.consumers:
            layer.get_submodule(name).weight.mul_(of_inputs)
        return of_inputs


def find_folds(
    layer: Any, call: Call, hidden: torch.Tensor, groups: Sequence[Sequence[str]], head_dim: int
) -> dict[str, Fold]:
    """The fold of each group of linear layers that has one, by the group's first name."""
    order = _execution_order(layer, call, hidden)
    folds = {}
    for group in groups:
        earlier = order[: order.index(group[0])]
        for fold in _candidates(layer, earlier, tuple(group), head_dim):
            if _is_exact(layer, call, hidden, fold):
                folds[group[0]] = fold
                break
    return folds


def _candidates(layer: Any, earlier: Sequence[str], group: tuple[str, ...], head_dim: int) -> list[Fold]:
    """Latest first."""
    inputs = layer.get_submodule(group[0]).in_features
    found = []
    for name in reversed(earlier):
        module = layer.get_submodule(name)
        outputs = module.weight.shape[0]
        if not isinstance(module, torch.nn.Linear):
            if outputs == inputs:
                same = torch.arange(inputs)
                found += [Fold(name, group, same), Fold(name, group, same, one_added=True)]
        elif outputs == inputs:
            found.append(Fold(name, group, torch.arange(inputs)))
        elif inputs % outputs == 0 and outputs % head_dim == 0:  # grouped-query attention: value heads to query heads
            value_head = torch.arange(inputs) // head_dim // (inputs // outputs)
            found.append(Fold(name, group, value_head * head_dim + torch.arange(inputs) % head_dim))
    return found


def _execution_order(layer: Any, call: Call, hidden: torch.Tensor) -> list[str]:
    """Modules with a weight matrix or vector, in the order in which they run."""
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    with attached(hooks):
        call.run(layer, hidden)
    return order


def _is_exact(layer: Any, call: Call, hidden: torch.Tensor, fold: Fold) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(-1, 2, (fold.channels,), generator=generator)
    modules = [layer.get_submodule(name) for name in (fold.producer, *fold.consumers)]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    saved = [p.clone() for p in parameters]
    before = _outputs(layer, call, hidden, fold)
    fold.apply(layer, scale)
    after = _outputs(layer, call, hidden, fold)
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
    return all(float((b - a).norm()) <= _TOLERANCE * float(a.norm()) for a, b in zip(before, after, strict=True))


def _outputs(layer: Any, call: Call, hidden: torch.Tensor, fold: Fold) -> list[torch.Tensor]:
    """Of the consumers, and what the layer adds to its input."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
        for name in fold.consumers
    ]
    with attached(hooks):
        seen.append(call.run(layer, hidden) - hidden)
    return seen
