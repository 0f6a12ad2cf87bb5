"""POST /v1/embeddings: OpenAI's CreateEmbeddingRequest and the rules between its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ..core import Call, Task
from ..errors import BadRequest
from .decode import decode
from .fields import Foreign, Identifier, Model

Token = Annotated[int, Meta(ge=0)]


class Embedding(Foreign):
    """The body, decoded; truncate is ours: true cuts an input that is too long instead of refusing it."""

    model: Model
    input: str | Annotated[list[str | Token | list[Token]], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: Identifier | None = None
    truncate: bool | None = None


_decoder = msgspec.json.Decoder(Embedding)


def task(resolve: Callable[[Call, str], None]) -> Task:
    """The embedding task; resolve(call, model) sets call.target or raises ModelNotFound."""

    def check(call: Call) -> None:
        asked = decode(_decoder, call.body)
        call.asked, call.model, call.stream = asked, asked.model, False
        _check_input(asked.input)
        resolve(call, asked.model)

    return Task("embedding", "/v1/embeddings", check)


def _check_input(given: str | list[str | int | list[int]]) -> None:
    if isinstance(given, str):
        if not given:
            raise _empty("input")
        return
    if len({type(item) for item in given}) > 1:
        raise BadRequest(
            "Invalid type for 'input': expected a string, an array of strings, an array of token ids, or an array of "
            "arrays of token ids, but got a mixture.",
            param="input",
            code="invalid_type",
        )
    for index, item in enumerate(given):
        if not item and not isinstance(item, int):
            raise _empty(f"input[{index}]")


def _empty(param: str) -> BadRequest:
    return BadRequest(f"Invalid '{param}': input cannot be an empty string.", param=param, code="empty_string")
