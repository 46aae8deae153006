"""Runs a request's logits processors inside the engine, whichever arrays they like."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CoreProcessor = Callable[[list[int], list[int], NDArray[np.float32]], NDArray[np.float32]]


def core_processor(processors: Sequence[Callable[..., Any]]) -> CoreProcessor:
    """One function for the core from functions of (output_ids, logits) or (prompt_ids, output_ids, logits).

    logits is one row of fp32, [vocab]; it may be changed in place or a new row returned. A processor gets a torch
    tensor that shares the row's memory if torch is imported, unless its annotations ask for numpy.
    """
    steps = [(function, _num_arguments(function), _wants_numpy(function)) for function in processors]

    def run(prompt_ids: list[int], output_ids: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        for function, num_arguments, wants_numpy in steps:
            ids = (output_ids,) if num_arguments == 2 else (prompt_ids, output_ids)
            logits = _as_row(function(*ids, logits if wants_numpy else _as_torch(logits)), logits)
        return logits

    return run


def _num_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    count = max(len(required), min(len(positional), 2))
    if count not in (2, 3):
        raise ValueError(
            f"A logits processor takes (output_ids, logits) or (prompt_ids, output_ids, logits), not {count} arguments."
        )
    return count


def _wants_numpy(function: Callable[..., Any]) -> bool:
    """Annotated with numpy, or torch is neither imported nor named."""
    target = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    names = " ".join(str(a) for a in getattr(target, "__annotations__", {}).values())
    if "torch" in names or "Tensor" in names:
        return False
    return "numpy" in names or "np." in names or "NDArray" in names or "torch" not in sys.modules


def _as_torch(logits: NDArray[np.float32]) -> Any:
    import torch

    return torch.from_numpy(logits)


def _as_row(returned: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if returned is None:
        return logits
    row = np.from_dlpack(returned.detach()) if hasattr(returned, "detach") else np.asarray(returned)
    if row.shape != logits.shape:
        raise ValueError(f"A logits processor returned the shape {row.shape}; it must be {logits.shape}.")
    return row.astype(np.float32, copy=False)
