"""The composition root: build(settings) makes a Server of everything; the only file that knows every concrete class."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from .accounts.directory import Directory
from .accounts.ledger import Ledger
from .accounts.prices import NANO, Prices
from .api import app, chat, completions, embeddings, models
from .api.http import Front
from .config import Settings
from .engines.base import Engine
from .errors import SettingsError, Unauthorized
from .gateway.admit import Admit
from .gateway.cache import cache
from .gateway.guard import guard
from .gateway.meter import AccessLog, Meter
from .gateway.names import CHAT, EMBEDDING, Names
from .gateway.pipeline import Pipeline, check
from .gateway.route import route
from .store.database import open_database

log = logging.getLogger("tertulia")
GRACE_SECONDS = 10.0  # what answers under way are given to finish when the server stops


class Server:
    """One server: two can live in one process. run() serves until stop() or a signal."""

    def __init__(self, settings: Settings) -> None:
        """Opens the data directory and the database. Raises SettingsError if they cannot be used."""
        self.settings = settings
        self.data = prepare_data(settings.data_dir)
        self.database = open_database(self.data, settings.database)
        self.directory = Directory(self.database, self.data)
        self.first_keys = self.directory.first_start(settings.api_key, settings.admin_key)
        if self.first_keys is None and settings.api_key:
            ensure_key(self.directory, settings.api_key)
        self.engines: list[Engine] = []
        self.names: Names
        self.port = settings.port
        self._uvicorn: uvicorn.Server | None = None

    def _compose(self) -> tuple[Front, Any]:
        """The stages, the tasks and the app; needs the running loop."""
        settings = self.settings
        self.engines = engines(settings, self.data)
        defaults = {CHAT: settings.chat_model, EMBEDDING: settings.embedding_model}
        self.names = Names(self.engines, settings.presets, settings.aliases, defaults, settings.strict_models)
        self.ledger = Ledger(self.data)
        prices = Prices(settings.prices)
        self.access_log = AccessLog(settings.access_log) if settings.access_log else None
        self.meter = Meter(self.ledger, prices, self.access_log)
        limit = None if settings.spend_limit is None else round(settings.spend_limit * NANO)
        admit = Admit(settings.requests_per_minute, settings.tokens_per_minute, limit, prices, self.ledger.spent())
        # The order of the stages; why it is this one: gateway/pipeline.py.
        stages = [self.meter, check, admit, guard, cache, route(settings.request_timeout)]
        pipeline = Pipeline(stages)
        tasks = [make.task(self.names.resolve) for make in (chat, completions, embeddings)]
        front = Front(
            {task.path.encode(): task for task in tasks}, pipeline, self.directory,
            max_body=settings.max_body * 2**20, read_timeout=settings.read_timeout, keep_alive=settings.keep_alive,
            max_connections=settings.max_connections,
        )  # fmt: skip
        return front, app.build(tasks, models.routes(self.names), self.directory, self.ready, self.meter.exposition)

    async def ready(self) -> dict[str, str]:
        """For each default model: ready, loading, or missing."""
        states = {}
        for name in (self.settings.chat_model, self.settings.embedding_model):
            target = self.names.find(name) if any(card.id == name for card in self.names.listed()) else None
            if target is None:
                states[name] = "missing"
            else:
                states[name] = "ready" if await target.engine.ready(target.model) else "loading"
        return states

    async def serve(self, listener: socket.socket, started: Callable[[], None] | None = None) -> None:
        """Serves on a bound socket until stop() or a signal; started is called when requests are answered."""
        front, cold = self._compose()
        config = uvicorn.Config(
            cold, http=front, loop="none", lifespan="off", access_log=False, log_config=None, ws="none",  # type: ignore[arg-type]
            server_header=False, date_header=False, timeout_graceful_shutdown=int(GRACE_SECONDS),
        )  # fmt: skip
        self._uvicorn = server = _Uvicorn(config, started)
        front.start()
        preload = asyncio.create_task(self._preload())
        try:
            await server.serve(sockets=[listener])
        finally:
            preload.cancel()
            front.stop()
            await self._close()

    async def _preload(self) -> None:
        if not self.settings.preload:
            return
        for state_of in (self.settings.chat_model, self.settings.embedding_model):
            try:
                target = self.names.find(state_of)
                await target.engine.ready(target.model)
            except Exception as error:  # a model that does not load is said by doctor, readyz and its first call
                log.warning("the model %s cannot be loaded yet: %s", state_of, error)

    async def _close(self) -> None:
        for engine in self.engines:
            await engine.close()
        if self.access_log is not None:
            self.access_log.close()
        self.ledger.close()
        self.database.dispose()

    def stop(self) -> None:
        """Asks the server to stop; safe from a signal handler or another thread."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn, telling when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._tell is not None:
            self._tell()


def engines(settings: Settings, data: Path) -> list[Engine]:
    """Everything that answers, by what the settings name; each is imported only if it is wanted."""
    found: list[Engine] = []
    if settings.mock:
        from .engines.mock import Mock

        found.append(Mock())
    for name, upstream in settings.upstreams.items():
        from .engines.upstream import Upstream

        found.append(
            Upstream(
                name, upstream.base_url, upstream.models, reference(upstream.key, f"upstreams.{name}.key"),
                upstream.organization, upstream.project, upstream.connect_timeout,
            )
        )  # fmt: skip
    return found


def reference(text: str | None, setting: str) -> str | None:
    """The secret behind env:NAME or file:PATH. Raises SettingsError that never holds the secret."""
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    if kind == "env":
        if not os.environ.get(rest):
            raise SettingsError(f"{setting}: the environment variable {rest} is not set")
        return os.environ[rest]
    if kind == "file":
        try:
            return Path(rest).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{setting}: {rest} cannot be read ({error.strerror})") from None
    raise SettingsError(f"{setting}: expected env:NAME or file:PATH, not the key itself")


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


def ensure_key(directory: Directory, key: str) -> None:
    """TERTULIA_API_KEY on a directory that exists already: the key is added to its default project if it is new."""
    try:
        directory.authenticate(key.encode())
    except Unauthorized:
        organization, project = directory.home()
        directory.add_key(key, "project", organization, project, "From the settings")


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
            raise SettingsError(
                f"Port {port} on {host} is taken by another program. Stop it, or choose another port with --port."
            ) from None
        raise SettingsError(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
    except (OverflowError, UnicodeError):
        raise SettingsError(f"Cannot listen on {host}:{port}: not an address.") from None
    listener.setblocking(False)
    return listener


def run(settings: Settings, announce: Callable[[Server], None] | None = None) -> None:
    """Builds a server and serves until it is told to stop; announce is called when it listens."""
    server = Server(settings)
    listener = listen(settings.host, settings.port)
    server.port = listener.getsockname()[1]
    uvloop.run(server.serve(listener, (lambda: announce(server)) if announce is not None else None))
