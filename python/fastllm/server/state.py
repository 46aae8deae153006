"""What the handlers share: the engine, the configuration, the phase of the server's life. Event loop only."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from fastllm.server.auth import ApiKeys
from fastllm.server.batch_window import BatchWindow
from fastllm.server.client import Client
from fastllm.server.dialect import Dialect, choose_dialect
from fastllm.server.errors import ApiError
from fastllm.server.gate import Gate
from fastllm.server.http_metrics import HttpMetrics
from fastllm.server.limits import Limits
from fastllm.server.memory import MemoryGuard, limit_bytes, return_free_blocks
from fastllm.server.metrics import Metrics
from fastllm.server.request_log import RequestLog
from fastllm.server.responses_store import RESPONSES_KEPT, ResponseStore
from fastllm.server.turns import Turns
from fastllm.server.watch import Watch

if TYPE_CHECKING:
    from fastllm.async_llm import AsyncLLM

logger = logging.getLogger("fastllm.server")

# Asked every second by probes and scrapers: not worth a line each.
QUIET_PATHS = frozenset({"/live", "/health", "/ready", "/ping", "/metrics", "/load", "/stats"})
_BEGIN_A_TURN = 4  # requests; each costs the event loop 0.2 to 0.6 ms until it waits for its first token


class Phase(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ServerState:
    def __init__(
        self,
        *,
        limits: Limits | None = None,
        api_keys: Sequence[str] = (),
        api_key_file: Path | None = None,
        response_role: str = "assistant",
        log_requests: bool = True,
        share_prefix_cache: bool = False,
        loopback_only: bool = False,
        quiet_paths: Container[str] = QUIET_PATHS,
        request_log: RequestLog | None = None,
        metric_aliases: bool = False,
        force_include_usage: bool = False,
        sse_keep_alive_s: float = 0.0,
        scheduler_delay_s: float = 0.0,
        text_threads: int = 2,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        responses_store: int = RESPONSES_KEPT,
        strict_params: bool = False,
    ) -> None:
        """log_requests: a line per answered request, except for `quiet_paths`; refused ones always have one.

        strict_params: refuse requests with fields that nobody knows.
        """
        self.limits = limits or Limits()
        self.keys = ApiKeys(api_keys, api_key_file)
        self.response_role = response_role
        self.strict_params = strict_params
        self.log_requests = log_requests
        self.loopback_only = loopback_only  # no other machine reaches the socket
        self._share_prefix_cache = share_prefix_cache
        self.quiet_paths = quiet_paths
        self.request_log = request_log
        self.force_include_usage = force_include_usage
        self.sse_keep_alive_s = sse_keep_alive_s
        self.batch_window = BatchWindow(scheduler_delay_s)
        self._parsers = (tool_call_parser, reasoning_parser)
        self.responses = ResponseStore(responses_store)
        self.phase = Phase.LOADING
        self.load_progress: float | None = None  # 0 to 1 of the weights' bytes; written by the loading thread
        self.started = time.monotonic()
        self.created = int(time.time())
        self.http = HttpMetrics()
        self.metrics: Metrics | None = None
        self.gate = Gate()
        self.turns = Turns(_BEGIN_A_TURN)
        self.watch = Watch(self)
        self.memory = MemoryGuard(self.limits.max_memory_percent, limit_bytes(), self._relieve_memory)
        self._metric_aliases = metric_aliases
        # Two threads: templates and long prompts never wait for the loop, and never take more than they need of it.
        self.workers = ThreadPoolExecutor(max_workers=text_threads, thread_name_prefix="fastllm-text")
        # Compiling a grammar mostly waits for a thread of the compiler, at most its time limit.
        self.compilers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="fastllm-compile")
        self.active_requests = 0  # accepted and not yet answered
        self.active_sequences = 0  # prompts * n of those
        self._idle = asyncio.Event()
        self._idle.set()
        self.dialect = Dialect()
        self._llm: AsyncLLM | None = None
        self._logged_fields: set[str] = set()

    # ---- life

    def set_ready(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self.dialect = choose_dialect(llm, *self._parsers)
        self.metrics = Metrics(llm, self.http, aliases=self._metric_aliases)
        if llm.tokenizer.chat_template is not None:
            self.workers.submit(llm.tokenizer.templates.warm)  # or the first chat would wait for a process to start
        self.metrics.queued = lambda: self.gate.waiting_sequences
        config = llm.engine_config
        self.gate.open(config.max_num_seqs, by_priority=config.policy == "priority")
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY

    def on_load_progress(self, done: int, total: int) -> None:
        self.load_progress = done / total if total else None

    def begin_drain(self) -> None:
        self.phase = Phase.DRAINING

    async def wait_idle(self, timeout: float) -> bool:
        """True when every accepted request was answered within `timeout` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    @property
    def llm(self) -> AsyncLLM:
        if self._llm is None:
            raise ApiError(503, "The model is still loading.", code="loading", retry_after=5)
        return self._llm

    @property
    def queue_full(self) -> bool:
        config = self.llm.engine_config
        return self.active_sequences >= config.max_num_seqs + self.limits.waiting_limit(config.max_num_seqs)

    @property
    def loaded(self) -> bool:
        return self._llm is not None

    @property
    def model_names(self) -> list[str]:
        config = self.llm.model_config
        return list(config.served_model_names)

    def cache_salt(self, client: Client, given: str | None) -> str:
        """Clients share cached prefixes only where they were told to: timing would tell one of the other's prompts."""
        salt = given or ""
        return salt if self._share_prefix_cache or not client.name else f"{client.name}\0{salt}"

    def limits_in_force(self) -> dict[str, int | float]:
        config = self.llm.engine_config
        return self.limits.in_force(config.max_num_seqs, config.max_model_len, config.device)

    @property
    def fingerprint(self) -> str:
        from fastllm import __version__

        return f"fastllm-{__version__}"

    async def _relieve_memory(self) -> None:
        if self._llm is not None:
            await self._llm.reset_prefix_cache()
        self.workers.submit(return_free_blocks)

    # ---- accounting of accepted requests

    def enter(self, sequences: int) -> None:
        self.active_requests += 1
        self.active_sequences += sequences
        self._idle.clear()

    def leave(self, sequences: int) -> None:
        self.active_requests -= 1
        self.active_sequences -= sequences
        if self.active_requests == 0:
            self._idle.set()

    def note_unknown_fields(self, names: set[str]) -> None:
        """Counts them. Each is named once in the life of the server; the memory for it is bounded."""
        self.http.unknown_fields += len(names)
        new = sorted(name[:64] for name in names if name[:64] not in self._logged_fields)
        if new and len(self._logged_fields) < 256:
            self._logged_fields.update(new)
            logger.warning("ignored unknown request fields: %s", ", ".join(map(repr, new[:16])))


STATE_KEY: web.AppKey[ServerState] = web.AppKey("state", ServerState)
