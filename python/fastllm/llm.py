"""Offline generation: a list of prompts in, a list of outputs out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastllm import _core, beam
from fastllm.beam import BeamSearchOutput, BeamSearchParams
from fastllm.client import EngineClient
from fastllm.engine_args import EngineArgs
from fastllm.output_processor import RequestState
from fastllm.outputs import RequestOutput
from fastllm.progress import Progress
from fastllm.sampling import RequestOutputKind, SamplingParams
from fastllm.tokenizer import Tokenizer

_POLL_S = 1.0  # poll returns at the first result; this only bounds how late Ctrl-C is seen

Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model for batches of prompts. Arguments are those of EngineArgs. Not thread-safe.

    >>> llm = LLM("null")
    >>> outputs = llm.generate(["Hello", "Bye"], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    >>> [len(o.outputs[0].token_ids) for o in outputs]
    [3, 3]
    """

    def __init__(self, model: str, **engine_args: Any) -> None:
        self._client = EngineClient.load(EngineArgs(model=model, **engine_args), offline=True)
        self._request_ids = itertools.count()

    @property
    def model_config(self) -> Any:
        return self._client.model_config

    @property
    def engine_config(self) -> _core.EngineConfig:
        return self._client.core.config

    def get_tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults of the model's generation config."""
        return SamplingParams(**self._client.model_config.generation_config)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Outputs in the order of the prompts.

        prompts: a string, a list of token ids, a TokensPrompt, or a list of any of these. sampling_params: one for
        all prompts or one for each; None is the model's defaults. use_tqdm: show progress on stderr; a function
        such as tqdm is used instead of the built-in bar. priority: one number per prompt, lower runs first.
        Raises ValueError for bad prompts or parameters before anything runs, and RequestError if the engine fails.
        """
        batch = _as_batch(prompts)
        params = self._params_for(len(batch), sampling_params)
        if priority is not None and len(priority) != len(batch):
            raise ValueError(f"There are {len(batch)} prompts but {len(priority)} priorities.")
        prepared = [self._client.prepare(prompt, one) for prompt, one in zip(batch, params, strict=True)]
        states: list[RequestState] = []
        try:
            for i, (prompt, one) in enumerate(zip(prepared, params, strict=True)):
                states.append(
                    self._client.submit(
                        str(next(self._request_ids)),
                        prompt,
                        one,
                        kind=RequestOutputKind.FINAL_ONLY,
                        priority=priority[i] if priority else 0,
                    )
                )
            return self._run(states, use_tqdm)
        finally:
            for state in states:
                self._client.forget(state)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """generate() for one conversation or a list of them, rendered with the model's chat template."""
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        tokenizer = self._client.tokenizer
        prompts = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                continue_final_message=continue_final_message,
                chat_template=chat_template or self._client.model_config.chat_template,
                **(chat_template_kwargs or {}),
            )
            # Templates write the special tokens themselves.
            prompts.append({"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(self, prompts: Any, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The params.beam_width best sequences of each prompt, in the order of the prompts.

        prompts: as in generate(). One beam is one of the max_num_seqs sequences; max_logprobs must allow as many as
        there are beams and end-of-sequence tokens, and limits the logprobs of a position, else 2 * beam_width. Raises
        ValueError for bad prompts or parameters before anything runs, and RequestError if the engine fails.

        >>> output = LLM("null").beam_search("Hello", BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True))[0]
        >>> [len(s.tokens) for s in output.sequences]
        [8, 8]
        """
        logprobs = min(2 * params.beam_width, self.model_config.vocab_size, self.engine_config.max_logprobs)
        sampling = beam.sampling_params(params, logprobs)
        outputs = self.generate(_as_batch(prompts), sampling, use_tqdm=False)
        return [beam.beam_output(output, params, self._client.tokenizer) for output in outputs]

    def reset_prefix_cache(self) -> None:
        """Forgets every cached block that no request uses, and the peak of used blocks."""
        self._client.core.reset_prefix_cache()

    def stats(self) -> _core.EngineStats:
        return self._client.core.stats()

    @property
    def memory(self) -> _core.EngineMemory:
        """What the memory of the first GPU went to; on CPUs only weights is known."""
        return self._client.core.memory

    def shutdown(self) -> None:
        """Stops the engine's threads and frees its memory. Idempotent."""
        self._client.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _params_for(self, count: int, given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValueError(f"There are {count} prompts but {len(given)} sampling parameters.")
        return list(given)

    def _run(self, states: list[RequestState], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        unfinished = len(states)
        # Tokens that nobody turns into text on the way are left to the core until a sample ends.
        until_end = not any(state.params.detokenize for state in states)
        bar = _Bar(use_tqdm, len(states))
        outputs: dict[int, RequestOutput] = {}
        while unfinished:
            for state in self._client.poll(_POLL_S, until_end=until_end):
                output = state.take()
                if output is not None:
                    unfinished -= 1
                    outputs[state.core_id] = output
                    bar.finished(output)
        bar.close()
        return [outputs[state.core_id] for state in states]


class _Bar:
    """Progress over requests: ours, a tqdm-like function's, or none."""

    def __init__(self, use_tqdm: bool | Callable[..., Any], total: int) -> None:
        self._done, self._tokens = 0, 0
        self._own = Progress("Processed prompts", total, "prompts") if use_tqdm is True else None
        self._other = use_tqdm(total=total, desc="Processed prompts") if callable(use_tqdm) else None

    def finished(self, output: RequestOutput) -> None:
        self._done += 1
        self._tokens += sum(len(o.token_ids) for o in output.outputs)
        if self._own:
            self._own.update(self._done, note=f"{self._tokens} output tokens")
        if self._other is not None:
            self._other.update(1)

    def close(self) -> None:
        if self._own:
            self._own.close()
        if self._other is not None:
            self._other.close()


def _as_batch(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise ValueError("prompts must be a prompt or a non-empty list of prompts.")
    if all(isinstance(p, int) and not isinstance(p, bool) for p in prompts):
        return [prompts]
    return list(prompts)
