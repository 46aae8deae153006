"""What the linear layers of a decoder layer are fed: which of them share it, and its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from fastllm.quantize.decoder import Call


@contextmanager
def attached(hooks: Sequence[Any]) -> Iterator[None]:
    """Takes the hooks off again."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def input_groups(layer: Any, call: Call, hidden: torch.Tensor) -> list[list[str]]:
    """Names of the linear layers in the order in which they run, those with the same input together."""
    inputs: list[tuple[str, torch.Tensor]] = []  # keeps them alive, so that no two have the same address by chance

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.append((name, args[0]))

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with attached(hooks):
        call.run(layer, hidden)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, tensor in inputs:
        groups.setdefault((tensor.data_ptr(), tensor.shape[-1]), []).append(name)
    return list(groups.values())


class _Enough(Exception):
    """Leaves a layer as soon as the input that is wanted was seen."""


@dataclass
class InputStatistics:
    """Of what a group of linear layers is fed, over all tokens.

    In the Gram matrix every token has the norm 1, so that errors are shares of each token's output. Without that the
    few tokens that attention rests on, hundreds of times larger than others before an output projection, would be all
    that counts there, and GPTQ would move the weights to suit them.
    """

    gram: torch.Tensor  # [in, in] mean of x x^T / |x|^2
    magnitude: torch.Tensor  # [in] mean of |x|


def input_statistics(
    layer: Any, call: Call, windows: Sequence[torch.Tensor], names: Sequence[str]
) -> list[InputStatistics]:
    """For every linear layer named, in one pass over the windows that ends where the last of them begins.

    names: in the order in which they run.
    """
    modules = [layer.get_submodule(name) for name in names]
    sizes = [module.in_features for module in modules]
    statistics = [InputStatistics(torch.zeros(n, n), torch.zeros(n)) for n in sizes]

    def gather(index: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, sizes[index])
            statistics[index].magnitude.add_(rows.abs().sum(0))
            directions = torch.nn.functional.normalize(rows)
            statistics[index].gram.addmm_(directions.T, directions)
            if index == len(names) - 1:
                raise _Enough

        return hook

    hooks = [module.register_forward_pre_hook(gather(i)) for i, module in enumerate(modules)]
    with attached(hooks):
        for hidden in windows:
            with suppress(_Enough):
                call.run(layer, hidden)
    tokens = sum(hidden.shape[1] for hidden in windows)
    for one in statistics:
        one.gram.div_(tokens)
        one.magnitude.div_(tokens)
    return statistics
