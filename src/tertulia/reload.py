"""When the configuration is read again, and what comes of it: on SIGHUP, and when a file it was read from has changed.
The reading is done in a thread; applying is the server's. A configuration with a mistake changes nothing.

It knows which settings can change while a server runs, and nothing of what any of them does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from .config import Settings
from .errors import SettingsError
from .gateway.metrics import COUNTER, GAUGE, Sample, family

log = logging.getLogger("tertulia.reload")
LOOK_SECONDS = 0.5  # how often the files are looked at; what two looks find the same is taken as written
NAMED = 12  # changes that the line about a reload names; of more it says how many
# What holds from the next call on. Everything else is said to need a restart, and keeps its value.
LIVE = frozenset({
    "upstreams", "routes", "fallback", "aliases", "presets", "prices", "policies", "strict_models", "mock",
    "requests_per_minute", "tokens_per_minute", "requests_per_day", "concurrent_requests", "reserve_output",
    "spend_limit", "observe_only", "unknown_price", "max_body", "request_timeout", "read_timeout",
    "keep_alive", "retries", "retry_budget", "on_break", "breaker_failures", "breaker_cooldown", "queue_size",
    "queue_timeout", "heartbeat", "cache", "cache_memory", "cache_disk", "cache_ttl", "coalesce", "retry_grace",
    "log_level", "watch", "secrets_refresh",
})  # fmt: skip
OK, REFUSED = "ok", "refused"


def settled(new: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """The new settings as far as they can be in force now, and the names of those that need a restart."""
    fixed = [name for name in Settings.__struct_fields__ if name not in LIVE]
    changed = [name for name in fixed if getattr(new, name) != getattr(old, name)]
    return replace(new, **{name: getattr(old, name) for name in fixed}), changed


def changes(new: Settings, old: Settings) -> list[str]:
    """The names of the settings that are not as they were, without their values; of a table its entries' names."""
    found: list[str] = []
    for name in Settings.__struct_fields__:
        now, before = getattr(new, name), getattr(old, name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            names = dict.fromkeys((*before, *now))
            found += [f"{name}.{one}" for one in names if now.get(one) != before.get(one)]
        elif now != before:
            found.append(name)
    return found


def sources(settings: Settings) -> list[str]:
    """The files that these settings come from: the configuration, keys and certificates."""
    found = [settings.config] if settings.config else []
    for upstream in settings.upstreams.values():
        for text in (upstream.key or "", *upstream.headers.values()):
            if text.startswith("file:"):
                found.append(text.removeprefix("file:"))
        if upstream.tls_ca:
            found.append(upstream.tls_ca)
    return [os.path.expanduser(path) for path in found]


def fingerprint(paths: list[str]) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a file does, however an editor writes it; None for one that is not there at the moment."""
    found: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            about = os.stat(path)
        except OSError:
            found.append(None)
        else:
            found.append((about.st_mtime_ns, about.st_ino, about.st_size))
    return tuple(found)


class Reloads:
    """Looks after one server's configuration, from start() to stop(), both on its loop."""

    def __init__(
        self, settings: Settings, read: Callable[[], Settings], check: Callable[[Settings], None],
        apply: Callable[[Settings], None], signalled: Callable[[], None],
    ) -> None:  # fmt: skip
        """read: the settings as they are to be now; check: raises SettingsError for what shows without a running server
        (both are called in a thread); apply: puts them in force, or raises SettingsError and changes nothing;
        signalled: what else is to be done on SIGHUP."""
        self._settings, self._signalled = settings, signalled
        self._read, self._check, self._apply = read, check, apply
        self.results = {OK: 0, REFUSED: 0}
        self.succeeded = True  # as the settings of the start did
        self.at = time.time()
        self._seen = fingerprint(sources(settings))
        self._missing: list[str] = []  # files said to be missing
        self._waiting: dict[str, Any] = {}  # settings said to need a restart, and what they will be then
        self._again = False
        self._task: asyncio.Task[None] | None = None
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, self._on_signal, _terminal())
        if self._settings.config:
            threading.Thread(target=self._look, name="tertulia-reload", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        if self._task is not None:
            self._task.cancel()
        if self._loop is not None and threading.current_thread() is threading.main_thread():
            self._loop.remove_signal_handler(signal.SIGHUP)

    def request(self) -> None:
        """Has the configuration read again, soon; once more if that is being done already."""
        if self._task is not None and not self._task.done():
            self._again = True
        elif not self._stopped.is_set():
            self._task = asyncio.get_running_loop().create_task(self._reload())

    def _on_signal(self, terminal: int | None) -> None:
        if terminal is not None and not _is_there(terminal):
            signal.raise_signal(signal.SIGTERM)  # the window was closed: that is what it said before
            return
        self._signalled()
        self.request()

    def _look(self) -> None:
        """In a thread of its own, since a disk may be slow to answer."""
        assert self._loop is not None
        before = self._seen
        while not self._stopped.wait(LOOK_SECONDS):
            if not self._settings.watch:
                continue
            paths = sources(self._settings)
            now = fingerprint(paths)
            if now == before:  # nobody is writing any more
                self._say_missing([path for path, about in zip(paths, now, strict=True) if about is None])
                if now != self._seen and None not in now:
                    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                        self._loop.call_soon_threadsafe(self.request)
                    self._seen = now
            before = now

    def _say_missing(self, paths: list[str]) -> None:
        for path in paths:
            if path not in self._missing:
                log.warning("%s is missing: the old settings stay", path)
        self._missing = paths

    async def _reload(self) -> None:
        while True:
            self._again = False
            try:
                new, fixed = await asyncio.to_thread(self._readable)
                self._apply(new)
            except SettingsError as error:
                self._refused(error.message)
            except Exception as error:  # a defect of ours in reading or applying must not end the watch
                log.error("the configuration could not be read again", exc_info=error)
                self._refused("unexpected error")
            else:
                self._done(new, fixed)
            if not self._again:
                return

    def _readable(self) -> tuple[Settings, dict[str, Any]]:
        """The settings that can be in force now, and what the others will be after a restart."""
        refuse_empty(self._settings.config)
        given = self._read()
        new, fixed = settled(given, self._settings)
        self._check(new)
        return new, {name: getattr(given, name) for name in fixed}

    def _refused(self, why: str) -> None:
        self.results[REFUSED] += 1
        self.succeeded = False
        log.error("the configuration was not taken, the settings in force stay: %s", why)

    def _done(self, new: Settings, fixed: dict[str, Any]) -> None:
        old, self._settings = self._settings, new
        self._seen = fingerprint(sources(new)) if sources(new) != sources(old) else self._seen
        self.results[OK] += 1
        self.succeeded, self.at = True, time.time()
        changed = changes(new, old)
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        what = f"changed: {', '.join(changed[:NAMED])}{more}" if changed else "no setting in force has changed"
        log.info("%s was read again and is in force; %s", new.config or "the configuration", what)
        told, self._waiting = self._waiting, fixed
        fresh = [name for name, value in fixed.items() if name not in told or told[name] != value]
        if fresh:
            verb = "need" if len(fresh) > 1 else "needs"
            log.warning("%s: %s %s a restart; until then the old value holds", new.config, ", ".join(fresh), verb)

    def metrics(self) -> list[str]:
        """The lines of its figures, for /metrics."""
        results = [({"result": result}, count) for result, count in self.results.items()]
        success: list[Sample] = [({}, self.succeeded)]
        since: list[Sample] = [({}, self.at)]
        return [
            *family("tertulia_config_reloads_total", COUNTER, "Times the configuration was read again.", results),
            *family("tertulia_config_last_reload_success", GAUGE, "Whether what was read last was taken.", success),
            *family("tertulia_config_in_force_since_seconds", GAUGE, "When the settings in force were read.", since),
        ]


def refuse_empty(config: str | None) -> None:
    """Raises SettingsError for a file with nothing in it: whoever empties one is about to write it."""
    with contextlib.suppress(OSError):  # whoever reads the settings says that
        if config and not Path(config).read_bytes().strip():
            raise SettingsError(f"{config} is empty")


def _terminal() -> int | None:
    """The terminal this process was started from, if there is one."""
    try:
        return sys.stdin.fileno() if sys.stdin.isatty() else None
    except (AttributeError, ValueError, OSError):  # no standard input, or a closed one
        return None


def _is_there(terminal: int) -> bool:
    try:
        termios.tcgetattr(terminal)
    except (termios.error, OSError):
        return False
    return True
