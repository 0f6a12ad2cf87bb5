"""Bytes written past the transport arrive once, whole and in order, however little the socket takes at a time."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from tertulia import direct
from tertulia.direct import OUTBOX

LARGE = bytes(range(256)) * 16_384  # 4 MiB: more than a socket takes
SMALL = b"small"


class Quiet(asyncio.Protocol):
    def __init__(self) -> None:
        self.paused = False

    def pause_writing(self) -> None:
        self.paused = True


async def connected() -> tuple[asyncio.Transport, int, Quiet, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.setblocking(False)
    transport, protocol = await asyncio.get_running_loop().create_connection(Quiet, sock=ours)
    return transport, direct.descriptor(transport), protocol, theirs


async def received(theirs: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 65_536), 10)
    return found


@pytest.mark.parametrize("sizes", [(5, 5), (5, len(LARGE)), (len(LARGE), 5), (len(LARGE), len(LARGE)), (5, 0)])
def test_both_pieces_arrive(sizes: tuple[int, int]) -> None:
    async def act() -> None:
        transport, file, protocol, theirs = await connected()
        with theirs:
            head, body = LARGE[: sizes[0]], LARGE[: sizes[1]][::-1]
            direct.write_both(transport, file, head, body)
            assert protocol.paused == (sum(sizes) > 2**20)
            direct.write_both(transport, file, SMALL, SMALL)  # waits its turn behind what is left
            direct.write(transport, file, SMALL)
            assert await received(theirs, sum(sizes) + 15) == head + body + 3 * SMALL
            transport.close()

    uvloop.run(act())


def test_without_a_descriptor_the_transport_writes() -> None:
    async def act() -> None:
        transport, _, _, theirs = await connected()
        with theirs:
            direct.write_both(transport, -1, SMALL, SMALL)
            direct.write(transport, -1, SMALL)
            assert await received(theirs, 15) == 3 * SMALL
            transport.close()

    uvloop.run(act())


def test_letters_wait_for_the_end_of_the_turn() -> None:
    async def act() -> None:
        transport, file, _, theirs = await connected()
        with theirs:
            OUTBOX.put(transport, file, b"at once ")  # there is no turn
            assert theirs.recv(100) == b"at once "
            OUTBOX.open()
            OUTBOX.put(transport, file, b"one ")
            OUTBOX.put(transport, file, b"two")
            with pytest.raises(BlockingIOError):
                theirs.recv(100)
            OUTBOX.send()
            assert theirs.recv(100) == b"one two"
            transport.close()

    uvloop.run(act())


def test_a_closing_transport_is_sent_nothing() -> None:
    """its descriptor may be another's by then"""

    async def act() -> None:
        transport, file, _, theirs = await connected()
        with theirs:
            OUTBOX.open()
            OUTBOX.put(transport, file, SMALL)
            transport.abort()
            direct.write(transport, file, SMALL)
            direct.write_both(transport, file, SMALL, SMALL)
            OUTBOX.send()
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 100), 10) == b""

    uvloop.run(act())
