"""Traces: one OpenTelemetry span for each call, by the GenAI semantic conventions, sent to a collector over OTLP/HTTP
by the SDK's own thread. Needs the extra `otel`; nothing of it is imported unless the setting `traces` is given.

A span says who asked what model, who answered, how long it took, how many tokens, and how it ended; nothing of a prompt
or an answer. A caller's W3C `traceparent` becomes the parent, and one that is not sampled is not traced here either.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..core import CLIENT_LEFT, DEADLINE, FAILED, STOPPED, Call, Usage
from ..errors import SettingsError

OPERATIONS = {"chat": "chat", "completion": "text_completion", "embedding": "embeddings"}
# Parameters that say how was asked; none of them holds anything of a conversation.
PARAMETERS = (
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("max_tokens", "gen_ai.request.max_tokens"),
    ("max_completion_tokens", "gen_ai.request.max_tokens"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("seed", "gen_ai.request.seed"),
)
# Hosts whose provider has a name of its own in the conventions; every other upstream speaks OpenAI's dialect.
PROVIDERS = (
    (".openai.azure.com", "azure.ai.openai"),
    (".cognitiveservices.azure.com", "azure.ai.openai"),
    (".services.ai.azure.com", "azure.ai.inference"),
    ("generativelanguage.googleapis.com", "gcp.gemini"),
    ("api.anthropic.com", "anthropic"),
    ("api.deepseek.com", "deepseek"),
    ("api.groq.com", "groq"),
    ("api.mistral.ai", "mistral_ai"),
    ("api.perplexity.ai", "perplexity"),
    ("api.x.ai", "x_ai"),
)
SAMPLED = 1
PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
SEND_SECONDS = 5.0  # one attempt to reach the collector
LEAVE_SECONDS = 5.0  # what the last spans are given to get away when the server stops


class Traces:
    """Makes a span of every call that has ended. Spans wait in the SDK's bounded queue; when it is full, the oldest
    are dropped, and the SDK says so in the log."""

    def __init__(self, url: str, upstreams: Mapping[str, str]) -> None:
        """url: the collector; without a path, /v1/traces is added. upstreams: base URLs by name. Headers for the
        collector come from OTEL_EXPORTER_OTLP_HEADERS. Raises SettingsError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"traces: expected an http or https URL, got {url!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SettingsError("traces: this needs an extra; run: pip install 'tertulia[otel]'") from None
        if parts.path in ("", "/"):
            url = url.rstrip("/") + "/v1/traces"
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        about = {} if named else {"service.name": "tertulia"}
        self._make = _maker(Resource.create({**about, "service.version": __version__}))
        self._exporter: Any = OTLPSpanExporter(endpoint=url, timeout=SEND_SECONDS)
        self._queue = BatchSpanProcessor(self._exporter)
        self._servers: dict[str, dict[str, Any]] = {}
        self.reload(upstreams)

    def reload(self, upstreams: Mapping[str, str]) -> None:
        """The upstreams there are from now on: base URLs by name."""
        self._servers = {f"upstream:{name}": _server(url) for name, url in upstreams.items()}

    def finished(self, call: Call, outcome: str, nanoseconds: int, first: int | None = None) -> None:
        """Makes the span of a call that has just ended and took so long; first: nanoseconds to its first piece."""
        parent = parse_parent(call.wishes.traceparent)
        if parent is not None and not parent[2] & SAMPLED:
            return
        end = time.time_ns()
        attributes = _asked(call) | _answered(call, outcome)
        attributes |= self._servers.get(call.target.card.source if call.target else "", LOCAL)
        if first is not None and call.stream:
            attributes["gen_ai.response.time_to_first_chunk"] = first / 1e9
        name = f"{attributes['gen_ai.operation.name']} {call.model}".rstrip()
        self._queue.on_end(self._make(name, parent, attributes, end - nanoseconds, end, "error.type" in attributes))

    def close(self) -> None:
        """Sends what waits; a collector that does not answer is given up after some seconds. Blocks."""
        sending = threading.Thread(target=self._queue.shutdown, name="tertulia-traces", daemon=True)
        sending.start()
        sending.join(LEAVE_SECONDS)
        if sending.is_alive():
            self._exporter.shutdown()  # ends its waiting between two tries


LOCAL = {"gen_ai.provider.name": "tertulia"}


def parse_parent(text: str) -> tuple[int, int, int] | None:
    """(trace, span, flags) of a traceparent header; None if it is not one: then the call starts a trace of its own."""
    found = PARENT.fullmatch(text) if text else None
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None
    trace, span = int(found[2], 16), int(found[3], 16)
    return (trace, span, int(found[4], 16)) if trace and span else None


def _maker(resource: Any) -> Any:
    """What makes a finished span. Spans of the SDK's tracer, which are begun and ended, cost ten times as much."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    scope, flags = InstrumentationScope("tertulia", __version__), TraceFlags(SAMPLED)
    fine, failed = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
    bits = random.SystemRandom().getrandbits

    def make(
        name: str, parent: tuple[int, int, int] | None, attributes: dict[str, Any], start: int, end: int, broken: bool
    ) -> ReadableSpan:
        above = SpanContext(parent[0], parent[1], True, TraceFlags(parent[2])) if parent else None
        context = SpanContext(above.trace_id if above else bits(128) or 1, bits(64) or 1, False, flags)
        return ReadableSpan(
            name, context=context, parent=above, resource=resource, attributes=attributes, kind=SpanKind.CLIENT,
            status=failed if broken else fine, start_time=start, end_time=end, instrumentation_scope=scope,
        )  # fmt: skip

    return make


def _server(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    provider = next((name for end, name in PROVIDERS if host.endswith(end)), "openai")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {"gen_ai.provider.name": provider, "server.address": host, "server.port": port}


def _asked(call: Call) -> dict[str, Any]:
    asked = call.shape
    said: dict[str, Any] = {
        "gen_ai.operation.name": OPERATIONS.get(call.task.name, call.task.name),
        "tertulia.request.id": call.id,
    }
    if call.model:
        said["gen_ai.request.model"] = call.model
    if call.stream:
        said["gen_ai.request.stream"] = True
    for name, attribute in PARAMETERS:
        value = getattr(asked, name, None)
        if value is not None:
            said[attribute] = value
    choices = getattr(asked, "n", None)
    if choices is not None and choices != 1:
        said["gen_ai.request.choice.count"] = choices
    if call.principal.key_id:
        said["tertulia.key.id"] = call.principal.key_id
        said["tertulia.project.id"] = call.principal.project
    return said


def _answered(call: Call, outcome: str) -> dict[str, Any]:
    reply = call.reply
    said: dict[str, Any] = {"tertulia.outcome": outcome}
    if call.target is not None:
        said["gen_ai.response.model"] = call.target.model
    if reply.status:
        said["http.response.status_code"] = reply.status
    if call.attempts > 1:
        said["tertulia.attempts"] = call.attempts
    if call.cache:
        said["tertulia.cache"] = call.cache
    if reply.usage is not None:
        said |= _used(reply.usage)
    if reply.error is not None:
        said["error.type"] = reply.error.code or str(reply.status or type(reply.error).__name__)
    elif outcome in (FAILED, DEADLINE, CLIENT_LEFT, STOPPED):
        said["error.type"] = outcome
    return said


def _used(usage: Usage) -> dict[str, int]:
    said = {"gen_ai.usage.input_tokens": usage.prompt_tokens, "gen_ai.usage.output_tokens": usage.completion_tokens}
    if usage.cached_tokens:
        said["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    if usage.reasoning_tokens:
        said["gen_ai.usage.reasoning.output_tokens"] = usage.reasoning_tokens
    return said
