"""The verbs that all kinds share: they read the row of the table and know no kind.

A link is a record that joins two others, a user and a project for one: it is shown, found and paged by its natural
name, the id of what is joined to its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...accounts.records import Record, no_cursor
from ...errors import NotFound
from ..pages import cut
from .kinds import Act, Ask

T = TypeVar("T")
EVENTS = {"user": ("added", "updated", "deleted"), "invite": ("sent", "updated", "deleted")}
USUAL = ("created", "updated", "deleted")
CREATED, UPDATED, DELETED = 0, 1, 2


def create(ask: Ask) -> dict[str, Any]:
    return ask.kind.show(ask, made(ask, kept(ask.given)))


def made(ask: Ask, body: dict[str, Any]) -> Record:
    """A new record of the call's kind, and told."""
    record = ask.change.create(ask.kind.record, ask.parent, body, natural=ask.kind.natural(body))
    tell(ask, CREATED, record, body)
    return record


def retrieve(ask: Ask) -> dict[str, Any]:
    return ask.kind.show(ask, found(ask))


def found(ask: Ask) -> Record:
    """The record the call is about. Raises NotFound."""
    return ask.records.get(ask.kind.record, ask.id, ask.parent)


def update(ask: Ask) -> dict[str, Any]:
    return ask.kind.show(ask, changed(ask, found(ask), kept(ask.given)))


def changed(ask: Ask, record: Record, values: dict[str, Any]) -> Record:
    """The record with other values in its body, and told; nothing at all if it has them already."""
    body = {**record.body, **values}
    if body != record.body:
        natural = ask.kind.natural(body) if not is_link(ask) else record.natural
        ask.change.update(record.id, body, natural=natural)
        tell(ask, UPDATED, record, values)
    return record._replace(body=body)


def is_link(ask: Ask) -> bool:
    return ask.kind.record in ("project_user", "project_group", "group_user")


def delete(ask: Ask) -> dict[str, Any]:
    record = found(ask)
    gone(ask, record)
    return deleted(ask, record.id)


def gone(ask: Ask, record: Record) -> None:
    ask.change.delete(record.id)
    tell(ask, DELETED, record, {})


def deleted(ask: Ask, id: str) -> dict[str, Any]:
    return {"object": f"{ask.kind.object}.deleted", "id": id, "deleted": True}


def listed(ask: Ask) -> dict[str, Any]:
    """By time of creation, a page at a time from the database."""
    return pick(ask, None)


def pick(ask: Ask, where: Callable[[Record], bool] | None) -> dict[str, Any]:
    """The same, of those for which where is true."""
    paging = ask.kind.paging
    window = paging.window(ask.query)
    records, more = ask.records.page(
        ask.kind.record, ask.parent, window.after, window.limit, window.order, where
    ) if window.limit else ([], False)  # fmt: skip
    return paging.page([ask.kind.show(ask, record) for record in records], more, [record.id for record in records])


def whole(ask: Ask) -> dict[str, Any]:
    """The same for what there are few of, forward and backward: ids of one kind sort as they were made."""
    return paged(ask, ask.records.all(ask.kind.record, ask.parent), lambda record: record.id)


def paged(ask: Ask, items: Sequence[Record], key: Callable[[Record], str]) -> dict[str, Any]:
    """One page of records that are all in memory, in the order of key, which is their cursor."""
    return pages(ask, items, key, lambda record: ask.kind.show(ask, record))


def pages(ask: Ask, items: Sequence[T], key: Callable[[T], str], show: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """The same for anything. Raises NotFound for a cursor that is no item and never was a record; what is gone still
    marks its place."""
    window = ask.kind.paging.window(ask.query)
    ordered = sorted(items, key=key)
    ids = [key(item) for item in ordered]
    for name, cursor in (("after", window.after), ("before", window.before)):
        if cursor is not None and cursor not in ids and not ask.records.known(cursor):
            raise no_cursor(cursor, name)
    part, more = cut(ids, window)
    chosen = ordered[part] if window.order == "asc" else ordered[part][::-1]
    return ask.kind.paging.page([show(item) for item in chosen], more, [key(item) for item in chosen])


# links
def linked(ask: Ask, record: str | None = None, parent: str | None = None, natural: str | None = None) -> Record:
    """The link the call is about, or another one. Raises NotFound."""
    link = ask.records.find(record or ask.kind.record, parent or ask.parent, natural or ask.id)
    if link is None:
        raise ask.missing()
    return link


def retrieve_link(ask: Ask) -> dict[str, Any]:
    return ask.kind.show(ask, linked(ask))


def list_links(ask: Ask) -> dict[str, Any]:
    return paged(ask, ask.records.all(ask.kind.record, ask.parent), lambda link: link.natural or "")


# of which there is one
def retrieve_single(ask: Ask) -> dict[str, Any]:
    return ask.kind.show(ask, single(ask))


def single(ask: Ask) -> Record:
    """Raises NotFound."""
    record = ask.records.find(ask.kind.record, ask.parent, ask.kind.natural({}) or "")
    if record is None:
        raise NotFound(f"There is no {ask.kind.record.replace('_', ' ')} here.")
    return record


def replace_single(ask: Ask) -> dict[str, Any]:
    """It is made if it is not there."""
    body, natural = kept(ask.given), ask.kind.natural({})
    record = ask.records.find(ask.kind.record, ask.parent, natural or "")
    if record is None:
        return ask.kind.show(ask, made(ask, body))
    ask.change.update(record.id, body)
    tell(ask, UPDATED, record, body)
    return ask.kind.show(ask, record._replace(body=body))


def delete_single(ask: Ask) -> dict[str, Any]:
    gone(ask, single(ask))
    return {"object": f"{ask.kind.object}.deleted", "deleted": True}


# the rest
def kept(given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a body without those that are null, which are as if not given; as plain objects."""
    return {name: value for name, value in given.items() if value is not None}


def tell(ask: Ask, what: int, record: Record, body: dict[str, Any]) -> None:
    """The audit event of a change. What has no event of its own is a change of the project or organization it is of."""
    kind = ask.kind
    told = {name: body[key] for key, name in kind.told.items() if key in body}
    if not kind.event:
        family = "project" if ask.project_id is not None else "organization"
        ask.tell(f"{family}.updated", ask.parent, {"changes_requested": {kind.record: body or None}})
        return
    resource = (record.natural or record.id) if is_link(ask) else record.id
    details = [{"data": told}, {"changes_requested": told}, {}][what]
    ask.tell(f"{kind.event}.{EVENTS.get(kind.event, USUAL)[what]}", resource, details)


CRUD: dict[str, Act] = {
    "create": create, "retrieve": retrieve, "update": update, "list": listed, "delete": delete,
}  # fmt: skip
SINGLE: dict[str, Act] = {"retrieve": retrieve_single, "update": replace_single, "delete": delete_single}
