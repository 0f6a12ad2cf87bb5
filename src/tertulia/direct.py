"""Writes to a socket at once, where nothing waits to be written before it: the loop's queue is left out, and so is the
time between saying that something is sent and its being sent. What the socket does not take goes the usual way.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

_write: Any = os.write


def descriptor(transport: asyncio.BaseTransport) -> int:
    """Of its socket; -1 where the bytes are not the socket's own (TLS)."""
    socket = transport.get_extra_info("socket")
    if socket is None or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(socket.fileno())


def write(transport: Any, file: int, data: bytes) -> None:
    """transport.write(data); file: descriptor(transport), which is its own as long as it is not closing."""
    if file >= 0 and not transport.get_write_buffer_size() and not transport.is_closing():
        try:
            sent = _write(file, data)
        except OSError:  # it takes nothing now, or has broken: the transport finds out which
            sent = 0
        if sent == len(data):
            return
        data = data[sent:]
    transport.write(data)
