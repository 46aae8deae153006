"""Writes GPTQ and AWQ checkpoints from 16-bit ones. Needs the extra `quantize` (torch, transformers, safetensors)."""

from fastllm.quantize.config import QuantizeConfig
from fastllm.quantize.run import quantize

__all__ = ["QuantizeConfig", "quantize"]
