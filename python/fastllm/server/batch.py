"""`fastllm run-batch`: answers a file of requests with the server's own handlers, and picks up where it stopped."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

    from fastllm.async_llm import AsyncLLM, StepReport
    from fastllm.engine_args import EngineArgs
    from fastllm.server.batch_file import BatchLine, BatchOutput, BatchResult

URLS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})
INTERRUPTED = 130  # the shell's status of a process that Ctrl-C ended
_BUSY = (429, 503)  # nobody but the batch itself: the line comes again later
_MAX_CONNECTIONS = 2048  # fewer than a listening socket may have waiting
_SPARE_FILES = 64  # descriptors for everything but the connections of requests


def main(argv: Sequence[str] | None = None, *, prog: str = "fastllm run-batch") -> int:
    """Returns 0 when every request was answered, 1 when one failed, 2 for a wrong command line, 130 after Ctrl-C."""
    from fastllm.engine_args import EngineArgs
    from fastllm.errors import FastllmError, RequestError

    parser = _make_parser(prog)
    args = parser.parse_args(argv)
    if args.model_tag:
        args.model = args.model_tag
    try:
        engine_args = EngineArgs.from_cli_args(args)
    except ValueError as exc:
        parser.error(str(exc))
    try:
        return _run(args, engine_args)
    except (FastllmError, RequestError, ValueError, OSError) as exc:
        print(f"{prog}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the run takes its signals
        print(file=sys.stderr)
        return INTERRUPTED


def _make_parser(prog: str) -> argparse.ArgumentParser:
    from fastllm.arg_parser import FlexibleArgumentParser
    from fastllm.engine_args import EngineArgs

    parser = FlexibleArgumentParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Answers every request of a JSONL file in OpenAI's batch format. Answers come in any order.\n"
        "A run that was interrupted goes on where it stopped when it is started again.",
        epilog='example of a line:\n  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", '
        '"body": {"messages": [...]}}',
    )
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, one JSON a line")
    files.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="where the answers go")
    files.add_argument("--overwrite", action="store_true", help="start anew instead of going on with the output file")
    files.add_argument("--response-role", default="assistant", metavar="ROLE", help="role of chat answers")
    EngineArgs.add_cli_args(parser)
    return parser


def _run(args: argparse.Namespace, engine_args: EngineArgs) -> int:
    from fastllm.async_llm import AsyncLLM
    from fastllm.server.batch_file import BatchOutput, check_input

    # Whatever is wrong with the files is said before a model is loaded.
    keys = check_input(args.input_file, URLS)
    if args.output_file.exists() and args.output_file.samefile(args.input_file):
        raise ValueError("the input and the output are the same file.")
    output = BatchOutput(args.output_file, overwrite=args.overwrite)
    try:
        done = output.count(keys)
        if done:
            _say(f"going on: {done} of {len(keys)} requests have their answers in {args.output_file}")
        if done < len(keys):
            llm = AsyncLLM.from_engine_args(engine_args)
            status = asyncio.run(_Batch(llm, args, output, done, len(keys)).run())
            if status:
                return status
    finally:
        output.close()
    _say(f"{len(keys)} requests answered, {output.num_failed} failed: {args.output_file}")
    return 1 if output.num_failed else 0


def _say(line: str) -> None:
    print(f"run-batch: {line}", file=sys.stderr, flush=True)


class _Batch:
    """One run over one file. The server listens on a socket that only this process knows."""

    def __init__(self, llm: AsyncLLM, args: argparse.Namespace, output: BatchOutput, num_done: int, total: int) -> None:
        from fastllm.progress import Progress

        self._llm = llm
        self._args = args
        self._output = output
        self._num_done = num_done  # before this run
        self._progress = Progress("answering", total - num_done, "requests")
        self._num_new = 0  # answers of this run
        self._num_tokens = 0
        self._start = time.monotonic()

    async def run(self) -> int:
        """0, or the status to exit with when the run ended before its time."""
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(self._answer_all())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, work.cancel)
        try:
            await work
        except asyncio.CancelledError:
            _say(f"interrupted after {self._num_done + self._num_new} answers; the same command goes on with the rest")
            return INTERRUPTED
        finally:
            self._llm.shutdown()
        return 0

    async def _answer_all(self) -> None:
        import aiohttp
        from aiohttp import web

        from fastllm.server.app import create_app
        from fastllm.server.batch_file import MAX_LINE_BYTES, read_lines
        from fastllm.server.limits import Limits
        from fastllm.server.state import ServerState

        # Nobody else is there to be protected from: what a file asks for waits for its turn.
        limits = Limits(
            max_body_bytes=MAX_LINE_BYTES,
            max_waiting=1 << 30,
            max_waiting_tokens=1 << 50,
            max_waiting_time_s=0,
            max_request_time_s=0,
            max_connections_per_address=0,
        )
        state = ServerState(
            limits=limits, log_requests=False, response_role=self._args.response_role, responses_store=0
        )
        state.set_ready(self._llm)
        self._llm.add_step_observer(self._count_tokens)
        runner = web.AppRunner(create_app(state, console=False), access_log=None, handler_cancellation=True)
        with tempfile.TemporaryDirectory(prefix="fastllm-") as folder:
            socket = f"{folder}/batch.sock"
            await runner.setup()
            try:
                await web.UnixSite(runner, socket, backlog=2 * _MAX_CONNECTIONS).start()
                connector = aiohttp.UnixConnector(socket, limit=0)
                async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
                    lines = read_lines(self._args.input_file, URLS)
                    workers = [asyncio.create_task(self._worker(session, lines)) for _ in range(self._concurrency())]
                    try:
                        await asyncio.gather(*workers)
                    finally:
                        for worker in workers:
                            worker.cancel()
                        await asyncio.gather(*workers, return_exceptions=True)
                        self._progress.close()
            finally:
                await runner.cleanup()
                state.workers.shutdown(wait=False, cancel_futures=True)

    def _concurrency(self) -> int:
        """Enough that the engine never waits for the next request; each takes two descriptors."""
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = 1 << 16 if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
        wanted = self._llm.engine_config.max_num_seqs + 32
        return max(1, min(wanted, _MAX_CONNECTIONS, (files - _SPARE_FILES) // 2))

    async def _worker(self, session: aiohttp.ClientSession, lines: Iterator[BatchLine]) -> None:
        for line in lines:  # shared by all workers: each takes the next one
            if self._output.has(line):
                continue
            self._output.write(await self._answer(session, line))
            self._num_new += 1
            tokens = self._num_tokens / max(time.monotonic() - self._start, 1e-6)
            note = f"{tokens:.0f} tokens/s, {self._output.num_failed} failed"
            self._progress.update(self._num_new, note=note)

    async def _answer(self, session: aiohttp.ClientSession, line: BatchLine) -> BatchResult:
        import msgspec

        from fastllm.errors import RequestError
        from fastllm.server.batch_file import BatchAnswer, BatchResult

        result = BatchResult(f"batch_req_{uuid.uuid4().hex}", line.custom_id, error=line.error)
        while line.error is None:
            headers = {"Content-Type": "application/json"}
            async with session.post(f"http://batch{line.url}", data=line.body, headers=headers) as response:
                body = await response.read()
            if response.status >= 500 and not self._llm.healthy:
                raise RequestError("The engine has stopped after a fault; the same command goes on with the rest.")
            if response.status not in _BUSY:
                request_id = response.headers.get("X-Request-Id", "")
                result.response = BatchAnswer(response.status, request_id, msgspec.Raw(body))
                break
            await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
        return result

    def _count_tokens(self, report: StepReport) -> None:
        self._num_tokens += report.num_generated_tokens
