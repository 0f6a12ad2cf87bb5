"""One answer for several calls: identical calls in flight share one call further in, streams too.

    leader ──┐                    ┌── route, engine
    joiner ──┼── listeners  Flight┤   the shared call, with a Reply of its own: the Flight is its Sink,
    joiner ──┘                    └── and the Source that its listeners pause

Every listener keeps its own taps, closers and outcome. Who comes later gets what has been said so far at once, then
what comes. Who leaves is one listener less; when the last has left, the shared call ends as if its client had left, or
goes on for a while (grace) in case the client tries again. A failure is given to every listener.

The shared call is paid for once, by one of the listeners, the payer: its call.cache is "" or "miss", all others' is
"joined". That is the leader; if it leaves early, the one after it pays in its place. An answer that went on in grace
and that nobody came back for is given to Flights.account when it ends.

The shared call has a deadline further in, the one of its leader. Who is still behind when it has ended has its own.

It does not know when two calls are identical, nor what becomes of an answer that is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter_ns

from ..core import CLIENT_LEFT, FAILED, FINISHED, STOPPED, Call, Next, Reply, retry_headers
from ..errors import DeadlineExceeded, TertuliaError
from .pipeline import typed

LAG = 4 * 2**20  # bytes the slowest listener may be behind before the others have to wait for it
KEPT = 4 * 2**20  # bytes of one answer that are kept for those who come later
ALL_KEPT = 64 * 2**20  # and of all answers in flight together
PORTION = 16 * 1024  # bytes given at once to who has to catch up


class Nowhere:
    """The Sink of a reply that has closed."""

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        pass

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        pass

    def write(self, data: bytes) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


NOWHERE = Nowhere()


class Flights:
    """All shared calls in flight, by key."""

    def __init__(self, retry_key: Callable[[Call], bytes]) -> None:
        """retry_key(call): under what a call that nobody waits for any more is found by its client's next try."""
        self.retry_key = retry_key
        self.grace = 0.0  # seconds
        self.seconds = 0.0  # a call may take in all, unless its plan says otherwise; 0: no limit
        self.kept = 0  # bytes, of all flights
        self.account: Callable[[Call, str], None] | None = None  # told (call, outcome) of what nobody came back for
        self.linger: Callable[[Call], None] | None = None  # told of a call that goes on though nobody waits for it,
        self.resume: Callable[[Call], None] | None = None  # and when somebody has come back for it
        self._by_key: dict[bytes, Flight] = {}
        self._all: set[Flight] = set()

    def __len__(self) -> int:
        return len(self._all)

    def find(self, key: bytes) -> Flight | None:
        """The flight that whoever has this key may join."""
        return self._by_key.get(key)

    def launch(
        self, call: Call, following: Next, key: bytes | None, keep: bool, landed: Callable[[Flight], None] | None
    ) -> Awaitable[None] | None:
        """Sends a shared call on its way with call as its first listener; key: under what it can be joined; keep:
        whether the whole answer is kept for joiners and for landed, which is told when the flight has ended."""
        if call.reply.closed:  # the client left while a stage above waited
            return None
        flight = Flight(self, call, keep, landed)
        self._all.add(flight)
        if key is not None:
            self.register(flight, key)
        flight.join(call, True)
        try:
            rest = following(flight.call)
        except Exception as error:  # typed or a defect of ours: it is the shared call's, as the pipeline would say
            flight.call.reply.fail(typed(flight.call, error))
            return None
        return None if rest is None else flight.wait(rest)

    def register(self, flight: Flight, key: bytes) -> None:
        """From now on the flight can be found; it takes the place of one begun before."""
        flight.key = key
        self._by_key[key] = flight

    def forget(self, flight: Flight) -> None:
        """Nobody new joins it."""
        if flight.key is not None and self._by_key.get(flight.key) is flight:
            del self._by_key[flight.key]
        flight.key = None

    def gone(self, flight: Flight) -> None:
        """It has ended."""
        self.forget(flight)
        self._all.discard(flight)

    def close(self) -> None:
        """Ends what is still in the air: the server stops."""
        for flight in tuple(self._all):
            flight.reply.close(STOPPED)


class Listener:
    """One call that waits for a shared answer; the Source of its Reply."""

    __slots__ = ("at", "busy", "call", "finishing", "flight", "given", "leads", "reply", "timer", "told")

    def __init__(self, flight: Flight, call: Call, leads: bool) -> None:
        self.flight, self.call, self.reply, self.leads = flight, call, call.reply, leads
        self.at = self.given = 0  # pieces and bytes of the answer that it has
        self.busy = self.finishing = self.told = False
        self.timer: asyncio.TimerHandle | None = None  # its own time, once the shared call's is over

    def pause_reading(self) -> None:
        """Its client reads slowly."""
        self.flight.balance()

    def resume_reading(self) -> None:
        """Its client has caught up."""
        self.flight.give(self)
        self.flight.balance()

    def left(self, outcome: str) -> None:
        """Its reply has closed, for whatever reason."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.flight.left(self, outcome)


class Flight:
    """One shared call: the Sink of its reply."""

    __slots__ = (
        "__weakref__", "_base", "_flights", "_held", "_landed", "_timer", "call", "end_at", "error", "headers", "keep",
        "key", "listeners", "outcome", "payer", "pieces", "reply", "size",
    )  # fmt: skip

    def __init__(self, flights: Flights, call: Call, keep: bool, landed: Callable[[Flight], None] | None) -> None:
        self._flights, self._landed, self.keep = flights, landed, keep
        self.reply = Reply(self, call.stream)
        self.call = _copy(call, self.reply)
        self.key: bytes | None = None
        self.listeners: dict[Listener, None] = {}  # in the order they came
        self.payer: Listener | None = None
        self.headers: list[bytes] = []
        self.pieces: list[bytes] = []  # from the first, as long as keep; else what somebody still needs
        self._base = 0  # pieces dropped before the first of them
        self.end_at = self.size = 0  # pieces and bytes there have been
        self._held = 0
        self.error: TertuliaError | None = None
        self.outcome: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, rest: Awaitable[None]) -> None:
        """The rest of handing the shared call over; its errors are the shared call's."""
        try:
            await rest
        except asyncio.CancelledError:  # whoever awaited this was stopped: nobody else would end the call
            self.reply.close(STOPPED)
            raise
        except Exception as error:  # as in launch
            self.call.reply.fail(typed(self.call, error))

    # listeners
    def join(self, call: Call, leads: bool = False) -> None:
        """Makes call's reply a listener: it gets what has been said at once. leads: the shared call is a copy of it."""
        if call.reply.closed:
            return
        listener = Listener(self, call, leads)
        self.listeners[listener] = None
        if self.payer is None and self.outcome is None:
            self.payer = listener
            if self._timer is not None:  # nobody was there any more: it is this one's now
                self._timer.cancel()
                self._timer = None
                call.cache = "miss"
                if self._flights.resume is not None:
                    self._flights.resume(self.call)
        call.reply.source = listener
        call.reply.on_close(listener.left)
        self.give(listener)
        self.balance()

    def give(self, listener: Listener) -> bool:
        """Pushes what the listener has not got yet, unless its client is behind; whether it has everything now."""
        reply = listener.reply
        if listener.busy:  # further down on the stack
            return True
        listener.busy = True
        try:
            while listener.at < self.end_at:
                if reply.paused or reply.closed:
                    return reply.closed
                data = self._portion(listener)
                if not listener.told:
                    self._tell(listener)
                reply.push(data)
            if self.outcome is not None and not reply.closed:
                self._finish(listener)
        except Exception as error:  # of a tap or the socket of this one: the others' answer goes on
            listener.call.reply.fail(typed(listener.call, error))
        finally:
            listener.busy = False
        return True

    def _portion(self, listener: Listener) -> bytes:
        """The next piece; for who has to catch up with a stream, several in one."""
        at = listener.at - self._base
        data = self.pieces[at]
        listener.at += 1
        if listener.at < self.end_at and self.call.stream:
            size, last = len(data), at + 1
            while last < len(self.pieces) and size < PORTION:
                size += len(self.pieces[last])
                last += 1
            data = b"".join(self.pieces[at:last])
            listener.at = last + self._base
        listener.given += len(data)
        return data

    def _tell(self, listener: Listener) -> None:
        """What the shared reply's head says, this one's says too."""
        listener.told = True
        reply = listener.reply
        if not reply.begun:
            reply.headers.extend(self.headers)
            if self.error is None and self.reply.status:
                reply.begin(self.reply.status)

    def _finish(self, listener: Listener) -> None:
        reply = listener.reply
        listener.finishing = True
        if not listener.told:
            self._tell(listener)
        if self.error is None:
            reply.close(self.outcome or FAILED)
        elif isinstance(self.error, DeadlineExceeded) and not listener.leads:
            reply.fail(_not_its_own(self.error))
        else:
            reply.fail(self.error)

    def left(self, listener: Listener, outcome: str) -> None:
        """A listener's reply has closed: it was given everything, or its client left."""
        del self.listeners[listener]
        call, reply = listener.call, listener.reply
        call.target, call.fallback = self.call.target, self.call.fallback
        if listener is self.payer:
            self._settle(listener, outcome)
        if self.reply.usage is not None:
            reply.usage, reply.own = self.reply.usage, self.reply.own
        if not self.keep:
            self._trim()
        self.balance()

    def _settle(self, payer: Listener, outcome: str) -> None:
        """The payer's reply has closed: it pays, unless somebody stays who can, or may come."""
        call = payer.call
        if self.listeners and not payer.finishing:
            heir = self.payer = next(iter(self.listeners))
            call.cache, heir.call.cache = "joined", "miss"
            return
        self.payer = None
        if self.outcome is None:
            if self._may_return(payer, outcome):
                call.cache = "joined"
                self._linger()
                return
            self.payer = payer  # nobody else pays for this end
            self.reply.close(STOPPED if outcome == STOPPED else CLIENT_LEFT)
            self.payer = None
        call.take_over(self.call)

    # grace
    def _may_return(self, payer: Listener, outcome: str) -> bool:
        """Whether the client may try again: no SDK does once an answer has begun to reach it."""
        return outcome == CLIENT_LEFT and self._flights.grace > 0 and not payer.reply.begun

    def _linger(self) -> None:
        flights = self._flights
        self._timer = asyncio.get_running_loop().call_later(flights.grace, self._give_up)
        if flights.linger is not None:
            flights.linger(self.call)
        if self.key is None:
            flights.register(self, flights.retry_key(self.call))
        if not self.keep:  # nothing has been dropped: nothing had reached the only client
            self.keep = True
            self._hold(self.size)

    def _give_up(self) -> None:
        self._timer = None
        self.reply.close(CLIENT_LEFT)

    # flow control
    def balance(self) -> None:
        """Pauses the source while nobody reads, or somebody is too far behind; else lets it go on."""
        if self.outcome is not None:
            return
        paused, listeners = self.reply.paused, self.listeners
        limit = LAG // 2 if paused else LAG
        stop = bool(listeners) and (
            all(one.reply.paused for one in listeners) or self.size - min(one.given for one in listeners) > limit
        )
        if stop and not paused:
            self.reply.pause()
        elif paused and not stop:
            self.reply.resume()

    # the Sink
    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        error = self.error = self.reply.error
        own = len(headers) - (len(retry_headers(error)) if error is not None else 0)  # each reply adds its own
        self.headers = list(headers[:own])

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        self.begin(200, headers)
        self.write(data)
        self.end(FINISHED)

    def write(self, data: bytes) -> None:
        if self.reply.error is not None:  # listeners are told at the end, each as far as its answer has come
            return
        if data.startswith(b":") and b"data:" not in data:
            self._beat(data)
            return
        self.pieces.append(data)
        self.size += len(data)
        self.end_at += 1
        if self.keep:
            self._hold(len(data))
        behind = False
        for listener in tuple(self.listeners):
            behind |= not self.give(listener)
        if behind:
            self.balance()
        if not self.keep:
            self._trim()

    def _beat(self, comment: bytes) -> None:
        for listener in tuple(self.listeners):
            if listener.at == self.end_at and not listener.reply.paused:
                if not listener.told:
                    self._tell(listener)
                listener.reply.beat(comment)

    def end(self, outcome: str) -> None:
        self.error, self.outcome = self.reply.error, outcome
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flights.gone(self)
        self._flights.kept -= self._held
        self._held = 0
        if self._landed is not None and self.keep:
            self._landed(self)
        if self.payer is None and self._flights.account is not None:
            self._flights.account(self.call, outcome)
        self.reply.sink = NOWHERE  # it has no more to say, and a circle would outlive the answer
        for listener in tuple(self.listeners):
            self.give(listener)
            if listener in self.listeners:
                listener.timer = limited(listener.call, self._flights.seconds)

    # what is kept
    def _hold(self, size: int) -> None:
        flights = self._flights
        flights.kept += size
        self._held += size
        if self._held > KEPT or flights.kept > ALL_KEPT:  # too much to hand to late comers: nobody joins from here on
            self.keep = False
            flights.kept -= self._held
            self._held = 0
            flights.forget(self)
            if not self.listeners:  # it lingered; its client could not be given it any more
                self.reply.close(CLIENT_LEFT)

    def _trim(self) -> None:
        """Drops the pieces that every listener has."""
        first = min((one.at for one in self.listeners), default=self.end_at)
        if first > self._base:
            del self.pieces[: first - self._base]
            self._base = first


def limited(call: Call, seconds: float) -> asyncio.TimerHandle | None:
    """Ends a call that waits for nobody but its client when its time is over, counted from its first byte.
    seconds: what it has unless its plan says otherwise; 0: no limit."""
    if call.plan is not None and call.plan.timeout is not None:
        seconds = call.plan.timeout
    if not seconds:
        return None
    spent = (perf_counter_ns() - call.began) * 1e-9 if call.began else 0.0
    return asyncio.get_running_loop().call_later(max(0.0, seconds - spent), _expire, call, seconds)


def _expire(call: Call, seconds: float) -> None:
    call.reply.fail(DeadlineExceeded(f"The request took longer than {seconds:g} seconds."))


def _not_its_own(error: DeadlineExceeded) -> DeadlineExceeded:
    """What one who joined is told of a deadline that was the leader's: another try has all of its own time."""
    found = DeadlineExceeded(
        "The request shared the answer of an identical one that had begun before it, and whose time ran out: "
        f"{error.message} Please try again."
    )
    found.retry = True
    return found


def _copy(call: Call, reply: Reply) -> Call:
    """The same call, answered elsewhere."""
    shared = Call(call.id, call.principal, call.task, call.body, reply, call.began)
    shared.shape, shared.reread, shared.model, shared.stream = call.shape, call.reread, call.model, call.stream
    shared.target, shared.plan, shared.deadline = call.target, call.plan, call.deadline
    shared.wishes, shared.client = call.wishes, call.client
    shared.prompt_tokens, shared.output_tokens, shared.hold = call.prompt_tokens, call.output_tokens, call.hold
    shared.watch, shared.held = call.watch, call.held
    shared.observed, shared.unpriced = call.observed, call.unpriced
    return shared
