"""How many tokens a request's prompt is to a model of this machine: what its process says."""

from __future__ import annotations

from typing import Any

import msgspec

from ...core import Call
from ..children import Child
from .messages import has_custom_calls, joined, native
from .shapes import encode


class _Counted(msgspec.Struct):
    input_tokens: int


class _Tokens(msgspec.Struct):
    tokens: list[int]


_counted = msgspec.json.Decoder(_Counted).decode
_tokens = msgspec.json.Decoder(_Tokens).decode


async def prompt_tokens(call: Call, child: Child) -> int | None:
    """None where the prompt is more than the caller's text: what is said of tools and schemas is made up on the way.

    Raises EngineFailed.
    """
    asked: Any = call.asked
    if call.task.name != "chat":
        given = asked.input if call.task.name == "embedding" else asked.prompt
        texts = [given or ""] if given is None or isinstance(given, str) else given
        if getattr(asked, "suffix", None) or not all(isinstance(text, str) for text in texts):
            return None
        counts = [await _of_text(text, child) for text in texts]
        return None if None in counts else sum(count for count in counts if count is not None)
    if asked.tools or asked.functions or asked.response_format:
        return None
    messages = msgspec.json.decode(call.body)["messages"]
    if has_custom_calls(messages):
        return None
    question = {"messages": joined(native(messages))}
    status, body = await child.pool.fetch(
        "POST", "/v1/chat/completions/input_tokens", child.headers, encode(question)
    )  # fmt: skip
    return _counted(body).input_tokens if status == 200 else None


async def _of_text(text: str, child: Child) -> int | None:
    question = {"content": text, "add_special": True}
    status, body = await child.pool.fetch("POST", "/tokenize", child.headers, encode(question))
    return len(_tokens(body).tokens) if status == 200 else None
