"""The rules of a chat request that hold between its parameters, which types, ranges and lengths cannot say: what chat's
structs carry is checked by then. Each is a BadRequest that names the parameter, in OpenAI's words.

Every request passes here: one of the modules that are compiled (setup.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..core import Call
from ..errors import BadRequest
from .decode import SKIMMED, decode, skim

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def checker(decoder: Any, resolve: Callable[[Call, str], None]) -> Callable[[Call], None]:
    """A Task's check: decodes the body by decoder (of chat.Chat), applies the rules, has the model's name resolved."""

    def whole(body: bytes) -> Any:
        return decode(decoder, body)

    def check(call: Call) -> None:
        asked: Any = skim(decoder, call.body) if len(call.body) > SKIMMED else None
        if asked is None:
            call.asked = asked = decode(decoder, call.body)
        else:
            call.shape, call.reread = asked, whole
        call.model, call.stream = asked.model, bool(asked.stream)
        _check_options(asked)
        _check_messages(asked.messages)
        if asked.tools is not None or asked.tool_choice is not None or asked.functions or asked.function_call:
            _check_tools(asked)
        if asked.response_format is not None:
            _check_format(call.asked)
        resolve(call, asked.model)

    return check


def _check_options(asked: Any) -> None:
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


def _check_messages(messages: list[Any]) -> None:
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


def _check_calls(calls: list[Any], at: int) -> None:
    for index, call in enumerate(calls):
        if getattr(call, call.type) is None:
            raise _missing(f"messages[{at}].tool_calls[{index}].{call.type}")


def _check_tool_message(message: Any, waiting: list[str], at: int) -> None:
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


def _check_parts(message: Any, at: int) -> None:
    for index, part in enumerate(message.content or ()):
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


def _check_tools(asked: Any) -> None:
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


def _check_format(asked: Any) -> None:
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


def _speaks_of_json(message: Any) -> bool:
    if isinstance(message.content, str):
        return "json" in message.content.lower()
    return any("json" in (part.text or "").lower() for part in message.content or ())
