"""A server in a process of its own, started by a command line, with what it says on stderr."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from server_fixtures import wait_until


class ServerProcess:
    def __init__(self, arguments: Sequence[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | env
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match on stderr."""
        wait_until(lambda: re.search(pattern, self.text) is not None or self.process.poll() is not None, 60)
        match = re.search(pattern, self.text)
        assert match, self.text
        return match

    def wait_ready(self) -> str:
        """The address it serves."""
        return self.wait_for(r"ready after [\d.]+ s: (\S+?)(/v1)?[\"\s]*(\n|\"|$)")[1]

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self._reader.join(10)
        return status


@contextmanager
def server_process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """`python -m ARGUMENTS`, killed at the end if the test has not stopped it."""
    server = ServerProcess(arguments, env or {})
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)
