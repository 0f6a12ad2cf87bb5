"""What an upstream is asked, and what becomes of everything it may answer, over real sockets and without a gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import msgspec
import pytest

from far import ANSWER, CHAT, DONE, SSE, STREAM, USAGE, chunked, event, far_side, run, stream, whole
from tertulia import config
from tertulia.core import CLIENT_LEFT, FAILED, FINISHED, Usage
from tertulia.engines.answers import Listed, refusal, reported, retry_after
from tertulia.engines.upstream import Upstream, rewritten
from tertulia.errors import SettingsError, UpstreamRefused

ERROR = b'{"error":{"message":"no","type":"t","param":null,"code":"theirs"}}'


def code(body: bytes) -> Any:
    return json.loads(body)["error"]["code"]


def message(body: bytes) -> str:
    return str(json.loads(body)["error"]["message"])


def last_error(body: bytes) -> dict[str, Any]:
    """The error event that ends a stream."""
    found = json.loads(body.rstrip(b"\n").rpartition(b"data: ")[2])["error"]
    assert isinstance(found, dict)
    return found


# what is sent


def settings(**more: Any) -> config.Upstream:
    return config.Upstream(**{"base_url": "https://far.example/v1", "models": {"far": "their model"}, **more})


def sent(task: str = "chat", key: str | None = "sk-far", **more: Any) -> bytes:
    return Upstream("u", settings(**more), key, {})._models["far"].heads[task]


def test_a_request_carries_the_key_and_the_settings_headers() -> None:
    head = sent(organization="org-1", project="proj_1", headers={"X-Title": "t", "User-Agent": "mine"})
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: far.example\r\n")
    for line in (
        b"authorization: Bearer sk-far", b"openai-organization: org-1", b"openai-project: proj_1", b"x-title: t",
        b"user-agent: mine", b"content-type: application/json",
    ):  # fmt: skip
        assert head.count(line + b"\r\n") == 1
    assert head.endswith(b"content-length: ") and b"tertulia" not in head
    assert b"authorization" not in sent(key=None)


@pytest.mark.parametrize(
    ("base", "version", "path"),
    [
        ("", "2024-10-21", "/openai/deployments/their%20model/chat/completions?api-version=2024-10-21"),
        ("/", "2024-10-21", "/openai/deployments/their%20model/chat/completions?api-version=2024-10-21"),
        ("/openai", "v", "/openai/deployments/their%20model/chat/completions?api-version=v"),
        ("/openai/deployments/d", "v", "/openai/deployments/d/chat/completions?api-version=v"),
        ("/openai/v1/", None, "/openai/v1/chat/completions"),
        ("/openai/v1", "preview", "/openai/v1/chat/completions?api-version=preview"),
    ],
)  # fmt: skip
def test_azure_has_its_own_header_and_paths(base: str, version: str | None, path: str) -> None:
    head = sent(base_url="https://x.openai.azure.com" + base, kind="azure", api_version=version)
    assert head.startswith(f"POST {path} HTTP/1.1\r\n".encode())
    assert b"\r\napi-key: sk-far\r\n" in head and b"authorization" not in head


def test_each_task_has_its_path() -> None:
    assert sent("completion").startswith(b"POST /v1/completions ")
    assert sent("embedding").startswith(b"POST /v1/embeddings ")


@pytest.mark.parametrize("headers", [{"x": "a\r\nb: c"}, {"x\r\ny": "a"}, {"": "a"}, {"x": "ü"}, {"Host": "h"}])
def test_headers_that_cannot_be_sent_are_refused_at_the_start(headers: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"upstreams\.u"):
        sent(headers=headers)


def test_a_key_that_cannot_be_sent_is_not_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        sent(key="sk-secret\n")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("base", ["ftp://x", "far.example/v1", "http://", "http://x:port/"])
def test_an_address_that_is_none_is_a_settings_error(base: str) -> None:
    with pytest.raises(SettingsError, match="base_url"):
        sent(base_url=base)


@pytest.mark.parametrize(
    "base",
    [
        "https://u:hidden@far.example/v1", "https://hidden@far.example", "u:hidden@far.example/v1",
        "https://far.example/v1?key=hidden", "https://far.example/v1#hidden", "https://u:hid/den@x:port/",
    ],
)  # fmt: skip
def test_an_address_holds_no_password_and_nothing_that_would_be_dropped(base: str) -> None:
    with pytest.raises(SettingsError, match=r"^upstreams\.u\.base_url: ") as caught:
        sent(base_url=base)
    assert "hid" not in caught.value.message


def test_a_file_of_certificates_that_is_not_there_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="tls_ca"):
        sent(tls_ca="/nowhere/ca.pem")


@pytest.mark.parametrize(
    ("body", "model", "usage", "expected"),
    [
        (b'{"model":"a","odd":[1, 2.50]} \n', None, True, b'{"model":"a","odd":[1, 2.50],ASK}'),
        (b'{"model":"a","odd":[1, 2.50]}', "b", False, b'{"model":"b","odd":[1, 2.50]}'),
        (b'{"model":"a","odd":[1, 2.50]}', "b", True, b'{"model":"b","odd":[1, 2.50],ASK}'),
        (b'{"stream_options":null,"model":"a"}', None, True, b'{ASK,"model":"a"}'),
        (b'{"stream_options":{"include_usage":false},"x":1}', None, True, b'{ASK,"x":1}'),
        (b'{"user":"stream_options"}', None, True, b'{"user":"stream_options",ASK}'),
    ],
)
def test_only_what_must_be_is_rewritten(body: bytes, model: str | None, usage: bool, expected: bytes) -> None:
    assert rewritten(body, model, usage) == expected.replace(b"ASK", b'"stream_options":{"include_usage":true}')


def test_other_stream_options_stay() -> None:
    body = b'{"stream_options":{"include_usage":false,"include_obfuscation":false}}'
    assert json.loads(rewritten(body, None, True)) == {
        "stream_options": {"include_usage": True, "include_obfuscation": False}
    }


def test_a_large_body_arrives_whole() -> None:
    async def test() -> None:
        async with far_side(models={"far": "far"}) as side:
            text = "x" * 300_000
            await side.ask(messages=[{"role": "user", "content": text}])
            assert side.far.body["messages"][0]["content"] == text

    run(test)


# answers in one piece


def test_an_answer_passes_byte_for_byte_and_its_usage_is_known() -> None:
    async def test() -> None:
        async with far_side() as side:
            for _ in range(3):
                reply, body = await side.ask()
                assert (reply.status, body, reply.outcome) == (200, ANSWER, FINISHED)
                assert reply.usage == Usage(3, 4)
            assert side.far.connections == 1
            assert side.far.body["model"] == "theirs" and "stream_options" not in side.far.body

    run(test)


@pytest.mark.parametrize("gap", [1, 7, 60])
def test_an_answer_under_every_split(gap: int) -> None:
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = whole(ANSWER)
        for at in range(0, len(answer), gap):
            writer.write(answer[at : at + gap])
            await asyncio.sleep(0)

    async def test() -> None:
        async with far_side() as side:
            side.far.script = slowly
            assert (await side.ask())[1] == ANSWER

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        whole(b"<html>hello</html>"),
        whole(b""),
        whole(b"[1]"),
        whole(b'"text"'),
        whole(b'{"id": tru}'),
        whole(b'{"id":"x"} trailing'),
        whole(b'{"choices":[{"finish_reason":"stop"'),
        whole(b'data: {"id":"x"}\n\n'),
        stream(*STREAM),
    ],
)
def test_what_is_not_json_never_reaches_the_caller(answer: bytes) -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = answer
            reply, body = await side.ask()
            assert reply.status == 502 and code(body) == "bad_upstream_answer" and reply.outcome == FAILED

    run(test)


def test_an_answer_cut_short_is_an_error() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(ANSWER)[:-20])
        writer.close()

    async def test() -> None:
        async with far_side() as side:
            side.far.script = cut
            reply, body = await side.ask()
            assert reply.status == 502 and "before its answer was complete" in message(body)

    run(test)


def test_an_answer_in_an_unknown_shape_passes() -> None:
    odd = b'{"usage":{"prompt_tokens":"three"},"choices":7}'

    async def test() -> None:
        async with far_side() as side:
            side.far.script = whole(odd)
            reply, body = await side.ask()
            assert body == odd and reply.usage is None

    run(test)


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
def test_a_refusal_passes_with_its_body_and_its_retry_after(status: int) -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = whole(ERROR, f"{status} X", b"Retry-After: 7\r\nx-should-retry: false\r\n")
            for stream_it in (False, True):
                reply, body = await side.ask(stream=stream_it)
                assert (reply.status, body) == (status, ERROR)
                assert reply.error is not None and (reply.error.retry_after, reply.error.retry) == (7.0, False)
                assert b"retry-after: 7\r\n" in reply.headers and b"x-should-retry: false\r\n" in reply.headers
            assert side.far.connections == 1

    run(test)


@pytest.mark.parametrize("status", ["401 U", "403 F", "407 P", "302 Found", "500 Oops", "204 No"])
def test_what_concerns_our_key_or_is_no_answer_is_ours_to_say(status: str) -> None:
    body = b"" if status.startswith("204") else b'{"error":{"message":"Incorrect key sk-far"}}'
    body = b"<html>" if status.startswith("500") else body
    answer = whole(body, status, b"location: http://127.0.0.1:1/\r\n")

    async def test() -> None:
        async with far_side() as side:
            side.far.script = answer
            reply, got = await side.ask()
            assert reply.status == 502 and code(got) == "engine_failed" and b"sk-far" not in got
            assert len(side.far.requests) == 1

    run(test)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, b'{"object":"error","message":"too long","code":400}', "too long"),
        (422, b'{"detail":"bad field"}', "bad field"),
        (404, b'{"error":"model not found"}', "model not found"),
        (413, b"<html>", "The upstream answered with status 413."),
        (503, b"<html>", "The upstream answered with status 503."),
    ],
)
def test_refusals_in_other_shapes_get_ours(status: int, body: bytes, words: str) -> None:
    error = refusal(status, [(b"retry-after-ms", b"1500")], body)
    assert (error.status, error.message, error.retry_after) == (status, words, 1.5)
    assert set(json.loads(error.body())["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        ([(b"retry-after", b"3")], 3.0),
        ([(b"retry-after", b"0.25")], 0.25),
        ([(b"retry-after-ms", b"250"), (b"retry-after", b"3")], 0.25),
        ([(b"retry-after-ms", b"soon"), (b"retry-after", b"3")], 3.0),
        ([(b"retry-after", b"-5")], 0.0),
        ([(b"retry-after", b"nan")], None),
        ([(b"retry-after", b"soon")], None),
        ([(b"retry-after", b"Fri, 31 Dec 1999 23:59:59 GMT")], 0.0),
        ([(b"retry-after", b"Fri Dec 31 23:59:59 1999")], 0.0),
        ([(b"retry-after", b"Fri, 31 Dec 2999 23:59:59 GMT")], 2_678_400.0),
    ],
)
def test_retry_after(headers: list[tuple[bytes, bytes]], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_date_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT+9")
    time.tzset()
    try:
        date = time.asctime(time.gmtime(time.time() + 100)).encode()
        assert 98 < (retry_after([(b"retry-after", date)]) or 0) <= 100
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "m", "code": 429}, 429),
        ({"message": "m", "code": "503"}, 503),
        ({"message": "m", "type": "invalid_request_error", "code": "context_length_exceeded"}, 400),
        ({"message": "m"}, 502),
        ({"message": "m", "code": 401}, 502),
        ("words", 502),
    ],
)
def test_an_error_inside_an_answer_has_a_status(error: Any, status: int) -> None:
    found = reported(error)
    assert found.status == status
    if isinstance(found, UpstreamRefused):
        assert json.loads(found.body()) == {"error": error}


@pytest.mark.parametrize("stream_it", [False, True])
def test_an_error_with_status_200_is_an_error(stream_it: bool) -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = whole(b'{"error":{"message":"busy","code":429}}')
            reply, body = await side.ask(stream=stream_it)
            assert reply.status == 429 and message(body) == "busy"

    run(test)


# streams


def test_a_stream_passes_and_its_usage_is_asked_for_and_hidden() -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*STREAM[:3], USAGE, DONE)
            reply, body = await side.ask(stream=True)
            assert body == b"".join(STREAM) and reply.outcome == FINISHED and reply.usage == Usage(7, 9)
            assert side.far.body["stream_options"] == {"include_usage": True}
            reply, body = await side.ask(stream=True, stream_options={"include_usage": True})
            assert body == b"".join([*STREAM[:3], USAGE, DONE]) and reply.usage == Usage(7, 9)
            assert side.far.connections == 1

    run(test)


def test_an_upstream_that_refuses_stream_options_is_not_sent_them() -> None:
    async def test() -> None:
        async with far_side(stream_usage=False) as side:
            side.far.script = stream(*STREAM)
            reply, body = await side.ask(stream=True)
            assert "stream_options" not in side.far.body and body == b"".join(STREAM)
            assert reply.usage == Usage(len(json.dumps({**CHAT, "stream": True})) // 4, 3, estimated=True)

    run(test)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
@pytest.mark.parametrize("ends", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_a_stream_passes_under_every_split(size: int, ends: bytes) -> None:
    events = [STREAM[0], b": a comment\n\n", b"event: x\nid: 1\n" + STREAM[1], *STREAM[2:]]
    line = ends[: len(ends) // 2]
    text = b"".join(events).replace(b"\n", line)

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*(text[at : at + size] for at in range(0, len(text), size)))
            assert (await side.ask(stream=True))[1] == text

    run(test)


@pytest.mark.parametrize("size", [1, 2, 10_000])
def test_a_byte_order_mark_and_unknown_fields_are_passed_over(size: int) -> None:
    events = [STREAM[0], b"x-trace: 7\n" + STREAM[1], b"cost: 3\nodd\n\n", *STREAM[2:]]
    text = b"\xef\xbb\xbf" + b"".join(events)

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*(text[at : at + size] for at in range(0, len(text), size)))
            reply, body = await side.ask(stream=True)
            assert (reply.outcome, body) == (FINISHED, b"".join(events))

    run(test)


def test_usage_is_hidden_among_other_events_too() -> None:
    text = b"".join([*STREAM[:3], USAGE, DONE]).replace(b"\n", b"\r\n")

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(text)
            assert (await side.ask(stream=True))[1] == b"".join(STREAM)

    run(test)


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {not json\n\n",
        b"{not json\n\n",
        b'data: {"choices":[}\n\n',
        b"data: <html>\n\n",
        b"<html>\n\n",
        b'data: {"choices":[]} {"choices":[]}\n\n',
    ],
)
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("together", [False, True])
def test_garbage_in_a_stream_ends_it_with_a_typed_error(bad: bytes, before: int, together: bool) -> None:
    pieces = [*STREAM[:before], bad, STREAM[1], DONE]

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(b"".join(pieces)) if together else stream(*pieces)
            reply, body = await side.ask(stream=True)
            assert reply.outcome == FAILED and last_error(body)["code"] == "bad_upstream_answer"
            assert reply.status == (200 if before else 502)
            assert not before or body.startswith(STREAM[0])
            assert STREAM[1] not in body

    run(test)


@pytest.mark.parametrize("before", [0, 1])
def test_an_error_event_is_a_failure(before: int) -> None:
    bad = b'data: {"error": {"message":"engine died","type":"server_error","param":null,"code":null}}\n\n'

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*STREAM[:before], bad, DONE)
            reply, body = await side.ask(stream=True)
            assert reply.outcome == FAILED and reply.status == (200 if before else 502)
            assert last_error(body)["message"] == "engine died" and DONE not in body
            assert reply.error is not None and reply.error.status == 502

    run(test)


def test_an_error_of_null_is_none() -> None:
    first = event("one", error=None)

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(first, *STREAM[2:])
            assert (await side.ask(stream=True))[1] == first + b"".join(STREAM[2:])

    run(test)


def test_comments_before_the_first_event_begin_the_stream_but_do_not_start_the_answer() -> None:
    hold = asyncio.Event()

    async def waiting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(b": PROCESSING\n\n", end=False))
        await hold.wait()
        writer.write(chunked(*STREAM) + b"0\r\n\r\n")

    async def test() -> None:
        async with far_side() as side:
            side.far.script = waiting
            call, sink = side.call({**CHAT, "stream": True})
            await side.go(call)
            while not sink.pieces:
                await asyncio.sleep(0.01)
            assert sink.pieces == [b": PROCESSING\n\n"] and call.reply.begun and not call.reply.started
            hold.set()
            assert await sink.done() == b": PROCESSING\n\n" + b"".join(STREAM)

    run(test)


def test_no_stream_is_an_error() -> None:
    async def test() -> None:
        async with far_side() as side:
            for answer in (whole(ANSWER), whole(b"hello"), stream(), stream(DONE[:0], b": only\n\n")):
                side.far.script = answer
                reply, body = await side.ask(stream=True)
                assert last_error(body)["code"] == "bad_upstream_answer" and reply.outcome == FAILED

    run(test)


def test_a_missing_done_is_added_only_when_the_answer_is_whole() -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*STREAM[:3])
            reply, body = await side.ask(stream=True)
            assert body == b"".join(STREAM) and reply.outcome == FINISHED
            side.far.script = stream(*STREAM[:2])
            reply, body = await side.ask(stream=True)
            assert reply.outcome == FAILED and last_error(body)["code"] == "engine_failed" and DONE not in body
            side.far.script = stream(*STREAM[:3])
            reply, body = await side.ask(stream=True, n=2)  # of two choices one has not finished
            assert reply.outcome == FAILED

    run(test)


def test_the_end_of_the_connection_is_an_end_after_done_and_a_break_before() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SSE + b"connection: close\r\n\r\n" + b"".join(pieces))
        writer.close()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(*pieces, end=False))
        writer.close()

    async def test() -> None:
        nonlocal pieces
        async with far_side() as side:
            for script in (close, cut):
                side.far.script, pieces = script, STREAM
                reply, body = await side.ask(stream=True)
                assert (reply.outcome, body) == (FINISHED, b"".join(STREAM))
                pieces = STREAM[:2]
                reply, body = await side.ask(stream=True)
                assert reply.outcome == FAILED and body.startswith(b"".join(pieces))
                assert reply.usage is not None and reply.usage.estimated and reply.usage.completion_tokens == 2

    pieces: list[bytes] = []
    run(test)


@pytest.mark.parametrize("rest", [b"0\r\n\r\n", chunked(b"\n: bye\n\n") + b"0\r\n\r\n"])
def test_done_ends_the_answer_at_once_and_an_ending_that_comes_later_keeps_the_connection(rest: bytes) -> None:
    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(*STREAM, end=False))
        await answered.wait()
        writer.write(rest)

    async def test() -> None:
        async with far_side() as side:
            side.far.script = late
            for _ in range(3):
                answered.clear()
                reply, body = await side.ask(stream=True)
                assert (reply.outcome, body) == (FINISHED, b"".join(STREAM))
                assert len(side.upstream.pool.rests) == 1 and reply.usage is not None
                answered.set()
                while len(side.upstream.pool.rests):
                    await asyncio.sleep(0.005)
            assert side.far.connections == 1 and not side.upstream.stall

    answered = asyncio.Event()
    run(test)


@pytest.mark.parametrize("rest", [b"", chunked(b"x" * 5000), b"garbage\r\n"])
def test_an_upstream_that_does_not_end_after_done_is_given_up(rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tertulia.engines.connection.REST_SECONDS", 0.2)

    async def open_ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(*STREAM, end=False))
        await asyncio.sleep(0.02)
        writer.write(rest)
        await reader.read()

    async def test() -> None:
        async with far_side() as side:
            side.far.script = open_ended
            async with asyncio.timeout(2):
                reply, body = await side.ask(stream=True)
                assert (reply.outcome, body) == (FINISHED, b"".join(STREAM))
                await side.far.left.wait()
                while side.upstream.pool.open_connections:
                    await asyncio.sleep(0.01)
            assert not len(side.upstream.pool.rests)

    run(test)


def test_a_last_event_without_its_blank_line_counts() -> None:
    text = b"".join(STREAM).rstrip(b"\n")

    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(text)
            reply, body = await side.ask(stream=True)
            assert body == b"".join(STREAM) and reply.outcome == FINISHED

    run(test)


def test_an_event_without_end_is_given_up() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(event(), b"data: {", end=False))
        for _ in range(100):
            writer.write(chunked(b"x" * 65536))
            await writer.drain()

    async def test() -> None:
        async with far_side() as side:
            side.far.script = endless
            _, body = await side.ask(stream=True)
            assert last_error(body)["message"] == "The upstream sent too long an event."

    run(test)


# how a call ends


def test_a_client_that_leaves_ends_the_upstreams_work_and_is_accounted() -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = stream(*STREAM[:2], end=False)
            call, sink = side.call({**CHAT, "stream": True})
            await side.go(call)
            while len(b"".join(sink.pieces)) < len(b"".join(STREAM[:2])):
                await asyncio.sleep(0.01)
            call.reply.close(CLIENT_LEFT)
            await asyncio.wait_for(side.far.left.wait(), 5)
            assert call.reply.usage == Usage(len(call.body) // 4, 2, estimated=True)
            assert side.upstream.pool.open_connections == 0
            assert not side.upstream.first and not side.upstream.stall

    run(test)


def test_a_client_that_leaves_before_anything_came_has_used_nothing() -> None:
    async def test() -> None:
        async with far_side() as side:
            side.far.script = lambda reader, writer: asyncio.sleep(20)
            call, _ = side.call({**CHAT, "stream": True})
            rest = side.upstream.answer(call)
            assert rest is not None
            call.reply.close(CLIENT_LEFT)  # while we connect
            await rest
            assert side.far.requests == [] and call.reply.usage is None and not side.upstream.first
            assert side.upstream.pool.open_connections == 1  # it may serve the next one

    run(test)


def test_a_kept_connection_that_was_closed_is_not_the_callers_problem() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(ANSWER))
        await reader.read(1)  # the next request is not answered
        writer.close()

    async def test() -> None:
        async with far_side() as side:
            side.far.script = once
            for _ in range(5):
                assert (await side.ask())[1] == ANSWER
            assert side.far.connections == 5

    run(test)


def test_a_connection_that_breaks_after_something_came_is_not_asked_again() -> None:
    async def part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200")
        writer.close()

    async def test() -> None:
        async with far_side() as side:
            await side.ask()
            side.far.script = part
            reply, _ = await side.ask()
            assert reply.status == 502 and len(side.far.requests) == 2

    run(test)


def test_a_reply_that_is_done_leaves_the_connection_alone() -> None:
    """The connection may be another call's by then: a slow client of this one must not pause it."""

    async def test() -> None:
        async with far_side() as side:
            side.far.script = whole(ERROR, "429 X")
            call, sink = side.call(CHAT)
            taken: list[Any] = []
            call.reply.recover = lambda error: bool(taken.append(call.reply.source)) or False
            await side.go(call)
            await sink.done()
            assert taken == [None]

    run(test)


# time


@pytest.mark.parametrize("stream_it", [False, True])
@pytest.mark.parametrize("script", ["hang", "head", "comments", "drip"])
def test_an_answer_must_begin_in_time(script: str, stream_it: bool) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if script == "head":
            writer.write(SSE + b"transfer-encoding: chunked\r\n\r\n")
        elif script == "comments":
            writer.write(SSE + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(100):
                writer.write(chunked(b": wait\n\n" if stream_it else b"\n\n"))
                await asyncio.sleep(0.05)
        elif script == "drip":
            for byte in stream(*STREAM * 50) if stream_it else whole(ANSWER):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.05)
        await reader.read()

    async def test() -> None:
        async with far_side(first_byte_timeout=0.4) as side:
            side.far.script = slow
            began = asyncio.get_running_loop().time()
            reply, body = await side.ask(stream=stream_it)
            assert 0.35 < asyncio.get_running_loop().time() - began < 1.5
            assert last_error(body)["code"] == "upstream_timeout" and "did not begin" in last_error(body)["message"]
            assert reply.status == (200 if script == "comments" and stream_it else 504) and reply.outcome == FAILED
            await asyncio.wait_for(side.far.left.wait(), 5)

    run(test)


@pytest.mark.parametrize("stream_it", [False, True])
def test_a_stall_is_measured_by_events_and_not_by_bytes(stream_it: bool) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(event(), end=False) if stream_it else whole(ANSWER)[:-60])
        for byte in event("x" * 500):
            writer.write(chunked(bytes([byte])) if stream_it else bytes([byte]))
            await asyncio.sleep(0.05)

    async def test() -> None:
        async with far_side(stall_timeout=0.4) as side:
            side.far.script = drip
            began = asyncio.get_running_loop().time()
            _, body = await side.ask(stream=stream_it)
            assert 0.35 < asyncio.get_running_loop().time() - began < 1.5
            assert last_error(body)["message"] == "The upstream said nothing for 0.4 seconds."

    run(test)


def test_a_slow_but_steady_stream_is_no_stall_and_the_pause_after_it_is_measured_exactly() -> None:
    async def steady(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(end=False))
        for _ in range(9):
            writer.write(chunked(event()))
            await asyncio.sleep(0.1)
        await asyncio.sleep(20)

    async def test() -> None:
        async with far_side(stall_timeout=0.4) as side:
            side.far.script = steady
            began = asyncio.get_running_loop().time()
            _, body = await side.ask(stream=True)
            assert body.startswith(event() * 9) and "said nothing" in last_error(body)["message"]
            assert 1.15 < asyncio.get_running_loop().time() - began < 1.6  # 0.4 after the last event, not up to 0.8

    run(test)


def test_comments_between_events_are_a_stall() -> None:
    async def steady(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(STREAM[0], end=False))
        for _ in range(60):
            writer.write(chunked(b": ping\n\n"))
            await asyncio.sleep(0.05)

    async def test() -> None:
        async with far_side(stall_timeout=0.4) as side:
            side.far.script = steady
            async with asyncio.timeout(1.5):
                _, body = await side.ask(stream=True)
            assert last_error(body)["message"] == "The upstream said nothing for 0.4 seconds."

    run(test)


def test_an_attempt_may_have_a_limit_in_all() -> None:
    async def steady(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(stream(end=False))
        while True:
            writer.write(chunked(event()))
            await asyncio.sleep(0.05)

    async def test() -> None:
        async with far_side(timeout=0.4) as side:
            side.far.script = steady
            reply, body = await side.ask(stream=True)
            assert last_error(body)["message"] == "The upstream took longer than 0.4 seconds for its answer."
            assert reply.error is not None and reply.error.status == 504
            side.far.script = whole(ANSWER)
            assert (await side.ask())[0].outcome == FINISHED and side.upstream.total is not None
            assert not side.upstream.total and not side.upstream.first and not side.upstream.stall

    run(test)


def test_a_client_that_reads_slowly_is_not_the_upstreams_silence() -> None:
    async def test() -> None:
        async with far_side(stall_timeout=0.3) as side:
            rest = asyncio.Event()

            async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(stream(STREAM[0], end=False))
                await rest.wait()
                writer.write(chunked(*STREAM[1:]) + b"0\r\n\r\n")

            side.far.script = script
            call, sink = side.call({**CHAT, "stream": True})
            await side.go(call)
            while not sink.pieces:
                await asyncio.sleep(0.01)
            call.reply.pause()
            rest.set()
            await asyncio.sleep(1.0)
            assert sink.pieces == [STREAM[0]] and sink.outcome is None
            call.reply.resume()
            assert await sink.done() == b"".join(STREAM)
            assert (await side.ask(stream=True))[0].outcome == FINISHED  # on the same connection, which reads again
            assert side.far.connections == 1

    run(test)


# models


def test_cards() -> None:
    upstream = Upstream(
        "u", settings(models={"a": "gpt-x", "e": "text-embedding-3-small"}, context_length={"a": 1000}), None, {}
    )
    assert [(card.id, card.kind, card.context_length, card.source) for card in upstream.models()] == [
        ("a", "chat", 1000, "upstream:u"),
        ("e", "embedding", None, "upstream:u"),
    ]


def test_an_upstream_that_continues_says_so_on_its_cards() -> None:
    for continues, capabilities in ((True, ("continue_final_message",)), (False, ())):
        upstream = Upstream("u", settings(models={"a": "x"}, continues=continues), None, {})
        upstream._take([Listed("b")])
        assert [card.capabilities for card in (*upstream.models(), upstream.offer("c"))] == [capabilities] * 3


def test_a_model_can_be_offered_by_the_name_it_has_there() -> None:
    upstream = Upstream("u", settings(models={"a": "gpt-x"}), None, {})
    assert upstream.offer("gpt-x").id == upstream.offer("a").id == "a"
    assert upstream.offer("o9").id == "u/o9" and upstream.offer("o9") is upstream.offer("o9")
    assert [card.id for card in upstream.models()] == ["a"]  # a route has it listed
    upstream._take([Listed("o9"), Listed("new")])
    assert [card.id for card in upstream.models()] == ["a", "o9", "new"] and upstream.named == {"a"}
    assert upstream.offer("o9").id == "u/o9"  # whatever it lists


def test_what_is_no_name_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream("u", settings(models={}), None, {})
    with caplog.at_level(logging.WARNING):
        upstream._take([Listed(name) for name in ("good", "a\nb", "x" * 257, "\x7f", "", "y" * 256)])
    assert [card.id for card in upstream.models()] == ["good", "y" * 256]
    assert len(caplog.records) == 4 and all("\n" not in record.getMessage() for record in caplog.records)


def listing(*models: dict[str, Any]) -> bytes:
    return whole(msgspec.json.encode({"object": "list", "data": models}))


def test_discovery_offers_what_is_listed_and_keeps_it_when_the_upstream_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tertulia.engines.upstream.DISCOVER_SECONDS", 0.05)
    monkeypatch.setattr("tertulia.engines.upstream.DISCOVER_AGAIN", 0.05)

    async def test() -> None:
        async with far_side(discover=True, prefix="p/", models={"p/mine": "theirs"}) as side:
            far, upstream = side.far, side.upstream
            far.script = listing({"id": "a", "max_model_len": 512}, {"id": "mine"}, {"id": "bge-embed"})
            changes: list[list[str]] = []
            changed = asyncio.Event()

            def on_change() -> None:
                changes.append([card.id for card in upstream.models()])
                changed.set()

            upstream.on_models_changed = on_change
            upstream.start()
            await changed.wait()
            assert changes == [["p/mine", "p/a", "p/bge-embed"]]
            assert {c.id: (c.kind, c.context_length) for c in upstream.models()} == {
                "p/mine": ("chat", None), "p/a": ("chat", 512), "p/bge-embed": ("embedding", None),
            }  # fmt: skip
            assert far.requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n") and b"Bearer sk-far" in far.requests[0]
            for bad in (whole(ERROR, "500 X"), whole(b"<html>"), whole(b'{"data":[{}]}')):
                far.script, seen = bad, len(far.requests)
                while len(far.requests) < seen + 3:
                    await asyncio.sleep(0.01)
            assert len(changes) == 1 and len(upstream.models()) == 3
            changed.clear()
            far.script = listing({"id": "b"})
            await changed.wait()
            assert changes[1] == ["p/mine", "p/b"]

    with caplog.at_level(logging.WARNING):
        run(test)
    assert "upstreams.u: its models could not be listed" in caplog.text and "sk-far" not in caplog.text


def test_a_model_that_is_gone_is_a_typed_error() -> None:
    async def test() -> None:
        async with far_side() as side:
            call, sink = side.call(CHAT)
            side.upstream._models = {}
            await side.go(call)
            assert b"does not offer" in await sink.done()

    run(test)
