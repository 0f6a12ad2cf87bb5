"""The innermost stage: hands the call to the engine its model name resolved to, within the deadline."""

from __future__ import annotations

import asyncio

from ..core import Call, Next, Stage
from ..errors import DeadlineExceeded


def route(timeout: float) -> Stage:
    """The stage; timeout in seconds is what a call may take from its start to its last byte."""

    async def route(call: Call, following: Next) -> None:
        target, reply = call.target, call.reply
        assert target is not None
        if reply.closed:  # the client left while a stage above waited: nobody wants the answer
            return
        reply.headers.append(b"x-tertulia-model: %s\r\n" % target.model.encode("latin-1", "replace"))
        timer = asyncio.get_running_loop().call_later(timeout, _expire, call, timeout)
        reply.on_close(lambda outcome: timer.cancel())
        await target.engine.answer(call)

    return route


def _expire(call: Call, timeout: float) -> None:
    call.reply.recover = None
    call.reply.fail(DeadlineExceeded(f"The request took longer than {timeout:g} seconds."))
