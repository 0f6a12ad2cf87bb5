"""Tools become a grammar and a prompt, and what the model wrote becomes calls again, however it is split."""

# ruff: noqa: E501 - tables of cases read better one case a line
from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tertulia.engines import toolcalls
from tertulia.errors import BadRequest, EngineFailed
from walks import admits

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        "required": ["location"],
    },
}
TOOLS = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "now"}},
    {"type": "custom", "custom": {"name": "shell", "description": "Run a command"}},
]
FUNCTIONS = TOOLS[:2]
NAMED = {"type": "function", "function": {"name": "now"}}


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name":"{name}","arguments":{arguments}}}</tool_call>'


BOSTON = call("get_weather", '{"location":"Boston"}')
NOW = call("now")
SHELL = '<tool_call>{"name":"shell"}\nls -l </tool_call>\n{"x"'


@pytest.mark.parametrize(
    ("options", "yes", "no"),
    [
        ({}, [BOSTON, NOW, SHELL, "Hello <b>", "<tool_cal", "<div>", "<tool"],
         ["", NOW + "x", "<tool_call>", call("other"), call("get_weather"), call("now", '{"a":1}'), f"{NOW}\n{NOW}"]),
        ({"parallel_tool_calls": True}, [BOSTON, f"{NOW}\n{BOSTON}", f"{NOW}\n{SHELL}", "Hi"], ["\n".join([NOW] * 5)]),
        ({"tool_choice": "auto"}, [BOSTON, "Hi"], [BOSTON + BOSTON]),
        ({"tool_choice": "required", "parallel_tool_calls": True}, [NOW, SHELL, "\n".join([NOW] * 4)], ["Hi", "\n".join([NOW] * 5)]),
        ({"tool_choice": "required"}, [BOSTON, NOW, SHELL], ["Hi", "", f"{NOW}\n{NOW}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [BOSTON, SHELL], [f"{NOW}\n{NOW}", f"{NOW}\n{SHELL}"]),
        ({"tool_choice": NAMED, "parallel_tool_calls": True}, [NOW], [BOSTON, "Hi", f"{NOW}\n{NOW}"]),
        ({"tool_choice": {"type": "custom", "custom": {"name": "shell"}}}, [SHELL], [NOW]),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, [NOW, "Hi"], [BOSTON]),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}}, [NOW], ["Hi", BOSTON]),
        ({"response_format": {"type": "json_object"}}, [NOW, '{"a":1}'], ["Hi"]),
    ],
)  # fmt: skip
def test_what_each_choice_admits(options: dict[str, Any], yes: list[str], no: list[str]) -> None:
    made = toolcalls.plan(TOOLS, **options)
    for text in yes:
        assert admits(made.grammar, text), text
    for text in no:
        assert not admits(made.grammar, text), text


def test_none_shows_no_tools() -> None:
    made = toolcalls.plan(TOOLS, "none")
    assert (made.system, made.grammar, made.text, made.calls) == (None, None, True, False)
    assert made.reader().feed(NOW) == [("text", NOW)]
    formatted = toolcalls.plan(TOOLS, "none", response_format={"type": "json_object"})
    assert admits(formatted.grammar, '{"a":1}') and not admits(formatted.grammar, NOW)


def test_custom_grammars_are_obeyed() -> None:
    lark = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: NUM ("+" NUM)*\nNUM: /[0-9]+/'}}
    regex = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]+/[0-9]{2}"}}
    tools = [
        {"type": "custom", "custom": {"name": "sum", "format": lark}},
        {"type": "custom", "custom": {"name": "path", "format": regex}},
    ]
    made = toolcalls.plan(tools, "required")
    assert admits(made.grammar, '<tool_call>{"name":"sum"}\n1+22')
    assert admits(made.grammar, '<tool_call>{"name":"path"}\nab/12')
    assert not admits(made.grammar, '<tool_call>{"name":"sum"}\nab/12')
    broken = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: nothing"}}
    with pytest.raises(BadRequest) as caught:
        toolcalls.plan([{"type": "custom", "custom": {"name": "c", "format": broken}}])
    assert caught.value.param == "tools[0].custom.format.grammar.definition"


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"tools": []}, "tools", "empty_array"),
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tools": FUNCTIONS * 65}, "tools", "array_above_max_length"),
        ({"tools": [{}]}, "tools[0].type", "missing_required_parameter"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing_required_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [FUNCTIONS[0], FUNCTIONS[0]]}, "tools[1].function.name", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools[0].function.parameters", "invalid_function_parameters"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", "missing_required_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"functions": [WEATHER], "function_call": {"name": "x"}}, "function_call", "invalid_value"),
        ({"function_call": {"name": "x"}}, "function_call", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(options: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        toolcalls.plan(**options)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_legacy_functions() -> None:
    made = toolcalls.plan(functions=[WEATHER], function_call={"name": "get_weather"})
    assert made.legacy and not made.text
    assert admits(made.grammar, BOSTON) and not admits(made.grammar, f"{BOSTON}\n{BOSTON}")
    reader = made.reader()
    reader.feed(BOSTON)
    assert reader.finish("stop") == ([], "function_call")
    assert toolcalls.plan(functions=[WEATHER], function_call="none").grammar is None
    assert toolcalls.plan(functions=[WEATHER]).text


def read(made: toolcalls.Plan, pieces: list[str], reason: str = "stop") -> tuple[list[Any], str]:
    """Events with their fragments joined and their ids left out, and the finish reason."""
    reader = made.reader()
    events = [event for piece in pieces for event in reader.feed(piece)]
    last, finish = reader.finish(reason)
    joined: list[Any] = []
    for event in events + last:
        if event[0] == "call":
            assert re.fullmatch(r"call_[A-Za-z0-9]{24}", event[2])
            event = (*event[:2], *event[3:])
        if (
            joined
            and event[0] == joined[-1][0]
            and event[0] in ("text", "arguments")
            and event[1:-1] == joined[-1][1:-1]
        ):
            joined[-1] = (*joined[-1][:-1], joined[-1][-1] + event[-1])
        else:
            joined.append(event)
    return joined, finish


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)


@given(
    calls=st.lists(st.tuples(st.sampled_from(["get_weather", "now"]), arguments), min_size=1, max_size=3),
    raw=st.none() | st.text(min_size=1, max_size=20),
    data=st.data(),
)
def test_calls_are_read_under_every_split(calls: list[tuple[str, str]], raw: str | None, data: st.DataObject) -> None:
    text = "\n".join(call(*each) for each in calls)
    expected: list[Any] = []
    for index, (name, written) in enumerate(calls):
        expected += [("call", index, "function", name), ("arguments", index, written)]
    if raw is not None:
        text += '\n<tool_call>{"name":"shell"}\n' + raw
        expected += [("call", len(calls), "custom", "shell"), ("arguments", len(calls), raw)]
    made = toolcalls.plan(TOOLS)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[low:high] for low, high in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(made, pieces) == (expected, "tool_calls")
    assert read(made, list(text)) == (expected, "tool_calls")


@given(
    text=st.text(max_size=20) | st.sampled_from(["<", "<tool", "<tool_calls>", "<b>", "a<tool_call>"]),
    reason=st.sampled_from(["stop", "length"]),
)
def test_text_passes_under_every_split(text: str, reason: str) -> None:
    made = toolcalls.plan(TOOLS)
    if text.startswith("<tool_call>"):
        return
    expected = [("text", text)] if text else []
    assert read(made, list(text), reason) == (expected, reason)
    assert read(made, [text], reason) == (expected, reason)


def test_text_passes_at_once_and_arguments_stream() -> None:
    reader = toolcalls.plan(TOOLS).reader()
    assert reader.feed("<to") == []
    assert reader.feed("ast>") == [("text", "<toast>")]
    assert reader.feed("<tool_call>") == [("text", "<tool_call>")]
    reader = toolcalls.plan(TOOLS, "required").reader()
    assert reader.feed('<tool_call>{"name":"get_weather","argum') == []
    assert [event[0] for event in reader.feed('ents":{"loc')] == ["call", "arguments"]
    assert reader.feed('ation":"}') == [("arguments", 0, 'ation":"}')]


@pytest.mark.parametrize("cut", range(len(BOSTON)))
def test_cut_by_length_keeps_what_came(cut: int) -> None:
    events, finish = read(toolcalls.plan(TOOLS, "required"), [BOSTON[:cut]], "length")
    assert finish == "length"
    written = "".join(event[-1] for event in events if event[0] == "arguments")
    assert '{"location":"Boston"}'.startswith(written)
    assert all(event[0] != "text" for event in events)


@pytest.mark.parametrize(
    "text", ["Hi", "<tool_call>x", call("other"), NOW + "!", '<tool_call>{"name":"now","arguments":7']
)
def test_an_engine_that_does_not_obey_is_found_out(text: str) -> None:
    reader = toolcalls.plan(TOOLS, "required").reader()
    with pytest.raises(EngineFailed):
        reader.feed(text)
        reader.finish("stop")


def test_the_first_question() -> None:
    made = toolcalls.plan(TOOLS)
    choice = made.choice([{"role": "user", "content": [{"type": "text", "text": "Weather in Boston?"}]}])
    assert choice is not None and choice.messages[1]["content"].endswith("Weather in Boston?")
    assert "get_weather: Get the current weather" in choice.messages[0]["content"]
    assert (
        admits(choice.grammar, "get_weather") and admits(choice.grammar, "none") and not admits(choice.grammar, "Sure")
    )
    called = made.chosen("get_weather")
    assert admits(called.grammar, BOSTON) and not admits(called.grammar, "Hi") and not admits(called.grammar, NOW)
    plain = made.chosen("none")
    assert (plain.system, plain.grammar) == (None, None)
    for other in (toolcalls.plan(TOOLS, "required"), toolcalls.plan(TOOLS, "none"), toolcalls.plan()):
        assert other.choice([{"role": "user", "content": "x"}]) is None
    assert made.choice([{"role": "tool", "tool_call_id": "c", "content": "x"}]) is None


def test_flatten() -> None:
    made = toolcalls.plan(TOOLS, "required")
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "name": "ann", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"location":"Boston"}'}},
            {"id": "b", "type": "custom", "custom": {"name": "shell", "input": "ls"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "12 C"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "file"}]},
        {"role": "assistant", "content": "So.", "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
    ]  # fmt: skip
    assert made.system is not None
    assert toolcalls.flatten(messages, made) == [
        {"role": "system", "content": "Be\nbrief\n\n" + made.system},
        {"role": "user", "content": "ann: Weather?"},
        {"role": "assistant", "content": BOSTON + '\n<tool_call>{"name":"shell"}\nls'},
        {"role": "user", "content": '<tool_response name="get_weather">\n12 C\n</tool_response>\n<tool_response name="shell">\nfile\n</tool_response>'},
        {"role": "assistant", "content": "So.\n" + NOW},
        {"role": "user", "content": '<tool_response name="now">\nnoon\n</tool_response>'},
    ]  # fmt: skip
    assert toolcalls.flatten([{"role": "user", "content": "x"}], made)[0] == {"role": "system", "content": made.system}
    assert toolcalls.flatten([{"role": "user", "content": "x"}]) == [{"role": "user", "content": "x"}]
    with pytest.raises(BadRequest) as caught:
        toolcalls.flatten([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert caught.value.param == "messages[0].content[0].type"
