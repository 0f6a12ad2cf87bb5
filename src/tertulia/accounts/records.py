"""What is administered, one row each whatever its kind, and how it is read: by id, by natural name, page by page.

    kind               parent                natural         what of its body is known here (the rest is the API's)
    project            organization          -               name, archived_at (unix seconds or null)
    user               organization          e-mail          email, name, role: owner, reader or member
    role               organization/project  name            name, permissions (accounts/roles.py knows the names)
    group              organization          name            name
    group_user         group                 user id         -
    project_user       project               user id         role: owner or member
    project_group      project               group id        role
    service_account    project               -               name, role: owner, member or none
    role_assignment    user or group id      role/project    role_id, project_id (null: in the whole organization)
    rate_limit         project               model           max_requests_per_1_minute, max_tokens_per_1_minute,
                                                             max_requests_per_1_day, max_concurrent_requests,
                                                             observe_only (true, false, or some of these names)
    spend_limit        organization/project  month           threshold_amount (cents), observe_only
    model_permissions  project               models          mode: allow_list or deny_list; model_ids

A kind that is not in this table (invite, spend_alert, ...) needs nothing here. What is written is change's.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, Select, Table, and_, or_, select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from ..errors import BadRequest, Conflict, NotFound, Unavailable
from ..store.schema import records

PREFIXES = {
    "project": "proj_", "user": "user-", "service_account": "svc_acct_", "invite": "invite-", "key": "key_",
    "group": "group_", "role": "role_", "rate_limit": "rl-", "spend_alert": "alert_", "audit_log": "audit_log-",
    "organization": "org-",
}  # fmt: skip
MOST_ROWS = 1000  # read at once, when rows are filtered here


class Record(NamedTuple):
    """One row. body is what is particular to its kind; created_at is in unix seconds."""

    id: str
    kind: str
    parent: str
    natural: str | None
    created_at: int
    body: dict[str, Any]


_last = 0
_ids = threading.Lock()


def new_id(kind: str) -> str:
    """An id nobody has: the prefix of its kind, then 24 hex digits. Ids of one process sort as they were made."""
    global _last
    with _ids:
        _last = max(_last + 1, time.time_ns() // 1000)
        return f"{PREFIXES.get(kind, kind + '_')}{_last:013x}{secrets.token_hex(6)[1:]}"


def reading(database: Engine) -> AbstractContextManager[Connection]:
    """A connection to read with. Raises Unavailable if the database cannot be used."""
    return _typed(database.connect)


def writing(database: Engine) -> AbstractContextManager[Connection]:
    """A transaction; it is rolled back if an error leaves it. Raises Unavailable if the database cannot be used,
    Conflict where something of that name exists, and BadRequest for what no database can hold."""
    return _typed(database.begin)


@contextlib.contextmanager
def _typed(start: Callable[[], AbstractContextManager[Connection]]) -> Iterator[Connection]:
    try:
        with start() as connection:
            yield connection
    except IntegrityError:
        raise Conflict("Something of that name exists already.") from None
    except (DataError, UnicodeEncodeError, OverflowError):
        raise BadRequest("The request holds a value that cannot be stored.") from None
    except SQLAlchemyError as error:
        raise Unavailable() from error


class Records:
    """Reads records; waits for the database. connect() gives the connection to read with."""

    def __init__(self, connect: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._connect = connect

    def get(self, kind: str, id: str, parent: str | None = None) -> Record:
        """Raises NotFound; also for what belongs to another parent than the given one."""
        found = self._one(records.c.kind == kind, records.c.id == id)
        if found is None or (parent is not None and found.parent != parent):
            raise absent(kind, id)
        return found

    def find(self, kind: str, parent: str, natural: str) -> Record | None:
        """The one of that natural name, if there is one."""
        return self._one(records.c.kind == kind, records.c.parent == parent, records.c.natural == natural)

    def all(self, kind: str, parent: str | None = None) -> list[Record]:
        """Every one of a parent, or of all, oldest first."""
        where = [records.c.kind == kind, records.c.deleted_at.is_(None)]
        if parent is not None:
            where.append(records.c.parent == parent)
        with self._connect() as connection:
            rows = connection.execute(_columns().where(*where).order_by(records.c.created_at, records.c.id)).all()
        return [record_of(row) for row in rows]

    def page(
        self, kind: str, parent: str | None, after: str | None, limit: int, order: str = "asc",
        where: Callable[[Record], bool] | None = None,
    ) -> tuple[list[Record], bool]:  # fmt: skip
        """(up to limit of them that follow the one with id after, whether there are more), by time of creation.

        order: asc or desc. Raises NotFound if there is and was no `after`.
        """
        query = _columns().where(records.c.kind == kind, records.c.deleted_at.is_(None))
        if parent is not None:
            query = query.where(records.c.parent == parent)
        found: list[Record] = []
        with self._connect() as connection:
            while len(found) <= limit:
                size = limit + 1 if where is None else MOST_ROWS
                rows = connection.execute(paged(query, records, connection, after, size, order)).all()
                read = [record_of(row) for row in rows]
                found += read if where is None else [record for record in read if where(record)]
                if len(rows) < size:
                    break
                after = read[-1].id
        return found[:limit], len(found) > limit

    def known(self, id: str) -> bool:
        """Whether something of that id is there, or was, of whatever kind."""
        with self._connect() as connection:
            return connection.scalar(select(records.c.id).where(records.c.id == id)) is not None

    def _one(self, *where: ColumnElement[bool]) -> Record | None:
        with self._connect() as connection:
            row = connection.execute(_columns().where(*where, records.c.deleted_at.is_(None))).first()
        return None if row is None else record_of(row)


def _columns() -> Select[Any]:
    c = records.c
    return select(c.id, c.kind, c.parent, c.natural, c.created_at, c.body)


def record_of(row: Any) -> Record:
    """A row that begins with id, kind, parent, natural, created_at and body."""
    return Record(row[0], row[1], row[2], row[3], row[4], msgspec.json.decode(row[5]))


def paged(
    query: Select[Any], table: Table, connection: Connection, after: str | None, size: int, order: str
) -> Select[Any]:
    """The query for one page of a table that has id and created_at: both together are the order."""
    at, id = table.c.created_at, table.c.id
    if after is not None:
        since = connection.scalar(select(at).where(id == after))
        if since is None:
            raise no_cursor(after, "after")
        if order == "desc":
            query = query.where(or_(at < since, and_(at == since, id < after)))
        else:
            query = query.where(or_(at > since, and_(at == since, id > after)))
    columns = (at.desc(), id.desc()) if order == "desc" else (at, id)
    return query.order_by(*columns).limit(size)


def chosen(text: str, projects: Iterable[tuple[str, str, bool]]) -> str:
    """The project that somebody means by its id or its name, of those that are given by id, name and whether they are
    active; an active one comes before archived ones. Raises NotFound, or BadRequest if several have that name."""
    named: dict[bool, list[str]] = {True: [], False: []}
    for id, name, active in projects:
        if id == text:
            return id
        if name == text:
            named[active].append(id)
    found = named[True] or named[False]
    if not found:
        raise NotFound(f"There is no project {text!r}; `tertulia keys projects list` shows them.")
    if len(found) > 1:
        raise BadRequest(f"Several projects are named {text!r}: give the id of one ({', '.join(found)}).")
    return found[0]


def absent(kind: str, id: str) -> NotFound:
    """The error for what is not there, or is somebody else's: nothing tells the two apart."""
    return NotFound(f"No such {kind.replace('_', ' ')}: {id[:64]}")


def no_cursor(id: str, parameter: str) -> NotFound:
    """The error for a list's cursor, after or before, that is no object."""
    return NotFound(f"There is no object with the id {id[:64]!r}.", param=parameter)
