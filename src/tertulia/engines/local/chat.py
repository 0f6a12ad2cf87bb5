"""Chat completions by a local model: OpenAI's request to llama.cpp's, and its stream back to OpenAI's chunks.

The child is always asked for a stream; an answer that is not one is folded from it. Choices are asked for together, in
groups no larger than the child's slots, so that a prompt is read once a group. Tools of models whose template knows
none, and every call that must be made, go through toolcalls: a system text, a grammar, and a reader of what comes.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from ...core import FINISHED, Call, ModelCard, Usage
from ...errors import BadRequest, ContextLengthExceeded
from .exchange import Child, Events, Exchange, Request
from .messages import native, refuse_parts
from .request import Extras, extras, sampling, seed, unsupported, unsupported_value
from .shapes import ChatStream, ChatWhole, ContentLogprob, Stamp, encode

TEMPLATE_TOKENS = 64  # more than any chat template adds to a conversation
MESSAGE_TOKENS = 16  # more than it adds to a message
ACCEPTED = frozenset(("prompt_cache_options",))  # hints of OpenAI's that change no answer


class _FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(msgspec.Struct):
    index: int = 0
    function: _FunctionDelta | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallDelta] | None = None


class _Logprobs(msgspec.Struct):
    content: list[ContentLogprob] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    index: int = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Progress(msgspec.Struct):
    total: int


class _Event(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    prompt_progress: _Progress | None = None


class _Counted(msgspec.Struct):
    input_tokens: int


_event = msgspec.json.Decoder(_Event).decode
_counted = msgspec.json.Decoder(_Counted).decode


def too_long(prompt: int, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens. However, your messages resulted in {prompt} tokens. "
        "Please reduce the length of the messages.",
        param="messages",
    )


def too_much(prompt: int, completion: int, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the messages, {completion} in the completion). Please reduce the length of the messages or "
        "completion.",
        param="messages",
    )


def refuse(asked: Any, raw: dict[str, Any]) -> Extras:
    """The extra parameters. Raises BadRequest for the first parameter that a local text model cannot honour.

    Hints are accepted: `prediction` (no token of it is ever counted as accepted), cache keys, identifiers, `metadata`,
    and every service tier (the answer says "default", as OpenAI's does when it has no other).
    """
    if raw.get("moderation") is not None:
        raise unsupported("moderation")
    for name in ("audio", "web_search_options"):
        if getattr(asked, name) is not None:
            raise unsupported(name)
    if asked.modalities is not None and "audio" in asked.modalities:
        raise unsupported_value("modalities", "audio", "'text'")
    if asked.reasoning_effort not in (None, "none"):
        raise unsupported("reasoning_effort")
    if asked.verbosity not in (None, "medium"):
        raise unsupported_value("verbosity", asked.verbosity, "'medium'")
    if asked.store:
        raise unsupported("store", "Chat completions are not stored.")
    refuse_parts(asked.messages)
    return extras(raw, ACCEPTED.union(asked.__struct_fields__, ("moderation",)))


class ChatAnswer:
    """The answer to one call."""

    def __init__(self, call: Call, card: ModelCard, fingerprint: str) -> None:
        """Raises BadRequest for what no local model can do."""
        asked = call.asked
        self._call, self._asked, self._card, self._fingerprint = call, asked, card, fingerprint
        self._raw: dict[str, Any] = msgspec.json.decode(call.body)
        self._sampling = sampling(asked, refuse(asked, self._raw), card)
        self._count: int = asked.n or 1
        self._limit: int | None = asked.max_completion_tokens or asked.max_tokens
        self._prompt_tokens = self._cached = self._tokens = 0
        self._final = [0] * self._count  # tokens of each choice as the child counted them
        call.reply.on_close(self._settle)

    async def run(self, child: Child) -> None:
        body = self._body(child)
        exchange = Exchange(self._call.reply, child, "messages", too_long)
        if self._limit is not None:
            await self._check_length(exchange, body)
            body["max_tokens"] = self._limit
        requests = []
        for first in range(0, self._count, child.slots):
            body["n"] = count = min(child.slots, self._count - first)
            body["seed"] = seed(self._asked.seed, first)
            requests.append(Request(b"/v1/chat/completions", encode(body), _Listener(self, first), count))
        await exchange.run(requests, self._finish)

    def _body(self, child: Child) -> dict[str, Any]:
        """The child's request, but for what differs from group to group; and the writer and readers of its answer."""
        asked = self._asked
        body: dict[str, Any] = {
            **self._sampling, "messages": native(self._raw["messages"]), "stream": True,
            "stream_options": {"include_usage": True}, "return_progress": True,
        }  # fmt: skip
        if asked.logprobs:
            body["logprobs"], body["top_logprobs"] = True, max(1, asked.top_logprobs or 0)
        stamp = Stamp.new("chatcmpl-", self._card.id, self._fingerprint)
        reply, legacy = self._call.reply, asked.functions is not None
        self.writer: ChatStream | ChatWhole
        if self._call.stream:
            self.writer = ChatStream(
                reply, stamp, asked.stream_options, self._count, calling=False, tooled=False, legacy=legacy
            )
        else:
            self.writer = ChatWhole(reply, stamp, self._count, legacy=legacy)
        return body

    async def _check_length(self, exchange: Exchange, body: dict[str, Any]) -> None:
        """Refuses what cannot fit; asks the child for a count only where the number of bytes does not settle it."""
        assert self._limit is not None
        context = exchange.child.context_length
        messages = body["messages"]
        most = len(encode(messages)) + len(encode(body.get("tools"))) + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS
        if most + self._limit <= context:
            return
        question = {name: body[name] for name in ("messages", "tools", "tool_choice") if name in body}
        count = _counted(await exchange.ask(b"/v1/chat/completions/input_tokens", encode(question))).input_tokens
        if count >= context:
            raise too_long(count, context)
        if count + self._limit > context:
            raise too_much(count, self._limit, context)

    def see(self, first: int, event: bytes) -> None:
        decoded = _event(event)
        if decoded.usage is not None:
            usage = decoded.usage
            self._prompt_tokens = usage.prompt_tokens
            if usage.prompt_tokens_details is not None and first == 0:
                self._cached = usage.prompt_tokens_details.cached_tokens
            self._ended.append(usage.completion_tokens)
            return
        if decoded.prompt_progress is not None:
            self._prompt_tokens = decoded.prompt_progress.total
            return
        for choice in decoded.choices:
            self._take(first + choice.index, choice)

    def _take(self, index: int, choice: _Choice) -> None:
        pass

    def _settle(self, outcome: str) -> None:
        if outcome != FINISHED and self._call.reply.usage is None:
            self._call.reply.usage = Usage(self._prompt_tokens, self._tokens, self._cached)  # what was used until then
