"""A client sends the same head again and again on one connection; the server then reads it without parsing it. What it
answers must be what it would answer to a head it sees for the first time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conftest import Served
from lines import Line, request, said


@pytest.fixture
def line(mock_server: Served) -> Iterator[Line]:
    line = Line(mock_server)
    yield line
    line.socket.close()


def test_bodies_of_any_length(line: Line, mock_server: Served) -> None:
    ids = set()
    for text in ("one", "two two", "x" * 5000, "y", "z" * 300_000, "last"):
        line.send(request(mock_server, text))
        answer = line.answer()
        assert said(answer) == text
        ids.add(answer[1]["x-request-id"])
    assert len(ids) == 6 and line.buffer == b""


def test_every_split_of_a_repeated_request(line: Line, mock_server: Served) -> None:
    asked = request(mock_server, "cut somewhere")
    line.send(asked)
    assert said(line.answer()) == "cut somewhere"
    for at in [*range(1, 40), *range(40, len(asked), 7), len(asked) - 1]:
        line.send(asked[:at], asked[at:])
        assert said(line.answer()) == "cut somewhere", at
    line.send(*(bytes([byte]) for byte in asked))
    assert said(line.answer()) == "cut somewhere"


def test_the_next_request_may_come_with_the_end_of_this_one(line: Line, mock_server: Served) -> None:
    def asked(text: str) -> bytes:
        return request(mock_server, text)

    line.send(asked("first"))
    assert said(line.answer()) == "first"
    line.send(asked("second") + asked("third"))
    assert (said(line.answer()), said(line.answer())) == ("second", "third")
    line.send(asked("fourth")[:-9], asked("fourth")[-9:] + asked("fifth")[:50], asked("fifth")[50:])
    assert (said(line.answer()), said(line.answer())) == ("fourth", "fifth")
    line.send(asked("sixth"))
    assert said(line.answer()) == "sixth"


def test_streams_and_answers_alternate(line: Line, mock_server: Served) -> None:
    for _ in range(3):
        line.send(request(mock_server, "one two three", stream=True))
        status, headers, body = line.answer()
        assert status == 200 and "text/event-stream" in headers["content-type"] and b"[DONE]" in body
        line.send(request(mock_server, "whole"))
        assert said(line.answer()) == "whole"


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"key": "sk-somebody-elses-key-0123456789"}, 401),
        ({"extra": "OpenAI-Project: proj_of_another\r\n"}, 401),
        ({"extra": "Content-Encoding: gzip\r\n"}, 400),
        ({"length": "0"}, 400),
        ({"length": "99999999999"}, 413),
    ],
)
def test_another_head_is_another_head(line: Line, mock_server: Served, changed: dict[str, str], status: int) -> None:
    line.send(request(mock_server, "fine"))
    assert said(line.answer()) == "fine"
    head, _, body = request(mock_server, "fine", **changed).partition(b"\r\n\r\n")
    line.send(head + b"\r\n\r\n" + (b"" if "length" in changed else body))
    assert line.answer()[0] == status


@pytest.mark.parametrize("length", ["+5", "-1", "0x10", "1_0", "5 5", "\u0663".encode().decode("latin-1"), ""])
def test_what_is_no_length_is_parsed_and_refused_as_ever(line: Line, mock_server: Served, length: str) -> None:
    line.send(request(mock_server, "fine"))
    assert said(line.answer()) == "fine"
    again = request(mock_server, "fine", length="LENGTH").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    line.send(again.replace(b"LENGTH", length.encode("latin-1")))
    fresh = Line(mock_server)
    fresh.send(again.replace(b"LENGTH", length.encode("latin-1")))
    one, other = line.answer(), fresh.answer()
    assert one[0] == other[0] >= 400 and one[2] == other[2]
    fresh.socket.close()


def test_what_the_body_says_is_checked_each_time(line: Line, mock_server: Served) -> None:
    for temperature, status in ((0.5, 200), (9, 400), (0.5, 200)):
        line.send(request(mock_server, "fine", temperature=temperature))
        assert line.answer()[0] == status


def test_a_client_that_says_close_is_closed(line: Line, mock_server: Served) -> None:
    line.send(request(mock_server, "fine", extra="Connection: close\r\n"))
    assert said(line.answer()) == "fine"
    assert line.socket.recv(1) == b""
