"""The database: how it is opened, and how an older one is brought to the tables of schema.py. SQLite in the data
directory by default, PostgreSQL by URL.

No request waits for it: what the hot path needs is read into memory at start and written behind. Reading and writing
differ: `engine.connect()` reads, with SQLite in one snapshot; `engine.begin()` writes, with SQLite under the one lock
there is for writers, taken at once, so that no writer fails in the middle for what another one did meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    column,
    create_engine,
    delete,
    event,
    exc,
    insert,
    inspect,
    make_url,
    select,
    table,
    text,
)  # fmt: skip
from sqlalchemy.engine import ExceptionContext

from ..errors import SettingsError
from .schema import counters, facts, metadata, schema_version

log = logging.getLogger("tertulia.store")

HEAD = "0002"  # the newest of migrations/versions, and what schema.py describes; older ones sort before it
WAIT_SECONDS = 5  # for a lock that somebody else holds, for a connection, and for a free one of the pool
STATEMENT_SECONDS = 20  # after which PostgreSQL ends a statement; who hears nothing of that waits WAIT_SECONDS more
IDLE_SECONDS = 30  # after which PostgreSQL ends a transaction in which nothing happens
OURS = 0x7465727475  # the advisory lock of PostgreSQL under which one process at a time makes or changes tables

# What is raised when the database cannot do what is asked: busy, read-only, full, gone. A row that is there already
# (IntegrityError) is a DBAPIError, too, and not meant.
FAILURES = (exc.DBAPIError, exc.TimeoutError)

BROKEN = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_CORRUPT)
READ_ONLY = "25006"  # as PostgreSQL calls it

versions = table("alembic_version", column("version_num"))


class Database(Engine):
    """An engine whose begin() takes SQLite's writing lock at once."""

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        with self.connect() as connection, connection.execution_options(writes=True).begin():
            yield connection


def open_database(data: Path, url: str | None = None) -> Database:
    """Opens the database, makes its tables if it is new, and brings them forward if an older Tertulia made them.

    Raises SettingsError if it cannot be used or a newer Tertulia wrote it; then it is as it was.
    """
    engine = connect(data, url)
    if engine.dialect.name == "sqlite":
        _make_file(file_of(engine))
    try:
        if _stamp(engine) != HEAD:
            _bring_forward(engine, data)
    except FAILURES as error:
        engine.dispose()
        raise SettingsError(f"database: {name_of(engine)} cannot be used: {reason(error)}") from None
    except BaseException:  # whatever it was, nobody else can close what was opened
        engine.dispose()
        raise
    return engine


def connect(data: Path, url: str | None = None) -> Database:
    """An engine for the database, whatever is in it: nothing is read or made. Raises SettingsError for a wrong URL."""
    if url is None:
        return _sqlite(URL.create("sqlite", database=str(data / "tertulia.db")))
    try:
        place = make_url(url)
    except (exc.ArgumentError, ValueError):  # whose text may hold a password
        raise SettingsError("database: this is no URL; expected postgresql://USER@HOST/NAME") from None
    kind = place.drivername.partition("+")[0]
    if kind == "sqlite" and place.database and place.database != ":memory:":
        return _sqlite(place)
    if kind in ("postgresql", "postgres"):
        return _postgresql(place)
    raise SettingsError("database: expected a URL of PostgreSQL (postgresql://...) or of a file (sqlite:///FILE)")


def found_version(connection: Connection) -> str | None:
    """The version of the tables that are there: None if there are none. Raises SettingsError if a newer Tertulia made
    them, or somebody else."""
    there = set(inspect(connection).get_table_names())
    found: str | None = None
    if "alembic_version" in there:
        found = connection.execute(select(versions.c.version_num)).scalar()
    elif "schema_version" in there:  # of Tertulia 0.1, which had no Alembic; its 1 is our 0001
        found = f"{connection.execute(select(schema_version.c.version)).scalar() or 1:04}"
    elif taken := sorted(there & metadata.tables.keys()):
        raise SettingsError(
            f"database: it has a table `{taken[0]}` that Tertulia did not make; give Tertulia a database of its own"
        )
    if found is not None and found > HEAD:
        raise SettingsError(
            f"The database has version {found}, this program knows {HEAD}: it was written by a newer Tertulia."
        )
    return found


def make_tables(connection: Connection) -> None:
    """All tables, as schema.py has them today."""
    metadata.create_all(connection)
    connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    connection.execute(insert(versions).values(version_num=HEAD))
    connection.execute(insert(schema_version).values(version=int(HEAD)))
    connection.execute(insert(counters).values(name="directory", value=0))


def fact(connection: Connection, name: str) -> str | None:
    """What the database says of itself under that name."""
    value: str | None = connection.execute(select(facts.c.value).where(facts.c.name == name)).scalar()
    return value


def set_fact(connection: Connection, name: str, value: str) -> None:
    connection.execute(delete(facts).where(facts.c.name == name))
    connection.execute(insert(facts).values(name=name, value=value))


def name_of(engine: Engine) -> str:
    """What to call it in a message: its file, or its URL without the password."""
    if engine.dialect.name == "sqlite":
        return str(engine.url.database)
    return engine.url.set(drivername="postgresql", query={}).render_as_string()


def file_of(engine: Engine) -> Path:
    """Where SQLite has it."""
    return Path(str(engine.url.database)).absolute()


def reason(error: BaseException) -> str:
    """The driver's own words, on one line."""
    said = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
    return " ".join(said.split())


# making and changing tables
def _stamp(engine: Engine) -> str | None:
    try:
        with engine.connect() as connection:
            found: str | None = connection.execute(select(versions.c.version_num)).scalar()
            return found
    except (exc.OperationalError, exc.ProgrammingError):  # no such table; or worse, which shows when it is looked into
        return None


def _bring_forward(engine: Database, data: Path) -> None:
    """Under a lock, since two gateways may start at once: makes the tables, or changes those of an older release."""
    with engine.begin() as connection:
        exclusive(connection)
        found = found_version(connection)
        if found is None:
            make_tables(connection)
        elif found != HEAD:
            _refuse_served(data)
            log.warning("the database is brought from version %s to %s", found, HEAD)
            if engine.dialect.name == "sqlite":  # PostgreSQL has backups of its own, and changes tables or does not
                _copy(file_of(engine), found)
            migrate(connection, found, HEAD)


def exclusive(connection: Connection) -> None:
    """Waits until no other process makes or changes tables, however long; until the writer's transaction ends."""
    if connection.dialect.name == "postgresql":  # with SQLite it is the only writer anyway
        unhurried(connection)
        connection.execute(text(f"SELECT pg_advisory_xact_lock({OURS})"))


def unhurried(connection: Connection) -> None:
    """Nothing in this transaction takes too long."""
    if connection.dialect.name == "postgresql":
        for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(text(f"SET LOCAL {name} = 0"))
        connection.connection.driver_connection.patience = None  # type: ignore[union-attr]


def migrate(connection: Connection, found: str | None, to: str) -> None:
    """Brings the tables from one version (None: there are none) to another, within the transaction of connection.
    Raises SettingsError; then nothing of it may stay."""
    from alembic import command  # half a second to import, and seldom needed
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        if found is not None and not inspect(connection).has_table("alembic_version"):
            command.stamp(config, found)
        command.upgrade(config, to)
    except (*FAILURES, exc.SQLAlchemyError, CommandError, ValueError) as error:
        raise SettingsError(
            f"The database could not be brought from version {found} to {to}: {reason(error)}. It is as it was."
        ) from error


def _copy(file: Path, found: str) -> None:
    """Keeps SQLite's file as it was, beside it. Raises SettingsError if there is no room for that."""
    copy = file.with_name(f"{file.name}.{found}")
    partial = file.with_name(f"{copy.name}.{os.getpid()}")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(partial)) as target,
        ):
            source.backup(target)
        os.replace(partial, copy)
    except (OSError, sqlite3.Error) as error:
        partial.unlink(missing_ok=True)
        raise SettingsError(f"No copy of {file} could be made before its tables are changed: {error}") from None
    log.warning("as it was it is kept in %s", copy)


def _refuse_served(data: Path) -> None:
    """An older Tertulia that is still serving this directory must not find other tables than its own."""
    try:
        lock = os.open(data / "serve.lock", os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(lock, 64, 0).split(b" ")[0].strip().decode("ascii", "replace")
        if pid != str(os.getpid()):
            raise SettingsError(
                f"The database is of an older Tertulia, and `tertulia serve` (process {pid or 'unknown'}) uses it. "
                "Stop that first."
            ) from None
    except OSError:  # a file system without locks
        pass
    finally:
        os.close(lock)


# the two kinds
def _make_file(file: Path) -> None:
    """Readable by its owner only, and so its -wal and -shm."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise SettingsError(f"database: {file} cannot be used: {error.strerror}") from None


def _sqlite(url: URL) -> Database:
    file = Path(str(url.database)).absolute()

    def opened() -> sqlite3.Connection:
        # mode=rw: a file that is gone is an error, and no new one; isolation_level: transactions are begun below
        name = f"file:{quote(str(file))}?mode=rw"
        return sqlite3.connect(name, WAIT_SECONDS, isolation_level=None, check_same_thread=False, uri=True)

    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        status = os.stat(file)
        record.info["file"] = status.st_dev, status.st_ino
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    def still_there(connection: sqlite3.Connection, record: Any, proxy: object) -> None:
        """SQLite goes on writing into a file that was deleted or replaced; what it says then would be lost."""
        try:
            status = os.stat(file)
        except OSError:
            raise exc.DisconnectionError(f"{file} is gone") from None
        if record.info.get("file") != (status.st_dev, status.st_ino):
            raise exc.DisconnectionError(f"{file} was replaced")

    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    engine = _engine(url, creator=opened)
    event.listen(engine.pool, "connect", prepare)
    event.listen(engine.pool, "checkout", still_there)
    event.listen(engine, "begin", begin)
    return engine


def _postgresql(url: URL) -> Database:
    try:
        import psycopg  # noqa: F401  # an extra

        from .postgresql import Impatient
    except ImportError:
        raise SettingsError(
            "database: PostgreSQL needs a driver that is not installed: pip install 'tertulia[postgresql]'"
        ) from None
    options: dict[str, Any] = {  # what the URL says itself wins
        "connect_timeout": WAIT_SECONDS, "client_encoding": "utf8", "application_name": "tertulia",
        "keepalives_idle": 10, "keepalives_interval": 3, "keepalives_count": 3, "tcp_user_timeout": 15_000,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if name not in url.query}

    def prepare(connection: Any, record: object) -> None:
        connection.autocommit = True
        for setting, seconds in (
            ("statement_timeout", STATEMENT_SECONDS),
            ("idle_in_transaction_session_timeout", IDLE_SECONDS),  # else who stops halfway stops all gateways
            ("lock_timeout", WAIT_SECONDS),
        ):
            connection.execute(f"SET {setting} = '{seconds}s'")
        connection.autocommit = False

    def impatient(connection: Any, record: object) -> None:
        if connection is not None:  # it broke
            connection.patience = STATEMENT_SECONDS + WAIT_SECONDS

    engine = _engine(
        url.set(drivername="postgresql+psycopg"), connect_args=options, pool_pre_ping=True, pool_recycle=1800
    )
    event.listen(engine, "do_connect", lambda _dialect, _record, words, named: Impatient.connect(*words, **named))
    event.listen(engine.pool, "connect", prepare)
    event.listen(engine.pool, "connect", impatient)
    event.listen(engine.pool, "checkin", impatient)
    return engine


def _engine(url: URL, **options: Any) -> Database:
    made = create_engine(url, pool_timeout=WAIT_SECONDS, **options)
    engine = Database(made.pool, made.dialect, made.url)
    event.listen(engine, "handle_error", _begin_anew)
    return engine


def _begin_anew(context: ExceptionContext) -> None:
    """A connection to what was read-only stays so when that no longer is, and one that failed to read or write may have
    more of it: like a connection that broke, these are closed, and all others with them."""
    error = context.original_exception
    if isinstance(error, sqlite3.Error):
        context.is_disconnect |= (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in BROKEN
    else:
        context.is_disconnect |= getattr(error, "sqlstate", None) == READ_ONLY
