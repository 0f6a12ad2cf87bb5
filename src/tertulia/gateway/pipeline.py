"""The one door: every model call passes the same stages in the same order, whoever makes it.

    a call goes down                                   its answer comes up, pushed
┌── meter    counts, logs, journals: outermost, so refusals, hits and disconnects are all recorded
├── check    decodes the body once, validates it, finds what the model name means
├── admit    limits and spend: needs to know the model, and must refuse before anything is spent
├── cache    answers what was answered before; joins identical calls in flight
└── route    innermost: which engine answers, and what happens when it does not
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from types import FunctionType, MethodType

from ..core import Call, Next, Stage
from ..errors import TertuliaError

log = logging.getLogger("tertulia.gateway")


def compose(stages: Sequence[Stage]) -> Next:
    """The stages as one function; the last one is given a Next that must not be called."""

    def nothing(call: Call) -> None:
        raise AssertionError("the innermost stage answers")

    following: Next = nothing
    for stage in reversed(stages):
        following = Link(stage, following).go
    return following


class Link:
    """A stage, and what follows it. go is a bound method, as the stage's own is: called at half the price of an object
    with __call__."""

    __slots__ = ("_following", "_run")

    def __init__(self, stage: Stage, following: Next) -> None:
        self._run: Stage = stage if isinstance(stage, FunctionType | MethodType) else stage.__call__  # type: ignore[operator]
        self._following = following

    def go(self, call: Call) -> Awaitable[None] | None:
        return self._run(call, self._following)


def check(call: Call, following: Next) -> Awaitable[None] | None:
    """Decodes and validates; what the edge already found wrong is said here, below meter, so that it is recorded."""
    if call.refusal is not None:
        raise call.refusal
    call.task.check(call)
    call.reply.stream = call.stream
    return following(call)


class Pipeline:
    """STAGES, composed: a call that goes in always ends in call.reply, never in an exception."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._answer = compose(stages)

    def run(self, call: Call) -> Awaitable[None] | None:
        """Sends the call on its way: None, or an awaitable that must be awaited when somebody has to wait first."""
        try:
            rest = self._answer(call)
        except Exception as error:  # typed or a defect of ours: either way it ends in the reply
            call.reply.fail(typed(call, error))
            return None
        return None if rest is None else self._wait(call, rest)

    async def _wait(self, call: Call, rest: Awaitable[None]) -> None:
        try:
            await rest
        except Exception as error:  # as above
            call.reply.fail(typed(call, error))


def typed(call: Call, error: Exception) -> TertuliaError:
    """The error itself, if it is typed. Else it is a defect of ours: the caller gets a typed 500, the log gets where,
    and the server goes on."""
    if isinstance(error, TertuliaError):
        return error
    log.error("%s: unexpected error", call.id, exc_info=error)
    return TertuliaError()
