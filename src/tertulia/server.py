"""The composition root: build(settings) makes a Server of everything; the only file that knows every concrete class."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import http.client
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvicorn
import uvloop
from msgspec.structs import replace

from . import config
from .accounts import client_env
from .accounts.alerts import Alerts, Channel, Mail, Webhook
from .accounts.audit import prune
from .accounts.budgets import SPEND
from .accounts.change import forget
from .accounts.credentials import Credentials, references
from .accounts.directory import Directory
from .accounts.keys import checked
from .accounts.keys import make as make_key
from .accounts.ledger import Ledger
from .accounts.limits import CONCURRENT, DAILY, KINDS, NO_LIMIT, REQUESTS, TOKENS
from .accounts.prices import NANO, Prices
from .accounts.projects import RateLimit
from .api import app, chat, completions, embeddings, models, usage
from .api.admin import door
from .api.admin.kinds import World
from .api.http import Front
from .config import LocalModel, Sampling, Settings, nearest, refuse_wrong
from .core import NOBODY, Call, ModelCard, Preset, Reply, Stage, Target, Task
from .engines.absent import Absent
from .engines.base import Collector, Engine
from .engines.catalog import CATALOG, PullFailed
from .engines.gguf import BadModelFile
from .engines.models import Shelf, card_of, pull_all
from .engines.upstream import Upstream, header_lines
from .errors import BadRequest, Conflict, ModelNotFound, SettingsError, Unauthorized
from .gateway.accesslog import AccessLog
from .gateway.admit import Admit, Rules
from .gateway.cache import Cache
from .gateway.meter import Meter
from .gateway.metrics import COUNTER, family
from .gateway.names import CHAT, EMBEDDING, Names, may_list, serves, wrong_kind
from .gateway.pipeline import Pipeline, check
from .gateway.route import Route
from .gateway.traces import Traces
from .reload import Reloads, fingerprint
from .store.database import Database, open_database

log = logging.getLogger("tertulia")
SPARE_FILES = 256  # open files that are no client's: engines, database, logs
GRACE_SECONDS = 10.0  # what answers under way are given to finish when the server stops
MEGABYTE = 1_000_000
NEAR = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens everywhere is reached from here
MINUTE_SECONDS, DAY_SECONDS = 60.0, 86_400.0  # the windows of limits
LIMITS = {  # the settings that are limits, and what kind of one
    "requests_per_minute": REQUESTS, "tokens_per_minute": TOKENS, "requests_per_day": DAILY,
    "concurrent_requests": CONCURRENT, "spend_limit": SPEND,
}  # fmt: skip
PROBE_SECONDS = 1.0  # for whoever has our port to say who it is
CHAT_FIELDS, COMPLETION_FIELDS = chat.Chat.__struct_fields__, completions.Completion.__struct_fields__
PER_CALL = ("model", "messages", "prompt", "input", "stream", "stream_options")  # never a preset's


class Server:
    """One server: two can live in one process. run() serves until stop() or a signal."""

    def __init__(self, settings: Settings, read: Callable[[], Settings] | None = None) -> None:
        """Opens the data directory and the database; read gives the settings anew, for who changes them while it runs.
        Raises SettingsError if they cannot be used."""
        self.settings = settings
        self.credentials = Credentials()
        self.credentials.require(references(settings))  # before keys are made that would be shown nowhere
        self._channels = channels(settings, self.credentials)
        self.data = prepare_data(settings.data_dir)
        self.database = open_database(self.data, settings.database)
        self.directory = Directory(self.database, self.data, settings.database_grace)
        self.first_keys = self.directory.first_start(settings.api_key, settings.admin_key)
        if self.first_keys is None:
            self.directory.ensure_owner()
            ensure_keys(self.directory, settings)
        self.engines: list[Engine] = []
        self._far: dict[str, Far] = {}
        self.reloads = Reloads(settings, read or (lambda: self.settings), self._check, self.reload, self._reopen_log)
        self.names: Names
        self.port = settings.port
        self._states: dict[str, str] = {}
        self._uvicorn: uvicorn.Server | None = None

    @property
    def base_url(self) -> str:
        host = self.settings.host
        host = NEAR.get(host, host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/v1"

    def own_key(self) -> str:
        """A project key for whoever owns the data directory: the one of the first start, or of the settings, or new."""
        keys = client_env.read(self.data)
        key = self.first_keys[0] if self.first_keys else self.settings.api_key or keys.get("OPENAI_API_KEY", "")
        try:
            self.directory.authenticate(key.encode())
        except Unauthorized:
            organization, project = self.directory.home()
            if self.directory.projects[project].archived_at is not None:
                return key  # there is no project that a key would be good for
            key = make_key("project", None)
            self.directory.add_key(key, "project", organization, project, "client.env")
            print("tertulia: client.env held no key in force: a new one was made for it", file=sys.stderr, flush=True)
        return key

    def write_client_env(self) -> None:
        """Writes DATA/client.env for the address and keys in force."""
        admin = self.first_keys[1] if self.first_keys else client_env.read(self.data).get("OPENAI_ADMIN_KEY")
        client_env.write(self.data, self.base_url, self.own_key(), admin)

    def _compose(self) -> tuple[Front, Any]:
        """The stages, the tasks and the app; needs the running loop."""
        settings = self.settings
        self._far = far_engines(settings, {}, self.credentials)
        self.engines = [*mocks(settings), *(far.engine for far in self._far.values()), *near_engines(settings)]
        self.names = Names.of(settings, self.engines)
        self.ledger = open_ledger(settings, self.data, self.database)
        prices = prices_of(settings)
        self.access_log = AccessLog(settings.access_log) if settings.access_log else None
        self.traces = Traces(settings.traces, addresses(settings)) if settings.traces else None
        self.meter = Meter(self.ledger, self.access_log, self.traces)
        self.admit = admit = Admit(rules(settings), prices, self.ledger.spent())
        admit.adopt(self.directory.projects.values())
        self._hear()
        self._recall()
        self.alerts = Alerts(
            self.database, admit.budgets, lambda: self.directory.records.all("spend_alert"),
            lambda: self.directory.organization.id, self._channels,
        )  # fmt: skip
        self.directory.on_change += [admit.changed, self.alerts.changed]
        self.meter.charge, self.meter.may_follow = admit.lost, admit.may_follow
        self.meter.may_continue = admit.may_continue
        self.route = Route(settings, self.names)
        self.cache = Cache(settings, self.data)
        self.cache.flights.account = self._unclaimed
        self.cache.flights.linger, self.cache.flights.resume = admit.linger, admit.resume
        self.meter.sources += [admit.metrics, self.route.metrics, self.cache.metrics, self.reloads.metrics]
        self.meter.sources.append(lambda: secret_metrics(self.credentials))
        if self.access_log is not None:
            self.meter.sources.append(self.access_log.metrics)
        # The order of the stages; why it is this one: gateway/pipeline.py.
        stages: list[Stage] = [self.meter, check, admit, self.cache, self.route]
        pipeline = Pipeline(stages)
        tasks = [make.task(self.names.resolve) for make in (chat, completions, embeddings)]
        check_presets(settings.presets, self.names, tasks)
        self._say_idle()
        self._start_far()
        self.front = front = Front(
            {task.path.encode(): task for task in tasks}, pipeline, self.directory,
            max_body=settings.max_body * 2**20, read_timeout=settings.read_timeout, keep_alive=settings.keep_alive,
            max_connections=raise_file_limit(settings.max_connections), crowd_left=give_memory_back,
        )  # fmt: skip
        administration = World(self.directory, self.names, lambda: rate_limit(self.settings), admit.reached)
        cold = [
            *models.routes(self.names), *door.routes(administration),
            *usage.routes(self.database, self.ledger.catch_up),
        ]  # fmt: skip
        anybody = settings.on_loopback if settings.metrics_open is None else settings.metrics_open
        return front, app.build(tasks, cold, self.directory, self.states, self.meter.exposition, anybody)

    def _hear(self) -> None:
        """What other gateways of the database spend counts here, too."""
        loop, admit, fold = asyncio.get_running_loop(), self.admit, self.ledger.fold

        def heard(month: int, spent: dict[str, int]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(admit.hear, month, spent)

        if fold is not None:
            fold.heard = heard

    def _recall(self) -> None:
        """A restart does not empty the windows of limits: what was admitted within them still counts."""
        projects, now = self.directory.projects, time.time()
        limits = [limit for project in projects.values() for limit in project.rate_limits.values()]
        daily = self.settings.requests_per_day is not None or any(one.requests_per_day is not None for one in limits)
        for one in self.ledger.admitted(DAY_SECONDS if daily else MINUTE_SECONDS):
            project = projects.get(one.project)
            if project is None:
                continue
            try:
                name = one.asked if one.asked in project.rate_limits else self.names.plan(one.asked).name
            except ModelNotFound:  # nobody can ask for it any more
                continue
            self.admit.recall(project, name, now - one.began, one.requests, one.tokens)

    def _unclaimed(self, call: Call, outcome: str) -> None:
        """A shared call went on after its last client had left, and nobody came back for it."""
        self.admit.unclaimed(call)
        self.meter.unclaimed(call, outcome)

    def _say_idle(self) -> None:
        for line in idle_names(self.settings, self.names, self.directory.ids()):
            log.warning("%s", line)

    def _start_far(self) -> None:
        """Upstreams may be asked for their models, and say when those have changed, or a key is refused."""
        for far in self._far.values():
            far.engine.on_models_changed = self.names.refresh
            far.engine.on_key_refused = self.credentials.hurry
            far.engine.start()

    def reload(self, settings: Settings) -> None:
        """Puts settings in force for every call that comes from now on; those under way go on as they began. An
        upstream that is as before keeps its connections. Raises SettingsError, and then nothing has changed."""
        far = far_engines(settings, self._far, self.credentials)
        mock = [engine for engine in self.engines if is_mock(engine)] or mocks(settings)
        ours = [engine for engine in self.engines if not isinstance(engine, Upstream) and not is_mock(engine)]
        found = [*(mock if settings.mock else []), *(one.engine for one in far.values()), *ours]
        names, prices = Names.of(settings, found), prices_of(settings)
        check_presets(settings.presets, names, [make.task(names.resolve) for make in (chat, completions, embeddings)])
        gone = [old.engine for name, old in self._far.items() if far.get(name) is not old]
        self.settings, self.engines, self._far = settings, found, far
        self.credentials.keep_only(references(settings).values())
        self.rekey()
        self.names.replace(names)
        self._say_idle()
        self._start_far()
        self.cache.reload(settings)
        self.route.reload(settings)
        self.admit.reload(rules(settings), prices)
        self.front.limit(settings.max_body * 2**20, settings.read_timeout, settings.keep_alive)
        if self.traces is not None:
            self.traces.reload(addresses(settings))
        logging.getLogger().setLevel(settings.log_level.upper())
        for engine in gone:
            engine.retire()

    def _check(self, settings: Settings) -> None:
        """In a thread: what shows before these settings are in force. Raises SettingsError."""
        check_models(settings)
        self.credentials.require(references(settings))

    def rekey(self) -> None:
        """Has every upstream send its key as it was read last; answers under way go on."""
        for name, far in self._far.items():
            try:
                if far.engine.rekey(self.credentials.key(far.upstream), self.credentials.headers(far.upstream)):
                    log.info("upstreams.%s: its key or a header has changed, and is used from now on", name)
            except SettingsError as error:
                log.error("%s; the old value is used", error.message)

    def _reopen_log(self) -> None:
        if self.access_log is not None:
            self.access_log.reopen()

    def states(self) -> dict[str, str]:
        """For each default model: ready, loading, missing, or failed."""
        for name, state in self._states.items():
            if state == "missing" and self.names.is_far(name):  # its upstream has listed it meanwhile
                self._states[name] = "ready"
        return dict(self._states)

    def over_budget(self) -> list[str]:
        """A line for each default model whose file alone is larger than memory_budget: it will not be loaded."""
        lines, budget = [], self.settings.memory_budget * MEGABYTE
        for name, state in self._states.items():
            size = 0 if state == "missing" else self.names.find(name).card.bytes or 0
            if size > budget:
                room, need = budget // MEGABYTE, size // MEGABYTE
                lines.append(
                    f"memory_budget is {room} MB, but the file of {name} alone has {need} MB: it will not load"
                )
        return lines

    async def serve(self, listener: socket.socket, started: Callable[[], None] | None = None) -> None:
        """Serves on a bound socket until stop() or a signal; started is called when requests are answered."""
        front, cold = self._compose()
        self._states = self._default_models()
        config = uvicorn.Config(
            cold, http=front, interface="asgi3", loop="none", lifespan="off", access_log=False, log_config=None,  # type: ignore[arg-type]
            ws="none", server_header=False, date_header=False, timeout_graceful_shutdown=int(GRACE_SECONDS),
            proxy_headers=False,  # it would let anybody on this machine say who he is
        )  # fmt: skip
        self._uvicorn = server = _Uvicorn(config, started, lambda: self.meter.in_flight)
        front.start()
        self.directory.start()
        self.ledger.start()
        self.alerts.start()
        self.reloads.start()
        self._keep_secrets()
        preload = asyncio.create_task(self._preload())
        with server.signals():
            try:
                await server.serve(sockets=[listener])
            finally:
                preload.cancel()
                self.reloads.stop()
                self.credentials.stop()
                front.stop()
                await self._close()

    def _keep_secrets(self) -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self.rekey)

        self.credentials.start(lambda: self.settings.secrets_refresh, again)

    def _default_models(self) -> dict[str, str]:
        """The default models and how far they are; one that is not installed is missing until it is pulled."""
        states = {}
        missing = {card.id for engine in self.engines if isinstance(engine, Absent) for card in engine.models()}
        for name in (self.settings.chat_model, self.settings.embedding_model):
            try:
                absent = self.names.find(name).card.id in missing
                states[name] = "missing" if absent else "loading" if self.settings.preload else "ready"
            except ModelNotFound:
                states[name] = "missing"
        return states

    async def _preload(self) -> None:
        for name, state in self._states.items():
            if state == "loading":
                target = self.names.find(name)
                self._states[name] = "ready" if await target.engine.ready(target.model) else "failed"

    async def _close(self) -> None:
        self.cache.close()
        self.route.close()
        self.admit.close()
        await asyncio.to_thread(self.alerts.stop)
        for engine in self.engines:
            await engine.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)
        if self.access_log is not None:
            self.access_log.close()
        await asyncio.to_thread(self.ledger.close)
        await asyncio.to_thread(self.directory.stop)
        self.database.dispose()

    def stop(self) -> None:
        """Asks the server to stop; safe from a signal handler or another thread."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


def open_ledger(settings: Settings, data: Path, database: Database) -> Ledger:
    """The ledger; whoever takes old rows out of it does so with all others that are kept for a time only."""
    found = Ledger(
        data, database, flush_seconds=settings.flush_seconds, fold_seconds=settings.fold_seconds,
        days=settings.ledger_days,
    )  # fmt: skip
    if found.fold is not None:
        found.fold.sweeps += [partial(prune, database, settings.audit_days), partial(forget, database)]
    return found


class _Uvicorn(uvicorn.Server):
    """uvicorn, telling when it listens, and for what it waits when a signal stops it."""

    def __init__(
        self, config: uvicorn.Config, started: Callable[[], None] | None, in_flight: Callable[[], int]
    ) -> None:
        super().__init__(config)
        self._tell = started
        self._in_flight = in_flight

    def handle_exit(self, number: int, _frame: FrameType | None) -> None:
        """Ctrl-C and SIGTERM stop the server in order; a second one cuts the answers under way."""
        self.force_exit = bool(self._captured_signals)
        self.should_exit = True
        self._captured_signals.append(number)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not for as long as uvicorn serves, but until everything is closed: see signals."""
        yield

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Has handle_exit take the signals: no other handler may end the process before the journal is flushed and the
        engines are stopped. uvicorn's own would be gone by then, and raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._tell is not None:
            self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        waiting = self._in_flight()
        if waiting and self._captured_signals:
            answers = "1 answer" if waiting == 1 else f"{waiting} answers"
            print(f"stopping: waiting for {answers} (Ctrl-C again cuts them)", file=sys.stderr, flush=True)
        await super().shutdown(sockets)


class Far(msgspec.Struct, frozen=True):
    """The engine of an upstream, and what it was made from."""

    upstream: config.Upstream
    trusted: tuple[tuple[int, int, int] | None, ...]  # the fingerprint of its tls_ca
    engine: Upstream


def far_engines(settings: Settings, before: Mapping[str, Far], credentials: Credentials) -> dict[str, Far]:
    """The engines of the upstreams; those whose settings and certificates are as they were are taken over, and are to
    be given their keys again. Raises SettingsError."""
    found = {}
    for name, upstream in settings.upstreams.items():
        key, headers = credentials.key(upstream), credentials.headers(upstream)
        trusted = fingerprint([os.path.expanduser(upstream.tls_ca)] if upstream.tls_ca else [])
        old = before.get(name)
        if old is not None and (old.upstream, old.trusted) == (upstream, trusted):
            header_lines(name, upstream, key, headers)  # raises what rekey would, while nothing has changed
            found[name] = old
            continue
        found[name] = Far(upstream, trusted, Upstream(name, upstream, key, headers=headers))
        if old is not None and old.upstream.base_url == upstream.base_url:
            found[name].engine.inherit(old.engine)
    return found


def secret_metrics(credentials: Credentials) -> list[str]:
    """The lines of its figures, for /metrics."""
    reads = [({"result": "ok"}, credentials.read), ({"result": "failed"}, credentials.failed)]
    return family("tertulia_secret_reads_total", COUNTER, "Times a secret of an upstream was read.", reads)


def mocks(settings: Settings) -> list[Engine]:
    """The mock engine, imported only if it is wanted."""
    if not settings.mock:
        return []
    from .engines.mock import Mock

    return [Mock()]


def is_mock(engine: Engine) -> bool:
    return any(card.source.startswith("mock:") for card in engine.models())


def near_engines(settings: Settings) -> list[Engine]:
    """The engines of this machine, each imported only if it is wanted."""
    found: list[Engine] = []
    models = LocalModels(settings, shelf_of(settings))
    if models.cards:
        from .engines.children import Children
        from .engines.local import Local

        found.append(Local(settings, Children(settings, models.path), models.cards))
    missing = [CATALOG[name].card for name in wanted(settings) if name in CATALOG and name not in models.cards]
    if missing:
        found.append(Absent(missing))
    return found


def prices_of(settings: Settings) -> Prices:
    """What models cost: as their upstreams say, and [prices] has the last word. Raises SettingsError."""
    upstreams = {name: upstream.prices for name, upstream in settings.upstreams.items()}
    return Prices(settings.prices, upstreams, theirs=their_names(settings))


def their_names(settings: Settings) -> dict[str, dict[str, str]]:
    """By upstream and our name for a model, its own name for it, as far as the settings say."""
    found: dict[str, dict[str, str]] = {}
    targets = [target for route in settings.routes.values() for target in route.targets]
    taken = {model for upstream in settings.upstreams.values() for model in upstream.models}
    for name, upstream in settings.upstreams.items():
        priced = {*settings.prices, *upstream.prices} - taken if upstream.discover else ()
        found[name] = {
            **{model: model[len(upstream.prefix) :] for model in priced if model.startswith(upstream.prefix)},
            **{f"{name}/{target.model}": target.model for target in targets if target.upstream == name},
            **upstream.models,
        }  # fmt: skip
    return found


def idle_names(settings: Settings, names: Names, keys: Collection[str]) -> list[str]:
    """A line for each entry of the settings that is for somebody who does not exist (yet): it has no effect. keys: the
    ids of those that do."""
    models, lines = {*settings.models, *(model for _, model in names.targets())}, []
    for name in settings.prices:
        if name not in models and may_list(settings.upstreams, name) is None:
            near = nearest(name, sorted(models), 0.6)
            lines.append(f"prices.{name}: no model has that name, so nothing costs that{near}")
    for name, upstream in settings.upstreams.items():
        for setting, model in _of_nobody(settings, name, upstream):
            if not model.startswith(upstream.prefix):  # with discover, or it would have been refused
                near = nearest(model, sorted(upstream.models), 0.6)
                lines.append(f"upstreams.{name}.{setting}.{model}: no model of it can have that name{near}")
    for key in settings.policies:
        if key not in keys:
            lines.append(f"policies.{key}: no key has that id{nearest(key, sorted(keys), 0.8)}")
    return lines


def _of_nobody(settings: Settings, name: str, upstream: config.Upstream) -> Iterator[tuple[str, str]]:
    """(setting, model) for what the settings say of a model that they do not give to this upstream."""
    targets = [target for route in settings.routes.values() for target in route.targets if target.upstream == name]
    known = {*upstream.models, *(f"{name}/{target.model}" for target in targets)}
    for setting, given in (("prices", upstream.prices), ("context_length", upstream.context_length)):
        for model in given:
            if model not in known:
                yield setting, model


def channels(settings: Settings, credentials: Credentials) -> list[Channel]:
    """Where spend alerts go. Raises SettingsError."""
    found: list[Channel] = []
    for name, without in (
        ("alert_webhook_secret", "alert_webhook"), ("alert_smtp_password", "alert_smtp"), ("alert_from", "alert_smtp"),
    ):  # fmt: skip
        if getattr(settings, name) is not None and getattr(settings, without) is None:
            raise SettingsError(f"{name}: it does nothing without {without}; set both, or neither")
    for name in ("alert_webhook", "alert_smtp"):
        try:
            _ = urlsplit(getattr(settings, name) or "").port
        except ValueError:
            raise SettingsError(f"{name}: this is no address (URL)") from None
    if settings.alert_webhook is not None:
        if settings.alert_webhook_secret is None:
            raise SettingsError("alert_webhook: it needs alert_webhook_secret, a reference to what signs its events")
        found.append(Webhook(settings.alert_webhook, partial(credentials.value, settings.alert_webhook_secret)))
    if settings.alert_smtp is not None:
        password = partial(credentials.value, settings.alert_smtp_password)
        found.append(Mail(settings.alert_smtp, password, settings.alert_from))
        user, given = urlsplit(settings.alert_smtp).username, settings.alert_smtp_password is not None
        if given and not user:
            raise SettingsError("alert_smtp_password: alert_smtp names no user whose it is: smtp://USER@HOST:PORT")
        if user and not given:
            raise SettingsError("alert_smtp: it names a user, and alert_smtp_password, a reference, is missing")
    return found


def rules(settings: Settings) -> Rules:
    """The limits of projects that have none of their own, and what they are like."""
    return Rules(
        settings.requests_per_minute, settings.tokens_per_minute, settings.requests_per_day or NO_LIMIT,
        settings.concurrent_requests or NO_LIMIT,
        None if settings.spend_limit is None else round(settings.spend_limit * NANO), observed(settings),
        settings.unknown_price == "refuse", settings.reserve_output,
    )  # fmt: skip


def rate_limit(settings: Settings) -> RateLimit:
    """Of a project and model that have none of their own."""
    return RateLimit(
        settings.requests_per_minute, settings.tokens_per_minute, settings.requests_per_day,
        settings.concurrent_requests, observed(settings) & KINDS,
    )  # fmt: skip


def observed(settings: Settings) -> frozenset[str]:
    """The kinds of limits that refuse nothing."""
    named = settings.observe_only
    return frozenset(LIMITS[name] for name in (named if isinstance(named, list) else LIMITS if named else ()))


def addresses(settings: Settings) -> dict[str, str]:
    """The base URLs of the upstreams, by name."""
    return {name: upstream.base_url for name, upstream in settings.upstreams.items()}


class LocalModels:
    """The models of this machine: what is on the shelf, and the files that [models.NAME] names. cards by id."""

    def __init__(self, settings: Settings, shelf: Shelf) -> None:
        """Raises SettingsError for a file that cannot be served; a source that is not pulled yet is left out."""
        self.cards: dict[str, ModelCard] = {card.id: card for card in shelf.installed()}
        self._shelf = shelf
        self._files: dict[str, Path] = {}
        for name, model in settings.models.items():
            card = self._named(name, model)
            if card is not None:
                sampling = {**card.sampling, **model.sampling}
                self.cards[name] = replace(card, id=name, kind=model.kind or card.kind, sampling=sampling)

    def _named(self, name: str, model: LocalModel) -> ModelCard | None:
        if model.file is not None and model.source is not None:
            raise SettingsError(f"models.{name}: give either file or source, not both")
        if model.file is not None:
            path = Path(model.file).expanduser()
            try:
                card = card_of(path, id=name)
            except (OSError, BadModelFile) as error:
                raise SettingsError(f"models.{name}.file: {error}") from None
            self._files[name] = path
            return card
        found = self._shelf.card(model.source or name)
        path_found = self._shelf.path(model.source or name)
        if found is not None and path_found is not None:
            self._files[name] = path_found
        elif model.source is None and name not in self._shelf.catalog:
            raise SettingsError(f"models.{name}: give a file or a source")
        return found

    def path(self, id: str) -> Path | None:
        return self._files.get(id) or self._shelf.path(id)


def check_models(settings: Settings) -> None:
    """Names of models that the settings get wrong, as far as that shows before anything is fetched.

    Raises SettingsError for a default model that nothing answers to or that is of the wrong kind, and for a name that
    two models would have.
    """
    shelf = shelf_of(settings)
    here = LocalModels(settings, shelf).cards
    if settings.mock:
        from .engines.mock import Mock

        here = {**here, **{card.id: card for card in Mock().models()}}
    taken = dict.fromkeys([*here, *settings.models], "a model of this machine")
    for name, upstream in settings.upstreams.items():
        for model in upstream.models:
            if taken.get(model) == "a model of this machine":  # several upstreams may have the same model
                raise SettingsError(f"upstreams.{name}.models.{model}: {taken[model]} has that name; choose another")
            taken[model] = f"a model of upstreams.{name}"
        for setting, model in () if upstream.discover else _of_nobody(settings, name, upstream):
            near = nearest(model, sorted(upstream.models), 0.4)
            raise SettingsError(f"upstreams.{name}.{setting}.{model}: it has no model of that name{near}")
    known = {*taken, *CATALOG, *settings.presets, *settings.aliases, *settings.routes}
    patterns = [name for name in settings.aliases if any(mark in name for mark in "*?[")]
    cards = {**{id: each.card for id, each in CATALOG.items()}, **here}
    for kind in (CHAT, EMBEDDING):
        model = getattr(settings, f"{kind}_model")
        elsewhere = may_list(settings.upstreams, model) is not None
        if model not in known and not elsewhere and not any(fnmatchcase(model, pattern) for pattern in patterns):
            raise SettingsError(f"{kind}_model: there is no model {model!r}{nearest(model, sorted(known), 0.4)}")
        card = cards.get(model) if taken.get(model, "a model of this machine") == "a model of this machine" else None
        if card is not None and not serves(card, kind):
            raise SettingsError(f"{kind}_model: {wrong_kind(model, card, kind)}")


def check_presets(presets: Mapping[str, Preset], names: Names, tasks: Sequence[Task]) -> None:
    """Tries the parameters of each preset. Raises SettingsError that names the one that a call would be refused for."""
    chat_task, completion_task = tasks[0], tasks[1]
    for name, preset in presets.items():
        where, given = f"presets.{name}.parameters.", preset.parameters
        try:
            target = names.find(name)
        except ModelNotFound:  # its upstream has not said yet whether it is there
            continue
        for parameter in given:
            if parameter in PER_CALL:
                raise SettingsError(f"{where}{parameter}: this is the caller's to say, not a preset's")
        text_only = [p for p in given if p in COMPLETION_FIELDS and p not in CHAT_FIELDS]
        fields, task = (COMPLETION_FIELDS, completion_task) if text_only else (CHAT_FIELDS, chat_task)
        rest = {parameter: value for parameter, value in given.items() if parameter not in fields}
        _check_extras(rest, target, where)
        body: dict[str, Any] = {parameter: value for parameter, value in given.items() if parameter in fields}
        body |= {"prompt": "x"} if text_only else {"messages": [{"role": "user", "content": "x"}]}
        body["model"] = target.model
        try:
            task.check(Call("", NOBODY, task, msgspec.json.encode(body), Reply(Collector()), 0))
        except BadRequest as error:
            raise SettingsError(f"{where}{error.param or ''}: {error.message}".replace(".: ", ": ")) from None


def _check_extras(given: Mapping[str, Any], target: Target, where: str) -> None:
    """What is no parameter of OpenAI's: an engine's own. What an upstream takes nobody here knows."""
    source = target.card.source
    if source.startswith("upstream:"):
        return
    own = {"mock"} if source.startswith("mock:") else {"ignore_eos"}
    known = {*CHAT_FIELDS, *COMPLETION_FIELDS, *Sampling.__struct_fields__, *own} - {*PER_CALL}
    for parameter in given:
        if parameter not in known:
            raise SettingsError(f"{where}{parameter}: there is no such parameter{nearest(parameter, sorted(known))}")
    refuse_wrong({name: given[name] for name in given if name in Sampling.__struct_fields__}, Sampling, where)


def wanted(settings: Settings) -> list[str]:
    """What must be fetched before these settings can be served: defaults, targets and fallbacks of the catalogue, and
    sources of models."""
    elsewhere = {name for upstream in settings.upstreams.values() for name in upstream.models}
    names = [model.source for model in settings.models.values() if model.source]
    routes = settings.routes.values()
    targets = [target.model for route in routes for target in route.targets if target.upstream is None]
    fallbacks = [*settings.fallback, *(name for route in routes for name in route.fallback)]
    for name in (settings.chat_model, settings.embedding_model, *targets, *fallbacks):
        if name in CATALOG and name not in elsewhere:
            names.append(name)
    return list(dict.fromkeys(names))


def fetch_models(settings: Settings) -> list[str]:
    """Fetches what is wanted and not there, with progress on standard error; says what could not be had.

    A model that cannot be fetched does not keep the others from being served: it is missing until it is pulled.
    """
    shelf, failed = shelf_of(settings), []
    for name in wanted(settings):
        try:
            pull_all([name], shelf)
        except (PullFailed, BadModelFile) as error:
            print(f"tertulia: {error.message}", file=sys.stderr)
            failed.append(name)
    return failed


def shelf_of(settings: Settings) -> Shelf:
    return Shelf(prepare_data(settings.data_dir) / "models")


def prepare_data(data: Path) -> Path:
    """Makes the data directory, readable by its owner only. Raises SettingsError."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = data / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"The data directory {data} cannot be used: {error.strerror}.") from None
    return data


def ensure_keys(directory: Directory, settings: Settings) -> None:
    """TERTULIA_API_KEY and TERTULIA_ADMIN_KEY on a directory that exists already: a key that is new is added to its
    organization and default project. Raises SettingsError if one is a key of the other kind."""
    for kind, key in (("project", settings.api_key), ("admin", settings.admin_key)):
        if checked(key, "admin_key" if kind == "admin" else "api_key") is None:
            continue
        assert key is not None
        name = "admin_key" if kind == "admin" else "api_key"
        try:
            found = directory.authenticate(key.encode())
        except Unauthorized:
            organization, project = directory.home()
            try:
                directory.add_key(key, kind, organization, project if kind == "project" else None, "From the settings")
            except Conflict:  # it is one already, and was refused
                raise SettingsError(
                    f"{name}: this key was revoked, has expired, or belongs to a project that is archived. "
                    "Give another one, or none."
                ) from None
        else:
            if found.kind != kind:
                raise SettingsError(f"{name}: this key is of the other kind.")


def raise_file_limit(connections: int) -> int:
    """Raises this process' limit of open files as far as it may, and returns how many connections fit under it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + SPARE_FILES  # a call to an upstream holds a second socket
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    fitting = connections if soft == resource.RLIM_INFINITY else max(1, min(connections, (soft - SPARE_FILES) // 2))
    if fitting < connections:
        log.warning(
            "the limit of open files allows %d connections instead of %d (max_connections)", fitting, connections
        )
    return fitting


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises SettingsError when the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            whom = "another Tertulia" if _tertulia_answers(host, port) else "another program"
            raise SettingsError(
                f"Port {port} on {host} is taken by {whom}. Stop it, or choose another port with --port or "
                "TERTULIA_PORT."
            ) from None
        raise SettingsError(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
    except (OverflowError, UnicodeError):
        raise SettingsError(f"Cannot listen on {host}:{port}: not an address.") from None
    listener.setblocking(False)
    return listener


def _tertulia_answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(NEAR.get(host, host), port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().read(64) == b'{"status":"ok"}'
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def only_server(data: Path) -> Iterator[Callable[[str], None]]:
    """Holds DATA/serve.lock as long as this process serves the directory; it ends with the process, however that ends.

    Yields what says where the server is, for whoever comes second. Raises SettingsError if somebody else holds it.
    """
    try:
        lock = os.open(prepare_data(data) / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError(f"The data directory {data} cannot be used: {error.strerror}.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, _, url = os.pread(lock, 4096, 0).decode("utf-8", "replace").strip().partition(" ")
        os.close(lock)
        raise SettingsError(
            f"Another `tertulia serve` (process {pid or 'unknown'}{', ' + url if url else ', starting'}) uses {data}. "
            "Stop it, or choose another directory with --data."
        ) from None
    except OSError as error:  # a file system without locks: better served unguarded than not at all
        log.warning("%s cannot be locked (%s); do not serve it twice", data, error.strerror)

    def tell(url: str) -> None:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {url}".rstrip().encode() + b"\n", 0)

    try:
        tell("")
        yield tell
    finally:
        with contextlib.suppress(OSError):  # a full disk; what it says counts only while it is held
            os.ftruncate(lock, 0)
        os.close(lock)


def run(
    settings: Settings, announce: Callable[[Server], None] | None = None, read: Callable[[], Settings] | None = None
) -> None:
    """Builds a server and serves until it is told to stop; announce is called when it listens, read when the settings
    are to be read again."""
    with only_server(settings.data_dir) as tell:
        listener = listen(settings.host, settings.port)  # before what takes time: a taken port is said at once
        check_models(settings)
        fetch_models(settings)
        server = Server(settings, read)
        server.port = listener.getsockname()[1]
        if server.first_keys:  # shown nowhere else, whatever comes of this start
            server.write_client_env()

        def started() -> None:
            tell(server.base_url)
            server.write_client_env()
            for line in server.over_budget():
                print(f"tertulia: {line}", file=sys.stderr, flush=True)
            if announce is not None:
                announce(server)

        calm_collector()
        uvloop.run(server.serve(listener, started))


def calm_collector() -> None:
    """Calls leave no cycles behind, but thousands in flight make the garbage collector look for some all the time: a
    tenth of what a request cost. What is loaded by now stays for good, and need not be looked through either."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def give_memory_back() -> None:
    """After a crowd: what it used is free by then, but glibc keeps free memory that lies below some still in use."""
    gc.collect()  # empties the interpreter's lists of spare objects, too
    import ctypes  # a megabyte, and only needed here

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
