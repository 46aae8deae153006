"""The engine with a synchronous loop in the caller's hands: add requests, call step() until none is left."""

from __future__ import annotations

from typing import Any

from fastllm import _core
from fastllm.client import EngineClient
from fastllm.config import ModelConfig
from fastllm.engine_args import EngineArgs
from fastllm.outputs import CompletionOutput, RequestOutput
from fastllm.sampling import SamplingParams
from fastllm.tokenizer import Tokenizer

_STEP_WAIT_S = 1.0  # step() returns at the first result; this only bounds the wait


class LLMEngine:
    """Not thread-safe.

    >>> engine = LLMEngine.from_engine_args(EngineArgs(model="null"))
    >>> engine.add_request("a", "Hello", SamplingParams(max_tokens=2, ignore_eos=True))
    >>> while engine.has_unfinished_requests():
    ...     outputs = engine.step()
    >>> outputs[0].request_id, len(outputs[0].outputs[0].token_ids)
    ('a', 2)
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, usage_context: Any = None) -> LLMEngine:
        """Loads the model that `engine_args` names. Raises LoadError or ValueError with a sentence."""
        return cls(EngineClient.load(engine_args))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self._client.model_config

    @property
    def engine_config(self) -> _core.EngineConfig:
        return self._client.core.config

    def get_tokenizer(self) -> Tokenizer:
        return self._client.tokenizer

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams, *, priority: int = 0) -> None:
        """Queues a request; prompt as in LLM.generate. Raises ValueError for a bad prompt or an id in use."""
        params = params.clone()
        self._client.submit(request_id, self._client.prepare(prompt, params), params, priority=priority)

    def step(self) -> list[RequestOutput]:
        """Waits for the next results and returns the outputs of the requests that changed.

        A request that fails yields an output with finish_reason "error".
        """
        outputs: list[RequestOutput] = []
        while not outputs and self.has_unfinished_requests():
            for state in self._client.poll(_STEP_WAIT_S):
                if state.error is not None:
                    failed = CompletionOutput(0, "", [], finish_reason="error", stop_reason=str(state.error))
                    outputs.append(
                        RequestOutput(state.request_id, state.prompt, state.prompt_token_ids, None, [failed], True)
                    )
                elif (output := state.take()) is not None:
                    outputs.append(output)
        return outputs

    def abort_request(self, request_id: str | list[str]) -> None:
        """Ends requests and forgets them; unknown ids are ignored."""
        wanted = {request_id} if isinstance(request_id, str) else set(request_id)
        for state in self._client.live:
            if state.request_id in wanted:
                self._client.forget(state)

    def has_unfinished_requests(self) -> bool:
        return bool(self._client.live)

    def get_num_unfinished_requests(self) -> int:
        return len(self._client.live)

    def stats(self) -> _core.EngineStats:
        return self._client.core.stats()

    def reset_prefix_cache(self) -> None:
        self._client.core.reset_prefix_cache()

    def shutdown(self) -> None:
        self._client.shutdown()
