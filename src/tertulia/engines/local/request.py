"""From the parameters of OpenAI's requests to those of llama.cpp: what both kinds of generation share.

Beyond OpenAI's parameters these are accepted (SDK: extra_body): top_k, min_p, typical_p, repeat_penalty, repeat_last_n
and ignore_eos, each as llama.cpp defines it. Any other name is a 400, and so is what no local model can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ...core import ModelCard
from ...errors import BadRequest
from .exchange import Child

RANDOM_SEED = 2**32 - 1  # the one seed by which llama.cpp means "any"


class Extras(msgspec.Struct, forbid_unknown_fields=True):
    """llama.cpp's own sampling parameters that a caller may give."""

    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    ignore_eos: bool | None = None


class _Meta(msgspec.Struct):
    n_vocab: int


class _Model(msgspec.Struct):
    meta: _Meta


class _Models(msgspec.Struct):
    data: list[_Model]


_models = msgspec.json.Decoder(_Models).decode
EXTRAS = frozenset(Extras.__struct_fields__)


def extras(raw: Mapping[str, Any], known: Iterable[str]) -> Extras:
    """The extra parameters in a body. Raises BadRequest for a name that is neither known nor an extra one."""
    known = frozenset(known)
    given = {name: value for name, value in raw.items() if name not in known and value is not None}
    unknown = [name for name in given if name not in EXTRAS]
    if unknown:
        raise BadRequest(
            f"Unrecognized request argument{'s' if len(unknown) > 1 else ''} supplied: {', '.join(unknown)[:200]}",
            param=unknown[0][:100],
            code="unknown_parameter",
        )
    try:
        return msgspec.convert(given, Extras)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        name = where.rstrip("`")
        raise BadRequest(f"Invalid value for '{name}': {what}.", param=name, code="invalid_value") from None


# The fields that the parts of a chat request may have; annotations and refusal come back from earlier answers.
_FIELDS: dict[str, frozenset[str]] = {
    "messages": frozenset(
        [
            "role",
            "content",
            "name",
            "tool_calls",
            "tool_call_id",
            "function_call",
            "refusal",
            "annotations",
            "audio",
            "reasoning_content",
        ]
    ),
    "tools": frozenset(("type", "function", "custom")),
    "functions": frozenset(("name", "description", "parameters")),
    "stream_options": frozenset(("include_usage", "include_obfuscation")),
    "response_format": frozenset(("type", "json_schema")),
}


def refuse_unknown_fields(raw: Mapping[str, Any]) -> None:
    """Raises BadRequest for a field inside a parameter that nobody would look at; null is as good as absent."""
    for name, known in _FIELDS.items():
        value = raw.get(name)
        for at, part in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(part, Mapping):
                continue
            for field, given in part.items():
                if field not in known and given is not None:
                    where = f"{name}.{field}"[:200] if at is None else f"{name}[{at}].{field}"[:200]
                    raise BadRequest(f"Unknown parameter: '{where}'.", param=where, code="unknown_parameter")
            if name == "messages" and part.get("audio") is not None:
                raise unsupported(f"messages[{at}].audio")


def unsupported(name: str, why: str = "") -> BadRequest:
    """The parameter cannot be honoured by a local model."""
    return BadRequest(
        f"Unsupported parameter: '{name}' is not supported with this model.{' ' + why if why else ''}",
        param=name,
        code="unsupported_parameter",
    )


def unsupported_value(name: str, value: Any, supported: str) -> BadRequest:
    return BadRequest(
        f"Unsupported value: '{name}' does not support '{value}' with this model. Supported values are: {supported}.",
        param=name,
        code="unsupported_value",
    )


def sampling(asked: Any, extra: Extras, card: ModelCard) -> dict[str, Any]:
    """llama.cpp's sampling parameters for a decoded request, all that matter given, so that its own defaults do not.
    A repeat_last_n of -1 stands for the whole context, which only the child knows.

    Who gives temperature or top_p gets exactly OpenAI's sampling; who gives neither gets what suits the model, as its
    card says; and OpenAI's defaults where the card says nothing.
    """
    plain = asked.temperature is not None or asked.top_p is not None
    suits: Mapping[str, Any] = {} if plain else card.sampling
    found: dict[str, Any] = {
        "temperature": suits.get("temperature", 1.0) if asked.temperature is None else asked.temperature,
        "top_p": suits.get("top_p", 1.0) if asked.top_p is None else asked.top_p,
        "top_k": int(suits.get("top_k", 0)),
        "min_p": suits.get("min_p", 0.0),
        "typical_p": suits.get("typical_p", 1.0),
        "repeat_penalty": suits.get("repeat_penalty", 1.0),
        "repeat_last_n": int(suits.get("repeat_last_n", 64)),
    }
    if asked.presence_penalty or asked.frequency_penalty:
        found["repeat_last_n"] = -1  # OpenAI's penalties look at the whole text
    for name in ("presence_penalty", "frequency_penalty"):
        found[name] = getattr(asked, name) or suits.get(name, 0.0)
    for name in EXTRAS:
        value = getattr(extra, name)
        if value is not None:
            found[name] = value
    if asked.logit_bias:
        found["logit_bias"] = [[token_id(key), value] for key, value in asked.logit_bias.items()]
    if asked.stop:
        found["stop"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        if not all(found["stop"]):
            raise BadRequest("Invalid 'stop': a stop sequence cannot be empty.", param="stop", code="empty_string")
    if asked.seed is not None:
        # the prompt is read anew: computed in other batches, cached values differ in their last bits
        found["cache_prompt"] = False
    return found


def seed(given: int | None, index: int) -> int:
    """llama.cpp's seed for a choice: given + index, within its 32 bits; any if none was given."""
    return RANDOM_SEED if given is None else (given + index) % RANDOM_SEED


def token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit():
        raise BadRequest(
            f"Invalid key in 'logit_bias': {key[:64]}. You should only be passing in valid integer token ids.",
            param="logit_bias",
            code="invalid_value",
        )
    return int(key)


async def check_bias(bias: Mapping[str, float], child: Child) -> None:
    """Raises BadRequest for an id that is none of the model's tokens: llama.cpp would ignore it."""
    status, body = await child.pool.fetch("GET", "/v1/models", child.headers)
    size = _models(body).data[0].meta.n_vocab if status == 200 else 0
    for key in bias:
        if size and token_id(key) >= size:
            raise BadRequest(
                f"Invalid key in 'logit_bias': {key[:64]}. Maximum value is {size - 1}.",
                param="logit_bias",
                code="invalid_value",
            )
