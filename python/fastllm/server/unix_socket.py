"""The file of a Unix socket outlives a process that was killed; a new server takes its place."""

from __future__ import annotations

import socket
import stat
from pathlib import Path


def remove_dead_socket(path: str) -> None:
    """Removes a socket that nobody listens on. Raises OSError if somebody does, or if it is another kind of file."""
    file = Path(path)
    try:
        mode = file.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            file.unlink(missing_ok=True)
            return
    raise OSError(f"{path} is in use")
