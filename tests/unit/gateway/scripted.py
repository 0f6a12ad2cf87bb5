"""Upstream engines that do what a test tells them, one step per attempt, and a house around them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from tertulia.api import chat, completions, embeddings
from tertulia.config import Settings, load
from tertulia.core import FINISHED, NO_WISHES, Call, ModelCard, Principal, Reply, Wishes
from tertulia.engines.base import Collector
from tertulia.errors import TertuliaError
from tertulia.gateway.names import Names
from tertulia.gateway.pipeline import Pipeline, check
from tertulia.gateway.route import Route

Step = Callable[[Call], Any]


class Wire(Collector):
    """A Collector that keeps the headers too."""

    def begin(self, status: int, headers: Sequence[bytes]) -> None:
        super().begin(status, headers)
        lines = b"".join(headers).decode().split("\r\n")
        self.headers = dict(line.split(": ", 1) for line in lines if line)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def error(self) -> dict[str, Any]:
        found = self.pieces[-1].removeprefix(b"data: ")
        return dict(json.loads(found)["error"])


def fails(error: TertuliaError, raised: bool = False) -> Step:
    def step(call: Call) -> None:
        if raised:
            raise error
        call.reply.fail(error)

    return step


def says(body: bytes = b"{}") -> Step:
    def step(call: Call) -> None:
        call.reply.push(body)
        call.reply.close(FINISHED)

    return step


def hangs(call: Call) -> None:
    """Answers never."""


def later(seconds: float, step: Step) -> Step:
    def start(call: Call) -> None:
        handle = asyncio.get_running_loop().call_later(seconds, step, call)
        call.reply.on_close(lambda outcome: handle.cancel())

    return start


def streams(*pieces: bytes, then: TertuliaError | None = None) -> Step:
    def step(call: Call) -> None:
        for piece in pieces:
            call.reply.push(piece)
        if then is None:
            call.reply.push(b"data: [DONE]\n\n")
            call.reply.close(FINISHED)
        else:
            call.reply.fail(then)

    return step


class Far:
    """An upstream: its steps one after the other, the last one from then on."""

    def __init__(self, name: str, *steps: Step, models: Sequence[str] = ("m",)) -> None:
        self.name, self.steps = name, list(steps) or [says(name.encode())]
        self.cards = [self._card(model) for model in models]
        self.calls: list[Call] = []
        self.bodies: list[dict[str, Any]] = []
        self.closed: list[str] = []

    def _card(self, model: str) -> ModelCard:
        return ModelCard(id=model, kind="chat", source=f"upstream:{self.name}")

    @property
    def named(self) -> set[str]:
        return {card.id for card in self.cards}

    def offer(self, model: str) -> ModelCard:
        return next((card for card in self.cards if card.id == model), self._card(f"{self.name}/{model}"))

    def identity(self, model: str) -> object:
        return self.name, model

    def models(self) -> Sequence[ModelCard]:
        return self.cards

    def answer(self, call: Call) -> Any:
        call.reply.on_close(self.closed.append)
        self.calls.append(call)
        self.bodies.append(json.loads(call.body))
        return self.steps[min(len(self.calls), len(self.steps)) - 1](call)

    async def ready(self, model: str) -> bool:
        return True

    async def close(self) -> None: ...


class Near(Far):
    """An engine of this machine."""

    offer: Any = property()  # which it has not

    def __init__(self, *steps: Step, models: Sequence[str] = ("local",)) -> None:
        super().__init__("local", *(steps or (says(b"local"),)), models=models)

    def _card(self, model: str) -> ModelCard:
        return ModelCard(id=model, kind="chat", source="file:/m.gguf")


class House:
    """check and route around engines."""

    def __init__(self, *engines: Any, random: float = 0.0, **settings: Any) -> None:
        model = engines[0].cards[0].id
        upstreams = {engine.name: {"base_url": "http://h/v1"} for engine in engines if hasattr(engine, "offer")}
        for name, more in settings.pop("upstreams", {}).items():
            upstreams[name] = {**upstreams[name], **more}
        given = {"chat_model": model, "embedding_model": "none", "heartbeat": 0, "upstreams": upstreams, **settings}
        self.settings: Settings = load(given, {})
        self.names = Names.of(self.settings, engines)
        self.route = Route(self.settings, self.names, random=lambda: random)
        self.pipeline = Pipeline([check, self.route])
        makers = (chat, completions, embeddings)
        self.tasks = {make.__name__.rsplit(".")[-1]: make.task(self.names.resolve) for make in makers}

    def call(
        self, model: str = "m", task: str = "chat", key: str = "key", project: str = "p", wishes: Wishes = NO_WISHES,
        **more: Any,
    ) -> tuple[Call, Wire]:  # fmt: skip
        wire = Wire()
        what = {
            "chat": {"messages": [{"role": "user", "content": "x"}]}, "completions": {"prompt": "x"},
            "embeddings": {"input": "x"},
        }[task]  # fmt: skip
        body = json.dumps({"model": model, **what, **more}).encode()
        call = Call("req_1", Principal(key, "o", project), self.tasks[task], body, Reply(wire), perf_counter_ns())
        call.wishes = wishes
        return call, wire

    def send(self, call: Call) -> None:
        rest = self.pipeline.run(call)
        if rest is not None:
            self.task = asyncio.ensure_future(rest)

    async def ask(self, model: str = "m", **more: Any) -> tuple[Call, Wire]:
        call, wire = self.call(model, **more)
        self.send(call)
        await asyncio.wait_for(wire.done(), 5)
        return call, wire

    def live(self, label: str) -> Any:
        return next(live for live in self.route.targets if live.label == label)
