"""Answers on disk: what is written is read back, over restarts; room is bounded; a damaged file costs hits only."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tertulia.core import Usage
from tertulia.store import answers
from tertulia.store.answers import Answer, Answers

MB = 1_000_000


def key(number: int) -> bytes:
    return number.to_bytes(8, "big") * 4


def answer(text: bytes = b'{"a":1}', stored: float | None = None) -> Answer:
    stored = time.time() if stored is None else stored
    return Answer("mock", b"x-tertulia-model: mock\r\n", stored, [text], Usage(1, 2), len(text))


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


async def settled(it: Answers) -> None:
    await it.get(b"")  # one thread, in order


def test_over_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        it = Answers(tmp_path / "cache.db", MB, 60)
        assert key(1) in it  # until it has looked
        await settled(it)
        assert key(1) not in it and await it.get(key(1)) is None
        one = answer()
        it.put(key(1), one)
        it.put(key(2), answer(b"2"))
        await settled(it)
        assert key(1) in it and await it.get(key(1)) == one and len(it) == 2
        it.put(key(1), answer(b"new"))
        it.close()
        it = Answers(tmp_path / "cache.db", MB, 60)
        found = await it.get(key(1))
        assert found is not None and found.pieces == [b"new"] and found.usage == Usage(1, 2)
        assert len(it) == 2 and key(3) not in it and it.bytes > 0
        it.close()

    run(test)


def test_the_owner_alone_reads_it(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "cache.db"
        path.touch(0o644)
        it = Answers(path, MB, 60)
        it.put(key(1), answer())
        await settled(it)
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        assert set(modes.values()) == {0o600} and "cache.db-wal" in modes
        it.close()

    run(test)


def test_room(tmp_path: Path) -> None:
    async def test() -> None:
        it = Answers(tmp_path / "cache.db", 20_000, 60)
        for number in range(8):
            it.put(key(number), answer(b"x" * 2000))
        await settled(it)
        await it.get(key(0))
        it.touch(key(1))
        it.put(key(8), answer(b"x" * 2000))
        it.put(key(9), answer(b"x" * 2000))
        it.put(key(10), answer(b"x" * 2600))  # more than an eighth
        await settled(it)
        assert it.bytes <= 20_000 and key(10) not in it
        assert all(key(number) in it for number in (0, 1, 8, 9)) and key(2) not in it
        assert await it.get(key(2)) is None
        it.close()
        it = Answers(tmp_path / "cache.db", 5_000, 60)
        await settled(it)
        assert it.bytes <= 5_000 and 1 <= len(it) <= 2
        it.close()

    run(test)


def test_what_is_too_old_is_gone_at_the_next_start(tmp_path: Path) -> None:
    async def test() -> None:
        it = Answers(tmp_path / "cache.db", MB, 60)
        it.put(key(1), answer(stored=time.time() - 100))
        it.put(key(2), answer())
        it.close()
        it = Answers(tmp_path / "cache.db", MB, 60)
        await settled(it)
        assert key(1) not in it and key(2) in it
        it.close()

    run(test)


@pytest.mark.parametrize("damage", [b"garbage" * 5000, b"", "page", "version"])
def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    async def test() -> None:
        path = tmp_path / "cache.db"
        it = Answers(path, MB, 60)
        for number in range(20):
            it.put(key(number), answer(b"x" * 5000))
        it.close()
        data = path.read_bytes()
        if damage == "version":
            with sqlite3.connect(path) as database:
                database.execute("PRAGMA user_version=99")
        else:
            path.write_bytes(data[:100] + b"\xff" * (len(data) - 100) if damage == "page" else damage)
        it = Answers(path, MB, 60)
        await settled(it)
        assert await it.get(key(1)) is None
        it.put(key(1), answer())
        await settled(it)
        assert await it.get(key(1)) is not None
        it.close()

    with caplog.at_level(logging.WARNING):
        run(test)
    aside = (tmp_path / "cache.db.damaged").exists()
    assert aside is ("damaged" in caplog.text) is (damage not in (b"", "version"))


def test_damage_found_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        it = Answers(tmp_path / "cache.db", MB, 60)
        await settled(it)

        def broken(key: bytes) -> None:
            error = sqlite3.DatabaseError("malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error

        it._read = broken  # type: ignore[method-assign, assignment]
        assert await it.get(key(1)) is None
        del it._read
        it.put(key(1), answer())
        assert await it.get(key(1)) is not None
        it.close()

    run(test)
    assert (tmp_path / "cache.db.damaged").exists()


def test_a_place_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        (tmp_path / "cache.db").mkdir()
        it = Answers(tmp_path / "cache.db", MB, 60)
        it.put(key(1), answer())
        assert await it.get(key(1)) is None and key(1) not in it
        it.close()

    with caplog.at_level(logging.WARNING):
        run(test)
    assert "answers cannot be kept in cache.db" in caplog.text


def test_what_the_disk_does_not_take_fast_enough_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(answers, "WAITING_LIMIT", 10_000)
        it = Answers(tmp_path / "cache.db", MB, 60)
        await settled(it)
        it._thread.submit(time.sleep, 0.05)
        for number in range(20):
            it.put(key(number), answer(b"x" * 1000))
        await settled(it)
        assert len(it) == 10 and it._waiting == 0
        it.close()

    run(test)
