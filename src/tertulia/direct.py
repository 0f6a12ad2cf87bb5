"""Writes to a socket at once, where nothing waits to be written before it: the loop's queue is left out, and so is the
time between saying that something is sent and its being sent. What the socket does not take goes the usual way.

Within a turn (turns.py), what is all that its socket is to be sent can wait for the turn's end: then everything is
written together. The kernel's part of each is cheaper so, and who reads at the other end is woken less often.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

_write: Any = os.write
_writev: Any = os.writev


def descriptor(transport: asyncio.BaseTransport) -> int:
    """Of its socket; -1 where the bytes are not the socket's own (TLS)."""
    socket = transport.get_extra_info("socket")
    if socket is None or transport.get_extra_info("sslcontext") is not None:
        return -1
    return int(socket.fileno())


class Outbox:
    """What is to be written at the end of the turn under way."""

    __slots__ = ("_letters", "_open")

    def __init__(self) -> None:
        self._open = False
        self._letters: list[tuple[Any, int, bytes]] = []

    def put(self, transport: Any, file: int, data: bytes) -> None:
        """write(transport, file, data) when the turn ends; at once, if there is none. Nothing else may be written to
        the transport before."""
        if self._open:
            self._letters.append((transport, file, data))
        else:
            write(transport, file, data)

    def open(self) -> None:
        """A turn begins."""
        self._open = True

    def send(self) -> None:
        """The turn ends."""
        self._open = False
        letters, self._letters = self._letters, []
        for transport, file, data in letters:
            write(transport, file, data)


OUTBOX: Final = Outbox()  # of this process's one loop


def write(transport: Any, file: int, data: bytes) -> None:
    """transport.write(data); file: descriptor(transport), which is its own as long as it is not closing."""
    if transport.is_closing():
        return
    if file >= 0 and not transport.get_write_buffer_size():
        try:
            sent = _write(file, data)
        except OSError:  # it takes nothing now, or has broken: the transport finds out which
            sent = 0
        if sent == len(data):
            return
        data = data[sent:]
    transport.write(data)


def write_both(transport: Any, file: int, head: bytes, body: bytes) -> None:
    """write(transport, file, head + body) without a copy of a large body."""
    if transport.is_closing():
        return
    if file >= 0 and not transport.get_write_buffer_size():
        try:
            sent = _writev(file, (head, body))
        except OSError:  # as above
            sent = 0
        if sent == len(head) + len(body):
            return
        if sent >= len(head):
            transport.write(memoryview(body)[sent - len(head) :])
            return
        head = head[sent:]
    transport.writelines((head, body))
