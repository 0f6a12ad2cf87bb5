"""Spans as a collector gets them: over a real socket, decoded from OTLP's protobuf."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tertulia import __version__
from tertulia.api import chat
from tertulia.core import Call, ModelCard, Principal, Reply, Target, Usage, Wishes
from tertulia.engines.base import Collector
from tertulia.errors import BadRequest, SettingsError
from tertulia.gateway.traces import Traces, parse_parent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "my prompt"


class Gathering(ThreadingHTTPServer):
    """A collector: keeps the requests that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def resources(self) -> list[Any]:
        return [one for _, _, body in self.got for one in ExportTraceServiceRequest.FromString(body).resource_spans]

    def spans(self) -> list[Any]:
        return [span for one in self.resources() for scope in one.scope_spans for span in scope.spans]


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Gathering)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.got.append((self.path, headers, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Gathering]:
    it = Gathering()
    yield it
    it.shutdown()
    it.server_close()


def call(stream: bool = False, source: str = "upstream:far", **fields: Any) -> Call:
    body = {"model": "asked", "messages": [{"role": "user", "content": SECRET}], **fields}
    it = Call("req_1", Principal("key_1", "org", "proj_1"), chat.task(lambda *_: None), b"", Reply(Collector()), 0)
    it.asked = msgspec.convert(body, chat.Chat)
    it.model, it.stream = "asked", stream
    it.target = Target(None, "answers", ModelCard(id="answers", kind="chat", source=source))
    it.reply.status = 200
    return it


def sent(collector: Gathering, calls: list[tuple[Call, str]], upstreams: dict[str, str] | None = None) -> list[Any]:
    traces = Traces(collector.url, {"far": "https://api.groq.com/openai/v1"} if upstreams is None else upstreams)
    for each, outcome in calls:
        traces.finished(each, outcome, 250_000_000)
    traces.close()
    return collector.spans()


def said(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_call_is_one_span_by_the_conventions(collector: Gathering) -> None:
    it = call(temperature=0.5, seed=7, n=2, max_completion_tokens=9, stop=["secret stop"])
    it.reply.usage = Usage(5, 7, 3, 2)
    it.attempts, it.cache = 2, "miss"
    (span,) = sent(collector, [(it, "finished")])
    assert said(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "groq",
        "gen_ai.request.model": "asked",
        "gen_ai.response.model": "answers",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "server.address": "api.groq.com",
        "server.port": 443,
        "http.response.status_code": 200,
        "tertulia.request.id": "req_1",
        "tertulia.key.id": "key_1",
        "tertulia.project.id": "proj_1",
        "tertulia.outcome": "finished",
        "tertulia.attempts": 2,
        "tertulia.cache": "miss",
    }
    assert span.name == "chat asked" and span.kind == span.SPAN_KIND_CLIENT and span.status.code == 0
    assert span.end_time_unix_nano - span.start_time_unix_nano == 250_000_000
    assert abs(span.end_time_unix_nano - time.time_ns()) < 60e9
    assert not span.parent_span_id and any(span.trace_id) and any(span.span_id)
    path, headers, body = collector.got[0]
    assert path == "/v1/traces" and headers["content-type"] == "application/x-protobuf"
    assert SECRET.encode() not in body and b"secret stop" not in body
    about = {one.key: one.value.string_value for one in collector.resources()[0].resource.attributes}
    assert (about["service.name"], about["service.version"]) == ("tertulia", __version__)


def test_the_callers_trace_is_the_parent(collector: Gathering) -> None:
    inside, outside = call(), call()
    inside.wishes = Wishes(traceparent=f"00-{TRACE}-{SPAN}-01")
    outside.wishes = Wishes(traceparent=f"00-{TRACE}-{SPAN}-00")  # its caller does not sample it
    (span,) = sent(collector, [(inside, "finished"), (outside, "finished")])
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-will-be", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"00-{TRACE}-{SPAN}-01\n", False),
        ("", False),
    ],
)
def test_what_is_a_traceparent(text: str, is_one: bool) -> None:
    assert (parse_parent(text) is not None) == is_one


@pytest.mark.parametrize(
    ("source", "url", "provider", "address", "port"),
    [
        ("upstream:far", "https://my.openai.azure.com/openai", "azure.ai.openai", "my.openai.azure.com", 443),
        ("upstream:far", "http://10.0.0.5:8001/v1", "openai", "10.0.0.5", 8001),
        ("upstream:other", "https://api.openai.com/v1", "tertulia", None, None),
        ("mock:", "https://api.openai.com/v1", "tertulia", None, None),
    ],
)
def test_who_answered(
    source: str, url: str, provider: str, address: str | None, port: int | None, collector: Gathering
) -> None:
    (span,) = sent(collector, [(call(source=source), "finished")], {"far": url})
    found = said(span)
    assert (found["gen_ai.provider.name"], found.get("server.address"), found.get("server.port")) == (
        provider, address, port,
    )  # fmt: skip


def test_how_it_ended(collector: Gathering) -> None:
    refused, left, unknown = call(), call(stream=True), call()
    refused.reply.error, refused.reply.status = BadRequest(f"about {SECRET}", code="no_such_thing"), 400
    unknown.target, unknown.reply.error, unknown.reply.status = None, BadRequest("x"), 400
    spans = {span.name + said(span)["error.type"]: span for span in sent(
        collector, [(refused, "failed"), (left, "client_left"), (unknown, "failed")])}  # fmt: skip
    assert set(spans) == {"chat askedno_such_thing", "chat askedclient_left", "chat asked400"}
    assert all(span.status.code == span.status.STATUS_CODE_ERROR for span in spans.values())
    assert "gen_ai.response.model" not in said(spans["chat asked400"])
    assert said(spans["chat askedclient_left"])["gen_ai.request.stream"] is True
    assert SECRET.encode() not in b"".join(body for _, _, body in collector.got)


def test_time_to_the_first_piece_of_a_stream(collector: Gathering) -> None:
    traces = Traces(collector.url + "/custom", {})
    traces.finished(call(stream=True), "finished", 10, first=5_000_000)
    traces.finished(call(stream=False), "finished", 10, first=5_000_000)
    traces.close()
    times = [said(span).get("gen_ai.response.time_to_first_chunk") for span in collector.spans()]
    assert sorted(times, key=str) == [0.005, None] and collector.got[0][0] == "/custom"


def test_upstreams_of_a_new_configuration(collector: Gathering) -> None:
    traces = Traces(collector.url, {"far": "http://one/v1"})
    traces.finished(call(), "finished", 1)
    traces.reload({"far": "http://two/v1"})
    traces.finished(call(), "finished", 1)
    traces.close()
    assert {said(span)["server.address"] for span in collector.spans()} == {"one", "two"}


def test_a_collector_that_is_not_there_costs_the_call_nothing_and_the_end_little() -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    silent.server_close()
    traces = Traces(f"http://127.0.0.1:{silent.server_address[1]}", {})
    began = time.monotonic()
    for _ in range(100):
        traces.finished(call(), "finished", 1)
    assert time.monotonic() - began < 1
    traces.close()
    assert time.monotonic() - began < 8


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SettingsError, match=r"^traces: .*pip install 'tertulia\[otel\]'$"):
        Traces("http://localhost:4318", {})


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "otlp"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^traces: expected an http or https URL"):
        Traces(url, {})
