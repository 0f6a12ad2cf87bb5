"""Who may come in, on both kinds of database."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, select, text, update

from tertulia.accounts import change as change_module
from tertulia.accounts import directory as directory_module
from tertulia.accounts.audit import itself, local
from tertulia.accounts.change import FORGOTTEN_SECONDS, Change, forget
from tertulia.accounts.directory import Directory, check_headers, check_kind
from tertulia.accounts.keys import KEY_LIMIT, mask
from tertulia.accounts.limits import KINDS, TOKENS
from tertulia.accounts.projects import ModelPermissions, RateLimit, SpendLimit
from tertulia.core import Principal
from tertulia.errors import BadRequest, Conflict, Forbidden, NotFound, SettingsError, Unauthorized, Unavailable
from tertulia.store.database import open_database
from tertulia.store.schema import api_keys, audit_logs, counters, organizations, records

KEY, ADMIN = "sk-test-0123456789abcdef", "sk-admin-0123456789abcdef"
ME = local("ada")


@pytest.fixture
def engine(tmp_path: Path, database: str) -> Iterator[Engine]:
    engine = open_database(tmp_path, database)
    yield engine
    engine.dispose()


@pytest.fixture
def directory(tmp_path: Path, engine: Engine) -> Directory:
    return Directory(engine, tmp_path)


@pytest.fixture
def started(directory: Directory) -> Directory:
    """One that has had its first start."""
    directory.first_start(KEY, ADMIN)
    return directory


def other(directory: Directory, tmp_path: Path) -> Directory:
    """As another process has it."""
    return Directory(directory._database, tmp_path)


def new_key(directory: Directory, **about: Any) -> tuple[str, str]:
    """(id, secret) of a key of the first project that nobody owns."""
    with directory.change(ME) as change:
        row, secret = directory.create_key(change, "project", directory.home()[1], None, "Key", **about)
    return row["id"], secret


def refused(directory: Directory, key: str | bytes) -> Unauthorized:
    with pytest.raises(Unauthorized) as error:
        directory.authenticate(key.encode() if isinstance(key, str) else key)
    assert error.value.status == 401
    return error.value


def rows_of(directory: Directory, table: Any) -> list[Any]:
    with directory.connect() as connection:
        return list(connection.execute(select(table)))


# the first start


def test_first_start_makes_two_keys_that_work_and_only_once(directory: Directory, tmp_path: Path) -> None:
    keys = directory.first_start(None, None)
    assert keys is not None
    who, admin = (directory.authenticate(key.encode()) for key in keys)
    assert keys[0].startswith("sk-proj-") and keys[1].startswith("sk-admin-")
    assert (who.kind, admin.kind) == ("project", "admin")
    assert (who.organization, who.project) == directory.home() and who.organization == admin.organization
    assert who.organization.startswith("org-") and who.project.startswith("proj_") and admin.project == ""
    assert who.account is directory.projects[who.project] and admin.account is None
    assert directory.roles.owners() == [who.owner_id] == [admin.owner_id]
    assert directory.first_start(None, None) is None and len(directory) == 2
    again = other(directory, tmp_path)
    assert again.authenticate(keys[0].encode()).key_id == who.key_id
    assert again.first_start(None, None) is None


def test_a_key_has_256_random_bits(started: Directory) -> None:
    secrets = {new_key(started)[1] for _ in range(20)}
    assert len(secrets) == 20 and all(len(secret.rpartition("-")[0]) > 0 for secret in secrets)
    assert all(len(secret.removeprefix("sk-proj-")) == 43 for secret in secrets)  # 6 bits each, and 4 of the last


def test_given_keys_are_taken(directory: Directory) -> None:
    assert directory.first_start(KEY, ADMIN) == (KEY, ADMIN)
    assert directory.authenticate(KEY.encode()).kind == "project"


@pytest.mark.parametrize(
    ("key", "admin", "said"),
    [("short", None, "api_key: a key needs at least 16 characters"), (None, "has a space in it...", "admin_key: a key"),
     ("a\x00aaaaaaaaaaaaaaaaa", None, "api_key: a key"), ("k" * 513, None, "at most 512"), (KEY, KEY, "must differ")],
)  # fmt: skip
def test_a_refused_key_leaves_the_directory_empty(
    directory: Directory, key: str | None, admin: str | None, said: str
) -> None:
    with pytest.raises(SettingsError) as error:
        directory.first_start(key, admin)
    assert said in error.value.message and (key is None or key not in error.value.message)
    assert directory.first_start(None, None) is not None  # the next start is a first start still


def test_two_processes_that_start_together_make_one_organization(tmp_path: Path, database: str) -> None:
    engines = [open_database(tmp_path, database) for _ in range(4)]
    directories = [Directory(engine, tmp_path) for engine in engines]
    made: list[object] = []
    threads = [threading.Thread(target=lambda d=d: made.append(d.first_start(None, None))) for d in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(keys is not None for keys in made) == 1 and len(made) == 4
    assert len(rows_of(directories[0], organizations)) == 1 and len(rows_of(directories[0], api_keys)) == 2
    for engine in engines:
        engine.dispose()


def test_a_database_without_users_gets_an_owner(started: Directory, tmp_path: Path) -> None:
    with started._database.begin() as connection:  # as an older Tertulia left it
        connection.execute(delete(records).where(records.c.kind == "user"))
        connection.execute(update(api_keys).values(owner_id=None))
    migrated = other(started, tmp_path)
    assert migrated.roles.owners() == []
    migrated.ensure_owner()
    migrated.ensure_owner()
    assert len(migrated.roles.owners()) == 1
    assert migrated.authenticate(ADMIN.encode()).owner_id is None
    assert migrated.roles.permissions(None) >= migrated.roles.permissions(migrated.roles.owners()[0])


# what is kept of keys


def test_keys_are_kept_as_hashes_only(started: Directory, tmp_path: Path, database: str) -> None:
    _, secret = new_key(started)
    rows = rows_of(started, api_keys)
    assert {row.hint for row in rows} == {mask(KEY), mask(ADMIN), mask(secret)}
    assert all(len(row.hash) == 32 for row in rows)
    started._database.dispose()
    for path in tmp_path.iterdir():
        for key in (KEY, ADMIN, secret):
            assert key.encode() not in path.read_bytes()
    assert not any(secret in str(row) for table in (audit_logs, records, api_keys) for row in rows_of(started, table))


def test_the_secret_is_the_owners_alone_and_makes_the_hash(started: Directory, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    kept = secret.read_bytes()
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600 and len(kept) == 32
    secret.write_bytes(bytes(32))
    with pytest.raises(SettingsError, match="made with another secret") as error:
        other(started, tmp_path)
    assert kept.hex() not in str(error.value)
    secret.write_bytes(b"short")
    with pytest.raises(SettingsError, match="damaged"):
        other(started, tmp_path)
    secret.write_bytes(kept)
    assert other(started, tmp_path).authenticate(KEY.encode()).kind == "project"


@pytest.mark.parametrize(
    "key", [b"sk-invalid-key-for-test-only", b"", b"\xff" * 20, KEY.encode() + b"x", KEY.encode()[:-1], b"\0" * 40]
)
def test_an_unknown_key(started: Directory, key: bytes) -> None:
    error = refused(started, key)
    assert error.code == "invalid_api_key"
    assert error.message == (
        f"Incorrect API key provided: {mask(key.decode('latin-1'))}. You can find your API key at "
        "https://platform.openai.com/account/api-keys."
    )


def test_a_key_of_the_longest_length_is_compared_whole(started: Directory) -> None:
    organization, project = started.home()
    longest = "k" * KEY_LIMIT
    started.add_key(longest, "project", organization, project, "long")
    assert started.authenticate(longest.encode()).kind == "project"
    refused(started, longest + "x")
    assert len(refused(started, b"k" * 100_000).message) < 200


@pytest.mark.parametrize(
    ("key", "masked"),
    [("sk-invalid-key-for-test-only", "sk-inval****************only"), ("0123456789abcdef", "01234567****cdef"),
     ("short-key", "sh*******"), ("", ""), ("x" * 600, "x" * 8 + "*" * 32 + "x" * 4)],
)  # fmt: skip
def test_masks(key: str, masked: str) -> None:
    assert mask(key) == masked


# keys


def test_a_new_key_is_let_in_at_once_and_by_others_at_their_next_look(started: Directory, tmp_path: Path) -> None:
    far = other(started, tmp_path)
    version = started.version, far.version
    id, secret = new_key(started, scopes=["api.model.read"])
    assert started.authenticate(secret.encode()).scopes == {"api.model.read"} and started.version > version[0]
    refused(far, secret)
    far.look()
    assert far.authenticate(secret.encode()).key_id == id and far.version > version[1]
    version = started.version, far.version
    for one in (started, far):
        one.look()
    assert version == (started.version, far.version)  # nothing was new


def test_the_same_secret_is_no_second_key(started: Directory) -> None:
    organization, project = started.home()
    with pytest.raises(Conflict):
        started.add_key(KEY, "project", organization, project, "again")
    assert len(started) == 2


def test_a_service_accounts_key_says_so(started: Directory) -> None:
    with started.change(ME) as change:
        account = change.create("service_account", started.home()[1], {"name": "robot", "role": "member"})
        row, secret = started.create_key(change, "project", started.home()[1], account.id, "robot")
    assert secret.startswith("sk-svcacct-") and started.authenticate(secret.encode()).owner_id == account.id
    with started.change(ME) as change:
        assert started.revoke_keys_of(change, account.id) == [row["id"]]
    refused(started, secret)


def test_scopes_and_end_are_changed_in_place(started: Directory) -> None:
    id, secret = new_key(started)
    who = started.authenticate(secret.encode())
    with started.change(ME) as change:
        row = started.update_key(change, id, scopes=["api.files.read"], expires_at=change.now + 100)
    assert who is started.authenticate(secret.encode())
    assert who.scopes == {"api.files.read"} and who.expires_at == row["expires_at"]
    with started.change(ME) as change:
        started.update_key(change, id, scopes=None)
    assert who.scopes is None and who.expires_at == row["expires_at"]  # what is not given stays
    assert started.key(id)["scopes"] is None


def test_a_revoked_key_is_told_so_and_stays_out(started: Directory, tmp_path: Path) -> None:
    far, (id, secret) = other(started, tmp_path), new_key(started)
    far.look()
    with started.change(ME) as change:
        started.revoke_key(change, id)
    far.look()
    for one in (started, far, other(started, tmp_path)):
        error = refused(one, secret)
        assert error.code == "invalid_api_key" and "has been revoked" in error.message
        assert "Incorrect API key" in refused(one, secret[:-1] + "?").message  # it must really be that key
    with pytest.raises(NotFound):
        started.key(id)
    for act in (started.revoke_key, started.update_key):
        with pytest.raises(NotFound), started.change(ME) as change:
            act(change, id)
    assert id not in {row["id"] for row in started.key_page(None, None, None, 100)[0]}


def test_a_key_expires_by_itself(started: Directory, tmp_path: Path) -> None:
    id, secret = new_key(started, expires_at=int(time.time()) + 1000)
    far = other(started, tmp_path)
    who = started.authenticate(secret.encode())
    who.expires_at = int(time.time())  # its time has come, and nobody has looked yet
    assert "has expired" in refused(started, secret).message
    assert far._memory.expire(time.time() + 999) is False and far._memory.expire(time.time() + 1001) is True
    assert "has expired" in refused(far, secret).message and len(far) == 2
    with started._database.begin() as connection:
        connection.execute(update(api_keys).where(api_keys.c.id == id).values(expires_at=int(time.time()) - 1))
    late = other(started, tmp_path)
    assert "has expired" in refused(late, secret).message
    assert "Incorrect API key" in refused(late, secret + "?").message
    with pytest.raises(BadRequest, match="expired"), late.change(ME) as change:
        late.update_key(change, id, expires_at=change.now + 100)
    assert late.key(id)["id"] == id  # it is still shown


def test_a_longer_life_outlives_the_first_end(started: Directory) -> None:
    id, secret = new_key(started, expires_at=int(time.time()) + 100)
    with started.change(ME) as change:
        started.update_key(change, id, expires_at=change.now + 1000)
    assert started._memory.expire(time.time() + 500) is False
    assert started.authenticate(secret.encode()).key_id == id


def test_rotation_lets_both_in_until_the_grace_ends(started: Directory) -> None:
    id, secret = new_key(started, scopes=["api.files.read"], expires_at=int(time.time()) + 1000)
    with started.change(ME) as change:
        row, fresh = started.rotate_key(change, id, 60)
    old, new = started.authenticate(secret.encode()), started.authenticate(fresh.encode())
    assert old.key_id == id != new.key_id == row["id"] and new.scopes == old.scopes and new.account is old.account
    assert old.expires_at == change.now + 60 and (new.expires_at or 0) - change.now == pytest.approx(1000, abs=5)
    started._memory.expire(change.now + 60)
    refused(started, secret)
    assert started.authenticate(fresh.encode()) is new
    with started.change(ME) as change:
        _, last = started.rotate_key(change, row["id"], 0)
    assert "revoked" in refused(started, fresh).message and started.authenticate(last.encode()).scopes == old.scopes


def test_grace_does_not_prolong_a_life(started: Directory) -> None:
    end = int(time.time()) + 50
    id, secret = new_key(started, expires_at=end)
    with started.change(ME) as change:
        started.rotate_key(change, id, 5000)
    assert started.authenticate(secret.encode()).expires_at == end


def test_keys_page_by_page(started: Directory) -> None:
    project = started.home()[1]
    made = [started.key_page("project", project, None, 1)[0][0]["id"], *(new_key(started)[0] for _ in range(6))]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        found, after, more = [], None, True
        while more:
            rows, more = started.key_page("project", project, after, 3, order)
            found += [row["id"] for row in rows]
            after = found[-1]
        assert found == expected
    assert [row["kind"] for row in started.key_page("admin", None, None, 10)[0]] == ["admin"]
    assert all("hash" not in row and "revision" not in row for row in started.key_page(None, None, None, 10)[0])
    for page in (started.key_page, started.records.page):
        with pytest.raises(NotFound) as error:
            page("project", project, "key_nobody", 3)
        assert error.value.param == "after"
    for wrong in ({"kind": "admin"}, {"project_id": "proj_other"}):
        with pytest.raises(NotFound):
            started.key(made[0], **wrong)


# projects, their limits, and owners


def test_an_archived_projects_keys_are_refused_in_openais_words(started: Directory, tmp_path: Path) -> None:
    far, project = other(started, tmp_path), started.home()[1]
    with started.change(ME) as change:
        body = change.records.get("project", project).body
        change.update(project, {**body, "archived_at": change.now})
    far.look()
    for one in (started, far, other(started, tmp_path)):
        error = refused(one, KEY)
        assert error.code == "not_authorized_invalid_project"
        assert error.message == "The project you are requesting has been archived and is no longer accessible."
        assert one.authenticate(ADMIN.encode()).kind == "admin"


def test_limits_reach_the_projects_of_every_process_in_place(started: Directory, tmp_path: Path) -> None:
    far, organization = other(started, tmp_path), started.organization.id
    project = far.projects[far.home()[1]]
    version, told = project.version, []
    far.on_change.append(lambda: told.append(project.version))
    with started.change(ME) as change:
        rate = change.create("rate_limit", project.id, {"max_requests_per_1_minute": 5}, natural="mock")
        body = {"max_tokens_per_1_minute": 7, "max_concurrent_requests": 2, "observe_only": True}
        change.create("rate_limit", project.id, body, natural="other")
        change.create("rate_limit", project.id, {"observe_only": ["max_tokens_per_1_minute"]}, natural="third")
        spend = change.create("spend_limit", project.id, {"threshold_amount": 1234}, natural="month")
        whole = {"threshold_amount": 1, "observe_only": True}
        change.create("spend_limit", organization, whole, natural="month")
        allowed = {"mode": "allow_list", "model_ids": ["mock"]}
        permissions = change.create("model_permissions", project.id, allowed, natural="models")
    far.look()
    assert project.rate_limits == {
        "mock": RateLimit(5), "other": RateLimit(None, 7, None, 2, KINDS),
        "third": RateLimit(observed=frozenset({TOKENS})),
    }  # fmt: skip
    assert project.spend_limit == SpendLimit(12_340_000_000) and far.organization.spend_limit == SpendLimit(10**7, True)
    assert project.models == ModelPermissions(True, frozenset(["mock"])) and told == [project.version]
    assert project.version > version
    with started.change(ME) as change:
        for record in (rate, spend, permissions):
            change.delete(record.id)
    far.look()
    assert list(project.rate_limits) == ["other", "third"] and project.spend_limit is None and project.models is None
    assert other(started, tmp_path).projects[project.id].rate_limits == project.rate_limits


def test_a_limit_that_cannot_be_understood_hides_nothing_else(
    started: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    project = started.projects[started.home()[1]]
    with started.change(ME) as change:
        change.create("spend_limit", project.id, {"threshold_amount": "much"}, natural="month")
        change.create("rate_limit", project.id, {"max_requests_per_1_minute": 5}, natural="mock")
    assert project.spend_limit is None and project.rate_limits == {"mock": RateLimit(5)}
    assert "spend_limit" in caplog.text and "much" not in caplog.text


def test_a_users_key_is_good_as_long_as_the_user_has_access(started: Directory) -> None:
    project = started.home()[1]
    with started.change(ME) as change:
        body = {"email": "eve@example.com", "name": "Eve", "role": "member"}
        user = change.create("user", change.organization, body, natural="eve@example.com")
        member = change.create("project_user", project, {"role": "member"}, natural=user.id)
        _, secret = started.create_key(change, "project", project, user.id, "Eve's")
    assert started.authenticate(secret.encode()).owner_id == user.id
    with started.change(ME) as change:
        change.delete(member.id)
    assert refused(started, secret).code == "not_authorized_invalid_project"
    with started.change(ME) as change:
        group = change.create("group", change.organization, {"name": "all"}, natural="all")
        change.create("group_user", group.id, {}, natural=user.id)
        change.create("project_group", project, {"role": "member"}, natural=group.id)
    assert started.authenticate(secret.encode()).owner_id == user.id
    with started.change(ME) as change:
        change.delete(user.id)
    refused(started, secret)


# changes


def test_a_change_that_fails_changes_nothing(started: Directory) -> None:
    before = len(rows_of(started, audit_logs)), len(rows_of(started, records)), started.version
    with pytest.raises(RuntimeError, match="oops"), started.change(ME) as change:
        change.create("project", change.organization, {"name": "x"})
        started.create_key(change, "project", started.home()[1], None, "lost")
        change.audit("project.created", None, {})
        raise RuntimeError("oops")
    assert before == (len(rows_of(started, audit_logs)), len(rows_of(started, records)), started.version)


def test_natural_names_are_unique_among_siblings_only(started: Directory) -> None:
    def create(parent: str) -> str:
        with started.change(ME) as change:
            return change.create("group", parent, {"name": "a"}, natural="a").id

    first = create("one")
    assert create("two")
    with pytest.raises(Conflict):
        create("one")
    with started.change(ME) as change:
        other_one = change.create("group", "one", {"name": "b"}, natural="b")
    with pytest.raises(Conflict), started.change(ME) as change:
        change.update(other_one.id, {"name": "a"}, natural="a")
    with started.change(ME) as change:
        change.delete(first)
    assert create("one") != first  # the name is free again
    with pytest.raises(NotFound), started.change(ME) as change:
        change.update(first, {})


def test_every_process_sees_every_change_whoever_makes_it(tmp_path: Path, database: str) -> None:
    """Four processes change at the same time, a fifth looks all the while: it misses none."""
    engines = [open_database(tmp_path, database) for _ in range(5)]
    first = Directory(engines[0], tmp_path)
    first.first_start(KEY, ADMIN)
    project, each = first.home()[1], 12
    watcher, done, failed = Directory(engines[4], tmp_path), threading.Event(), []

    def work(directory: Directory) -> None:
        for n in range(each):
            try:
                with directory.change(ME) as change:
                    directory.create_key(change, "project", project, None, f"key {n}")
            except Exception as error:  # shown below
                failed.append(error)

    def watch() -> None:
        while not done.is_set():
            watcher.look()

    directories = [first, *(Directory(engine, tmp_path) for engine in engines[1:4])]
    workers = [threading.Thread(target=work, args=(one,)) for one in directories]
    looking = threading.Thread(target=watch)
    for thread in (looking, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    looking.join()
    watcher.look()
    assert not failed
    with watcher.connect() as connection:
        kept = {row.id: row.revision for row in connection.execute(select(api_keys.c.id, api_keys.c.revision))}
        assert connection.scalar(select(counters.c.value).where(counters.c.name == "directory")) == max(kept.values())
    assert watcher.ids() == kept.keys() and len(kept) == 2 + 4 * each and len(set(kept.values())) == 1 + 4 * each
    for engine in engines:
        engine.dispose()


def test_a_look_reads_only_what_is_new(started: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        new_key(started)
    taken: list[int] = []
    take = started._memory.take_keys
    monkeypatch.setattr(
        started._memory, "take_keys", lambda rows, whole, now: (taken.append(len(rows)), take(rows, whole, now))
    )
    new_key(started)
    assert taken == [1]


def test_an_older_database_put_in_its_place_is_read_whole(started: Directory) -> None:
    project = started.projects[started.home()[1]]
    with started._database.begin() as connection:
        before = [dict(row._mapping) for row in connection.execute(select(counters))]
    id, secret = new_key(started)
    with started.change(ME) as change:
        change.create("rate_limit", project.id, {"max_requests_per_1_minute": 5}, natural="mock")
    with started._database.begin() as connection:  # a restore
        connection.execute(delete(api_keys).where(api_keys.c.id == id))
        connection.execute(delete(records).where(records.c.kind == "rate_limit"))
        connection.execute(update(counters).values(value=before[0]["value"]))
    started.look()
    assert "Incorrect" in refused(started, secret).message and project.rate_limits == {}
    assert started.authenticate(KEY.encode()).account is project and started.roles.owners()


# when keys were used


def test_use_is_written_behind_and_is_no_change(started: Directory, tmp_path: Path) -> None:
    far, version = other(started, tmp_path), started.version
    started.authenticate(KEY.encode()).used = used = int(time.time())
    id = started.authenticate(KEY.encode()).key_id
    assert started.key(id)["last_used_at"] == used  # known here before it is written
    assert far.key(id)["last_used_at"] is None
    started._write_use()
    assert far.key(id)["last_used_at"] == used
    far.authenticate(KEY.encode()).used = used - 50  # of another process, and earlier
    far._used_since = 1
    far._write_use()
    assert other(started, tmp_path).key(id)["last_used_at"] == used
    started.look()
    assert started.version == version
    admin = started.key_page("admin", None, None, 1)[0][0]
    assert admin["last_used_at"] is None


# a database that cannot be used


def test_without_the_database_who_is_known_comes_in_until_the_grace_ends(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Directory(started._database, tmp_path, grace=60)

    def fail() -> Any:
        raise Unavailable()

    monkeypatch.setattr(gone, "connect", fail)
    with pytest.raises(Unavailable):
        gone.look()
    assert gone.unreachable == 0.0
    gone._reached -= 30
    assert 30 <= gone.unreachable < 31
    gone._judge()
    assert gone.authenticate(KEY.encode()).kind == "project"
    version = gone.version
    gone._reached -= 31
    gone._judge()
    assert gone.version > version  # heads that were seen before are looked at again
    for key in (KEY, ADMIN, "sk-unknown-key-0123456789"):
        with pytest.raises(Unavailable) as error:
            gone.authenticate(key.encode())
        assert error.value.status == 503
    monkeypatch.undo()
    gone.look()
    gone._judge()
    assert gone.authenticate(KEY.encode()).kind == "project"


def test_an_unknown_key_is_no_stranger_while_what_is_new_cannot_be_seen(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been made elsewhere; a key that is known to be gone, and one that is known, are as before."""
    far = other(started, tmp_path)
    revoked, expired = new_key(started), new_key(started, expires_at=int(time.time()) + 100)
    with started.change(ME) as change:
        started.revoke_key(change, revoked[0])
    far.look()
    far._memory.expire(time.time() + 101)
    _, late = new_key(started)
    far._reached -= 1000  # nobody has looked for long, which says nothing of the database
    refused(far, late)
    connect = far.connect

    def fail() -> Any:
        raise Unavailable()

    monkeypatch.setattr(far, "connect", fail)
    with pytest.raises(Unavailable):
        far.look()
    unsure(far, late)
    assert "revoked" in refused(far, revoked[1]).message and "expired" in refused(far, expired[1]).message
    assert far.authenticate(KEY.encode()).kind == "project"
    monkeypatch.setattr(far, "connect", connect)
    far.look()
    assert far.authenticate(late.encode()).kind == "project"
    assert "Incorrect" in refused(far, late + "?").message


def test_a_look_that_hangs_is_one_that_failed(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, hanging, released = other(started, tmp_path), threading.Event(), threading.Event()
    connect = far.connect

    def hang() -> Any:
        hanging.set()
        assert released.wait(10)
        return connect()

    monkeypatch.setattr(far, "connect", hang)
    monkeypatch.setattr("tertulia.accounts.directory.HANGS_SECONDS", 0.3)
    _, late = new_key(started)
    looking = threading.Thread(target=far.look)
    looking.start()
    try:
        assert hanging.wait(5) and far._asked is not None
        far._asked = time.monotonic()
        refused(far, late)  # it has only just begun
        far._asked -= 0.4
        unsure(far, late)
    finally:
        released.set()
        looking.join()
    assert far.authenticate(late.encode()).kind == "project"
    refused(far, late + "?")


def unsure(directory: Directory, key: str) -> None:
    with pytest.raises(Unavailable) as error:
        directory.authenticate(key.encode())
    assert (error.value.status, error.value.code) == (503, "database_unavailable")


def test_administration_of_a_broken_database_is_503(started: Directory) -> None:
    version = started.version
    with started._database.begin() as connection:
        connection.execute(text("ALTER TABLE records RENAME TO records_gone"))
    for act in (lambda: started.records.all("project"), lambda: started.records.get("project", "x")):
        with pytest.raises(Unavailable) as error:
            act()
        assert (error.value.status, error.value.code) == (503, "database_unavailable")
    with pytest.raises(Unavailable), started.change(ME) as change:
        change.create("project", change.organization, {"name": "x"})
    assert started.version == version and started.authenticate(KEY.encode()).kind == "project"


@pytest.mark.parametrize("value", ["nul \0 inside", "half a pair \ud800", 2**80])
def test_what_no_database_holds_is_a_bad_request(started: Directory, value: Any) -> None:
    before = len(rows_of(started, records))
    try:
        with started.change(ME) as change:
            change.create("group", "one", {"n": 1} if value == 2**80 else {"n": value}, natural=str(value)[:99])
            if value == 2**80:
                change.set_key(started.authenticate(KEY.encode()).key_id, expires_at=value)
    except BadRequest:
        assert len(rows_of(started, records)) == before
    else:  # SQLite holds NUL
        assert started.records.find("group", "one", value) is not None and value == "nul \0 inside"


def test_sql_in_every_field_is_text(started: Directory) -> None:
    evil = "x'); DROP TABLE api_keys; --"
    with started.change(local(evil)) as change:
        record = change.create(evil[:32], evil, {evil: evil}, natural=evil)
        row, secret = started.create_key(change, "project", started.home()[1], evil, evil)
        change.audit(evil, evil, {evil: evil}, evil)
    assert started.records.find(evil[:32], evil, evil) == record
    assert started.authenticate(secret.encode()).owner_id == evil and started.key(row["id"])["name"] == evil
    assert started.audit_log.page(5, event_types=[evil], resource_ids=[evil])[0][0][evil] == {evil: evil}
    with pytest.raises(NotFound):
        started.key("' OR '1'='1")
    with started.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(api_keys)) == 3


# the threads


def test_the_threads_look_expire_and_end(started: Directory, tmp_path: Path) -> None:
    far = other(started, tmp_path)
    far.start()
    _, secret = new_key(started, expires_at=int(time.time()) + 2)
    try:
        assert within(1.0, lambda: far.authenticate(secret.encode())) < 1.0  # the promise of the documentation
        before = far.version
        assert within(3.0, lambda: far.version > before or None)
        assert "has expired" in refused(far, secret).message
    finally:
        far.authenticate(KEY.encode()).used = used = int(time.time()) + 1
        far.stop()
    assert all(not thread.is_alive() for thread in far._threads)
    row = other(started, tmp_path).key(started.authenticate(KEY.encode()).key_id)
    assert row["last_used_at"] == used  # written at stop


def test_no_revocation_waits_for_what_is_written_behind(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, writing, released = other(started, tmp_path), threading.Event(), threading.Event()

    def write() -> None:
        writing.set()
        released.wait(10)

    monkeypatch.setattr("tertulia.accounts.directory.USED_SECONDS", 0.01)
    monkeypatch.setattr(far, "_write_use", write)
    id, secret = new_key(started)
    far.start()
    try:
        assert writing.wait(5)
        within(1.0, lambda: far.authenticate(secret.encode()))
        with started.change(ME) as change:
            started.revoke_key(change, id)
        assert within(1.0, lambda: secret_is_refused(far, secret)) < 1.0
    finally:
        released.set()
        far.stop()


def secret_is_refused(directory: Directory, secret: str) -> bool | None:
    try:
        directory.authenticate(secret.encode())
    except Unauthorized:
        return True
    return None


def test_the_threads_outlive_a_look_that_fails(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, looks = other(started, tmp_path), 0

    def fail() -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(far, "look", fail)
    far.start()
    try:
        within(5.0, lambda: looks > 1 or None)
        monkeypatch.undo()
        _, secret = new_key(started)
        within(5.0, lambda: far.authenticate(secret.encode()))
    finally:
        far.stop()


def within(seconds: float, attempt: Any) -> float:
    """How long it took until attempt() gave something and raised nothing."""
    began = time.monotonic()
    while True:
        try:
            if attempt() is not None:
                return time.monotonic() - began
        except Unauthorized:
            pass
        assert time.monotonic() - began < seconds + 1, "it did not happen in time"
        time.sleep(0.02)


# headers and kinds

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


def test_a_change_knows_its_actor_and_revision(started: Directory) -> None:
    with started.change(itself("a test")) as first, pytest.raises(NotFound):
        assert isinstance(first, Change) and first.organization == started.organization.id
        first.records.get("project", "proj_other")
    with started.change(ME) as second:
        assert second.revision == first.revision + 1


def test_what_was_deleted_long_ago_goes_and_nobody_misses_that_it_was_deleted(
    started: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_module, "AT_ONCE", 2)
    project = started.home()[1]
    with started.change(ME) as change:
        people = [change.create("user", change.organization, {"role": "member"}).id for _ in range(6)]
        links = [change.create("project_user", project, {"role": "member"}, natural=one).id for one in people]
    asleep = other(started, tmp_path)  # suspended for longer than rows are kept
    with started.change(ME) as change:
        for link in links[:5]:
            change.delete(link)
    forget(started._database, threading.Event())  # so soon nothing goes
    assert {row.id for row in rows_of(started, records)} >= {*links}
    with started._database.begin() as connection:
        at = int(time.time()) - FORGOTTEN_SECONDS - 1
        connection.execute(update(records).where(records.c.id.in_(links[:4])).values(deleted_at=at))
    forget(started._database, threading.Event())
    assert {row.id for row in rows_of(started, records)} & {*links} == {*links[4:]}
    assert [asleep.roles.may_enter(one, project) for one in people] == [True] * 6
    for _ in range(2):
        asleep.look()
        assert [asleep.roles.may_enter(one, project) for one in people] == [False] * 5 + [True]
    asleep.authenticate(KEY.encode())


def test_after_rows_have_gone_a_look_reads_only_what_is_new_again(
    started: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started.change(ME) as change:
        one = change.create("user", change.organization, {"role": "member"}).id
    with started.change(ME) as change:
        change.delete(one)
    with started._database.begin() as connection:
        connection.execute(update(records).where(records.c.id == one).values(deleted_at=1))
    forget(started._database, threading.Event())
    read: list[int] = []
    monkeypatch.setattr(directory_module, "read_records", lambda connection, since: read.append(since) or [])
    with started.change(ME) as change:
        change.create("user", change.organization, {"role": "member"})
    assert len(read) == 1 and read[0] > 0
