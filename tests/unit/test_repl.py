"""The parts of `tertulia chat`, and how it takes what servers other than ours may send."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tertulia import repl
from tertulia.accounts import client_env
from tertulia.errors import SettingsError
from tertulia.repl import Api, Chat, Conversation, Refused, Screen, Stream, events, read_message

# Server-sent events ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "found"),
    [
        (b"data: one\n\ndata: two\n\n", ["one", "two"]),
        (b"data: one\r\n\r\ndata:two\r\n\r\n", ["one", "two"]),
        (b": a comment\n\nevent: x\nid: 1\ndata: one\nretry: 5\n\n", ["one"]),
        (b"data: two\ndata: lines\n\n", ["two\nlines"]),
        (b"data:  indented\n\ndata\n\ndata:\n\n", [" indented", "", ""]),
        (b"data: whole\n\ndata: never ended", ["whole"]),
        ("data: ¿qué tál? 木\n\n".encode(), ["¿qué tál? 木"]),
        (b"data: \xff\n\n", ["�"]),
        (b"\n\n\n", []),
    ],
)
def test_events(wire: bytes, found: list[str]) -> None:
    assert list(events(wire.splitlines(keepends=True))) == found


# A server that answers with given bytes -------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(answer: bytes, requests: list[bytes] | None = None) -> Iterator[str]:
    """Its base URL; every connection gets the same bytes and is closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(65536)
                while b"\r\n\r\n" not in asked or (asked.startswith(b"POST") and not asked.endswith(b"}")):
                    asked += connection.recv(65536)
                if requests is not None:
                    requests.append(asked)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def http(body: bytes, status: str = "200 OK", type: str = "text/event-stream") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n" % (status.encode(), type.encode()) + body


def chunk(text: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": more.pop("finish", None)}
    return b"data: " + json.dumps({"model": "them", "choices": [choice], **more}).encode() + b"\n\n"


def ask(answer: bytes) -> tuple[Stream, list[tuple[str, str]]]:
    with answering(answer) as url:
        stream = Api(url).stream(Conversation("m").body("hi"))
        return stream, list(stream)


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_an_answer() -> None:
    last = b"data: " + json.dumps({"model": "them", "choices": [], "usage": USAGE}).encode() + b"\n\n"
    stream, pieces = ask(http(chunk("He") + b": ping\n\n" + chunk("llo") + chunk(finish="stop") + last + DONE))
    assert pieces == [("content", "He"), ("content", "llo")]
    assert (stream.model, stream.finish, stream.usage, stream.stopped) == ("them", "stop", USAGE, False)


def test_an_answer_in_http_chunks_split_anywhere() -> None:
    body = chunk("Olá 木") + chunk(finish="length") + DONE
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, len(body), 7))
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    stream, found = ask(head + pieces + b"0\r\n\r\n")
    assert found == [("content", "Olá 木")] and stream.finish == "length"


def test_thinking_and_refusing_are_told_apart() -> None:
    thinking = b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
    refusing = b'data: {"choices":[{"delta":{"refusal":"No.","content":null}}]}\n\n'
    assert ask(http(thinking + refusing + DONE))[1] == [("reasoning", "hm"), ("content", "No.")]


def test_a_server_that_does_not_say_done_but_why_it_ended() -> None:
    assert ask(http(chunk("all") + chunk(finish="stop")))[1] == [("content", "all")]


ERROR = b'{"error":{"message":"Out of\\n  luck.","type":"server_error","param":null,"code":null}}'


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http(chunk("half")), "broke off before its end"),
        (http(b""), "broke off before its end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n" + chunk("x")[:20], "broke off"),
        (http(b"data: " + ERROR + b"\n\n"), "Out of luck."),
        (http(b"data: not json\n\n"), "no piece of a chat completion"),
        (http(b"data: [1]\n\n"), "no piece of a chat completion"),
        (http(b'data: {"choices":[{"delta":7}]}\n\n'), "no piece of a chat completion"),
        (http(ERROR, "500 Oops", "application/json"), "Out of luck."),
        (http(b'{"error":"just words"}', "400 Bad", "application/json"), "just words"),
        (http(b'{"detail":"Not Found"}', "404 Not Found", "application/json"), 'HTTP 404: {"detail":"Not Found"}'),
        (http(b"<html>\n<b>Bad \x1b[31mgateway", "502 Bad", "text/html"), "HTTP 502: <html> <b>Bad [31mgateway"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer: SSH-2.0-OpenSSH_9.2"),
        (b"", "does not answer: Remote end closed connection without response"),
    ],
)
def test_what_goes_wrong_is_one_line(answer: bytes, words: str) -> None:
    with pytest.raises(Refused) as caught:
        ask(answer)
    assert words in caught.value.message and "\n" not in caught.value.message and "\x1b" not in caught.value.message


def test_models_are_listed_or_the_reason_said() -> None:
    with answering(http(b'{"data":[{"id":"b"},{"id":"a"}]}', type="application/json")) as url:
        assert Api(url).models() == ["a", "b"]
    with answering(http(b"hello", type="text/plain")) as url, pytest.raises(Refused, match="list of models"):
        Api(url).models()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://[::1", "http://host:port/v1", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(SettingsError, match="is not an address"):
        Api(url)


# Whose key goes where -------------------------------------------------------------------------------------------------


def options(**given: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    repl.add_chat(parser)
    found = parser.parse_args([])
    vars(found).update(given)
    return found


def found(data: Path, environment: dict[str, str], **given: Any) -> tuple[str, str | None]:
    with contextlib.ExitStack() as stack:
        return repl.find_server(options(**given), environment, data, stack, True)


def test_a_key_goes_only_to_the_address_it_was_given_with(tmp_path: Path) -> None:
    client_env.write(tmp_path, "http://127.0.0.1:8000/v1", "sk-own", None)
    theirs = {"OPENAI_BASE_URL": "https://api.example/v1", "OPENAI_API_KEY": "sk-theirs"}
    assert found(tmp_path, theirs) == ("https://api.example/v1", "sk-theirs")
    assert found(tmp_path, theirs, ask_url="http://elsewhere/v1") == ("http://elsewhere/v1", None)
    assert found(tmp_path, theirs, ask_url="http://elsewhere/v1", ask_key="k") == ("http://elsewhere/v1", "k")
    assert found(tmp_path, theirs, ask_url="https://api.example/v1/")[1] == "sk-theirs"
    assert found(tmp_path, theirs, ask_url="http://127.0.0.1:8000/v1")[1] == "sk-own"


def test_a_key_for_openai_is_not_sent_to_the_own_server(tmp_path: Path) -> None:
    requests: list[bytes] = []
    with answering(http(b'{"status":"ok"}', type="application/json"), requests) as url:
        client_env.write(tmp_path, url, "sk-own", None)
        assert found(tmp_path, {"OPENAI_API_KEY": "sk-for-openai"}) == (url, "sk-own")
    assert b"authorization" not in requests[0].lower() and b"/healthz" in requests[0]
    assert b"Bearer sk-own" in requests[1] and not any(b"sk-for-openai" in request for request in requests)


def test_some_other_program_at_the_address_is_not_ours(tmp_path: Path) -> None:
    requests: list[bytes] = []
    with answering(http(b"welcome to my page", type="text/html"), requests) as url:
        assert not repl.alive(url, "sk-own")
    assert not any(b"sk-own" in request for request in requests)


# The conversation -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_kept_in_a_file_and_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    turns = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "木", "stopped": True}]
    Conversation("some-model", "Be kind.", turns=turns).save(path)
    again = Conversation("other")
    again.load(path)
    assert (again.model, again.system, again.turns) == ("some-model", "Be kind.", turns)
    assert again.body("next")["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hé"},
        {"role": "assistant", "content": "木"},  # our mark stays with us: the API knows no such field
        {"role": "user", "content": "next"},
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", ["", "{", "7", '{"messages":7}', '[{"role":"user"}]', '[{"role":"tool","content":"x"}]']
)
def test_what_is_no_conversation_changes_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    conversation = Conversation("m", turns=[{"role": "user", "content": "mine"}])
    with pytest.raises(ValueError, match=r"\w"):
        conversation.load(path)
    assert conversation == Conversation("m", turns=[{"role": "user", "content": "mine"}])


def test_only_what_was_chosen_is_sent() -> None:
    assert Conversation("m").body("hi").keys() == {"model", "messages", "stream", "stream_options"}
    body = Conversation("m", temperature=0.0, max_tokens=5).body("hi")
    assert (body["temperature"], body["max_tokens"]) == (0.0, 5)


def test_taking_back() -> None:
    conversation = Conversation("m", turns=[{"role": role, "content": role} for role in ("user", "assistant") * 2])
    assert conversation.take_back() == "user" and len(conversation.turns) == 2
    assert conversation.take_back() == "user" and conversation.take_back() is None


def test_another_answer_that_fails_leaves_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with answering(http(ERROR, "500 Oops")) as url:
        chat = Chat(Api(url), Conversation("m", turns=list(turns)), Screen({}))
        assert chat.line("/retry")
        assert chat.conversation.turns == turns and "Out of luck." in capsys.readouterr().out
        assert chat.line("/retry")  # and once more, with the same exchange and not a second one
        assert chat.conversation.turns == turns


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["plain"], "plain"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""alone"""'], "alone"),
    ],
)
def test_messages_of_several_lines(typed: list[str], message: str) -> None:
    lines = iter(typed)
    assert read_message(lambda prompt: next(lines), "> ") == message
    assert next(lines, None) is None


def test_every_command_that_is_listed_exists() -> None:
    for name in repl.COMMANDS.keys() - {"exit"}:
        assert callable(getattr(Chat, f"_{name}"))
