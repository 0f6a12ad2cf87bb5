"""Who asks, and the two nouns that do something: a Call on its way to who answers it, and its Reply on the way back.
Everything else of the vocabulary is in core, which offers these as well.

This module is on the way of every piece of every answer, and is one of those that are compiled where there is a C
compiler (setup.py): no msgspec structs in them, whose annotations do not survive that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from .errors import DeadlineExceeded, TertuliaError

if TYPE_CHECKING:
    from .core import Plan, Target, Task, Usage

FINISHED: Final = "finished"
FAILED: Final = "failed"
CLIENT_LEFT: Final = "client_left"
DEADLINE: Final = "deadline"
STOPPED: Final = "stopped"
BYTES_PER_TOKEN: Final = 4  # of a prompt that nobody has counted


class Principal:
    """Who asks: one API key with the project and organization it belongs to. One object per key, kept in memory."""

    __slots__ = (
        "account",
        "expires_at",
        "key_id",
        "kind",
        "lines",
        "organization",
        "owner_id",
        "project",
        "scopes",
        "state",
        "used",
    )  # fmt: skip

    def __init__(self, key_id: str, organization: str, project: str, kind: str = "project") -> None:
        self.key_id = key_id
        self.organization = organization
        self.project = project
        self.kind = kind  # "project" or "admin"
        self.scopes: frozenset[str] | None = None  # None: everything its kind may do
        self.owner_id: str | None = None  # a user or a service account; None: the organization's owner
        self.expires_at: int | None = None  # unix seconds
        self.account: Any = None  # an accounts.projects.Project; None for admin keys
        self.used = 0  # unix seconds, set by the meter
        self.state: Any = None  # admit's counters for the project; opaque to everyone else
        self.lines: bytes | None = None  # the edge's response headers for it; opaque too


class Wishes(NamedTuple):
    """What the headers of a request ask of the gateway, as far as they are understood."""

    retry_count: int = 0  # the SDK's count of its own tries of this request
    patience: float | None = None  # seconds its sender waits for news, as the SDK says it
    cache_control: str = ""  # Cache-Control, in lower case
    idempotency_key: str = ""
    traceparent: str = ""  # the caller's trace, as W3C writes it


NO_WISHES: Final = Wishes()


class Sink(Protocol):
    """Where a Reply goes in the end: a client's socket, or memory (engines.base.Collector).

    An answer that is not a stream may begin again, as an error: what was written before is dropped.
    """

    def begin(self, status: int, headers: Sequence[bytes]) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self, outcome: str) -> None: ...

    def whole(self, headers: Sequence[bytes], data: bytes) -> None:
        """begin(200), write and end(FINISHED) in one."""


class Source(Protocol):
    """What can be paused while the client reads slowly: a transport."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Watch(Protocol):
    """Who keeps account of what is sent to engines: the meter."""

    def sending(self, call: Call) -> None:
        """The bytes of an attempt are about to leave: it counts from here on, whatever becomes of us."""

    def lost(self, call: Call, error: TertuliaError) -> bool:
        """The attempt under way is over, and the call is not: whether another one may follow."""

    def continues(self, call: Call, more: int) -> bool:
        """The call is to go on where its answer broke off, after so many bytes of it: whether it may."""


GONE: list[Any] = []  # of a reply that is closed; nobody adds to it


class Reply:
    """A pipe from an engine to a client.

    On the way down stages hang on it what they want to see on the way up: tap(see) sees each piece, rewrite(change)
    changes it, on_close(settle) is told once how the call ended. The engine then calls begin, push for every piece, and
    close, or fail at any time. A piece of a stream is one or more whole server-sent events, wire bytes; an answer that
    is not a stream is one piece. What was hung last, by the innermost stage, runs first. push begins the answer if
    nobody has: an engine of which nothing has come yet had better not begin, so that a failure can still be a status.

    started says whether a piece of the answer has gone to the client; heartbeats (beat) are none. As long as it has
    not, recover may have another target answer unseen; after it, only who can go on where the answer broke off.

    Outcomes: finished, failed (self.error says why), client_left, deadline, stopped.
    """

    __slots__ = (
        "_closers",
        "_paused",
        "_steps",
        "begun",
        "closed",
        "error",
        "first",
        "headers",
        "last",
        "outcome",
        "own",
        "pace",
        "recover",
        "sink",
        "source",
        "started",
        "status",
        "stream",
        "usage",
    )  # fmt: skip

    def __init__(self, sink: Sink, stream: bool = False) -> None:
        self.sink = sink
        self.stream = stream
        self.headers: list[bytes] = []  # lines as on the wire, each ending in CRLF
        self.status = 0
        self.first = self.last = 0  # time.perf_counter_ns() at the first piece, and at the last one so far
        self.begun = self.closed = self.started = False
        self.outcome: str | None = None
        self.error: TertuliaError | None = None
        self.usage: Usage | None = None  # set by the engine, before it pushes the last piece or closes
        self.own: Usage | None = None  # what the last attempt used of it, where that is not all
        self.source: Source | None = None
        self.recover: Callable[[TertuliaError], bool] | None = None  # route's: takes over a failure
        self.pace: Callable[[float], None] | None = None  # the meter's: told the seconds between two pieces
        self._steps: list[tuple[Callable[[bytes], Any], bool]] = []
        self._closers: list[Callable[[str], None]] = []
        self._paused = False

    def header(self, name: str, value: str) -> None:
        """Adds a response header; no effect on the wire once begun. Line breaks cannot get in."""
        line = f"{name}: {value}".replace("\r", " ").replace("\n", " ")
        self.headers.append(line.encode("latin-1", "replace") + b"\r\n")

    def tap(self, see: Callable[[bytes], None]) -> None:
        """see(piece) is called with each piece, as the steps hung after this one leave it."""
        if not self.closed:
            self._steps.insert(0, (see, False))

    def rewrite(self, change: Callable[[bytes], bytes]) -> None:
        """change(piece) returns the piece to pass on; b"" swallows it."""
        if not self.closed:
            self._steps.insert(0, (change, True))

    def on_close(self, settle: Callable[[str], None]) -> None:
        """settle(outcome) is called once, whatever ends the call; at once if it has ended already."""
        if self.outcome is not None:  # the client left before the stage had its turn
            settle(self.outcome)
        else:
            self._closers.append(settle)

    def undo(self, settle: Callable[[str], None]) -> None:
        """An attempt to answer is over: what was hung on closing after settle is told FAILED now, and no more."""
        at = self._closers.index(settle) + 1
        over, self._closers[at:] = self._closers[at:], []
        self.source = None
        for close in reversed(over):
            close(FAILED)

    def begin(self, status: int = 200) -> None:
        """The status is settled: from here on errors travel inside the stream."""
        if self.begun or self.closed:
            return
        self.begun, self.status = True, status
        self.sink.begin(status, self.headers)

    def push(self, data: bytes) -> None:
        """One piece of the answer, through every tap and rewrite to the client; ignored after close."""
        if self.closed:
            return
        now = perf_counter_ns()
        if not self.started:
            self.started, self.first = True, now
            if not self.begun:
                self.begin()
        elif self.pace is not None:
            self.pace((now - self.last) * 1e-9)
        self.last = now
        for step, changes in self._steps:
            if changes:
                data = step(data)
                if not data:
                    return
            else:
                step(data)
        self.sink.write(data)

    def beat(self, comment: bytes = b": waiting\n\n") -> None:
        """Shows the client of a stream that somebody is there; taps do not see it. Commits to status 200."""
        if self.stream and not self.closed:
            if not self.begun:
                self.begin()
            self.sink.write(comment)

    def fail(self, error: TertuliaError) -> None:
        """The engine or a stage gives up: another target may take over, else the client gets a status or an event."""
        if self.closed:
            return
        error.__traceback__ = error.__context__ = None  # their frames refer to the call, which keeps the error
        try:
            if self.recover is not None and self.recover(error):
                return
        except Exception:  # a defect of ours; whatever it was, the client is told of the first error
            self.recover = None
        self.error = error
        if not self.begun or not self.stream:  # of an answer in one piece nothing has left yet
            self.begun = False
            for name, value in retry_headers(error):
                self.header(name, value)
            self.stream = False  # an error before the first byte is an ordinary answer, whatever was asked for
            self.begin(error.status)
            self.sink.write(error.body())
        else:
            self.sink.write(error.event())
        self.close(DEADLINE if isinstance(error, DeadlineExceeded) else FAILED)

    def whole(self, data: bytes) -> None:
        """The whole answer, and the end: push and close in one."""
        if self.closed:
            return
        if self._steps or self.begun or self.stream:
            self.push(data)
            self.close(FINISHED)
            return
        self.started = self.begun = True
        self.first = self.last = perf_counter_ns()
        self.status = 200
        broken = self._settle(FINISHED)
        self.sink.whole(self.headers, data)
        if broken is not None:
            raise broken

    def close(self, outcome: str = FINISHED) -> None:
        """Ends the call, once; closers run last hung first, then the client gets the last byte.

        An error of a closer is raised when all that is done.
        """
        if self.closed:
            return
        broken = self._settle(outcome)
        self.sink.end(outcome)
        if broken is not None:
            raise broken

    def _settle(self, outcome: str) -> Exception | None:
        self.closed, self.outcome = True, outcome
        broken: Exception | None = None
        try:
            for settle in reversed(self._closers):
                settle(outcome)
        except Exception as error:  # it is raised in the end; the others must settle first
            broken = self._settle_the_others(settle, outcome, error)
        self._steps = self._closers = GONE  # whoever is referred to from there may go
        self.source = self.recover = self.pace = None
        return broken

    def _settle_the_others(self, failed: Callable[[str], None], outcome: str, first: Exception) -> Exception:
        """Whatever broke one closer (a full disk, say), the others settle and the call ends."""
        for settle in reversed(self._closers[: self._closers.index(failed)]):
            try:
                settle(outcome)
            except Exception:
                # the first error is the one that is raised; this one is most likely its echo
                continue
        return first

    def pause(self) -> None:
        """The client reads slowly: stop reading from the engine's socket until resume."""
        self._paused = True
        if self.source is not None:
            self.source.pause_reading()

    def resume(self) -> None:
        """The client has caught up: read on."""
        self._paused = False
        if self.source is not None:
            self.source.resume_reading()

    @property
    def paused(self) -> bool:
        """Whether the client is behind; for a source that connects later."""
        return self._paused


def retry_headers(error: TertuliaError) -> list[tuple[str, str]]:
    """The headers by which the SDK decides whether and when to try again (see its _should_retry)."""
    headers = list(error.headers)
    if error.retry is not None:
        headers.append(("x-should-retry", "true" if error.retry else "false"))
    if error.retry_after is not None:
        headers.append(("retry-after", str(max(1, round(error.retry_after + 0.499)))))
        headers.append(("retry-after-ms", str(max(1, round(error.retry_after * 1000)))))
    return headers


class Call:
    """One request for an answer of a model, from whoever makes it; lives as long as the answer does.

    asked is the body, decoded. shape is that, too, but its long texts may be cut short: most who look at a call do not
    look at those, and they are most of its bytes; then reread(body) decodes all of it when somebody does.
    deadline is in seconds of the loop's clock, None for no limit. target is who answers, or would at first; plan is
    all who may; fallback: whoever was asked last is not of its first group. attempts counts what was sent to engines;
    cache says what the cache did: "", hit, miss or joined; cost is what it came to, in nano-dollars, once admit has
    settled it. prompt_tokens (as far as they are known), output_tokens (at most) and hold (nano-dollars, at most) are
    admit's for one attempt. sent counts the attempts whose bytes have left, open says that the last of them is not in
    the ledger yet, under the id opener, and intent where the ledger has it meanwhile; paid (nano-dollars) and used
    (tokens) are what the lost ones came to. held is admit's, opaque to everyone else; observed names the limits that
    only observe and would have refused the call; unpriced: nobody knows its price. refusal is what the edge already
    found wrong (a bad key, a broken body): it travels so that the meter, which is outermost, records it.
    """

    __slots__ = (
        "attempts",
        "began",
        "body",
        "cache",
        "client",
        "cost",
        "deadline",
        "fallback",
        "held",
        "hold",
        "id",
        "intent",
        "model",
        "observed",
        "open",
        "opener",
        "output_tokens",
        "paid",
        "plan",
        "principal",
        "prompt_tokens",
        "refusal",
        "reply",
        "reread",
        "sent",
        "shape",
        "stream",
        "target",
        "task",
        "unpriced",
        "used",
        "watch",
        "wishes",
    )  # fmt: skip

    def __init__(self, id: str, principal: Principal, task: Task, body: bytes, reply: Reply, began: int) -> None:
        self.id = id
        self.principal = principal
        self.task = task
        self.body = body
        self.shape: Any = None
        self.reread: Callable[[bytes], Any] | None = None
        self.model = ""
        self.stream = False
        self.target: Target | None = None
        self.plan: Plan | None = None
        self.deadline: float | None = None
        self.reply = reply
        self.refusal: TertuliaError | None = None
        self.began = began  # time.perf_counter_ns() at the first byte
        self.wishes = NO_WISHES
        self.attempts = self.cost = self.hold = 0
        self.prompt_tokens = self.output_tokens = 0
        self.sent = self.paid = self.used = 0
        self.opener = id
        self.intent = -1
        self.open = self.fallback = self.unpriced = False
        self.held: Any = None
        self.observed = ""
        self.watch: Watch | None = None
        self.cache = ""
        self.client = ""

    def sending(self) -> None:
        """An engine says: the bytes of an attempt leave now."""
        if self.watch is not None:
            self.watch.sending(self)

    def lost(self, error: TertuliaError) -> bool:
        """The attempt under way, if any, has failed: whether another one may follow."""
        return self.watch.lost(self, error) if self.open and self.watch is not None else True

    def may_continue(self, more: int) -> bool:
        """Whether the call may go on where its answer broke off, with so many bytes of it in its prompt."""
        return self.watch is None or self.watch.continues(self, more)

    @property
    def asked(self) -> Any:
        if self.reread is not None:
            self.shape, self.reread = self.reread(self.body), None
        return self.shape

    @asked.setter
    def asked(self, value: Any) -> None:
        self.shape, self.reread = value, None

    def take_over(self, other: Call) -> None:
        """What was sent to engines for other counts as ours."""
        self.attempts, self.sent, self.open, self.opener = other.attempts, other.sent, other.open, other.opener
        self.intent = other.intent
        self.paid, self.used = other.paid, other.used


# A stage is a plain function: it hands the call on and returns what following(call) returned. That is None when the
# call is on its way, or an awaitable of the rest when somebody further in has to wait for something. So a call that
# nobody makes wait costs no coroutine and no task.
Next = Callable[[Call], Awaitable[None] | None]
Stage = Callable[[Call, Next], Awaitable[None] | None]
