"""Deltas in, request states out: what only text can decide."""

from types import SimpleNamespace
from typing import Any

import pytest

from fastllm.errors import RequestError
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


def processor_with_request(
    kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY, **params: Any
) -> tuple[OutputProcessor, RequestState]:
    tokenizer = byte_tokenizer()
    processor = OutputProcessor(tokenizer, [])
    state = RequestState("r", 7, None, [1, 2], SamplingParams(**params), kind, tokenizer)
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


@pytest.mark.parametrize("merged", [False, True])
def test_what_came_before_an_error_is_given_before_it(merged: bool) -> None:
    """Whether the reader was slow, or the core was: then one delta has both."""
    processor, state = processor_with_request(RequestOutputKind.DELTA)
    failed = {"finish": "error", "error": "not numbers"}
    processor.process([delta(7, 0, "ab", **failed)] if merged else [delta(7, 0, "ab"), delta(7, 0, "", **failed)])
    assert state.finished and not processor.requests
    output = state.take()
    assert output is not None and output.outputs[0].text == "ab"
    assert not output.finished and output.outputs[0].finish_reason is None
    for _ in range(2):
        with pytest.raises(RequestError, match="not numbers"):
            state.take()


def test_an_error_behind_a_stop_string_came_too_late() -> None:
    processor, state = processor_with_request(stop="!")
    processor.process([delta(7, 0, "ab!cd", finish="error", error="not numbers")])
    output = state.take()
    assert output is not None and output.finished
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("ab", "stop")


def test_whoever_waits_for_the_end_gets_the_error_alone() -> None:
    processor, state = processor_with_request()
    processor.process([delta(7, 0, "ab", finish="error", error="not numbers")])
    with pytest.raises(RequestError, match="not numbers"):
        state.take()
