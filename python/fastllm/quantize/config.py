"""What a user chooses, checked, and how a checkpoint's config.json says it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from fastllm.errors import InvalidArgument

METHODS = ("gptq", "awq")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)
_NEEDED = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class QuantizeConfig:
    """Names and meanings are AutoGPTQ's and AutoAWQ's.

    method: "gptq" or "awq". bits: of a weight; AWQ's layout has 4 only. group_size: inputs that share a scale, -1 for
    all of a row. desc_act: GPTQ takes the columns by falling activation. sym: a fixed zero in the middle; None is the
    usual choice, True for GPTQ and False for AWQ, which has no other. damp_percent: share of the Hessian's mean
    diagonal that is added to it. calibration: a text file or the text itself; None takes the documentation that comes
    with Python. num_samples windows of sample_length tokens are used, drawn with `seed`.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    sym: bool | None = None
    damp_percent: float = 0.01
    calibration: str | None = None
    num_samples: int = 128
    sample_length: int = 512  # tokens
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("bits", self.bits, BITS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if not 0 < self.damp_percent < 1:
            raise InvalidArgument(f"damp_percent must be between 0 and 1, got {self.damp_percent}.")
        if self.num_samples < 1:
            raise InvalidArgument(f"calibration samples must be at least 1, got {self.num_samples}.")
        if self.sample_length < 16:
            raise InvalidArgument(f"calibration length must be at least 16 tokens, got {self.sample_length}.")
        if self.method == "awq":
            for wrong, what in ((self.bits != 4, "bits=8"), (self.desc_act, "desc_act"), (self.sym is True, "sym")):
                if wrong:
                    raise InvalidArgument(f"AWQ checkpoints hold 4 bits with zero points: {what} needs method gptq.")

    @property
    def symmetric(self) -> bool:
        return self.method == "gptq" if self.sym is None else self.sym

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size

    def as_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        from fastllm import __version__

        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return {**common, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        return {
            **common,
            "desc_act": self.desc_act,
            "sym": self.symmetric,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "damp_percent": self.damp_percent,
            "checkpoint_format": "gptq",
            "meta": {"quantizer": [f"fastllm:{__version__}"]},
        }


def require_extra() -> None:
    """Raises InvalidArgument if one of the packages that quantising takes is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidArgument(
            f"quantising a checkpoint needs {', '.join(missing)}: pip install 'fastllm-engine[quantize]'."
        )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InvalidArgument(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
