"""Cache and coalescing over real sockets: crowds reach the upstream once, projects never share."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import Served, serve
from tertulia.accounts.audit import local
from tertulia.config import load
from tertulia.server import Server

CROWD = 500
WORDS = 8


class Upstream:
    """Answers like OpenAI, after delay seconds and then every pause seconds a word, and counts what it was asked."""

    def __init__(self, delay: float = 0.3, pause: float = 0.03) -> None:
        self.delay, self.pause = delay, pause
        self.asked: Counter[str] = Counter()  # by the last message
        self.readers: list[asyncio.StreamReader] = []
        self.port = 0

    @property
    def left(self) -> int:
        """Connections that were closed on it."""
        return sum(reader.at_eof() or reader.exception() is not None for reader in self.readers)

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Upstream]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1000)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.readers.append(reader)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                )
                body = json.loads(await reader.readexactly(length))
                text = body["messages"][-1]["content"] if "messages" in body else body["input"]
                self.asked[text] += 1
                answer = f"{text} {secrets.token_hex(4)}"  # no two answers are the same
                await asyncio.sleep(self.delay)
                await (self._stream if body.get("stream") else self._whole)(writer, answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the connection was closed
        finally:
            writer.close()

    async def _whole(self, writer: asyncio.StreamWriter, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({**self._base("chat.completion"), "choices": [choice], "usage": USAGE}).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, text: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        base = self._base("chat.completion.chunk")
        for at in range(WORDS):
            chunk(writer, {**base, "choices": [{"index": 0, "delta": {"content": f"{text}/{at} "}}]})
            await writer.drain()
            await asyncio.sleep(self.pause)
        chunk(writer, {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunk(writer, {**base, "choices": [], "usage": USAGE})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    def _base(self, kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": int(time.time()), "model": "far"}


USAGE = {"prompt_tokens": 5, "completion_tokens": WORDS, "total_tokens": 5 + WORDS}


def chunk(writer: asyncio.StreamWriter, said: dict[str, Any]) -> None:
    data = b"data: " + json.dumps(said).encode() + b"\n\n"
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def raw(key: str, text: str, stream: bool, **more: Any) -> bytes:
    fields = {
        "model": "far",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "stream": stream,
        **more,
    }
    body = json.dumps(fields).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %s\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (key.encode(), len(body), body)
    )


async def ask(served: Served, request: bytes) -> tuple[dict[str, str], str]:
    """One request on a connection of its own: the headers, and what was said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(served.root.rpartition(":")[2]))
    try:
        writer.write(request)
        head, _, body = (await asyncio.wait_for(reader.read(-1), 30)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status, *lines = head.decode().split("\r\n")
    assert status == "HTTP/1.1 200 OK", status + body.decode()
    headers = dict(line.split(": ", 1) for line in lines)
    if "chunked" not in headers.get("transfer-encoding", ""):
        return headers, json.loads(body)["choices"][0]["message"]["content"]
    events = [line for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]" and body.endswith(b"0\r\n\r\n")
    said = [json.loads(event[6:]) for event in events[:-1]]
    return headers, "".join(one["choices"][0]["delta"].get("content", "") for one in said if one["choices"])


def entries(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (served.data / "access.log").read_text().splitlines()]


def two_projects(data: Path) -> tuple[str, str]:
    """A directory with a second project: a key of the first and one of the second."""
    keys = f"sk-test-{secrets.token_hex(16)}", f"sk-test-{secrets.token_hex(16)}"
    server = Server(load({"data": str(data), "api_key": keys[0]}, {}))
    organization, _ = server.directory.home()
    with server.directory.change(local("test")) as change:
        change.create("project", organization, {"name": "Second"}, id="proj_second")
    server.directory.add_key(keys[1], "project", organization, "proj_second", "second")
    server.database.dispose()
    return keys


def through(tmp_path: Path, test: Callable[[Served, Upstream, tuple[str, str]], Awaitable[None]], **more: Any) -> None:
    """Runs test against a server with one upstream and two projects."""

    async def run() -> None:
        async with Upstream(**more.pop("upstream", {})).up() as upstream:
            data = tmp_path / "data"
            keys = two_projects(data)
            settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in more.items())
            config = (
                'chat_model = "mock"\nembedding_model = "mock-embedding"\n'
                f'access_log = "{data}/access.log"\n{settings}'
                f'[upstreams.u]\nbase_url = "http://127.0.0.1:{upstream.port}/v1"\nmodels = {{ far = "far" }}\n'
            )
            served = await asyncio.to_thread(serve, data, config)
            try:
                await test(served, upstream, keys)
            finally:
                await asyncio.to_thread(served.stop)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_crowd_with_one_question_reaches_the_upstream_once(tmp_path: Path, stream: bool) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        request = raw(keys[0], "hi", stream)
        answers = await asyncio.gather(*(ask(served, request) for _ in range(CROWD)))
        assert upstream.asked == {"hi": 1}
        assert len({text for _, text in answers}) == 1
        how = Counter(headers["x-tertulia-cache"] for headers, _ in answers)
        assert how["miss"] == 1 and how["joined"] > CROWD // 2 and how.total() == CROWD, how
        headers, text = await ask(served, request)
        assert headers["x-tertulia-cache"] == "hit" and int(headers["age"]) >= 0 and text == answers[0][1]
        assert headers["x-tertulia-model"] == "far" and upstream.asked == {"hi": 1}
        await asyncio.sleep(0.5)  # the access log is written behind
        lines = entries(served)
        assert len(lines) == CROWD + 1 and all(line["completion_tokens"] == WORDS for line in lines)
        assert Counter(line["cache"] for line in lines) == how + Counter({"hit": 1})
        assert sum(line.get("attempt", 0) for line in lines) == 1

    through(tmp_path, test, upstream={"delay": 1.5})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_crowd_with_fifty_questions_reaches_it_fifty_times(tmp_path: Path, stream: bool) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        requests = [raw(keys[0], f"q{at % 50}", stream) for at in range(CROWD)]
        answers = await asyncio.gather(*(ask(served, request) for request in requests))
        assert len(upstream.asked) == 50 and set(upstream.asked.values()) == {1}
        for at, (_, text) in enumerate(answers):
            assert text == answers[at % 50][1] and text.startswith(f"q{at % 50} ")

    through(tmp_path, test)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_two_projects_never_share(tmp_path: Path, stream: bool) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        requests = [raw(key, "hi", stream) for key in keys]
        crowd = await asyncio.gather(*(ask(served, requests[at % 2]) for at in range(60)))
        assert upstream.asked == {"hi": 2}
        assert [len({text for _, text in crowd[at::2]}) for at in (0, 1)] == [1, 1]
        assert crowd[0][1] != crowd[1][1]
        assert crowd[0][0]["openai-project"] != crowd[1][0]["openai-project"] == "proj_second"
        for at, request in enumerate(requests):  # and what is kept is not shared either
            headers, text = await ask(served, request)
            assert headers["x-tertulia-cache"] == "hit" and text == crowd[at][1]
        assert (await ask(served, raw(served.api_key, "hi", stream)))[1] == crowd[0][1]  # another key of the first
        assert upstream.asked == {"hi": 2}

    through(tmp_path, test)


def test_late_comers_of_a_stream_get_what_was_said_at_once(tmp_path: Path) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        request = raw(keys[0], "hi", True)
        first = asyncio.create_task(ask(served, request))
        others = []
        for _ in range(WORDS):
            await asyncio.sleep(0.05)
            others.append(asyncio.create_task(ask(served, request)))
        answers = await asyncio.gather(first, *others)
        assert len({text for _, text in answers}) == 1 and answers[0][1].count("/") == WORDS
        assert [headers["x-tertulia-cache"] for headers, _ in answers] == ["miss"] + ["joined"] * WORDS
        assert upstream.asked == {"hi": 1}

    through(tmp_path, test, upstream={"delay": 0.05, "pause": 0.1})


def test_the_upstream_goes_on_until_the_last_one_leaves(tmp_path: Path) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        request = raw(keys[0], "hi", True)
        port = int(served.root.rpartition(":")[2])
        clients = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await reader.readuntil(b"/0 ")
            clients.append(writer)
        for at, writer in enumerate(clients):
            assert upstream.left == 0
            writer.transport.abort()
            await asyncio.sleep(0.3)
            assert upstream.left == (at == 2)
        assert upstream.asked == {"hi": 1}
        await asyncio.sleep(0.3)
        lines = entries(served)
        assert [line["outcome"] for line in lines] == ["client_left"] * 3
        assert [line["cache"] for line in lines] == ["joined", "joined", "miss"]  # paid once, by the last

    through(tmp_path, test, upstream={"delay": 0.05, "pause": 1.0})


def test_a_retry_of_the_sdk_joins_the_call_it_gave_up(tmp_path: Path) -> None:
    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        client = served.async_client(api_key=keys[0], timeout=0.7, max_retries=2)
        asked = {"model": "far", "messages": [{"role": "user", "content": "hi"}]}  # no temperature: not kept
        answer = await client.chat.completions.create(**asked)
        assert answer.choices[0].message.content.startswith("hi ") and upstream.asked == {"hi": 1}
        await client.close()
        await asyncio.sleep(0.5)
        lines = entries(served)
        assert [line["outcome"] for line in lines] == ["client_left", "finished"]
        assert [line["cache"] for line in lines] == ["joined", "miss"]

    through(tmp_path, test, upstream={"delay": 1.4}, retry_grace=5.0)


def test_answers_on_disk_outlast_the_server(tmp_path: Path) -> None:
    asked: list[str] = []

    async def test(served: Served, upstream: Upstream, keys: tuple[str, str]) -> None:
        for stream in (False, True):
            text = (await ask(served, raw(served.api_key, "hi", stream)))[1]
            asked.append(text)
        await asyncio.to_thread(served.stop)
        assert (served.data / "cache.db").stat().st_mode & 0o777 == 0o600
        config = (served.data / "tertulia.toml").read_text()
        again = await asyncio.to_thread(serve, served.data, config)
        try:
            for stream in (False, True):  # a new key, of the same project
                headers, text = await ask(again, raw(again.api_key, "hi", stream))
                assert text == asked[stream] and headers["x-tertulia-cache"] == "hit"
        finally:
            await asyncio.to_thread(again.stop)
        assert upstream.asked == {"hi": 2}
        async with Upstream().up() as other:  # the same names, and another server behind them
            moved = config.replace(str(upstream.port), str(other.port))
            again = await asyncio.to_thread(serve, served.data, moved)
            try:
                headers, _ = await ask(again, raw(again.api_key, "hi", False))
                assert headers["x-tertulia-cache"] == "miss" and other.asked == {"hi": 1}
            finally:
                await asyncio.to_thread(again.stop)

    through(tmp_path, test, cache_disk=10)
