"""What comes on a connection while an answer is under way waits its turn, whatever it is, and disturbs nothing."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator

import pytest

from conftest import Served, serve
from lines import Line, request, said
from tertulia.store.journal import read


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(
        tmp_path_factory.mktemp("impatient"), 'chat_model = "mock"\nembedding_model = "mock-embedding"\nmax_body = 1\n',
        "--read-timeout", "1",
    )  # fmt: skip
    yield served
    served.stop()


def slow(served: Served, seconds: float = 2.5) -> bytes:
    """A stream of five words that takes so long."""
    return request(served, "one two three four five", stream=True, mock={"delay": seconds / 6})


def in_flight(served: Served) -> int:
    text = urllib.request.urlopen(served.root + "/metrics").read().decode()
    return int(next(line for line in text.splitlines() if line.startswith("tertulia_calls_in_flight ")).split()[1])


def words(body: bytes) -> str:
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


HEADS = {
    "too large": "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n",
    "expects": "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    "garbage": "what is this?\r\n\r\n",
    "endless url": "GET /" + "x" * 70_000,
    "too large a head": "GET / HTTP/1.1\r\nX: " + "y" * 70_000 + "\r\n\r\n",
    "upgrade": "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "half": "POST /v1/ch",
    "cold": "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_an_answer_under_way_is_not_disturbed(impatient: Served, kind: str, together: bool) -> None:
    line = Line(impatient)
    later = HEADS[kind].encode()
    line.send(slow(impatient) + later if together else slow(impatient))
    if not together:
        time.sleep(0.6)
        line.send(later)
    status, _, body = line.answer()
    assert status == 200 and words(body) == "one two three four five" and body.endswith(b"[DONE]\n\n\r\n")
    status = {"too large": 413, "expects": 401, "cold": 200}.get(kind, 400)
    if kind == "expects":
        assert line._until(b"HTTP/1.1 401").startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        line.buffer = line.buffer.partition(b"\r\n\r\n")[2]
    try:
        answer = line.answer()
    except ConnectionError:
        # what followed in the same read was garbage: the answer under way was the last
        assert (together and kind in ("garbage", "endless url", "too large a head", "upgrade")) or kind == "half"
    else:
        assert answer[0] == (413 if kind in ("endless url", "too large a head") else status)
    line.socket.close()
    time.sleep(0.2)
    assert in_flight(impatient) == 0


def test_a_call_that_was_answered_before_the_refusal_is_accounted(impatient: Served) -> None:
    line = Line(impatient)
    line.send(slow(impatient, 1.0) + HEADS["too large"].encode())
    _, headers, _ = line.answer()
    line.answer()
    line.socket.close()
    time.sleep(0.5)
    entries = [json.loads(one) for one in read(impatient.data / "ledger")]
    assert [one["outcome"] for one in entries if one.get("id") == headers["x-request-id"]] == ["finished"]


def test_a_body_behind_an_upgrade_is_not_the_next_request(impatient: Served) -> None:
    line = Line(impatient)
    line.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"Content-Length: 40\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n      ",
    )
    assert line.answer()[0] == 400
    with pytest.raises(ConnectionError):
        line.answer()


def test_a_head_without_an_end_is_refused_when_it_is_too_large(impatient: Served) -> None:
    line = Line(impatient)
    line.send(b"GET / HTTP/1.1\r\nX: ")
    try:
        for _ in range(100):
            line.send(b"y" * 65536)
    except OSError:
        pass  # it hung up on us
    else:
        raise AssertionError("6 MB of one header were taken")


def test_only_chunked_is_a_transfer_encoding(impatient: Served) -> None:
    line = Line(impatient)
    line.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
    assert line.answer()[0] == 400


def test_requests_follow_each_other(impatient: Served) -> None:
    line = Line(impatient)
    line.send(slow(impatient, 1.0))
    time.sleep(0.3)
    for at in range(5):
        line.send(request(impatient, f"number {at}"))
    assert words(line.answer()[2]) == "one two three four five"
    assert [said(line.answer()) for _ in range(5)] == [f"number {at}" for at in range(5)]


def test_a_stray_line_break_does_not_hide_that_the_client_leaves(impatient: Served) -> None:
    line = Line(impatient)
    line.send(slow(impatient, 6.0))
    time.sleep(0.3)
    line.send(b"\r\n")  # some clients send one after a body
    assert in_flight(impatient) == 1
    line.socket.close()
    time.sleep(0.5)
    assert in_flight(impatient) == 0


def test_a_body_over_the_limit_behind_a_known_head_is_refused(impatient: Served) -> None:
    line = Line(impatient)
    for _ in range(3):
        line.send(request(impatient, "short"))
        assert said(line.answer()) == "short"
    line.send(request(impatient, "x" * (2**20 + 10_000)))
    assert line.answer()[0] == 413
