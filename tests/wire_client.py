"""A client that trusts nothing: raw bytes over a socket, and an answer taken apart strictly, so that a test sees what
was said twice, cut off, or said after the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def body_of(task: str, model: str, stream: bool = False, **more: Any) -> dict[str, Any]:
    """The smallest body of a task."""
    asked: dict[str, Any] = {"model": model, **more}
    asked |= {
        "chat": {"messages": [{"role": "user", "content": "Say the tokens."}]},
        "completions": {"prompt": "Say the tokens.", "max_tokens": 100},
        "embeddings": {"input": "Say the tokens."},
    }[task]
    return asked | ({"stream": True} if stream else {})


def request(key: str, task: str, body: dict[str, Any], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = [
        f"POST {PATHS[task]} HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-type: application/json",
        f"content-length: {len(data)}", *headers, "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + data


@dataclass
class Answer:
    """status and headers as they came; body without chunk frames; whole: whether it ended as HTTP says an answer ends;
    after: what the connection did next (`usable` or `closed`)."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    seconds: float = 0.0
    after: str = ""

    @property
    def id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def events(self) -> list[bytes]:
        """The data of each event of a stream; comments are left out."""
        assert self.body.endswith(b"\n\n"), f"the last event is not whole: {self.body[-200:]!r}"
        found = self.body.split(b"\n\n")[:-1]
        return [event[6:] for event in found if event.startswith(b"data: ")]

    def error(self) -> dict[str, Any]:
        """The error of an answer, or of the last event; all four keys are there."""
        data = self.events()[-1] if self.stream else self.body
        found: dict[str, Any] = json.loads(data)["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"]
        return found


async def read_head(reader: asyncio.StreamReader) -> Answer:
    answer = Answer()
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    assert line.startswith("HTTP/1.1 "), line
    answer.status = int(line.split()[1])
    for each in lines:
        name, _, value = each.partition(": ")
        name = name.lower()
        assert name not in answer.headers, f"{name} was said twice"
        answer.headers[name] = value
    return answer


async def read_body(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Until the end that the head announced; answer.whole stays False if the connection ends before it."""
    parts: list[bytes] = []
    try:
        if answer.headers.get("transfer-encoding") == "chunked":
            while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
                parts.append((await reader.readexactly(size + 2))[:-2])
            assert await reader.readexactly(2) == b"\r\n"
        else:
            parts.append(await reader.readexactly(int(answer.headers["content-length"])))
        answer.whole = True
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        parts.append(getattr(error, "partial", b""))
    answer.body = b"".join(parts)


async def read_after(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Asks something else on the same connection: anything left over of the answer before would come first."""
    try:
        writer.write(HEALTH)
        rest = await reader.read()
    except ConnectionError:
        return "closed"
    if not rest:
        return "closed"
    assert rest.startswith(b"HTTP/1.1 200") and rest.endswith(b'{"status":"ok"}'), f"more than one answer: {rest!r}"
    return "usable"


async def ask(port: int, sent: bytes, limit: float = 30.0) -> Answer:
    """One request and everything that comes of it. Raises TimeoutError when it takes longer than limit seconds."""
    began = time.monotonic()
    async with asyncio.timeout(limit):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        try:
            writer.write(sent)
            answer = await read_head(reader)
            await read_body(reader, answer)
            answer.seconds = time.monotonic() - began
            answer.after = await read_after(reader, writer)
            return answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def text_of(task: str, answer: Answer) -> str:
    """What a chat or a completion says, streamed or not."""
    chunks = [json.loads(event) for event in answer.events() if event != b"[DONE]"] if answer.stream else []
    if not answer.stream:
        choice = json.loads(answer.body)["choices"][0]
        return str(choice["text"] if task == "completions" else choice["message"]["content"])
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    if task == "completions":
        return "".join(choice["text"] for choice in choices)
    return "".join(choice["delta"].get("content") or "" for choice in choices)
