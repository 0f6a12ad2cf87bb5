"""Attacks on a running server, over raw sockets: every one is refused or does nothing, in the database, in the logs and
at the upstream; none is an unexpected error.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import secrets
import socket
import sqlite3
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import echo_upstream
from cluster import Cluster
from conftest import Served, serve
from echo_upstream import Echo
from house.sources import MODULES
from tertulia.accounts import keys
from tertulia.accounts.directory import Directory
from tertulia.api.admin.table import ELSEWHERE, ROWS
from tertulia.errors import Unauthorized
from tertulia.store.database import open_database

FAR_KEY = "sk-far-never-to-be-seen-0123456789"
CHAT = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}
CONFIG = """
log_level = "debug"
access_log = "{data}/access.log"
chat_model = "mock"
embedding_model = "mock-embedding"
retries = 0
breaker_failures = 1000000
cache = "off"
aliases = {{ "wild-*" = "mock" }}
{database}
[upstreams.far]
base_url = "{far}"
key = "env:FAR_KEY"
models = {{ far = "far", "far-embedding" = "far-embedding" }}
"""
SQL = (
    "'; DROP TABLE records; --", '"; DELETE FROM api_keys; --', "' OR '1'='1", '" OR ""="', "1) OR (1=1",
    "x' UNION SELECT hash FROM api_keys --", "'||(SELECT name FROM sqlite_master)||'", "%' OR name LIKE '%",
    "\\'; UPDATE organizations SET name='owned'; --", "$1; SELECT pg_sleep(9); --", ":id", "%(id)s", "%s", "?", "%",
    "'; ATTACH DATABASE '/x' AS y; --", "NULL", "-1", "1e308", "9" * 30, "{{7*7}}", "${jndi:ldap://127.0.0.1/x}",
)  # fmt: skip
ODD = (
    "../../../secret", "..%2f..%2fsecret", "/", ".", "..", "%00", "x\x00y", "a\r\nx-injected: 1",
    "\x1b[31mred\x1b[0m",
    "\x9b31m", "\u202egnp.exe", "\u2028", "\ud7ff\ufffe", "😀" * 40, " ", "\t", '{"a":1}', '"', "\\", "x" * 2000,
)  # fmt: skip
HOSTILE = (*SQL, *ODD)


# ---- a client that sends what no library would


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for each, value in self.headers if each == name]
        assert len(found) < 2, f"{name} was said twice"
        return found[0] if found else None

    def error(self) -> dict[str, Any]:
        """Of OpenAI's shape, with all four keys."""
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"]
        return dict(found)


@dataclass
class Wire:
    """One connection; got: what has come and was not read yet."""

    socket: socket.socket
    got: bytes = b""
    closed: bool = False

    @classmethod
    def to(cls, server: Served) -> Wire:
        host, _, port = server.root.removeprefix("http://").partition(":")
        return cls(socket.create_connection((host, int(port)), timeout=20))

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError:  # it was refused meanwhile
            self.closed = True

    def more(self) -> bool:
        try:
            data = self.socket.recv(2**20)
        except ConnectionError:
            data = b""
        self.got += data
        self.closed = self.closed or not data
        return bool(data)

    def read(self) -> Answer | None:
        """The next answer; None if the connection ended without one."""
        while b"\r\n\r\n" not in self.got:
            if not self.more():
                assert not self.got, f"half an answer: {self.got[:200]!r}"
                return None
        head, _, self.got = self.got.partition(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.1 \d{3} [\x20-\x7e]*", line), line
        headers = []
        for each in rest:
            name, colon, value = each.partition(": ")
            assert colon and re.fullmatch(r"[a-z0-9-]+", name.lower()), each
            headers.append((name.lower(), value))
        answer = Answer(int(line.split()[1]), headers, b"")
        if answer.status == 100:
            return self.read()
        size = int(answer.header("content-length") or 0)
        while len(self.got) < size:
            assert self.more(), "the body was cut"
        answer.body, self.got = self.got[:size], self.got[size:]
        return answer

    def rest(self) -> list[Answer]:
        """Every answer until the server closes, or says nothing for a while."""
        self.socket.settimeout(1.5)
        found = []
        try:
            while (answer := self.read()) is not None:
                found.append(answer)
        except TimeoutError:
            pass
        return found

    def close(self) -> None:
        self.socket.close()


def once(server: Served, data: bytes) -> Answer:
    wire = Wire.to(server)
    try:
        wire.send(data)
        answer = wire.read()
        assert answer is not None, "closed without a word"
        return answer
    finally:
        wire.close()


def all_of(server: Served, data: bytes) -> list[Answer]:
    """Everything that is answered to these bytes."""
    wire = Wire.to(server)
    try:
        wire.send(data)
        return wire.rest()
    finally:
        wire.close()


def head(method: str, target: str, *lines: str, key: str | None = None, host: str = "x") -> bytes:
    given = [f"{method} {target} HTTP/1.1", *([f"host: {host}"] if host else [])]
    given += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*given, *lines, "", ""]).encode("latin-1")


def post(target: str, body: Any, *lines: str, key: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "content-type: application/json"
    return head("POST", target, kind, f"content-length: {len(data)}", *lines, key=key) + data


def well(answer: Answer, what: object) -> None:
    """Refused in OpenAI's words or answered; never an unexpected error, and nothing of our insides."""
    assert answer.status < 500, (what, answer.status, answer.body[:500])
    assert answer.header("x-injected") is None
    if answer.status >= 400:
        answer.error()
    for inside in (b"Traceback", b"sqlite3", b"sqlalchemy", b"psycopg", b"OperationalError", b"/src/tertulia"):
        assert inside not in answer.body, (what, answer.body[:500])


# ---- the servers: the same attacks on both databases


@dataclass
class Target:
    """A server, what is in its database, and what is where in its Admin API."""

    server: Served
    far: Echo
    url: str | None
    ids: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None) -> Answer:
        key = key or self.server.admin_key
        if body is None:
            return once(self.server, head(method, path, key=key))
        return once(self.server, post(path, body, key=key))

    def made(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.ask("POST", f"/v1/organization{path}", body)
        assert answer.status == 200, (path, answer.body)
        return dict(json.loads(answer.body))

    def tables(self) -> dict[str, list[str]]:
        """Every table with its columns."""
        if self.url is None:
            with sqlite3.connect(f"file:{self.server.data}/tertulia.db?mode=ro", uri=True) as database:
                names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")]
                return {n: [str(row[1]) for row in database.execute(f'PRAGMA table_info("{n}")')] for n in names}
        import psycopg

        query = (
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema='public' ORDER BY 1,2"
        )
        with psycopg.connect(self.url) as database:
            found: dict[str, list[str]] = {}
            for table, column in database.execute(query):
                found.setdefault(table, []).append(column)
            return found

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that is administered, but for when a key was used last."""
        found = {}
        for table in ("organizations", "records", "api_keys", "facts", "audit_logs"):
            columns = ", ".join(f'"{name}"' for name in sorted(self.tables()[table]) if name != "last_used_at")
            found[table] = self.query(f'SELECT {columns} FROM "{table}" ORDER BY id' if table != "facts" else
                                      f'SELECT {columns} FROM "{table}" ORDER BY name')  # fmt: skip
        return found

    def query(self, text: str) -> list[tuple[Any, ...]]:
        if self.url is None:
            with sqlite3.connect(f"file:{self.server.data}/tertulia.db?mode=ro", uri=True) as database:
                return list(database.execute(text))
        import psycopg

        with psycopg.connect(self.url) as database:
            return list(database.execute(text))  # type: ignore[call-overload]


def furnish(target: Target) -> None:
    """One of everything, so that each path has something true to be hostile beside."""
    ids, made = target.ids, target.made
    ids["project_id"] = one = made("/projects", name="one")["id"]
    account = made(f"/projects/{one}/service_accounts", name="robot")
    ids["service_account_id"], ids["api_key_id"] = account["id"], account["api_key"]["id"]
    ids["key_id"] = made("/admin_api_keys", name="spare")["id"]
    ids["group_id"] = made("/groups", name="group")["id"]
    ids["invite_id"] = made("/invites", email="a@example.org", role="reader")["id"]
    money = {"currency": "USD", "interval": "month", "threshold_amount": 100_000}
    channel = {"type": "email", "recipients": ["a@example.org"]}
    ids["alert_id"] = made("/spend_alerts", **money, notification_channel=channel)["id"]
    ids["role_id"] = made("/roles", role_name="role", permissions=[])["id"]
    ids["user_id"] = json.loads(target.ask("GET", "/v1/organization/users").body)["data"][0]["id"]
    ids["rate_limit_id"] = "rl-mock"
    ids["audit_log_id"] = "audit_log-0"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    data = tmp_path_factory.mktemp("attacked")
    with echo_upstream.running() as far:
        if request.param == "sqlite":
            yield from _target(data, far, None)
        else:
            with Cluster.started() as cluster, cluster.database() as url:
                yield from _target(data, far, url)


def _target(data: Path, far: Echo, url: str | None) -> Iterator[Target]:
    database = f'database = "{url}"' if url else ""
    server = serve(
        data, CONFIG.format(data=data, far=far.base_url, database=database), environment={"FAR_KEY": FAR_KEY}
    )
    found = Target(server, far, url)
    try:
        furnish(found)
        yield found
    finally:
        server.stop()
    printed = (data / "stderr.log").read_text()
    assert "Traceback" not in printed and "unexpected" not in printed, printed[-2000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """For attacks that never get as far as a database."""
    data = tmp_path_factory.mktemp("plain")
    with echo_upstream.running() as far:
        yield from _target(data, far, None)


# ---- SQL, and other odd things, in every field


def spelled(path: str, ids: dict[str, str], hostile: dict[str, str]) -> str:
    """A path of the table with ids in its places."""

    def value(match: re.Match[str]) -> str:
        name = match[1].removesuffix(":path")
        return quote(hostile[name], safe="") if name in hostile else quote(ids[name], safe="")

    return "/v1" + re.sub(r"{([^}]+)}", value, path)


def parameters(path: str) -> list[str]:
    return [name.removesuffix(":path") for name in re.findall(r"{([^}]+)}", path)]


USAGE = ("completions", "embeddings", "moderations", "images", "audio_speeches", "audio_transcriptions",
         "vector_stores", "code_interpreter_sessions", "file_search_calls", "web_search_calls")  # fmt: skip
FILTERS = ("project_ids", "user_ids", "api_key_ids", "models", "group_by", "bucket_width", "page", "limit", "batch",
           "start_time", "end_time")  # fmt: skip


def questions(target: Target) -> Iterator[tuple[str, str, str]]:
    """(method, path, hostile value): everything that can be asked and changes nothing, with something hostile in it."""
    for row in ROWS:
        for name in parameters(row.path):
            for value in HOSTILE:
                yield row.method, spelled(row.path, target.ids, {name: value}), value
        if row.method == "GET":
            for name in row.parameters:
                for spelling in (name, f"{name}[]", f"{name}[gt]"):
                    for value in HOSTILE:
                        yield "GET", f"{spelled(row.path, target.ids, {})}?{spelling}={quote(value, safe='')}", value
    for kind in (*(f"usage/{name}" for name in USAGE), "costs"):
        for name in FILTERS:
            for value in SQL:
                start = "" if name == "start_time" else "start_time=1700000000&"
                yield "GET", f"/v1/organization/{kind}?{start}{name}={quote(value, safe='')}", value
    for _, path, _ in ELSEWHERE:
        for value in SQL[:4]:
            place = spelled(path, target.ids, {})
            yield "GET", f"{place}/{quote(value, safe='')}", value
    for value in HOSTILE:
        yield "GET", f"/v1/models/{quote(value, safe='')}", value


def test_sql_in_every_path_and_query(target: Target) -> None:
    """Nothing that is asked so is anything but asked: the whole database is as it was."""
    tables, rows, wires, count = target.tables(), target.rows(), {}, 0
    key = target.server.admin_key
    slowest, began = 0.0, time.monotonic()
    for method, path, _ in questions(target):
        who = target.server.api_key if path.startswith("/v1/models") else key
        data = post(path, {}, key=who) if method == "POST" else head(method, path, key=who)
        wire = wires.get("wire")
        if wire is None or wire.closed:
            wire = wires["wire"] = Wire.to(target.server)
        at = time.monotonic()
        wire.send(data)
        answer = wire.read()
        assert answer is not None, (method, path)
        slowest = max(slowest, time.monotonic() - at)
        well(answer, (method, path))
        if method != "GET":
            assert answer.status in (400, 404), (method, path, answer.body[:300])
        count += 1
    print(f"{count} requests in {time.monotonic() - began:.1f} s, the slowest took {slowest * 1000:.0f} ms")
    assert count > 3000 and slowest < 8, "pg_sleep(9) was executed"
    assert target.tables() == tables and target.rows() == rows


BODY = {
    "name": "name", "role": "reader", "email": "b@example.org", "user_id": "user_id", "group_id": "group_id",
    "role_id": "role_id", "role_name": "other", "permissions": [], "description": "text", "currency": "USD",
    "interval": "month", "threshold_amount": 100_000, "mode": "allow_list", "model_ids": ["mock"], "projects": [],
    "notification_channel": {"type": "email", "recipients": ["a@example.org"]}, "scopes": [],
    "expires_in_seconds": 1000, "owner_id": "user_id", "grace_seconds": 1000,
}  # fmt: skip


def bodies(target: Target, row: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """A row's body with something hostile in each of its fields, in lists and objects too, and as a name of a field."""
    shape = row.body.decoder.type
    sound = {name: BODY[name] for name in shape.__struct_fields__ if name in BODY}
    sound = {name: target.ids.get(value, value) if isinstance(value, str) else value for name, value in sound.items()}
    for name in shape.__struct_fields__:
        for value in HOSTILE:
            if not value.isascii():
                continue
            yield {**sound, name: value}, value
        for value in (
            ["'; --"],
            {"'; --": "'; --"},
            [{"id": "' OR 1=1 --", "role": "'"}],
            {"type": "email", "recipients": ["'@'"]},
        ):
            yield {**sound, name: value}, str(value)
        yield {**sound, name: "\u009b31m\u202e'; --"}, "controls"
    yield {**sound, "'; DROP TABLE records; --": 1}, "a field"


def test_sql_in_every_field_of_a_body(target: Target) -> None:
    """What is taken is kept as the text it is: no table, column or row is gone, and no other row has changed."""
    tables, before = target.tables(), target.rows()
    taken = count = 0
    for row in ROWS:
        if row.method != "POST" or row.verb in ("archive", "rotate", "accept"):
            continue
        for body, what in bodies(target, row):
            answer = target.ask("POST", spelled(row.path, target.ids, {}), body)
            well(answer, (row.path, body))
            count += 1
            taken += answer.status == 200
            if answer.status == 200 and body.get("name") == what and isinstance(json.loads(answer.body), dict):
                said = json.loads(answer.body).get("name")
                assert said in (what, None) or row.kind.sdk == "projects.users", (row.path, said, what)
    print(f"{count} bodies, {taken} of them taken")
    after = target.rows()
    assert target.tables() == tables and count > 500 and taken > 20
    for table in ("organizations", "facts"):
        assert after[table] == before[table], table
    ids = {table: {str(row) for row in before[table]} for table in ("records", "api_keys")}
    kept = {table: {str(row) for row in after[table]} for table in ("records", "api_keys")}
    changed = {table: len(ids[table] - kept[table]) for table in ids}
    # what the bodies themselves address may have changed: the project, account, key, group, role, alert, user, limits
    assert changed["records"] <= 12 and changed["api_keys"] <= 2, changed
    assert len(after["records"]) >= len(before["records"]) and len(after["api_keys"]) >= len(before["api_keys"])


MODEL_FIELDS = ("model", "user", "safety_identifier", "prompt_cache_key", "service_tier", "reasoning_effort", "stop")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_odd_things_in_every_field_of_a_call(target: Target, path: str) -> None:
    tables, rows, key = target.tables(), target.rows(), target.server.api_key
    sound = {"model": "mock", "messages": CHAT["messages"]} if "chat" in path else {"model": "mock", "prompt": "hi"}
    if "embeddings" in path:
        sound = {"model": "mock-embedding", "input": "hi"}
    for value in HOSTILE:
        for name in (*sound, *MODEL_FIELDS, "metadata", "tools", value):
            given = {value: value} if name == "metadata" else [value] if name == "tools" else value
            if name == "model":
                well(target.ask("POST", path, {**sound, "model": f"wild-{value}"}, key), (name, value))
            well(target.ask("POST", path, {**sound, name: given}, key), (name, value))
    assert target.tables() == tables and target.rows() == rows


HEADERS = ("user-agent", "openai-organization", "openai-project", "idempotency-key", "traceparent", "x-request-id",
           "cache-control", "x-stainless-retry-count", "x-stainless-read-timeout", "accept", "cookie", "origin",
           "referer", "content-type", "authorization", "openai-beta", "x-api-key", "api-key")  # fmt: skip


def test_odd_things_in_every_header(target: Target) -> None:
    tables, rows = target.tables(), target.rows()
    body = json.dumps({**CHAT, "model": "mock"}).encode()
    for value in HOSTILE:
        text = value.encode().decode("latin-1")
        if any(control in text for control in "\r\n\x00"):
            continue  # these end a header: see below
        for name in HEADERS:
            keys = {"key": target.server.api_key} if name != "authorization" else {}
            lines = (f"{name}: {text}", f"content-length: {len(body)}")
            well(once(target.server, head("POST", "/v1/chat/completions", *lines, **keys) + body), (name, value))
            keys = {"key": target.server.admin_key} if name != "authorization" else {}
            well(once(target.server, head("GET", "/v1/organization/projects", lines[0], **keys)), (name, value))
    assert target.tables() == tables and target.rows() == rows


# ---- ids of a megabyte


def test_oversized_ids(target: Target) -> None:
    long, server = "x" * 2**20, target.server
    rows = target.rows()
    for row in ROWS[::5]:
        for name in parameters(row.path):
            for answer in all_of(
                server, head(row.method, spelled(row.path, target.ids, {name: long}), key=server.admin_key)
            ):
                assert answer.status == 413, answer.body[:200]
    for size in (600, 5_000, 60_000):
        for row in ROWS:
            for name in parameters(row.path):
                path = spelled(row.path, target.ids, {name: "x" * size})
                answer = target.ask(row.method, path, {} if row.method == "POST" else None)
                assert answer.status in (400, 404), (path[:99], answer.body[:200])
                assert len(answer.body) < size + 400
    assert target.ask("GET", f"/v1/organization/projects?after={'x' * 20_000}").status == 400
    for body in ({**CHAT, "model": long}, {**CHAT, "model": "mock", "user": long}, {**CHAT, "model": "mock", long: 1}):
        answer = target.ask("POST", "/v1/chat/completions", body, server.api_key)
        assert answer.status == 400 and len(answer.body) < 10_000, answer.body[:200]
    for row in ROWS:
        if row.method == "POST" and "name" in row.body.decoder.type.__struct_fields__:
            answer = target.ask("POST", spelled(row.path, target.ids, {}), {"name": long, long: long})
            assert answer.status == 400 and len(answer.body) < 10_000, (row.path, answer.body[:200])
    for lines in ([f"x-a: {long}"], [f"{long}: a"], [f"x-a{number}: b" for number in range(50_000)]):
        for answer in all_of(server, head("GET", "/v1/models", *lines, key=server.api_key)):
            assert answer.status in (400, 413)
    assert target.rows() == rows
    model = "wild-" + "x" * 500  # longer than the ledger's column
    assert target.ask("POST", "/v1/chat/completions", {**CHAT, "model": model}, server.api_key).status == 200
    answer = target.ask("GET", "/v1/organization/usage/completions?start_time=1700000000&bucket_width=1d&limit=31")
    assert answer.status == 200
    assert target.query("SELECT count(*) FROM ledger")[0][0] > 0
    assert max(map(len, (server.data / "access.log").read_bytes().split(b"\n"))) < 5_000


def test_many_small_headers_cost_little(plain: Target) -> None:
    lines = [f"a{number}:" for number in range(7_000)]
    began = time.monotonic()
    answer = once(plain.server, head("GET", "/v1/models", *lines, key=plain.server.api_key))
    assert answer.status in (200, 413) and time.monotonic() - began < 5
    body = json.dumps({**CHAT, "model": "mock"}).encode()
    data = head("POST", "/v1/chat/completions", *lines, f"content-length: {len(body)}", key=plain.server.api_key) + body
    answer = once(plain.server, data)
    assert answer.status in (200, 413) and time.monotonic() - began < 10


# ---- what a head may not say


def smuggled(plain: Target) -> bytes:
    """A request that nobody but the attacked server must ever see as one."""
    return post("/v1/chat/completions", {**CHAT, "model": "far", "user": "smuggled"}, key=plain.server.api_key)


def chat(plain: Target, *lines: str, body: bytes | None = None, key: str | None = None) -> bytes:
    body = json.dumps({**CHAT, "model": "mock"}).encode() if body is None else body
    given = {"key": plain.server.api_key} if key is None else {"key": key} if key else {}
    return head("POST", "/v1/chat/completions", "content-type: application/json", *lines, **given) + body


BODY_BYTES = json.dumps({**CHAT, "model": "mock"}).encode()
LENGTH = len(BODY_BYTES)


@pytest.mark.parametrize(
    "lines",
    [
        (f"content-length: {LENGTH}", "content-length: 0"),
        ("content-length: 0", f"content-length: {LENGTH}"),
        (f"content-length: {LENGTH}, {LENGTH}",),
        (f"content-length: +{LENGTH}",),
        (f"content-length: 0x{LENGTH:x}",),
        (f"content-length: {LENGTH}_0",),
        ("content-length: -1",),
        ("content-length: ",),
        ("content-length: 99999999999999999999999999",),
        (f"content-length : {LENGTH}",),
        (f"content-length: {LENGTH}", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked", f"content-length: {LENGTH}"),
        ("transfer-encoding: chunked", "transfer-encoding: identity"),
        ("transfer-encoding: chunked, identity",),
        ("transfer-encoding: xchunked",),
        ("transfer-encoding: \x0bchunked",),
        ("transfer-encoding : chunked",),
        ("transfer-encoding: gzip, chunked",),
        (f"content-length: {LENGTH}", "x-a: b", " folded: c"),
        (f"content-length: {LENGTH}", "x-a: b", "\tfolded"),
        (" leading: space", f"content-length: {LENGTH}"),
        (f"content-length: {LENGTH}", "x-nul: a\x00b"),
        (f"content-length: {LENGTH}", "x-cr: a\rx-b: c"),
        (f"content-length: {LENGTH}", "x-nul\x00: a"),
        (f"content-length: {LENGTH}", "no colon"),
        (f"content-length: {LENGTH}", ": no name"),
        (f"content-length: {LENGTH}", "x(y): z"),
        (f"content-length: {LENGTH}", "x y: z"),
        (f"content-length: {LENGTH}", "authorization : Bearer x"),
    ],
    ids=repr,
)
def test_a_head_that_can_be_read_in_two_ways_is_refused(plain: Target, lines: tuple[str, ...]) -> None:
    """One refusal, then the connection is closed: what was to be smuggled behind it is never answered."""
    plain.far.requests.clear()
    found = all_of(plain.server, chat(plain, *lines, body=BODY_BYTES + smuggled(plain)))
    assert [answer.status for answer in found] == [400], [(answer.status, answer.body[:200]) for answer in found]
    assert found[0].header("connection") == "close" and found[0].error()["type"] == "invalid_request_error"
    assert not plain.far.requests


def test_the_same_length_twice(plain: Target) -> None:
    """RFC 9112 lets a server take it or refuse it; what it must not do is lose track."""
    plain.far.requests.clear()
    lines = (f"content-length: {LENGTH}", f"content-length: {LENGTH}")
    found = all_of(plain.server, chat(plain, *lines, body=BODY_BYTES + smuggled(plain)))
    assert [answer.status for answer in found] in ([400], [200, 200])


@pytest.mark.parametrize(
    "ending",
    [b"\n", b"\r"],
    ids=["LF", "CR"],
)
def test_lines_end_in_both(plain: Target, ending: bytes) -> None:
    data = chat(plain, f"content-length: {LENGTH}", body=b"").replace(b"\r\n", ending) + BODY_BYTES
    assert [answer.status for answer in all_of(plain.server, data)] in ([400], [])


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhello\r\n0\r\n\r\n", b"-1\r\n\r\n", b"fffffffffffffffff\r\n", b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5 \r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"5\r\nhello0\r\n\r\n", b"5;\x00a=b\r\nhello\r\n0\r\n\r\n",
        b"5;a=b\nc\r\nhello\r\n0\r\n\r\n",
    ],
    ids=repr,
)  # fmt: skip
def test_chunks_that_are_none(plain: Target, body: bytes) -> None:
    plain.far.requests.clear()
    found = all_of(plain.server, chat(plain, "transfer-encoding: chunked", body=body + smuggled(plain)))
    assert [answer.status for answer in found] in ([400], []), [(a.status, a.body[:200]) for a in found]
    assert not plain.far.requests


def test_what_comes_after_the_body_is_no_header(plain: Target) -> None:
    """Trailers are no headers: a proxy in front has not looked at them, and they let nobody in."""
    server = plain.server
    chunked = b"%x\r\n%s\r\n0\r\n" % (LENGTH, BODY_BYTES)
    trailer = chunked + f"authorization: Bearer {server.api_key}\r\n\r\n".encode()
    answer = once(server, chat(plain, "transfer-encoding: chunked", body=trailer, key=""))
    assert answer.status == 401
    trailer = chunked + b"openai-project: proj_other\r\nauthorization: Bearer other\r\nidempotency-key: a\r\n\r\n"
    assert once(server, chat(plain, "transfer-encoding: chunked", body=trailer)).status == 200
    made = json.dumps({"name": "trailed"}).encode()
    trailer = b"%x\r\n%s\r\n0\r\nauthorization: Bearer %s\r\n\r\n" % (len(made), made, server.admin_key.encode())
    for path in ("/v1/organization/projects", "/v1/models"):
        method = "POST" if "projects" in path else "GET"
        answer = once(server, head(method, path, "transfer-encoding: chunked") + trailer)
        assert answer.status == 401, (path, answer.body)


def test_two_keys(plain: Target) -> None:
    server, plain.far.requests[:] = plain.server, []
    good, bad = server.api_key, "sk-other-0123456789abcdef"
    for first, second in ((good, bad), (bad, good), (good, good), (good, server.admin_key)):
        lines = (f"authorization: Bearer {second}", f"content-length: {LENGTH}")
        answer = once(server, chat(plain, *lines, body=BODY_BYTES, key=first))
        assert answer.status == 401 and "More than one" in answer.error()["message"]
        for path in ("/v1/models", "/v1/organization/projects"):
            answer = once(server, head("GET", path, f"Authorization: Bearer {second}", key=first))
            assert answer.status == 401 and "More than one" in answer.error()["message"]
    for spelling in ("Bearer\t{}", "Bearer  {}", "bearer {} {}", "Basic {}", "{}", "Bearer {},Bearer {}", "Token {}"):
        line = "authorization: " + spelling.format(good, bad)
        answer = once(server, head("GET", "/v1/models", line))
        assert answer.status == (200 if spelling == "Bearer  {}" else 401), spelling
    for name in (
        "x-api-key",
        "api-key",
        "proxy-authorization",
        "x-authorization",
        "x-forwarded-authorization",
        "cookie",
    ):
        assert once(server, head("GET", "/v1/models", f"{name}: Bearer {good}")).status == 401
    assert once(server, head("GET", f"/v1/models?api_key={good}&key={good}")).status == 401


FORWARDED = (
    "x-forwarded-for: 203.0.113.9", "x-forwarded-proto: https", "x-forwarded-host: evil.example",
    "x-forwarded-port: 443", "x-forwarded-prefix: /admin",
    "forwarded: for=203.0.113.9;host=evil.example;proto=https",
    "x-real-ip: 203.0.113.9", "true-client-ip: 203.0.113.9", "cf-connecting-ip: 203.0.113.9",
    "x-client-ip: 203.0.113.9",
    "x-original-url: /v1/organization/projects", "x-rewrite-url: /v1/organization/projects",
    "x-http-method-override: DELETE", "x-method-override: DELETE", "x-original-host: evil.example",
)  # fmt: skip


def test_what_a_proxy_would_say_changes_nothing(target: Target) -> None:
    """There is no proxy that is trusted: the other side of the socket is the client, in every log."""
    server = target.server
    answer = once(server, post("/v1/organization/projects", {"name": "forwarded"}, *FORWARDED, key=server.admin_key))
    assert answer.status == 200
    made = json.loads(answer.body)["id"]
    found = json.loads(target.ask("GET", f"/v1/organization/audit_logs?resource_ids[]={made}").body)["data"]
    assert [entry["actor"]["api_key"] and entry["actor"]["session"]["ip_address"] for entry in found] == ["127.0.0.1"]
    answer = once(server, post("/v1/chat/completions", {**CHAT, "model": "mock"}, *FORWARDED, key=server.api_key))
    assert answer.status == 200
    for line in FORWARDED:
        plain_answer = once(server, head("GET", "/v1/models", key=server.api_key))
        other = once(server, head("GET", "/v1/models", line, key=server.api_key))
        assert (other.status, other.body) == (plain_answer.status, plain_answer.body), line
        assert once(server, head("GET", "/v1/organization/projects", line, key=server.api_key)).status == 403
    time.sleep(0.5)
    assert b"203.0.113.9" not in (server.data / "access.log").read_bytes()
    assert {json.loads(line)["client"] for line in (server.data / "access.log").read_bytes().splitlines()} == {
        "127.0.0.1"
    }


HOSTS = (
    "evil.example",
    "127.0.0.1:1",
    "x\t",
    "a b",
    "a,b",
    "x" * 5000,
    "/../",
    "[::1",
    "user@evil.example",
    "é".encode().decode("latin-1"),
)


def test_the_host_changes_nothing(plain: Target) -> None:
    server = plain.server
    expected = once(server, head("GET", "/v1/models", key=server.api_key)).body
    for host in HOSTS:
        answer = once(server, head("GET", "/v1/models", key=server.api_key, host=host))
        assert answer.status in (200, 400), (host, answer.body)
        assert answer.status == 400 or answer.body == expected
        missing = once(server, head("GET", "/v1/nothing", key=server.api_key, host=host))
        assert b"evil" not in missing.body and missing.header("location") is None
        answer = once(server, head("GET", "/v1/models/", key=server.api_key, host=host))
        assert answer.header("location") is None  # no redirect to wherever Host says
    two = once(server, head("GET", "/v1/models", "host: evil.example", key=server.api_key))
    assert two.status in (200, 400)


# ---- path tricks

TRICKS = (
    "/v1/models/../organization/projects", "/v1/models/%2e%2e/organization/projects", "//v1/organization/projects",
    "/v1//organization/projects", "/v1/./organization/projects", "/v1/organization/projects/",
    "/v1/organization%2fprojects",
    "/v1/%6frganization/projects", "/V1/Organization/Projects", "/v1/organization/projects;x=y",
    "/v1/organization/projects%00",
    "/v1/organization/projects%0a", "/v1/organization/projects%20", "/v1/organization/projects.",
    "/v1/organization/projects.json",
    "/healthz/../v1/organization/projects", "/metrics/%2e%2e/v1/organization/projects",
    "/v1/organization/./projects",
    "\\v1\\organization\\projects", "/v1\\organization\\projects", "/v1/organization/projects%23",
    "/v1/organization/projects%3fa=b",
    "/v1/organization/%70rojects", "/v1/organization/%2570rojects",
    "/v1/chat/completions/../../organization/projects",
    "/v1/organization/projects\u00e9", "/v1/%c0%ae%c0%ae/organization/projects", "/v1/organization/projects%ff",
    "/v1/organization/..%2f..%2f..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
    "http://evil.example/v1/organization/projects", "https://127.0.0.1/v1/organization/projects",
    "evil.example:443", "*",
    "/v1/organization/projects#fragment", "?", "/" + "a/" * 5000, "/" + "%2e%2e%2f" * 2000,
)  # fmt: skip


def test_no_way_around_the_edge(plain: Target) -> None:
    """However an administrative path is spelled: a project key gets nothing of it, and nobody anything without one."""
    server = plain.server
    secret = plain.ids["project_id"].encode()
    for trick in TRICKS:
        for key in (None, server.api_key):
            for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
                data = head(method, trick, "content-length: 0", **({"key": key} if key else {}))
                for answer in all_of_head(server, data) if method == "HEAD" else [once(server, data)]:
                    assert 400 <= answer.status < 500, (method, trick, answer.status, answer.body[:200])
                    assert secret not in answer.body and b"root:" not in answer.body
    answer = once(server, head("CONNECT", "evil.example:443", key=server.api_key))
    assert answer.status == 400


def all_of_head(server: Served, data: bytes) -> list[Answer]:
    """HEAD has no body to wait for."""
    wire = Wire.to(server)
    try:
        wire.send(data)
        while b"\r\n\r\n" not in wire.got and wire.more():
            pass
        return [Answer(int(wire.got.split()[1]), [], b"")]
    finally:
        wire.close()


def test_encoded_slashes_do_not_leave_a_project(target: Target) -> None:
    """An id with a slash in it is an id: it leads to no other object."""
    server, ids = target.server, target.ids
    other = target.made("/projects", name="other")["id"]
    key = ids["api_key_id"]
    for crossing in (
        f"{other}/../{ids['project_id']}",
        f"{other}%2f..%2f{ids['project_id']}",
        f"{other}%2fapi_keys%2f..%2f..%2f{ids['project_id']}",
    ):
        answer = target.ask("GET", f"/v1/organization/projects/{crossing}/api_keys/{key}")
        assert answer.status == 404, (crossing, answer.body)
    answer = target.ask("GET", f"/v1/organization/projects/{other}/api_keys/{key}")
    assert answer.status == 404
    answer = target.ask("DELETE", f"/v1/organization/projects/{other}/service_accounts/..%2f..%2f{ids['project_id']}")
    assert answer.status == 404
    assert target.ask("GET", f"/v1/organization/projects/{ids['project_id']}/api_keys/{key}").status == 200
    assert once(server, head("GET", "/v1/models/..%2forganization", key=server.api_key)).status == 404


@pytest.mark.parametrize(
    "line",
    [
        "GET /healthz HTTP/2.0", "GET /healthz HTTP/0.9", "GET /healthz", "get /healthz HTTP/1.1",
        "G\x00T /healthz HTTP/1.1",
        "GET /health\x00z HTTP/1.1", "GET /health\x7fz HTTP/1.1", "GET\t/healthz HTTP/1.1",
        "XYZZY /healthz HTTP/1.1", "A" * 5000 + " /healthz HTTP/1.1", "GET /healthz HTTP/1.1 x", "PRI * HTTP/2.0",
        "GET /healthz HTTP/1.10", " GET /healthz HTTP/1.1", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        "GET /healthz ICE/1.0",
    ],
    ids=lambda line: repr(line[:40]),
)  # fmt: skip
def test_odd_request_lines(plain: Target, line: str) -> None:
    found = all_of(plain.server, line.encode("latin-1") + b"\r\nhost: x\r\n\r\n")
    assert [answer.status for answer in found] in ([400], [405], []), [(a.status, a.body[:99]) for a in found]


# ---- an upstream of the caller's choice


BODY_TRICKS = {
    "base_url": "http://127.0.0.1:1/v1", "api_base": "http://127.0.0.1:1/v1", "api_key": "sk-callers-own",
    "api_version": "2020-01-01", "custom_llm_provider": "azure", "extra_headers": {"authorization": "Bearer x"},
}  # fmt: skip
HEADER_TRICKS = (
    "x-upstream-url: http://127.0.0.1:1", "x-base-url: http://127.0.0.1:1", "openai-api-base: http://127.0.0.1:1",
    "x-openai-base-url: http://127.0.0.1:1", "api-key: sk-callers-own", "x-api-key: sk-callers-own",
    "x-portkey-provider: openai", "x-portkey-custom-host: http://127.0.0.1:1", "x-portkey-config: {}",
    "x-litellm-api-key: sk-callers-own", "x-goog-api-key: sk-callers-own",
    "helicone-target-url: http://127.0.0.1:1",
    "helicone-auth: Bearer x", "cookie: session=callers", "proxy-authorization: Basic Y2FsbGVyOnB3",
    "openai-beta: assistants=v2", "x-forwarded-for: 203.0.113.9", "forwarded: for=203.0.113.9", "te: trailers",
    "x-custom: callers", "connection: keep-alive, authorization", "via: 1.1 callers", "traceparent: 00-callers",
    "user-agent: callers", "referer: http://callers.example", "accept-encoding: gzip", "idempotency-key: callers",
)  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("name", sorted(BODY_TRICKS))
def test_a_body_chooses_no_upstream(plain: Target, path: str, name: str) -> None:
    """It is refused, whoever would answer, and not passed on to an upstream that might act on it."""
    plain.far.requests.clear()
    for model in ("far", "mock"):
        body: dict[str, Any] = {"model": model, "messages": CHAT["messages"]}
        if "chat" not in path:
            body = {"model": "far-embedding", "input": "hi"} if "embed" in path else {"model": model, "prompt": "hi"}
        answer = plain.ask("POST", path, {**body, name: BODY_TRICKS[name]}, plain.server.api_key)
        assert answer.status == 400 and answer.error()["code"] == "unknown_parameter", answer.body
        assert answer.error()["param"] == name and b"sk-callers-own" not in answer.body
    assert not plain.far.requests


def test_an_upstream_sees_its_own_key_and_nothing_of_the_callers(plain: Target) -> None:
    plain.far.requests.clear()
    answer = once(plain.server, post("/v1/chat/completions", CHAT, *HEADER_TRICKS, key=plain.server.api_key))
    assert answer.status == 200, answer.body
    [(path, headers, body)] = plain.far.requests
    assert path == "/v1/chat/completions" and body == CHAT
    assert [name.lower() for name, _ in headers] == [
        "host",
        "content-type",
        "user-agent",
        "authorization",
        "content-length",
    ]
    given = {name.lower(): value for name, value in headers}
    assert given["authorization"] == f"Bearer {FAR_KEY}" and given["host"] == f"127.0.0.1:{plain.far.port}"
    sent = json.dumps(headers)
    assert "callers" not in sent and plain.server.api_key not in sent and "203.0.113.9" not in sent


# ---- logs


CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def told(server: Served, *arguments: str) -> bytes:
    """What a command on the server's data directory prints."""
    command = [sys.executable, "-m", "tertulia", *arguments, "--config", str(server.data / "tertulia.toml")]
    environment = {**os.environ, "FAR_KEY": FAR_KEY}
    return subprocess.run(
        [*command, "--data", str(server.data)], capture_output=True, env=environment, check=True
    ).stdout


def test_every_line_of_the_logs_is_one_line(target: Target) -> None:
    """Whatever callers send: a line of JSON each, and nothing that a terminal would act on."""
    server = target.server
    attacks = [
        '\n{"id":"req_forged"}',
        "\r\n\r\n",
        "\x1b]0;owned\x07\x1b[2J",
        "\x9b31m",
        "\u2028\u2029",
        "\u202e",
        '","status":200,"x":"',
    ]
    for attack in attacks:
        for model in (attack, f"wild-{attack}"):
            for path in ("/v1/chat/completions", "/v1/embeddings"):
                body = {"model": model, "messages": CHAT["messages"], "input": "hi"}
                target.ask("POST", path, body, server.api_key)
        target.ask("POST", "/v1/organization/projects", {"name": attack})
        target.ask("POST", "/v1/organization/groups", {"name": attack})
        target.ask("GET", f"/v1/models/{quote(attack)}", key=server.api_key)
        target.ask("GET", f"/{quote(attack)}", key=server.api_key)
        agent = attack.replace("\r", "").replace("\n", "").encode().decode("latin-1")
        once(server, post("/v1/organization/projects", {"name": "told"}, f"user-agent: {agent}", key=server.admin_key))
    time.sleep(0.6)
    lines = (server.data / "access.log").read_bytes().splitlines()
    assert len(lines) > len(attacks)
    for line in lines:
        entry = json.loads(line)
        assert entry["id"].startswith("req_") and entry["id"] != "req_forged"
    for kept in ("access.log", "stderr.log"):
        text = (server.data / kept).read_bytes().decode()
        found = CONTROLS.findall(text)
        assert not found, (kept, set(found))
        assert not re.search(r"^\{\"id\":\"req_forged", text, re.MULTILINE)
    answer = json.loads(target.ask("GET", "/v1/organization/audit_logs?limit=100").body)
    agents = {
        entry["actor"]["session"]["user_agent"] for entry in answer["data"] if entry["actor"]["type"] == "api_key"
    }
    assert all(agent.isprintable() for agent in agents), agents
    for command in (("list",), ("projects", "list")):
        listed = told(server, "keys", *command)
        assert listed.count(b"\n") > 3 and not CONTROLS.search(listed.decode()), listed
    metrics = once(server, head("GET", "/metrics")).body.decode()
    assert all(re.fullmatch(r"#.*|[a-z_]+(\{.*\})? [-+.0-9eInfa]+|", line) for line in metrics.split("\n"))


# ---- guessing keys


def test_a_key_is_found_by_the_keyed_hash_of_all_of_it() -> None:
    """So how long it takes tells nothing: a hash of a guess has nothing in common with that of a key, however near the
    guess, and who has not the secret cannot make one that has."""
    pepper, key = secrets.token_bytes(32), keys.make("project", None).encode()
    ours = keys.digest(key, pepper)
    assert len(ours) == 32 and ours != keys.digest(key, secrets.token_bytes(32))
    near = [key[:at] + bytes([key[at] ^ 1]) + key[at + 1 :] for at in range(len(key))]
    alike = [
        sum(a == b for a, b in zip(keys.digest(guess, pepper), ours, strict=True)) for guess in (*near, key + b"0")
    ]
    assert max(alike) < 8, "hashes of near keys are near"
    source = MODULES["tertulia.accounts.directory"].tree
    [body] = [node for node in ast.walk(source) if isinstance(node, ast.FunctionDef) and node.name == "_find"]
    text = ast.unparse(body)
    assert "hash = keys.digest(key, self._pepper)" in text and "keys.get(hash, NOBODY)" in text
    assert "if hmac.compare_digest(found, hash)" in text
    compared = [ast.unparse(node) for node in ast.walk(body) if isinstance(node, ast.Compare)]
    assert not [one for one in compared if re.search(r"\bkey\b(?!\))", one)], compared


SECRET_NAMES = re.compile(r"(^|_|\.)(secret|token|password|hash|digest|signature|pepper)$")


def test_secrets_are_not_compared_byte_by_byte() -> None:
    """== on a secret stops at the first difference; compare_digest does not."""
    found = []
    for module in MODULES.values():
        if module.room not in ("accounts", "api", "server"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                if any(SECRET_NAMES.search(side) for side in sides) and not any(
                    side in ("''", "b''") for side in sides
                ):
                    found.append(f"{module.where}:{node.lineno} {ast.unparse(node)}")
    assert not found, found


def test_how_long_a_guess_takes(tmp_path: Path) -> None:
    """A guess that has all letters of a key but one takes as long as one that has none, in the look-up and in all that
    a refusal takes: no coarse trend. That one would be found is shown with a comparison letter by letter."""
    database = open_database(tmp_path)
    directory = Directory(database, tmp_path)
    directory.first_start(None, None)
    organization, project = directory.home()
    made = [keys.make("project", None) for _ in range(200)]
    directory.add_keys(made, "project", organization, project, "known")
    key = made[100]
    assert directory._find(key.encode()) is directory.authenticate(key.encode())

    def refused(guess: bytes) -> None:
        with contextlib.suppress(Unauthorized):
            directory.authenticate(guess)

    def letter_by_letter(guess: bytes) -> bool:
        return all(one == other for one, other in zip(guess, key.encode(), strict=True))

    try:
        for attempt in (directory._find, refused):
            assert 1 / 2 < trend(attempt, key) < 2, attempt
        assert trend(letter_by_letter, key) > 2
    finally:
        database.dispose()


def trend(attempt: Callable[[bytes], object], key: str) -> float:
    """How many times as long it takes for guesses with all letters of the key but the last as for guesses with none:
    the medians of batches that take turns, so that what else the machine does meets both."""
    none, nearly = guesses(key, 0), guesses(key, len(key) - 1)
    times: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(60):
        for which, batch in enumerate((none, nearly)):
            began = time.perf_counter_ns()
            for guess in batch:
                attempt(guess)
            times[which].append(time.perf_counter_ns() - began)
    return statistics.median(times[1]) / statistics.median(times[0])


def guesses(key: str, right: int) -> list[bytes]:
    """100 that have so many first letters of the key, and no other letter in its place."""
    letters = string.ascii_letters + string.digits
    return [
        (key[:right] + "".join(secrets.choice(letters.replace(letter, "")) for letter in key[right:])).encode()
        for _ in range(100)
    ]
