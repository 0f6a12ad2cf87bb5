"""The fault matrix: every way an upstream can fail, at every time, under every policy, for every task, over real
sockets. tests/faults/outcomes.py says what must become of each; nothing here knows how the gateway does it.

All calls are made once, many at a time, against one server; the tests then look at what became of each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

import mock_upstream
from conftest import Served, serve
from faults.outcomes import RETRIES, Cell, Outcome, cells, expected
from wire_client import Answer, ask, body_of, request, text_of

TOKENS = 10  # of every answer of the mock
TOTAL = 3.0  # seconds a call may take
SLACK = 0.5  # and how much later its end may reach a client on a busy machine
AT_ONCE = 40
POSSIBLE = [cell for cell in cells() if not cell.impossible]
WHOLE = mock_upstream.spoken(0, TOKENS)

SETTINGS = """
chat_model = "mock"
embedding_model = "mock-embedding"
access_log = "{data}/access.log"
request_timeout = {total}
retries = {retries}
retry_budget = 10.0
breaker_failures = 100000
cache = "off"
coalesce = false
"""
UPSTREAM = """
[upstreams.{name}]
base_url = "{base_url}"
connect_timeout = 0.5
first_byte_timeout = 0.7
stall_timeout = 0.7
{tls}
models = {{ {models} }}
"""
ROUTE = """
[routes."{name}"]
targets = [{{ model = "bad-{name}" }}]
"""


@dataclass
class World:
    """The server, the upstreams behind it, and what became of every call."""

    served: Served
    first: mock_upstream.Mock
    secure: mock_upstream.Mock
    spare: mock_upstream.Mock
    answers: dict[Cell, Answer | BaseException]
    ledger: dict[str, list[dict[str, Any]]]
    log: dict[str, list[dict[str, Any]]]
    asked: dict[str, int]  # requests by model name, as the upstreams saw them

    def answer(self, cell: Cell) -> Answer:
        answer = self.answers[cell]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def upstream_of(cell: Cell) -> str:
    """Which of the upstreams has the cell's target."""
    if cell.fault == "tls":
        return "untrusted" if cell.when == "before" else "secure"
    return {"refused": "refused", "dns": "nowhere"}.get(cell.fault, "first")


def theirs(cell: Cell) -> str:
    return f"fault:{cell.fault}@{cell.when}/{cell.name}"


def configuration(data: Path, urls: dict[str, str]) -> str:
    models: dict[str, list[str]] = {name: [] for name in urls}
    routes = ""
    for cell in POSSIBLE:
        models[upstream_of(cell)].append(f'"bad-{cell.name}" = "{theirs(cell)}"')
        routes += ROUTE.format(name=cell.name)
        if cell.mode != "one":
            models["spare"].append(f'"good-{cell.name}" = "good/{cell.name}"')
            routes += f'fallback = ["good-{cell.name}"]\n'
        if cell.mode == "continue":
            routes += 'on_break = "continue"\n'
    text = SETTINGS.format(data=data, total=TOTAL, retries=RETRIES)
    for name, url in urls.items():
        tls = f'tls_ca = "{mock_upstream.CERTIFICATE}"' if name == "secure" else ""
        text += UPSTREAM.format(name=name, base_url=url, tls=tls, models=", ".join(models[name]))
    return text + routes


async def ask_all(served: Served) -> dict[Cell, Answer | BaseException]:
    port = int(served.root.rpartition(":")[2])
    room = asyncio.Semaphore(AT_ONCE)

    async def one(cell: Cell) -> Answer:
        async with room:
            sent = request(served.api_key, cell.task, body_of(cell.task, cell.name, cell.stream))
            return await ask(port, sent, TOTAL + 5)

    done = await asyncio.gather(*(one(cell) for cell in POSSIBLE), return_exceptions=True)
    return dict(zip(POSSIBLE, done, strict=True))


def by_id(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of the ledger or of the access log, by request id."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().rstrip("\0").splitlines():  # a journal in use has room kept behind its last line
        entry = json.loads(line)
        found.setdefault(entry["id"], []).append(entry)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    data = tmp_path_factory.mktemp("matrix")
    options = ("--chunks", str(TOKENS), "--gap", "0.005", "--drip", "0.02", "--retry-after", "0.2")
    with contextlib.ExitStack() as stack:
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: who connects is refused
        tls = ("--tls", str(mock_upstream.CERTIFICATE), str(mock_upstream.KEY))
        first, secure, spare = (stack.enter_context(mock_upstream.started(*options, *more)) for more in ((), tls, ()))
        urls = {
            "first": first.base_url, "secure": secure.base_url, "untrusted": secure.base_url, "spare": spare.base_url,
            "refused": f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", "nowhere": "http://name.invalid/v1",
        }  # fmt: skip
        served = serve(data, configuration(data, urls))
        stack.callback(served.stop)
        began = time.monotonic()
        answers = asyncio.run(ask_all(served))
        print(f"{len(answers)} calls in {time.monotonic() - began:.1f} s")
        time.sleep(0.6)  # the access log is written every quarter of a second
        asked: dict[str, int] = {}
        for mock in (first, secure, spare):
            asked |= mock.counts()["models"]
        ledger, log = by_id(data / "ledger" / "000001.jsonl"), by_id(data / "access.log")
        yield World(served, first, secure, spare, answers, ledger, log, asked)


each = pytest.mark.parametrize("cell", POSSIBLE, ids=lambda cell: cell.name)


def test_every_combination_is_here_or_cannot_be() -> None:
    everything = list(cells())
    assert len(everything) == len({cell.name for cell in everything}) == 11 * 3 * 3 * 2 + 11 * 3 * 2
    impossible = [cell for cell in everything if cell.impossible]
    assert all(cell.when == "middle" for cell in impossible)
    assert {cell.fault for cell in impossible if cell.task != "embeddings"} == {"hang", "refused", "dns"}


@each
def test_the_outcome_is_the_promised_one(world: World, cell: Cell) -> None:
    answer, promised = world.answer(cell), expected(cell)
    assert answer.status == promised.status, answer.body
    if promised.ending in ("answer", "continued"):
        check_complete(cell, answer)
        return
    assert answer.stream == (promised.ending == "event")
    error = answer.error()
    assert (error["type"], error["code"]) == (promised.type, promised.code)
    if promised.ending == "event":
        check_broken(cell, answer)


def check_complete(cell: Cell, answer: Answer) -> None:
    """Everything an answer has, once."""
    if cell.task == "embeddings":
        assert json.loads(answer.body)["data"][0]["embedding"]
        return
    assert text_of(cell.task, answer) == WHOLE
    assert answer.stream == cell.stream
    if cell.stream:
        events = answer.events()
        assert events[-1] == b"[DONE]" and events.count(b"[DONE]") == 1
        chunks = [json.loads(event) for event in events[:-1]]
        assert not any("error" in chunk for chunk in chunks)
        finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        assert [finish for finish in finishes if finish] == ["stop"] and finishes[-1] == "stop"
        roles = [choice["delta"]["role"] for chunk in chunks for choice in chunk["choices"] if "role" in
                 choice.get("delta", {})]  # fmt: skip
        assert len(roles) <= 1 and len({chunk["id"] for chunk in chunks}) == 1
        assert all(chunk["choices"] for chunk in chunks), "usage that nobody asked for"


def check_broken(cell: Cell, answer: Answer) -> None:
    """What had come, then one error, then nothing."""
    *before, last = answer.events()
    assert b"[DONE]" not in (*before, last) and "error" in json.loads(last)
    assert not any("error" in json.loads(event) for event in before)
    said = re.findall(r" tok\d+", answer.body.decode())
    assert "".join(said) == mock_upstream.spoken(0, TOKENS // 2)


@each
def test_it_ends_within_the_deadline(world: World, cell: Cell) -> None:
    assert world.answer(cell).seconds < TOTAL + SLACK


@each
def test_it_is_answered_once(world: World, cell: Cell) -> None:
    answer = world.answer(cell)
    assert answer.whole, "the answer was cut off"
    assert answer.after in ("usable", "closed")
    assert answer.id


@each
def test_it_is_accounted_once(world: World, cell: Cell) -> None:
    answer, promised = world.answer(cell), expected(cell)
    (line,), entries = world.log[answer.id], world.ledger.get(answer.id, [])
    sent = world.asked.get(theirs(cell), 0) + world.asked.get(f"good/{cell.name}", 0)
    assert [entry["attempt"] for entry in entries] == [*range(1, sent + 1)]  # each that reached somebody, and no other
    assert all(entry["outcome"] == "failed" and "error" in entry for entry in entries[:-1])
    for found in (line, *entries[-1:]):
        assert (found["status"], found["outcome"], found["asked"]) == (promised.status, promised.ledger, cell.name)
        assert found["attempt"] == sent and found.get("error") == promised.code
    check_tokens(cell, promised, entries)


def check_tokens(cell: Cell, promised: Outcome, entries: list[dict[str, Any]]) -> None:
    """Those of a stream that broke are nobody's to say exactly: they are counted by whoever passed them on."""
    prompt, completion = (sum(entry.get(f"{kind}_tokens", 0) for entry in entries) for kind in ("prompt", "completion"))
    if promised.ending == "error":
        assert (prompt, completion) == (0, 0)
    elif promised.ending == "event":
        assert TOKENS // 4 <= completion <= TOKENS and prompt > 0
    elif promised.ending == "continued":
        assert TOKENS * 3 // 4 <= completion <= TOKENS * 5 // 4 and prompt >= mock_upstream.PROMPT_TOKENS
    else:
        assert (prompt, completion) == (mock_upstream.PROMPT_TOKENS, 0 if cell.task == "embeddings" else TOKENS)


@each
def test_targets_are_asked_as_often_as_promised(world: World, cell: Cell) -> None:
    promised = expected(cell)
    spare = world.asked.get(f"good/{cell.name}", 0)
    assert spare == (1 if promised.ending in ("answer", "continued") else 0)
    if upstream_of(cell) in ("first", "secure"):
        assert world.asked.get(theirs(cell), 0) == promised.attempts - spare


@each
def test_the_headers_say_what_happened(world: World, cell: Cell) -> None:
    """As far as it is known when the head leaves: a continued stream has begun as its first target's."""
    headers, promised = world.answer(cell).headers, expected(cell)
    before = promised.attempts if cell.when == "before" else 1
    assert headers.get("x-tertulia-attempts") == (str(before) if before > 1 else None)
    if promised.ending == "answer":
        assert headers["x-tertulia-model"] == f"good-{cell.name}"
        assert headers["x-tertulia-fallback"] == cell.name
    else:
        assert headers["x-tertulia-model"] == f"bad-{cell.name}"
        assert "x-tertulia-fallback" not in headers
    if promised.ending == "error":
        if not str(promised.code).startswith("mock_"):
            assert headers["x-should-retry"] == "true"
        if cell.fault == "429":
            assert "retry-after" in headers


def test_nothing_is_left_in_flight(world: World) -> None:
    figures = mock_upstream.Mock(int(world.served.root.rpartition(":")[2]), False).text("/metrics")
    assert "tertulia_calls_in_flight 0" in figures
    for mock in (world.first, world.secure, world.spare):
        assert "open" not in mock.counts()["ends"], "an upstream still answers what nobody waits for"


BROKEN = [cell for cell in POSSIBLE if expected(cell).ending == "event" and cell.mode == "one"]


@pytest.mark.parametrize("cell", BROKEN, ids=lambda cell: cell.name)
def test_the_official_client_raises_what_the_stream_says(world: World, cell: Cell) -> None:
    # not strict: of a legacy completion's chunks OpenAI itself sends finish_reasons that its types do not know (null)
    resource: Any = world.served.client(_strict_response_validation=False)
    resource = resource.chat.completions if cell.task == "chat" else resource.completions
    stream, pieces = resource.create(**body_of(cell.task, cell.name, True)), 0
    with pytest.raises(openai.APIError) as broken:
        for _ in stream:
            pieces += 1
    assert pieces >= TOKENS // 2 and broken.value.code == expected(cell).code


@pytest.mark.parametrize("cell", [c for c in POSSIBLE if c.task == "chat" and c.mode == "one" and c.when == "before"
                                  and not c.stream], ids=lambda cell: cell.name)  # fmt: skip
def test_the_official_client_knows_the_error(world: World, cell: Cell) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        world.served.client().chat.completions.create(**body_of("chat", cell.name))
    assert (refused.value.status_code, refused.value.code) == (expected(cell).status, expected(cell).code)
