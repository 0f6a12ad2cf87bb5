"""Answers what was answered before. Nothing is stored yet: every call goes through."""

from __future__ import annotations

from ..core import Call, Next


async def cache(call: Call, following: Next) -> None:
    await following(call)
