"""Framing of server-sent events: every split of every stream gives the same events, whole, and no byte is changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tertulia.engines.sse import EVENT_LIMIT, Framer, data_of, split
from tertulia.errors import BadUpstreamAnswer

LINES = st.sampled_from(
    [b'data: {"a":1}', b"data:{}", b"data: [DONE]", b": comment", b"event: x", b"id: 7", b"data: " + b"y" * 70]
)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=6)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes], list[int]]:
    """(wire, its events with LF, where it is cut). Each stream keeps to one way to end lines, as servers do, or mixes
    LF and CR LF, as proxies may."""
    ends = draw(st.sampled_from([[b"\n"], [b"\r\n"], [b"\r"], [b"\n", b"\r\n"]]))
    events = draw(EVENTS)
    wire = b""
    for event in events:
        for line in [*event, b""]:
            wire += line + draw(st.sampled_from(ends))
    cuts = draw(st.lists(st.integers(0, len(wire)), max_size=12))
    return wire, [b"\n".join(event) for event in events], sorted(cuts)


def fed(wire: bytes, cuts: list[int]) -> tuple[list[bytes], bytes]:
    framer, pieces, at = Framer(), [], 0
    for cut in [*cuts, len(wire)]:
        piece = framer.feed(wire[at:cut])
        at = cut
        if piece:
            pieces.append(piece)
    return pieces, framer.rest()


@given(streams())
def test_under_every_split(case: tuple[bytes, list[bytes], list[int]]) -> None:
    wire, events, cuts = case
    pieces, rest = fed(wire, cuts)
    assert b"".join(pieces) + rest == wire
    assert rest.strip(b"\r\n") == b"" or not events
    assert [event for piece in pieces for event in split(piece)] == events  # so no piece ends within an event


@given(streams(), st.sampled_from([b"data: {", b"data: {}\n", b": half", b"data: {}\r"]))
def test_an_unfinished_event_waits(case: tuple[bytes, list[bytes], list[int]], half: bytes) -> None:
    wire, events, cuts = case
    pieces, rest = fed(wire + half, cuts)
    assert b"".join(pieces) + rest == wire + half and rest.lstrip(b"\r\n") == half
    assert [event for piece in pieces for event in split(piece)] == events


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=8))
def test_any_bytes_at_all_come_out_as_they_went_in(wire: bytes, cuts: list[int]) -> None:
    pieces, rest = fed(wire, sorted(min(cut, len(wire)) for cut in cuts))
    assert b"".join(pieces) + rest == wire


def test_byte_by_byte_is_the_same_as_at_once() -> None:
    wire = b"data: 1\n\n: c\r\n\r\ndata: 2\r\n\r\n"
    assert fed(wire, list(range(len(wire))))[0] == [b"data: 1\n\n", b": c\r\n\r\n", b"data: 2\r\n\r\n"]
    assert fed(wire, [])[0] == [wire]


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}", b"{}"), (b"data:{}", b"{}"), (b"data:  {}", b" {}"), (b": hi", None), (b"event: x\nid: 1", None),
        (b"event: x\ndata: [1,\ndata: 2]", b"[1,\n2]"), (b"retry: 5\ndata: x", b"x"), (b"data:", b""), (b"data", b""),
        (b"trace-id: 7\ndata: x\nodd", b"x"), (b"data: x\nwhat is this", b"x"), (b"cost: 5\nx_y", None),
    ],
)  # fmt: skip
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


@pytest.mark.parametrize("event", [b"<html>", b"{}", b'{\n"a": 1\n}', b": ok\nwhat is this"])
def test_what_is_no_event(event: bytes) -> None:
    with pytest.raises(ValueError, match="not a server-sent event"):
        data_of(event)


def test_an_event_has_a_limit() -> None:
    framer = Framer()
    with pytest.raises(BadUpstreamAnswer):
        for _ in range(EVENT_LIMIT // 65536 + 1):
            framer.feed(b"x" * 65536)
