"""OpenAI's shapes of an answer, as bytes: chat completions and text completions, streamed (`...Stream`) or whole.

A writer is told what happened (text came, a call began, a choice ended) and knows how OpenAI spells that. Streams are
made of pieces encoded once a call, so that a token costs one JSON string and one join. It knows no engine.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec

from ...core import FINISHED, Reply, Usage

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
SHORTEST = 24  # characters that a piece of text and its padding have together, at least


class Stamp(msgspec.Struct, frozen=True):
    """What every chunk of an answer repeats."""

    id: str
    model: str
    fingerprint: str
    created: int

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Stamp:
        return cls(prefix + secrets.token_hex(14), model, fingerprint, int(time.time()))


class TokenLogprob(msgspec.Struct):
    """One token with its natural log probability before temperature; llama.cpp's id of it is dropped."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ContentLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TokenLogprob] = []


def usage_shape(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class ChatStream:
    """Writes a chat answer as chunks.

    count is the number of choices; tooled says that they may be tool calls; legacy turns calls into `function_call`.
    """

    def __init__(self, reply: Reply, stamp: Stamp, options: Any, count: int, *, tooled: bool, legacy: bool) -> None:
        self._reply = reply
        self._head = (
            b'data: {"id":"%s","object":"chat.completion.chunk","created":%d,"model":%s,"service_tier":"default",'
            b'"system_fingerprint":"%s","choices":['
            % (stamp.id.encode(), stamp.created, encode(stamp.model), stamp.fingerprint.encode())
        )
        self._with_usage = bool(options and options.include_usage)
        self._noise = None if options and options.include_obfuscation is False else secrets.token_urlsafe(192).encode()
        self._at = 0
        self._tail = b"]" + (b',"usage":null' if self._with_usage else b"")
        self._text = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(count)]
        self._opened = [False] * count
        self._open_left = count
        self._role = b"null" if tooled else b'""'
        self._legacy = legacy
        self._out: list[bytes] = []

    def text(self, index: int, text: str, logprobs: list[ContentLogprob] | None = None) -> None:
        if not self._opened[index]:
            self._open(index, b'"content":"","refusal":null')
        spelled = encode(text)
        out = self._out
        out.append(self._text[index])
        out.append(spelled)
        if logprobs is None:
            out.append(b'},"logprobs":null,"finish_reason":null}')
        else:
            out.append(b'},"logprobs":' + encode({"content": logprobs, "refusal": None}) + b',"finish_reason":null}')
        self._close(len(spelled))

    def reasoning(self, index: int, text: str) -> None:
        """What a reasoning model thinks, in the field by which llama.cpp and others show it; not OpenAI's."""
        if not self._opened[index]:
            self._open(index, b'"content":"","refusal":null')
        self._chunk(index, b'"reasoning_content":' + encode(text))

    def call(self, index: int, number: int, id: str, name: str, custom: bool = False) -> None:
        if self._legacy:
            begun = b'"function_call":{"name":%s,"arguments":""}' % encode(name)
        elif custom:
            begun = b'"tool_calls":[{"index":%d,"id":%s,"type":"custom","custom":{"name":%s,"input":""}}]'
            begun %= (number, encode(id), encode(name))
        else:
            begun = b'"tool_calls":[{"index":%d,"id":%s,"type":"function","function":{"name":%s,"arguments":""}}]'
            begun %= (number, encode(id), encode(name))
        if self._opened[index]:
            self._chunk(index, begun)
        else:
            self._open(index, b'"content":null,' + begun + b',"refusal":null')

    def arguments(self, index: int, number: int, text: str, custom: bool = False) -> None:
        spelled = encode(text)
        if self._legacy:
            delta = b'"function_call":{"arguments":%s}' % spelled
        elif custom:
            delta = b'"tool_calls":[{"index":%d,"custom":{"input":%s}}]' % (number, spelled)
        else:
            delta = b'"tool_calls":[{"index":%d,"function":{"arguments":%s}}]' % (number, spelled)
        self._chunk(index, delta, len(spelled))

    def finish(self, index: int, reason: str) -> None:
        if not self._opened[index]:
            self._open(index, b'"content":"","refusal":null')
        self._chunk(index, b"", 0, b'"%s"' % reason.encode())

    def _open(self, index: int, delta: bytes) -> None:
        """The role, once a choice; choices must appear in the order of their index, so those before come along."""
        if self._open_left:
            for other in range(index):
                if not self._opened[other]:
                    self._opened[other] = True
                    self._open_left -= 1
                    self._chunk(other, b'"role":"assistant","content":%s,"refusal":null' % self._role)
        self._opened[index] = True
        self._open_left -= 1
        self._chunk(index, b'"role":"assistant",' + delta)

    def _chunk(self, index: int, delta: bytes, size: int = 0, finish: bytes = b"null") -> None:
        self._out.append(self._head)
        self._out.append(b'{"index":%d,"delta":{%s},"logprobs":null,"finish_reason":%s}' % (index, delta, finish))
        self._close(size)

    def _close(self, size: int) -> None:
        out = self._out
        out.append(self._tail)
        if self._noise is not None:  # hides the length of a token from who sees only sizes on the wire
            self._at = (self._at + 37) % 224
            out.append(b',"obfuscation":"')
            out.append(self._noise[self._at : self._at + max(2, SHORTEST - size)])
            out.append(b'"}\n\n')
        else:
            out.append(b"}\n\n")

    def flush(self) -> None:
        """Sends what was told since the last flush, as one piece."""
        if self._out:
            self._reply.begin()
            self._reply.push(b"".join(self._out))
            self._out.clear()

    def end(self, usage: Usage) -> None:
        if self._with_usage:
            self._out.append(self._head + b'],"usage":' + encode(usage_shape(usage)))
            self._out.append(b"}\n\n" if self._noise is None else b',"obfuscation":""}\n\n')
        self._out.append(DONE)
        self._reply.usage = usage
        self.flush()
        self._reply.close(FINISHED)


class ChatWhole:
    """The same told, written as one JSON object at the end."""

    def __init__(self, reply: Reply, stamp: Stamp, count: int, *, legacy: bool) -> None:
        self._reply, self._stamp, self._legacy = reply, stamp, legacy
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._thoughts: list[list[str]] = [[] for _ in range(count)]
        self._logprobs: list[list[ContentLogprob] | None] = [None] * count
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        self._reasons = ["stop"] * count

    def text(self, index: int, text: str, logprobs: list[ContentLogprob] | None = None) -> None:
        self._texts[index].append(text)
        if logprobs is not None:
            self._logprobs[index] = [*(self._logprobs[index] or ()), *logprobs]

    def reasoning(self, index: int, text: str) -> None:
        self._thoughts[index].append(text)

    def call(self, index: int, number: int, id: str, name: str, custom: bool = False) -> None:
        self._calls[index].append({"id": id, "name": name, "custom": custom, "text": []})

    def arguments(self, index: int, number: int, text: str, custom: bool = False) -> None:
        self._calls[index][number]["text"].append(text)

    def finish(self, index: int, reason: str) -> None:
        self._reasons[index] = reason

    def flush(self) -> None:
        pass

    def end(self, usage: Usage) -> None:
        stamp = self._stamp
        body = {
            "id": stamp.id,
            "object": "chat.completion",
            "created": stamp.created,
            "model": stamp.model,
            "choices": [self._choice(index) for index in range(len(self._texts))],
            "usage": usage_shape(usage),
            "service_tier": "default",
            "system_fingerprint": stamp.fingerprint,
        }
        self._reply.usage = usage
        self._reply.begin()
        self._reply.push(encode(body))
        self._reply.close(FINISHED)

    def _choice(self, index: int) -> dict[str, Any]:
        calls, text = self._calls[index], "".join(self._texts[index])
        message: dict[str, Any] = {
            "role": "assistant", "content": text if text or not calls else None, "refusal": None, "annotations": [],
        }  # fmt: skip
        if self._thoughts[index]:
            message["reasoning_content"] = "".join(self._thoughts[index])
        if calls and self._legacy:
            message["function_call"] = {"name": calls[0]["name"], "arguments": "".join(calls[0]["text"])}
        elif calls:
            message["tool_calls"] = [_call_shape(call) for call in calls]
        logprobs = self._logprobs[index]
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": self._reasons[index],
        }


def _call_shape(call: dict[str, Any]) -> dict[str, Any]:
    text = "".join(call["text"])
    if call["custom"]:
        return {"id": call["id"], "type": "custom", "custom": {"name": call["name"], "input": text}}
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": text}}


class LegacyLogprobs(msgspec.Struct):
    """logprobs as /v1/completions has them; offsets are in characters from the beginning of the prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextStream:
    """Writes the chunks of a text completion."""

    def __init__(self, reply: Reply, stamp: Stamp, options: Any) -> None:
        self._reply = reply
        self._with_usage = bool(options and options.include_usage)
        self._noise = None if options and options.include_obfuscation is False else secrets.token_urlsafe(192).encode()
        self._at = 0
        self._head = (
            b'data: {"id":"%s","object":"text_completion","created":%d,"model":%s,"system_fingerprint":"%s"'
            % (stamp.id.encode(), stamp.created, encode(stamp.model), stamp.fingerprint.encode())
        )
        if self._with_usage:
            self._chunk_head = self._head + b',"usage":null,"choices":[{"text":'
        else:
            self._chunk_head = self._head + b',"choices":[{"text":'
        self._out: list[bytes] = []

    def text(self, index: int, text: str, logprobs: LegacyLogprobs | None = None, reason: str | None = None) -> None:
        spelled = encode(text)
        self._out.append(self._chunk_head)
        self._out.append(spelled)
        self._out.append(b',"index":%d,"logprobs":' % index)
        self._out.append(b"null" if logprobs is None else encode(logprobs))
        self._out.append(b',"finish_reason":null}]' if reason is None else b',"finish_reason":"%s"}]' % reason.encode())
        if self._noise is None:
            self._out.append(b"}\n\n")
            return
        self._at = (self._at + 37) % 224
        padding = self._noise[self._at : self._at + max(2, SHORTEST - len(spelled))]
        self._out.append(b',"obfuscation":"%s"}\n\n' % padding)

    def finish(self, index: int, reason: str) -> None:
        self.text(index, "", None, reason)

    def flush(self) -> None:
        if self._out:
            self._reply.begin()
            self._reply.push(b"".join(self._out))
            self._out.clear()

    def end(self, usage: Usage) -> None:
        if self._with_usage:
            self._out.append(self._head + b',"choices":[],"usage":' + encode(usage_shape(usage)) + b"}\n\n")
        self._out.append(DONE)
        self._reply.usage = usage
        self.flush()
        self._reply.close(FINISHED)


def text_whole(reply: Reply, stamp: Stamp, choices: list[dict[str, Any]], usage: Usage) -> None:
    """Writes a text completion that is not a stream; choices are in OpenAI's shape."""
    body = {
        "id": stamp.id,
        "object": "text_completion",
        "created": stamp.created,
        "model": stamp.model,
        "choices": choices,
        "usage": usage_shape(usage),
        "system_fingerprint": stamp.fingerprint,
    }
    reply.usage = usage
    reply.begin()
    reply.push(encode(body))
    reply.close(FINISHED)
