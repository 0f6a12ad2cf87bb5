"""What a changed file is told by, and what may change while a server runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tertulia.config import Settings, Upstream
from tertulia.reload import LIVE, fingerprint, settled, sources


def test_every_live_setting_exists() -> None:
    assert set(Settings.__struct_fields__) >= LIVE
    assert {"host", "port", "data", "database", "threads", "models", "config"}.isdisjoint(LIVE)


def test_what_cannot_change_keeps_its_value_and_is_named() -> None:
    old = Settings(port=1, threads=2, retries=3)
    new = Settings(port=5, threads=2, retries=4, spend_limit=1.5)
    assert settled(new, old) == (Settings(port=1, threads=2, retries=4, spend_limit=1.5), ["port"])
    assert settled(old, old) == (old, [])


def test_the_files_a_configuration_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    upstreams = {
        "a": Upstream(base_url="http://a/v1", key="file:~/key"),
        "b": Upstream(base_url="https://b/v1", key="env:KEY", tls_ca="ca.pem"),
    }
    assert sources(Settings(config="t.toml", upstreams=upstreams)) == ["t.toml", "/somebody/key", "ca.pem"]
    assert sources(Settings()) == []


def test_a_fingerprint_changes_with_every_way_of_writing_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    seen = set()

    def look() -> None:
        seen.add(fingerprint([str(path)]))

    look()
    assert seen == {(None,)}
    path.write_text("a")
    os.utime(path, ns=(1, 1))
    look()
    path.write_text("ab")  # in place, within the clock's grain
    os.utime(path, ns=(1, 1))
    look()
    other = tmp_path / "other"
    other.write_text("ab")
    os.utime(other, ns=(1, 1))
    other.replace(path)  # another file of the same size and time
    look()
    os.utime(path, ns=(2, 2))
    look()
    assert len(seen) == 5
    assert fingerprint([str(path)]) in seen
