"""How one module of a quantised checkpoint is packed, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm.errors import LoadError
from fastllm.families import HfConfig


@dataclass(frozen=True)
class Scheme:
    layout: str  # of the codes, see fastllm::CodeLayout: "gptq", "awq", "rows"
    bits: int  # 4 or 8
    group: int  # columns that share a scale; 0: all
    has_zeros: bool = False  # they must be there; without, codes are symmetric
    has_order: bool = False  # the group of every column must be there
    zeros_less_one: bool = False


def group_size(config: HfConfig, default: int | None = None) -> int:
    """Columns of a group, 0 for all of them, from a config that writes -1 for that. Raises LoadError."""
    value = config.get("group_size", default)
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 0 < value < 2**31):
        raise LoadError(f"{config.where}: group_size must be -1 (the whole row) or at least 1, got {value!r}.")
    return max(value, 0)
