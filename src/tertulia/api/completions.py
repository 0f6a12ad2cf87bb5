"""POST /v1/completions, the legacy endpoint: OpenAI's CreateCompletionRequest and the rules between its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from ..core import Call, Task
from ..errors import BadRequest
from .decode import decode
from .fields import (
    Bias,
    Count,
    Foreign,
    Identifier,
    Metadata,
    Model,
    Penalty,
    Probability,
    Seed,
    Stop,
    StreamOptions,
    Temperature,
)  # fmt: skip

Token = Annotated[int, Meta(ge=0)]
DEFAULT_MAX_TOKENS = 16


class Completion(Foreign):
    """The body, decoded; prompt is None for OpenAI's default, the start of a document."""

    model: Model
    prompt: str | Annotated[list[str | Token | list[Token]], Meta(min_length=1, max_length=2048)] | None = None
    stream: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    n: Count | None = None
    best_of: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    stream_options: StreamOptions | None = None
    user: Identifier | None = None
    metadata: Metadata | None = None


_decoder = msgspec.json.Decoder(Completion)


def task(resolve: Callable[[Call, str], None]) -> Task:
    """The completion task; resolve(call, model) sets call.target or raises ModelNotFound."""

    def check(call: Call) -> None:
        asked = decode(_decoder, call.body)
        call.asked, call.model, call.stream = asked, asked.model, bool(asked.stream)
        if asked.stream_options is not None and not asked.stream:
            raise BadRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                param="stream_options",
                code="invalid_value",
            )
        _check_prompt(asked)
        _check_best_of(asked)
        resolve(call, asked.model)

    return Task("completion", "/v1/completions", check)


def _check_prompt(asked: Completion) -> None:
    if isinstance(asked.prompt, list):
        kinds = {type(item) for item in asked.prompt}
        if len(kinds) > 1:
            raise BadRequest(
                "Invalid type for 'prompt': expected a string, an array of strings, an array of token ids, or an array "
                "of arrays of token ids, but got a mixture.",
                param="prompt",
                code="invalid_type",
            )
        if kinds == {list} and not all(asked.prompt):
            raise BadRequest("Invalid 'prompt': empty array of token ids.", param="prompt", code="empty_array")
    if asked.max_tokens == 0 and not asked.echo:
        raise BadRequest(
            "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            param="max_tokens",
            code="integer_below_min_value",
        )


def _check_best_of(asked: Completion) -> None:
    best_of = asked.best_of or 1
    if best_of > 1 and asked.stream:
        raise BadRequest("Results cannot be streamed with 'best_of' > 1.", param="best_of", code="invalid_value")
    if asked.best_of is not None and best_of < (asked.n or 1):
        raise BadRequest(
            f"You requested that the server return more choices than it will generate (HINT: you must set 'n' "
            f"(currently {asked.n or 1}) to be at most 'best_of' (currently {best_of})).",
            param="best_of",
            code="invalid_value",
        )
