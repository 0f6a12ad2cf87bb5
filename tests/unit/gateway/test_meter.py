"""Usage is read off the wire, whoever answered and however it came."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tertulia.accounts.ledger import Ledger
from tertulia.core import Call, ModelCard, Next, Principal, Reply, Target, Task, Usage
from tertulia.engines.base import Collector
from tertulia.errors import EngineFailed, Unavailable
from tertulia.gateway.accesslog import AccessLog
from tertulia.gateway.meter import Meter, Series
from tertulia.store.journal import read


def meter(data: Path) -> Meter:
    return Meter(Ledger(data), None)


def play(
    it: Meter, pieces: list[bytes], stream: bool, usage: Usage | None = None, body: bytes = b"", cache: str = "",
    attempts: int = 1,
) -> Reply:  # fmt: skip
    def engine(call: Call) -> None:
        call.attempts, call.cache = attempts, cache
        call.target = Target(SimpleNamespace(name="u"), "m", ModelCard(id="m", kind="chat", source="upstream:u"))
        if attempts:
            call.sending()
        call.reply.begin()
        call.reply.usage = usage
        for piece in pieces:
            call.reply.push(piece)
        call.reply.close()

    async def run() -> Reply:
        reply = Reply(Collector(), stream)
        following: Next = engine
        call = Call("req_1", Principal("", "", ""), Task("chat", "/", lambda call: None), body, reply, 0)
        call.stream = stream
        it(call, following)
        return reply

    return asyncio.run(run())


def test_tokens_are_those_the_engine_told_and_the_pace_of_a_stream_is_seen(tmp_path: Path) -> None:
    it = meter(tmp_path)
    play(it, [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n", b"data: [DONE]\n\n"], True, Usage(5, 7))
    [series] = it.series.values()
    assert (series.calls, series.prompt, series.completion) == (1, 5, 7)
    assert it.first["chat"].count == 1 and it.pauses.count == 3
    play(it, [b"{}"], False, Usage(5, 7))
    assert it.first["chat"].count == 1 and it.pauses.count == 3  # of one piece nothing is to be told


def test_an_estimate_of_the_engine_is_marked(tmp_path: Path) -> None:
    it = meter(tmp_path)
    play(it, [b"data: {}\n\n"], True, Usage(10, 3, estimated=True))
    [entry] = Ledger(tmp_path).entries()
    assert (entry.prompt_tokens, entry.completion_tokens, entry.estimated) == (10, 3, True)


def test_what_reached_no_engine_is_logged_and_no_entry(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "a.log"))
    it = Meter(Ledger(tmp_path), log)
    play(it, [b"{}"], False, attempts=0)
    log.close()
    assert it._ledger.entries() == []
    line = json.loads((tmp_path / "a.log").read_text())
    assert line["id"] == "req_1" and line["outcome"] == "finished" and line["attempt"] == 0


def test_the_ledgers_line_is_the_access_logs_line(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "a.log"))
    it = Meter(Ledger(tmp_path), log)
    play(it, [b"{}"], False, Usage(5, 7))
    log.close()
    [entry] = read(tmp_path / "ledger")
    assert (tmp_path / "a.log").read_bytes() == entry + b"\n"


def test_tokens_count_once_whoever_is_answered_with_them(tmp_path: Path) -> None:
    it = meter(tmp_path)
    play(it, [b"{}"], False, Usage(5, 7), cache="miss")
    play(it, [b"{}"], False, Usage(5, 7), cache="hit", attempts=0)
    play(it, [b"{}"], False, Usage(5, 7), cache="joined", attempts=0)
    [series] = it.series.values()
    assert (series.calls, series.prompt, series.completion) == (3, 5, 7)
    miss, hit, joined = Ledger(tmp_path).entries()
    assert [entry.completion_tokens for entry in (miss, hit, joined)] == [7, 7, 7]
    assert [entry.target for entry in (miss, hit, joined)] == ["u", "", "u"]


def test_the_exposition_is_prometheus_text(tmp_path: Path) -> None:
    it = meter(tmp_path)
    play(it, [b"{}"], False, Usage(5, 7))
    it.series[("chat", 'a"b\\c\n', "finished", 200)] = Series()
    it.sources.append(lambda: ["tertulia_of_another_part 3"])
    it.series[("chat", "", "finished", 200)] = it.series.pop(("chat", "m", "finished", 200))
    lines = it.exposition().decode().splitlines()
    assert "tertulia_calls_in_flight 0" in lines and "tertulia_of_another_part 3" in lines
    assert 'tertulia_calls_total{task="chat",model="",outcome="finished",status="200"} 1' in lines
    assert 'tertulia_calls_total{task="chat",model="a\\"b\\\\c\\n",outcome="finished",status="200"} 0' in lines
    assert 'tertulia_tokens_total{model="",kind="completion"} 7' in lines
    buckets = [line for line in lines if line.startswith('tertulia_call_seconds_bucket{task="chat"')]
    assert len(buckets) == 15 and buckets[-1].endswith('le="+Inf"} 1')
    assert 'tertulia_call_seconds_count{task="chat"} 1' in lines


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_accounted_for_is_not_sent(tmp_path: Path) -> None:
    it = meter(tmp_path)
    it._ledger.intend = full  # type: ignore[method-assign]
    call = Call("req_1", Principal("", "", ""), Task("chat", "/", lambda call: None), b"", Reply(Collector()), 0)
    call.target = Target(SimpleNamespace(name="u"), "m", ModelCard(id="m", kind="chat", source="upstream:u"))
    call.reply.recover = lambda error: True  # another target would be asked, and could not be accounted for either
    it(call, lambda call: None)
    with pytest.raises(Unavailable) as refused:
        call.sending()
    assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
    assert call.reply.recover is None and not call.open and call.sent == 0


def test_a_lost_attempt_whose_entry_cannot_be_written_is_the_last(tmp_path: Path) -> None:
    it = meter(tmp_path)
    call = Call("req_1", Principal("", "", ""), Task("chat", "/", lambda call: None), b"", Reply(Collector()), 0)
    call.target = Target(SimpleNamespace(name="u"), "m", ModelCard(id="m", kind="chat", source="upstream:u"))
    it(call, lambda call: None)
    call.sending()
    it._ledger.append = full  # type: ignore[method-assign]
    assert call.lost(EngineFailed()) is False
    it._ledger.close()
    [entry] = Ledger(tmp_path).entries()  # the intent stands
    assert entry.outcome == "interrupted"


def test_whatever_breaks_on_the_way_to_another_target_the_client_is_told_of_the_first_error() -> None:
    sink = Collector()
    reply = Reply(sink)
    reply.recover = full  # type: ignore[assignment]
    reply.fail(EngineFailed())
    assert reply.closed and sink.status == 502
