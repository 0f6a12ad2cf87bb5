"""What was used, out of the database: sums over a span of time, in buckets, by project, user, key and model. It reads
the sums by day where those will do, those by hour where not, and the ledger itself only for what is finer than an hour.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import add, itemgetter
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Connection, Select, Subquery, Table, Text, cast, func, select

from ..store.database import Database
from ..store.schema import api_keys, ledger, usage_days, usage_hours
from .fold import DAY, HOUR, KINDS

MINUTE = 60
BY = ("project_id", "user_id", "api_key_id", "model")


class _Source(NamedTuple):
    """A table, which of its columns is the time, how many seconds a row of it stands for, and what by there is no more
    than one row of a kind (all of them, if nothing)."""

    table: Table
    time: str
    unit: int
    whole: frozenset[str] | None


SOURCES = (
    _Source(usage_days, "day", DAY, frozenset({"project_id", "model"})),
    _Source(usage_hours, "hour", HOUR, frozenset({"project_id", "api_key_id", "model"})),
    _Source(ledger, "at", 1, None),
)
read_tuples = msgspec.json.Decoder(list[tuple[Any, ...]]).decode
NAMES = {"project_id": "project_id", "api_key_id": "key_id", "model": "model"}


@dataclass(frozen=True)
class Wanted:
    """What of which calls: start is inclusive, end is not, both in unix seconds; width is of a bucket, in seconds: the
    first one begins at start, and all others at a multiple of width. by: some of BY; figures: some of FIGURES (fold);
    kind: of usage, as in KINDS (fold). What is None is not filtered by."""

    start: int
    end: int
    width: int
    by: tuple[str, ...]
    figures: tuple[str, ...]
    kind: str | None = None
    projects: tuple[str, ...] | None = None
    users: tuple[str, ...] | None = None
    keys: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None


def sums(database: Database, wanted: Wanted) -> list[tuple[Any, ...]]:
    """(bucket, what it is by, figures), ordered by bucket, which is a multiple of width, and each once. The sources are
    read at the same time: each has another part of the span, and most of the work is the database's."""

    def read(part: tuple[_Source, int, int]) -> list[tuple[Any, ...]]:
        with database.connect() as connection:
            return _rows(connection, wanted, *part)

    keyed = wanted.keys is not None or wanted.users is not None or {"user_id", "api_key_id"} & {*wanted.by}
    coarsest = 2 if wanted.width < HOUR else 1 if wanted.width < DAY or keyed else 0
    parts = list(_parts(wanted.start, wanted.end, coarsest))
    if len(parts) > 1:
        with ThreadPoolExecutor(len(parts)) as pool:
            pieces = list(pool.map(read, parts))
    else:
        pieces = [read(part) for part in parts]
    found: list[tuple[Any, ...]] = []
    for rows in pieces:
        if found and rows and found[-1][0] == rows[0][0]:
            _join(found, rows, 1 + len(wanted.by))
        else:
            found += rows
    return found


def _join(found: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], width: int) -> None:
    """Adds rows to those found before, whose last bucket may be their first one; width is that of what they are by."""
    bucket = rows[0][0]
    first = bisect_left(found, bucket, key=itemgetter(0))
    last = bisect_right(rows, bucket, key=itemgetter(0))
    both: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for row in (*found[first:], *rows[:last]):
        before = both.get(row[:width])
        both[row[:width]] = row[width:] if before is None else tuple(map(add, before, row[width:]))
    found[first:] = [(*key, *figures) for key, figures in both.items()]
    found += rows[last:]


def _parts(start: int, end: int, at: int) -> Iterator[tuple[_Source, int, int]]:
    """Splits a span so that each part is whole rows of a source, the coarsest where it fits."""
    if start >= end:
        return
    source = SOURCES[at]
    first, last = -(-start // source.unit) * source.unit, end // source.unit * source.unit
    if first >= last:
        yield from _parts(start, end, at + 1)
        return
    if start < first:
        yield from _parts(start, first, at + 1)
    yield source, first, last
    if last < end:
        yield from _parts(last, end, at + 1)


def _rows(connection: Connection, wanted: Wanted, source: _Source, start: int, end: int) -> list[tuple[Any, ...]]:
    table, columns = source.table, source.table.c
    time = columns[source.time]
    bucket = time if source.unit == wanted.width else time - time % wanted.width
    by: list[ColumnElement[Any]] = [
        api_keys.c.owner_id if name == "user_id" else columns[NAMES[name]] for name in wanted.by
    ]
    # the rows of a month may be a hundred thousand: those that are the sums already are not added up again
    ready = source.unit == wanted.width and source.whole == frozenset(wanted.by) and wanted.kind is not None
    figures: list[ColumnElement[Any]] = [_figure(source, name, ready) for name in wanted.figures]
    query = _filtered(select(bucket.label("bucket"), *by, *figures), wanted, source)
    query = query.where(time >= start, time < end)
    if "user_id" in wanted.by:
        query = query.select_from(table.outerjoin(api_keys, api_keys.c.id == columns.key_id))
    if not ready:
        query = query.group_by("bucket", *by)
    return _fetched(connection, query.subquery())


def _fetched(connection: Connection, query: Subquery) -> list[tuple[Any, ...]]:
    """The rows of a query, by bucket. The database hands them over as JSON, all of a bucket at once: a hundred thousand
    steps of the driver, each of which lets the interpreter go and wants it back, would take minutes under load."""
    first, *_ = columns = list(query.columns)
    collected: ColumnElement[Any] = func.json_group_array(func.json_array(*columns))
    if connection.dialect.name == "postgresql":
        collected = cast(func.json_agg(func.json_build_array(*columns)), Text)
    buckets = connection.execute(select(first, collected).group_by(first).order_by(first)).all()
    return [row for _, rows in buckets for row in read_tuples(rows)]


def _figure(source: _Source, name: str, ready: bool) -> ColumnElement[Any]:
    if source.table is ledger and name == "requests":
        return func.count()
    column = source.table.c[name]
    return column if ready else cast(func.sum(column), BigInteger)


def _filtered(query: Select[Any], wanted: Wanted, source: _Source) -> Select[Any]:
    table, columns = source.table, source.table.c
    if table is ledger:
        query = query.where(columns.attempt > 0)
    if wanted.kind is not None and table is ledger:
        query = query.where(columns.task.in_([task for task, kind in KINDS.items() if kind == wanted.kind]))
    elif wanted.kind is not None:
        query = query.where(columns.kind == wanted.kind)
    if wanted.projects is not None:
        query = query.where(columns.project_id.in_(wanted.projects))
    if wanted.keys is not None:
        query = query.where(columns.key_id.in_(wanted.keys))
    if wanted.users is not None:
        owned = select(api_keys.c.id).where(api_keys.c.owner_id.in_(wanted.users))
        query = query.where(columns.key_id.in_(owned))
    if wanted.models is not None:
        query = query.where(columns.model.in_(wanted.models))
    return query
