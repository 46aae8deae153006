"""The process that renders chat templates: one job after the other from stdin, answers to stdout.

A template comes with the model and may be written by anybody. Jinja's sandbox keeps it from our objects, and this
process, which holds no secrets and can be killed, keeps it from our time and memory.

    frame: 8 bytes length, big endian | JSON;    job: arguments of render_chat;    answer: {"text"} or {"error"}
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

from fastllm.chat import render_chat

_MAX_MEMORY = 1 << 30  # bytes of address space
LENGTH_BYTES = 8


def main(max_cpu_s: float) -> None:
    """max_cpu_s: seconds of CPU time for one job; the kernel ends the process of one that takes more."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    render_chat("{{ messages }}", [{"role": "user"}])  # loads what every template needs
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while True:
        job = _read(source)
        if job is None:
            return
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)  # nobody handles its signal, so it ends the process
        answer = json.dumps(_answer(job)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.write(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
        sink.flush()


def _read(source: BinaryIO) -> Any:
    length = source.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    return json.loads(source.read(int.from_bytes(length, "big")))


def _answer(job: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": render_chat(**job)}
    except ValueError as error:
        return {"error": str(error)[:400]}
    except MemoryError:
        return {"error": "The chat template takes more memory than it is allowed."}
    except Exception as error:  # a template reaches much of Python
        return {"error": f"The chat template refused the conversation: {type(error).__name__}: {error}"[:400]}
