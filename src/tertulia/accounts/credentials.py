"""Secrets by reference, those of upstreams above all: their values as they were read last, and the thread that reads
them again.

It knows which settings refer to secrets; where those are kept is in vaults.py, what they are for is the server's.
Values are in memory alone: no message, log line or repr() of ours holds one, and a text that is no reference is not
repeated either, since it may be the secret itself. A secret that cannot be read again keeps its last value.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Collection, Mapping

from ..config import Settings, Upstream
from ..errors import SettingsError
from .vaults import NotRead, Store, kind_of, stores

log = logging.getLogger("tertulia.credentials")
FORMS = "env:NAME, file:PATH, aws:ID, azure:VAULT/SECRET or vault:PATH#FIELD"
SCHEMES = ("env:", "file:", "aws:", "azure:", "vault:")
HURRY_SECONDS = 10.0  # between two readings, if an upstream refuses a key: it may have been changed


def is_reference(text: str) -> bool:
    """Whether a text that may also stand for itself (the value of a header) is a reference."""
    return text.startswith(SCHEMES)


def references(settings: Settings) -> dict[str, str]:
    """Every reference in the settings, by the setting that has it."""
    alerts = {name: getattr(settings, name) for name in ("alert_webhook_secret", "alert_smtp_password")}
    return references_of(settings.upstreams) | {name: given for name, given in alerts.items() if given is not None}


def references_of(upstreams: Mapping[str, Upstream]) -> dict[str, str]:
    """Every reference in the settings of upstreams, by the setting that has it."""
    found = {}
    for name, upstream in upstreams.items():
        if upstream.key is not None:
            found[f"upstreams.{name}.key"] = upstream.key
        for header, value in upstream.headers.items():
            if is_reference(value):
                found[f"upstreams.{name}.headers.{header}"] = value
    return found


class Credentials:
    """The values behind references. Reading waits for disks and networks, so it belongs into a thread; what has been
    read is there at once."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.read = self.failed = 0  # how often a secret has been read, or could not be
        self._stores: dict[str, Store] = stores(environment)
        self._values: dict[str, str] = {}  # by reference
        self._failing: set[str] = set()  # references that have been said to fail
        self._lock = threading.Lock()  # a reload and the thread may read at the same time
        self._wake = threading.Event()
        self._stopped = threading.Event()

    # at start, and on a reload
    def require(self, wanted: Mapping[str, str]) -> None:
        """Reads all of them, by the settings that refer to them. Raises SettingsError, without the value, for one that
        cannot be read; one that is kept elsewhere and was read before is then used as it was."""
        with self._lock:
            for setting, reference in wanted.items():
                store, where = self._store(setting, reference)
                try:
                    self._values[reference] = self._read(store, where)
                except NotRead as error:
                    if not store.remote or reference not in self._values:
                        raise SettingsError(f"{setting}: {_said(reference, error)}") from None
                    self._say(reference, error)

    def keep_only(self, wanted: Collection[str]) -> None:
        """Forgets the values of other references."""
        with self._lock:
            for reference in self._values.keys() - set(wanted):
                del self._values[reference]

    def check(self, setting: str, reference: str) -> bool:
        """Raises SettingsError for what could never be read; whether its value is to be had without a network."""
        store, where = self._store(setting, reference)
        try:
            store.check(where)
        except NotRead as error:
            raise SettingsError(f"{setting}: {error}") from None
        return not store.remote

    # what they are
    def value(self, reference: str | None) -> str | None:
        """What a reference that has been required leads to now; None for none. To be asked anew at each use."""
        return None if reference is None else self._values[reference]

    def key(self, upstream: Upstream) -> str | None:
        """The key of an upstream."""
        return self.value(upstream.key)

    def headers(self, upstream: Upstream) -> dict[str, str]:
        """Its further headers, with the values of those that are references."""
        return {name: self._values[value] if is_reference(value) else value for name, value in upstream.headers.items()}

    # again and again
    def start(self, seconds: Callable[[], float], again: Callable[[], None]) -> None:
        """Reads them again every so many seconds, in a thread of its own, until stop(); again is called there when
        one of them has changed."""
        thread = threading.Thread(target=self._work, args=(seconds, again), name="tertulia-secrets", daemon=True)
        thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()

    def hurry(self) -> None:
        """Has them read again soon: an upstream has refused one."""
        self._wake.set()

    def _work(self, seconds: Callable[[], float], again: Callable[[], None]) -> None:
        while not self._stopped.wait(min(HURRY_SECONDS, seconds())):
            self._wake.wait(max(0.0, seconds() * random.uniform(0.9, 1.0) - HURRY_SECONDS))
            self._wake.clear()
            if self.refresh():
                again()

    def refresh(self) -> bool:
        """Reads all of them again; whether any has changed."""
        changed = False
        for reference in list(self._values):
            if self._stopped.is_set():
                return False
            store, where = self._store("", reference)
            with self._lock:
                try:
                    value = self._read(store, where)
                except NotRead as error:
                    self._say(reference, error)
                    continue
                self._failing.discard(reference)
                if reference in self._values and self._values[reference] != value:
                    self._values[reference], changed = value, True
                    log.info("%s has changed: it is used from now on", reference)
        return changed

    def _store(self, setting: str, reference: str) -> tuple[Store, str]:
        scheme, _, where = reference.partition(":")
        if scheme not in self._stores or not where:
            raise SettingsError(f"{setting}: expected {FORMS}, not the key itself")
        return self._stores[scheme], where

    def _read(self, store: Store, where: str) -> str:
        try:
            store.check(where)
            value = store.read(where)
        except NotRead:
            self.failed += 1
            raise
        except Exception as error:  # any of a library's; what it says may hold what nobody is to read
            self.failed += 1
            raise NotRead(kind_of(error)) from None
        if not value:
            self.failed += 1
            raise NotRead("it is empty")
        self.read += 1
        return value

    def _say(self, reference: str, error: NotRead) -> None:
        """Says once that the old value is used; until it has been read again."""
        level = logging.INFO if reference in self._failing else logging.WARNING
        self._failing.add(reference)
        log.log(level, "%s; its last value is used", _said(reference, error))


def _said(reference: str, error: NotRead) -> str:
    """Why a reference leads nowhere; those to what is near say so themselves."""
    if reference.startswith(("env:", "file:")) and str(error) != "it is empty":
        return str(error)
    return f"{reference} cannot be read: {error}"
