"""The routes and the life of the server: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from fastllm.server import chat, completions, deep_health, info, messages, openapi, responses
from fastllm.server.auth import ROOT_PATH
from fastllm.server.call import current_call
from fastllm.server.connection import Runner, allow_open_files
from fastllm.server.console.routes import add_console
from fastllm.server.cors import Cors
from fastllm.server.errors import speaks_messages
from fastllm.server.housekeeping import Housekeeping
from fastllm.server.listener import listen
from fastllm.server.middleware import current_request_id, outermost
from fastllm.server.state import STATE_KEY, ServerState

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM

logger = logging.getLogger("fastllm.server")

MAX_HEADER_BYTES = 8190  # of one header line
# After a drain that ran out of time: for cancelled handlers to write their last bytes.
_CANCEL_GRACE_S = 2.0
# After an answer that did not wait for the whole body: for the client to read it before the connection closes.
_LINGER_S = 2.0
# After the time to drain: for an orderly end, before the process ends whatever still runs.
_HARD_EXIT_S = 5.0
_OTHER_FILES = 512  # open at once besides connections: weights, libraries, pipes
STOPPED_AT_ONCE = 130  # the shell's status of a process that Ctrl-C ended
ENGINE_FAULT = 70  # "internal software error" of sysexits.h: the supervisor shall start another


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.setdefault("X-Request-Id", current_request_id())
    response.headers["Server"] = "fastllm"
    if speaks_messages(request.path):  # where Anthropic's clients look for it
        response.headers["Request-Id"] = response.headers["X-Request-Id"]
    response.headers.update(current_call().client.headers())


def create_app(
    state: ServerState, root_path: str = "", *, console: bool = True, cors: Cors | None = None
) -> web.Application:
    """Every route of the server, under `root_path` too where one is given."""
    app = web.Application(middlewares=[outermost], client_max_size=state.limits.max_body_bytes)
    app[STATE_KEY] = state
    app[deep_health.GOLDEN_KEY] = deep_health.GoldenToken()
    app.on_response_prepare.append(_add_request_id)
    (cors or Cors()).install(app)
    app[ROOT_PATH] = root_path.rstrip("/")
    prefixes = list(dict.fromkeys(("", app[ROOT_PATH])))
    if console:
        add_console(app, prefixes)
    for prefix in prefixes:
        app.router.add_post(f"{prefix}/v1/completions", completions.handle)
        app.router.add_post(f"{prefix}/v1/chat/completions", chat.handle)
        app.router.add_post(f"{prefix}/v1/responses", responses.create)
        app.router.add_post(f"{prefix}/v1/responses/input_tokens", responses.count_tokens)
        app.router.add_get(f"{prefix}/v1/responses/{{id}}", responses.retrieve)
        app.router.add_delete(f"{prefix}/v1/responses/{{id}}", responses.delete)
        app.router.add_post(f"{prefix}/v1/responses/{{id}}/cancel", responses.cancel)
        app.router.add_get(f"{prefix}/v1/responses/{{id}}/input_items", responses.input_items)
        app.router.add_post(f"{prefix}/v1/messages", messages.create)
        app.router.add_post(f"{prefix}/v1/messages/count_tokens", messages.count_tokens)
        app.router.add_get(f"{prefix}/v1/models", info.models)
        app.router.add_get(f"{prefix}/v1/models/{{model:.+}}", info.model)
        app.router.add_post(f"{prefix}/tokenize", info.tokenize)
        app.router.add_post(f"{prefix}/detokenize", info.detokenize)
        app.router.add_get(f"{prefix}/live", info.live)
        app.router.add_get(f"{prefix}/health", info.health)
        app.router.add_get(f"{prefix}/health/deep", deep_health.handle)
        app.router.add_get(f"{prefix}/ready", info.ready)
        app.router.add_get(f"{prefix}/ping", info.health)
        app.router.add_post(f"{prefix}/ping", info.health)
        app.router.add_get(f"{prefix}/metrics", info.metrics)
        app.router.add_get(f"{prefix}/version", info.version)
        app.router.add_get(f"{prefix}/stats", info.stats)
        app.router.add_get(f"{prefix}/load", info.load)
        app.router.add_get(f"{prefix}/openapi.json", openapi.handle)
    return app


class Server:
    """One listening socket and one engine. All methods belong to the event loop it was made in."""

    def __init__(
        self,
        state: ServerState,
        load: Callable[[], AsyncLLM],
        *,
        root_path: str = "",
        console: bool = True,
        cors: Cors | None = None,
        housekeeping: Housekeeping | None = None,
    ) -> None:
        self.state = state
        self._load = load
        self._runner = Runner(
            create_app(state, root_path, console=console, cors=cors),
            state.limits,
            handler_cancellation=True,  # a client that goes away aborts its request
            access_log=None,
            auto_decompress=False,  # a small body could become gigabytes, on the event loop
            keepalive_timeout=state.limits.keepalive_timeout_s,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            shutdown_timeout=_CANCEL_GRACE_S,
            lingering_time=_LINGER_S,
        )
        self._housekeeping = housekeeping or Housekeeping(state)
        self._chores: asyncio.Task[None] | None = None
        self._listener: asyncio.Server | None = None
        self._uds: str | None = None
        self._llm: AsyncLLM | None = None
        self._loader: threading.Thread | None = None

    @property
    def loading(self) -> bool:
        return self._loader is not None and self._loader.is_alive()

    async def listen(
        self, host: str, port: int, ssl_context: ssl.SSLContext | None = None, *, uds: str | None = None
    ) -> int:
        """Answers from here on, with 503 until the model is loaded. Returns the port; 0 on the Unix socket `uds`."""
        allow_open_files(self.state.limits.max_connections + _OTHER_FILES)
        await self._runner.setup()
        self._chores = asyncio.create_task(self._housekeeping.run())
        assert self._runner.server is not None  # after its setup
        self._listener = await listen(self._runner.server, host, port, ssl_context, uds=uds)
        self._uds = uds
        return 0 if uds is not None else int(self._listener.sockets[0].getsockname()[1])

    async def load(self) -> AsyncLLM:
        """Loads on a thread of its own, so that /live answers meanwhile. Raises what the loader raises."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[AsyncLLM] = loop.create_future()

        def deliver(llm: AsyncLLM | None, error: BaseException | None) -> None:
            if result.cancelled():
                return
            if error is not None:
                result.set_exception(error)
            elif llm is not None:
                result.set_result(llm)

        def work() -> None:
            llm, error = None, None
            try:
                llm = self._load()
            except BaseException as exc:
                error = exc
            try:
                loop.call_soon_threadsafe(deliver, llm, error)
            except RuntimeError:  # the loop was closed: the server stopped while it loaded
                if llm is not None:
                    llm.shutdown()

        # A daemon: a stop during the load must not wait for it.
        self._loader = threading.Thread(target=work, name="fastllm-load", daemon=True)
        self._loader.start()
        self._llm = await result
        self.state.set_ready(self._llm)
        self.state.watch.start()
        return self._llm

    async def stop(self, drain_timeout: float) -> bool:
        """Refuses new requests, finishes the accepted ones within `drain_timeout` seconds, then closes everything."""
        self.state.begin_drain()
        drained = await self.state.wait_idle(drain_timeout)
        self.state.watch.stop()
        if self._llm is not None:
            self._llm.fail("The engine was shut down.")  # what still runs ends with an error its client can read
            await self.state.wait_idle(_CANCEL_GRACE_S)
            if not self.state.watch.faulted.is_set():  # a stuck engine thread cannot be joined
                await self._llm.aclose()
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        for pool in (self.state.workers, self.state.compilers):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._chores is not None:
            self._chores.cancel()
        if self._uds is not None:
            Path(self._uds).unlink(missing_ok=True)
        return drained


def _reload_keys(state: ServerState) -> None:
    try:
        state.keys.reload()
    except ValueError as exc:
        logger.error("%s The keys read before stay in force.", exc)
    else:
        logger.info("read the API keys again: %d are known", len(state.keys))


async def serve_until_signal(
    server: Server,
    *,
    host: str,
    port: int,
    uds: str | None = None,
    shutdown_timeout: float,
    ssl_context: ssl.SSLContext | None,
    on_listening: Callable[[int], None],
    on_ready: Callable[[AsyncLLM], None],
) -> int:
    """Runs the server for its whole life and returns the exit status of the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    stop_now = asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if hasattr(signal, "SIGHUP") and server.state.keys:
        loop.add_signal_handler(signal.SIGHUP, _reload_keys, server.state)
    try:
        on_listening(await server.listen(host, port, ssl_context, uds=uds))
    except OSError as exc:
        print(f"fastllm: cannot listen on {uds or f'{host}:{port}'}: {exc.strerror or exc}.", file=sys.stderr)
        return 1
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(server.load())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        error = loading.exception()
        if error is not None:
            stopping.cancel()
            await server.stop(0)
            raise error
        on_ready(loading.result())
        faulted = asyncio.create_task(server.state.watch.faulted.wait())
        await asyncio.wait({stopping, faulted}, return_when=asyncio.FIRST_COMPLETED)
        if faulted.done():
            # For the handlers to tell their clients; the engine, which may be stuck, is left to the process's end.
            await server.state.wait_idle(_CANCEL_GRACE_S)
            return ENGINE_FAULT
        faulted.cancel()
    else:
        loading.cancel()
    logger.info("stopping: %d requests to finish, at most %g s", server.state.active_requests, shutdown_timeout)
    last_resort = threading.Timer(shutdown_timeout + _HARD_EXIT_S, os._exit, (1,))
    last_resort.daemon = True  # it ends with the process, and only then: what hangs may also hang in its teardown
    last_resort.start()
    draining = asyncio.create_task(server.stop(shutdown_timeout))
    impatient = asyncio.create_task(stop_now.wait())
    await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        logger.warning("stopped at once with %d requests unfinished", server.state.active_requests)
        return STOPPED_AT_ONCE
    impatient.cancel()
    if server.state.watch.faulted.is_set():
        return ENGINE_FAULT
    if not draining.result():
        logger.warning("the time to finish requests ran out; the rest was aborted")
    return 0
