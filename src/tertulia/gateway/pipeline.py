"""The one door: every model call passes the same stages in the same order, whoever makes it.

    a call goes down                                   its answer comes up, pushed
┌── meter    counts, logs, journals: outermost, so refusals, hits and disconnects are all recorded
├── check    decodes the body once, validates it, finds what the model name means
├── admit    limits and spend: needs to know the model, and must refuse before anything is spent
├── guard    content rules: above cache, so a cached answer passes today's rules
├── cache    answers what was answered before; joins identical calls in flight
└── route    innermost: which engine answers, and what happens when it does not
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core import Call, Next, Stage
from ..errors import TertuliaError

log = logging.getLogger("tertulia.gateway")


def compose(stages: Sequence[Stage]) -> Next:
    """The stages as one function; the last one is given a Next that must not be called."""

    async def nothing(call: Call) -> None:
        raise AssertionError("the innermost stage answers")

    following: Next = nothing
    for stage in reversed(stages):
        following = _link(stage, following)
    return following


def _link(stage: Stage, following: Next) -> Next:
    def link(call: Call) -> object:
        return stage(call, following)

    return link  # type: ignore[return-value]


async def check(call: Call, following: Next) -> None:
    """Decodes and validates; what the edge already found wrong is said here, below meter, so that it is recorded."""
    if call.refusal is not None:
        raise call.refusal
    call.task.check(call)
    call.reply.stream = call.stream
    await following(call)


class Pipeline:
    """STAGES, composed: run(call) always ends in call.reply, never in an exception."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._answer = compose(stages)

    async def run(self, call: Call) -> None:
        try:
            await self._answer(call)
        except TertuliaError as error:
            call.reply.fail(error)
        except Exception:
            # A defect of ours: the caller gets a typed 500, the log gets where, and the server goes on.
            log.exception("%s: unexpected error", call.id)
            call.reply.fail(TertuliaError())
