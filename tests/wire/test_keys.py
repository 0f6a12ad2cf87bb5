"""Keys, as the official SDK meets them, and `tertulia keys` beside a running server."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from conftest import Served, serve
from tertulia.accounts.audit import local
from tertulia.accounts.directory import Directory
from tertulia.cli import main
from tertulia.store.database import open_database

NOTICED = 1.0  # seconds within which every process knows of a change: the promise of docs/how-to/keys.md


@pytest.fixture
def keys(mock_server: Served, capsys: pytest.CaptureFixture[str]) -> Any:
    """`tertulia keys WORDS... --json` on the server's data directory, read back; waits until the server knows."""

    def run(*words: str, wait: bool = True) -> Any:
        capsys.readouterr()
        code = main(["keys", *words, "--data", str(mock_server.data), "--json"])
        said = capsys.readouterr()
        assert code == 0, said.err
        if wait:
            time.sleep(NOTICED)
        return json.loads(said.out)

    return run


def ask(client: Any) -> str:
    answer = client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "hello"}])
    return str(answer.choices[0].message.content)


def stream(client: Any) -> int:
    return len(
        list(client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "a"}], stream=True))
    )


@contextlib.contextmanager
def refusal(kind: type[openai.APIStatusError], code: str | None, words: str) -> Iterator[None]:
    """The error of the SDK, and OpenAI's shape in it."""
    with pytest.raises(kind) as error:
        yield
    assert error.value.code == code and words in error.value.message
    body = error.value.response.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"
    assert error.value.response.headers["x-request-id"].startswith("req_")
    assert error.value.response.headers["x-should-retry"] == "false"


def test_a_key_made_beside_the_running_server_works_and_is_shown_once(mock_server: Served, keys: Any) -> None:
    made = keys("create", "--name", "App")
    assert made["value"].startswith("sk-proj-") and made["name"] == "App" and made["scopes"] is None
    assert ask(mock_server.client(api_key=made["value"]))
    shown = keys("show", made["id"], wait=False)
    assert shown == {
        name: value for name, value in {**made, "last_used": shown["last_used"]}.items() if name != "value"
    }
    assert made["value"] not in json.dumps(keys("list", wait=False))


def test_revocation_holds_within_a_second_also_on_a_connection_that_is_open(mock_server: Served, keys: Any) -> None:
    made = keys("create")
    client = mock_server.client(api_key=made["value"])
    for _ in range(3):  # the third head is known from the second
        assert ask(client)
    keys("revoke", made["id"])
    for call in (ask, stream, lambda client: client.models.list()):
        with refusal(openai.AuthenticationError, "invalid_api_key", "The API key provided has been revoked: sk-proj-"):
            call(client)
    with refusal(openai.AuthenticationError, "invalid_api_key", "Incorrect API key provided"):
        ask(mock_server.client(api_key=made["value"] + "x"))


def test_rotation_lets_both_in_until_the_grace_ends(mock_server: Served, keys: Any) -> None:
    old = keys("create", "--scopes", "api.model.request", wait=False)
    new = keys("rotate", old["id"], "--grace", "1h")
    assert new["scopes"] == ["api.model.request"] and new["replaces"] == old["id"]
    clients = [mock_server.client(api_key=made["value"]) for made in (old, new)]
    assert all(map(ask, clients))
    keys("rotate", new["id"], "--grace", "0")
    with refusal(openai.AuthenticationError, "invalid_api_key", "has been revoked"):
        ask(clients[1])
    assert ask(clients[0])


def test_a_key_expires(mock_server: Served, keys: Any) -> None:
    made = keys("create", "--expires-in", "3s")
    client = mock_server.client(api_key=made["value"])
    assert ask(client)
    time.sleep(max(0.0, made["expires"] + NOTICED - time.time()))
    with refusal(openai.AuthenticationError, "invalid_api_key", "The API key provided has expired: sk-proj-"):
        ask(client)
    assert main(["keys", "rotate", made["id"], "--data", str(mock_server.data)]) == 2


def test_an_archived_project(mock_server: Served, keys: Any) -> None:
    project = keys("projects", "create", "Short-lived", wait=False)
    made = keys("create", "--project", "Short-lived")
    client = mock_server.client(api_key=made["value"])
    assert ask(client) and made["project"] == project["id"]
    assert keys("projects", "archive", project["id"])["archived"] is not None
    for call in (ask, stream, lambda client: client.models.list()):
        with refusal(
            openai.AuthenticationError, "not_authorized_invalid_project",
            "The project you are requesting has been archived and is no longer accessible.",
        ):  # fmt: skip
            call(client)


@pytest.mark.parametrize("streamed", [False, True])
def test_out_of_scope(mock_server: Served, keys: Any, streamed: bool) -> None:
    made = keys("create", "--scopes", "api.model.embeddings.request,api.model.read")
    client = mock_server.client(api_key=made["value"])
    assert client.models.list().data
    assert client.embeddings.create(model="mock-embedding", input="hello", encoding_format="float").data
    with refusal(
        openai.PermissionDeniedError, "insufficient_permissions",
        "You have insufficient permissions for this operation. Missing scopes: api.model.chat.request.",
    ):  # fmt: skip
        stream(client) if streamed else ask(client)


def test_read_only(mock_server: Served, keys: Any) -> None:
    client = mock_server.client(api_key=keys("create", "--scopes", "api.all.read")["value"])
    assert client.models.list().data
    for call in (
        ask,
        lambda client: client.embeddings.create(model="mock-embedding", input="hello"),
        lambda client: client.completions.create(model="mock", prompt="hello"),
    ):
        with refusal(openai.PermissionDeniedError, "insufficient_permissions", "Missing scopes: api.model."):
            call(client)


def test_kinds_of_keys_do_not_mix(mock_server: Served, keys: Any) -> None:
    admin = keys("create", "--admin", "--name", "Second")
    assert admin["value"].startswith("sk-admin-") and admin["project"] is None
    client = mock_server.client(api_key=admin["value"], admin_api_key=mock_server.api_key)
    for call in (ask, lambda client: client.models.list()):
        with refusal(openai.PermissionDeniedError, "insufficient_permissions", "needs a project key"):
            call(client)
    for call in (
        lambda client: client.admin.organization.projects.list(),
        lambda client: client.admin.organization.projects.create(name="x"),
        lambda client: client.admin.organization.projects.roles.list("proj_x"),
    ):
        with refusal(openai.PermissionDeniedError, "insufficient_permissions", "needs an admin key"):
            call(client)
    right = mock_server.client(admin_api_key=admin["value"])
    assert right.admin.organization.projects.list().data


@pytest.mark.parametrize(
    ("path", "key", "status"), [("/v1/organization/projects", "own", 403), ("/v1/organization/projects", "none", 401)]
)
def test_a_connection_lives_on_when_a_request_is_refused_before_its_body_has_come(
    mock_server: Served, path: str, key: str, status: int
) -> None:
    address = httpx.URL(mock_server.base_url)
    token = mock_server.api_key if key == "own" else "sk-nobodys-key-0123456789"
    lines = f"HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    with socket.create_connection((address.host, address.port or 80), 5) as client:
        for _ in range(3):
            client.sendall(f"POST {path} {lines}Content-Length: 12\r\n\r\n".encode())
            assert answered(client) == status
            client.sendall(b'{"name":"x"}')
        client.sendall(f"GET /v1/models {lines}\r\n".encode())
        assert answered(client) == (200 if key == "own" else 401)


def answered(client: socket.socket) -> int:
    """Reads one answer; its status."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        seen += client.recv(1)
    length = int(seen.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while length:
        length -= len(client.recv(length))
    return int(seen.split(b" ")[1])


def test_another_projects_header(mock_server: Served, keys: Any) -> None:
    other = keys("projects", "create", "Other")["id"]
    with refusal(openai.AuthenticationError, "mismatched_project", "should match project for API key"):
        ask(mock_server.client(project=other))
    with refusal(openai.AuthenticationError, "mismatched_organization", "should match organization for API key"):
        ask(mock_server.client(organization="org-other"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "--scopes", "api.everything"], "Unknown scope: 'api.everything'."),
        (["create", "--admin", "--scopes", "api.all.read"], "An admin key has no project and no scopes"),
        (["create", "--project", "none such"], "There is no project 'none such'"),
        (["create", "--owner", "nobody@example.com"], "There is no user 'nobody@example.com'."),
        (["create", "--name", ""], "A name has 1 to 256 printable characters."),
        (["create", "--name", "a\x1b[31mb"], "A name has 1 to 256 printable characters."),
        (["create", "--expires-in", "0"], "A key must live for a while"),
        (["show", "key_none"], "No such API key: key_none"),
        (["revoke", "' OR 1=1 --"], "No such API key: ' OR 1=1 --"),
        (["projects", "archive", "none"], "There is no project 'none'"),
    ],
)
def test_what_is_typed_wrongly(
    mock_server: Served, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["keys", *words, "--data", str(mock_server.data)]) in (1, 2)
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("tertulia: ") and said in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["create", "--expires-in", "3y"], ["rotate", "key_1", "--grace", "-1"], ["nothing"], []]
)
def test_what_is_no_command(mock_server: Served, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["keys", *words])
    assert end.value.code == 2


def test_nothing_is_made_where_nothing_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list", "--data", str(tmp_path / "none")]) == 2
    assert "tertulia serve" in capsys.readouterr().err and not (tmp_path / "none").exists()
    (tmp_path / "secret").write_bytes(bytes(32))
    assert main(["keys", "list", "--data", str(tmp_path)]) == 2
    assert "is empty" in capsys.readouterr().err


def test_tables_for_people(mock_server: Served, keys: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = keys(
        "create", "--name", "Zebra", "--expires-in", "30d", "--scopes", "api.all.read,api.files.write", wait=False
    )
    assert main(["keys", "list", "--data", str(mock_server.data)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["ID", "KIND", "PROJECT", "NAME", "KEY", "SCOPES", "CREATED", "EXPIRES", "LAST", "USED"]
    line = next(line for line in lines if line.startswith(made["id"]))
    assert "Zebra" in line and "api.all.read api.files.write" in line and made["value"] not in line
    assert line.index("Zebra") == head.index("NAME")
    assert main(["keys", "create", "--data", str(mock_server.data)]) == 0
    said = capsys.readouterr().out
    assert "value" in said and "sk-proj-" in said and "shown this once" in said
    assert main(["keys", "projects", "list", "--data", str(mock_server.data)]) == 0
    assert "Default project" in capsys.readouterr().out
    assert main(["keys", "list", "--admin", "--project", "Default project", "--data", str(mock_server.data)]) == 0
    assert capsys.readouterr().out == "There are none.\n"


def test_what_is_done_is_in_the_audit_log(mock_server: Served, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    made = keys("create", "--scopes", "api.all.read", wait=False)
    keys("revoke", made["id"])
    log = mock_server.client(admin_api_key=mock_server.admin_key).admin.organization.audit_logs
    entries = log.list(resource_ids=[made["id"]]).data
    assert [entry.type for entry in entries] == ["api_key.deleted", "api_key.created"]
    assert entries[1].api_key_created is not None and entries[1].api_key_created.data is not None
    assert entries[1].api_key_created.data.scopes == ["api.all.read"]
    for entry in entries:
        assert entry.actor is not None and entry.actor.type == "session"
        assert entry.actor.to_dict()["session"]["user_agent"] == "from the command line of user ada"  # type: ignore[index]
    assert made["value"] not in httpx.get(
        mock_server.base_url + "/organization/audit_logs?limit=100",
        headers={"Authorization": f"Bearer {mock_server.admin_key}"},
    ).text  # fmt: skip


def test_a_reader_reads_and_changes_nothing(mock_server: Served, keys: Any) -> None:
    engine = open_database(mock_server.data)
    directory = Directory(engine, mock_server.data)
    with directory.change(local("test")) as change:
        body = {"email": "rita@example.com", "name": "Rita", "role": "reader"}
        change.create("user", change.organization, body, natural="rita@example.com")
    engine.dispose()
    admin = mock_server.client(admin_api_key=keys("create", "--admin", "--owner", "rita@example.com")["value"]).admin
    assert admin.organization.projects.list().data
    with refusal(openai.PermissionDeniedError, "insufficient_permissions", "api.organization.projects.write"):
        admin.organization.projects.create(name="x")


def test_every_gateway_of_a_database_refuses_a_revoked_key_within_a_second(
    tmp_path: Path, postgresql: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--mock", "--chat-model", "mock", "--embedding-model", "mock-embedding", "--database", postgresql)
    first = serve(tmp_path / "one", "", *options)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "secret", tmp_path / "two" / "secret")
    second = serve(tmp_path / "two", "", *options)
    try:
        here = ["--data", str(tmp_path / "one"), "--database", postgresql, "--json"]
        assert main(["keys", "create", *here]) == 0
        made = json.loads(capsys.readouterr().out)
        time.sleep(NOTICED)
        clients = [served.client(api_key=made["value"]) for served in (first, second)]
        assert all(map(ask, clients))
        assert main(["keys", "revoke", made["id"], *here]) == 0
        time.sleep(NOTICED)
        for client in clients:
            with refusal(openai.AuthenticationError, "invalid_api_key", "has been revoked"):
                ask(client)
        assert ask(second.client()) and ask(second.client(api_key=first.api_key))
    finally:
        first.stop()
        second.stop()


def test_another_secret_than_the_databases_is_refused_at_start(tmp_path: Path, postgresql: str) -> None:
    options = ("--mock", "--chat-model", "mock", "--embedding-model", "mock-embedding", "--database", postgresql)
    serve(tmp_path / "one", "", *options).stop()
    with pytest.raises(AssertionError, match="made with another secret"):
        serve(tmp_path / "two", "", *options)


def test_a_key_of_the_settings_that_was_revoked_does_not_come_back(tmp_path: Path) -> None:
    options = ("--mock", "--chat-model", "mock", "--embedding-model", "mock-embedding")
    key = {"TERTULIA_API_KEY": "sk-of-the-settings-0123456789"}
    served = serve(tmp_path, "", *options, environment=key)
    engine = open_database(tmp_path)
    with engine.begin() as connection:
        id = connection.execute(text("SELECT id FROM api_keys WHERE kind = 'project'")).scalar()
    engine.dispose()
    served.stop()
    assert main(["keys", "revoke", str(id), "--data", str(tmp_path)]) == 0
    with pytest.raises(AssertionError, match="api_key: this key was revoked"):
        serve(tmp_path, "", *options, environment=key)


def test_last_use_is_told(tmp_path: Path) -> None:
    options = ("--mock", "--chat-model", "mock", "--embedding-model", "mock-embedding")
    served = serve(tmp_path, "", *options)
    began = int(time.time())
    assert ask(served.client())
    admin = served.client(admin_api_key=served.admin_key).admin.organization
    project = admin.projects.list().data[0].id
    assert (admin.projects.api_keys.list(project).data[0].last_used_at or 0) >= began
    served.stop()
    again = serve(tmp_path, "", *options)  # it was written when the server stopped
    admin = again.client(admin_api_key=served.admin_key).admin.organization
    uses = [key.last_used_at or 0 for key in admin.projects.api_keys.list(project).data]
    again.stop()
    assert began <= max(uses) <= time.time()
