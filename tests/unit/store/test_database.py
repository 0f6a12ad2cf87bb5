"""The database opens, opens again, and refuses what a newer program wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from tertulia.errors import SettingsError
from tertulia.store.database import SCHEMA, metadata, open_database, versions


def test_it_makes_its_tables_once_and_opens_again(tmp_path: Path) -> None:
    for _ in range(2):
        engine = open_database(tmp_path)
        assert set(inspect(engine).get_table_names()) == set(metadata.tables)
        with engine.connect() as connection:
            assert [row.version for row in connection.execute(versions.select())] == [SCHEMA]
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        engine.dispose()


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    engine = open_database(tmp_path)
    with engine.begin() as connection:
        connection.execute(versions.update().values(version=SCHEMA + 1))
    with pytest.raises(SettingsError, match="written by a newer Tertulia"):
        open_database(tmp_path)


def test_a_url_is_used_as_given(tmp_path: Path) -> None:
    open_database(tmp_path, f"sqlite:///{tmp_path / 'other.db'}").dispose()
    assert [path.name for path in tmp_path.glob("*.db")] == ["other.db"]
