"""The database: its tables and how it is opened. SQLite in the data directory by default, PostgreSQL by URL.

No request waits for it: what the hot path needs is read into memory at start and written behind.
"""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import BigInteger, Column, Engine, Integer, LargeBinary, MetaData, String, Table, create_engine, event

from ..errors import SettingsError

SCHEMA = 1  # version of the tables below; a database with a newer one is refused

metadata = MetaData()

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(256), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
projects = Table(
    "projects",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("organization_id", String(64), nullable=False),
    Column("name", String(256), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),  # project or admin
    Column("organization_id", String(64), nullable=False),
    Column("project_id", String(64)),
    Column("name", String(256), nullable=False),
    Column(
        "hash", LargeBinary(32), nullable=False, unique=True
    ),  # keyed BLAKE2b of the key; the key itself is not kept
    Column("hint", String(32), nullable=False),  # first and last characters, to recognise it by
    Column("created_at", BigInteger, nullable=False),
)
versions = Table("schema_version", metadata, Column("version", Integer, primary_key=True))


def open_database(data: Path, url: str | None = None) -> Engine:
    """Opens the database and makes its tables if it is new. Raises SettingsError if it cannot be used."""
    if url is None:
        file = data / "tertulia.db"
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # readable by its owner only, and so its -wal and -shm
        url = f"sqlite:///{file}"
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    with engine.begin() as connection:
        metadata.create_all(connection)
        found = connection.execute(versions.select()).scalar()
        if found is None:
            connection.execute(versions.insert().values(version=SCHEMA))
        elif found > SCHEMA:
            raise SettingsError(
                f"The database has version {found}, this program knows {SCHEMA}: it was written by a newer Tertulia."
            )
    return engine


def _prepare_sqlite(connection: object, record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
