"""Who may come in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import select

from tertulia.accounts.directory import Directory, check_headers, check_kind, mask
from tertulia.core import Principal
from tertulia.errors import Forbidden, SettingsError, Unauthorized
from tertulia.store.database import api_keys, open_database, organizations

KEY, ADMIN = "sk-test-0123456789abcdef", "sk-admin-0123456789abcdef"


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(open_database(tmp_path), tmp_path)


def test_first_start_makes_two_keys_that_work_and_only_once(directory: Directory, tmp_path: Path) -> None:
    keys = directory.first_start(None, None)
    assert keys is not None
    who, admin = (directory.authenticate(key.encode()) for key in keys)
    assert keys[0].startswith("sk-proj-") and keys[1].startswith("sk-admin-") and len(keys[0]) > 40
    assert (who.kind, admin.kind) == ("project", "admin")
    assert (who.organization, who.project) == directory.home() and who.organization == admin.organization
    assert who.organization.startswith("org-") and who.project.startswith("proj_") and admin.project == ""
    assert directory.first_start(None, None) is None and len(directory) == 2
    again = Directory(open_database(tmp_path), tmp_path)
    assert again.authenticate(keys[0].encode()).key_id == who.key_id


def test_given_keys_are_taken(directory: Directory) -> None:
    assert directory.first_start(KEY, ADMIN) == (KEY, ADMIN)
    assert directory.authenticate(KEY.encode()).kind == "project"


@pytest.mark.parametrize(
    ("key", "admin", "said"),
    [("short", None, "api_key: a key needs at least 16 characters"), (None, "has a space in it...", "admin_key: a key"),
     ("a\x00aaaaaaaaaaaaaaaaa", None, "api_key: a key"), (KEY, KEY, "must differ")],
)  # fmt: skip
def test_a_refused_key_leaves_the_directory_empty(
    directory: Directory, key: str | None, admin: str | None, said: str
) -> None:
    with pytest.raises(SettingsError) as error:
        directory.first_start(key, admin)
    assert said in error.value.message and (key is None or key not in error.value.message)
    assert directory.first_start(None, None) is not None  # the next start is a first start still


def test_keys_are_kept_as_hashes_only(directory: Directory, tmp_path: Path) -> None:
    directory.first_start(KEY, ADMIN)
    with directory._database.connect() as connection:
        rows = connection.execute(select(api_keys)).all()
        assert len(connection.execute(select(organizations)).all()) == 1
    assert {row.hint for row in rows} == {mask(KEY), mask(ADMIN)} and all(len(row.hash) == 32 for row in rows)
    directory._database.dispose()
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes() and ADMIN.encode() not in path.read_bytes()


def test_the_pepper_is_the_owners_alone_and_makes_the_hash(directory: Directory, tmp_path: Path) -> None:
    directory.first_start(KEY, ADMIN)
    secret = tmp_path / "secret"
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600 and len(secret.read_bytes()) == 32
    secret.write_bytes(bytes(32))
    with pytest.raises(Unauthorized):
        Directory(open_database(tmp_path), tmp_path).authenticate(KEY.encode())
    secret.write_bytes(b"short")
    with pytest.raises(SettingsError, match="damaged"):
        Directory(open_database(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "key", [b"sk-invalid-key-for-test-only", b"", b"\xff" * 20, KEY.encode() + b"x", KEY.encode()[:-1]]
)
def test_an_unknown_key(directory: Directory, key: bytes) -> None:
    directory.first_start(KEY, ADMIN)
    with pytest.raises(Unauthorized) as error:
        directory.authenticate(key)
    assert (error.value.status, error.value.code) == (401, "invalid_api_key")
    assert error.value.message == (
        f"Incorrect API key provided: {mask(key.decode('latin-1'))}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )


def test_a_very_long_key_is_answered_shortly(directory: Directory) -> None:
    with pytest.raises(Unauthorized) as error:
        directory.authenticate(b"k" * 100_000)
    assert len(error.value.message) < 200


@pytest.mark.parametrize(
    ("key", "masked"),
    [("sk-invalid-key-for-test-only", "sk-inval****************only"), ("0123456789abcdef", "01234567****cdef"),
     ("short-key", "sh*******"), ("", ""), ("x" * 600, "x" * 8 + "*" * 32 + "x" * 4)],
)  # fmt: skip
def test_masks(key: str, masked: str) -> None:
    assert mask(key) == masked


def test_a_new_key_is_let_in_at_once(directory: Directory) -> None:
    directory.first_start(KEY, ADMIN)
    organization, project = directory.home()
    ids = directory.add_keys(
        ["sk-test-one-0123456789", "sk-test-two-0123456789"], "project", organization, project, "n"
    )
    assert directory.authenticate(b"sk-test-two-0123456789").key_id == ids[1] != ids[0]


WHO = Principal("key_1", "org-1", "proj_1")


def test_headers_must_be_those_of_the_key() -> None:
    check_headers(WHO, None, None)
    check_headers(WHO, b"org-1", b"proj_1")
    check_headers(Principal("key_2", "org-1", "", "admin"), b"org-1", b"proj_any")
    with pytest.raises(Unauthorized) as error:
        check_headers(WHO, b"org-2", b"proj_1")
    assert error.value.code == "mismatched_organization"
    with pytest.raises(Unauthorized) as error:
        check_headers(WHO, b"org-1", b"proj_2")
    assert error.value.code == "mismatched_project"


def test_kinds() -> None:
    check_kind(WHO, "project")
    with pytest.raises(Forbidden, match="needs an admin key"):
        check_kind(WHO, "admin")
    with pytest.raises(Forbidden, match="needs a project key"):
        check_kind(Principal("key_2", "org-1", "", "admin"), "project")
