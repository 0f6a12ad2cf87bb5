"""An OpenAI-compatible upstream that misbehaves on request: for the tests of faults, and a peer for the load scripts.

    python tests/mock_upstream.py [--port 0] [--chunks 10] [--gap 0.01] [--when before] [--tls CERTIFICATE KEY]

It prints `listening on PORT`. A POST to a path that ends in /chat/completions, /completions or /embeddings is answered
in that endpoint's own shape, streamed where the body asks for it: the tokens ` tok0`, ` tok1`, ... up to --chunks of
them. If the last message is the assistant's (or the prompt ends in a token), the answer goes on after the last token
said, so that a reader can tell one unbroken text.

The model's name says what is wanted; after a slash may stand any label, which makes names distinct:
  tokens:K          an answer of K tokens
  flood:BYTES       a stream of that many bytes, as fast as they are taken
  fault:NAME@WHEN   a fault; WHEN is `before` (anything of the answer), `middle` (of a stream), or a number of tokens
                    that are sent first. Header x-mock-fault or x-mock-when, or --when, say the same.
Faults:
  500, 503, 429     that status with an OpenAI error body (429: retry-after); in a stream an error event that ends it
  hang              never answers a byte; within a stream the same as stall
  cut               the connection is closed: after the head, half of a body, or the tokens sent first
  stall             the same point, but the connection stays open and silent
  garbage           what is no JSON in place of the answer, or one such event within a stream, which then goes on
  loris             the answer, or its rest, one byte every --drip seconds
  tls               within a stream: bytes that are no TLS record (only with --tls)
Every request is recorded. GET /__counts: how many by fault, path, model, `user` and distinct body, and how many were
finished, cancelled (the client closed before the end) or are open. GET /__requests?MODEL: the records themselves, with
bytes and tokens sent and the monotonic time of the end. Other GETs: a list of models (path with `models`), else
{"status":"ok"}.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httptools
import uvloop

HERE = Path(__file__).resolve().parent
CERTIFICATE, KEY = HERE / "loopback_certificate.pem", HERE / "loopback_key.pem"
KEPT = 20_000  # records
NEVER = -1
PROMPT_TOKENS = 25
FLOOD_EVENT = 16_384  # bytes


# ---- what is answered


def token(number: int) -> str:
    return f" tok{number}"


def spoken(first: int, count: int) -> str:
    """The text of an answer's tokens."""
    return "".join(map(token, range(first, first + count)))


def usage(completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS, "completion_tokens": completion, "total_tokens": PROMPT_TOKENS + completion,
        "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip


def packed(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def sse(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def plain(status: int, body: bytes, extra: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 %d Said\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s"
        % (status, extra, len(body), body)
    )  # fmt: skip


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = chunked(sse(b"[DONE]")) + b"0\r\n\r\n"
GARBAGE = b"{not json"


def refusal(status: int) -> bytes:
    return packed(
        {"error": {"message": f"mock {status}", "type": "server_error", "param": None, "code": f"mock_{status}"}}
    )


class Chat:
    """The shapes of /chat/completions."""

    def __init__(self, model: str) -> None:
        self.base = {"id": "chatcmpl-mock", "created": 1_700_000_000, "model": model}

    def said_before(self, body: dict[str, Any]) -> str:
        last = (body.get("messages") or [{}])[-1]
        return str(last.get("content") or "") if last.get("role") == "assistant" else ""

    def whole(self, body: dict[str, Any], text: str, used: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return {**self.base, "object": "chat.completion", "choices": [choice], "usage": used}

    def opening(self) -> list[dict[str, Any]]:
        return [self.event({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> dict[str, Any]:
        return self.event({"content": text})

    def closing(self) -> dict[str, Any]:
        return self.event({}, "stop")

    def event(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self.base, "object": "chat.completion.chunk", "choices": [choice]}

    def count(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self.base, "object": "chat.completion.chunk", "choices": [], "usage": used}


class Completions(Chat):
    """The shapes of /completions."""

    def __init__(self, model: str) -> None:
        self.base = {"id": "cmpl-mock", "object": "text_completion", "created": 1_700_000_000, "model": model}

    def said_before(self, body: dict[str, Any]) -> str:
        return body["prompt"] if isinstance(body.get("prompt"), str) else ""

    def whole(self, body: dict[str, Any], text: str, used: dict[str, Any]) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": "stop"}
        return {**self.base, "choices": [choice], "usage": used}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def event(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"text": delta.get("content", ""), "index": 0, "logprobs": None, "finish_reason": finish}
        return {**self.base, "choices": [choice]}

    def count(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self.base, "choices": [], "usage": used}


class Embeddings(Chat):
    """The shape of /embeddings: it has no stream."""

    def said_before(self, body: dict[str, Any]) -> str:
        return ""

    def whole(self, body: dict[str, Any], text: str, used: dict[str, Any]) -> dict[str, Any]:
        given = body.get("input")
        inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        data = []
        for index, one in enumerate(inputs):
            vector = [byte / 256 for byte in hashlib.sha256(packed(one)).digest()[:8]]
            coded = base64.b64encode(struct.pack("<8f", *vector)).decode()
            value = coded if body.get("encoding_format") == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": value})
        counts = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS}
        return {"object": "list", "data": data, "model": self.base["model"], "usage": counts}


SHAPES = {"/chat/completions": Chat, "/completions": Completions, "/embeddings": Embeddings}


# ---- what is asked, and what became of it


class Record:
    """One request: what was asked, what was sent, how it ended."""

    def __init__(self, model: str, path: str, body: bytes) -> None:
        self.model, self.path = model, path
        self.body = hashlib.sha256(body).hexdigest()[:16]
        self.began = time.monotonic()
        self.ended: float | None = None
        self.end = "open"  # then finished, broken (by a fault) or cancelled (the client closed first)
        self.tokens = 0
        self.bytes = 0

    def close(self, end: str) -> None:
        if self.end == "open":
            self.end, self.ended = end, time.monotonic()


class Order:
    """A request, understood."""

    def __init__(self, path: str, headers: dict[str, str], raw: bytes, options: argparse.Namespace) -> None:
        self.body: dict[str, Any] = json.loads(raw)
        model = str(self.body.get("model", ""))
        shape = next((shape for end, shape in SHAPES.items() if path.endswith(end)), Chat)
        self.shape = shape(model)
        kind, _, argument = model.partition("/")[0].partition(":")
        fault, _, when = argument.partition("@") if kind == "fault" else ("", "", "")
        self.fault = headers.get("x-mock-fault", fault)
        self.stream = self.body.get("stream") is True and shape is not Embeddings
        self.with_usage = bool((self.body.get("stream_options") or {}).get("include_usage"))
        self.flood = int(argument) if kind == "flood" else 0
        numbers = re.findall(r" tok(\d+)$", self.shape.said_before(self.body))
        self.first = int(numbers[0]) + 1 if numbers else 0
        wanted = int(argument) if kind == "tokens" else options.chunks
        most = self.body.get("max_completion_tokens") or self.body.get("max_tokens") or wanted
        self.count = max(0, min(wanted - self.first, most))
        self.at = self._place(headers.get("x-mock-when", when or options.when))  # tokens before the fault

    def _place(self, when: str) -> int:
        if not self.fault or when == "before" or not self.stream:
            return NEVER
        return self.count // 2 if when == "middle" else int(when)

    @property
    def at_once(self) -> bool:
        """Whether the fault comes before anything of the answer."""
        return bool(self.fault) and self.at == NEVER


class State:
    """What one mock has seen. options: chunks, gap and drip (seconds), delay (seconds, of whole answers), when."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clear()

    def clear(self) -> None:
        self.records: deque[Record] = deque(maxlen=KEPT)
        self.faults: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self.bodies: Counter[str] = Counter()
        self.users: Counter[str] = Counter()
        self.connections = 0

    def note(self, order: Order, path: str, raw: bytes) -> Record:
        record = Record(str(order.body.get("model", "")), path, raw)
        self.records.append(record)
        self.faults[order.fault or "ok"] += 1
        self.paths[path] += 1
        self.models[record.model] += 1
        self.bodies[record.body] += 1
        self.users[str(order.body.get("user", ""))] += 1
        return record

    def counts(self) -> dict[str, Any]:
        ends = Counter(record.end for record in self.records)
        return {
            "requests": sum(self.paths.values()), "faults": self.faults, "paths": self.paths, "models": self.models,
            "bodies": self.bodies, "users": self.users, "ends": ends, "connections": self.connections,
            "bytes": sum(record.bytes for record in self.records),
        }  # fmt: skip


# ---- the wire


class Connection(asyncio.Protocol):
    """One client connection; one request at a time."""

    def __init__(self, state: State) -> None:
        self.state, self.options = state, state.options
        self.record: Record | None = None
        self.order: Order
        self.timer: asyncio.Handle | None = None
        self.paused = False
        self.going: Any = None  # what goes on when the client reads again

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.parser = httptools.HttpRequestParser(self)
        self.state.connections += 1
        self.loop = asyncio.get_running_loop()

    def connection_lost(self, error: Exception | None) -> None:
        if self.record is not None:
            self.record.bytes -= self.left_behind
            self.record.close("cancelled")
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def pause_writing(self) -> None:
        self.paused = True
        self.left_behind = self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self.paused, self.left_behind = False, 0
        going, self.going = self.going, None
        if going is not None:
            going()

    left_behind = 0  # bytes written that the client has not taken

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self.parts.append(data)

    def on_message_complete(self) -> None:
        path = self.url.decode("latin-1")
        if self.parser.get_method() == b"GET":
            self.transport.write(plain(200, packed(self.told(path))))
            return
        raw = b"".join(self.parts)
        try:
            self.order = Order(path.partition("?")[0], self.headers, raw, self.options)
        except ValueError:
            self.transport.write(plain(400, refusal(400)))
            return
        self.record = self.state.note(self.order, path, raw)
        self.begin()

    def told(self, path: str) -> Any:
        where, _, model = path.partition("?")
        if where == "/__counts":
            return self.state.counts()
        if where == "/__requests":
            return [vars(record) for record in self.state.records if model in ("", record.model)]
        if where == "/__clear":
            self.state.clear()
        if "models" in where:
            card = {"id": "gpt-4o-mini", "object": "model", "created": 1, "owned_by": "mock"}
            return {"object": "list", "data": [card]}
        return {"status": "ok"}

    # the answer
    def write(self, data: bytes) -> None:
        assert self.record is not None
        self.record.bytes += len(data)
        self.transport.write(data)

    def later(self, seconds: float, what: Any, *arguments: Any) -> None:
        self.timer = self.loop.call_later(seconds, what, *arguments)

    def finish(self) -> None:
        if self.record is not None:
            self.record.close("finished")

    def break_off(self) -> None:
        if self.record is not None:
            self.record.close("broken")
        self.transport.close()

    def begin(self) -> None:
        order = self.order
        if order.at_once and order.fault == "hang":
            return
        if order.at_once and order.fault.isdigit():
            self.refuse(int(order.fault))
        elif order.stream:
            self.begin_stream()
        elif self.options.delay:
            self.later(self.options.delay, self.answer_whole)
        else:
            self.answer_whole()

    def refuse(self, status: int) -> None:
        after = self.options.retry_after
        wait = f"retry-after: {max(1, round(after))}\r\nretry-after-ms: {round(after * 1000)}\r\n".encode()
        self.write(plain(status, refusal(status), wait if status == 429 else b""))
        self.finish()

    def answer_whole(self) -> None:
        order = self.order
        assert self.record is not None
        self.record.tokens = order.count
        body = packed(order.shape.whole(order.body, spoken(order.first, order.count), usage(order.count)))
        if order.fault == "garbage":
            body = b"<html>This is no JSON.</html>"
        data = plain(200, body)
        if order.fault == "loris":
            self.drip(data, 0)
        elif order.fault in ("cut", "stall"):
            self.write(data[: -len(body) // 2])
            if order.fault == "cut":
                self.break_off()
        else:
            self.write(data)
            self.finish()

    def begin_stream(self) -> None:
        order = self.order
        if order.at_once and order.fault == "loris":
            self.drip(STREAM_HEAD + chunked(sse(packed(order.shape.piece(token(0))))), 0)
            return
        self.write(STREAM_HEAD)
        if order.flood:  # what is sent shall be in the receiver's hands and not in the kernel's, which would take MBs
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            self.pour(order.flood)
            return
        events = [] if order.at_once else [chunked(sse(packed(each))) for each in order.shape.opening()]
        self.write(b"".join(events))
        if order.at_once:
            self.fall(0)
        else:
            self.step(0)

    def step(self, sent: int) -> None:
        """One token, or the fault in its place; then the next one a gap later."""
        order, record = self.order, self.record
        assert record is not None
        if self.transport.is_closing():
            return
        if self.paused:
            self.going = lambda: self.step(sent)
            return
        if order.fault and sent == order.at and self.fall(sent):
            return
        if sent == order.count:
            self.close_stream()
            return
        record.tokens += 1
        self.write(chunked(sse(packed(order.shape.piece(token(order.first + sent))))))
        self.later(self.options.gap, self.step, sent + 1)

    def close_stream(self) -> None:
        order = self.order
        self.write(chunked(sse(packed(order.shape.closing()))))
        if order.with_usage:
            self.write(chunked(sse(packed(order.shape.count(usage(order.count))))))
        self.write(LAST)
        self.finish()

    def fall(self, sent: int) -> bool:
        """The fault, within a stream; whether that was the last of it."""
        fault = self.order.fault
        if fault == "garbage":
            self.write(chunked(sse(GARBAGE)))
            if not self.order.at_once:
                return False
            self.step(0)
        elif fault == "cut":
            self.break_off()
        elif fault.isdigit():
            self.write(chunked(sse(refusal(int(fault)))) + b"0\r\n\r\n")
            self.finish()
        elif fault == "loris":
            self.drip(chunked(sse(packed(self.order.shape.piece(token(self.order.first + sent))))), 0)
        elif fault == "tls":
            self.spoil()
        return True  # stall and hang: nothing more

    def spoil(self) -> None:
        """Bytes on the socket, past the TLS layer, that are no record of it."""
        number = os.dup(self.transport.get_extra_info("socket").fileno())
        os.write(number, b"\x17\x03\x03\x00\x40" + b"\x00" * 64)
        os.close(number)
        if self.record is not None:
            self.record.close("broken")

    def drip(self, data: bytes, at: int) -> None:
        if at < len(data) and not self.transport.is_closing():
            self.write(data[at : at + 1])
            self.later(self.options.drip, self.drip, data, at + 1)

    def pour(self, left: int) -> None:
        """Events as fast as they are taken."""
        text = chunked(sse(packed(self.order.shape.piece("x" * FLOOD_EVENT))))
        while left > 0 and not self.paused:
            if self.transport.is_closing():
                return
            self.write(text)
            left -= len(text)
        if left > 0:
            self.going = lambda: self.pour(left)
            return
        self.order.count = 0
        self.close_stream()


# ---- starting it


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--port", type=int, default=0)
    made.add_argument("--chunks", type=int, default=10, help="tokens of an answer")
    made.add_argument("--gap", type=float, default=0.01, help="seconds between two of them")
    made.add_argument("--delay", type=float, default=0.0, help="seconds before an answer that is not a stream")
    made.add_argument("--drip", type=float, default=0.05, help="seconds between two bytes of the slow loris")
    made.add_argument("--retry-after", type=float, default=1.0, help="seconds a 429 asks to wait")
    made.add_argument("--when", default="before", help="before, middle, or tokens before a fault")
    made.add_argument("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"), help="speak TLS")
    return made


async def listen(options: argparse.Namespace) -> tuple[asyncio.Server, State]:
    """A mock in this loop."""
    state, context = State(options), None
    if options.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*options.tls)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(state), "127.0.0.1", options.port, ssl=context, backlog=4096)
    return server, state


async def serve(options: argparse.Namespace) -> None:
    server, _ = await listen(options)
    print(f"listening on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


class Mock:
    """A mock in a process of its own, as its user sees it."""

    def __init__(self, port: int, tls: bool) -> None:
        self.port, self.tls = port, tls
        self.base_url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1"

    def text(self, path: str) -> str:
        context = ssl.create_default_context(cafile=str(CERTIFICATE)) if self.tls else None
        root = self.base_url.removesuffix("/v1")
        with urllib.request.urlopen(root + path, timeout=30, context=context) as answer:
            return str(answer.read().decode())

    def ask(self, path: str) -> Any:
        return json.loads(self.text(path))

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("/__counts")
        return found

    def requests(self, model: str = "") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask(f"/__requests?{model}")
        return found


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[Mock]:
    """Runs a mock in a process of its own until the end of the block."""
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), "the mock upstream did not start"
        yield Mock(int(line.split()[-1]), "--tls" in arguments)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    uvloop.run(serve(parser().parse_args()))
