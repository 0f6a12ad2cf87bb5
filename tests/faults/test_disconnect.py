"""A client that leaves: from the moment the official client closes its connection to the moment the engine's slot is
free, through the whole gateway. The issue's promise is 200 ms.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import CHAT_MODEL, with_models
from tertulia.engines.local import Local
from tertulia.inprocess import Background, start

PROMISE = 0.2  # seconds
TRIES = 5
LONG: dict[str, Any] = {"model": CHAT_MODEL, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "chat.completions": {"messages": [{"role": "user", "content": "Tell me a very long story about the sea."}]},
    "completions": {"prompt": "Once upon a time"},
}


@pytest.fixture(scope="module")
def server(model_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    with start(data=str(with_models(tmp_path_factory.mktemp("left"), model_files)), threads=1) as server:
        yield server


class Slots:
    """How many slots of the model's engine are at work, asked of the child itself with its own secret."""

    def __init__(self, server: Background) -> None:
        local = next(engine for engine in server._server.engines if isinstance(engine, Local))
        child = next(child for child in local._children.loaded() if child.card.id == CHAT_MODEL)
        secret = child.headers.split(b"Bearer ")[1].split(b"\r\n")[0].decode()
        self._question = urllib.request.Request(
            f"http://{child.pool.host}:{child.pool.port}/slots", headers={"Authorization": f"Bearer {secret}"}
        )

    def busy(self) -> int:
        with urllib.request.urlopen(self._question, timeout=10) as answer:
            return sum(slot["is_processing"] for slot in json.load(answer))

    def become(self, count: int) -> float:
        """Waits until so many are at work; when that was seen."""
        deadline = time.perf_counter() + 20
        while self.busy() != count:
            assert time.perf_counter() < deadline, f"never {count} slots at work"
        return time.perf_counter()


def resource_of(client: Any, name: str) -> Any:
    for part in name.split("."):
        client = getattr(client, part)
    return client


def leave_a_stream(server: Background, name: str, slots: Slots) -> float:
    """Seconds from the close to the free slot."""
    with server.client(max_retries=0) as client:
        stream = resource_of(client, name).create(stream=True, **QUESTIONS[name], **LONG)
        for _ in range(3):
            next(stream)
        slots.become(1)
        began = time.perf_counter()
        stream.close()
        return slots.become(0) - began


def leave_an_answer(server: Background, name: str, slots: Slots) -> float:
    """The same for an answer in one piece: the task that awaits it is cancelled."""

    async def work() -> float:
        async with server.async_client(max_retries=0) as client:
            asking = asyncio.create_task(resource_of(client, name).create(**QUESTIONS[name], **LONG))
            await asyncio.to_thread(slots.become, 1)
            await asyncio.sleep(0.1)
            assert not asking.done()
            began = time.perf_counter()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            return await asyncio.to_thread(slots.become, 0) - began

    return asyncio.run(work())


@pytest.mark.parametrize("leave", [leave_a_stream, leave_an_answer])
@pytest.mark.parametrize("name", QUESTIONS)
def test_generation_stops_within_200_ms_of_the_clients_close(server: Background, name: str, leave: Any) -> None:
    resource_of(server.client(), name).create(model=CHAT_MODEL, max_tokens=1, **QUESTIONS[name])  # loads the model
    slots = Slots(server)
    took = [leave(server, name, slots) for _ in range(TRIES)]
    print(f"{name}, {leave.__name__}: slot free after ms:", [round(each * 1000, 1) for each in took])
    assert statistics.median(took) < PROMISE
