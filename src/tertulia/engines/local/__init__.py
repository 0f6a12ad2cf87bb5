"""The engine for models on this machine: OpenAI's requests become llama.cpp's, its answers OpenAI's.

    call ─> chat.py | text.py | embeddings.py ─> exchange.py ─> child process (llama.cpp's HTTP server)
                 shapes.py (OpenAI's bytes)   <─ events, a plain function call a piece

It knows what each kind of call needs from a child; which processes run is children.py's. What a model cannot do is a
BadRequest that names the parameter, raised before a child is loaded for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import msgspec

from ...config import LocalModel, Settings
from ...core import Call, ModelCard, Target
from ...errors import BadRequest, EngineFailed, TertuliaError
from ..children import Child
from .chat import ChatAnswer
from .count import prompt_tokens
from .embeddings import EmbeddingAnswer
from .room import Room
from .shapes import encode
from .text import TextAnswer


class Running(Protocol):
    """Where children come from: engines.children.Children."""

    async def running(self, card: ModelCard, spec: LocalModel | None = None) -> Child: ...

    def loaded(self) -> Sequence[Child]: ...

    async def close(self) -> None: ...


class Local:
    """Answers chat, completion and embedding calls by models of this machine."""

    name = "local"

    def __init__(
        self, settings: Settings, children: Running, cards: Mapping[str, ModelCard] | Iterable[ModelCard]
    ) -> None:
        """cards: the models there are; a mapping by id is looked at anew for every call, so models may come and go."""
        self._settings = settings
        self._children = children
        self._cards = cards if isinstance(cards, Mapping) else {card.id: card for card in cards}
        self._fingerprints: dict[str, str] = {}
        self._rooms: WeakKeyDictionary[Child, Room] = WeakKeyDictionary()
        self._fills_in: dict[str, bool] = {}

    def models(self) -> Sequence[ModelCard]:
        return list(self._cards.values())

    async def ready(self, model: str) -> bool:
        """Whether the model answers; loads it if need be."""
        card = self._cards.get(model)
        if card is None:
            return False
        try:
            await self._children.running(card, self._settings.models.get(model))
        except TertuliaError:
            return False
        return True

    async def count(self, call: Call, target: Target) -> int | None:
        """Tokens of a call's prompt, by the tokenizer of the model that would answer; None if that is not loaded, or
        cannot say."""
        child = next((child for child in self._children.loaded() if child.card.id == target.model), None)
        if child is None:
            return None
        try:
            with child:
                return await prompt_tokens(call, child)
        except (TertuliaError, msgspec.MsgspecError):  # it breaks, or says something else: it is not counted
            return None

    async def close(self) -> None:
        await self._children.close()

    async def answer(self, call: Call) -> None:
        """Returns when the call is over. Raises TertuliaError before anything is begun."""
        assert call.target is not None
        card = call.target.card
        refuse_kind(call.task.name, card)
        answer: ChatAnswer | TextAnswer | EmbeddingAnswer
        if call.task.name == "chat":
            answer = ChatAnswer(call, card, self._fingerprint(card))
        elif call.task.name == "completion":
            answer = TextAnswer(call, card, self._fingerprint(card))
        else:
            answer = EmbeddingAnswer(call, card)
        child = await self._running(card)
        try:
            await self._run(call, answer, card, child)
        except EngineFailed:  # raised, not told to the reply: nothing was asked of this child yet
            if call.reply.begun or call.reply.closed or not await child.ended():
                raise
            call.reply.header("x-tertulia-retries", "1")
            await self._run(call, answer, card, await self._running(card))

    async def _run(
        self, call: Call, answer: ChatAnswer | TextAnswer | EmbeddingAnswer, card: ModelCard, child: Child
    ) -> None:
        with child:
            if call.reply.closed:
                return
            room = self._rooms.get(child)
            if room is None:
                room = self._rooms[child] = Room(child.pool_tokens)
            held = await room.enter(answer.need(child), call.reply)
            if not held:
                return
            try:
                if isinstance(answer, TextAnswer):
                    await answer.run(child, await self._can_fill_in(child, card) if call.asked.suffix else None)
                else:
                    await answer.run(child)
            finally:
                room.leave(held)

    async def _running(self, card: ModelCard) -> Child:
        return await self._children.running(card, self._settings.models.get(card.id))

    def _fingerprint(self, card: ModelCard) -> str:
        """The same as long as the same file is run by the same engine: with it, a seed gives the same text."""
        found = self._fingerprints.get(card.id)
        if found is None:
            what = encode([card.id, card.sha256, card.bytes, metadata.version("xllamacpp")])
            found = self._fingerprints[card.id] = "fp_" + hashlib.sha256(what).hexdigest()[:10]
        return found

    async def _can_fill_in(self, child: Child, card: ModelCard) -> bool:
        """Whether the model has tokens for filling in the middle."""
        if card.id not in self._fills_in:
            question: dict[str, Any] = {"input_prefix": "", "input_suffix": "", "n_predict": 1}
            status, _ = await child.pool.fetch("POST", "/infill", child.headers, encode(question))
            self._fills_in[card.id] = status == 200
        return self._fills_in[card.id]


def refuse_kind(task: str, card: ModelCard) -> None:
    """Raises BadRequest if this kind of model does not answer this kind of call, in OpenAI's words."""
    if task == "embedding":
        if card.kind != "embedding" and "embedding" not in card.capabilities:
            raise BadRequest(f"The model `{card.id}` does not support embeddings.", param="model")
    elif task == "chat" and card.kind != "chat":
        raise BadRequest(
            "This is not a chat model and thus not supported in the v1/chat/completions endpoint. Did you mean to use "
            f"v1/{'embeddings' if card.kind == 'embedding' else 'completions'}?",
            param="model",
        )
    elif task == "completion" and card.kind == "embedding":
        raise BadRequest(
            "This model is not supported in the v1/completions endpoint. Did you mean to use v1/embeddings?",
            param="model",
        )
