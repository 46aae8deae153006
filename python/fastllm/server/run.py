"""Starts the server from a command line: says what it does, and turns what goes wrong into a sentence."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import ssl
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm.environment import without_effect
from fastllm.server.args import limits_from, make_parser
from fastllm.server.help_pages import show_help

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM
    from fastllm.server.app import Server
    from fastllm.server.state import ServerState
    from fastllm.server.tls import TlsFiles

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None, *, prog: str = "fastllm serve", positional_model: bool = False) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Returns 0 after a clean stop, 2 for a model that cannot be loaded, 1 for other faults.
    A failed or hung engine ends the process with 70, a second signal with 130.
    """
    try:
        parser = make_parser(prog, positional_model=positional_model)
        given = list(sys.argv[1:] if argv is None else argv)
        topic = next((argument[len("--help=") :] for argument in given if argument.startswith("--help=")), None)
        if topic is not None:
            return show_help(parser, topic)
        args = parser.parse_args(given)
        if positional_model and args.model_tag:
            args.model = args.model_tag
        return run_server(args, parser)
    except KeyboardInterrupt:  # before the server takes its signals
        return 130


def run_server(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from fastllm.engine_args import EngineArgs
    from fastllm.errors import BAD_MODEL, FastllmError, LoadError
    from fastllm.server.app import ENGINE_FAULT, STOPPED_AT_ONCE, Server
    from fastllm.server.cors import Cors
    from fastllm.server.housekeeping import Housekeeping
    from fastllm.server.json_log import Logs
    from fastllm.server.memory import return_large_blocks
    from fastllm.server.middleware import known_request_id
    from fastllm.server.tls import TlsRefresh

    try:
        engine_args = EngineArgs.from_cli_args(args)
        tls = _tls_files(args)
        context = tls.context() if tls else None
        cors = Cors(args.allowed_origins, args.allowed_methods, args.allowed_headers, args.allow_credentials)
    except (ValueError, OSError) as exc:
        parser.error(str(exc))
    return_large_blocks()
    logs = Logs(
        level=args.log_level,
        access_level=args.uvicorn_log_level,
        format=args.log_format,
        lines_per_second=args.log_lines_per_second,
        request_id=known_request_id,
    )

    def load(state: ServerState) -> AsyncLLM:
        from fastllm.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(engine_args, on_progress=state.on_load_progress)

    server: Server | None = None

    async def serve() -> int:
        nonlocal server
        state = _state(args)
        chores: list[Callable[[], object]] = [logs.report_floods]
        if tls and context and args.enable_ssl_refresh:
            chores.append(TlsRefresh(tls, context).check)
        housekeeping = Housekeeping(
            state,
            stats_interval=args.log_stats_interval,
            log_stats=not args.disable_log_stats,
            each_second=tuple(chores),
        )
        server = Server(
            state,
            partial(load, state),
            root_path=args.root_path,
            console=args.console,
            cors=cors,
            housekeeping=housekeeping,
        )
        return await _serve(args, state, server, context)

    try:
        status = asyncio.run(serve())
    except LoadError as exc:
        _speaker(args)(f"model error: {exc}")
        status = BAD_MODEL
    except (FastllmError, ValueError, OSError) as exc:
        _speaker(args)(f"fastllm: {exc}")
        status = 1
    finally:
        logs.close()
    if status in (STOPPED_AT_ONCE, ENGINE_FAULT) or (server is not None and server.loading):
        # Threads that still work sit in native code and must not meet an interpreter that is being torn down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _state(args: argparse.Namespace) -> ServerState:
    from fastllm.server.request_log import RequestLog
    from fastllm.server.state import ServerState

    return ServerState(
        limits=limits_from(args),
        api_keys=[*args.api_key, os.environ.get("FASTLLM_API_KEY", ""), os.environ.get("VLLM_API_KEY", "")],
        api_key_file=Path(args.api_key_file) if args.api_key_file else None,
        share_prefix_cache=args.share_prefix_cache,
        loopback_only=bool(args.uds) or args.host in _LOOPBACK,
        response_role=args.response_role,
        log_requests=not args.disable_uvicorn_access_log,
        quiet_paths=frozenset(path.strip() for path in args.disable_access_log_for_endpoints.split(",")),
        request_log=RequestLog(args.max_log_len) if args.enable_log_requests else None,
        metric_aliases=args.metric_aliases,
        force_include_usage=args.enable_force_include_usage,
        sse_keep_alive_s=args.sse_keep_alive_interval,
        scheduler_delay_s=args.scheduler_delay,
        text_threads=args.tokenizer_pool_size or 2,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        responses_store=args.responses_store,
        strict_params=args.strict_params,
    )


async def _serve(args: argparse.Namespace, state: ServerState, server: Server, context: ssl.SSLContext | None) -> int:
    from fastllm.server.app import serve_until_signal

    start = time.monotonic()
    say = _speaker(args)
    scheme = "https" if context else "http"
    host = f"[{args.host}]" if ":" in args.host else args.host
    address = ""

    def on_listening(port: int) -> None:
        nonlocal address
        address = f"unix:{args.uds}" if args.uds else f"{scheme}://{host}:{port}"
        say(f"fastllm {_version()}: loading {args.model}; listening on {address}")
        if not args.uds and args.host not in _LOOPBACK and not state.keys and not args.allow_unauthenticated:
            say(
                "warning: everybody who reaches this address may use the model; --api-key or --api-key-file closes it, "
                "--allow-unauthenticated says that this is meant"
            )
        ignored = without_effect()
        if ignored:
            say(f"variables without effect here: {', '.join(ignored)}")

    def on_ready(llm: AsyncLLM) -> None:
        # What is there now stays. Collections would go through all of it again and again, 15 ms each, on the loop.
        gc.collect()
        gc.freeze()
        for line in describe(llm, state):
            say(line)
        path = "" if args.uds else "/v1"
        say(f"ready after {time.monotonic() - start:.1f} s: {address}{path}")

    return await serve_until_signal(
        server,
        host=args.host,
        port=args.port,
        uds=args.uds,
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
    limits = state.limits_in_force().items()
    defaults = ", ".join(f"{name}={value}" for name, value in sorted(model.generation_config.items()))
    return [
        f"model: {model.model} ({model.dtype}) as {', '.join(model.served_model_names)}",
        f"context: {model.max_model_len} tokens; KV cache: {tokens} tokens in {blocks} blocks of {engine.block_size}, "
        f"{tokens / model.max_model_len:.1f} full contexts",
        f"limits: {engine.max_num_seqs} sequences run, {state.limits.waiting_limit(engine.max_num_seqs)} wait, "
        f"{engine.max_step_tokens} tokens a step, bodies up to {state.limits.max_body_bytes} bytes",
        *textwrap.wrap(
            ", ".join(f"{name}={value:.15g}" for name, value in limits),
            width=116,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        ),
        f"sampling defaults: {defaults or 'none from the model'}",
    ]


def _speaker(args: argparse.Namespace) -> Callable[[str], None]:
    """Says the lines of start and stop: as they are, or as JSON like the rest of the log."""
    if args.log_format == "json":
        return logging.getLogger("fastllm.server").info

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")  # one write: the log's thread writes, too
        sys.stderr.flush()

    return say


def _version() -> str:
    from fastllm import __version__

    return __version__


def _tls_files(args: argparse.Namespace) -> TlsFiles | None:
    from fastllm.server.tls import TlsFiles

    if bool(args.ssl_keyfile) != bool(args.ssl_certfile):
        raise ValueError("--ssl-keyfile and --ssl-certfile go together")
    if not args.ssl_certfile:
        if args.ssl_ca_certs or args.ssl_cert_reqs or args.ssl_ciphers or args.enable_ssl_refresh:
            raise ValueError("the --ssl-* flags need --ssl-certfile and --ssl-keyfile")
        return None
    return TlsFiles(args.ssl_certfile, args.ssl_keyfile, args.ssl_ca_certs, args.ssl_cert_reqs, args.ssl_ciphers)
