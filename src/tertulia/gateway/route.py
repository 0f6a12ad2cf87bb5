"""The innermost stage: which target answers a call, and what happens when it does not. Deadline, balance, retries,
fallback and the line for busy targets.

    the way most calls go      one target, clear to go: a plain function, no timer, no task
    the detour                 look() finds the next target: another of the group, the same one after a pause, a place
                               in line, the next group; give_up() when there is none

It knows nothing of HTTP, of keys, or of what an answer holds; how a stream is continued is resume's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import random as chance
from time import perf_counter_ns

from ..config import Settings
from ..core import BYTES_PER_TOKEN, DEADLINE, FINISHED, Call, Leg, Next, Plan, Target
from ..engines.timeouts import GRAIN, Timeouts
from ..errors import DeadlineExceeded, Overloaded, QuotaExceeded, RateLimited, TertuliaError, UpstreamTimeout
from .backoff import BUSY, PATIENCE_SECONDS, REFUSED, delay, judge
from .line import HIGH, LOW, NORMAL, Ticket
from .metrics import COUNTER, GAUGE, Histogram, family, histogram
from .names import Names
from .pipeline import typed
from .resume import Resume
from .targets import BROKEN, READY, WAITS, Live, Targets

LATE = 500_000_000  # nanoseconds a call may have had already for its time to be counted from here
SHORT_PAUSE = 1.0  # seconds that are waited for a target although another group could answer at once
LEVELS = {"high": HIGH, "normal": NORMAL, "low": LOW}
FLEX = "flex"  # the service_tier of a body that gives way to others; none goes before them
SHARE = 0.5  # of the time a call has left: how long a target may be silent where another could be asked
ENOUGH = 0.1  # of its whole time: an attempt that has had less proves nothing by its silence
CONTINUE = "continue"


class Route:
    """The stage. What it knows of targets outlives a reload."""

    def __init__(
        self,
        settings: Settings,
        names: Names,
        clock: Callable[[], float] | None = None,
        random: Callable[[], float] | None = None,
    ) -> None:
        """clock: the loop's; random: from 0 to 1. Needs the running loop."""
        self.loop = asyncio.get_running_loop()
        self.time = clock or self.loop.time
        self.random = random or chance
        self.names = names
        self.targets = Targets(settings, self.time)
        self.retries = self.fallbacks = self.continued = self.refused = 0
        self.queued = Histogram()
        self.waits: dict[Ticket, asyncio.TimerHandle] = {}
        self.silences: dict[Trip, asyncio.TimerHandle] = {}  # of streams: until its silence is worth a heartbeat
        self._by_seconds: dict[float, Timeouts[Trip]] = {}
        self._hurries: dict[float, Timeouts[Trip]] = {}  # of first attempts, by the seconds of their deadline
        self._take(settings)

    def _take(self, settings: Settings) -> None:
        self.settings = settings
        self.beats: Timeouts[Trip] | None = Timeouts(settings.heartbeat, self._beat) if settings.heartbeat else None
        self._deadlines = self._deadline(settings.request_timeout)

    def _deadline(self, seconds: float) -> Timeouts[Trip]:
        found = self._by_seconds.get(seconds)
        if found is None:
            found = self._by_seconds[seconds] = Timeouts(seconds, self._expire)
        return found

    def reload(self, settings: Settings) -> None:
        """Other settings for the calls to come; those under way keep their deadlines. Names have theirs already."""
        self.targets.reload(settings, self.names.targets())
        self._take(settings)

    def close(self) -> None:
        """No timer runs any more."""
        for timeouts in (*self._by_seconds.values(), *self._hurries.values()):
            timeouts.close()
        if self.beats is not None:
            self.beats.close()
        for timer in (*self.waits.values(), *self.silences.values()):
            timer.cancel()
        self.targets.close()

    def __call__(self, call: Call, following: Next) -> Awaitable[None] | None:
        reply = call.reply
        if reply.closed:  # the client left while a stage above waited: nobody wants the answer
            return None
        plan = call.plan
        if plan is None:
            plan = call.plan = self.names.plan(call.model)
        trip = Trip(self, call, plan)
        deadlines = self._deadlines if plan.timeout is None else self._deadline(plan.timeout)
        sent = perf_counter_ns()
        if call.began and sent - call.began > LATE:  # its body took its time: rare, and worth a timer of its own
            left = deadlines.seconds - (sent - call.began) * 1e-9
            trip.timer = self.loop.call_later(max(0.0, left), self._expire, trip)
        else:
            left = deadlines.seconds
            deadlines.add(trip)
        trip.deadlines, trip.sent = deadlines, sent
        call.deadline = self.time() + left
        reply.recover = trip.recover
        reply.on_close(trip.settle)
        if reply.stream:
            if self.beats is not None:
                trip.beats = self.beats
                self.beats.add(trip)
            if plan.on_break == CONTINUE:
                trip.resume = Resume()
                reply.rewrite(trip.resume.see)
        groups = plan.groups
        if plan.alone:
            target: Target = plan.first
        else:
            group = groups[0]
            target = self.choose([leg for leg in group if self.targets.of(leg.target).clear] or group, plan.balance)
        live: Live = target.live or self.targets.of(target)
        if live.clear and ((len(groups) == 1 and plan.alone) or self._hurry(trip, live)):
            return trip.go(target, live)
        return trip.look()

    def _hurry(self, trip: Trip, live: Live) -> bool:
        """Limits the silence of who is asked first where there are others; False if it must be done by a detour."""
        if trip.timer is not None:  # it has less time than the others of its deadline
            return False
        if live.far:  # an engine of ours looks after itself
            seconds = trip.deadlines.seconds
            found = self._hurries.get(seconds)
            if found is None:
                found = self._hurries[seconds] = Timeouts(seconds * SHARE, self.cut)
            trip.hurry = found
            found.add(trip)
        return True

    def cut(self, trip: Trip) -> None:
        """Who was asked has been silent for its share of the time: it has failed, if there is another to be asked."""
        live = trip.live
        if live is None or trip.call.reply.closed or trip.heard() or not trip.others():
            return
        seconds = (perf_counter_ns() - trip.sent) * 1e-9
        trip.call.reply.fail(UpstreamTimeout(f"Nothing came for {seconds:.3g} seconds, and another was to be asked."))
        if trip.detour is not None:
            trip.detour.hopeless.add(live)  # it has had its share

    def _drawn(self, legs: Sequence[Leg]) -> Target:
        """By weight and chance."""
        at = self.random() * sum([leg.weight for leg in legs])
        for leg in legs:
            at -= leg.weight
            if at < 0:
                return leg.target
        return legs[-1].target

    def choose(self, legs: Sequence[Leg], balance: str) -> Target:
        """One of several that could answer now."""
        if len(legs) == 1:
            return legs[0].target
        of = self.targets.of
        if balance == "least_busy":
            fewest = min((of(leg.target).in_flight + 1) / leg.weight for leg in legs)
            legs = [leg for leg in legs if (of(leg.target).in_flight + 1) / leg.weight <= fewest]
        elif balance == "fastest":
            slowness = [of(leg.target).slowness() for leg in legs]
            best = min(slowness)
            legs = [leg for leg, slow in zip(legs, slowness, strict=True) if slow <= best]
        return self._drawn(legs)

    def _expire(self, trip: Trip) -> None:
        reply = trip.call.reply
        reply.recover = None
        seconds = trip.deadlines.seconds
        reply.fail(DeadlineExceeded(f"The request took longer than {seconds:g} seconds."))

    def _beat(self, trip: Trip) -> None:
        """A stream that has said nothing for that long gives a sign of life. Nothing is done when a piece comes: this
        looks when the last one was, and for the rest of the time there is a timer."""
        reply, beats = trip.call.reply, trip.beats
        if reply.closed or beats is None:
            return
        if reply.started and trip.live is not None:
            left = beats.seconds - (perf_counter_ns() - reply.last) * 1e-9
            if left > GRAIN:
                self.silences[trip] = self.loop.call_later(left, self._silent, trip)
                return
        if not reply.paused:  # the client is behind: it has more than enough to read
            reply.beat()
        beats.add(trip)

    def _silent(self, trip: Trip) -> None:
        self.silences.pop(trip, None)
        self._beat(trip)

    def calm(self, trip: Trip) -> None:
        """No heartbeats any more."""
        if trip.beats is not None:
            trip.beats.remove(trip)
            timer = self.silences.pop(trip, None)
            if timer is not None:
                timer.cancel()

    def level(self, call: Call) -> int:
        """Its place in line: what its key is given. Whoever asks for less gets it; nobody gets more by asking."""
        if getattr(call.shape, "service_tier", None) == FLEX:
            return LOW
        policy = self.settings.policies.get(call.principal.key_id)
        return NORMAL if policy is None or policy.priority is None else LEVELS[policy.priority]

    def metrics(self) -> list[str]:
        """What became of the calls sent to each target, and how the targets are doing."""
        lives = list(self.targets)
        outcomes = [
            ({"target": live.label, "outcome": outcome}, count)
            for live in lives
            for outcome, count in (*live.counts.items(), (FINISHED, live.finished))
            if count
        ]

        def gauge(name: str, help: str, value: Callable[[Live], float]) -> list[str]:
            return family(f"tertulia_{name}", GAUGE, help, [({"target": live.label}, value(live)) for live in lives])

        def counter(name: str, help: str, count: int) -> list[str]:
            return family(f"tertulia_{name}_total", COUNTER, help, [({}, count)])

        help = "Calls sent to targets, by what became of them."
        return [
            *family("tertulia_upstream_attempts_total", COUNTER, help, outcomes),
            *gauge("target_in_flight", "Calls a target is answering.", lambda live: live.in_flight),
            *gauge("breaker_state", "0 closed, 1 half-open, 2 open.", lambda live: live.breaker.state),
            *gauge("target_latency_seconds", "Time to the first byte, moving average.", lambda live: live.latency),
            *gauge("queue_waiting", "Calls waiting for a busy target.", lambda live: len(live.line)),
            *counter("retries", "Further attempts within a group.", self.retries),
            *counter("fallbacks", "Calls sent to a fallback.", self.fallbacks),
            *counter("continued", "Broken streams that another attempt went on with.", self.continued),
            *counter("queue_refused", "Calls for which a busy target had no place or no time.", self.refused),
            *histogram("tertulia_queue_seconds", "Time calls waited in line.", [({}, self.queued)]),
        ]


class Trip:
    """One call's way to who answers it. The detour is made only for calls that need one."""

    __slots__ = (
        "beats", "call", "deadlines", "detour", "head", "hurry", "live", "plan", "probe", "resume", "route", "sent",
        "timer", "tokens",
    )  # fmt: skip

    deadlines: Timeouts[Trip]
    sent: int  # perf_counter_ns() when the attempt under way was sent

    def __init__(self, route: Route, call: Call, plan: Plan) -> None:
        self.route, self.call, self.plan = route, call, plan
        self.live: Live | None = None  # who is answering now
        self.detour: Detour | None = None
        self.beats: Timeouts[Trip] | None = None
        self.resume: Resume | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.hurry: Timeouts[Trip] | None = None  # limits the silence of who is asked first
        self.probe = False
        self.tokens = 0
        self.head = -1  # how many header lines are not the attempt's; -1: there has been none

    def go(self, target: Target, live: Live) -> Awaitable[None] | None:
        """Sends the call to a target."""
        call = self.call
        self.live = live
        live.in_flight += 1
        live.calls += 1
        call.target = target
        call.attempts = number = call.attempts + 1
        headers = call.reply.headers
        self.head = len(headers)
        headers.append(live.header)
        try:
            rest = target.engine.answer(call)
        except Exception as error:  # typed or a defect: it is the attempt's failure, and may be another one's turn
            self.raised(error, number)
            return None
        return None if rest is None else self._watch(rest, number)

    async def _watch(self, rest: Awaitable[None], number: int) -> None:
        try:
            await rest
        except Exception as error:  # as above
            self.raised(error, number)

    def raised(self, error: Exception, number: int) -> None:
        """An engine raised instead of telling the reply; what an attempt says that is over already does not count."""
        call = self.call
        known = typed(call, error)
        if self.live is not None and call.attempts == number:
            call.reply.fail(known)

    def settle(self, outcome: str) -> None:
        """The call is over."""
        self.deadlines.remove(self)
        if self.timer is not None:
            self.timer.cancel()
        if self.beats is not None:
            self.route.calm(self)
        live = self.live
        if live is not None:
            self._leave(live, outcome)
        if self.resume is not None:
            self.resume.settle(self.call.reply)
        if self.detour is not None:
            self.detour.cancel()
            self.detour = None  # it refers to us

    def _leave(self, live: Live, outcome: str, retry_after: float | None = None) -> None:
        """The attempt is over."""
        self.live = None
        live.in_flight -= 1
        if self.hurry is not None:
            self.hurry.remove(self)
            self.hurry = None
        if outcome == FINISHED:
            reply = self.call.reply
            if reply.first > self.sent:  # not so of who continued
                live.learn(reply.first - self.sent, reply.first)
            if live.clear:
                live.finished += 1
                live.breaker.failures = 0
                return
        self._leave_limited(live, outcome, retry_after)

    def _leave_limited(self, live: Live, outcome: str, retry_after: float | None) -> None:
        usage = self.call.reply.usage
        if self.tokens and live.rates is not None and usage is not None:
            live.rates.settle(self.tokens, usage.prompt_tokens + usage.completion_tokens)
        if live.limit is not None and outcome != BUSY:
            live.took(perf_counter_ns() - self.sent)
        silent = False
        if outcome == DEADLINE and not self.heard():
            silent = (perf_counter_ns() - self.sent) * 1e-9 >= self.deadlines.seconds * ENOUGH
            live.why = DeadlineExceeded.code or ""
        live.leave(outcome, self.probe, retry_after, silent)
        self.probe = False

    def heard(self) -> bool:
        """Whether anything of the attempt under way has come."""
        reply = self.call.reply
        return reply.started and reply.last >= self.sent

    def others(self) -> bool:
        """Whether somebody could be asked in place of who is answering: of its group, or of one after it."""
        route, plan, detour = self.route, self.plan, self.detour
        group, tries = (0, 1) if detour is None else (detour.group, detour.tries)
        now = route.time()
        for at in range(group if tries <= plan.retries else group + 1, len(plan.groups)):
            for leg in plan.groups[at]:
                live = route.targets.of(leg.target)
                if live is not self.live and (detour is None or live not in detour.asked) and live.breaker.allows(now):
                    return True
        return False

    # the detour
    def recover(self, error: TertuliaError) -> bool:
        """The attempt under way has failed. True: somebody else is asked, or the reply is told something better."""
        live, reply = self.live, self.call.reply
        if live is None:  # nobody is answering: it is not an engine that says this
            return False
        if isinstance(error, DeadlineExceeded):
            self._leave(live, DEADLINE)
            return False
        verdict = judge(error)
        live.why = error.code or str(error.status)
        self._leave(live, verdict, error.retry_after if error.status == 429 else None)
        reply.undo(self.settle)
        detour = self.detour
        if verdict == REFUSED:
            if detour is None or not (detour.group or reply.started):
                return False
            return self.give_up()  # who was asked in another's stead cannot do this: the first one's error says more
        if detour is None:
            detour = self.detour = Detour(self)
        detour.failed(error)
        if reply.started:
            used = reply.usage
            if self.resume is None or not self.resume.can_continue(self.call):
                return False
            reply.usage = used
            if not self._lost(error):
                return False
            rest = self.resume.remainder(self.call)
            if rest is not None:  # only its end is missing
                reply.push(rest)
                reply.close()
                return True
            if self.beats is not None:
                self.route.calm(self)
                self.beats.add(self)
        elif not self._lost(error):
            return False
        detour.soon()
        return True

    def _lost(self, error: TertuliaError) -> bool:
        """The attempt is accounted for; what comes is another one's. Whether one may come."""
        may_follow = self.call.lost(error)
        self.call.reply.usage = None
        return may_follow

    def look(self) -> Awaitable[None] | None:
        """Finds who is asked next."""
        detour = self.detour
        if detour is None:
            detour = self.detour = Detour(self)
        return detour.look()

    def start(self, target: Target, live: Live) -> Awaitable[None] | None:
        """Sends the call to a target that had to be looked for."""
        call, route, detour = self.call, self.route, self.detour
        assert detour is not None
        reply, now = call.reply, route.time()
        if reply.started:
            assert self.resume is not None
            if not self.resume.prepare(call, target) or not call.may_continue(self.resume.size):
                self.give_up()
                return None
            route.continued += 1
        if not live.clear:
            self.tokens = detour.tokens if live.rates is not None else 0
            self.probe = live.enter(self.tokens, now)
            if self.probe:
                reply.tap(self._proved)
        if detour.head < 0:
            detour.head = len(reply.headers)
        del reply.headers[detour.head :]
        if call.attempts:
            reply.header("x-tertulia-attempts", str(call.attempts + 1))
        if detour.group:
            reply.header("x-tertulia-fallback", call.model)
            call.fallback = True
        if detour.tries:
            route.retries += 1
        elif detour.group:
            route.fallbacks += 1
        detour.tries += 1
        self.sent = perf_counter_ns()
        if live.far and (detour.group + 1 < len(self.plan.groups) or not self.plan.alone):
            assert call.deadline is not None
            detour.cut = route.loop.call_later(max(0.0, call.deadline - now) * SHARE, route.cut, self)
        return self.go(target, live)

    def _proved(self, data: bytes) -> None:
        if self.probe and self.live is not None:
            self.probe = False
            self.live.proved()

    def granted(self, live: Live, ticket: Ticket) -> None:
        """A target has room, and it is our turn."""
        route, detour = self.route, self.detour
        assert detour is not None
        detour.left_line()
        route.queued.observe(route.time() - ticket.since)
        for leg in self.plan.groups[detour.group]:
            if route.targets.of(leg.target) is live:
                detour.spawn(self.start(leg.target, live))
                return

    def turned_away(self, ticket: Ticket) -> None:
        """The target we waited for is broken."""
        assert self.detour is not None
        self.detour.left_line()
        self.detour.soon()

    def give_up(self) -> bool:
        """There is nobody left: the reply is told what happened first, or what keeps everybody busy."""
        detour, reply = self.detour, self.call.reply
        assert detour is not None
        reply.recover = None
        reply.fail(detour.verdict())
        return True


class Detour:
    """Where a call stands that did not go straight through."""

    __slots__ = (
        "asked", "cut", "error", "floor", "group", "head", "hopeless", "paid", "refusal", "route", "task", "ticket",
        "timer", "tokens", "tries", "trip", "wait",
    )  # fmt: skip

    def __init__(self, trip: Trip) -> None:
        self.trip, self.route = trip, trip.route
        self.tokens = len(trip.call.body) // BYTES_PER_TOKEN
        self.head = trip.head
        self.error: TertuliaError | None = None  # what the caller is told if nobody answers
        self.refusal: TertuliaError | None = None  # why a busy target could not be waited for
        self.wait: float | None = None  # seconds until a broken target may be asked again
        self.timer: asyncio.Handle | None = None
        self.cut: asyncio.TimerHandle | None = None  # limits the silence of who is asked
        self.ticket: Ticket | None = None
        self.task: asyncio.Task[None] | None = None
        self._enter(0)
        self.tries = 0 if trip.head < 0 else 1  # the straight way was the first try

    def _enter(self, group: int) -> None:
        self.group, self.tries = group, 0
        self.asked: set[Live] = set()  # who has failed since the last pause
        self.hopeless: set[Live] = set()  # and whom it is no use asking again
        self.floor = 0.0  # seconds they asked to be left alone
        self.paid = False  # the next try has been taken from a budget

    def failed(self, error: TertuliaError) -> None:
        """Who was asked has failed."""
        target = self.trip.call.target
        assert target is not None
        if self.cut is not None:
            self.cut.cancel()
        live = self.route.targets.of(target)
        self.asked.add(live)
        begun = self.trip.call.reply.started and self.group + 1 < len(self.trip.plan.groups)
        spent = error.retry is False or error.code == QuotaExceeded.code
        if spent or not live.far or begun:  # a stream that waits is better gone on with by somebody else
            self.hopeless.add(live)
        self.floor = max(self.floor, error.retry_after or 0.0)
        if self.error is None or not (self.group and error.retry is False):
            self.error = error

    def look(self) -> Awaitable[None] | None:
        """Goes to a target, takes a place in line, waits for a moment, or gives up."""
        trip, groups = self.trip, self.trip.plan.groups
        self.timer = None
        if trip.call.reply.closed:
            return None
        while self.group < len(groups):
            if self.tries <= trip.plan.retries:
                done, rest = self._look_in(groups[self.group])
                if done:
                    return rest
            self._enter(self.group + 1)
        trip.give_up()
        return None

    def _look_in(self, group: Sequence[Leg]) -> tuple[bool, Awaitable[None] | None]:
        """As look(), within one group; False if nobody there can be asked."""
        trip, route, now = self.trip, self.route, self.route.time()
        fresh: dict[int, list[Leg]] = {READY: [], WAITS: [], BROKEN: []}
        again: list[Leg] = []
        for leg in group:
            live = route.targets.of(leg.target)
            state = live.state(self.tokens, now)
            if state == BROKEN:
                self.wait = min(live.breaker.wait(now), 1e9 if self.wait is None else self.wait)
            elif live in self.asked:
                if live not in self.hopeless:
                    again.append(leg)
            else:
                fresh[state].append(leg)
        if fresh[READY]:
            target = route.choose(fresh[READY], trip.plan.balance)
            live = route.targets.of(target)
            if not self.tries or self.paid or live.budget.take(live.calls, now):
                self.paid = False
                return True, trip.start(target, live)
        elif self._waits(fresh[WAITS], now) or self._pauses(again, now):
            return True, None
        return False, None

    def _pauses(self, again: list[Leg], now: float) -> bool:
        """Waits a moment before those who failed are asked again; False if there is no time or no budget for it."""
        trip, route = self.trip, self.route
        lives = [route.targets.of(leg.target) for leg in again]
        if not lives:
            return False
        floor = max(self.floor, min(live.pause(self.tokens, now) for live in lives))
        wait = delay(self.tries, route.random, floor)
        if floor > PATIENCE_SECONDS or wait >= self._left(now):
            return False
        if floor > SHORT_PAUSE and self.group + 1 < len(trip.plan.groups):
            return False
        if not any(live.budget.take(live.calls, now) for live in lives):
            return False
        self.asked = self.hopeless.copy()
        self.floor, self.paid = 0.0, True
        self.timer = route.loop.call_later(wait, self._look_again)
        return True

    def _left(self, now: float) -> float:
        """Seconds the call has left: until its deadline, or until its sender has no patience any more."""
        call, deadlines = self.trip.call, self.trip.deadlines
        left = deadlines.seconds if call.deadline is None else call.deadline - now
        patience = call.wishes.patience
        if patience is not None and call.deadline is not None and not call.reply.begun:
            beats = self.trip.beats
            if beats is None or beats.seconds >= patience:
                left = min(left, patience - (deadlines.seconds - (call.deadline - now)))
        return left

    def _waits(self, busy: list[Leg], now: float) -> bool:
        """Joins the lines of targets that are busy; False if there is no place, or no hope to be served in time."""
        trip, route, settings = self.trip, self.route, self.route.settings
        lives = [route.targets.of(leg.target) for leg in busy]
        if not lives:
            return False
        level, project = route.level(trip.call), trip.call.principal.project
        turn = min(live.turn(level, project, self.tokens, now) for live in lives)
        limit = min(settings.queue_timeout, self._left(now))
        another = self.group + 1 < len(trip.plan.groups)
        resting = all(live.resting > now for live in lives)
        places = [live for live in lives if len(live.line) < settings.queue_size]
        if not places or turn >= limit or (resting and another and turn > SHORT_PAUSE):
            self._refuse(lives, turn, now)
            return False
        self.ticket = ticket = Ticket(trip, level, project, now, self.tokens)
        route.waits[ticket] = route.loop.call_later(limit, self._waited)
        for live in places:
            live.join(ticket)
        return True

    def _refuse(self, lives: list[Live], turn: float, now: float) -> None:
        route = self.route
        route.refused += 1
        turn = max(turn, min((live.estimate(LOW, "", self.tokens, now) for live in lives), default=turn), 0.1)
        if all(live.limited(self.tokens, now) for live in lives):
            self.refusal = RateLimited(
                f"The rate limit of who answers `{self.trip.call.model}` is reached. Please try again in {turn:.3g}s.",
                retry_after=turn,
            )
        else:
            self.refusal = Overloaded(retry_after=turn)

    def _waited(self) -> None:
        """It took too long."""
        ticket = self.ticket
        if ticket is None:
            return
        route = self.route
        now = route.time()
        lives = [route.targets.of(leg.target) for leg in self.trip.plan.groups[self.group]]
        self.left_line()
        route.queued.observe(now - ticket.since)
        self._refuse(lives, max(live.turn(ticket.level, ticket.project, self.tokens, now) for live in lives), now)
        self._enter(self.group + 1)
        self._look_again()

    def left_line(self) -> None:
        """Out of every line, and out of the time to wait there."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.leave()
            timer = self.route.waits.pop(ticket, None)
            if timer is not None:
                timer.cancel()

    def soon(self) -> None:
        """Looks on from a callback of its own: whoever failed is let finish first."""
        self.timer = self.route.loop.call_soon(self._look_again)

    def _look_again(self) -> None:
        self.spawn(self.look())

    def spawn(self, rest: Awaitable[None] | None) -> None:
        if rest is not None:
            self.task = self.route.loop.create_task(rest)  # type: ignore[arg-type]

    def cancel(self) -> None:
        """The call is over."""
        if self.timer is not None:
            self.timer.cancel()
        if self.cut is not None:
            self.cut.cancel()
        self.left_line()

    def verdict(self) -> TertuliaError:
        """What the caller is told when nobody answers."""
        if self.error is not None:
            return self.error
        if self.refusal is not None:
            return self.refusal
        return Overloaded(
            f"Nobody who answers `{self.trip.call.model}` is well at the moment. Please try again later.",
            retry_after=max(self.wait or 0.0, 0.1),
        )
