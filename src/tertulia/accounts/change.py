"""A change of what is administered: one transaction that raises the directory's counter, writes records and keys with
that revision, and tells the audit log. The counter's row lock makes changes of all processes follow each other.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ..errors import Conflict, NotFound
from ..store.schema import api_keys, audit_logs, counters, records
from .audit import Actor
from .records import Record, Records, absent, new_id

KEEP: Any = object()  # leave it as it is
FORGOTTEN_SECONDS = 30 * 86400  # for which the row of what was deleted stays, so that every process learns of it
AT_ONCE = 1000  # rows


class Change:
    """One transaction under way. now is its time in unix seconds. Whatever error leaves it, nothing has changed."""

    def __init__(self, connection: Connection, organization: str, actor: Actor) -> None:
        self.connection, self.organization, self.actor = connection, organization, actor
        self.now = int(time.time())
        self.revision = raise_counter(connection)
        self._keys: list[dict[str, Any]] = []
        self._told: list[dict[str, Any]] = []
        self.records = Records(lambda: nullcontext(connection))  # as they are within this change

    def create(
        self, kind: str, parent: str, body: dict[str, Any], natural: str | None = None, id: str | None = None
    ) -> Record:
        """Raises Conflict if a sibling of the kind has that natural name already."""
        record = Record(id or new_id(kind), kind, parent, natural, self.now, body)
        values = {**record._asdict(), "body": _json(body), "revision": self.revision}
        try:
            self.connection.execute(insert(records).values(values))
        except IntegrityError:
            name = natural or record.id
            raise Conflict(f"There is a {kind.replace('_', ' ')} {name[:96]} already.") from None
        return record

    def update(self, id: str, body: dict[str, Any], natural: str | None = KEEP) -> None:
        """The body is replaced whole. Raises NotFound, and Conflict as create does."""
        values: dict[str, Any] = {"body": _json(body), "revision": self.revision}
        if natural is not KEEP:
            values["natural"] = natural
        try:
            self._write(id, values)
        except IntegrityError:
            raise Conflict(f"There is one named {str(natural)[:96]} already.") from None

    def delete(self, id: str) -> None:
        """Raises NotFound."""
        self._write(id, {"deleted_at": self.now, "natural": None, "revision": self.revision})

    def _write(self, id: str, values: dict[str, Any]) -> None:
        here = (records.c.id == id) & records.c.deleted_at.is_(None)
        if self.connection.execute(update(records).where(here).values(values)).rowcount != 1:
            raise NotFound(f"No such object: {id[:64]}")

    def add_key(self, row: dict[str, Any]) -> None:
        """A row of api_keys; its revision is set here."""
        self._keys.append({**row, "revision": self.revision})

    def set_key(self, id: str, **values: Any) -> None:
        """Raises NotFound for a key that is not there, or revoked."""
        self.write()
        here = (api_keys.c.id == id) & api_keys.c.revoked_at.is_(None)
        done = self.connection.execute(update(api_keys).where(here).values(**values, revision=self.revision))
        if done.rowcount != 1:
            raise absent("API key", id)

    def audit(self, type: str, resource_id: str | None, details: dict[str, Any], project_id: str | None = None) -> None:
        """An entry of the audit log; details as the API shows them under the type's name."""
        entry = {
            "id": new_id("audit_log"), "at": self.now, "type": type, "organization_id": self.organization,
            "project_id": project_id, "actor": _json(self.actor.shown), "actor_id": self.actor.id,
            "actor_email": self.actor.email, "resource_id": resource_id, "details": _json(details),
        }  # fmt: skip
        self._told.append(entry)

    def write(self) -> None:
        """Writes what was gathered, many rows at once."""
        for table, rows in ((api_keys, self._keys), (audit_logs, self._told)):
            if rows:
                self.connection.execute(insert(table), rows)
                rows.clear()


def forget(database: Engine, stop: threading.Event) -> None:
    """Removes the rows of records that were deleted long ago. The counter `forgotten` says up to which revision some
    are gone: who has seen less than that reads all that there is. Raises what the database raises."""
    before = int(time.time()) - FORGOTTEN_SECONDS
    old = select(records.c.id, records.c.revision).where(records.c.deleted_at < before)
    while not stop.is_set():
        with database.connect() as connection:
            gone = connection.execute(old.limit(AT_ONCE)).all()
        if not gone:
            return
        with database.begin() as connection:
            lock_counter(connection)
            connection.execute(delete(records).where(records.c.id.in_([row.id for row in gone])))
            _raise_forgotten(connection, max(row.revision for row in gone))
        stop.wait(0.05)  # others want to write, too


def forgotten(connection: Connection) -> int:
    """The highest revision of which rows are gone; -1 if none are."""
    found = connection.scalar(select(counters.c.value).where(counters.c.name == "forgotten"))
    return -1 if found is None else int(found)


def _raise_forgotten(connection: Connection, revision: int) -> None:
    before = forgotten(connection)
    if before < 0:
        connection.execute(insert(counters).values(name="forgotten", value=revision))
    elif before < revision:
        connection.execute(update(counters).where(counters.c.name == "forgotten").values(value=revision))


def lock_counter(connection: Connection) -> None:
    """Until the end of the transaction nobody else changes anything; the revision stays."""
    connection.execute(update(counters).where(counters.c.name == "directory").values(value=counters.c.value))


def raise_counter(connection: Connection) -> int:
    """The next revision. First in its transaction: from here on no other process changes anything."""
    this = counters.c.name == "directory"
    connection.execute(update(counters).where(this).values(value=counters.c.value + 1))
    return int(connection.execute(select(counters.c.value).where(this)).scalar_one())


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
