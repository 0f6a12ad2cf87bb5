"""Content rules before and after a call. There are none yet: every call passes as it is."""

from __future__ import annotations

from ..core import Call, Next


async def guard(call: Call, following: Next) -> None:
    await following(call)
