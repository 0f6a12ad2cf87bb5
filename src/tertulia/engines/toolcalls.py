"""Tools for models whose chat template knows none: tools become a prompt and a grammar, and what the model then writes
becomes calls again.

    plan(tools, tool_choice, ...) -> Plan     what to add to the prompt, which grammar to obey
    flatten(messages, plan)                   messages with calls and tool answers in them, as plain text messages
    Plan.reader() -> CallReader               feed(text) -> events, finish(reason) -> the finish reason

A call is written `<tool_call>{"name":"f","arguments":{...}}</tool_call>`. The input of a custom tool is raw text, so it
comes last and ends with the answer: `<tool_call>{"name":"f"}`, a line break, the input. Because the grammar admits
nothing else, arguments are valid against their schema as soon as the call is closed, and can be streamed as they come.

With tool_choice auto a small model nearly never opens a call by itself, and a prompt full of functions spoils its plain
answers. So `Plan.choice` offers a first, short question: which function, or none? Its answer picks the plan of the real
request (`Plan.chosen`). `Plan.grammar` decides in one pass, for models that can.

One answer holds one call, or up to MAX_CALLS where `parallel_tool_calls: true` is said and no function is named. (By
OpenAI's default several are allowed; but a small model that may go on repeats the same call to the bound.)

This file does no I/O and knows nothing of HTTP; the shape of chunks is its caller's.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..errors import BadRequest, EngineFailed
from .schemas import MAX_BYTES, check_name, compile_problem, format_rule, function_rule, missing

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128
MAX_CALLS = 4  # calls in one answer: small models repeat themselves without end
NO_FUNCTION = "none"

Event = tuple[Any, ...]
"""("text", str) | ("call", index, id, kind, name) | ("arguments", index, fragment); kind is "function" or "custom"."""

_encode = msgspec.json.Encoder().encode


class Tool(msgspec.Struct, frozen=True):
    """One tool of a request: what the model is told of it, and the Lark rule of its arguments or raw input."""

    kind: str  # "function" or "custom"
    name: str
    description: str
    parameters: dict[str, Any] | None
    rule: str
    param: str  # where it is in the request

    @property
    def head(self) -> str:
        """What begins a call of it, after the opening mark."""
        name = _encode(self.name).decode()
        return f'{{"name":{name}}}\n' if self.kind == "custom" else f'{{"name":{name},"arguments":'


class Choice(msgspec.Struct, frozen=True):
    """A first question to the model: messages and grammar; ask it with temperature 0 and max_tokens as given."""

    messages: list[dict[str, str]]
    grammar: str
    max_tokens: int


class Plan(msgspec.Struct, frozen=True):
    """How a request's tools (and response_format) are put to a model without tools in its template.

    system: text for the system message, None if the model need not hear of tools; grammar: None if anything goes;
    text: whether the answer may be text; calls: whether it may be calls; legacy: the request said functions, so the
    answer says function_call.
    """

    tools: tuple[Tool, ...] = ()
    system: str | None = None
    grammar: str | None = None
    text: bool = True
    calls: bool = False
    legacy: bool = False
    several: bool = False
    answer: str | None = None  # the rule of a textual answer, None if it is free

    def reader(self) -> CallReader:
        return CallReader(self)

    def told(self, clean: Callable[[Any], Any]) -> Plan:
        """The same plan, with what the model is told of the tools made clean; their names and rules stay."""
        tools = tuple(
            msgspec.structs.replace(tool, description=clean(tool.description), parameters=clean(tool.parameters))
            for tool in self.tools
        )
        system = None if self.system is None else describe(tools, self.text)
        return msgspec.structs.replace(self, tools=tools, system=system)

    def choice(self, messages: Sequence[dict[str, Any]]) -> Choice | None:
        """The first question of an `auto` plan, None if there is nothing to decide.

        messages are the request's; only the last is shown. What a tool has answered is told, never asked about again:
        a small model would call for ever.
        """
        last = messages[-1] if messages else {}
        if not (self.text and self.calls) or last.get("role") not in ("user", "system", "developer"):
            return None
        lines = [f"{tool.name}: {_first_line(tool.description) or tool.name.replace('_', ' ')}" for tool in self.tools]
        system = "\n".join(
            ["Decide which function answers the user's message.", *lines, f"{NO_FUNCTION}: anything else"]
        )
        names = " | ".join(_lark(name) for name in (*(tool.name for tool in self.tools), NO_FUNCTION))
        question = content_text(last.get("content"), "messages")
        return Choice(
            [{"role": "system", "content": system}, {"role": "user", "content": question}],
            f"%llguidance {{}}\nstart: {names}\n",
            max(len(tool.name) for tool in self.tools) + 2,
        )

    def chosen(self, answer: str) -> Plan:
        """The plan after the first question: the named function is called, or text is written without tools."""
        for tool in self.tools:
            if tool.name == answer.strip():
                return _assemble(self.tools, (tool,), False, True, self.legacy, False, self.answer)
        return _assemble(self.tools, (), True, False, self.legacy, False, self.answer)


def plan(
    tools: Any = None,
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    functions: Any = None,
    function_call: Any = None,
    response_format: dict[str, Any] | None = None,
) -> Plan:
    """The plan for these parameters, as they are in the request; raises BadRequest naming the wrong one."""
    answer = format_rule(response_format) if response_format else None
    legacy = functions is not None and tools is None
    if tools is None and functions is None:
        for value, param, of in ((tool_choice, "tool_choice", "tools"), (function_call, "function_call", "functions")):
            if value not in (None, "none") and not (param == "tool_choice" and value == "auto"):
                raise _bad(param, f"'{param}' is only allowed when '{of}' are specified.")
        return _assemble((), (), True, False, False, False, answer)
    _refuse_too_much(functions if legacy else tools, "functions" if legacy else "tools")
    read = _read_functions(functions) if legacy else _read_tools(tools)
    mode, some = _legacy_choice(function_call, read) if legacy else _choice(tool_choice, read)
    named = isinstance(tool_choice, dict) and tool_choice.get("type") in ("function", "custom")
    several = not legacy and not named and parallel_tool_calls is True
    return _assemble(read, some, mode != "required", mode != "none", legacy, several, answer)


def _assemble(
    tools: tuple[Tool, ...],
    some: tuple[Tool, ...],
    text: bool,
    calls: bool,
    legacy: bool,
    several: bool,
    answer: str | None,
) -> Plan:
    """A plan in which `some` of the tools may be called."""
    if not calls:
        grammar = f"%llguidance {{}}\nstart: {answer}\n" if answer else None
        return Plan(tools, None, grammar, True, False, legacy, False, answer)
    grammar = call_grammar(some, text, several, answer)
    return Plan(some, describe(some, text), grammar, text, True, legacy, several, answer)


def _refuse_too_much(tools: Any, param: str) -> None:
    """What all schemas of a request hold together is bounded, since they are compiled before anything else happens."""
    size = len(msgspec.json.encode(tools))
    if size > MAX_BYTES:
        raise _bad(param, f"Invalid '{param}': too large. They hold {size} bytes together; {MAX_BYTES} are accepted.")


def _bad(param: str, message: str, code: str = "invalid_value") -> BadRequest:
    return BadRequest(message, param=param, code=code)


def _list(value: Any, param: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        message = f"Invalid type for '{param}': expected an array of objects, but got {type(value).__name__} instead."
        raise _bad(param, message, "invalid_type")
    if not value:
        message = f"Invalid '{param}': empty array. Expected an array with minimum length 1, "
        raise _bad(param, message + "but got an empty array instead.", "empty_array")
    if len(value) > MAX_TOOLS:
        message = f"Invalid '{param}': array too long. Expected an array with maximum length {MAX_TOOLS}, "
        raise _bad(param, message + f"but got an array with length {len(value)} instead.", "array_above_max_length")
    for at, each in enumerate(value):
        if not isinstance(each, dict):
            raise _bad(f"{param}[{at}]", f"Invalid type for '{param}[{at}]': expected an object.", "invalid_type")
    return value


def _read_functions(functions: Any) -> tuple[Tool, ...]:
    return _unique([_function(each, f"functions[{at}]") for at, each in enumerate(_list(functions, "functions"))])


def _read_tools(tools: Any) -> tuple[Tool, ...]:
    read = []
    for at, each in enumerate(_list(tools, "tools")):
        kind, param = each.get("type"), f"tools[{at}]"
        if kind not in ("function", "custom"):
            message = f"Invalid value: {kind!r}. Supported values are: 'function' and 'custom'."
            raise missing(f"{param}.type") if kind is None else _bad(f"{param}.type", message)
        if not isinstance(each.get(kind), dict):
            raise missing(f"{param}.{kind}")
        read.append((_function if kind == "function" else _custom)(each[kind], f"{param}.{kind}"))
    return _unique(read)


def _unique(tools: list[Tool]) -> tuple[Tool, ...]:
    seen: set[str] = set()
    for tool in tools:
        if tool.name in seen:
            raise _bad(f"{tool.param}.name", f"Duplicate tool name: '{tool.name}'.")
        seen.add(tool.name)
    return tuple(tools)


def _named(spec: dict[str, Any], param: str) -> tuple[str, str]:
    if spec.get("name") is None:
        raise missing(f"{param}.name")
    description = spec.get("description") or ""
    if not isinstance(description, str):
        raise _bad(
            f"{param}.description", f"Invalid type for '{param}.description': expected a string.", "invalid_type"
        )
    return check_name(spec["name"], f"{param}.name"), description


def _function(spec: dict[str, Any], param: str) -> Tool:
    name, description = _named(spec, param)
    parameters = spec.get("parameters")
    rule = function_rule(name, parameters, bool(spec.get("strict")), f"{param}.parameters")
    return Tool("function", name, description, parameters or None, rule, param)


def _custom(spec: dict[str, Any], param: str) -> Tool:
    name, description = _named(spec, param)
    form = spec.get("format") or {"type": "text"}
    if form.get("type") == "text":
        return Tool("custom", name, description, None, "/(?s:.+)/", param)
    param = f"{param}.format"
    if form.get("type") != "grammar":
        raise _bad(f"{param}.type", f"Invalid value: {form.get('type')!r}. Supported values are: 'text' and 'grammar'.")
    grammar = form.get("grammar", form)  # chat completions nest it, the Responses API does not
    syntax, definition = grammar.get("syntax"), grammar.get("definition")
    if not isinstance(definition, str):
        raise missing(f"{param}.grammar.definition")
    if syntax == "lark":
        rule = "%lark {\n" + definition + "\n}"
    elif syntax == "regex":
        rule = "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", definition).replace("\n", r"\n") + "/"
    else:
        raise _bad(f"{param}.grammar.syntax", f"Invalid value: {syntax!r}. Supported values are: 'lark' and 'regex'.")
    problem = compile_problem(f"start: raw\nraw: {rule}\n")
    if problem:
        raise _bad(f"{param}.grammar.definition", f"Invalid grammar for custom tool '{name}': {problem}.")
    return Tool("custom", name, description, None, rule, param)


def _choice(tool_choice: Any, tools: tuple[Tool, ...]) -> tuple[str, tuple[Tool, ...]]:
    """(none, auto or required; the tools that may be called)."""
    if tool_choice is None:
        return "auto", tools
    if isinstance(tool_choice, str):
        if tool_choice not in ("none", "auto", "required"):
            message = f"Invalid value: '{tool_choice}'. Supported values are: 'none', 'auto', and 'required'."
            raise _bad("tool_choice", message)
        return tool_choice, tools
    kind = tool_choice.get("type") if isinstance(tool_choice, dict) else None
    if kind in ("function", "custom"):
        return "required", (_find(tool_choice, tools, "tool_choice"),)
    if kind == "allowed_tools":
        allowed = tool_choice.get("allowed_tools", tool_choice)
        param = "tool_choice.allowed_tools"
        if allowed.get("mode") not in ("auto", "required"):
            raise _bad(
                f"{param}.mode", f"Invalid value: {allowed.get('mode')!r}. Supported values are: 'auto' and 'required'."
            )
        listed = _list(allowed.get("tools"), f"{param}.tools")
        return allowed["mode"], tuple(_find(each, tools, f"{param}.tools[{at}]") for at, each in enumerate(listed))
    raise _bad(
        "tool_choice", "Invalid value for 'tool_choice': expected a string or a tool choice object.", "invalid_type"
    )


def _find(reference: dict[str, Any], tools: tuple[Tool, ...], param: str) -> Tool:
    kind = str(reference.get("type"))
    inner = reference.get(kind)
    name = (inner if isinstance(inner, dict) else reference).get("name")
    if name is None:
        raise missing(f"{param}.{kind}.name")
    for tool in tools:
        if tool.name == name and tool.kind == kind:
            return tool
    raise _bad(param, f"Tool choice '{name}' not found in 'tools' parameter.")


def _legacy_choice(function_call: Any, tools: tuple[Tool, ...]) -> tuple[str, tuple[Tool, ...]]:
    if function_call in (None, "auto", "none"):
        return function_call or "auto", tools
    name = function_call.get("name") if isinstance(function_call, dict) else None
    for tool in tools:
        if tool.name == name:
            return "required", (tool,)
    raise _bad(
        "function_call",
        f"Invalid value for 'function_call': no function named {name!r} was specified in the 'functions' parameter.",
    )


def _lark(text: str) -> str:
    """A Lark string literal."""
    return json.dumps(text)


def _text_rule() -> str:
    """A regular expression of text that does not begin with the opening mark."""
    parts = []
    for at, letter in enumerate(OPEN):
        head = re.escape(OPEN[:at])
        parts.append(f"{head}[^{letter}](?s:.*)" + (f"|{head}" if at else ""))
    return "/" + "|".join(parts) + "/"


def call_grammar(tools: Sequence[Tool], text: bool, several: bool, answer: str | None) -> str:
    """The Lark grammar of calls of these tools, or of text if that is possible too."""
    lines = ["%llguidance {}"]
    more = f"{{0,{MAX_CALLS - 1}}}"
    inline = [f"f{at}" for at, tool in enumerate(tools) if tool.kind == "function"]
    raw = [f"f{at}" for at, tool in enumerate(tools) if tool.kind == "custom"]
    ways = []
    if inline:
        lines.append("inline: " + " | ".join(inline))
        ways.append(f'inline ("\\n" inline){more}' if several else "inline")
    if raw:  # raw input has no end of its own, so it is the last call
        lines.append("raw: " + " | ".join(raw))
        ways.append(f'(inline "\\n"){more} raw' if several and inline else "raw")
    for at, tool in enumerate(tools):
        tail = "" if tool.kind == "custom" else " " + _lark("}" + CLOSE)
        lines += [f"f{at}: {_lark(OPEN + tool.head)} a{at}{tail}", f"a{at}: {tool.rule}"]
    if text:
        lines.append("text: " + (answer or _text_rule()))
        ways.append("text")
    return "\n".join([lines[0], "start: " + " | ".join(ways), *lines[1:]]) + "\n"


def describe(tools: Sequence[Tool], text: bool) -> str:
    """What the model is told; short, for contexts are small."""
    lines = ["You can call these functions:"]
    for tool in tools:
        line = f"- {tool.name}"
        if tool.description:
            line += f": {tool.description}"
        if tool.parameters:
            line += f"\n  Parameters: {_encode(_trimmed(tool.parameters)).decode()}"
        lines.append(line)
    forms = []
    if any(tool.kind == "function" for tool in tools):
        forms.append(f'{OPEN}{{"name":"...","arguments":{{...}}}}{CLOSE}')
    if any(tool.kind == "custom" for tool in tools):
        forms.append(f'{OPEN}{{"name":"..."}} followed by a line break and the input')
    how = "If one of them is needed, reply only with" if text else "Reply only with"
    lines.append(f"{how} {' or '.join(forms)}, with values from the user's message.")
    return "\n".join(lines)


def _trimmed(node: Any) -> Any:
    """A schema less what a model does not need to read."""
    if isinstance(node, dict):
        return {
            key: _trimmed(value)
            for key, value in node.items()
            if key not in ("$schema", "$id", "title", "additionalProperties") or not isinstance(value, (str, bool))
        }
    return [_trimmed(each) for each in node] if isinstance(node, list) else node


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200]


def content_text(content: Any, param: str) -> str:
    """Content that is text or parts of text, as one text; raises BadRequest on other parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            message = f"Invalid content type. {kind} is only supported by certain models."
            raise _bad(f"{param}[{at}].type", message)
        texts.append(str(part.get(kind, "")))
    return "\n".join(texts)


def flatten(messages: Sequence[dict[str, Any]], plan: Plan | None = None) -> list[dict[str, str]]:
    """Messages of any role as messages of the roles system, user and assistant with text in them.

    Calls are rendered as the model would write them, tool answers become what the user reports, names a prefix. The
    plan's system text joins the first system message.
    """
    called: dict[str, str] = {}
    flat: list[dict[str, str]] = []
    for at, message in enumerate(messages):
        role = message.get("role", "user")
        text = content_text(message.get("content"), f"messages[{at}].content")
        if role in ("tool", "function"):
            name = message.get("name") if role == "function" else called.get(message.get("tool_call_id") or "")
            report = (
                "<tool_response" + (f" name={_encode(name).decode()}" if name else "") + f">\n{text}\n</tool_response>"
            )
            if flat and flat[-1]["role"] == "user" and flat[-1]["content"].endswith("</tool_response>"):
                flat[-1]["content"] += "\n" + report
            else:
                flat.append({"role": "user", "content": report})
            continue
        if role == "assistant":
            text = _assistant_text(message, text, called)
        elif message.get("name"):
            text = f"{message['name']}: {text}"
        flat.append({"role": "system" if role == "developer" else role, "content": text})
    if plan is not None and plan.system:
        if flat and flat[0]["role"] == "system":
            flat[0]["content"] += "\n\n" + plan.system
        else:
            flat.insert(0, {"role": "system", "content": plan.system})
    return flat


def _assistant_text(message: dict[str, Any], text: str, called: dict[str, str]) -> str:
    """What an earlier answer would have looked like; notes the names of its calls by id."""
    parts = [text or str(message.get("refusal") or "")]
    for call in message.get("tool_calls") or ():
        if call.get("type") == "custom":
            name, written = call["custom"]["name"], call["custom"].get("input", "")
            parts.append(f'{OPEN}{{"name":{_encode(name).decode()}}}\n{written}')
        else:
            name = call["function"]["name"]
            parts.append(_call_text(name, call["function"].get("arguments") or "{}"))
        called[call.get("id") or ""] = name
    legacy = message.get("function_call")
    if legacy:
        parts.append(_call_text(legacy["name"], legacy.get("arguments") or "{}"))
    return "\n".join(part for part in parts if part)


def _call_text(name: str, arguments: str) -> str:
    return f'{OPEN}{{"name":{_encode(name).decode()},"arguments":{arguments}}}{CLOSE}'


_LETTERS = string.ascii_letters + string.digits
_random = random.SystemRandom()


def call_id() -> str:
    return "call_" + "".join(_random.choices(_LETTERS, k=24))


class CallReader:
    """Turns the text that a plan's grammar admits into events, as it comes, however it is split.

    Raises EngineFailed when the text is none that the grammar admits: then the engine did not obey it, and what it
    wrote must not pass for an answer.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.heads = {tool.head: tool for tool in plan.tools} if plan.calls else {}
        self.state = "start" if plan.calls else "text"
        self.held = ""  # what came and cannot be understood yet
        self.index = -1  # of the current call
        self.depth = 0  # of brackets in the current arguments
        self.quoted = self.escaped = False
        self.complete = 0  # calls that ended

    def feed(self, text: str) -> list[Event]:
        """The events that this piece of the answer completes."""
        events: list[Event] = []
        self.held += text
        while self.held and getattr(self, "_" + self.state)(events):
            pass
        return events

    def finish(self, reason: str) -> tuple[list[Event], str]:
        """What was held back, and the finish reason; `reason` is the engine's ("stop" or "length")."""
        events: list[Event] = []
        if self.state == "start" and self.held:
            if not self.plan.text and reason == "stop":
                raise EngineFailed()
            if self.plan.text:
                events.append(("text", self.held))
        self.held = ""
        if self.state == "raw" and reason == "stop":
            self.complete += 1
        if self.state in ("text", "start") or (self.state != "between" and self.state != "raw"):
            return events, reason
        done = "function_call" if self.plan.legacy else "tool_calls"
        return events, done if reason == "stop" and self.complete else reason

    # Each state takes from self.held, and says whether to go on with what is left.

    def _start(self, events: list[Event]) -> bool:
        if self.held.startswith(OPEN):
            self.held, self.state = self.held[len(OPEN) :], "head"
            return True
        if OPEN.startswith(self.held):
            return False
        if not self.plan.text:
            raise EngineFailed()
        self.state = "text"
        return True

    def _text(self, events: list[Event]) -> bool:
        events.append(("text", self.held))
        self.held = ""
        return False

    def _head(self, events: list[Event]) -> bool:
        for head, tool in self.heads.items():
            if self.held.startswith(head):
                self.held = self.held[len(head) :]
                self.index += 1
                events.append(("call", self.index, call_id(), tool.kind, tool.name))
                self.state = "raw" if tool.kind == "custom" else "arguments"
                self.depth, self.quoted, self.escaped = 0, False, False
                return True
        if any(head.startswith(self.held) for head in self.heads):
            return False
        raise EngineFailed()

    def _raw(self, events: list[Event]) -> bool:
        events.append(("arguments", self.index, self.held))
        self.held = ""
        return False

    def _arguments(self, events: list[Event]) -> bool:
        end = self._end_of_object(self.held)
        if end:
            events.append(("arguments", self.index, self.held[:end]))
            self.held, self.state = self.held[end:], "tail"
            return True
        events.append(("arguments", self.index, self.held))
        self.held = ""
        return False

    def _end_of_object(self, text: str) -> int:
        """Where in the text the arguments end, 0 if later."""
        for at, letter in enumerate(text):
            if self.quoted:
                if self.escaped:
                    self.escaped = False
                elif letter == "\\":
                    self.escaped = True
                elif letter == '"':
                    self.quoted = False
            elif letter == '"':
                self.quoted = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if not self.depth:
                    return at + 1
            elif not self.depth:
                raise EngineFailed()
        return 0

    def _tail(self, events: list[Event]) -> bool:
        if self._take("}" + CLOSE):
            self.complete += 1
            self.state = "between"
            return True
        return False

    def _between(self, events: list[Event]) -> bool:
        if self._take("\n" + OPEN):
            self.state = "head"
            return True
        return False

    def _take(self, expected: str) -> bool:
        if self.held.startswith(expected):
            self.held = self.held[len(expected) :]
            return True
        if not expected.startswith(self.held):
            raise EngineFailed()
        return False
