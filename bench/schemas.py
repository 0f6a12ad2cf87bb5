"""Every schema of tests/schemas as a response format and, where it is an object, as a forced tool call, answered by a
real model: how many answers end by themselves, and how many of those validate (must be all).

    python bench/schemas.py                          against OPENAI_BASE_URL with OPENAI_API_KEY
    python bench/schemas.py --direct http://HOST:PORT   against a bare llama.cpp server, with our grammars
Needs the packages openai and jsonschema. Exit code 1 if an answer that ended does not validate, or a schema that
cannot be enforced is not refused.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai

from tertulia.engines import toolcalls
from tertulia.errors import BadRequest

CORPUS = Path(__file__).parent.parent / "tests" / "schemas"
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


def corpus(name: str) -> list[Any]:
    return [json.loads(line) for line in (CORPUS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def cases(every: int) -> list[tuple[str, str, Any]]:
    """(name, "format" or "tool", schema)"""
    found = []
    for line in corpus("enforceable")[::every]:
        found.append((line["name"], "format", line["schema"]))
        if line["schema"].get("type") == "object":
            found.append((line["name"], "tool", line["schema"]))
    return found


def parameters(kind: str, schema: Any) -> dict[str, Any]:
    """What a request says to get an answer of this schema."""
    if kind == "format":
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    tool = {"type": "function", "function": {"name": "answer", "description": "Give the answer", "parameters": schema}}
    return {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "answer"}}}


def ask(client: openai.OpenAI, options: argparse.Namespace, kind: str, schema: Any, seed: int) -> tuple[str, str]:
    """(text of the JSON, finish reason)"""
    asked = parameters(kind, schema)
    messages: Any = [{"role": "user", "content": "Make up an answer. Be brief."}]
    common: dict[str, Any] = {"model": options.model, "max_tokens": options.max_tokens, "seed": seed}
    if not options.direct:
        choice: Any = client.chat.completions.create(messages=messages, **asked, **common).choices[0]
        calls: Any = choice.message.tool_calls
        return (calls[0].function.arguments if calls else choice.message.content or ""), choice.finish_reason
    plan = toolcalls.plan(**asked)
    sent: Any = toolcalls.flatten(messages, plan)
    body = {"grammar": plan.grammar}
    choice = client.chat.completions.create(messages=sent, extra_body=body, **common).choices[0]
    reader = plan.reader()
    events = reader.feed(choice.message.content or "")
    rest, reason = reader.finish(choice.finish_reason)
    text = "".join(event[-1] for event in events + rest if event[0] in ("text", "arguments"))
    return text, reason


def judge(text: str, schema: Any) -> str | None:
    """What is wrong with an answer, None if nothing."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    wrong = next(jsonschema.Draft202012Validator(schema, format_checker=FORMATS).iter_errors(value), None)
    return None if wrong is None else str(wrong.message)


def refusals(client: openai.OpenAI, options: argparse.Namespace) -> int:
    """How many schemas that cannot be enforced were answered all the same."""
    wrong = 0
    for line in corpus("refused"):
        schema = line["schema"]
        try:
            ask(client, options, "format", schema, 1)
        except (openai.BadRequestError, BadRequest) as error:
            if (error.param or "").startswith("response_format"):
                continue
        wrong += 1
        print("not refused:", json.dumps(schema)[:200])
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--direct", metavar="URL", help="a llama.cpp server to ask without a gateway")
    parser.add_argument("--model", default="gpt-4o-mini")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth schema")
    parser.add_argument("--streams", type=int, default=4, help="requests at a time")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.direct + "/v1", api_key="none") if options.direct else openai.OpenAI()
    client = client.with_options(timeout=600)
    counts: collections.Counter[str] = collections.Counter()

    def run(case: tuple[int, tuple[str, str, Any]]) -> None:
        seed, (name, kind, schema) = case
        counts[kind] += 1
        try:
            text, reason = ask(client, options, kind, schema, seed)
        except openai.BadRequestError as error:
            if "context" not in error.message:
                raise
            counts[kind + " too long for the model's context"] += 1
            return
        if reason == "length":
            counts[kind + " cut by length"] += 1
            return
        problem = judge(text, schema)
        counts[kind + (" INVALID" if problem else " valid")] += 1
        if problem:
            print(f"invalid: {kind} {name}: {problem}\n  {text[:300]}\n  {json.dumps(schema)[:300]}", flush=True)

    started = time.monotonic()
    with ThreadPoolExecutor(options.streams) as pool:
        list(pool.map(run, enumerate(cases(options.every))))
    wrong = refusals(client, options)
    for word, count in sorted(counts.items()):
        print(f"{count:6} {word}")
    ended = counts["format valid"] + counts["format INVALID"] + counts["tool valid"] + counts["tool INVALID"]
    good = counts["format valid"] + counts["tool valid"]
    seconds = time.monotonic() - started
    print(f"{ended} ended by themselves, {good} of them validate; {wrong} not refused; {seconds:.0f} s")
    return 1 if wrong or good < ended else 0


if __name__ == "__main__":
    sys.exit(main())
