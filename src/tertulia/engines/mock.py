"""The mock engine: answers at once, without a model, always the same thing for the same request.

It is for tests and for developers who have no model at hand: ask for the model `mock` (`mock-embedding` is the same for
embeddings). It echoes the last user message, or the prompt; asked for JSON it says the smallest instance of the schema
(sample.py); with a tool required or named it calls that tool with the smallest instance of its parameters. What else it
shall do is written in the request, in a body field `mock`, and nowhere else: the engine keeps no state.

    client.chat.completions.create(model="mock", messages=[...], extra_body={"mock": {"text": "Hello there."}})

Fields of `mock`, all optional (class Script): text, refusal, tool_calls [{name, arguments, id}], finish_reason; chunk
(characters a streamed piece; a word if not given, eight characters of arguments), first_delay and delay (seconds before
the first byte, and between pieces), usage {prompt_tokens, completion_tokens, cached_tokens}; error {status, message,
type, code, param, retry_after} (instead of an answer), cut (pieces after which a stream breaks off, or, with error,
after which the error comes). A list of such objects scripts a tool loop: entry k answers when k assistant messages
follow the last user message, the last entry from then on.

A token is a word: a run of characters that are not white space; max_tokens counts them, and cuts text but no tool
calls. An answer that is not streamed takes as long as the stream would. Sampling parameters change nothing. Embeddings
are unit vectors hashed from the words, so texts that share words are near. It knows nothing of HTTP, keys or storage.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import math
import re
import secrets
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..core import FAILED, Call, ModelCard, Reply, Usage
from ..errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    EngineFailed,
    Forbidden,
    NotFound,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    TertuliaError,
    TooLarge,
    Unauthorized,
)
from .sample import NoInstance, smallest

encode = msgspec.json.Encoder().encode

DIMENSIONS = 384
COMPLETION_TOKENS = 16  # what /v1/completions generates if max_tokens is not given, as OpenAI's does
ARGUMENT_CHUNK = 8  # characters of a streamed fragment of arguments, if the script says nothing
BURST = 64  # pieces pushed before other calls get their turn
FINGERPRINT = "fp_mock"
PADDING = "abcdefghijklmnop"
WORD = re.compile(r"\s*\S+\s*\Z|\s*\S+|\s+")
WORD_START = re.compile(r"(?<!\S)\S")
NOT_NEGATIVE = Meta(ge=0)
Seconds = Annotated[float, Meta(ge=0, le=3600)]


class ScriptedCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of a tool; arguments as an object, or as the very text to send (the input, for a custom tool)."""

    name: str
    arguments: dict[str, Any] | str = {}
    id: str | None = None

    @property
    def text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else _json(self.arguments)


class ScriptedError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An error with its HTTP status; what is not given is as usual for that status. retry_after in seconds."""

    status: Annotated[int, Meta(ge=400, le=599)]
    message: str | None = None
    type: str | None = None
    code: str | None = None
    param: str | None = None
    retry_after: Annotated[float, NOT_NEGATIVE] | None = None

    def made(self) -> TertuliaError:
        kind = QuotaExceeded if self.code == "insufficient_quota" else KINDS.get(self.status, TertuliaError)
        error = kind(self.message, param=self.param, code=self.code, type=self.type, retry_after=self.retry_after)
        error.status = self.status
        return error


KINDS: dict[int, type[TertuliaError]] = {
    kind.status: kind
    for kind in (
        BadRequest, Unauthorized, Forbidden, NotFound, Conflict, TooLarge, RateLimited, EngineFailed, Overloaded,
        DeadlineExceeded,
    )
}  # fmt: skip


class ScriptedUsage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token counts to report instead of the true ones."""

    prompt_tokens: Annotated[int, NOT_NEGATIVE] | None = None
    completion_tokens: Annotated[int, NOT_NEGATIVE] | None = None
    cached_tokens: Annotated[int, NOT_NEGATIVE] = 0


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the mock shall do, from the body field `mock`; see the module's docstring."""

    text: str | None = None
    refusal: str | None = None
    tool_calls: list[ScriptedCall] = []
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter", "function_call"] | None = None
    chunk: Annotated[int, Meta(ge=1)] | None = None
    first_delay: Seconds = 0.0
    delay: Seconds = 0.0
    usage: ScriptedUsage = ScriptedUsage()
    error: ScriptedError | None = None
    cut: Annotated[int, NOT_NEGATIVE] | None = None


SCRIPTS = msgspec.json.Decoder(Script | list[Script] | None)


class _Asked(msgspec.Struct, frozen=True):
    """The parts of a body that the mock looks at; they were validated before."""

    messages: list[dict[str, Any]] = []
    prompt: Any = None
    input: Any = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    mock: msgspec.Raw = msgspec.Raw(b"null")

    def script(self) -> Script:
        """The script for this turn. Raises BadRequest that names the wrong field."""
        try:
            scripts = SCRIPTS.decode(self.mock)
        except msgspec.ValidationError as error:
            what, _, where = str(error).partition(" - at `$")
            param = "mock" + where.rstrip("`")
            raise BadRequest(f"Invalid '{param}': {what}.", param=param, code="invalid_value") from None
        if not isinstance(scripts, list):
            return scripts or Script()
        step = 0
        for message in reversed(self.messages):
            if message.get("role") == "user":
                break
            step += message.get("role") == "assistant"
        return scripts[min(step, len(scripts) - 1)] if scripts else Script()


ASKED = msgspec.json.Decoder(_Asked)


class Mock:
    """An engines.base.Engine without a model."""

    name = "mock"

    async def answer(self, call: Call) -> None:
        try:
            asked = ASKED.decode(call.body)
        except msgspec.DecodeError as error:
            raise BadRequest(f"The body cannot be used: {error}.") from None
        _refuse_unable(call)
        script = asked.script()
        model = call.target.model if call.target is not None else call.model
        made = {"chat": _Chat, "completion": _Completion, "embedding": _Embedding}[call.task.name](model, asked, script)
        call.sending()
        _Performance(call.reply, script, made, call.stream).start()

    def models(self) -> Sequence[ModelCard]:
        return [
            ModelCard(
                id="mock",
                kind="chat",
                source="mock:",
                dimensions=DIMENSIONS,
                capabilities=("chat", "completion", "embedding", "tools", "json"),
                description="Deterministic answers without a model: echo, scripted text, tool calls, JSON, embeddings.",
            ),
            ModelCard(
                id="mock-embedding",
                kind="embedding",
                source="mock:",
                dimensions=DIMENSIONS,
                capabilities=("embedding",),
                description="Deterministic embeddings without a model: unit vectors hashed from the words.",
            ),
        ]

    async def ready(self, model: str) -> bool:
        return True

    async def close(self) -> None:
        """Nothing to close: each answer ends with its Reply."""


# When things are said ------------------------------------------------------------------------------------------------


class _Performance:
    """One answer on its way, moved by the loop's timers; it is also the Reply's source, so a slow reader pauses it."""

    def __init__(self, reply: Reply, script: Script, made: _Answer, stream: bool) -> None:
        self.reply = reply
        self.script = script
        self.made = made
        self.stream = stream
        self.steps = made.steps() if stream else iter(())
        self.upcoming: tuple[list[bytes], int] | None = None
        self.sent = self.tokens = 0
        self.waiting = False  # a step is due, but the client reads slowly
        self.timer: asyncio.Handle | None = None
        self.loop = asyncio.get_running_loop()

    def start(self) -> None:
        self.reply.source = self
        self.reply.on_close(self.stopped)
        wait = self.script.first_delay
        if not self.stream and self.script.delay:
            wait += self.script.delay * max(0, sum(1 for _ in self.made.steps()) - 1)
        self.after(wait, self.open)

    def after(self, seconds: float, what: Any) -> None:
        if seconds:
            self.timer = self.loop.call_later(seconds, what)
        else:
            what()

    def stopped(self, outcome: str) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def pause_reading(self) -> None:
        """Nothing to do: each step looks at reply.paused."""

    def resume_reading(self) -> None:
        if self.waiting:
            self.waiting = False
            self.timer = self.loop.call_soon(self.step)

    def open(self) -> None:
        script, reply = self.script, self.reply
        if script.error is not None and (script.cut is None or not self.stream):
            reply.fail(script.error.made())
        elif script.cut is not None and not self.stream:
            reply.fail(EngineFailed())
        elif not self.stream:
            reply.usage = self.made.usage()
            reply.begin(200)
            reply.push(self.made.whole())
            reply.close()
        else:
            reply.usage = self.made.usage(0)
            reply.begin(200)
            for frame in self.made.opening():
                reply.push(frame)
            self.upcoming = next(self.steps, None)
            self.step()

    def step(self) -> None:
        """Pushes pieces until one has to wait."""
        for _ in range(BURST):
            if self.reply.closed:
                return
            if self.reply.paused:
                self.waiting = True
                return
            if self.sent == self.script.cut:
                self.break_off()
                return
            if self.upcoming is None:
                self.finish()
                return
            frames, tokens = self.upcoming
            self.sent += 1
            self.tokens += tokens
            self.reply.usage = self.made.usage(self.tokens)
            for frame in frames:
                self.reply.push(frame)
            self.upcoming = next(self.steps, None)
            if self.script.delay and self.upcoming is not None and self.sent != self.script.cut:
                self.timer = self.loop.call_later(self.script.delay, self.step)
                return
        self.timer = self.loop.call_soon(self.step)

    def break_off(self) -> None:
        if self.script.error is not None:
            self.reply.fail(self.script.error.made())
        else:
            self.reply.close(FAILED)  # as if the connection broke: no error event, no end

    def finish(self) -> None:
        self.reply.usage = self.made.usage()
        for frame in self.made.closing():
            self.reply.push(frame)
        self.reply.close()


# What is said --------------------------------------------------------------------------------------------------------


class _Answer:
    """An answer in OpenAI's shape: whole, or a stream of opening frames, steps (frames, tokens) and closing frames."""

    kind = chunk_kind = ""
    prefix = ""

    def __init__(self, model: str, asked: _Asked, script: Script) -> None:
        self.asked = asked
        self.script = script
        self.prompt_tokens = self.completion_tokens = 0
        self.head: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(14),
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }
        options = asked.stream_options or {}
        self.include_usage = bool(options.get("include_usage"))
        self.include_padding = options.get("include_obfuscation") is not False

    def usage(self, completion_tokens: int | None = None) -> Usage:
        given = self.script.usage
        if completion_tokens is None:
            completion_tokens = self.completion_tokens
        return Usage(
            prompt_tokens=self.prompt_tokens if given.prompt_tokens is None else given.prompt_tokens,
            completion_tokens=completion_tokens if given.completion_tokens is None else given.completion_tokens,
            cached_tokens=given.cached_tokens,
        )

    def usage_on_wire(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def frame(self, choices: list[dict[str, Any]], said: int = 0) -> bytes:
        """One server-sent event; said is the number of characters in it, which the padding hides."""
        chunk = {**self.head, "object": self.chunk_kind, "choices": choices}
        if self.include_usage:
            chunk["usage"] = None
        if self.include_padding:
            chunk["obfuscation"] = PADDING[said % len(PADDING) :]
        return b"data: " + encode(chunk) + b"\n\n"

    def ending(self) -> Iterator[bytes]:
        if self.include_usage:
            last = {**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage_on_wire()}
            yield b"data: " + encode(last) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def whole(self) -> bytes:
        raise NotImplementedError

    def opening(self) -> Iterator[bytes]:
        return iter(())

    def steps(self) -> Iterator[tuple[list[bytes], int]]:
        return iter(())

    def closing(self) -> Iterator[bytes]:
        return iter(())


class _Chat(_Answer):
    """A chat completion; all n choices are the same."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl-"

    def __init__(self, model: str, asked: _Asked, script: Script) -> None:
        super().__init__(model, asked, script)
        self.head["service_tier"] = "default"
        self.head["system_fingerprint"] = FINGERPRINT
        self.n = asked.n or 1
        self.prompt_tokens = sum(_words(_content(message)) for message in asked.messages)
        self.legacy = bool(asked.functions) and not asked.tools
        self.custom = {
            tool["custom"]["name"] for tool in asked.tools or () if tool.get("type") == "custom" and "custom" in tool
        }
        self.calls = list(script.tool_calls)
        self.text, self.refusal, self.finish = script.text, script.refusal, "stop"
        if self.text is None and self.refusal is None and not self.calls:
            self._improvise()
        if self.calls:
            self.calls = self.calls[:1] if self.legacy else self.calls
            self.finish = "function_call" if self.legacy else "tool_calls"
        if self.text is not None:
            limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
            self.text, cut_by = _cut(self.text, asked.stop, limit)
            self.finish = cut_by or self.finish
        self.finish = script.finish_reason or self.finish
        self.ids = [call.id or "call_" + secrets.token_hex(12) for call in self.calls]
        spoken = (self.text or "", self.refusal or "", *(call.text for call in self.calls))
        self.completion_tokens = self.n * sum(_words(text) for text in spoken)

    def _improvise(self) -> None:
        tool = _demanded(self.asked)
        shape = (self.asked.response_format or {}).get("type")
        if tool is not None:
            self.calls = [_smallest_call(tool, self.asked)]
        elif shape == "json_schema":
            wanted = (self.asked.response_format or {}).get("json_schema") or {}
            self.text = _json(_instance(wanted.get("schema", {"type": "object"}), "response_format"))
        elif shape == "json_object":
            self.text = "{}"
        else:
            self.text = _last_said(self.asked.messages)

    def call_on_wire(self, index: int) -> dict[str, Any]:
        call = self.calls[index]
        if call.name in self.custom:
            return {"id": self.ids[index], "type": "custom", "custom": {"name": call.name, "input": call.text}}
        function = {"name": call.name, "arguments": call.text}
        return {"id": self.ids[index], "type": "function", "function": function}

    def whole(self) -> bytes:
        message: dict[str, Any] = {
            "role": "assistant", "content": self.text, "refusal": self.refusal, "annotations": [],
        }  # fmt: skip
        if self.calls and self.legacy:
            message["function_call"] = {"name": self.calls[0].name, "arguments": self.calls[0].text}
        elif self.calls:
            message["tool_calls"] = [self.call_on_wire(index) for index in range(len(self.calls))]
        logprobs = None
        if self.asked.logprobs and self.text is not None:
            logprobs = self.logprobs(piece for piece, _ in _pieces(self.text, self.script.chunk))
        choices = [
            {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}
            for index in range(self.n)
        ]
        return encode({**self.head, "choices": choices, "usage": self.usage_on_wire()})

    def logprobs(self, tokens: Iterator[str] | list[str]) -> dict[str, Any]:
        top = self.asked.top_logprobs or 0
        content = []
        for token in tokens:
            ranked = [_ranked(token, rank) for rank in range(max(1, top))]
            content.append({**ranked[0], "top_logprobs": ranked[:top]})
        return {"content": content, "refusal": None}

    # as a stream
    def choice(self, index: int, delta: dict[str, Any], finish: str | None = None, said: str = "") -> bytes:
        logprobs = None
        if self.asked.logprobs and said and "content" in delta:
            logprobs = self.logprobs([said])
        return self.frame([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}], len(said))

    def opening(self) -> Iterator[bytes]:
        delta: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if self.text is None:
            delta["content"] = None
            if self.refusal is not None:
                delta["refusal"] = ""
            elif self.calls:
                delta |= self.call_opening(0)
        for index in range(self.n):
            yield self.choice(index, delta)

    def call_opening(self, index: int) -> dict[str, Any]:
        """The delta that names a call, its arguments still empty."""
        if self.legacy:
            return {"function_call": {"name": self.calls[index].name, "arguments": ""}}
        call = self.call_on_wire(index)
        body = call[call["type"]]
        empty = {key: value if key == "name" else "" for key, value in body.items()}
        return {"tool_calls": [{"index": index, **call, call["type"]: empty}]}

    def call_more(self, index: int, fragment: str) -> dict[str, Any]:
        if self.legacy:
            return {"function_call": {"arguments": fragment}}
        if self.calls[index].name in self.custom:
            return {"tool_calls": [{"index": index, "custom": {"input": fragment}}]}
        return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}

    def deltas(self) -> Iterator[tuple[dict[str, Any], str, int]]:
        chunk = self.script.chunk
        for piece, tokens in _pieces(self.text or "", chunk):
            yield {"content": piece}, piece, tokens
        for piece, tokens in _pieces(self.refusal or "", chunk):
            yield {"refusal": piece}, piece, tokens
        for index, call in enumerate(self.calls):
            if index or self.text is not None or self.refusal is not None:
                yield self.call_opening(index), "", 0
            for piece, tokens in _pieces(call.text, chunk or ARGUMENT_CHUNK):
                yield self.call_more(index, piece), piece, tokens

    def steps(self) -> Iterator[tuple[list[bytes], int]]:
        for delta, said, tokens in self.deltas():
            yield [self.choice(index, delta, None, said) for index in range(self.n)], tokens * self.n

    def closing(self) -> Iterator[bytes]:
        for index in range(self.n):
            yield self.choice(index, {}, self.finish)
        yield from self.ending()


class _Completion(_Answer):
    """A legacy completion: n choices for each prompt, the prompt itself being the text said."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, model: str, asked: _Asked, script: Script) -> None:
        super().__init__(model, asked, script)
        self.head["system_fingerprint"] = FINGERPRINT
        self.choices: list[tuple[str, str, str]] = []  # (echoed prompt, said, finish_reason)
        limit = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        for prompt, tokens in _inputs("<|endoftext|>" if asked.prompt is None else asked.prompt):
            text, cut_by = _cut(prompt if script.text is None else script.text, asked.stop, limit)
            finish = script.finish_reason or cut_by or "stop"
            self.prompt_tokens += tokens
            for _ in range(asked.n or 1):
                self.completion_tokens += _words(text)
                self.choices.append((prompt if asked.echo else "", text, finish))
        self.after = asked.suffix if asked.echo and asked.suffix else ""

    def logprobs(self, echoed: str, pieces: list[str], start: int = 0) -> dict[str, Any] | None:
        if self.asked.logprobs is None or self.asked.logprobs is False:
            return None
        tokens = [piece for piece, _ in _pieces(echoed, None)] + pieces
        ranked = [[_ranked(token, rank) for rank in range(max(1, int(self.asked.logprobs)))] for token in tokens]
        values: list[float | None] = [one[0]["logprob"] for one in ranked]
        if echoed and values:
            values[0] = None  # nothing comes before the prompt's first token
        offsets = list(itertools.accumulate((len(token) for token in tokens), initial=start))[:-1]
        top = [{one["token"]: one["logprob"] for one in several} for several in ranked]
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": top if self.asked.logprobs else None,
            "text_offset": offsets,
        }

    def whole(self) -> bytes:
        choices = []
        for index, (echoed, said, finish) in enumerate(self.choices):
            logprobs = self.logprobs(echoed, [piece for piece, _ in _pieces(said, self.script.chunk)])
            text = echoed + said + self.after
            choices.append({"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish})
        return encode({**self.head, "choices": choices, "usage": self.usage_on_wire()})

    def choice(self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None) -> bytes:
        return self.frame([{"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}], len(text))

    def opening(self) -> Iterator[bytes]:
        for index, (echoed, _, _) in enumerate(self.choices):
            if echoed:
                yield self.choice(index, echoed, self.logprobs(echoed, []))

    def steps(self) -> Iterator[tuple[list[bytes], int]]:
        several = [_pieces(said, self.script.chunk) for _, said, _ in self.choices]
        offsets = [len(echoed) for echoed, _, _ in self.choices]
        for step in itertools.zip_longest(*several):
            frames, tokens = [], 0
            for index, one in enumerate(step):
                if one is not None:
                    frames.append(self.choice(index, one[0], self.logprobs("", [one[0]], offsets[index])))
                    offsets[index] += len(one[0])
                    tokens += one[1]
            yield frames, tokens

    def closing(self) -> Iterator[bytes]:
        for index, (_, _, finish) in enumerate(self.choices):
            yield self.choice(index, self.after, None, finish)
        yield from self.ending()


class _Embedding(_Answer):
    """Embeddings, one an input, in order."""

    def whole(self) -> bytes:
        size = self.asked.dimensions or DIMENSIONS
        data = []
        for index, (text, _) in enumerate(_inputs(self.asked.input)):
            vector = embedding(text, size)
            value: Any = vector
            if self.asked.encoding_format == "base64":
                value = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        used = self.usage().prompt_tokens
        usage = {"prompt_tokens": used, "total_tokens": used}
        return encode({"object": "list", "data": data, "model": self.head["model"], "usage": usage})

    def __init__(self, model: str, asked: _Asked, script: Script) -> None:
        super().__init__(model, asked, script)
        self.prompt_tokens = sum(tokens for _, tokens in _inputs(asked.input))


def embedding(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """A unit vector of the text's words, each hashed to sixteen places; the same words in any order are the same."""
    vector = [0.0] * dimensions
    words = re.findall(r"\w+", text.lower())
    for word in words or [text]:
        digest = hashlib.shake_256(word.encode("utf-8", "surrogatepass")).digest(48)
        for place, sign in struct.iter_unpack("<HB", digest):
            vector[place % dimensions] += 1.0 if sign & 1 else -1.0
    length = math.sqrt(sum(value * value for value in vector))
    if not length:  # the signs cancelled out
        vector[len(text) % dimensions] = length = 1.0
    return [value / length for value in vector]


# What is refused -----------------------------------------------------------------------------------------------------

UNABLE = ("audio", "web_search_options")


def _refuse_unable(call: Call) -> None:
    """What the check let pass because an engine might know it. Raises BadRequest that names the parameter."""
    if (
        call.target.model if call.target is not None else call.model
    ) == "mock-embedding" and call.task.name != "embedding":
        raise BadRequest("The model `mock-embedding` only embeds.", param="model", code="model_not_supported")
    if call.asked is None:
        return
    known = {*type(call.asked).__struct_fields__, "mock"}
    for name in msgspec.json.decode(call.body, type=dict[str, msgspec.Raw]):
        if name not in known:
            raise BadRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    for name in UNABLE:
        if getattr(call.asked, name, None) is not None:
            raise BadRequest(
                f"Unsupported parameter: '{name}' is not supported with this model.",
                param=name,
                code="unsupported_parameter",
            )
    if getattr(call.asked, "store", None):
        raise BadRequest(
            "Unsupported parameter: 'store' is not supported with this model.",
            param="store",
            code="unsupported_parameter",
        )
    if "audio" in (getattr(call.asked, "modalities", None) or ()):
        raise BadRequest(
            "Unsupported value: 'modalities' does not support 'audio' with this model.",
            param="modalities",
            code="unsupported_value",
        )


# How it is put -------------------------------------------------------------------------------------------------------


def _json(value: Any) -> str:
    return encode(value).decode()


def _words(text: str) -> int:
    return len(WORD_START.findall(text))


def _pieces(text: str, chunk: int | None) -> Iterator[tuple[str, int]]:
    """The text in pieces of `chunk` characters, or words with the white space before them; each with its tokens."""
    if chunk is None:
        for match in WORD.finditer(text):
            yield match[0], 1 if match[0].strip() else 0
        return
    for start in range(0, len(text), chunk):
        yield text[start : start + chunk], len(WORD_START.findall(text, start, start + chunk))


def _cut(text: str, stop: str | list[str] | None, limit: int | None) -> tuple[str, str | None]:
    """The text up to the first stop sequence or the limit of tokens; and `length` if that limit was what cut it."""
    places = [text.find(word) for word in ([stop] if isinstance(stop, str) else stop or ()) if word]
    ends = [place for place in places if place >= 0]
    if ends:
        text = text[: min(ends)]
    if limit is not None and _words(text) > limit:
        start = next(itertools.islice(WORD_START.finditer(text), limit, None)).start()
        return text[:start].rstrip(), "length"
    return text, None


def _ranked(token: str, rank: int) -> dict[str, Any]:
    """The token (rank 0) or an alternative to it, with a log probability that depends on the token only."""
    name = token if not rank else f"{token}~{rank}"
    value = -(1 + zlib.crc32(token.encode("utf-8", "surrogatepass")) % 1000) / 1000 - rank
    return {"token": name, "logprob": value, "bytes": list(name.encode("utf-8", "surrogatepass"))}


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "\n".join(str(part.get("text") or part.get("refusal") or f"[{part.get('type')}]") for part in parts)


def _last_said(messages: list[dict[str, Any]]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user":
            return _content(message)
    return _content(messages[-1]) if messages else ""


def _inputs(given: Any) -> list[tuple[str, int]]:
    """The texts of a prompt or an input in any of OpenAI's four forms, each with its number of tokens."""
    if isinstance(given, str):
        return [(given, _words(given))]
    if given and isinstance(given[0], int):
        return [(" ".join(map(str, given)), len(given))]
    return [one for item in given for one in _inputs(item)]


def _demanded(asked: _Asked) -> dict[str, Any] | None:
    """The tool that must be called, as `{"type": ..., TYPE: {"name": ...}}`; None if the model may choose."""
    if isinstance(asked.function_call, dict):
        found = [one for one in asked.functions or () if one.get("name") == asked.function_call.get("name")]
        return {"type": "function", "function": found[0]} if found else None
    choice, tools = asked.tool_choice, asked.tools or []
    if choice == "required":
        return tools[0] if tools else None
    if not isinstance(choice, dict):
        return None
    wanted = [choice]
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or {}
        wanted = allowed.get("tools") or [] if allowed.get("mode") == "required" else []
    names = [(one.get("type"), (one.get(one.get("type", "")) or {}).get("name")) for one in wanted]
    for tool in tools:
        if (tool.get("type"), tool[tool["type"]].get("name")) in names:
            return tool
    return None


def _smallest_call(tool: dict[str, Any], asked: _Asked) -> ScriptedCall:
    if tool["type"] == "custom":
        if ((tool["custom"].get("format")) or {}).get("type") == "grammar":
            raise BadRequest("The mock model cannot follow a grammar: script its input with `mock`.", param="tools")
        return ScriptedCall(name=tool["custom"]["name"], arguments=_last_said(asked.messages))
    parameters = tool["function"].get("parameters") or {"type": "object"}
    found = _instance(parameters, "tools" if asked.tools else "functions")
    return ScriptedCall(name=tool["function"]["name"], arguments=_json(found))


def _instance(schema: Any, param: str) -> Any:
    try:
        return smallest(schema)
    except (NoInstance, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        # the last five: keywords of the wrong type, which a schema from outside may well have
        raise BadRequest(f"The mock model has no instance of the schema: {error}.", param=param) from None
