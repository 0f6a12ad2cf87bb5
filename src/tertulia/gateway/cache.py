"""Answers what was answered before, and lets identical calls in flight share one answer.

An answer is kept only whole: status 200, not broken off, no error in it. By default it is kept only where asking again
would bring the same (temperature 0, a seed, embeddings); settings, a route, a key's policy and the request's
Cache-Control say otherwise, each later one having the last word. Nothing is shared across projects.

It knows what may be kept, for how long and how much of it; canonical.py knows when two calls ask for the same,
shared.py how one answer serves several calls, store/answers.py how answers outlast a restart.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..config import Settings
from ..core import FINISHED, NO_WISHES, Call, Next
from ..errors import TertuliaError
from ..store.answers import Answer, Answers
from .canonical import Keys, has_error
from .metrics import COUNTER, GAUGE, family
from .pipeline import typed
from .shared import KEPT, PORTION, Flight, Flights, limited

MEGABYTE = 1_000_000
LARGEST = 8  # an answer may take up to this part of the memory there is
ENTRY_BYTES = 500  # what an entry costs beside the bytes of its answer
DIRECTIVES_LIMIT = 256  # Cache-Control values whose meaning is remembered
FALLBACK = b"x-tertulia-fallback:"
NOT_AGAIN = (b"x-tertulia-attempts:", b"x-tertulia-retries:", b"x-tertulia-cache:")  # true of the first time only
_time = time.time


class NotCached(TertuliaError):
    """Only a cached answer was asked for (Cache-Control: only-if-cached), and there is none."""

    status = 504
    type = "invalid_request_error"
    retry = False
    code = "not_cached"


class Directives(NamedTuple):
    """What a request's Cache-Control says; max_age in seconds."""

    store: bool = True
    read: bool = True
    only: bool = False
    max_age: float = float("inf")


ANY = Directives()


class Cache:
    """The stage, and what it keeps."""

    def __init__(self, settings: Settings, data: Path) -> None:
        """data: the directory of the server; with cache_disk, answers are kept there in cache.db."""
        self._path = data / "cache.db"
        self._keys = Keys()
        self.flights = Flights(self._retry_key)
        self._entries: OrderedDict[bytes, Answer] = OrderedDict()  # least recently used first
        self._answers: Answers | None = None
        self._closing: threading.Thread | None = None  # waits for answers that go to a disk no longer used
        self._directives: dict[str, Directives] = {}
        self.bytes = self.hits = self.misses = self.joined = self.stored = self.evicted = 0
        self.reload(settings)

    def reload(self, settings: Settings) -> None:
        """Other settings from now on; what is kept stays, as far as there is room."""
        self._mode: str = settings.cache
        self._policies = {key: one.cache for key, one in settings.policies.items() if one.cache is not None}
        self._ttl, self._limit = settings.cache_ttl, settings.cache_memory * MEGABYTE
        self._coalesce = settings.coalesce
        self._seconds = self.flights.seconds = settings.request_timeout
        self.flights.grace = settings.retry_grace if settings.coalesce else 0.0
        self._make_room()
        disk = settings.cache_disk * MEGABYTE
        if self._answers is not None and not disk:
            # it waits for the disk, and the loop has calls to look after
            self._closing = threading.Thread(target=self._answers.close, name="answers-closing")
            self._closing.start()
            self._answers = None
        elif self._answers is not None:
            self._answers.limit, self._answers.lifetime = disk, self._ttl
        elif disk:
            self._answers = Answers(self._path, disk, self._ttl)

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        plan = call.plan
        mode = self._mode if plan is None or plan.cache is None else plan.cache
        if self._policies:
            mode = self._policies.get(call.principal.key_id, mode)
        if mode == "deterministic":
            asked = call.shape
            if call.task.name != "embedding" and asked.temperature != 0 and asked.seed is None:
                mode = "off"
        wishes = call.wishes
        if mode == "off":
            return following(call) if wishes is NO_WISHES else self._uncached(call, following)
        if wishes.cache_control:
            return self._wished(call, following, self._understood(wishes.cache_control))
        return self._look(call, following, self._keys.of(call), ANY)

    # what a request wishes
    def _uncached(self, call: Call, following: Next) -> Awaitable[None] | None:
        """A call that the cache has nothing to do with; its client's next try may still join it."""
        wishes = call.wishes
        if wishes.cache_control and self._understood(wishes.cache_control).only:
            raise NotCached()
        if not self._coalesce:
            return following(call)
        if wishes.idempotency_key:  # whoever says the same key with the same body means the same call
            scope = f"{call.principal.key_id} {wishes.idempotency_key}"
            key = self._keys.of(call, scope)
            flight = self.flights.find(key)
            if flight is not None:
                self._join(call, flight)
                return None
            return self.flights.launch(call, following, key, True, None)
        flights = self.flights
        if flights.grace and wishes.patience is not None:
            if wishes.retry_count:
                flight = flights.find(self._retry_key(call))
                if flight is not None:
                    flights.forget(flight)  # one next try, one call: two samples are not one
                    self._join(call, flight)
                    return None
            return flights.launch(call, following, None, False, None)
        return following(call)

    def _wished(self, call: Call, following: Next, wish: Directives) -> Awaitable[None] | None:
        if not wish.store and not wish.only:
            return following(call)
        key = self._keys.of(call)
        if wish.read:
            return self._look(call, following, key, wish)
        if wish.only:
            raise NotCached()
        return self._ask(call, following, key)

    def _understood(self, text: str) -> Directives:
        found = self._directives.get(text)
        if found is None:
            if len(self._directives) >= DIRECTIVES_LIMIT:
                self._directives.clear()
            found = self._directives[text] = directives(text)
        return found

    def _retry_key(self, call: Call) -> bytes:
        return self._keys.of(call, call.principal.key_id)

    # from memory, from disk, from a call in flight, or from further in
    def _look(self, call: Call, following: Next, key: bytes, wish: Directives) -> Awaitable[None] | None:
        answer = self._entries.get(key)
        if answer is not None:
            age = _time() - answer.stored
            if age < self._ttl and age <= wish.max_age:
                self._entries.move_to_end(key)
                self._hit(call, answer, age)
                return None
            if age >= self._ttl:
                self._drop(key)
        elif self._answers is not None and key in self._answers:
            return self._look_further(call, following, key, wish)
        return self._miss(call, following, key, wish)

    async def _look_further(self, call: Call, following: Next, key: bytes, wish: Directives) -> None:
        assert self._answers is not None
        answer = await self._answers.get(key)
        if call.reply.closed:
            return
        if answer is not None:
            age = _time() - answer.stored
            if age < self._ttl and age <= wish.max_age:
                self._keep(key, answer)
                self._hit(call, answer, age)
                return
        rest = self._miss(call, following, key, wish)
        if rest is not None:
            await rest

    def _hit(self, call: Call, answer: Answer, age: float) -> None:
        self.hits += 1
        call.cache = "hit"
        reply, pieces = call.reply, answer.pieces
        reply.headers.append(b"%sx-tertulia-cache: hit\r\nage: %d\r\n" % (answer.head, max(0.0, age)))
        reply.usage = answer.usage
        if len(pieces) == 1:
            reply.whole(pieces[0])
        else:
            Replay(call, pieces).start(self._seconds)

    def _miss(self, call: Call, following: Next, key: bytes, wish: Directives) -> Awaitable[None] | None:
        if self._coalesce:
            flight = self.flights.find(key)
            if flight is not None:
                self._join(call, flight)
                return None
        if wish.only:
            raise NotCached()
        return self._ask(call, following, key)

    def _join(self, call: Call, flight: Flight) -> None:
        self.joined += 1
        call.cache = "joined"
        call.reply.headers.append(b"x-tertulia-cache: joined\r\n")
        flight.join(call)

    def _ask(self, call: Call, following: Next, key: bytes) -> Awaitable[None] | None:
        self.misses += 1
        call.cache = "miss"
        call.reply.headers.append(b"x-tertulia-cache: miss\r\n")

        def landed(flight: Flight) -> None:
            self._landed(key, flight)

        return self.flights.launch(call, following, key if self._coalesce else None, True, landed)

    # what is kept
    def _landed(self, key: bytes, flight: Flight) -> None:
        """A shared call has ended: its answer is kept if it is whole."""
        call, reply = flight.call, flight.reply
        if flight.outcome != FINISHED or reply.status != 200 or not whole(flight.pieces, call.stream):
            return
        head = self._head(flight)
        if head is None:
            return
        pieces = portions(flight.pieces) if call.stream else [b"".join(flight.pieces)]
        size = flight.size + len(head) + ENTRY_BYTES
        model = call.target.model if call.target is not None else ""
        answer = Answer(model, head, _time(), pieces, reply.usage, size)
        self.stored += 1
        self._keep(key, answer)
        if self._answers is not None:
            self._answers.put(key, answer)

    @staticmethod
    def _head(flight: Flight) -> bytes | None:
        """The lines to send again; None if the answer is not the one that asking again would bring."""
        said = b"".join(flight.headers)
        attempts = flight.call.attempts
        if FALLBACK in said:  # the next call may find who was asked
            return None
        if attempts > 1 and b"x-tertulia-attempts: %d\r\n" % attempts not in said:  # a stream that another continued
            return None
        lines = said.splitlines(keepends=True)
        return b"".join(line for line in lines if line.startswith(b"x-tertulia-") and not line.startswith(NOT_AGAIN))

    def _keep(self, key: bytes, answer: Answer) -> None:
        if answer.size > min(self._limit // LARGEST, KEPT):
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = answer
        self.bytes += answer.size
        self._make_room()

    def _make_room(self) -> None:
        while self.bytes > self._limit:
            key, answer = self._entries.popitem(last=False)
            self.bytes -= answer.size
            self.evicted += 1
            if self._answers is not None:
                self._answers.touch(key)

    def _drop(self, key: bytes) -> None:
        self.bytes -= self._entries.pop(key).size

    def metrics(self) -> list[str]:
        """Figures for Prometheus."""
        counts = (
            ("hits", "Calls answered from the cache."),
            ("misses", "Calls that the cache might have answered and did not."),
            ("joined", "Calls that shared the answer of a call in flight."),
            ("stored", "Answers stored."),
            ("evicted", "Answers that gave way to others in memory."),
        )
        lines = []
        for name, help in counts:
            lines += family(f"tertulia_cache_{name}_total", COUNTER, help, [({}, getattr(self, name))])
        disk = self._answers
        tiers = [("memory", self.bytes, len(self._entries))]
        if disk is not None:
            tiers.append(("disk", disk.bytes, len(disk)))
        lines += family("tertulia_cache_bytes", GAUGE, "Bytes kept.", [({"tier": one}, b) for one, b, _ in tiers])
        lines += family("tertulia_cache_entries", GAUGE, "Answers kept.", [({"tier": one}, n) for one, _, n in tiers])
        return lines

    def close(self) -> None:
        """Ends what is still in flight, and waits until the disk has what it shall have."""
        self.flights.close()
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        if self._closing is not None:
            self._closing.join()
            self._closing = None


class Replay:
    """A stored stream on its way; the Source of its reply: it waits while the client is behind."""

    __slots__ = ("_at", "_busy", "_call", "_pieces", "_timer")

    def __init__(self, call: Call, pieces: list[bytes]) -> None:
        self._call, self._pieces, self._at, self._busy = call, pieces, 0, False
        self._timer: asyncio.TimerHandle | None = None
        call.reply.source = self

    def start(self, seconds: float) -> None:
        """Says all at once, or has a limit of time. seconds: what the call may take, unless its plan says otherwise."""
        self.run()
        if not self._call.reply.closed:
            self._timer = limited(self._call, seconds)
            self._call.reply.on_close(self._over)

    def _over(self, outcome: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def run(self) -> None:
        """Pushes until the client is behind, or all is said."""
        reply, pieces = self._call.reply, self._pieces
        self._busy = True
        while self._at < len(pieces) and not reply.paused and not reply.closed:
            self._at += 1
            reply.push(pieces[self._at - 1])
        self._busy = False
        if self._at == len(pieces):
            reply.close(FINISHED)

    def pause_reading(self) -> None:
        """Nothing to do: run looks at reply.paused."""

    def resume_reading(self) -> None:
        """The client has caught up."""
        if self._busy:
            return
        try:
            self.run()
        except Exception as error:  # from the socket's callback: what the pipeline would do with it
            self._call.reply.fail(typed(self._call, error))


def whole(pieces: list[bytes], stream: bool) -> bool:
    """Whether these pieces are an answer from its beginning to its end: JSON that is no error, or a stream up to
    [DONE] without an error in it."""
    if not pieces:
        return False
    try:
        if not stream:
            return not has_error(b"".join(pieces))
        if pieces[-1].rstrip()[-12:] != b"data: [DONE]" and pieces[-1].rstrip()[-11:] != b"data:[DONE]":
            return False
        for piece in pieces:
            if b'"error"' in piece:  # written inside a text it has backslashes
                for line in piece.splitlines():
                    if line.startswith(b"data:") and has_error(line[5:]):
                        return False
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return True


def portions(pieces: list[bytes]) -> list[bytes]:
    """The same stream in fewer pieces, of whole events still."""
    found: list[bytes] = []
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= PORTION:
            found.append(b"".join(gathered))
            gathered, size = [], 0
    if gathered:
        found.append(b"".join(gathered))
    return found


def directives(text: str) -> Directives:
    """What a Cache-Control header (in lower case) says of reading and storing; other directives say nothing here."""
    store, read, only, max_age = True, True, False, float("inf")
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        value = value.strip('" ')
        if name == "no-store":
            store = read = False
        elif name == "no-cache":
            read = False
        elif name == "only-if-cached":
            only = True
        elif name == "max-age" and value.isdecimal():
            max_age = float(value[:12])
            read = read and max_age > 0
    return Directives(store, read, only, max_age)
