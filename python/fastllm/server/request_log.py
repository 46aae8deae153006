"""What --enable-log-requests adds to the log: how each request samples; at the level of debug also what it says."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from fastllm.server.json_log import REQUEST_LOGGER

if TYPE_CHECKING:
    from fastllm.server.generation import Job
    from fastllm.tokenizer import Tokenizer

logger = logging.getLogger(REQUEST_LOGGER)


class RequestLog:
    def __init__(self, max_len: int | None = None) -> None:
        """max_len: most characters, and most token ids, of a prompt; None: all of it."""
        self._max_len = max_len

    def received(self, request_id: str, job: Job, tokenizer: Tokenizer) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        shown: list[str] = []
        for field in dataclasses.fields(job.params):
            value = getattr(job.params, field.name)
            if isinstance(value, (list, dict)) and value:
                shown.append(f"{len(value)} {field.name}")  # may hold content
            elif isinstance(value, (int, float)) and value != field.default:
                shown.append(f"{field.name}={value}")
        logger.info("request %s: %d prompt tokens; %s", request_id, len(job.prompt_ids), ", ".join(shown))
        if logger.isEnabledFor(logging.DEBUG):
            text = tokenizer.decode(job.prompt_ids, False)[: self._max_len]
            logger.debug("request %s: prompt %r, token ids %s", request_id, text, list(job.prompt_ids[: self._max_len]))
