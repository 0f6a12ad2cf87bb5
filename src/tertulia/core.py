"""The nouns every room speaks of: who asks (Principal), what is asked (Call), the answer on its way (Reply), what it
used (Usage), what answers (ModelCard, Target). It imports no other room but errors and knows nothing of HTTP, SQL or
any model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter_ns
from typing import Any, Protocol

import msgspec

from .errors import DeadlineExceeded, TertuliaError


class Principal:
    """Who asks: one API key with the project and organization it belongs to. One object per key, kept in memory."""

    __slots__ = ("key_id", "kind", "lines", "organization", "project", "scopes", "state")

    def __init__(self, key_id: str, organization: str, project: str, kind: str = "project") -> None:
        self.key_id = key_id
        self.organization = organization
        self.project = project
        self.kind = kind  # "project" or "admin"
        self.scopes: frozenset[str] | None = None  # None: everything its kind may do
        self.state: Any = None  # admit's counters for the project; opaque to everyone else
        self.lines: bytes | None = None  # the edge's response headers for it; opaque too


NOBODY = Principal("", "", "", "nobody")


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, as the engine counted them; estimated where it broke off before it had said so."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model, whoever serves it.

    source: where its file comes from: `pypi:PACKAGE==VERSION/PATH`, `hf:ORG/REPO/FILE`, `file:/PATH`, `upstream:NAME`
    or `mock:`. bytes and sha256 are of the file as served; context_length in tokens, None if not known.
    """

    id: str
    kind: str  # "chat", "completion" or "embedding"
    source: str
    sha256: str | None = None
    bytes: int | None = None
    licence: str | None = None
    context_length: int | None = None
    dimensions: int | None = None
    capabilities: tuple[str, ...] = ()
    sampling: dict[str, float] = {}  # defaults for sampling parameters a caller does not give
    owned_by: str = "tertulia"
    created: int = 0
    description: str = ""


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model name with a base model, a system message, few-shot examples and sampling parameters behind it."""

    model: str
    system: str | None = None
    examples: list[dict[str, str]] = []  # [{"user": ..., "assistant": ...}, ...] as earlier turns
    parameters: dict[str, Any] = {}  # body parameters used where the caller gives none


class Target(msgspec.Struct, frozen=True):
    """What a model name resolved to: the engine that answers, the name it knows the model by, and the model's card.

    live is route's: how the target is doing; opaque to everyone else.
    """

    engine: Any  # an engines.base.Engine
    model: str
    card: ModelCard
    preset: Preset | None = None
    live: Any = None


class Leg(msgspec.Struct, frozen=True):
    """One target of a plan, with its share of the calls among its group."""

    target: Target
    weight: float = 1.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Who may answer for a model name: groups of legs. Calls are balanced over the first group; each later one is a
    fallback, tried when the one before cannot answer. What route needs to know of a name is here and nowhere else.

    revision changes whenever anything about the plan does that an answer depends on: part of every cache key.
    Times are in seconds.
    """

    name: str
    groups: tuple[tuple[Leg, ...], ...]
    balance: str = "weighted"  # or "least_busy", "fastest"
    retries: int = 2  # further tries before the first byte, over all targets of a group
    on_break: str = "error"  # or "continue": what becomes of a stream whose target breaks
    timeout: float | None = None  # from first byte of the request to last byte of the answer; None: the server's
    cache: str | None = None  # "off", "deterministic" or "all"; None: the server's
    revision: str = ""


class Wishes(msgspec.Struct, frozen=True):
    """What the headers of a request ask of the gateway, as far as they are understood."""

    retry_count: int = 0  # the SDK's count of its own tries of this request
    patience: float | None = None  # seconds its sender waits for news, as the SDK says it
    cache_control: str = ""  # Cache-Control, in lower case
    idempotency_key: str = ""
    traceparent: str = ""  # the caller's trace, as W3C writes it


NO_WISHES = Wishes()


class Task(msgspec.Struct, frozen=True):
    """One kind of call: its name, the URL it has, and the check that decodes and validates a body of it.

    check(call) decodes call.body into call.asked once, sets call.model, call.stream, call.target and call.plan, and
    raises BadRequest or ModelNotFound.
    """

    name: str  # "chat", "completion", "embedding"
    path: str
    check: Callable[[Call], None]


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


FINISHED, FAILED, CLIENT_LEFT, DEADLINE, STOPPED = "finished", "failed", "client_left", "deadline", "stopped"


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
        if self.recover is not None and self.recover(error):
            return
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

    deadline is in seconds of the loop's clock, None for no limit. target is who answers, or would at first; plan is all
    who may. attempts counts what was sent to engines; cache says what the cache did: "", hit, miss or joined; cost is
    what it came to, in nano-dollars, once admit has settled it. refusal is what the edge already found wrong (a bad
    key, a broken body): it travels so that the meter, which is outermost, records it.
    """

    __slots__ = (
        "asked",
        "attempts",
        "began",
        "body",
        "cache",
        "client",
        "cost",
        "deadline",
        "id",
        "model",
        "plan",
        "principal",
        "refusal",
        "reply",
        "stream",
        "target",
        "task",
        "wishes",
    )  # fmt: skip

    def __init__(self, id: str, principal: Principal, task: Task, body: bytes, reply: Reply, began: int) -> None:
        self.id = id
        self.principal = principal
        self.task = task
        self.body = body
        self.asked: Any = None
        self.model = ""
        self.stream = False
        self.target: Target | None = None
        self.plan: Plan | None = None
        self.deadline: float | None = None
        self.reply = reply
        self.refusal: TertuliaError | None = None
        self.began = began  # time.perf_counter_ns() at the first byte
        self.wishes = NO_WISHES
        self.attempts = self.cost = 0
        self.cache = ""
        self.client = ""


# A stage is a plain function: it hands the call on and returns what following(call) returned. That is None when the
# call is on its way, or an awaitable of the rest when somebody further in has to wait for something. So a call that
# nobody makes wait costs no coroutine and no task.
Next = Callable[[Call], Awaitable[None] | None]
Stage = Callable[[Call, Next], Awaitable[None] | None]
