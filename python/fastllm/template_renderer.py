"""Has chat templates rendered by processes that can be stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from fastllm.template_worker import LENGTH_BYTES

_MAX_CPU_S = 1.0  # of one template
_MAX_WAIT_S = 10.0  # for one answer; with the CPU to itself a worker is ended earlier
_KEPT = 2  # idle processes
# What a worker needs of our environment; keys and tokens are not for templates.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")
_READ_BYTES = 1 << 16


class _WorkerGone(Exception):
    """The process ended before it answered."""


class _Worker:
    def __init__(self, max_cpu_s: float) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["PYTHONSAFEPATH"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from fastllm.template_worker import main; main({max_cpu_s})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the server, which ends its workers by closing their input
            bufsize=0,
        )

    def ask(self, job: bytes) -> dict[str, str]:
        """Raises _WorkerGone, or TimeoutError while it still works."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        frame = memoryview(len(job).to_bytes(LENGTH_BYTES, "big") + job)
        try:
            while frame:
                frame = frame[stdin.write(frame) or 0 :]
        except OSError:
            raise _WorkerGone from None
        deadline = time.monotonic() + _MAX_WAIT_S
        length = int.from_bytes(_read(stdout.fileno(), LENGTH_BYTES, deadline), "big")
        answer: dict[str, str] = json.loads(_read(stdout.fileno(), length, deadline))
        return answer

    @property
    def ran_out(self) -> bool:
        """After close(): the kernel had ended it for its CPU time."""
        return self._process.returncode == -signal.SIGPROF

    def close(self) -> None:
        self._process.kill()  # without effect on one that has ended
        with contextlib.suppress(OSError):
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
        self._process.wait()


def _read(fd: int, size: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while size:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(fd, min(size, _READ_BYTES))
        if not part:
            raise _WorkerGone
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class TemplateRenderer:
    """Thread-safe. Starts its first process with the first template, or at warm().

    max_cpu_s: seconds of CPU time that one template may take.
    """

    def __init__(self, max_cpu_s: float = _MAX_CPU_S) -> None:
        self._max_cpu_s = max_cpu_s
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def warm(self) -> None:
        """Starts a process ahead of the first template."""
        self._give_back(self._take()[0])

    def render(
        self,
        template: str | None,
        messages: Sequence[Mapping[str, Any]],
        **settings: Any,
    ) -> str:
        """render_chat with these arguments, elsewhere. Raises ValueError, also for a template that takes too much."""
        job = {"template": template, "messages": list(messages), **settings}
        try:
            frame = json.dumps(job, default=_plain).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The conversation cannot be written as JSON: {error}") from None
        answer = self._ask(frame)
        if "text" not in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _ask(self, frame: bytes) -> dict[str, str]:
        while True:
            worker, was_idle = self._take()
            try:
                answer = worker.ask(frame)
            except _WorkerGone:
                worker.close()
                if was_idle and not worker.ran_out:
                    continue  # it may have been ended from outside, before this job
                raise ValueError(
                    f"The chat template takes more than {self._max_cpu_s:g} s or too much memory."
                ) from None
            except TimeoutError:
                worker.close()
                raise ValueError(f"The chat template did not finish within {_MAX_WAIT_S:g} s.") from None
            except BaseException:
                worker.close()
                raise
            self._give_back(worker)
            return answer

    def _take(self) -> tuple[_Worker, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return _Worker(self._max_cpu_s), False

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(worker)
                return
        worker.close()

    def close(self) -> None:
        """Ends the idle processes; a later template starts new ones."""
        with self._lock:
            workers, self._idle[:] = list(self._idle), []
        for worker in workers:
            worker.close()


def _close_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()


def _plain(value: Any) -> Any:
    """What JSON does not know but messages are made of."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | set | frozenset):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not plain data")
