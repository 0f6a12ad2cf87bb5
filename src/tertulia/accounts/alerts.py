"""Spend alerts: when a project or the organization has spent as much as an alert says, its recipients are told, once a
calendar month, by e-mail and by a webhook. One whose threshold is changed is another one.

    the loop   Budget.pay ─> crossed(): a message in a queue, nothing else
    a thread   which alerts that are; claims each in the table alerts_sent; tells, again and again until it is told

An alert that nobody can be told of (no channel, no recipient) is not claimed: it is told when there is somebody.

Whichever process claims an alert tells it, and notes when it has: a claim that has been silent for ten minutes is of a
process that is gone, and another takes it over. So an alert is told once; only if a process dies between telling and
noting is it told a second time, and the webhook's receiver knows it by the id of the event. Where alerts go is the
settings' to say: the address of the webhook is never a caller's, and an alert's own is for e-mail only.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import queue
import smtplib
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from sqlalchemy import Engine, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from ..errors import SettingsError, TertuliaError
from ..store.schema import alerts_sent
from .budgets import UNLIMITED, Budget, Budgets
from .records import Record

log = logging.getLogger("tertulia.alerts")

NANO_PER_CENT = 10_000_000
PATIENCE = 10.0  # seconds for a server to connect and to answer
PAUSES = (1.0, 5.0, 30.0, 120.0, 300.0)  # seconds between two tries to tell; the last again and again
TAKEN_OVER = 600.0  # seconds after which the claim of another process counts for nothing
LOOK_SECONDS = 30.0  # how often claims of others and a database that failed are looked at again
STOP_SECONDS = 2.0


class Alert(NamedTuple):
    """A record of the kind spend_alert. threshold in nano-dollars; about: the id of the budget it is of."""

    id: str
    about: str
    threshold: int
    recipients: tuple[str, ...]
    prefix: str


class News(NamedTuple):
    """What is to be told. spent in nano-dollars, at in unix seconds."""

    alert: Alert
    organization: str
    period: str
    spent: int
    at: int

    @property
    def key(self) -> tuple[str, str]:
        """What is told once: the alert with its threshold, in a month. As in alerts_sent, whose ids end at 64."""
        id = f"{self.alert.id}:{self.alert.threshold // NANO_PER_CENT}"
        return (id if len(id) <= 64 else hashlib.sha256(id.encode()).hexdigest()), self.period

    @property
    def id(self) -> str:
        """The same for every try, whoever tells."""
        return f"evt_{hashlib.sha256('/'.join(self.key).encode()).hexdigest()[:24]}"


class Channel(Protocol):
    """Where news go."""

    name: str

    def reaches(self, alert: Alert) -> bool:
        """Whether there is anybody to tell through it."""

    def tell(self, news: News) -> None:
        """Returns when it is told. Raises OSError or Undelivered if it could not be."""


class Undelivered(Exception):
    """What the other side said, without anything of ours."""


def alert_of(record: Record) -> Alert:
    channel = record.body.get("notification_channel") or {}
    recipients = tuple(str(one) for one in channel.get("recipients") or ())
    threshold = int(record.body["threshold_amount"]) * NANO_PER_CENT
    return Alert(record.id, record.parent, threshold, recipients, str(channel.get("subject_prefix") or ""))


class _Job:
    """An alert of ours that is not told everywhere yet."""

    def __init__(self, news: News, channels: Sequence[Channel]) -> None:
        self.news, self.left = news, list(channels)
        self.where = ", ".join(channel.name for channel in channels)
        self.tries = 0
        self.due = 0.0


class Alerts:
    """Watches budgets. start() and stop() belong to the loop's thread; all waiting is done in another."""

    def __init__(
        self, database: Engine, budgets: Budgets, records: Callable[[], list[Record]], organization: Callable[[], str],
        channels: Sequence[Channel], wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """records() reads the alerts there are and may raise Unavailable; organization() is its id."""
        self._database, self._budgets, self._read, self._organization = database, budgets, records, organization
        self._channels, self._wall = list(channels), wall
        self._alerts: list[Alert] = []
        self._jobs: dict[tuple[str, str], _Job] = {}  # by the key of its news
        self._done: set[tuple[str, str]] = set()
        self._unheard: set[tuple[str, str]] = set()  # of which there is nobody to tell, and that has been said
        self._others: dict[tuple[str, str], float] = {}  # claimed by another process: when to look again
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.sent = self.failed = 0
        budgets.crossed, budgets.rolled = self._crossed, self.changed

    # the loop's side
    def start(self) -> None:
        """Begins to watch."""
        self._queue.put("changed")
        self._thread = threading.Thread(target=self._work, name="tertulia-alerts", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Alerts may have been added, changed or removed, or a month has begun."""
        self._queue.put("changed")

    def _crossed(self, budget: Budget) -> None:
        self._queue.put(budget.id)

    def stop(self) -> None:
        """Ends the thread; what is not told is told after the next start."""
        if self._thread is not None:
            self._queue.put("stop")
            self._thread.join(STOP_SECONDS)

    # the thread's
    def _work(self) -> None:
        again = 0.0
        while True:
            now = time.monotonic()
            due = min([job.due for job in self._jobs.values()] + [again or now + LOOK_SECONDS])
            try:
                said = self._queue.get(timeout=max(0.01, due - now))
            except queue.Empty:
                said = "look"
            if said == "stop":
                return
            try:
                if said in ("changed", "look"):
                    self._alerts = [alert_of(record) for record in self._read()]
                self._watch()
                again = time.monotonic() + LOOK_SECONDS
            except (SQLAlchemyError, TertuliaError, OSError) as error:  # the database cannot be used now
                log.warning("spend alerts wait for the database (%s)", type(error).__name__)
                again = time.monotonic() + LOOK_SECONDS
            except Exception:  # a record that is not as it should be; alerts that are go on
                log.exception("spend alerts: unexpected error")
                again = time.monotonic() + LOOK_SECONDS
            self._tell()

    def _watch(self) -> None:
        """Claims what has been crossed, and has each budget say when the next is."""
        period, budgets = self._budgets.month, dict(self._budgets.all)
        for id, budget in budgets.items():
            mine = [alert for alert in self._alerts if alert.about == id]
            while mine:
                spent = budget.spent
                for alert in mine:
                    if alert.threshold <= spent:
                        self._claim(News(alert, self._organization(), period, spent, int(self._wall())))
                budget.alert_at = min((one.threshold for one in mine if one.threshold > spent), default=UNLIMITED)
                if budget.spent < budget.alert_at:  # else it was crossed just now
                    break
        for keys in (self._done, self._unheard):
            keys.difference_update([key for key in keys if key[1] != period])

    def _claim(self, news: News) -> None:
        key, now = news.key, time.monotonic()
        if key in self._done or key in self._jobs or self._others.get(key, 0.0) > now:
            return
        channels = [channel for channel in self._channels if channel.reaches(news.alert)]
        if not channels:
            self._nobody(news)
        elif self._take(news):
            self._jobs[key] = _Job(news, channels)
            self._others.pop(key, None)

    def _nobody(self, news: News) -> None:
        """Says it once. Nothing is noted, so it is told as soon as there is somebody, here or by another process."""
        if news.key not in self._unheard:
            self._unheard.add(news.key)
            self.failed += 1
            told = "nobody can be told: no channel is configured, or it has no recipient"
            log.warning("%s has spent %s this month; alert %s: %s", news.alert.about, _dollars(news.spent),
                        news.alert.id, told)  # fmt: skip

    def _take(self, news: News) -> bool:
        """Whether the alert is ours to tell. A time below zero is of a claim, one above of when it was told."""
        c, key, now = alerts_sent.c, news.key, int(self._wall())
        try:
            with self._database.begin() as connection:
                connection.execute(insert(alerts_sent).values(alert_id=key[0], period=key[1], at=-now))
            return True
        except IntegrityError:  # somebody was first
            pass
        with self._database.begin() as connection:
            mine = (c.alert_id == key[0]) & (c.period == key[1])
            at = connection.execute(select(c.at).where(mine)).scalar()
            if at is not None and at > 0:
                self._done.add(key)
                return False
            if at is not None and now + at >= TAKEN_OVER:
                taken = connection.execute(update(alerts_sent).where(mine, c.at == at).values(at=-now))
                return taken.rowcount == 1
        self._others[key] = time.monotonic() + LOOK_SECONDS
        return False

    def _tell(self) -> None:
        """Tells what is due, each where it has not been told yet."""
        for key, job in list(self._jobs.items()):
            if job.due > time.monotonic():
                continue
            for channel in list(job.left):
                try:
                    channel.tell(job.news)
                    job.left.remove(channel)
                except (OSError, Undelivered, smtplib.SMTPException, http.client.HTTPException) as error:
                    self.failed += 1
                    log.warning("spend alert %s: %s failed (%s)", job.news.alert.id, channel.name, _said(error))
            if self._note(key, not job.left):
                self._finish(key, job)
            else:
                job.due = time.monotonic() + PAUSES[min(job.tries, len(PAUSES) - 1)]
                job.tries += 1

    def _note(self, key: tuple[str, str], told: bool) -> bool:
        """Writes down that it is told, or that we are still at it. False if it is not told, or nobody can know."""
        now = int(self._wall())
        c = alerts_sent.c
        try:
            with self._database.begin() as connection:
                mine = (c.alert_id == key[0]) & (c.period == key[1])
                connection.execute(update(alerts_sent).where(mine).values(at=now if told else -now))
        except SQLAlchemyError as error:
            log.warning("spend alert %s cannot be noted as told (%s)", key[0], type(error).__name__)
            return False
        return told

    def _finish(self, key: tuple[str, str], job: _Job) -> None:
        del self._jobs[key]
        self._done.add(key)
        self.sent += 1
        news = job.news
        log.warning("%s has spent %s this month; told: %s", news.alert.about, _dollars(news.spent), job.where)


# channels
class Webhook:
    """POSTs to one address, signed as OpenAI signs its webhooks. Redirects are not followed."""

    name = "webhook"

    def __init__(self, url: str, secret: Callable[[], str | None]) -> None:
        """secret() as it is now: whsec_ and base64. Raises SettingsError, without the secret."""
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname or place.username or place.password:
            raise SettingsError("alert_webhook: expected http:// or https:// and a host, without user and password")
        self._place = place
        self._secret = secret
        if len(self._key()) < 16:
            raise SettingsError("alert_webhook_secret: expected whsec_ and at least 16 bytes in base64")

    def _key(self) -> bytes:
        try:
            return base64.b64decode((self._secret() or "").removeprefix("whsec_"), validate=True)
        except ValueError:
            return b""

    def reaches(self, alert: Alert) -> bool:
        return True

    def tell(self, news: News) -> None:
        body = json.dumps(self.event(news)).encode()
        headers = {"content-type": "application/json", "user-agent": "tertulia", **self.signed(news.id, body)}
        place = self._place
        assert place.hostname is not None
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.hostname, place.port, timeout=PATIENCE)
        try:
            target = (place.path or "/") + (f"?{place.query}" if place.query else "")
            connection.request("POST", target, body, headers)
            status = connection.getresponse().status
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise Undelivered(f"status {status}")

    def signed(self, id: str, body: bytes) -> Mapping[str, str]:
        """The headers by which the receiver knows us."""
        at = str(int(time.time()))
        signature = hmac.digest(self._key(), f"{id}.{at}.".encode() + body, "sha256")
        return {
            "webhook-id": id, "webhook-timestamp": at,
            "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
        }  # fmt: skip

    @staticmethod
    def event(news: News) -> dict[str, Any]:
        alert = news.alert
        whole = alert.about == news.organization
        return {
            "id": news.id, "object": "event", "created_at": news.at,
            "type": f"{'organization' if whole else 'project'}.spend_alert.crossed",
            "data": {
                "id": alert.id, "organization_id": news.organization, "project_id": None if whole else alert.about,
                "interval": "month", "period": news.period, "currency": "USD",
                "threshold_amount": alert.threshold // NANO_PER_CENT, "spent_amount": news.spent / NANO_PER_CENT,
            },
        }  # fmt: skip


class Mail:
    """Sends to the recipients of an alert through one mail server, by TLS from the start (smtps) or where it offers
    it."""

    name = "mail"

    def __init__(self, url: str, password: Callable[[], str | None], sender: str | None) -> None:
        """url: smtp:// or smtps://, with a user if the server wants one. password() is asked each time. Raises
        SettingsError."""
        place = urlsplit(url)
        if place.scheme not in ("smtp", "smtps") or not place.hostname:
            raise SettingsError("alert_smtp: expected smtp://USER@HOST:PORT or smtps://USER@HOST:PORT")
        if place.password:
            raise SettingsError("alert_smtp: the password belongs into alert_smtp_password, as a reference")
        self._host, self._tls = place.hostname, place.scheme == "smtps"
        self._port = place.port or (465 if self._tls else 587)
        self._user, self._password = place.username, password
        self._sender = sender or f"tertulia@{self._host}"
        if not _address(self._sender):
            raise SettingsError("alert_from: this is no e-mail address")

    def reaches(self, alert: Alert) -> bool:
        return any(_address(one) for one in alert.recipients)

    def tell(self, news: News) -> None:
        recipients = [one for one in news.alert.recipients if _address(one)]
        if not recipients:
            raise Undelivered("it has no recipient")
        with self._connected() as server:
            password = self._password()
            if self._user and password:
                server.login(self._user, password)
            refused = server.send_message(self.message(news, recipients), self._sender, recipients)
        if refused:  # but not all, or it would have raised
            log.warning("spend alert %s: the mail server refused %d of its recipients", news.alert.id, len(refused))

    def _connected(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        if self._tls:
            return smtplib.SMTP_SSL(self._host, self._port, timeout=PATIENCE, context=context)
        server = smtplib.SMTP(self._host, self._port, timeout=PATIENCE)
        try:
            server.ehlo()
            if server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
            elif self._password() and not _near(self._host):
                raise Undelivered("the mail server offers no TLS: no password is sent to it")
        except BaseException:  # whatever it was, the connection must not stay open
            server.close()
            raise
        return server

    def message(self, news: News, recipients: Sequence[str]) -> EmailMessage:
        alert = news.alert
        whom = "The organization" if alert.about == news.organization else f"The project {alert.about}"
        found = EmailMessage()
        found["Subject"] = " ".join(f"{alert.prefix} Spend alert: {_dollars(alert.threshold)} reached".split())
        found["From"], found["To"] = self._sender, [Address(addr_spec=one) for one in recipients]
        found["Date"], found["Message-ID"] = formatdate(), f"<{news.id}@tertulia>"
        found.set_content(
            f"{whom} has spent {_dollars(news.spent)} in {news.period} (UTC), and so reached the alert {alert.id} at "
            f"{_dollars(alert.threshold)} a month.\n"
        )
        return found


def _address(text: str) -> bool:
    if not text.isprintable() or "@" not in text or len(text) > 320:
        return False
    try:
        Address(addr_spec=text)
    except Exception:  # the parser of addresses has more than one way to fail
        return False
    return True


def _near(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _dollars(nano: int) -> str:
    return f"${nano / 1e9:,.2f}"


def _said(error: BaseException) -> str:
    """What happened, without what the other side may have repeated of ours."""
    if isinstance(error, Undelivered):
        return str(error)
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{type(error).__name__} {error.smtp_code}"
    return type(error).__name__
