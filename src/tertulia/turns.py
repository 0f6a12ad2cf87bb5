"""Reading and working take turns. What came in while the loop read its sockets is worked on afterwards, one after the
other: the processor's caches then hold what each of them needs, which is a tenth of what a busy server's call costs.
An idle server has one thing to do in a turn, and pays one more look at its sockets for it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

from .direct import OUTBOX

log = logging.getLogger("tertulia")


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
        for worker in workers:
            try:
                worker.work()
            except Exception as error:  # a defect of ours in one; the others are not its victims
                log.error("unexpected error in a turn", exc_info=error)
        OUTBOX.send()
