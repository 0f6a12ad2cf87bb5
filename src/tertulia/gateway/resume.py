"""A stream that broke off is continued by another target: what has come so far becomes the beginning of its answer, and
the client sees one unbroken stream. Only where that is safe: one choice of plain text, and nothing half done but it.

A chat goes on with the text so far as a last message of the assistant's. Models of this machine, and those whose card
has the capability `continue_final_message`, are told in vLLM's words that it is a beginning. Other upstreams are not,
since many refuse what they do not know: some go on in the middle of the sentence all the same, some begin a new turn.
A text completion goes on as prompt and text. The limit of tokens is less by the pieces that have come, a piece being
one token as a rule.

It knows nothing of targets, or of when a stream is broken.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ..core import Call, Reply, Target, Usage
from ..errors import TertuliaError

LIMIT = 2**20  # bytes of a stream that are kept; a longer one is not continued
COMPLETION_TOKENS = 16  # what a text completion is given at most if nobody says how much
LIMITS = ("max_completion_tokens", "max_tokens")
CONTINUES = "continue_final_message"  # the capability, and vLLM's name for it
DONE = b"data: [DONE]\n\n"
_END = re.compile(rb"\r?\n\r?\n|\r\r")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def events(data: bytes) -> list[bytes]:
    """What each server-sent event of a piece says: the data of it."""
    found = []
    for block in _END.split(data):
        lines = [line[5:].removeprefix(b" ") for line in block.splitlines() if line.startswith(b"data:")]
        if lines:
            found.append(b"\n".join(lines))
    return found


class Resume:
    """What a stream has given out, and how it goes on."""

    __slots__ = (
        "_before", "_body", "_broken", "_going", "_pieces", "_size", "_stamp", "_thinks", "_told", "finish", "text",
        "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._going = False  # somebody else has gone on
        self._told: dict[str, Any] | None = None  # the usage the client was told of the answer as it stands
        self._before: Usage | None = None  # what was used until the break, as far as its engine knew
        self._body: dict[str, Any] | None = None  # as it was asked first
        self._stamp: dict[str, Any] = {}  # what every chunk of the answer has in common
        self._broken = self._thinks = False
        self.text = ""
        self.tokens = 0
        self.finish = False

    def see(self, data: bytes) -> bytes:
        """A piece on its way to the client; of who continues, made to look like the others."""
        if self._going:
            data = b"".join([self._restamped(event) for event in events(data)])
        if self._size <= LIMIT:
            self._size += len(data)
            self._pieces.append(data)
        return data

    # after a break
    def can_continue(self, call: Call) -> bool:
        """Whether somebody else can go on; reads what has come, and takes the usage of it."""
        if self._size > LIMIT or not _continuable(call):
            return False
        self._read()
        if self._broken:
            return False
        reply = call.reply
        if reply.usage is not None and self._before is None:
            self._before = reply.usage
        reply.usage = None
        return True

    def remainder(self, call: Call) -> bytes | None:
        """What is missing of an answer that is complete but for its end; None if there is text missing. After
        can_continue."""
        if self.finish:
            return DONE
        left = self._left(call)
        if left is None or left > 0:
            return None
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
        if call.task.name == "completion":
            choice["text"] = ""
        else:
            choice["delta"] = {}
        return b"data: " + _encode({**self._stamp, "choices": [choice]}) + b"\n\n" + DONE

    def prepare(self, call: Call, target: Target) -> bool:
        """Makes the call one for the rest; False if there is no such call."""
        if self._body is None:
            self._body = _decode(call.body)
        body = dict(self._body)
        if self.text and not self._begun_with(body, call.task.name, target):
            return False
        left = self._left(call)
        if left is not None:
            given = [name for name in LIMITS if body.get(name) is not None]
            body[given[0] if given else "max_tokens"] = left
        before = call.body, call.asked, call.model, call.target, call.plan
        call.body = _encode(body)
        try:
            call.task.check(call)
        except TertuliaError:
            call.body, call.asked, call.model, call.target, call.plan = before
            return False
        _, _, call.model, call.target, call.plan = before
        self._going, self._told = True, None
        return True

    @property
    def size(self) -> int:
        """Bytes of the text so far."""
        return len(self.text.encode("utf-8", "replace"))

    def _begun_with(self, body: dict[str, Any], task: str, target: Target) -> bool:
        """Puts the text so far into a body."""
        if task == "completion":
            body["prompt"] = body["prompt"] + self.text
            return True
        messages = list(body["messages"])
        if messages[-1].get("role") == "assistant":  # the caller began the answer itself
            if not isinstance(messages[-1].get("content"), str) or messages[-1].get("tool_calls"):
                return False
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + self.text}
        else:
            messages.append({"role": "assistant", "content": self.text})
        body["messages"] = messages
        card = target.card
        if CONTINUES in card.capabilities or not card.source.startswith(("upstream:", "mock:")):
            body |= {CONTINUES: True, "add_generation_prompt": False}
        return True

    def _left(self, call: Call) -> int | None:
        """Tokens that may still come; None for no limit."""
        asked: Any = self._body
        if asked is None:
            asked = _decode(call.body)
        for name in LIMITS:
            if asked.get(name) is not None:
                return int(asked[name]) - self.tokens
        return COMPLETION_TOKENS - self.tokens if call.task.name == "completion" else None

    def _read(self) -> None:
        """Finds the text so far, and whether it is all there is."""
        said: list[str] = []
        self._broken = self._thinks = self.finish = False
        for piece in self._pieces:
            for event in events(piece):
                try:
                    self._read_event(_decode(event), said)
                except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
                    self._broken = self._broken or event != b"[DONE]"  # no chunk of OpenAI's: who knows what it is
        self.text, self.tokens = "".join(said), len(said)
        self._broken = self._broken or (self._thinks and not said)  # with a thought nobody can go on

    def _read_event(self, chunk: dict[str, Any], said: list[str]) -> None:
        if not self._stamp:
            self._stamp = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
        if chunk.get("usage"):
            self._told = chunk["usage"]
        for choice in chunk["choices"]:
            delta = choice if "text" in choice else choice["delta"]
            text = delta.get("text" if delta is choice else "content")
            if text:
                said.append(text)
            if any(delta.get(name) for name in ("tool_calls", "function_call", "refusal", "audio")):
                self._broken = True
            if delta.get("reasoning_content") or delta.get("reasoning"):
                self._thinks = True
            self.finish = self.finish or choice.get("finish_reason") is not None

    # the rest, on its way
    def _restamped(self, event: bytes) -> bytes:
        """An event of who continues, as the one who began would have said it; nothing if it says nothing new."""
        try:
            chunk = _decode(event)
            choices = chunk["choices"]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            return b"data: " + event + b"\n\n"
        chunk.update(self._stamp)
        news = bool(chunk.get("usage")) or not choices
        for choice in choices:
            delta = choice.get("delta")
            if delta is None:
                news = news or bool(choice.get("text")) or choice.get("finish_reason") is not None
                continue
            delta.pop("role", None)
            news = news or any(delta.values()) or choice.get("finish_reason") is not None
        if not news:
            return b""
        if chunk.get("usage"):
            self._told = chunk["usage"] = self._whole(chunk["usage"])
        return b"data: " + _encode(chunk) + b"\n\n"

    def _whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer. The text so far counts twice, as it is paid for: as completion of who said
        it, and in the prompt of who goes on."""
        prompt, completion = usage.get("prompt_tokens") or 0, (usage.get("completion_tokens") or 0) + self.tokens
        return {**usage, "completion_tokens": completion, "total_tokens": prompt + completion}

    def settle(self, reply: Reply) -> None:
        """The call is over: its usage is what the client was told, or made whole if it was not told any."""
        usage = reply.usage
        if self._going or self._before is not None:
            reply.own = usage or Usage()  # the ones before have their own entries
        if self._told is not None:
            reply.usage = _counted(self._told)
        elif usage is None:  # whoever went on did not come so far
            if self._before is not None:
                tokens = max(self.tokens, self._before.completion_tokens)
                reply.usage = msgspec.structs.replace(self._before, completion_tokens=tokens)
        elif self._going:
            reply.usage = msgspec.structs.replace(usage, completion_tokens=usage.completion_tokens + self.tokens)


def _counted(usage: dict[str, Any]) -> Usage:
    """Usage as we know it."""
    prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
    return Usage(
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
        prompt.get("cached_tokens") or 0,
        completion.get("reasoning_tokens") or 0,
        cache_write_tokens=prompt.get("cache_write_tokens") or 0,
    )


def _continuable(call: Call) -> bool:
    """Whether a request is of a kind that can be gone on with: one choice, free text, nothing told of its tokens."""
    asked = call.asked
    if not call.stream or (asked.n or 1) > 1 or asked.logprobs:
        return False
    if call.task.name == "chat":
        return asked.response_format is None or asked.response_format.type == "text"
    return isinstance(asked.prompt, str) and not asked.echo and not asked.suffix and asked.logprobs is None
