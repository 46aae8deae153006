"""The listening socket: as many clients as like may wait to be accepted, and few are accepted at once."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable

from fastllm.server.unix_socket import remove_dead_socket

_WAITING = 1024  # connections that the kernel keeps until they are accepted
_ACCEPTED_A_TURN = 16  # of the event loop; each costs it 0.1 ms


async def listen(
    protocol: Callable[[], asyncio.BaseProtocol],
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    *,
    uds: str | None = None,
) -> asyncio.Server:
    """On every address of `host`, or on the Unix socket `uds`, in place of one that nobody listens on."""
    loop = asyncio.get_running_loop()
    # What asyncio calls backlog is both: how many may wait, and how many it accepts before anything else gets its turn.
    if uds is not None:
        remove_dead_socket(uds)
        server = await loop.create_unix_server(protocol, uds, ssl=ssl_context, backlog=_ACCEPTED_A_TURN)
    else:
        server = await loop.create_server(protocol, host, port, ssl=ssl_context, backlog=_ACCEPTED_A_TURN)
    for listening in server.sockets:
        with socket.socket(fileno=os.dup(listening.fileno())) as same:
            same.listen(_WAITING)
    return server
