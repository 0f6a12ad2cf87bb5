"""POST /v1/chat/completions: what is particular to chat. The struct is OpenAI's CreateChatCompletionRequest; check()
decodes a body once, applies the rules that hold between parameters, and says which model answers.

It does not know which engine that is: what an engine cannot do, the engine refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..core import Call, Task
from ..errors import BadRequest
from .decode import decode
from .fields import (
    Bias,
    Count,
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

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


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


class Chat(msgspec.Struct):
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

    def check(call: Call) -> None:
        asked = decode(_decoder, call.body)
        call.asked, call.model, call.stream = asked, asked.model, bool(asked.stream)
        _check_options(asked)
        _check_messages(asked.messages)
        if asked.tools is not None or asked.tool_choice is not None or asked.functions or asked.function_call:
            _check_tools(asked)
        if asked.response_format is not None:
            _check_format(asked)
        resolve(call, asked.model)

    return Task("chat", "/v1/chat/completions", check)


def _check_options(asked: Chat) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise BadRequest(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            param="stream_options",
            code="invalid_value",
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise BadRequest(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            param="top_logprobs",
            code="invalid_value",
        )
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise BadRequest(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            param="max_tokens",
            code="invalid_parameter_combination",
        )


def _check_messages(messages: list[Message]) -> None:
    waiting: list[str] = []  # ids of tool calls that the next messages must answer
    caller = 0
    for at, message in enumerate(messages):
        if message.role == "tool":
            _check_tool_message(message, waiting, at)
            continue
        if waiting:
            raise _unanswered(waiting, caller)
        if message.role == "assistant":
            if message.tool_calls:
                _check_calls(message.tool_calls, at)
                waiting, caller = [call.id for call in message.tool_calls], at
            elif message.content is None and message.function_call is None and message.refusal is None:
                raise _no_content(at)
        elif message.content is None and message.role != "function":
            raise _no_content(at)
        elif message.role == "function" and not message.name:
            raise _missing(f"messages[{at}].name")
        if type(message.content) is list:
            _check_parts(message, at)
    if waiting:
        raise _unanswered(waiting, caller)


def _check_calls(calls: list[ToolCall], at: int) -> None:
    for index, call in enumerate(calls):
        if getattr(call, call.type) is None:
            raise _missing(f"messages[{at}].tool_calls[{index}].{call.type}")


def _check_tool_message(message: Message, waiting: list[str], at: int) -> None:
    if message.tool_call_id is None:
        raise _missing(f"messages[{at}].tool_call_id")
    if message.tool_call_id not in waiting:
        raise BadRequest(
            "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with "
            "'tool_calls'.",
            param=f"messages[{at}].role",
        )
    waiting.remove(message.tool_call_id)
    if message.content is None:
        raise _no_content(at)
    if type(message.content) is list:
        _check_parts(message, at)


def _check_parts(message: Message, at: int) -> None:
    for index, part in enumerate(message.content or ()):
        assert isinstance(part, Part)
        if part.type == "text" and part.text is None:
            raise _missing(f"messages[{at}].content[{index}].text")
        if part.type == "refusal" and message.role != "assistant":
            raise BadRequest(
                f"Invalid 'messages[{at}].content[{index}]': content of type 'refusal' is only allowed in messages "
                "with role 'assistant'.",
                param=f"messages[{at}].content[{index}].type",
                code="invalid_value",
            )
        if part.type not in ("text", "refusal") and message.role != "user":
            raise BadRequest(
                f"Invalid 'messages[{at}].content[{index}]': content of type '{part.type}' is only allowed in messages "
                "with role 'user'.",
                param=f"messages[{at}].content[{index}].type",
                code="invalid_value",
            )


def _unanswered(ids: list[str], at: int) -> BadRequest:
    return BadRequest(
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
        f"The following tool_call_ids did not have response messages: {', '.join(ids)}",
        param=f"messages[{at}].tool_calls",
    )


def _no_content(at: int) -> BadRequest:
    return BadRequest(
        f"Invalid value for 'content': expected a string, got null. (messages[{at}].content)",
        param=f"messages[{at}].content",
        code="invalid_type",
    )


def _missing(param: str) -> BadRequest:
    return BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def _check_tools(asked: Chat) -> None:
    if asked.tools is not None and asked.functions is not None:
        raise BadRequest("'functions' and 'tools' are mutually exclusive.", param="functions", code="invalid_value")
    names = set()
    for index, tool in enumerate(asked.tools or ()):
        inner: Any = getattr(tool, tool.type)
        if inner is None:
            raise _missing(f"tools[{index}].{tool.type}")
        _check_name(inner.name, f"tools[{index}].{tool.type}.name")
        names.add(inner.name)
    for index, function in enumerate(asked.functions or ()):
        _check_name(function.name, f"functions[{index}].name")
        names.add(function.name)
    if asked.tool_choice is not None:
        if not asked.tools and asked.tool_choice != "none":
            raise BadRequest("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
        _check_tool_choice(asked.tool_choice, names)
    if asked.function_call is not None:
        if not asked.functions:
            raise BadRequest("'function_call' is only allowed when 'functions' are specified.", param="function_call")
        _check_function_call(asked.function_call, names)


def _check_name(name: str, param: str) -> None:
    if not NAME.match(name):
        raise BadRequest(
            f"Invalid '{param}': string does not match pattern. Expected a string that matches the pattern "
            "'^[a-zA-Z0-9_-]{1,64}$'.",
            param=param,
            code="invalid_value",
        )


def _check_tool_choice(choice: str | dict[str, Any], names: set[str]) -> None:
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise BadRequest(
                f"Invalid value: '{choice}'. Supported values are: 'none', 'auto', and 'required'.",
                param="tool_choice",
                code="invalid_value",
            )
        return
    kind = choice.get("type")
    if kind in ("function", "custom"):
        _check_chosen(choice.get(kind), f"tool_choice.{kind}", names)
    elif kind == "allowed_tools":
        _check_allowed(choice.get("allowed_tools"), names)
    else:
        raise BadRequest(
            f"Invalid value: '{kind}'. Supported values are: 'function', 'custom', and 'allowed_tools'.",
            param="tool_choice.type",
            code="invalid_value",
        )


def _check_allowed(allowed: Any, names: set[str]) -> None:
    if not isinstance(allowed, dict):
        raise _missing("tool_choice.allowed_tools")
    if allowed.get("mode") not in ("auto", "required"):
        raise BadRequest(
            f"Invalid value: '{allowed.get('mode')}'. Supported values are: 'auto' and 'required'.",
            param="tool_choice.allowed_tools.mode",
            code="invalid_value",
        )
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools:
        raise _missing("tool_choice.allowed_tools.tools")
    for index, tool in enumerate(tools):
        where = f"tool_choice.allowed_tools.tools[{index}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            raise BadRequest(
                f"Invalid value: '{kind}'. Supported values are: 'function' and 'custom'.",
                param=f"{where}.type",
                code="invalid_value",
            )
        _check_chosen(tool.get(kind), f"{where}.{kind}", names)


def _check_chosen(chosen: Any, param: str, names: set[str]) -> None:
    if not isinstance(chosen, dict) or not isinstance(chosen.get("name"), str):
        raise _missing(f"{param}.name")
    if chosen["name"] not in names:
        raise BadRequest(
            f"Invalid value for '{param}.name': '{chosen['name'][:64]}' is not one of the tools given.",
            param=f"{param}.name",
            code="invalid_value",
        )


def _check_function_call(choice: str | dict[str, Any], names: set[str]) -> None:
    if isinstance(choice, dict):
        _check_chosen(choice, "function_call", names)
    elif choice not in ("none", "auto"):
        raise BadRequest(
            f"Invalid value: '{choice}'. Supported values are: 'none' and 'auto'.",
            param="function_call",
            code="invalid_value",
        )


def _check_format(asked: Chat) -> None:
    wanted = asked.response_format
    assert wanted is not None
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise _missing("response_format.json_schema")
        _check_name(wanted.json_schema.name, "response_format.json_schema.name")
        if wanted.json_schema.schema is None:
            raise _missing("response_format.json_schema.schema")
    elif wanted.type == "json_object" and not any(_speaks_of_json(message) for message in asked.messages):
        raise BadRequest(
            "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
            param="messages",
        )


def _speaks_of_json(message: Message) -> bool:
    if isinstance(message.content, str):
        return "json" in message.content.lower()
    return any("json" in (part.text or "").lower() for part in message.content or ())
