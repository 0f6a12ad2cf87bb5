"""A server in the background of this process: a real socket on a port of the system's choice, in a thread of its own,
ended with the process. For notebooks, scripts and tests that want no second terminal.
"""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING, Any

from .accounts import client_env
from .config import Settings, load
from .errors import SettingsError, TertuliaError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

DEFAULT_URL = "http://127.0.0.1:8000/v1"
START_SECONDS = 30.0  # a start takes well under a second; models load on first use

_running: dict[tuple[tuple[str, Any], ...], Background] = {}
_lock = threading.Lock()


class Background:
    """A server in a thread. base_url and api_key are what a client needs; close() stops it and its engines."""

    def __init__(self, settings: Settings) -> None:
        """Starts and returns when it answers. Raises TertuliaError when it cannot start."""
        self._failure: BaseException | None = None
        self._listens = threading.Event()
        from .server import Server, check_models, fetch_models, listen

        check_models(settings)
        fetch_models(settings)
        self._server = Server(settings)
        self._listener = listen(settings.host, settings.port)
        self._server.port = self._listener.getsockname()[1]
        self.base_url = self._server.base_url
        if self._server.first_keys:  # shown nowhere else, and this port will not come again: as `serve` would have it
            client_env.write(self._server.data, DEFAULT_URL, *self._server.first_keys)
        self.api_key = self._server.own_key()
        self._thread = threading.Thread(target=self._run, name="tertulia", daemon=True)
        self._thread.start()
        listens = self._listens.wait(START_SECONDS)
        if isinstance(self._failure, SettingsError):
            raise self._failure
        if not listens or self._failure is not None:
            raise TertuliaError(f"The server did not start: {self._failure or 'no answer in time'}") from self._failure

    def _run(self) -> None:
        import uvloop

        try:
            uvloop.run(self._server.serve(self._listener, self._listens.set))
        except BaseException as error:  # told to whoever waits in __init__, whatever it is
            self._failure = error
        finally:
            self._listens.set()

    def client(self, **options: Any) -> OpenAI:
        """An official OpenAI client for this server; options are OpenAI's own."""
        made: OpenAI = _openai().OpenAI(**{"base_url": self.base_url, "api_key": self.api_key, **options})
        return made

    def async_client(self, **options: Any) -> AsyncOpenAI:
        made: AsyncOpenAI = _openai().AsyncOpenAI(**{"base_url": self.base_url, "api_key": self.api_key, **options})
        return made

    def close(self) -> None:
        """Stops the server; calls under way are given a few seconds."""
        self._server.stop()
        self._thread.join(timeout=START_SECONDS)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def start(**settings: Any) -> Background:
    """A new server of its own; settings as in docs/settings.md, the port chosen by the system unless given."""
    return Background(load({"port": 0, "log_level": "error", **settings}))


def shared(**settings: Any) -> Background:
    """The server of this process for these settings, started on first use and stopped at exit."""
    name = tuple(sorted(settings.items()))
    with _lock:
        server = _running.get(name)
        if server is None:
            server = _running[name] = start(**settings)
            atexit.register(server.close)
        return server


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise SettingsError("The official client is not installed: pip install 'tertulia[client]'") from None
    return openai
