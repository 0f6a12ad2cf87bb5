"""The child processes of local models: started on first use, stopped least recently used first when memory runs short,
started again after a crash, and ended with the server.

It knows processes, memory and the time of their last use. What a child does inside is llama.py's, what is said to it
over HTTP is local.py's. Nothing here waits on a lock: callers of one model share one load, a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import LocalModel, Settings
from ..core import ModelCard
from ..errors import EngineFailed, Overloaded
from . import connection, gguf, llama

log = logging.getLogger("tertulia.engines")

MEGABYTE = 1_000_000
PROGRAM = 160 * MEGABYTE  # what a child needs beside weights and cache: library, compute buffers, cached prompts
CACHE_SHARE = 2  # one model's key-value cache may take the memory budget divided by this
STOP_TIMEOUT = 2.0  # seconds between SIGTERM and SIGKILL
DEATH_KNOWN = 0.5  # seconds after which the end of a process is known for certain
CALM = 60.0  # seconds a child must live for its crash not to count as one of a row
LONGEST_BACKOFF = 30.0  # seconds
_PRIVATE = ("TERTULIA_", "OPENAI_", "LLAMA_")  # environment that is the gateway's, or would change llama.cpp's settings


class Child:
    """One loaded model. `with child:` counts a call in flight, and a child in use is not unloaded.

    slots: calls it answers at the same time; context_length: tokens one of them may hold, prompt and answer;
    pool_tokens: tokens all of them may hold together (if less than slots * context_length and full, llama.cpp answers
    all of them with status 500, "Context size has been exceeded."); headers: request lines with the secret;
    template_knows_tools: whether its chat template has tools; control_tokens: what no text may spell out, since the
    engine would read it as a token that steers the model; longest_token: bytes of text that one token can stand for
    at most, 0 if that is not known.
    """

    def __init__(self, card: ModelCard, process: asyncio.subprocess.Process, secret: str, port: int, pool: int) -> None:
        self.card = card
        self.process = process
        self.headers = f"authorization: Bearer {secret}\r\ncontent-type: application/json\r\n".encode()
        self.pool = connection.Pool(f"http://127.0.0.1:{port}")
        self.pool_tokens = pool
        self.estimate = 0
        self.slots = 1
        self.context_length = 0
        self.template_knows_tools = False
        self.control_tokens: tuple[str, ...] = ()
        self.longest_token = 0
        self.in_use = 0
        self.last_used = self.began = time.monotonic()
        self.stopping = False

    def __enter__(self) -> Child:
        self.in_use += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.in_use -= 1
        self.last_used = time.monotonic()

    @property
    def alive(self) -> bool:
        return not self.stopping and self.process.returncode is None

    async def ended(self) -> bool:
        """Whether the process has ended, for whom a connection makes think so: the system closes those first, and may
        need a moment to say the rest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_KNOWN):
                await self.process.wait()
        self.pool.broke = False
        return not self.alive

    @property
    def resident_bytes(self) -> int:
        """Its share of physical memory; pages of a model file that two children share count half for each."""
        return _resident(self.process.pid)

    @property
    def claimed_bytes(self) -> int:
        """What it may come to use, with every slot full; what the budget counts."""
        return max(self.resident_bytes, self.estimate)

    async def describe(self) -> None:
        """Asks the engine what it made of its parameters. Raises EngineFailed."""
        status, body = await self.pool.fetch("GET", "/props", self.headers)
        if status != 200:
            raise EngineFailed("The engine does not describe itself.")
        said = json.loads(body)
        self.slots = int(said["total_slots"])
        self.context_length = int(said["default_generation_settings"]["n_ctx"])
        self.template_knows_tools = bool(said.get("chat_template_caps", {}).get("supports_tools"))

    async def stop(self) -> None:
        """Ends the process and waits until it is gone; calls in flight break."""
        self.stopping = True
        self.pool.close()
        await _end(self.process)


class Children:
    """All local models of one server. path_of(id) names the file of a model, None if it is not on this machine."""

    def __init__(self, settings: Settings, path_of: Callable[[str], Path | None]) -> None:
        self._settings = settings
        self._path_of = path_of
        self._loaded: dict[str, Child] = {}
        self._loading: dict[str, asyncio.Task[Child]] = {}
        self._reserved: dict[str, int] = {}  # bytes, for models that are loading
        self._troubles: dict[str, _Trouble] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._closed = False

    def loaded(self) -> list[Child]:
        return [child for child in self._loaded.values() if child.alive]

    async def running(self, card: ModelCard, spec: LocalModel | None = None) -> Child:
        """The child of this model, loaded now if need be; enter it (`with child:`) before the next await.

        Raises EngineFailed when the model cannot be loaded, Overloaded when memory is full of models in use or the
        model has crashed too often of late; both messages are for the caller.
        """
        while True:
            child = self._loaded.get(card.id)
            if child is not None and child.alive and not (child.pool.broke and await child.ended()):
                child.last_used = time.monotonic()
                return child
            if self._closed:
                raise Overloaded("The server is stopping.")
            load = self._loading.get(card.id)
            if load is None:
                self._refuse_in_trouble(card.id)
                load = asyncio.get_running_loop().create_task(self._load(card, spec))
                self._loading[card.id] = load
                load.add_done_callback(lambda done: self._landed(card.id, done))
            try:
                child = await asyncio.shield(load)  # a caller who leaves does not end the others' load
            except asyncio.CancelledError:
                if load.cancelled() and not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise Overloaded(f"The model `{card.id}` is being unloaded.", retry_after=1.0) from None
                raise
            if child.alive:
                return child

    async def unload(self, id: str) -> None:
        """Stops the model, in use or not; no effect if it is not loaded."""
        load = self._loading.get(id)
        if load is not None:
            load.cancel()
            await asyncio.wait([load])
        child = self._loaded.pop(id, None)
        if child is not None:
            await child.stop()

    async def close(self) -> None:
        """Stops every child and waits until all are gone."""
        self._closed = True
        await asyncio.gather(*(self.unload(id) for id in [*self._loading, *self._loaded]))
        if self._watchers:
            await asyncio.wait(self._watchers)

    # loading
    def _landed(self, id: str, load: asyncio.Task[Child]) -> None:
        self._loading.pop(id, None)
        self._reserved.pop(id, None)
        if not load.cancelled():
            load.exception()  # every caller may have left: then nobody else looks at it

    async def _load(self, card: ModelCard, spec: LocalModel | None) -> Child:
        order = self._order(card, spec or LocalModel())
        await self._make_room(card.id, order)
        process = await _spawn()
        try:
            async with asyncio.timeout(self._settings.load_timeout):
                child = await self._start(card, process, order)
        except BaseException as error:  # cancelled too: whatever happened, no process may stay
            await _end(process)
            if isinstance(error, TimeoutError):
                error = EngineFailed(
                    f"The model `{card.id}` took longer to load than load_timeout, {self._settings.load_timeout:g} s."
                )
            if isinstance(error, EngineFailed):
                log.warning("%s", error.message)
                self._troubles.setdefault(card.id, _Trouble()).again(error)
            raise error from None
        child.estimate = self._reserved[card.id]
        self._loaded[card.id] = child
        watcher = asyncio.get_running_loop().create_task(self._watch(child))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        await self._trim(child)
        return child

    def _order(self, card: ModelCard, spec: LocalModel) -> dict[str, Any]:
        """What the child is told on its stdin."""
        settings = self._settings
        path = self._path_of(card.id)
        if path is None:
            raise _final(f"The file of the model `{card.id}` is not on this machine.")
        return {
            "name": card.id,
            "path": str(path),
            "kind": spec.kind or card.kind,
            "slots": spec.parallel or settings.parallel,
            "context": spec.context_length or settings.context_length,
            "kv_budget": min(settings.memory_budget * MEGABYTE // CACHE_SHARE, _machine_memory() // 4),
            "threads": settings.threads or _cores(),
            "lora": list(spec.lora),
            "secret": secrets.token_hex(32),
            "parent": os.getpid(),
            "log": str(settings.data_dir / "engine.log") if settings.trace_engine else None,
        }

    async def _start(self, card: ModelCard, process: asyncio.subprocess.Process, order: dict[str, Any]) -> Child:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")  # and stays open: its end tells the child to go
        line = await process.stdout.readline()
        if not line:
            raise EngineFailed(f"The model `{card.id}` cannot be loaded: {_obituary(await process.wait())}")
        said = json.loads(line)
        if "error" in said:
            raise _final(f"The model `{card.id}` cannot be loaded: {said['error']}")
        child = Child(card, process, order["secret"], said["port"], said["pool"])
        try:
            await child.describe()
            read = asyncio.get_running_loop().run_in_executor(None, gguf.read_vocabulary, Path(order["path"]))
            child.control_tokens, child.longest_token = await read
        except gguf.BadModelFile:  # its message has the path
            child.pool.close()
            raise _final(f"The model `{card.id}` cannot be loaded: its vocabulary cannot be read.") from None
        except BaseException:  # a cancelled load must not leave its sockets open either
            child.pool.close()
            raise
        return child

    # memory
    async def _make_room(self, id: str, order: dict[str, Any]) -> None:
        """Unloads idle models until this one fits the budget; its estimated need stays reserved while it loads."""
        need, budget = self._estimate(id, order), self._settings.memory_budget * MEGABYTE
        if need > budget:
            raise _final(
                f"The model `{id}` needs about {need // MEGABYTE} MB of memory, more than memory_budget, "
                f"{budget // MEGABYTE} MB, allows."
            )
        while self._used() + need > budget:
            if not await self._unload_idlest():
                raise Overloaded(
                    f"There is no memory for the model `{id}` while others are in use. Please try again.",
                    retry_after=5.0,
                )
        self._reserved[id] = need

    def _estimate(self, id: str, order: dict[str, Any]) -> int:
        path = Path(order["path"])
        try:
            made = llama.plan(path, order["slots"], order["context"], order["kv_budget"])
            size = path.stat().st_size + sum(Path(adapter).stat().st_size for adapter in order["lora"])
        except llama.NotAModel as error:
            raise _final(f"The model `{id}` cannot be loaded: {error}") from None
        except OSError as error:
            why = f"a file cannot be read ({type(error).__name__})"
            raise _final(f"The model `{id}` cannot be loaded: {why}.") from None
        return size + made.kv_bytes + PROGRAM

    def _used(self) -> int:
        return sum(child.claimed_bytes for child in self._loaded.values()) + sum(self._reserved.values())

    async def _unload_idlest(self, spare: Child | None = None) -> bool:
        idle = [child for child in self._loaded.values() if not child.in_use and child is not spare]
        if not idle:
            return False
        await self.unload(min(idle, key=lambda child: child.last_used).card.id)
        return True

    async def _trim(self, newest: Child) -> None:
        """An estimate may be wrong: what a model really takes counts once it is loaded."""
        self._reserved.pop(newest.card.id, None)
        while self._used() > self._settings.memory_budget * MEGABYTE and await self._unload_idlest(newest):
            pass

    # crashes
    async def _watch(self, child: Child) -> None:
        code = await child.process.wait()
        child.pool.close()
        if self._loaded.get(child.card.id) is child:
            del self._loaded[child.card.id]
        if child.stopping:
            return
        log.warning("model %s: %s; it is started again on its next use", child.card.id, _obituary(code))
        if time.monotonic() - child.began > CALM:
            self._troubles.pop(child.card.id, None)
        self._troubles.setdefault(child.card.id, _Trouble()).again(None)

    def _refuse_in_trouble(self, id: str) -> None:
        trouble = self._troubles.get(id)
        if trouble is None:
            return
        wait = trouble.until - time.monotonic()
        if wait <= 0:
            return
        if trouble.error is not None and trouble.error.retry is False:
            raise _final(trouble.error.message)
        raise Overloaded(f"The model `{id}` has crashed and is being restarted. Please try again.", retry_after=wait)


class _Trouble:
    """Crashes or failed loads in a row: the first is tried again at once, later ones after 1, 2, 4, ... seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.until = 0.0
        self.error: EngineFailed | None = None

    def again(self, error: EngineFailed | None) -> None:
        pause = 0.0 if self.count == 0 else min(LONGEST_BACKOFF, 2.0 ** (self.count - 1))
        self.count += 1
        self.until = time.monotonic() + pause
        self.error = error


def _final(message: str) -> EngineFailed:
    """A failure that another try will not mend."""
    error = EngineFailed(message)
    error.retry = False
    return error


async def _spawn() -> asyncio.subprocess.Process:
    """A child, waiting for its order. It has a session of its own: Ctrl-C in the terminal is for the gateway."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE)}
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-P", llama.__file__,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise EngineFailed(f"No process can be started for the model ({type(error).__name__}).") from None


async def _end(process: asyncio.subprocess.Process) -> None:
    for send in (process.terminate, process.kill):
        if process.returncode is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            send()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _obituary(code: int) -> str:
    """The exit code of a process as a sentence's end, without a full stop."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its process was ended by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _resident(pid: int) -> int:
    """Bytes of memory of a process in proportion to sharers; 0 if it is gone or this is not Linux."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
