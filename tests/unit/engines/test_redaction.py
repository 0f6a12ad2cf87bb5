"""An upstream's error that says our key back reaches nobody with it; another key is sent from the next request on."""

from __future__ import annotations

import json

import msgspec
import pytest

from far import far_side, run, stream, whole
from tertulia import config
from tertulia.engines.answers import forms, without
from tertulia.engines.upstream import Upstream
from tertulia.errors import SettingsError

KEY = 'sk-a+b/"c\\d=e-0123456789'


@pytest.mark.parametrize(
    "body",
    [
        KEY.encode(),
        json.dumps({"error": KEY}).encode(),
        json.dumps({"error": {"message": f"the key {KEY} is bad", KEY: 1}}).encode(),
        json.dumps({"error": KEY}).replace("/", "\\/").replace("s", "\\u0073").encode(),
        b"no such key: sk-a%2Bb%2F%22c%5Cd%3De-0123456789",
        b'{"detail": "Bearer ' + json.dumps(KEY)[1:-1].encode() + b'"}',
    ],
)
def test_a_key_is_found_however_it_is_written(body: bytes) -> None:
    clean = without(body, forms(KEY))
    assert b"[redacted]" in clean and b"0123456789" not in clean
    assert clean.startswith(b"{") == body.startswith(b"{")
    if body.startswith(b"{"):
        msgspec.json.decode(clean)


def test_what_holds_no_key_is_not_touched() -> None:
    body = b'{"error": {"message": "a \\u00fc \\/", "n": 1.50}}'
    assert without(body, forms(KEY)) is body
    assert forms("", "short") == ()  # less than eight letters are found in any text
    assert without(b"short", forms("short")) == b"short"
    assert without(b"\\ no JSON", forms(KEY)) == b"\\ no JSON"


ECHO = b'{"error":{"message":"bad key sk-0123456789","type":"t","param":null,"code":"sk-0123456789"}}'


def test_it_is_gone_from_every_kind_of_error() -> None:
    async def test() -> None:
        async with far_side("sk-0123456789") as side:
            for script, streamed in (
                (whole(ECHO, "400 Bad Request"), False), (whole(ECHO), False), (whole(ECHO, "429 No"), True),
                (stream(b"data: " + ECHO + b"\n\n"), True), (whole(ECHO), True),
                (whole(b'{"detail":"sk-0123456789"}', "404 Not Found"), False),
            ):  # fmt: skip
                side.far.script = script
                reply, _ = await side.ask(stream=streamed)
                assert reply.error is not None and "sk-0123456789" not in f"{reply.error} {reply.error.code}"
                assert b"sk-0123456789" not in reply.error.body() and b"[redacted]" in reply.error.body()

    run(test)


def test_headers_that_hold_secrets_are_hidden_too() -> None:
    given = {"X-Api-Token": "Basic tok-0123456789", "X-From": "env:WHERE", "X-Title": "our lovely chat"}
    known = {**given, "X-From": "ref-0123456789"}
    upstream = Upstream("u", config.Upstream(base_url="http://u/v1", headers=given), "sk-0123456789", {}, known)
    said = b'{"error":{"message":"sk-0123456789 tok-0123456789 ref-0123456789 our lovely chat"}}'
    clean = upstream.refused(400, (), said).body()
    assert clean == b'{"error":{"message":"[redacted] [redacted] [redacted] our lovely chat"}}'
    for hidden in ("sk-0123456789", "tok-0123456789", "ref-0123456789"):
        assert hidden not in repr(upstream)


def test_another_key_from_the_next_request_on() -> None:
    async def test() -> None:
        async with far_side("sk-first-0123456789", models={"far": "theirs", "other": "b"}) as side:
            upstream, told = side.upstream, []
            upstream.on_key_refused = lambda: told.append(True)
            upstream.offer("more")
            await side.ask()
            assert upstream.rekey("sk-second-0123456789", {}) and not upstream.rekey("sk-second-0123456789", {})
            for model in ("far", "other"):
                await side.ask(model=model)
                assert b"authorization: Bearer sk-second-0123456789\r\n" in side.far.requests[-1]
                assert b"sk-first" not in side.far.requests[-1]
            assert side.far.connections == 1 and not told
            assert b"sk-second" in upstream._models["u/more"].heads["chat"]
            with pytest.raises(SettingsError) as refused:
                upstream.rekey("sk-\nthird-0123456789", {})
            assert "third" not in refused.value.message
            side.far.script = whole(b"sk-first-0123456789 sk-second-0123456789", "401 Unauthorized")
            reply, _ = await side.ask()
            assert told and reply.error is not None and b"0123456789" not in reply.error.body()

    run(test)


def test_azure_keys_change_in_every_deployment() -> None:
    settings = config.Upstream(
        base_url="https://far.example", kind="azure", api_version="2024-10-21", models={"a": "one", "b": "two"}
    )
    upstream = Upstream("u", settings, "first", {})
    assert upstream.rekey("second", {})
    for model, deployment in (("a", b"one"), ("b", b"two")):
        request = upstream._models[model].heads["chat"]
        assert b"api-key: second\r\n" in request and b"/openai/deployments/" + deployment + b"/" in request
