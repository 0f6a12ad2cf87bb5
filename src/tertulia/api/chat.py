"""POST /v1/chat/completions: what is particular to chat. The struct is OpenAI's CreateChatCompletionRequest; check()
decodes a body once, applies the rules that hold between parameters, and says which model answers.

It does not know which engine that is: what an engine cannot do, the engine refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..core import Call, Task
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
    Tokens,
)  # fmt: skip
from .rules import checker


class Part(msgspec.Struct):
    """One part of a message's content; what is not text stays undecoded."""

    type: Literal["text", "image_url", "input_audio", "file", "refusal"]
    text: str | None = None


class ToolCallFunction(msgspec.Struct):
    name: str
    arguments: str


class ToolCallCustom(msgspec.Struct):
    name: str
    input: str


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function", "custom"] = "function"
    function: ToolCallFunction | None = None
    custom: ToolCallCustom | None = None


class Message(msgspec.Struct):
    role: Literal["system", "assistant", "user", "function", "tool", "developer"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: ToolCallFunction | None = None
    refusal: str | None = None


class Function(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(msgspec.Struct):
    name: str
    description: str | None = None
    format: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    type: Literal["function", "custom"]
    function: Function | None = None
    custom: CustomTool | None = None


class JsonSchema(msgspec.Struct):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Chat(Foreign):
    """The body, decoded. Whatever else a body holds travels on in its bytes; the engine judges it."""

    model: Model
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Count | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Meta(min_length=1, max_length=128)] | None = None
    function_call: str | dict[str, Any] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    user: Identifier | None = None
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(Chat)


def task(resolve: Callable[[Call, str], None]) -> Task:
    """The chat task; resolve(call, model) sets call.target or raises ModelNotFound."""

    return Task("chat", "/v1/chat/completions", checker(_decoder, resolve))
