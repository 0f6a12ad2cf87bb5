"""What a model name means: a model of ours, a preset, or an alias such as OpenAI's names.

The order is: a model or preset of exactly that name, a configured alias (exact, then patterns in the order of the
file), OpenAI's names if the server is not strict. Nothing else: an unknown name is a 404, never a guess.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from ..core import Call, ModelCard, Preset, Target
from ..engines.base import Engine
from ..errors import BadRequest, ModelNotFound, SettingsError

CHAT, EMBEDDING = "chat", "embedding"
# OpenAI's names, current, legacy and retired, and which of the defaults stands in for them.
# What speaks, hears or draws is nobody's: text models do not stand in for it.
OPENAI_NAMES: tuple[tuple[str, str], ...] = (
    ("*-image*", ""),
    ("*-audio*", ""),
    ("*-realtime*", ""),
    ("*-transcribe*", ""),
    ("*-tts*", ""),
    ("gpt-*", CHAT),
    ("chatgpt-*", CHAT),
    ("o[0-9]*", CHAT),
    ("codex-*", CHAT),
    ("text-embedding-*", EMBEDDING),
    ("text-davinci-*", CHAT),
    ("davinci-*", CHAT),
    ("babbage-*", CHAT),
    ("text-curie-*", CHAT),
    ("text-babbage-*", CHAT),
    ("text-ada-*", CHAT),
)
# Two spellings of one parameter: a preset's gives way to the caller's, whichever each of them used.
SAME = {"max_tokens": ("max_completion_tokens",), "max_completion_tokens": ("max_tokens",)}
KNOWN_LIMIT = 4096  # distinct names kept resolved; callers choose names, so there must be a bound


class Names:
    """Resolves names; asked on every call, so answers are kept."""

    def __init__(
        self,
        engines: Sequence[Engine],
        presets: Mapping[str, Preset],
        aliases: Mapping[str, str],
        defaults: Mapping[str, str],
        strict: bool = False,
    ) -> None:
        """defaults: {"chat": NAME, "embedding": NAME}. Raises SettingsError for a name that leads nowhere."""
        self._engines = list(engines)
        self._presets = dict(presets)
        patterns = [] if strict else [(name, defaults.get(kind, "")) for name, kind in OPENAI_NAMES]
        self._exact = {name: model for name, model in aliases.items() if not _is_pattern(name)}
        self._patterns = [(name, model) for name, model in aliases.items() if _is_pattern(name)] + patterns
        self._started = int(time.time())
        self._known: dict[str, Target] = {}
        self._cards: dict[str, tuple[Engine, ModelCard]] = {}
        self.refresh()
        self._check()
        for kind, model in defaults.items():
            target = self._find(model, 0)  # None: not fetched yet
            if target is not None and not serves(target.card, kind):
                raise SettingsError(f"{kind}_model: {wrong_kind(model, target.card, kind)}")

    def _check(self) -> None:
        for name, preset in self._presets.items():
            for at, example in enumerate(preset.examples):
                if odd := sorted(example.keys() - {"user", "assistant"}):
                    raise SettingsError(f"presets.{name}.examples[{at}].{odd[0]}: only user and assistant have turns")
            self._check_way(f"presets.{name}.model", name, preset.model)
        for name, model in self._exact.items():
            self._check_way(f"aliases.{name}", name, model)

    def _check_way(self, setting: str, name: str, model: str) -> None:
        """Raises SettingsError if name, which stands for model, leads nowhere or in a circle."""
        if self._find(model, 0) is not None:
            return
        way, step = [name], model
        while step not in way:
            way.append(step)
            following = self._presets[step].model if step in self._presets else self._exact.get(step)
            if following is None:
                raise SettingsError(f"{setting}: there is no model {model!r}")
            step = following
        raise SettingsError(f"{setting}: it is a circle: {' -> '.join([*way, step])}")

    def refresh(self) -> None:
        """Asks the engines again what they serve."""
        self._cards = {card.id: (engine, card) for engine in self._engines for card in engine.models()}
        self._known.clear()

    def resolve(self, call: Call, model: str) -> None:
        """Sets call.target, and applies the preset if the name is one. Raises ModelNotFound."""
        call.target = target = self.find(model)
        if target.preset is not None:
            if call.task.name == EMBEDDING:
                raise BadRequest(f"The preset `{model}` does not embed.", param="model")
            _apply(call, target.preset)

    def find(self, model: str) -> Target:
        """What answers for model. Raises ModelNotFound."""
        target = self._known.get(model)
        if target is None:
            target = self._find(model, 0)
            if target is None:
                raise ModelNotFound(model)
            if len(self._known) >= KNOWN_LIMIT:
                self._known.clear()
            self._known[model] = target
        return target

    def _find(self, model: str, depth: int) -> Target | None:
        if depth > 8:  # an alias or preset that leads back to itself
            return None
        if model in self._cards:
            engine, card = self._cards[model]
            return Target(engine, model, card)
        if model in self._presets:
            preset = self._presets[model]
            base = self._find(preset.model, depth + 1)
            if base is None:
                return None
            return Target(base.engine, base.model, base.card, _merge(base.preset, preset))
        if model in self._exact:
            return self._find(self._exact[model], depth + 1)
        for pattern, name in self._patterns:
            if name != model and fnmatchcase(model, pattern):
                return self._find(name, depth + 1) if name else None
        return None

    def listed(self) -> list[ModelCard]:
        """Every model, preset and exact alias, as GET /v1/models shows them."""
        cards = {name: self._dated(card) for name, (_, card) in self._cards.items()}
        for name in [*self._presets, *self._exact]:
            if name not in cards:
                cards[name] = msgspec.structs.replace(self._dated(self.find(name).card), id=name)
        return list(cards.values())

    def card(self, model: str) -> ModelCard:
        """The card for a name, under that name. Raises ModelNotFound."""
        return msgspec.structs.replace(self._dated(self.find(model).card), id=model)

    def _dated(self, card: ModelCard) -> ModelCard:
        return card if card.created else msgspec.structs.replace(card, created=self._started)


def serves(card: ModelCard, kind: str) -> bool:
    """Whether the model can be the default for chat (completions count) or embeddings; of a far one nobody knows."""
    if card.source.startswith("upstream:"):
        return True
    kinds = (EMBEDDING,) if kind == EMBEDDING else (CHAT, "completion")
    return card.kind in kinds or any(one in card.capabilities for one in kinds)


def wrong_kind(name: str, card: ModelCard, kind: str) -> str:
    """What to say of a default model that cannot do what it is the default for."""
    right = "embedding_model" if card.kind == EMBEDDING else "chat_model"
    return f"{name!r} is no model for {'embeddings' if kind == EMBEDDING else 'chat'}; did you mean {right}?"


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _merge(inner: Preset | None, outer: Preset) -> Preset:
    """A preset of a preset: the outer one's words win."""
    if inner is None:
        return outer
    return Preset(
        model=inner.model,
        system=outer.system if outer.system is not None else inner.system,
        examples=[*inner.examples, *outer.examples],
        parameters={**inner.parameters, **outer.parameters},
    )


def _apply(call: Call, preset: Preset) -> None:
    """Rewrites the body: the preset's messages first, its parameters where the caller gives none; then checks again."""
    body = msgspec.json.decode(call.body)
    if call.task.name == CHAT:
        turns = [{"role": "system", "content": preset.system}] if preset.system else []
        for example in preset.examples:
            turns += [{"role": role, "content": example[role]} for role in ("user", "assistant") if role in example]
        body["messages"] = turns + body["messages"]
    elif preset.system and isinstance(body.get("prompt"), str):
        body["prompt"] = preset.system + "\n\n" + body["prompt"]
    for name, value in preset.parameters.items():
        if all(body.get(same) is None for same in (name, *SAME.get(name, ()))):
            body[name] = value
    asked, target = call.model, call.target
    assert target is not None
    body["model"] = target.model
    call.body = msgspec.json.encode(body)
    call.task.check(call)  # resolves the base model, which has no preset
    call.model, call.target = asked, target
