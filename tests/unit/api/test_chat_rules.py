"""Every rule of POST /v1/chat/completions: what it refuses, with message, param and code; what it lets pass."""

# ruff: noqa: E501  (tables of messages as they are sent)
from __future__ import annotations

from typing import Any

import pytest

from tertulia.api import chat
from tertulia.core import Call
from unit.api.rules import checked, refusal

TASK = chat.task(lambda call, model: None)
HELLO = {"role": "user", "content": "Hello"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SHELL = {"type": "custom", "custom": {"name": "shell"}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
ASKED = {"role": "assistant", "tool_calls": [CALLED]}
TOLD = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [HELLO], **fields}


def talk(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages)}


def below(noun: str, sign: str, limit: int, got: int) -> str:
    side = "below minimum" if sign == ">=" else "above maximum"
    return f"{noun} {side} value. Expected a value {sign} {limit}, but got {got} instead."


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -1, below("decimal", ">=", 0, -1)), ("temperature", 3, below("decimal", "<=", 2, 3)),
        ("top_p", -1, below("decimal", ">=", 0, -1)), ("top_p", 2, below("decimal", "<=", 1, 2)),
        ("presence_penalty", -3, below("decimal", ">=", -2, -3)), ("presence_penalty", 3, below("decimal", "<=", 2, 3)),
        ("frequency_penalty", -3, below("decimal", ">=", -2, -3)), ("frequency_penalty", 3, below("decimal", "<=", 2, 3)),
        ("n", 0, below("integer", ">=", 1, 0)), ("n", 129, below("integer", "<=", 128, 129)),
        ("max_tokens", 0, below("integer", ">=", 1, 0)), ("max_completion_tokens", 0, below("integer", ">=", 1, 0)),
        ("top_logprobs", -1, below("integer", ">=", 0, -1)), ("top_logprobs", 21, below("integer", "<=", 20, 21)),
        ("seed", 2**63, below("integer", "<=", 2**63 - 1, 2**63)),
    ],
)  # fmt: skip
def test_ranges(field: str, value: int, said: str) -> None:
    noun, side = said.split()[:2]
    code = f"{noun}_{'below_min' if side == 'below' else 'above_max'}_value"
    assert refusal(TASK, body(logprobs=True, **{field: value})) == (f"Invalid '{field}': {said}", field, code)


@pytest.mark.parametrize(
    ("fields", "message", "param", "code"),
    [
        ({"model": ""}, "Invalid 'model': empty string. Expected a non-empty string, but got a string with length 0 "
         "instead.", "model", "empty_string"),
        ({"model": None}, "Invalid type for 'model': expected a string, but got null instead.", "model", "invalid_type"),
        ({"messages": []}, "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty "
         "array instead.", "messages", "empty_array"),
        ({"stop": ["a"] * 5}, "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array "
         "with length 5 instead.", "stop", "array_above_max_length"),
        ({"logit_bias": {"1": 0, "2": 101}}, "Invalid 'logit_bias.2': decimal above maximum value. Expected a value <= "
         "100, but got 101 instead.", "logit_bias.2", "decimal_above_max_value"),
        ({"metadata": {"a": "b" * 600}}, "Invalid 'metadata.a': string too long. Expected a string with maximum length "
         "512, but got a string with length 600 instead.", "metadata.a", "string_above_max_length"),
        ({"metadata": {"a" * 65: "b"}}, "Invalid key in 'metadata': string too long. Expected a string with maximum "
         "length 64, but got a string with length 65 instead.", "metadata", "string_above_max_length"),
        ({"metadata": {str(i): "" for i in range(17)}}, "Invalid 'metadata': too many properties. Expected an object with "
         "at most 16 properties, but got an object with 17 properties instead.", "metadata",
         "object_above_max_properties"),
        ({"user": "a" * 1025}, "Invalid 'user': string too long. Expected a string with maximum length 1024, but got a "
         "string with length 1025 instead.", "user", "string_above_max_length"),
        ({"tools": [WEATHER] * 129}, "Invalid 'tools': array too long. Expected an array with maximum length 128, but got "
         "an array with length 129 instead.", "tools", "array_above_max_length"),
        ({"service_tier": "x"}, "Invalid value: 'x'. Supported values are: 'auto', 'default', 'flex', 'scale', "
         "'priority', and 'fast'.", "service_tier", "invalid_value"),
        ({"reasoning_effort": "x"}, "Invalid value: 'x'. Supported values are: 'none', 'minimal', 'low', 'medium', "
         "'high', 'xhigh', and 'max'.", "reasoning_effort", "invalid_value"),
        ({"verbosity": "x"}, "Invalid value: 'x'. Supported values are: 'low', 'medium', and 'high'.", "verbosity",
         "invalid_value"),
        ({"modalities": ["x"]}, "Invalid value: 'x'. Supported values are: 'text' and 'audio'.", "modalities[0]",
         "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "The 'stream_options' parameter is only allowed when 'stream' is "
         "enabled.", "stream_options", "invalid_value"),
        ({"top_logprobs": 2}, "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs",
         "invalid_value"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "Setting 'max_tokens' and 'max_completion_tokens' at the same time "
         "is not supported.", "max_tokens", "invalid_parameter_combination"),
    ],
)  # fmt: skip
def test_options(fields: dict[str, Any], message: str, param: str, code: str) -> None:
    assert refusal(TASK, body(**fields)) == (message, param, code)


def missing(param: str) -> tuple[str, str, str]:
    return f"Missing required parameter: '{param}'.", param, "missing_required_parameter"


def no_content(at: int) -> tuple[str, str, str]:
    param = f"messages[{at}].content"
    return f"Invalid value for 'content': expected a string, got null. ({param})", param, "invalid_type"


def unanswered(at: int, ids: str) -> tuple[str, str, None]:
    text = (
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. "
        f"The following tool_call_ids did not have response messages: {ids}"
    )
    return text, f"messages[{at}].tool_calls", None


STRAY = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"content": "x"}], missing("messages[0].role")),
        ([{"role": "user"}], no_content(0)),
        ([{"role": "system", "content": None}], no_content(0)),
        ([HELLO, {"role": "assistant"}], no_content(1)),
        ([HELLO, {"role": "assistant", "tool_calls": []}], no_content(1)),
        ([{"role": "function", "content": "x"}], missing("messages[0].name")),
        ([HELLO, ASKED], unanswered(1, "call_1")),
        ([HELLO, ASKED, HELLO, TOLD], unanswered(1, "call_1")),
        ([{"role": "assistant", "tool_calls": [CALLED, {**CALLED, "id": "b"}]}, TOLD], unanswered(0, "b")),
        ([TOLD], (STRAY, "messages[0].role", None)),
        ([HELLO, ASKED, TOLD, TOLD], (STRAY, "messages[3].role", None)),
        ([HELLO, ASKED, {"role": "tool", "content": "x"}], missing("messages[2].tool_call_id")),
        ([HELLO, ASKED, {**TOLD, "content": None}], no_content(2)),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], missing("messages[0].tool_calls[0].function")),
        ([{"role": "assistant", "tool_calls": [{"id": "a", "type": "custom"}]}], missing("messages[0].tool_calls[0].custom")),
        ([{"role": "user", "content": [{"type": "text"}]}], missing("messages[0].content[0].text")),
        ([{"role": "system", "content": [{"type": "image_url", "image_url": {"url": ""}}]}], (
            "Invalid 'messages[0].content[0]': content of type 'image_url' is only allowed in messages with role 'user'.",
            "messages[0].content[0].type", "invalid_value")),
        ([HELLO, ASKED, {**TOLD, "content": [{"type": "text"}]}], missing("messages[2].content[0].text")),
    ],
)  # fmt: skip
def test_messages(messages: list[dict[str, Any]], expected: tuple[str, str, str | None]) -> None:
    assert refusal(TASK, talk(*messages)) == expected


def name(param: str) -> tuple[str, str, str]:
    text = "string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]{1,64}$'."
    return f"Invalid '{param}': {text}", param, "invalid_value"


def value(given: str, supported: str, param: str) -> tuple[str, str, str]:
    return f"Invalid value: '{given}'. Supported values are: {supported}.", param, "invalid_value"


def stranger(param: str, given: str = "time") -> tuple[str, str, str]:
    return (
        f"Invalid value for '{param}.name': '{given}' is not one of the tools given.",
        f"{param}.name",
        "invalid_value",
    )


def allowed(mode: str = "auto", *tools: Any) -> dict[str, Any]:
    return {
        "tools": [WEATHER],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}},
    }


FUNCTION = {"name": "weather", "parameters": {}}
NAMED = {"type": "function", "function": {"name": "time"}}
KINDS = "'function', 'custom', and 'allowed_tools'"
WHERE = "tool_choice.allowed_tools"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [{"type": "function"}]}, missing("tools[0].function")),
        ({"tools": [WEATHER, {"type": "custom"}]}, missing("tools[1].custom")),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, name("tools[0].function.name")),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, name("tools[0].function.name")),
        ({"tools": [{"type": "custom", "custom": {"name": "a" * 65}}]}, name("tools[0].custom.name")),
        ({"tools": [{"type": "x"}]}, value("x", "'function' and 'custom'", "tools[0].type")),
        ({"functions": [{"name": "a.b"}]}, name("functions[0].name")),
        ({"functions": [FUNCTION], "tools": [WEATHER]},
         ("'functions' and 'tools' are mutually exclusive.", "functions", "invalid_value")),
        ({"tool_choice": "auto"}, ("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice", None)),
        ({"function_call": "auto"},
         ("'function_call' is only allowed when 'functions' are specified.", "function_call", None)),
        ({"tools": [WEATHER], "tool_choice": "any"}, value("any", "'none', 'auto', and 'required'", "tool_choice")),
        ({"tools": [WEATHER], "tool_choice": {"type": "x"}}, value("x", KINDS, "tool_choice.type")),
        ({"tools": [WEATHER], "tool_choice": {}}, value("None", KINDS, "tool_choice.type")),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, missing("tool_choice.function.name")),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}, missing("tool_choice.function.name")),
        ({"tools": [WEATHER], "tool_choice": NAMED}, stranger("tool_choice.function")),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, missing(WHERE)),
        (allowed("x"), value("x", "'auto' and 'required'", f"{WHERE}.mode")),
        (allowed("auto"), missing(f"{WHERE}.tools")),
        (allowed("auto", {"type": "x"}), value("x", "'function' and 'custom'", f"{WHERE}.tools[0].type")),
        (allowed("auto", 3), value("None", "'function' and 'custom'", f"{WHERE}.tools[0].type")),
        (allowed("auto", NAMED), stranger(f"{WHERE}.tools[0].function")),
        ({"functions": [FUNCTION], "function_call": "required"}, value("required", "'none' and 'auto'", "function_call")),
        ({"functions": [FUNCTION], "function_call": {"name": "time"}}, stranger("function_call")),
        ({"functions": [FUNCTION], "function_call": {}}, missing("function_call.name")),
        ({"response_format": {"type": "json_schema"}}, missing("response_format.json_schema")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
         name("response_format.json_schema.name")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
         missing("response_format.json_schema.schema")),
        ({"response_format": {"type": "json_object"}},
         ("'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
          "messages", None)),
    ],
)  # fmt: skip
def test_tools_and_formats(fields: dict[str, Any], expected: tuple[str, str, str | None]) -> None:
    assert refusal(TASK, body(**fields)) == expected


@pytest.mark.parametrize(
    "given",
    [
        talk({"role": "developer", "content": "Be brief."}, {"role": "system", "content": ""}, {**HELLO, "name": "Ann"}),
        talk(HELLO, ASKED, TOLD, HELLO),
        talk(HELLO, {"role": "assistant", "tool_calls": [CALLED, {**CALLED, "id": "b"}]}, {**TOLD, "tool_call_id": "b"}, TOLD),
        talk(HELLO, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
             {"role": "function", "name": "f", "content": None}),
        talk({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}),
        talk({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}),
        body(tools=[WEATHER, SHELL], tool_choice={"type": "custom", "custom": {"name": "shell"}}),
        body(**allowed("required", {"type": "function", "function": {"name": "weather"}})),
        body(tool_choice="none"), body(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False),
        body(functions=[FUNCTION], function_call={"name": "weather"}),
        body(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}}),
        {**talk({"role": "user", "content": [{"type": "text", "text": "As JSON"}]}), "response_format": {"type": "json_object"}},
        body(**dict.fromkeys(["temperature", "n", "stop", "tools", "metadata", "stream", "max_tokens", "logit_bias"])),
        body(stop="x"), body(stop=[]), body(top_logprobs=0, logprobs=True), body(unheard_of={"a": [1]}),
    ],
)  # fmt: skip
def test_what_passes(given: dict[str, Any]) -> None:
    assert checked(TASK, given).model == "m"


def test_check_fills_in_the_call_and_asks_what_the_name_means() -> None:
    asked: list[tuple[Call, str]] = []
    call = checked(chat.task(lambda call, model: asked.append((call, model))), body(stream=True, n=2))
    assert asked == [(call, "m")] and call.stream is True and call.asked.n == 2
    assert checked(TASK, body(stream=None)).stream is False
