"""A Transformers model as a row of decoder layers that run one at a time, whatever its class.

The model runs once per window with its layers replaced by recorders, which gives what the first layer is fed and with
which masks and positions every layer is called; from then on the layers are called by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastllm.errors import LoadError

_Record = tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]  # hidden states and everything else


@dataclass
class Call:
    """What a decoder layer is called with besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, tokens, hidden size] fp32. Returns the same shape."""
        return _first(layer(hidden, *self.args, **self.kwargs))

    def same_as(self, other: Call) -> bool:
        return _equal((self.args, self.kwargs), (other.args, other.kwargs))


class DecoderModel:
    """A loaded model. Outside of its layers it computes in fp32; a layer does between open() and close()."""

    def __init__(self, folder: Path) -> None:
        self._model = _load(folder)
        self.prefix, self.layers = _find_layers(self._model)
        self.stored: torch.dtype = next(self.layers.parameters()).dtype  # of the checkpoint
        inside = {id(p) for p in self.layers.parameters()}
        for parameter in self._model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.float()
        self.calls: list[Call] = []  # of every layer, after embed()
        self._give_tuples = False  # the layers, as those of older families do

    @property
    def head_dim(self) -> int:
        config = self._model.config.get_text_config()
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def linears(self, index: int) -> dict[str, Any]:
        """The linear layers of a decoder layer by their names in it. Raises LoadError for what cannot be quantised."""
        layer = self.layers[index]
        what = f"{type(self._model).__name__}'s decoder layers"
        found = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        if any(type(module).__name__ == "Conv1D" for module in layer.modules()):
            raise LoadError(f"{what} keep their weights in Conv1D modules (as GPT-2 does), which cannot be quantised.")
        if any(parameter.dim() > 2 for parameter in layer.parameters()):
            raise LoadError(f"{what} hold a mixture of experts, which cannot be quantised.")
        if not found:
            raise LoadError(f"{what} have no linear layers.")
        return found

    def full_name(self, index: int, name: str) -> str:
        return f"{self.prefix}.{index}.{name}"

    def embed(self, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the first layer is fed for every window, [1, tokens, hidden size]; fills in `calls`."""
        fed = []
        for ids in windows:
            tokens = torch.tensor([list(ids)])
            if not self.calls:
                self._see_output(tokens)
            records = self._record(self._model.base_model, tokens)[0]
            calls = [Call(args, kwargs) for _, args, kwargs in records]
            if self.calls and not all(map(Call.same_as, calls, self.calls)):
                raise LoadError(f"the decoder layers of {type(self._model).__name__} are fed more than hidden states.")
            self.calls = calls
            fed.append(records[0][0].float())
        return fed

    def log_likelihoods(self, ids: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        """Of every token but the first, from what the last layer gave for the window."""
        tokens = torch.tensor([list(ids)])
        logits = self._record(self._model, tokens, last=hidden)[1].logits
        return torch.log_softmax(logits[0, :-1].float(), -1).gather(1, tokens[0, 1:, None])[:, 0]

    def _see_output(self, tokens: torch.Tensor) -> None:
        """Runs the first layer to know the form of what it returns."""

        class Stopped(Exception):
            pass

        def run(*args: Any, **kwargs: Any) -> None:
            del layer.forward
            self._give_tuples = isinstance(layer(*args, **kwargs), tuple)
            raise Stopped

        layer = self.open(0)
        layer.forward = run
        with suppress(Stopped):
            self._model.base_model(tokens, use_cache=False)

    def _record(self, model: Any, tokens: torch.Tensor, last: torch.Tensor | None = None) -> tuple[list[_Record], Any]:
        """Runs `model` with layers that hand on their input, the last one `last` if given; what each was called with,
        and what the model returned."""
        records: list[_Record] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            records.append((hidden, args[1:], kwargs))
            given = last if last is not None and len(records) == len(self.layers) else hidden
            return (given,) if self._give_tuples else given

        for layer in self.layers:
            layer.forward = record
        try:
            return records, model(tokens, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward

    def open(self, index: int) -> Any:
        layer = self.layers[index].float()
        if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
            raise LoadError(f"layer {index} holds weights that are NaN or infinite.")
        return layer

    def close(self, index: int) -> None:
        """Gives the memory of a layer's weights back."""
        self.layers[index].to("meta")


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be the second one on the screen
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(f"Transformers cannot open {folder}: {reason}") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoadError(f"{folder} lacks {missing[0]!r} and {len(missing) - 1} more of the model's weights.")
    return model.eval()


def _find_layers(model: Any) -> tuple[str, Any]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise LoadError(f"{type(model).__name__} has no list of {count} decoder layers.")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a is b or a == b)
