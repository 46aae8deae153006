"""fastllm: LLM inference and serving. The names below are loaded on first use, so that importing costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllm._core import __version__ as __version__
    from fastllm.async_llm import AsyncLLM as AsyncLLM
    from fastllm.async_llm import AsyncLLMEngine as AsyncLLMEngine
    from fastllm.beam import BeamSearchOutput as BeamSearchOutput
    from fastllm.beam import BeamSearchParams as BeamSearchParams
    from fastllm.beam import BeamSearchSequence as BeamSearchSequence
    from fastllm.engine_args import AsyncEngineArgs as AsyncEngineArgs
    from fastllm.engine_args import EngineArgs as EngineArgs
    from fastllm.grammar.params import GuidedDecodingParams as GuidedDecodingParams
    from fastllm.grammar.params import StructuredOutputsParams as StructuredOutputsParams
    from fastllm.llm import LLM as LLM
    from fastllm.llm_engine import LLMEngine as LLMEngine
    from fastllm.outputs import CompletionOutput as CompletionOutput
    from fastllm.outputs import RequestOutput as RequestOutput
    from fastllm.outputs import TokensPrompt as TokensPrompt
    from fastllm.sampling import RequestOutputKind as RequestOutputKind
    from fastllm.sampling import SamplingParams as SamplingParams

_MODULES = {
    "LLM": "llm",
    "SamplingParams": "sampling",
    "StructuredOutputsParams": "grammar.params",
    "GuidedDecodingParams": "grammar.params",
    "BeamSearchParams": "beam",
    "BeamSearchOutput": "beam",
    "BeamSearchSequence": "beam",
    "RequestOutputKind": "sampling",
    "EngineArgs": "engine_args",
    "AsyncEngineArgs": "engine_args",
    "LLMEngine": "llm_engine",
    "AsyncLLM": "async_llm",
    "AsyncLLMEngine": "async_llm",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "TokensPrompt": "outputs",
    "__version__": "_core",
}
__all__ = list(_MODULES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastllm.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
