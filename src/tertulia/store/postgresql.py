"""Connections to PostgreSQL that wait for an answer only so long. The server ends a statement that takes too long; but
one that hangs, or that the network has lost, says nothing at all, and the driver would wait for that without end.
"""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

T = TypeVar("T")


class Impatient(psycopg.Connection[Any]):
    """patience: seconds that one answer may take, None: for ever. Who has waited for so long gets OperationalError, and
    the connection is closed."""

    patience: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.patience if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE and timeout is None:
                self.close()  # the answer may still come, and would be taken for another one's
            raise
