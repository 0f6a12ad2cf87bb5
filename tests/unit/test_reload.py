"""What a changed file is told by, and what may change while a server runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mission.front import CERTIFICATE
from tertulia.accounts.credentials import Credentials
from tertulia.config import Settings, Upstream
from tertulia.errors import SettingsError
from tertulia.gateway.names import Names
from tertulia.reload import LIVE, changes, fingerprint, settled, sources
from tertulia.server import check_models, far_engines, idle_names, mocks


def test_every_live_setting_exists() -> None:
    assert set(Settings.__struct_fields__) >= LIVE
    assert {"host", "port", "data", "database", "threads", "models", "config"}.isdisjoint(LIVE)


def test_what_cannot_change_keeps_its_value_and_is_named() -> None:
    old = Settings(port=1, threads=2, retries=3)
    new = Settings(port=5, threads=2, retries=4, spend_limit=1.5)
    assert settled(new, old) == (Settings(port=1, threads=2, retries=4, spend_limit=1.5), ["port"])
    assert settled(old, old) == (old, [])


def test_what_has_changed_is_told_by_names_alone() -> None:
    upstreams = {"a": Upstream(base_url="http://a/v1", key="env:OLD"), "b": Upstream(base_url="http://b/v1")}
    old = Settings(retries=3, upstreams=upstreams, aliases={"x": "y"})
    other = Upstream(base_url="http://a/v1", key="env:NEW")
    new = Settings(retries=4, upstreams={**upstreams, "a": other}, aliases={"x": "y", "z": "y"})
    assert sorted(changes(new, old)) == ["aliases.z", "retries", "upstreams.a"]
    assert changes(old, old) == []


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


def test_an_upstream_whose_certificates_changed_is_made_anew(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(CERTIFICATE.read_bytes())
    settings = Settings(upstreams={"u": Upstream(base_url="https://far.example/v1", tls_ca=str(ca))})
    first = far_engines(settings, {}, Credentials())
    assert far_engines(settings, first, Credentials())["u"] is first["u"]
    ca.write_bytes(CERTIFICATE.read_bytes() + b"\n")
    second = far_engines(settings, first, Credentials())["u"]
    assert second is not first["u"] and second.engine.pool is not first["u"].engine.pool


@pytest.mark.parametrize(
    ("far", "said"),
    [
        ({"models": {"m": "x"}, "prices": {"n": {"input": 1}}}, "upstreams.u.prices.n: it has no model of that name"),
        ({"models": {"m": "x"}, "context_length": {"n": 1}}, "upstreams.u.context_length.n: it has no model of that"),
        ({"discover": True, "prefix": "u/", "prices": {"n": {"input": 1}}}, None),
        ({"models": {"m": "x"}, "prices": {"m": {"input": 1}}, "context_length": {"u/other": 9}}, None),
    ],
)
def test_what_is_said_of_a_model_that_an_upstream_does_not_have(tmp_path: Path, far: Any, said: str | None) -> None:
    given = {"base_url": "http://far.example/v1", **far}
    routes = {"r": {"targets": [{"upstream": "u", "model": "other"}]}}
    models = {"chat_model": "mock", "embedding_model": "mock-embedding"}
    settings = msgspec.convert({"data": str(tmp_path), "upstreams": {"u": given}, "routes": routes, **models}, Settings)
    if said is None:
        check_models(settings)
        names = Names.of(settings, [*mocks(settings), far_engines(settings, {}, Credentials())["u"].engine])
        lines = idle_names(settings, names, ())
        assert lines == (["upstreams.u.prices.n: no model of it can have that name"] if "discover" in far else [])
        return
    with pytest.raises(SettingsError, match=said):
        check_models(settings)
