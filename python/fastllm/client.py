"""The engine with its text side: loads a model, turns prompts into requests and deltas into request states.

LLM, LLMEngine and AsyncLLM are thin loops around one EngineClient. Not thread-safe: one owner calls it, except for
prepare(), which only reads.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fastllm import _core
from fastllm.bad_words import bad_word_tokens
from fastllm.config import ModelConfig, sampling_defaults
from fastllm.device import choose_device, memory_line
from fastllm.engine_args import EngineArgs
from fastllm.errors import InvalidArgument, LoadError
from fastllm.grammar.compiler import CompiledGrammar, GrammarCompiler
from fastllm.grammar.limits import GrammarLimits
from fastllm.grammar.params import StructuredOutputsParams
from fastllm.loader.model import ModelFiles, open_model
from fastllm.loader.tensors import FileTensor, PageRelease
from fastllm.logits import core_processor
from fastllm.output_processor import OutputProcessor, RequestState
from fastllm.outputs import TokenIds, TokensPrompt
from fastllm.progress import Progress
from fastllm.sampling import RequestOutputKind, SamplingParams
from fastllm.tokenizer import Tokenizer, byte_tokenizer

log = logging.getLogger("fastllm")

PromptType = str | TokenIds | TokensPrompt

_NULL_MAX_LEN = 4096  # tokens
# Of grammars that come from the program itself and not from a stranger.
_OWN_LIMITS = GrammarLimits(max_schema_bytes=4 << 20, max_schema_nodes=200_000, max_compile_time_s=60.0)


@dataclass
class PreparedPrompt:
    text: str | None
    token_ids: TokenIds
    cache_salt: str = ""
    bad_words: list[list[int]] = field(default_factory=list)
    grammar: CompiledGrammar | None = None


class EngineClient:
    """core: the engine. tokenizer, model_config, grammars: what belongs to its model."""

    def __init__(self, core: _core.Engine, tokenizer: Tokenizer, model_config: ModelConfig) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.grammars = GrammarCompiler(tokenizer, model_config.vocab_size, model_config.eos_token_ids)
        self._outputs = OutputProcessor(tokenizer, model_config.eos_token_ids)
        self._core_ids = itertools.count(1)
        self._unread: Sequence[_core.TokenDelta] = ()  # polled, not yet processed
        self._by_name: dict[str, RequestState] = {}

    @classmethod
    def load(
        cls,
        args: EngineArgs,
        *,
        offline: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> EngineClient:
        """Loads the model and starts the engine. Raises LoadError or InvalidArgument with a sentence.

        offline: limits that were not chosen favour the throughput of batches. on_progress(done, total): called with the
        bytes of weights that are in place.
        """
        if args.trust_remote_code:
            log.info("trust_remote_code is accepted, but code that comes with a model is never run.")
        if args.model == "null" or args.load_format == "null":
            return cls._load_null(args)
        started = time.monotonic()
        files = open_model(args)
        limit = files.spec["max_len"]
        max_len = _checked_max_len(args, limit)
        device = choose_device(args.device, args.tensor_parallel_size)
        _log_dtype(args, files)
        core_config = args.to_core(max_len, files.spec["embed"]["vocab"], device, offline=offline)
        stays_compressed = core_config.device == "cpu" and core_config.quantization == "auto"
        if stays_compressed:
            _log_block_formats(files)
        progress = Progress("Loading weights", 0, "B", listener=on_progress)
        if files.is_bundle:
            core = _core.Engine.open(core_config, str(files.path), progress.update)
        else:
            pages = PageRelease(t for b in files.bindings for t in b.sources)

            def update(done: int, total: int) -> None:
                progress.update(done, total)
                pages.update(done, total)

            try:
                core = _core.Engine.create(core_config, files.spec_json, core_bindings(files), update)
            except LoadError as error:
                raise LoadError(f"{files.path}: {error}") from error
        progress.close()
        log.info("Loaded %s in %.1f s.", args.model, time.monotonic() - started)
        if files.quantized:
            _log_packed(files, core, stays_compressed)
        if core.memory.total:
            kv_tokens = core.config.num_blocks * core.config.block_size
            log.info("%s", memory_line(core.memory, kv_tokens, core.config.max_model_len))
        config = ModelConfig(
            model=args.model,
            served_model_names=args.served_model_names,
            max_model_len=core.config.max_model_len,
            vocab_size=files.spec["embed"]["vocab"],
            eos_token_ids=files.spec["eos"],
            dtype=core.config.dtype,
            generation_config=sampling_defaults(files.generation),
            chat_template=_chat_template(args),
            family=files.spec["family"],
        )
        return cls(core, files.tokenizer, config)

    @classmethod
    def _load_null(cls, args: EngineArgs) -> EngineClient:
        tokenizer = byte_tokenizer()
        eos = [cast(int, tokenizer.eos_token_id)]
        max_len = args.max_model_len or _NULL_MAX_LEN
        core = _core.Engine.create_null(
            args.to_core(max_len, tokenizer.vocab_size),
            vocab=tokenizer.vocab_size,
            max_len=max_len,
            eos=eos,
            step_us=int(os.environ.get("FASTLLM_NULL_STEP_US", "0")),
        )
        config = ModelConfig(
            args.model,
            args.served_model_names,
            max_len,
            tokenizer.vocab_size,
            eos,
            core.config.dtype,
            chat_template=_chat_template(args),
            family="null",
        )
        return cls(core, tokenizer, config)

    def prepare(self, prompt: Any, params: SamplingParams) -> PreparedPrompt:
        """Tokenises and checks a prompt, compiles its grammar. Raises ValueError saying what is wrong.

        Callable from any thread.
        """
        prepared = self._parse(prompt)
        ids = prepared.token_ids
        keep = params.truncate_prompt_tokens
        limit = self.model_config.max_model_len
        if keep is not None:
            ids = ids[-(max(1, limit - (params.max_tokens or 1)) if keep == -1 else keep) :]
        if not ids:
            raise ValueError("The prompt is empty: it must have at least one token.")
        vocab = self.model_config.vocab_size
        outside = _core.first_outside(ids, vocab)
        if outside is not None:
            raise ValueError(f"Token id {ids[outside]!r} is out of vocabulary: ids are 0 to {vocab - 1}.")
        if len(ids) >= limit:
            raise ValueError(
                f"This model's maximum context length is {limit} tokens. The prompt has {len(ids)} tokens, which "
                "leaves no room for output. Shorten the prompt or set truncate_prompt_tokens."
            )
        params.check_model(
            vocab_size=vocab,
            max_logprobs=self.core.config.max_logprobs,
            num_eos=len(self.model_config.eos_token_ids),
        )
        prepared.token_ids = ids
        if params.bad_words:
            prepared.bad_words = bad_word_tokens(self.tokenizer, params.bad_words)
        if isinstance(params.structured_outputs, StructuredOutputsParams):
            prepared.grammar = self.grammars.compile(params.structured_outputs, _OWN_LIMITS)
        return prepared

    def _parse(self, prompt: Any) -> PreparedPrompt:
        if isinstance(prompt, str):
            return PreparedPrompt(prompt, self.tokenizer.encode(prompt))
        if isinstance(prompt, dict):
            salt = str(prompt.get("cache_salt") or "")
            if prompt.get("prompt_token_ids") is not None:
                return PreparedPrompt(prompt.get("prompt"), list(prompt["prompt_token_ids"]), salt)
            if isinstance(prompt.get("prompt"), str):
                return PreparedPrompt(prompt["prompt"], self.tokenizer.encode(prompt["prompt"]), salt)
        elif isinstance(prompt, memoryview):
            return PreparedPrompt(None, prompt)
        elif isinstance(prompt, Sequence):
            return PreparedPrompt(None, list(prompt))
        raise ValueError(
            "A prompt is a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; got "
            f"{type(prompt).__name__}."
        )

    def submit(
        self,
        request_id: str,
        prompt: PreparedPrompt,
        params: SamplingParams,
        *,
        kind: RequestOutputKind | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        mask: Any | None = None,
    ) -> RequestState:
        """Queues a prepared request. Raises ValueError if a live request has this id."""
        if request_id in self._by_name:
            raise ValueError(f"The request id {request_id!r} is in use by a live request.")
        core_params = params.to_core(
            max_model_len=self.model_config.max_model_len,
            prompt_len=len(prompt.token_ids),
            bad_words=prompt.bad_words,
        )
        processor = core_processor(params.logits_processors) if params.logits_processors else None
        state = RequestState(
            request_id,
            next(self._core_ids),
            prompt.text,
            prompt.token_ids,
            params,
            kind or params.output_kind,
            self.tokenizer,
        )
        self.core.submit(
            state.core_id,
            prompt.token_ids,
            core_params,
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=cache_salt or prompt.cache_salt,
            logits_processor=processor,
            mask=prompt.grammar.mask() if mask is None and prompt.grammar else mask,
        )
        self._outputs.requests[state.core_id] = state
        self._by_name[request_id] = state
        return state

    def poll(self, timeout_s: float = 0.0, *, until_end: bool = False, limit: int | None = None) -> list[RequestState]:
        """The requests that changed since the last poll. until_end: waits for the end of a sample, not any token.

        limit: samples to take at most; while has_unread, the next call goes on with the rest.
        """
        deltas = self._unread or self.core.poll(timeout_s, until_end)
        if limit is None:
            self._unread = ()
        else:
            deltas, self._unread = deltas[:limit], deltas[limit:]
        changed, to_abort = self._outputs.process(deltas)
        for core_id, index in to_abort:
            self.core.abort(core_id, index)
        for state in changed:
            if state.finished:
                self._by_name.pop(state.request_id, None)
        return changed

    @property
    def has_unread(self) -> bool:
        return bool(self._unread)

    def abort(self, request_id: str) -> None:
        """Asks the core to end a request; its last output, with finish_reason "abort", comes with a later poll."""
        state = self._by_name.get(request_id)
        if state is not None:
            self.core.abort(state.core_id)

    def forget(self, state: RequestState) -> None:
        """Ends a request whose output nobody wants any more."""
        if self._by_name.get(state.request_id) is state:
            del self._by_name[state.request_id]
        if self._outputs.requests.pop(state.core_id, None) is not None:
            self.core.abort(state.core_id)

    def shutdown(self) -> None:
        """Stops the engine and what works for it. Idempotent."""
        self.core.shutdown()
        self.grammars.close()
        self.tokenizer.templates.close()

    @property
    def live(self) -> list[RequestState]:
        return list(self._by_name.values())


def core_bindings(files: ModelFiles) -> list[_core.WeightBinding]:
    """The bindings as the core takes them; memory stays mapped, nothing is copied."""
    return [
        _core.WeightBinding(
            b.canonical,
            [_core_tensor(t) for t in b.sources],
            b.transform,
            b.add_one,
        )
        for b in files.bindings
    ]


def _core_tensor(tensor: FileTensor) -> _core.SourceTensor:
    packing = None
    if tensor.packing:
        p = tensor.packing
        zeros, group_of = (_core_tensor(t) if t else None for t in (p.zeros, p.group_of))
        packing = _core.Packing(p.layout, p.bits, p.group, p.zeros_less_one, _core_tensor(p.scales), zeros, group_of)
    return _core.SourceTensor(tensor.name, tensor.type, tensor.shape, tensor.data, tensor.interleaved_head_dim, packing)


def _checked_max_len(args: EngineArgs, limit: int) -> int:
    if args.max_model_len is None:
        return limit
    if args.max_model_len > limit:
        raise InvalidArgument(
            f"User-specified max_model_len ({args.max_model_len}) is greater than the derived max_model_len ({limit}, "
            "what the positions of the model were made for). Use a smaller value, or change the model's rope scaling "
            "with hf_overrides."
        )
    return args.max_model_len


def _log_dtype(args: EngineArgs, files: ModelFiles) -> None:
    wanted = files.checkpoint_dtype if args.dtype == "auto" else args.dtype
    if wanted in ("float16", "half"):
        log.info("float16 is computed in bfloat16: the same size, more range, less precision.")
    elif wanted == "float32" and args.dtype == "auto":
        log.info("The float32 checkpoint is cast down to bfloat16; pass dtype=float32 to keep it.")


def _log_packed(files: ModelFiles, core: _core.Engine, stays_compressed: bool) -> None:
    """Says how the weights of a quantised checkpoint are kept."""
    is_dense = core.config.device != "cpu" or core.config.quantization == "none"
    how = "kept compressed" if stays_compressed else "dequantised" if is_dense else f"as {core.config.quantization}"
    log.info("Weights: %s, %s (%.2f GiB).", files.quantized, how, core.memory.weights / 2**30)
    if stays_compressed and core.memory.inflated:
        inflated = core.memory.inflated
        more = f", and {len(inflated) - 1} more" if len(inflated) > 1 else ""
        log.info("Kept dense all the same: %s%s.", inflated[0], more)


def _log_block_formats(files: ModelFiles) -> None:
    """Says once what becomes of block formats; plain types have no codes and stay dense."""
    sources = (t for b in files.bindings for t in b.sources if t.packing is None)
    types = {t.type for t in sources if t.type not in ("F32", "F16", "BF16")}
    kept = sorted(name for name in types if _core.group_bits(name))
    converted = sorted(types.difference(kept))
    if kept:
        log.info("Weights stay compressed as in the file: %s.", ", ".join(kept))
    if converted:
        log.info("Weights are converted to 8 bits with a scale for every 32: %s.", ", ".join(converted))


def _chat_template(args: EngineArgs) -> str | None:
    """The template itself: the argument is a file if it looks like a path, else the template."""
    given = args.chat_template
    if given is None or any(c in given for c in "{}\n"):
        return given
    try:
        return Path(given).read_text("utf-8")
    except OSError as error:
        raise LoadError(f"chat_template={given!r} is neither a template nor a file: {error.strerror}.") from error
