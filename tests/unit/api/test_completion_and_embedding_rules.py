"""Every rule of POST /v1/completions and /v1/embeddings."""

# ruff: noqa: E501  (tables of messages as they are sent)
from __future__ import annotations

from typing import Any

import pytest

from tertulia.api import completions, embeddings
from unit.api.rules import checked, refusal

COMPLETION = completions.task(lambda call, model: None)
EMBEDDING = embeddings.task(lambda call, model: None)
MIXTURE = "expected a string, an array of strings, an array of token ids, or an array of arrays of token ids, but got a mixture."


def too_many(field: str, limit: int, got: int) -> tuple[str, str, str]:
    text = f"Invalid '{field}': integer above maximum value. Expected a value <= {limit}, but got {got} instead."
    return text, field, "integer_above_max_value"


@pytest.mark.parametrize(
    ("fields", "message", "param", "code"),
    [
        ({"prompt": []}, "Invalid 'prompt': empty array. Expected an array with minimum length 1, but got an empty array "
         "instead.", "prompt", "empty_array"),
        ({"prompt": [""] * 2049}, "Invalid 'prompt': array too long. Expected an array with maximum length 2048, but got "
         "an array with length 2049 instead.", "prompt", "array_above_max_length"),
        ({"prompt": ["a", 1]}, f"Invalid type for 'prompt': {MIXTURE}", "prompt", "invalid_type"),
        ({"prompt": [1, [1]]}, f"Invalid type for 'prompt': {MIXTURE}", "prompt", "invalid_type"),
        ({"prompt": [[1], []]}, "Invalid 'prompt': empty array of token ids.", "prompt", "empty_array"),
        ({"prompt": [-1]}, "Invalid 'prompt[0]': integer below minimum value. Expected a value >= 0, but got -1 instead.",
         "prompt[0]", "integer_below_min_value"),
        ({"prompt": [[1, -1]]}, "Invalid 'prompt[0][1]': integer below minimum value. Expected a value >= 0, but got -1 "
         "instead.", "prompt[0][1]", "integer_below_min_value"),
        ({"prompt": 3}, "Invalid type for 'prompt': expected one of a string or an array, but got an integer instead.",
         "prompt", "invalid_type"),
        ({"max_tokens": 0}, "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
         "max_tokens", "integer_below_min_value"),
        ({"max_tokens": -1}, "Invalid 'max_tokens': integer below minimum value. Expected a value >= 0, but got -1 "
         "instead.", "max_tokens", "integer_below_min_value"),
        ({"best_of": 2, "stream": True}, "Results cannot be streamed with 'best_of' > 1.", "best_of", "invalid_value"),
        ({"best_of": 2, "n": 3}, "You requested that the server return more choices than it will generate (HINT: you must "
         "set 'n' (currently 3) to be at most 'best_of' (currently 2)).", "best_of", "invalid_value"),
        ({"stream_options": {}}, "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
         "stream_options", "invalid_value"),
        ({"best_of": 21}, *too_many("best_of", 20, 21)),
        ({"logprobs": 6}, *too_many("logprobs", 5, 6)),
        ({"n": 129}, *too_many("n", 128, 129)),
    ],
)  # fmt: skip
def test_completions_refuse(fields: dict[str, Any], message: str, param: str, code: str) -> None:
    assert refusal(COMPLETION, {"model": "m", **fields}) == (message, param, code)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"prompt": "a"}, {"prompt": ["a", ""]}, {"prompt": [1, 2]}, {"prompt": [[1], [2]]}, {"prompt": None},
        {"prompt": "a", "max_tokens": 0, "echo": True}, {"best_of": 3, "n": 2}, {"best_of": 1, "stream": True},
        {"stream": True, "stream_options": {"include_usage": True}}, {"suffix": "x", "logprobs": 0},
    ],
)  # fmt: skip
def test_completions_let_pass(fields: dict[str, Any]) -> None:
    call = checked(COMPLETION, {"model": "m", **fields})
    assert call.model == "m" and call.stream is bool(fields.get("stream"))


def empty(param: str) -> tuple[str, str, str]:
    return f"Invalid '{param}': input cannot be an empty string.", param, "empty_string"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("Missing required parameter: 'input'.", "input", "missing_required_parameter")),
        ({"input": None}, ("Invalid type for 'input': expected one of a string or an array, but got null instead.",
                           "input", "invalid_type")),
        ({"input": ""}, empty("input")), ({"input": ["a", ""]}, empty("input[1]")), ({"input": [[1], []]}, empty("input[1]")),
        ({"input": []}, ("Invalid 'input': empty array. Expected an array with minimum length 1, but got an empty array "
                         "instead.", "input", "empty_array")),
        ({"input": ["a"] * 2049}, ("Invalid 'input': array too long. Expected an array with maximum length 2048, but got "
                                   "an array with length 2049 instead.", "input", "array_above_max_length")),
        ({"input": ["a", 1]}, (f"Invalid type for 'input': {MIXTURE}", "input", "invalid_type")),
        ({"input": "a", "encoding_format": "x"}, ("Invalid value: 'x'. Supported values are: 'float' and 'base64'.",
                                                  "encoding_format", "invalid_value")),
        ({"input": "a", "dimensions": 0}, ("Invalid 'dimensions': integer below minimum value. Expected a value >= 1, but "
                                           "got 0 instead.", "dimensions", "integer_below_min_value")),
    ],
)  # fmt: skip
def test_embeddings_refuse(fields: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert refusal(EMBEDDING, {"model": "m", **fields}) == expected


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 0], [[1, 2], [0]], " "])
def test_embeddings_let_pass(given: Any) -> None:
    call = checked(EMBEDDING, {"model": "m", "input": given, "stream": True, "truncate": True})
    assert call.asked.input == given and call.stream is False
