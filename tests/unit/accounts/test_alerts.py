"""Spend alerts reach their recipients once, by mail and by webhook, whoever restarts or fails meanwhile."""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import http.server
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import select

from tertulia.accounts.alerts import Alert, Alerts, Mail, News, Undelivered, Webhook, alert_of
from tertulia.accounts.budgets import Budgets
from tertulia.accounts.credentials import Credentials, references
from tertulia.accounts.records import Record
from tertulia.config import Settings
from tertulia.errors import SettingsError, Unavailable
from tertulia.server import channels
from tertulia.store.database import Database, open_database
from tertulia.store.schema import alerts_sent

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
CENT = 10_000_000
NOVEMBER = 1_795_000_000.0  # 2026-11-18


def record(id: str = "alert_1", cents: int = 100, about: str = "proj_1", **channel: Any) -> Record:
    channel = {"type": "email", "recipients": ["ann@example.com"], **channel}
    body = {"threshold_amount": cents, "currency": "USD", "interval": "month", "notification_channel": channel}
    return Record(id, "spend_alert", about, None, 0, body)


def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Channel:
    """Keeps what it is told; fails as often as it is to."""

    name = "channel"

    def __init__(self, failures: int = 0) -> None:
        self.told: list[News] = []
        self.failures = failures

    def reaches(self, alert: Alert) -> bool:
        return bool(alert.recipients)

    def tell(self, news: News) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionRefusedError
        self.told.append(news)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path)
    yield opened
    opened.dispose()


class Watch:
    """One process that watches."""

    def __init__(self, database: Database, records: list[Record], *channels: Any, now: float = NOVEMBER) -> None:
        self.now, self.records = now, records
        self.budgets = Budgets(lambda: self.now)
        self.budget, self.whole = self.budgets.of("proj_1"), self.budgets.of("org-1")
        self.alerts = Alerts(
            database, self.budgets, lambda: self.records, lambda: "org-1", channels, lambda: self.now
        )  # fmt: skip

    def __enter__(self) -> Watch:
        self.alerts.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.alerts.stop()

    def pay(self, cents: int) -> None:
        self.budget.pay(cents * CENT)
        self.whole.pay(cents * CENT)


def rows(database: Database) -> list[tuple[str, str, int]]:
    with database.connect() as connection:
        return [tuple(row) for row in connection.execute(select(alerts_sent)).all()]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.accounts.alerts.PAUSES", (0.02,))
    monkeypatch.setattr("tertulia.accounts.alerts.LOOK_SECONDS", 0.1)


def test_each_alert_is_told_once_when_its_threshold_is_reached(database: Database) -> None:
    channel = Channel()
    alerts = [record("alert_1", 100), record("alert_2", 200), record("alert_3", 150, "org-1")]
    with Watch(database, alerts, channel) as it:
        until(lambda: it.budget.alert_at == 100 * CENT and it.whole.alert_at == 150 * CENT)
        it.pay(99)
        time.sleep(0.15)
        assert channel.told == []
        it.pay(1)
        until(lambda: len(channel.told) == 1)
        it.pay(60)
        until(lambda: len(channel.told) == 2)
        it.pay(500)
        until(lambda: len(channel.told) == 3)
        it.pay(500)
        time.sleep(0.25)
    assert [(news.alert.id, news.period, news.spent) for news in channel.told] == [
        ("alert_1", "2026-11", 100 * CENT), ("alert_3", "2026-11", 160 * CENT), ("alert_2", "2026-11", 660 * CENT),
    ]  # fmt: skip
    assert sorted(rows(database)) == [
        (f"alert_{told}", "2026-11", int(NOVEMBER)) for told in ("1:100", "2:200", "3:150")
    ]  # fmt: skip


def test_not_again_after_a_restart_and_again_next_month(database: Database) -> None:
    channel = Channel()
    for spent in (100, 110, 120):
        with Watch(database, [record()], channel) as it:
            it.pay(spent)
            it.alerts.changed()
            until(lambda: channel.told)
            time.sleep(0.15)
    assert len(channel.told) == 1
    with Watch(database, [record()], channel, now=NOVEMBER) as it:
        it.now += 20 * 86_400
        it.budgets.roll()
        until(lambda: it.budget.alert_at == 100 * CENT)
        it.pay(100)
        until(lambda: len(channel.told) == 2)
    assert [news.period for news in channel.told] == ["2026-11", "2026-12"]
    assert channel.told[0].id != channel.told[1].id


def test_of_many_processes_one_tells(database: Database) -> None:
    channel = Channel()
    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(Watch(database, [record()], channel)) for _ in range(5)]
        for it in watches:
            it.pay(100)
        until(lambda: channel.told)
        time.sleep(0.3)
    assert len(channel.told) == 1


def test_a_process_that_died_with_its_claim_is_replaced(database: Database) -> None:
    channel = Channel()
    with database.begin() as connection:
        connection.execute(
            alerts_sent.insert().values(alert_id="alert_1:100", period="2026-11", at=-int(NOVEMBER) + 30)
        )
    with Watch(database, [record()], channel) as it:
        it.pay(100)
        time.sleep(0.3)
        assert channel.told == []  # it may still be at it
        it.now += 700
        until(lambda: channel.told)
    assert rows(database)[0][2] == int(it.now)


def test_an_alert_that_is_new_or_lowered_counts_at_once(database: Database) -> None:
    channel = Channel()
    with Watch(database, [], channel) as it:
        it.pay(100)
        time.sleep(0.05)
        it.records = [record(cents=90)]
        it.alerts.changed()
        until(lambda: channel.told)


def test_a_threshold_that_is_raised_is_crossed_again_and_the_same_never_twice(database: Database) -> None:
    channel = Channel()
    with Watch(database, [record(cents=100)], channel) as it:
        it.pay(100)
        until(lambda: len(channel.told) == 1)
        it.records = [record(cents=200)]
        it.alerts.changed()
        until(lambda: it.budget.alert_at == 200 * CENT)
        assert len(channel.told) == 1
        it.pay(100)
        until(lambda: len(channel.told) == 2)
        for cents in (100, 200):
            it.records = [record(cents=cents)]
            it.alerts.changed()
            time.sleep(0.15)
    assert [told.alert.threshold for told in channel.told] == [100 * CENT, 200 * CENT]
    assert channel.told[0].id != channel.told[1].id
    assert sorted(row[0] for row in rows(database)) == ["alert_1:100", "alert_1:200"]


def test_what_is_noted_of_an_alert_fits_its_column() -> None:
    one, other = (News(alert_of(record("alert_" + 57 * "x", cents)), "org-1", "2026-11", 0, 0) for cents in (100, 200))
    assert len(one.key[0]) == len(other.key[0]) == 64 and one.key != other.key


def test_what_nobody_can_be_told_is_said_once_and_told_when_somebody_can(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with Watch(database, [record()]) as it:
        it.pay(100)
        until(lambda: it.alerts.failed)
        time.sleep(0.35)  # it has looked again
        assert (it.alerts.sent, it.alerts.failed) == (0, 1)
    assert caplog.text.count("nobody can be told") == 1
    assert rows(database) == []
    channel = Channel()
    with Watch(database, [record(recipients=[])], channel) as it:
        it.pay(100)
        until(lambda: it.alerts.failed)
        assert channel.told == [] and rows(database) == []
        it.records = [record()]
        it.alerts.changed()
        until(lambda: it.alerts.sent == 1)
    assert len(channel.told) == 1


def test_mail_reaches_only_whom_it_can_be_sent_to() -> None:
    mail = Mail("smtp://127.0.0.1:1", lambda: None, None)
    assert mail.reaches(alert_of(record(recipients=["not an address", "ann@example.com"])))
    assert not mail.reaches(alert_of(record(recipients=["not an address"])))
    with pytest.raises(Undelivered, match="no recipient"):
        mail.tell(news(recipients=["not an address"]))


def test_who_cannot_be_reached_is_tried_again_and_the_others_are_not_told_twice(database: Database) -> None:
    bad, good = Channel(failures=3), Channel()
    with Watch(database, [record()], bad, good) as it:
        it.pay(100)
        until(lambda: bad.told)
        until(lambda: it.alerts.sent == 1)
    assert (len(bad.told), len(good.told), it.alerts.failed) == (1, 1, 3)


def test_a_database_that_cannot_be_used_only_delays(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    channel, broken = Channel(), [True]
    with Watch(database, [record()], channel) as it:

        def read() -> list[Record]:
            if broken:
                raise Unavailable()
            return it.records

        monkeypatch.setattr(it.alerts, "_read", read)
        it.pay(100)
        it.alerts.changed()
        time.sleep(0.15)
        broken.clear()
        until(lambda: channel.told)


# the webhook
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        size = int(self.headers["content-length"])
        self.server.got.append((self.path, dict(self.headers.items()), self.rfile.read(size)))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(kind: type[socketserver.BaseServer], handler: Any, **more: Any) -> Iterator[Any]:
    server = kind(("127.0.0.1", 0), handler)
    server.__dict__.update(more, got=[])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def news(about: str = "proj_1", **channel: Any) -> News:
    return News(alert_of(record(about=about, **channel)), "org-1", "2026-11", 123 * CENT, int(NOVEMBER))


def test_the_webhook_is_signed_as_the_sdk_checks_it() -> None:
    with serving(http.server.HTTPServer, Receiver, status=204) as server:
        Webhook(f"http://127.0.0.1:{server.server_port}/hook?a=b", lambda: SECRET).tell(news())
    ((path, headers, body),) = server.got
    assert path == "/hook?a=b"
    client = OpenAI(api_key="x", webhook_secret=SECRET)
    client.webhooks.verify_signature(body, headers)
    said = json.loads(body)
    assert (said["id"], said["object"], said["type"]) == (news().id, "event", "project.spend_alert.crossed")
    assert said["data"] == {
        "id": "alert_1", "organization_id": "org-1", "project_id": "proj_1", "interval": "month", "period": "2026-11",
        "currency": "USD", "threshold_amount": 100, "spent_amount": 123.0,
    }  # fmt: skip
    with pytest.raises(Exception, match="signature"):
        client.webhooks.verify_signature(body + b" ", headers)


@pytest.mark.parametrize("status", [302, 404, 500])
def test_whatever_is_no_success_is_a_failure_and_no_redirect_is_followed(status: int) -> None:
    with (
        serving(http.server.HTTPServer, Receiver, status=status) as server,
        pytest.raises(Undelivered, match=f"status {status}"),
    ):
        Webhook(f"http://127.0.0.1:{server.server_port}/", lambda: SECRET).tell(news())
    assert len(server.got) == 1


@pytest.mark.parametrize(
    ("url", "secret", "said"),
    [
        ("ftp://host/x", SECRET, "alert_webhook: "), ("https://user:word@host/", SECRET, "alert_webhook: "),
        ("https:///x", SECRET, "alert_webhook: "), ("https://host/", "whsec_c2hvcnQ=", "alert_webhook_secret: "),
        ("https://host/", "no base64 at all", "alert_webhook_secret: "),
    ],
)  # fmt: skip
def test_a_webhook_that_cannot_be_used(url: str, secret: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Webhook(url, lambda: secret)
    assert error.value.message.startswith(said) and "user:word" not in error.value.message
    assert secret.removeprefix("whsec_") not in error.value.message


# mail
class Post(socketserver.StreamRequestHandler):
    """As much of SMTP as it takes to be given a message."""

    def handle(self) -> None:
        said, data = [], b""
        self.say(b"220 here")
        while line := self.rfile.readline():
            word = line.split()[0].upper() if line.split() else b""
            said.append(line.decode().strip())
            if word == b"EHLO":
                self.say(b"250-here\r\n250 AUTH PLAIN")
            elif word == b"AUTH":
                self.say(b"235 welcome")
            elif word == b"DATA":
                self.say(b"354 go on")
                while (line := self.rfile.readline()) != b".\r\n":
                    data += line
                self.say(b"250 taken")
            elif word == b"RCPT" and b"gone@" in line:
                self.say(b"550 nobody of that name")
            elif word == b"QUIT":
                self.say(b"221 bye")
                break
            else:
                self.say(b"250 fine")
        self.server.got.append((said, data))  # type: ignore[attr-defined]

    def say(self, line: bytes) -> None:
        self.wfile.write(line + b"\r\n")


def send(server: Any, alert: News, user: str = "", password: str | None = None) -> tuple[list[str], EmailMessage]:
    at = len(server.got)
    Mail(f"smtp://{user}127.0.0.1:{server.server_address[1]}", lambda: password, "alerts@example.com").tell(alert)
    until(lambda: len(server.got) > at)
    said, data = server.got[-1]
    return said, email.message_from_bytes(data, policy=email.policy.default)  # type: ignore[return-value]


def test_mail_goes_to_the_recipients_of_the_alert() -> None:
    alert = news(recipients=["ann@example.com", "bob@example.com"], subject_prefix="[prod]")
    with serving(socketserver.ThreadingTCPServer, Post) as server:
        said, message = send(server, alert, "me@", "secret")
    assert [line for line in said if line.startswith(("MAIL", "RCPT", "rcpt", "mail"))] == [
        "mail FROM:<alerts@example.com>", "rcpt TO:<ann@example.com>", "rcpt TO:<bob@example.com>",
    ]  # fmt: skip
    assert any(line.startswith("AUTH PLAIN") for line in said)
    assert (message["Subject"], message["From"]) == ("[prod] Spend alert: $1.00 reached", "alerts@example.com")
    assert message["To"] == "ann@example.com, bob@example.com"
    assert message["Message-ID"] == f"<{alert.id}@tertulia>"
    assert "The project proj_1 has spent $1.23 in 2026-11" in message.get_content()


def test_what_a_caller_writes_into_an_alert_is_text_and_nothing_else() -> None:
    evil = news(
        recipients=["eve@example.com\r\nBcc: all@example.com", "not an address", "ok@example.com"],
        subject_prefix="x\r\nBcc: all@example.com",
    )
    with serving(socketserver.ThreadingTCPServer, Post) as server:
        said, message = send(server, evil)
    assert [line for line in said if line.lower().startswith("rcpt")] == ["rcpt TO:<ok@example.com>"]
    assert message["Bcc"] is None and "\n" not in message["Subject"]


def test_one_recipient_that_is_refused_does_not_keep_it_from_the_others() -> None:
    with serving(socketserver.ThreadingTCPServer, Post) as server:
        _, message = send(server, news(recipients=["gone@example.com", "ann@example.com"]))
    assert "$1.23" in message.get_content()


def test_no_password_is_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.accounts.alerts._near", lambda host: False)
    with serving(socketserver.ThreadingTCPServer, Post) as server:
        mail = Mail(f"smtp://me@127.0.0.1:{server.server_address[1]}", lambda: "secret", None)
        with pytest.raises(Undelivered, match="no TLS"):
            mail.tell(news())
        until(lambda: server.got)
    assert not any("AUTH" in line for said, _ in server.got for line in said)


@pytest.mark.parametrize(
    ("url", "sender", "said"),
    [
        ("http://host", None, "alert_smtp: "), ("smtp://me:word@host", None, "alert_smtp: "),
        ("smtp://", None, "alert_smtp: "), ("smtp://host", "nobody", "alert_from: "),
        ("smtp://host", "a@b\r\nBcc: c@d", "alert_from: "),
    ],
)  # fmt: skip
def test_a_mail_server_that_cannot_be_used(url: str, sender: str | None, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        Mail(url, lambda: None, sender)
    assert error.value.message.startswith(said) and "word@" not in error.value.message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alert_webhook_secret": "env:S"}, "alert_webhook_secret: it does nothing without alert_webhook;"),
        ({"alert_smtp_password": "env:S"}, "alert_smtp_password: it does nothing without alert_smtp;"),
        ({"alert_from": "a@b.c"}, "alert_from: it does nothing without alert_smtp;"),
        ({"alert_webhook": "https://h/"}, "alert_webhook: it needs alert_webhook_secret"),
        ({"alert_webhook": "https://h:port/", "alert_webhook_secret": "env:S"}, "alert_webhook: this is no address"),
        ({"alert_smtp": "smtp://[h"}, "alert_smtp: this is no address"),
        ({"alert_smtp": "smtp://h", "alert_smtp_password": "env:S"}, "alert_smtp_password: alert_smtp names no user"),
        ({"alert_smtp": "smtp://me@h"}, "alert_smtp: it names a user, and alert_smtp_password"),
        ({"alert_smtp": "smtp://h", "alert_from": "nobody"}, "alert_from: this is no e-mail address"),
    ],
)  # fmt: skip
def test_half_of_a_way_to_tell_is_a_mistake_of_the_settings(given: dict[str, str], said: str) -> None:
    settings, credentials = Settings(**given), Credentials({"S": SECRET})  # type: ignore[arg-type]
    credentials.require(references(settings))
    with pytest.raises(SettingsError) as error:
        channels(settings, credentials)
    assert error.value.message.startswith(said) and SECRET not in error.value.message


def test_whole_ways_to_tell_are_taken() -> None:
    settings = Settings(
        alert_webhook="https://h/", alert_webhook_secret="env:S", alert_smtp="smtp://me@h", alert_smtp_password="env:S"
    )
    credentials = Credentials({"S": SECRET})
    credentials.require(references(settings))
    assert [channel.name for channel in channels(settings, credentials)] == ["webhook", "mail"]
    assert [channel.name for channel in channels(Settings(alert_smtp="smtp://h"), credentials)] == ["mail"]
    assert channels(Settings(), credentials) == []
