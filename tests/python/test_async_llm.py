"""AsyncLLM: streams, cancels, drains, and frees every block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fastllm import AsyncLLM, EngineArgs, RequestOutput, RequestOutputKind, SamplingParams, async_llm
from fastllm.async_llm import StepReport
from fastllm.errors import RequestError

_LIMIT_S = 60.0


def run(test: Callable[[AsyncLLM], Coroutine[Any, Any, None]], **args: Any) -> None:
    engine = AsyncLLM.from_engine_args(EngineArgs(model="null", check_invariants=True, **args))
    try:
        asyncio.run(asyncio.wait_for(test(engine), _LIMIT_S))
    finally:
        engine.shutdown()


def params(**fields: Any) -> SamplingParams:
    defaults = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
    return SamplingParams(**{**defaults, **fields})


async def collect(engine: AsyncLLM, name: str, sampling: SamplingParams, prompt: Any = "hi") -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, sampling, name)]


async def wait_until_idle(engine: AsyncLLM) -> None:
    while engine.stats().num_running or engine.stats().used_blocks:
        await asyncio.sleep(0)


def test_kinds_of_output_add_up_to_the_same() -> None:
    async def test(engine: AsyncLLM) -> None:
        deltas, cumulative, final = await asyncio.gather(
            *(
                collect(engine, kind.name, params(output_kind=kind))
                for kind in (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)
            )
        )
        tokens = [t for output in deltas for t in output.outputs[0].token_ids]
        assert tokens == cumulative[-1].outputs[0].token_ids == final[0].outputs[0].token_ids
        assert "".join(o.outputs[0].text for o in deltas) == final[0].outputs[0].text
        assert len(final) == 1 and all(o[-1].finished for o in (deltas, cumulative, final))

    run(test)


def test_many_streams_are_served_a_slice_a_turn_of_the_loop() -> None:
    """However many samples a poll brings, the loop gets to do other things between slices of them."""

    async def test(engine: AsyncLLM) -> None:
        samples: list[int] = []  # of each report

        def observe(report: StepReport) -> None:
            samples.append(len(report.first_token_s) + len(report.inter_token_s))

        engine.add_step_observer(observe)
        outputs = await asyncio.gather(*(collect(engine, f"s{i}", params(max_tokens=40)) for i in range(200)))
        assert all(sum(len(o.outputs[0].token_ids) for o in output) == 40 for output in outputs)
        # A sample's first tokens may be in a report twice: the first, and those that came with it.
        assert max(samples) <= 2 * async_llm._SLICE
        assert engine.stats().num_finished == 200

    run(test, max_num_seqs=200, num_gpu_blocks_override=2000)


def test_slow_consumer_gets_fewer_larger_updates() -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate("hi", params(max_tokens=200), "slow")
        first = await anext(stream)
        while engine.stats().num_finished == 0:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [output async for output in stream]
        assert len(rest) <= 2
        assert sum(len(o.outputs[0].token_ids) for o in [first, *rest]) == 200

    run(test)


def test_closed_stream_frees_its_blocks() -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate("hello there", params(max_tokens=4000), "gone")
        await anext(stream)
        await stream.aclose()
        await wait_until_idle(engine)
        assert engine.stats().num_aborted == 1

    run(test, enable_prefix_caching=False)


def test_cancelled_task_frees_its_blocks() -> None:
    async def test(engine: AsyncLLM) -> None:
        task = asyncio.create_task(collect(engine, "cancelled", params(max_tokens=4000)))
        while engine.stats().num_running == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until_idle(engine)

    run(test)


def test_abort_ends_the_stream_with_a_reason() -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate("hi", params(max_tokens=4000), "a")
        await anext(stream)
        await engine.abort("a")
        await engine.abort("unknown")
        last = [output async for output in stream][-1]
        assert last.finished and last.outputs[0].finish_reason == "abort"

    run(test)


@pytest.mark.parametrize(
    ("prompt", "fields"), [("", {}), ([], {}), ([999], {}), ({"nothing": 1}, {}), ("a", {"logprobs": 99})]
)
def test_bad_request_is_invalid(prompt: Any, fields: dict[str, Any]) -> None:
    async def test(engine: AsyncLLM) -> None:
        with pytest.raises(RequestError) as raised:
            await collect(engine, "bad", params(**fields), prompt)
        assert raised.value.kind == "invalid"

    run(test)


def test_request_that_waits_too_long_times_out() -> None:
    async def test(engine: AsyncLLM) -> None:
        running = engine.generate("first", params(max_tokens=900_000), "first")
        await anext(running)
        with pytest.raises(RequestError) as raised:
            async for _ in engine.generate("second", params(), "second", queue_timeout=0.01):
                pass
        assert raised.value.kind == "timeout"
        await running.aclose()

    run(test, max_num_seqs=1, max_model_len=1_000_000)


def test_drain_finishes_the_accepted_and_refuses_the_new() -> None:
    async def test(engine: AsyncLLM) -> None:
        accepted = asyncio.create_task(collect(engine, "accepted", params(max_tokens=50)))
        while engine.stats().generated_tokens == 0:
            await asyncio.sleep(0)
        assert await engine.drain(30.0)
        assert (await accepted)[-1].outputs[0].finish_reason == "length"
        with pytest.raises(RequestError) as raised:
            await collect(engine, "new", params())
        assert raised.value.kind == "overloaded"

    run(test)


def test_shutdown_ends_every_stream() -> None:
    async def test(engine: AsyncLLM) -> None:
        stream = engine.generate("hi", params(max_tokens=4000), "a")
        await anext(stream)
        engine.shutdown()
        with pytest.raises(RequestError):
            async for _ in stream:
                pass
        assert not engine.healthy
        with pytest.raises(RequestError):
            await collect(engine, "b", params())

    run(test)


def test_observers_see_every_token_once() -> None:
    reports: list[StepReport] = []

    async def test(engine: AsyncLLM) -> None:
        engine.add_step_observer(reports.append)
        await asyncio.gather(*(collect(engine, str(i), params(max_tokens=5 + i)) for i in range(6)))

    run(test)
    assert sum(r.num_generated_tokens for r in reports) == sum(5 + i for i in range(6))
    assert sum(r.num_prompt_tokens for r in reports) == 12
    finished = [f for r in reports for f in r.finished]
    assert sorted(f.request_id for f in finished) == [str(i) for i in range(6)]
    assert all(f.finish_reasons == ["length"] and f.metrics.finished_time > 0 for f in finished)
    assert sum(len(r.first_token_s) for r in reports) == 6


def test_no_token_takes_less_than_no_time() -> None:
    """The engine goes on while its results are about to be read: a request may begin and end just before."""
    reports: list[StepReport] = []

    async def test(engine: AsyncLLM) -> None:
        read = engine._client.poll

        def late(limit: int) -> Any:
            time.sleep(0.1)
            return read(limit=limit)

        engine._client.poll = late  # type: ignore[method-assign]
        engine.add_step_observer(reports.append)
        await asyncio.gather(*(collect(engine, str(i), params(max_tokens=400)) for i in range(6)))

    run(test, max_num_seqs=1)
    assert sum(tokens for r in reports for _, tokens in r.inter_token_s) == 6 * 399
    assert all(seconds >= 0 for r in reports for seconds, _ in r.inter_token_s)


def test_hundred_streams_at_once() -> None:
    async def test(engine: AsyncLLM) -> None:
        outputs = await asyncio.gather(
            *(collect(engine, str(i), params(max_tokens=1 + i % 17), f"prompt {i}") for i in range(100))
        )
        for i, parts in enumerate(outputs):
            assert sum(len(p.outputs[0].token_ids) for p in parts) == 1 + i % 17
        assert engine.stats().block_leaks == 0

    run(test, max_num_seqs=16)
