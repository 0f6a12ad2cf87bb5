"""The audit log: who administered what, from where. It is written in the transaction of the change it tells of, and
shown as OpenAI's API shows it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select

from ..core import Principal
from ..store.schema import audit_logs
from .fold import DAY, sweep
from .records import Record, no_cursor

if TYPE_CHECKING:
    from ..store.database import Database

LONGEST = 256  # characters kept of what a caller says of itself


class Actor(NamedTuple):
    """Who changes something. shown is the `actor` of the API's audit log."""

    id: str
    email: str | None
    shown: dict[str, Any]


def caller(who: Principal, user: Record | None, ip: str, user_agent: str) -> Actor:
    """Whoever holds an admin key; user is its owner. ip and user_agent are of the request."""
    person = {"id": user.id, "email": user.body.get("email")} if user is not None else {}
    shown = {
        "type": "api_key",
        "api_key": {"id": who.key_id, "type": "user", "user": person},
        "session": {"ip_address": ip, "user_agent": printable(user_agent), "user": person},
    }
    return Actor(who.key_id, person.get("email"), shown)


def local(login: str) -> Actor:
    """Whoever uses the command line on the data directory: a user of the machine, and none of ours."""
    login = printable(login)
    id = f"local:{login}"
    session = {"ip_address": None, "user_agent": f"from the command line of user {login}", "user": {"id": id}}
    return Actor(id, None, {"type": "session", "session": session})


def itself(what: str) -> Actor:
    """The server on its own: its first start, its settings."""
    session = {"ip_address": None, "user_agent": what, "user": {"id": "tertulia"}}
    return Actor("tertulia", None, {"type": "session", "session": session})


def printable(text: str) -> str:
    """One line without control characters, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text[:LONGEST])


def prune(database: Database, days: int, stop: threading.Event) -> None:
    """Deletes the entries that are older than so many days, if it is any. Raises what the database raises."""
    if days:
        sweep(database, audit_logs.c.id, audit_logs.c.at, int(time.time()) - days * DAY, stop)


class AuditLog:
    """Reads the log; waits for the database."""

    def __init__(
        self, connect: Callable[[], AbstractContextManager[Connection]], names: Callable[[str], str | None]
    ) -> None:
        """names gives a project's name by its id."""
        self._connect, self._names = connect, names

    def page(
        self, limit: int, *, after: str | None = None, before: str | None = None,
        effective_at: Mapping[str, int] | None = None, event_types: Sequence[str] = (),
        project_ids: Sequence[str] = (), actor_ids: Sequence[str] = (), actor_emails: Sequence[str] = (),
        resource_ids: Sequence[str] = (),
    ) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
        """(up to limit entries as the API shows them, newest first; whether there are more). effective_at: any of gt,
        gte, lt and lte to unix seconds. actor_ids are of users, service accounts or keys. Raises NotFound for an
        after or before that is not there."""
        log = audit_logs.c
        lists = ((log.type, event_types), (log.project_id, project_ids), (log.actor_email, actor_emails),
                 (log.resource_id, resource_ids))  # fmt: skip
        where: list[ColumnElement[bool]] = [column.in_(wanted) for column, wanted in lists if wanted]
        for name, value in (effective_at or {}).items():
            where.append(
                {"gt": log.at > value, "gte": log.at >= value, "lt": log.at < value, "lte": log.at <= value}[name]
            )
        if actor_ids:
            people = (_holds(id) for id in actor_ids)
            where.append(or_(log.actor_id.in_(actor_ids), *people))
        with self._connect() as connection:
            if after is not None:
                where.append(_beyond(connection, after, "after"))
            if before is not None:
                where.append(_beyond(connection, before, "before"))
            query = select(audit_logs).where(*where)
            backward = before is not None and after is None  # the page that ends where `before` stands
            order = (log.at, log.id) if backward else (log.at.desc(), log.id.desc())
            rows = list(connection.execute(query.order_by(*order).limit(limit + 1)))
        more = len(rows) > limit
        rows = rows[:limit]
        return [self._shown(row) for row in (reversed(rows) if backward else rows)], more

    def _shown(self, row: Row[Any]) -> dict[str, Any]:
        entry = {
            "id": row.id, "object": "organization.audit_log", "type": row.type, "effective_at": row.at,
            "actor": msgspec.json.decode(row.actor), row.type: msgspec.json.decode(row.details),
        }  # fmt: skip
        if row.project_id is not None:
            entry["project"] = {"id": row.project_id, "name": self._names(row.project_id)}
        return entry


def _holds(id: str) -> ColumnElement[bool]:
    """The actor's own JSON names that user or service account."""
    return audit_logs.c.actor.contains(f'"id":{msgspec.json.encode(id).decode()}', autoescape=True)


def _beyond(connection: Connection, id: str, parameter: str) -> ColumnElement[bool]:
    log = audit_logs.c
    at = connection.scalar(select(log.at).where(log.id == id))
    if at is None:
        raise no_cursor(id, parameter)
    if parameter == "after":
        return or_(log.at < at, and_(log.at == at, log.id < id))
    return or_(log.at > at, and_(log.at == at, log.id > id))
