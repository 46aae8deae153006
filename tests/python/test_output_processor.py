"""Deltas in, request states out: what only text can decide."""

from types import SimpleNamespace
from typing import Any

from fastllm.output_processor import OutputProcessor, RequestState
from fastllm.sampling import RequestOutputKind, SamplingParams
from fastllm.tokenizer import byte_tokenizer


def delta(core_id: int, index: int, text: str, **fields: Any) -> Any:
    return SimpleNamespace(
        **{
            "id": core_id,
            "index": index,
            "tokens": list(text.encode()),
            "logprobs": [],
            "prompt_logprobs": [],
            "finish": None,
            "stop_token": None,
            "cached_tokens": 0,
            "num_preemptions": 0,
            "error": "",
            "error_kind": None,
            "times": (1.0, 2.0, 3.0, 0.0),
            **fields,
        }
    )


def processor_with_request(**params: Any) -> tuple[OutputProcessor, RequestState]:
    tokenizer = byte_tokenizer()
    processor = OutputProcessor(tokenizer, [])
    state = RequestState("r", 7, None, [1, 2], SamplingParams(**params), RequestOutputKind.FINAL_ONLY, tokenizer)
    processor.requests[7] = state
    return processor, state


def test_a_stop_string_aborts_its_own_sample_and_leaves_the_others_running() -> None:
    processor, state = processor_with_request(n=2, stop="!")
    changed, to_abort = processor.process([delta(7, 0, "ab!cd"), delta(7, 1, "xy")])
    assert changed == [state] and to_abort == [(7, 0)]
    assert not state.finished and 7 in processor.requests

    changed, to_abort = processor.process([delta(7, 0, "", finish="abort"), delta(7, 1, "z", finish="length")])
    assert to_abort == []
    assert state.finished and not processor.requests
    output = state.take()
    assert output is not None
    assert [(o.text, o.finish_reason, o.stop_reason) for o in output.outputs] == [
        ("ab", "stop", "!"),
        ("xyz", "length", None),
    ]


def test_a_stop_string_in_the_last_delta_aborts_nothing() -> None:
    processor, state = processor_with_request(stop="!")
    _, to_abort = processor.process([delta(7, 0, "ab!", finish="length")])
    assert to_abort == [] and state.finished
    assert state.sequences[0].finish_reason == "stop"


def test_an_error_carries_the_kind_the_core_named() -> None:
    processor, state = processor_with_request()
    processor.process([delta(7, 0, "", finish="error", error="too late", error_kind="timeout")])
    assert state.error is not None
    assert (state.error.kind, str(state.error)) == ("timeout", "too late")
