"""What is refused before it is sent because no tokenizer could make it fit, and what never is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tertulia.api import chat, completions, embeddings
from tertulia.core import NOBODY, Call, Reply
from tertulia.engines.base import Collector
from tertulia.errors import ContextLengthExceeded
from tertulia.gateway.length import refuse_too_long

MAKERS = {"messages": chat, "prompt": completions, "input": embeddings}


def look(param: str, given: Any, longest: int, **more: Any) -> None:
    body = json.dumps({"model": "m", param: given, **more}, ensure_ascii=False).encode()
    call = Call("req_1", NOBODY, MAKERS[param].task(lambda call, model: None), body, Reply(Collector()), 0)
    call.task.check(call)
    refuse_too_long(call, longest)


def said(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": one} for one in content]


@pytest.mark.parametrize(
    ("param", "given", "least"),
    [
        ("messages", said("word " * 60, "more " * 50), 110),
        ("messages", said([{"type": "text", "text": "a-b " * 90}]), 180),
        ("prompt", "word " * 101, 101), ("prompt", ["short", "x" * 32 * 150], 150), ("prompt", [7] * 150, 150),
        ("input", "wörter, " * 101, 101), ("input", ["short", "word " * 110], 110), ("input", [[1], [2] * 200], 200),
    ],
)  # fmt: skip
def test_what_cannot_fit_names_its_parameter_and_a_count(param: str, given: Any, least: int) -> None:
    with pytest.raises(ContextLengthExceeded) as error:
        look(param, given, 100)
    assert error.value.param == param and error.value.code == "context_length_exceeded"
    assert "context length is 100 tokens" in error.value.message and f"least {least} tokens" in error.value.message
    look(param, given, least)


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("messages", said([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A b" * 9999}}])),
        ("messages", said(" " * 9999 + "=" * 9999 + "_" * 9999)),
        ("messages", said("नमस्ते" * 99)), ("prompt", "<|image_pad|>" * 99), ("prompt", "don't " * 99),
        ("prompt", "x" * 3200), ("input", ["word " * 99] * 99),
    ],
)  # fmt: skip
def test_what_may_fit_is_not_refused(param: str, given: Any) -> None:
    look(param, given, 100)


def test_a_long_text_is_not_looked_through_to_its_end() -> None:
    with pytest.raises(ContextLengthExceeded) as error:
        look("prompt", "word " * 1_000_000, 1000)
    least = int(error.value.message.partition("at least ")[2].partition(" ")[0])
    assert 1000 < least < 20_000
