"""Secrets by reference: from every store, again and again, and without a word of them in what is said."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import secret_stores
from secret_stores import ROLE_ID, SECRET_ID, Stores
from tertulia.accounts import vaults
from tertulia.accounts.credentials import Credentials, references
from tertulia.config import Settings, Upstream
from tertulia.errors import SettingsError

SECRET = "sk-never-to-be-seen-0123456789"
FORMS = "expected env:NAME, file:PATH, aws:ID, azure:VAULT/SECRET or vault:PATH#FIELD, not the key itself"


@pytest.fixture(scope="module")
def running() -> Iterator[Stores]:
    with secret_stores.running() as stores:
        yield stores


@pytest.fixture
def stores(running: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stores:
    for name, value in running.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    running.values, running.broken = {}, False
    running.asked, running.denied, running.logins = [], [], []
    running.tokens = {secret_stores.TOKEN}
    return running


def value(reference: str, credentials: Credentials | None = None) -> str | None:
    credentials = credentials or Credentials()
    credentials.require({"here": reference})
    return credentials.key(Upstream(base_url="http://x/v1", key=reference))


def refused(reference: str) -> str:
    with pytest.raises(SettingsError) as error:
        value(reference)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return error.value.message


# ---- near


def test_of_the_environment_and_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", SECRET)
    (tmp_path / "key").write_text(f"  {SECRET}\n")
    assert value("env:SOME_KEY") == value(f"file:{tmp_path}/key") == SECRET
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value("file:~/key") == SECRET


def test_what_leads_nowhere_near(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"sk-\xff\xfe")
    assert refused("env:NOT_SET") == "here: the environment variable NOT_SET is not set"
    assert refused(f"file:{tmp_path}/none") == f"here: {tmp_path}/none cannot be read (No such file or directory)"
    assert refused(f"file:{tmp_path}") == f"here: {tmp_path} cannot be read (Is a directory)"
    assert refused(f"file:{tmp_path}/empty") == f"here: file:{tmp_path}/empty cannot be read: it is empty"
    assert refused(f"file:{tmp_path}/binary") == f"here: {tmp_path}/binary cannot be read (not text in UTF-8)"


@pytest.mark.parametrize("text", [SECRET, f"sk:{SECRET}", "env:", "", f"bearer:{SECRET}", f"env:{SECRET}"])
def test_a_key_in_place_of_a_reference_is_not_repeated(text: str) -> None:
    said = refused(text)
    assert SECRET not in said and said in (
        f"here: {FORMS}", "here: expected the name of an environment variable after env:"
    )  # fmt: skip


# ---- far


def azure(stores: Stores, rest: str) -> str:
    return f"azure:127.0.0.1:{stores.azure}/{rest}"


def test_of_aws(stores: Stores) -> None:
    arn = "arn:aws:secretsmanager:us-east-2:123456789012:secret:far-AbCdEf"
    stores.values = {"prod/plain": SECRET, "prod/fields": {"key": SECRET, "n": 3}, arn: SECRET}
    assert value("aws:prod/plain") == value("aws:prod/fields#key") == value(f"aws:{arn}") == SECRET
    assert stores.asked == [("aws", "prod/plain"), ("aws", "prod/fields"), ("aws", arn)]
    assert refused("aws:none") == "here: aws:none cannot be read: ResourceNotFoundException"
    assert (
        refused("aws:prod/fields#no") == "here: aws:prod/fields#no cannot be read: it has no field 'no' with text in it"
    )
    assert "it has no field 'n'" in refused("aws:prod/fields#n")
    assert "it is no JSON object" in refused("aws:prod/plain#key")
    assert refused("aws:#x") == "here: aws:#x cannot be read: expected aws:ID or aws:ID#FIELD"


def test_of_azure(stores: Stores) -> None:
    stores.values = {"far": SECRET, "far/abc": "older"}
    assert value(azure(stores, "far")) == SECRET and value(azure(stores, "far/abc")) == "older"
    assert stores.asked == [("azure", "far"), ("azure", "far/abc")] and len(stores.denied) >= 1  # the challenge
    assert refused(azure(stores, "none")).endswith("cannot be read: ResourceNotFoundError, status 404")
    for wrong in ("far", "a/b/c/d", "a//"):
        assert refused(f"azure:{wrong}").endswith("expected azure:VAULT/SECRET or azure:VAULT/SECRET/VERSION")


def test_of_vault(stores: Stores) -> None:
    stores.values = {"far": {"key": SECRET}, "deep/er": {"key": "other"}}
    assert value("vault:secret/far#key") == value("vault:secret/data/far#key") == SECRET
    assert value("vault:team/kv/data/far#key") == SECRET and value("vault:secret/deep/er#key") == "other"
    assert refused("vault:secret/none#key") == "here: vault:secret/none#key cannot be read: InvalidPath"
    assert "it has no field 'no'" in refused("vault:secret/far#no")
    for wrong in ("secret/far", "secret#key", "#key"):
        assert refused(f"vault:{wrong}").endswith("cannot be read: expected vault:MOUNT/NAME#FIELD")


def test_vault_lets_a_role_in(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.values = {"far": {"key": SECRET}}
    monkeypatch.delenv("VAULT_TOKEN")
    assert refused("vault:secret/far#key").endswith(
        "there is no VAULT_TOKEN, VAULT_ROLE_ID or VAULT_KUBERNETES_ROLE to log in with"
    )
    (tmp_path / "jwt").write_text(secret_stores.POD)
    monkeypatch.setenv("VAULT_KUBERNETES_ROLE", "tertulia")
    monkeypatch.setenv("VAULT_KUBERNETES_TOKEN_PATH", str(tmp_path / "jwt"))
    assert value("vault:secret/far#key") == SECRET
    monkeypatch.setenv("VAULT_ROLE_ID", ROLE_ID)
    monkeypatch.setenv("VAULT_SECRET_ID", SECRET_ID)
    credentials = Credentials()
    assert value("vault:secret/far#key", credentials) == SECRET
    assert stores.logins == ["/v1/auth/kubernetes/login", "/v1/auth/approle/login"]
    stores.tokens.clear()  # its lease has ended
    stores.values = {"far": {"key": "new"}}
    assert credentials.refresh() and value("vault:secret/far#key", credentials) == "new"
    assert len(stores.logins) == 3
    monkeypatch.setenv("VAULT_SECRET_ID", "wrong")
    assert refused("vault:secret/far#key") == "here: vault:secret/far#key cannot be read: InvalidRequest"


@pytest.mark.parametrize("scheme", ["aws", "azure", "vault"])
def test_a_store_that_is_not_there(stores: Stores, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", "http://127.0.0.1:9")
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:9")
    reference = {"aws": "aws:a", "azure": "azure:127.0.0.1:9/a", "vault": "vault:secret/a#b"}[scheme]
    kind = {"aws": "EndpointConnectionError", "azure": "ServiceRequestError", "vault": "ConnectionError"}[scheme]
    assert refused(reference) == f"here: {reference} cannot be read: {kind}"


@pytest.mark.parametrize(
    ("reference", "module", "extra"),
    [
        ("aws:a", "boto3", "aws"), ("azure:a/b", "azure.identity", "azure"), ("vault:a/b#c", "hvac", "vault"),
    ],
)  # fmt: skip
def test_an_extra_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, reference: str, module: str, extra: str
) -> None:
    def gone(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(vaults.importlib, "import_module", gone)
    said = f"that needs the extra `{extra}` (pip install 'tertulia[{extra}]'): no {module}"
    assert refused(reference) == f"here: {reference} cannot be read: {said}"
    with pytest.raises(SettingsError, match="needs the extra"):
        Credentials().check("here", reference)


def test_nobody_who_does_not_ask_for_them_imports_the_libraries() -> None:
    import subprocess

    program = (
        "import sys, tertulia.server; from tertulia.accounts.credentials import Credentials; Credentials();"
        "print([name for name in ('boto3', 'azure', 'hvac', 'requests', 'cryptography') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- again and again


def three(stores: Stores) -> dict[str, str]:
    return {"a": "aws:far#key", "z": azure(stores, "plain"), "v": "vault:secret/far#key"}


def test_a_store_that_fails_later_leaves_the_last_value(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    stores.values = {"far": {"key": SECRET}, "plain": SECRET}
    credentials, wanted = Credentials(), three(stores)
    credentials.require(wanted)
    assert not credentials.refresh() and not caplog.records
    stores.broken = True
    caplog.set_level(logging.DEBUG)
    assert not credentials.refresh()
    credentials.require(wanted)  # a reload meanwhile
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3 and all("its last value is used" in line for line in warnings)
    assert all(credentials.key(Upstream(base_url="http://x", key=one)) == SECRET for one in wanted.values())
    assert SECRET not in caplog.text and "of the store" not in caplog.text
    with pytest.raises(SettingsError):
        credentials.require({"new": "aws:other"})
    stores.broken = False
    stores.values = {"far": {"key": "second"}, "plain": "second"}
    assert credentials.refresh() and not credentials.refresh()
    assert all(credentials.key(Upstream(base_url="http://x", key=one)) == "second" for one in wanted.values())
    assert "second" not in caplog.text.replace("seconds", "")


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to pass")


def test_a_thread_reads_them_again(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("one")
    credentials, told = Credentials(), threading.Event()
    credentials.require({"here": f"file:{path}"})
    credentials.start(lambda: 0.02, told.set)
    try:
        until(lambda: credentials.read > 3)
        assert not told.is_set()
        path.unlink()  # not there for a moment, as some editors write
        until(lambda: credentials.failed > 1)
        path.write_text("two")
        assert told.wait(5) and credentials.key(Upstream(base_url="http://x", key=f"file:{path}")) == "two"
    finally:
        credentials.stop()


def test_a_refused_key_is_read_again_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.accounts.credentials.HURRY_SECONDS", 0.02)
    path = tmp_path / "key"
    path.write_text("one")
    credentials, told = Credentials(), threading.Event()
    credentials.require({"here": f"file:{path}"})
    credentials.start(lambda: 3600.0, told.set)
    try:
        path.write_text("two")
        assert not told.wait(0.2)
        credentials.hurry()
        assert told.wait(5)
    finally:
        credentials.stop()


def test_what_nobody_refers_to_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET)
    monkeypatch.setenv("B_KEY", SECRET)
    credentials = Credentials()
    credentials.require({"a": "env:A_KEY", "b": "env:B_KEY"})
    credentials.keep_only({"env:A_KEY"})
    with pytest.raises(KeyError):
        credentials.key(Upstream(base_url="http://x", key="env:B_KEY"))


def test_headers_refer_to_secrets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET)
    upstream = Upstream(base_url="http://x", headers={"X-Key": "env:A_KEY", "X-Title": "our: chat"})
    wanted = references(Settings(upstreams={"u": upstream}, alert_smtp_password="env:A_KEY"))
    assert wanted == {"upstreams.u.headers.X-Key": "env:A_KEY", "alert_smtp_password": "env:A_KEY"}
    credentials = Credentials()
    credentials.require(wanted)
    assert credentials.value("env:A_KEY") == SECRET and credentials.value(None) is None
    assert credentials.headers(upstream) == {"X-Key": SECRET, "X-Title": "our: chat"}
    assert SECRET not in repr(credentials) and SECRET not in repr(upstream)


def test_checking_reads_nothing_far(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", SECRET)
    credentials = Credentials()
    assert credentials.check("here", "env:A_KEY") is True
    assert [credentials.check("here", one) for one in three(stores).values()] == [False] * 3
    assert stores.asked == [] == stores.denied
