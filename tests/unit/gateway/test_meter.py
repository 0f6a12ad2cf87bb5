"""Usage is read off the wire, whoever answered and however it came."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from tertulia.accounts.ledger import Ledger
from tertulia.accounts.prices import Prices
from tertulia.core import Call, Next, Principal, Reply, Task, Usage
from tertulia.engines.base import Collector
from tertulia.gateway.meter import AccessLog, Meter, read_usage

USAGE = b'"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}'
FULL = (
    b'"usage":{"prompt_tokens":5,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":3,"audio_tokens":0},'
    b'"completion_tokens_details":{"reasoning_tokens":2}}'
)


@pytest.mark.parametrize(
    ("data", "stream", "usage"),
    [
        (b'{"id":"x",' + USAGE + b"}", False, Usage(5, 7)),
        (b'{"id":"x",' + FULL + b"}", False, Usage(5, 7, 3, 2)),
        (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', False, Usage(5, 0)),
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":null,"prompt_tokens_details":null}}', False, Usage(5, 0)),
        (b'{"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":null}}}', False, Usage(5, 0)),
        (b'{"usage": null}', False, None),
        (b'{"usage":{"prompt_tokens":"five"}}', False, None),
        (b'{"usage":{"prompt_tokens":5}', False, None),  # cut short
        (b'{"choices":[{"message":{"content":"\\"usage\\":{}"}}]}', False, None),
        (b'{"choices":[{"usage":{"prompt_tokens":9}}]}', False, None),
        (b'data: {"choices":[],' + USAGE + b"}\n\n", True, Usage(5, 7)),
        (b'data: {"choices":[],' + USAGE + b"}\n\ndata: [DONE]\n\n", True, Usage(5, 7)),
        (b'data: {"choices":[],' + USAGE + b"}\r\n\r\ndata: [DONE]\r\n\r\n", True, Usage(5, 7)),
        (b'event: x\ndata:{"choices":[],' + USAGE + b"}\n\n", True, Usage(5, 7)),
        (b'data: {"usage":null}\n\ndata: {' + USAGE + b'}\n\ndata: {"usage":null}\n\n', True, Usage(5, 7)),
        (b'data: {"usage":null}\n\n', True, None),
        (b"data: [DONE]\n\n", True, None),
        (b': "usage":\n\n', True, None),
        (b'data: \xff"usage":{}\n\n', True, None),
    ],
)
def test_reading_usage(data: bytes, stream: bool, usage: Usage | None) -> None:
    assert read_usage(data, stream) == usage


def meter(data: Path) -> Meter:
    return Meter(Ledger(data), Prices({}), None)


def play(it: Meter, pieces: list[bytes], stream: bool, usage: Usage | None = None) -> Reply:
    async def engine(call: Call) -> None:
        call.reply.begin()
        for piece in pieces:
            call.reply.push(piece)
        call.reply.usage = usage or call.reply.usage
        call.reply.close()

    async def run() -> Reply:
        reply = Reply(Collector(), stream)
        following: Next = engine
        await it(Call("req_1", Principal("", "", ""), Task("chat", "/", lambda call: None), b"", reply, 0), following)
        return reply

    return asyncio.run(run())


def test_the_last_usage_of_a_stream_counts(tmp_path: Path) -> None:
    it = meter(tmp_path)
    first = b'data: {"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
    reply = play(it, [first, b'data: {"usage":null}\n\n', b"data: {" + USAGE + b"}\n\n", b"data: [DONE]\n\n"], True)
    assert reply.usage == Usage(5, 7)
    assert it.tokens == {("", "prompt"): 5, ("", "completion"): 7}


def test_an_engine_that_counts_itself_is_believed(tmp_path: Path) -> None:
    assert play(meter(tmp_path), [b"data: {}\n\n"], True, Usage(2, 3)).usage == Usage(2, 3)


def test_the_exposition_is_prometheus_text(tmp_path: Path) -> None:
    it = meter(tmp_path)
    play(it, [b"{" + USAGE + b"}"], False)
    it.outcomes[("chat", 'a"b\\c\n', "finished", 200)] = 2
    lines = it.exposition().decode().splitlines()
    assert "tertulia_calls_in_flight 0" in lines
    assert 'tertulia_calls_total{task="chat",model="",outcome="finished",status="200"} 1' in lines
    assert 'tertulia_calls_total{task="chat",model="a\\"b\\\\c\\n",outcome="finished",status="200"} 2' in lines
    assert 'tertulia_tokens_total{model="",kind="completion"} 7' in lines
    buckets = [line for line in lines if line.startswith('tertulia_call_seconds_bucket{task="chat"')]
    assert len(buckets) == 15 and buckets[-1].endswith('le="+Inf"} 1')
    assert 'tertulia_call_seconds_count{task="chat"} 1' in lines


def test_buckets_are_cumulative_and_their_bounds_belong_to_them(tmp_path: Path) -> None:
    it = meter(tmp_path)
    for seconds in (0.005, 0.006, 300.0, 301.0):
        it._observe("chat", seconds)
    text = it.exposition().decode()
    for bound, count in (("0.005", 1), ("0.01", 2), ("60.0", 2), ("300.0", 3), ("+Inf", 4)):
        assert f'tertulia_call_seconds_bucket{{task="chat",le="{bound}"}} {count}\n' in text


def test_large_counts_are_whole_numbers(tmp_path: Path) -> None:
    it = meter(tmp_path)
    it._observe("chat", 0.001)
    it.durations["chat"][0] = 1_234_567.0
    assert b'tertulia_call_seconds_count{task="chat"} 1234567\n' in it.exposition()


def test_the_access_log_is_the_owners_and_a_full_disk_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        log = AccessLog(str(tmp_path / "a.log"))
        log.write(b"{}")
        await asyncio.sleep(0.4)
        assert (tmp_path / "a.log").read_bytes() == b"{}\n"
        log._file.close()
        log._file = open("/dev/full", "ab")  # noqa: SIM115
        log.write(b"{}")
        log.close()

    asyncio.run(run())
    assert stat.S_IMODE(os.stat(tmp_path / "a.log").st_mode) == 0o600
    assert "the access log cannot be written (No space left on device)" in capsys.readouterr().err
