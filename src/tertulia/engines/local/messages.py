"""A conversation as chat templates take it: roles, parts and names of OpenAI's become roles and text.

For a template that knows tools, earlier calls and their answers stay what they are (native); for others
toolcalls.flatten writes them as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import BadRequest
from ..toolcalls import content_text

WHAT = {"image_url": "Images", "input_audio": "Audio", "file": "Files"}


def refuse_parts(messages: Iterable[Any]) -> None:
    """Raises BadRequest for the first content part that is not text; messages are decoded ones."""
    for at, message in enumerate(messages):
        if not isinstance(message.content, list):
            continue
        for index, part in enumerate(message.content):
            if part.type in WHAT:
                raise BadRequest(
                    f"Invalid content type. {WHAT[part.type]} cannot be read by this model, which reads text only.",
                    param=f"messages[{at}].content[{index}]",
                    code="unsupported_value",
                )


def native(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows tools: calls and tool answers stay, legacy ones become such, a `name`, for
    which templates have no place, goes before the text."""
    found: list[dict[str, Any]] = []
    calls = 0
    for at, message in enumerate(messages):
        role, name = message["role"], message.get("name")
        text = content_text(message.get("content"), f"messages[{at}].content") or str(message.get("refusal") or "")
        out: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": text}
        if role == "function":
            out.update(role="tool", tool_call_id=f"call_{calls}", name=name)
        elif role == "tool":
            out["tool_call_id"] = message["tool_call_id"]
        elif name:
            out["content"] = f"{name}: {text}"
        if message.get("function_call"):
            calls += 1
            call = {"id": f"call_{calls}", "type": "function", "function": message["function_call"]}
            out["tool_calls"] = [call]
        elif message.get("tool_calls"):
            out["tool_calls"] = message["tool_calls"]
        found.append(out)
    return found


def joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages at the beginning as one, since many templates allow no more."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    if leading < 2:
        return messages
    text = "\n\n".join(message["content"] for message in messages[:leading] if message["content"])
    return [{"role": "system", "content": text}, *messages[leading:]]


def has_custom_calls(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a custom tool was called earlier: no template has a form for that."""
    return any(call.get("type") == "custom" for message in messages for call in message.get("tool_calls") or ())
