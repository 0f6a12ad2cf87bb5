"""Reading and working take turns. What came in while the loop read its sockets is worked on afterwards, one after the
other: the processor's caches then hold what each of them needs, which is a tenth of what a busy server's call costs.
An idle server has one thing to do in a turn, and pays one more look at its sockets for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, Protocol

from .direct import OUTBOX

log = logging.getLogger("tertulia")


class Clock:
    """The time. Within a turn it stands still: it is read once, and not a dozen times for each call, which is near
    enough for all but who measures how long something took."""

    __slots__ = ("_monotonic", "_still", "_time")

    def __init__(self) -> None:
        self._still = False
        self._monotonic = self._time = 0.0

    def stop(self) -> None:
        self._monotonic, self._time, self._still = time.monotonic(), time.time(), True

    def go(self) -> None:
        self._still = False

    def monotonic(self) -> float:
        """Seconds, as time.monotonic() has them."""
        return self._monotonic if self._still else time.monotonic()

    def time(self) -> float:
        """Seconds since 1970."""
        return self._time if self._still else time.time()


CLOCK: Final = Clock()  # of this process's one loop


class Worker(Protocol):
    """Who has something to do in the next turn."""

    def work(self) -> None:
        """Does it; nothing, if it was done meanwhile."""


class Turns:
    """The workers of one loop's next turn."""

    __slots__ = ("_loop", "_workers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: Any = loop
        self._workers: list[Worker] = []

    def add(self, worker: Worker) -> None:
        """worker.work() is called when the sockets have been read."""
        if not self._workers:
            self._loop.call_soon(self._run)
        self._workers.append(worker)

    def _run(self) -> None:
        workers, self._workers = self._workers, []
        OUTBOX.open()
        CLOCK.stop()
        for worker in workers:
            try:
                worker.work()
            except Exception as error:  # a defect of ours in one; the others are not its victims
                log.error("unexpected error in a turn", exc_info=error)
        CLOCK.go()
        OUTBOX.send()
