"""Starts the server from a command line: says what it does, and turns what goes wrong into a sentence."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import ssl
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastllm.server.args import limits_from, make_parser

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM
    from fastllm.server.app import Server
    from fastllm.server.state import ServerState

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None, *, prog: str = "fastllm serve", positional_model: bool = False) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Returns 0 after a clean stop, 2 for a model that cannot be loaded, 1 for other faults.
    """
    try:
        parser = make_parser(prog, positional_model=positional_model)
        args = parser.parse_args(argv)
        if positional_model and args.model_tag:
            args.model = args.model_tag
        if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
            parser.error("--ssl-keyfile and --ssl-certfile go together")
        return run_server(args, parser)
    except KeyboardInterrupt:  # before the server takes its signals
        return 130


def run_server(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fastllm.engine_args import EngineArgs
    from fastllm.errors import BAD_MODEL, FastllmError, LoadError
    from fastllm.server.app import STOPPED_AT_ONCE, Server
    from fastllm.server.state import ServerState

    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        engine_args = EngineArgs.from_cli_args(args)
        context = _ssl_context(args)
    except OSError as exc:
        parser.error(f"the TLS certificate or key cannot be read: {exc.strerror or exc}")
    except ValueError as exc:
        parser.error(str(exc))

    def load(state: ServerState) -> AsyncLLM:
        from fastllm.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(engine_args, on_progress=state.on_load_progress)

    server: Server | None = None

    async def serve() -> int:
        nonlocal server
        keys = [*args.api_key, os.environ.get("FASTLLM_API_KEY", ""), os.environ.get("VLLM_API_KEY", "")]
        state = ServerState(
            limits=limits_from(args),
            api_keys=keys,
            response_role=args.response_role,
            log_requests=args.log_requests,
        )
        server = Server(state, partial(load, state), root_path=args.root_path, console=args.console)
        return await _serve(args, state, server, context)

    try:
        status = asyncio.run(serve())
    except LoadError as exc:
        print(f"model error: {exc}", file=sys.stderr)
        status = BAD_MODEL
    except (FastllmError, ValueError, OSError) as exc:
        print(f"fastllm: {exc}", file=sys.stderr)
        status = 1
    if status == STOPPED_AT_ONCE or (server is not None and server.loading):
        # Threads that still work sit in native code and must not meet an interpreter that is being torn down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


async def _serve(args: argparse.Namespace, state: ServerState, server: Server, context: ssl.SSLContext | None) -> int:
    from fastllm.server.app import serve_until_signal

    start = time.monotonic()
    scheme = "https" if context else "http"
    host = f"[{args.host}]" if ":" in args.host else args.host
    port = 0

    def on_listening(actual: int) -> None:
        nonlocal port
        port = actual
        _say(f"fastllm {_version()}: loading {args.model}; listening on {scheme}://{host}:{port}")
        if args.host not in _LOOPBACK and not state.keys:
            _say("warning: everybody who reaches this address may use the model; --api-key closes it")

    def on_ready(llm: AsyncLLM) -> None:
        for line in describe(llm, state):
            _say(line)
        _say(f"ready after {time.monotonic() - start:.1f} s: {scheme}://{host}:{port}/v1")

    return await serve_until_signal(
        server,
        host=args.host,
        port=args.port,
        shutdown_timeout=args.shutdown_timeout,
        ssl_context=context,
        on_listening=on_listening,
        on_ready=on_ready,
    )


def describe(llm: AsyncLLM, state: ServerState) -> list[str]:
    """What an operator wants to know at the start, in plain lines."""
    model, engine = llm.model_config, llm.engine_config
    blocks = llm.stats().total_blocks
    tokens = blocks * engine.block_size
    defaults = ", ".join(f"{name}={value}" for name, value in sorted(model.generation_config.items()))
    return [
        f"model: {model.model} ({model.dtype}) as {', '.join(model.served_model_names)}",
        f"context: {model.max_model_len} tokens; KV cache: {tokens} tokens in {blocks} blocks of {engine.block_size}, "
        f"{tokens / model.max_model_len:.1f} full contexts",
        f"limits: {engine.max_num_seqs} sequences run, {state.limits.waiting_limit(engine.max_num_seqs)} wait, "
        f"{engine.max_step_tokens} tokens a step, bodies up to {state.limits.max_body_bytes} bytes",
        f"sampling defaults: {defaults or 'none from the model'}",
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _version() -> str:
    from fastllm import __version__

    return __version__


def _ssl_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.ssl_certfile:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
    return context
