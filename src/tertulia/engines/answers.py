"""What an upstream's answer says: a chunk, a whole answer, or a refusal, read from its bytes into the few fields that
matter. It knows nothing of how they came, nor of what becomes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from math import isfinite
from time import time
from typing import Any
from urllib.parse import quote

import msgspec

from ..errors import EngineFailed, TertuliaError, UpstreamRefused, encode

MONTH = 2_678_400.0  # seconds: no retry-after is longer
OURS = (401, 403, 407)  # statuses that concern our key and not the caller's
# Statuses of errors that come without one, by their type.
TYPES = {"invalid_request_error": 400, "rate_limit_error": 429, "requests": 429, "tokens": 429}
SHORTEST = 8  # characters of what is worth hiding: less is found in any text
HIDDEN = b"[redacted]"
Headers = Sequence[tuple[bytes, bytes]]


class Details(msgspec.Struct):
    cached_tokens: int | None = 0
    cache_write_tokens: int | None = 0
    reasoning_tokens: int | None = 0


class WireUsage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None


class Choice(msgspec.Struct):
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: WireUsage | None = None
    error: Any = None


class Answer(msgspec.Struct):
    usage: WireUsage | None = None
    error: Any = None


class Object(msgspec.Struct):
    error: Any = None


class Listed(msgspec.Struct):
    """A model as an upstream lists it; the two lengths are vLLM's and OpenRouter's."""

    id: str
    max_model_len: int | None = None
    context_length: int | None = None


class List(msgspec.Struct):
    """What GET /models answers."""

    data: list[Listed]


parse_list = msgspec.json.Decoder(List).decode


class Said(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class Refusal(msgspec.Struct):
    error: Any = None
    message: Any = None
    detail: Any = None


parse_chunk = msgspec.json.Decoder(Chunk).decode
parse_answer = msgspec.json.Decoder(Answer).decode
parse_object = msgspec.json.Decoder(Object).decode
_refusal = msgspec.json.Decoder(Refusal).decode


def refusal(status: int, headers: Headers, body: bytes) -> TertuliaError:
    """What an answer with another status than 200 means. What concerns our key, and what is no answer at all, is ours
    to say; everything else passes as it is."""
    after, again = retry_after(headers), _should_retry(headers)
    said = f"The upstream answered with status {status}."
    if 300 <= status < 400:
        return EngineFailed(f"The upstream answered with status {status}; redirects are not followed.")
    if status in OURS or not 400 <= status < 600:
        failed = EngineFailed(said, retry_after=after)
        if status in OURS:
            failed.retry = False  # another target may do, but this one will say the same again
        return failed
    try:
        found = _refusal(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = Refusal()
    if isinstance(found.error, dict):
        refused = UpstreamRefused(status, body, retry=again, retry_after=after)
        refused.code = _text(found.error.get("code"))
        return refused
    if status >= 500 and status != 503:
        return EngineFailed(said, retry_after=after)
    words = next((text for text in (found.error, found.message, found.detail) if isinstance(text, str) and text), said)
    error = UpstreamRefused(status, None, words, retry=again, retry_after=after)
    if status < 500:
        error.type = "invalid_request_error" if status != 429 else "requests"
    return error


def forms(*secrets: str) -> tuple[bytes, ...]:
    """Secrets as an error may have them: as they are, within JSON, and within a URL."""
    found = {
        form: None for secret in secrets if len(secret) >= SHORTEST
        for form in (secret.encode(), encode(secret)[1:-1], quote(secret, safe="").encode())
    }  # fmt: skip
    return tuple(sorted(found, key=len, reverse=True))


def without(body: bytes, secrets: Sequence[bytes]) -> bytes:
    """An error's body without these forms of our secrets, however they are escaped in it."""
    if b"\\" in body:
        try:
            plain = encode(msgspec.json.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            plain = b""
        if any(secret in plain for secret in secrets):
            body = plain
    for secret in secrets:
        body = body.replace(secret, HIDDEN)
    return body


def reported(error: Any) -> TertuliaError:
    """What the `error` inside an answer of status 200 means: the status is the code it has, or that of its type."""
    try:
        said = msgspec.convert(error, Said)
    except msgspec.ValidationError:
        return EngineFailed("The upstream reported an error.")
    code = int(said.code or 0) if str(said.code).isdecimal() else 0
    if not 400 <= code < 600:
        code = TYPES.get(said.type or "", 502)
    if code in OURS:
        return EngineFailed("The upstream reported an error.")
    refused = UpstreamRefused(code, encode({"error": error}), said.message)
    refused.code = _text(said.code)
    return refused


def _text(code: object) -> str | None:
    """An error's code as the log has it; some servers repeat the status there, as a number."""
    return code[:64] if isinstance(code, str) and code.isprintable() else None


def _header(headers: Headers, wanted: bytes) -> str:
    return next((value.decode("latin-1").strip() for name, value in headers if name == wanted), "")


def _should_retry(headers: Headers) -> bool | None:
    return {"true": True, "false": False}.get(_header(headers, b"x-should-retry").lower())


def retry_after(headers: Headers) -> float | None:
    """Seconds, from retry-after-ms, or from retry-after in seconds or as a date; None if neither can be understood."""
    milliseconds, text = _seconds(_header(headers, b"retry-after-ms")), _header(headers, b"retry-after")
    found = milliseconds / 1000 if milliseconds is not None else _seconds(text)
    if found is None:
        try:
            when = parsedate_to_datetime(text)
            found = (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp() - time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(0.0, found), MONTH)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
