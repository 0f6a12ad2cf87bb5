"""A body whose long texts are cut short before it is decoded: nothing that decode() refuses is taken, and nothing but
the ends of long texts is lost. The extension is built here, by the compiler that `make compiled` uses."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tertulia.api.decode as decoding
from tertulia.api.chat import Chat
from tertulia.api.decode import decode, skim
from tertulia.call import Call
from tertulia.errors import BadRequest

SOURCE = Path(decoding.__file__).with_name("_outline.c")
KEPT = 2048
TEXTS = msgspec.json.Decoder(list[str])
CHAT = msgspec.json.Decoder(Chat)
Outline = Callable[[bytes], bytes | None]

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or platform.machine() != "x86_64", reason="only x86-64 has it, where there is a compiler"
)


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    built = tmp_path_factory.mktemp("outline") / "_outline.so"
    include = sysconfig.get_path("include")
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", SOURCE, "-o", built], check=True
    )
    spec = importlib.util.spec_from_file_location("_outline", built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Outline = module.outline
    return found


def strings(body: bytes) -> list[str] | None:
    try:
        return TEXTS.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


FINE = [
    b"a", b" ", b"x" * 70, b"y" * 31, b"\\n", b'\\"', b"\\\\", b"\\/", b"\\u00e9", b"\\uD7ff", "é".encode(),
    "日".encode(), "😀".encode(), b"\x7f",
]  # fmt: skip
WRONG = [
    b"\x00", b"\x1f", b"\n", b"\x80", b"\xc3", b"\xc0\xaf", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80",
    b"\xf4\x90\x80\x80", b"\xf5", b"\\x", b"\\u12g4", b"\\u12", b"\\ud800", b"\\udc00", b"\\", b'"',
]  # fmt: skip
text = st.builds(
    lambda parts, times: b"".join(parts) * times, st.lists(st.sampled_from(FINE), max_size=12), st.integers(0, 300)
)
spoilt = st.builds(
    lambda before, wrong, after: before + wrong + after, text, st.sampled_from(WRONG), st.one_of(text, st.just(b""))
)


@given(st.lists(st.one_of(text, text, text, spoilt), min_size=1, max_size=4), st.integers(0, 200))
def test_it_is_the_same_list_but_for_the_ends_of_long_texts(outline: Outline, texts: list[bytes], cut: int) -> None:
    body = b"[" + b",".join(b'"' + one + b'"' for one in texts) + b"]"
    body = body[: len(body) - cut] if cut < 20 else body
    short, whole = outline(body), strings(body)
    if short is None:
        return
    found = strings(short)
    assert (found is None) == (whole is None)
    for before, after in zip(whole or [], found or [], strict=True):
        assert before.startswith(after)
        assert before == after or len(after.encode()) * 6 >= KEPT  # six bytes write one character, at most


@pytest.mark.parametrize("one", [one for one in FINE if one != b"\\uD7ff"])
def test_long_texts_are_cut(outline: Outline, one: bytes) -> None:
    for size in (KEPT + 200, 65_536):
        body = b'["' + one * (size // len(one)) + b'"]'
        short = outline(body)
        assert short is not None and len(short) <= KEPT + 100, size


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("at", [0, 10, KEPT + 1, 5_000, 9_999])
def test_what_is_wrong_in_a_text_is_never_cut_out(outline: Outline, wrong: bytes, at: int) -> None:
    plain = b"x" * 10_000
    body = b'["' + plain[:at] + wrong + plain[at:] + b'"]'
    short = outline(body)
    assert strings(body) is None
    assert short is None or strings(short) is None


def test_many_short_texts_are_not_worth_it(outline: Outline) -> None:
    assert outline(json.dumps(["short"] * 5_000).encode()) is None


def test_what_is_no_bytes_is_refused(outline: Outline) -> None:
    with pytest.raises(TypeError):
        outline("text")  # type: ignore[arg-type]


@pytest.fixture
def skimming(outline: Outline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "outline", outline)


def body(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "word \n" * 5_000 + "the end"}]
    return json.dumps({"model": "m", "messages": messages, "temperature": 0.5} | fields).encode()


@pytest.mark.usefixtures("skimming")
def test_a_struct_is_skimmed() -> None:
    found, whole = skim(CHAT, body()), decode(CHAT, body())
    assert found is not None and found != whole
    short, long = found.messages[0].content, whole.messages[0].content
    assert (
        isinstance(short, str) and isinstance(long, str) and long.startswith(short) and len(short) < 2_200 < len(long)
    )
    found.messages[0].content = long
    assert found == whole


@pytest.mark.usefixtures("skimming")
@pytest.mark.parametrize("fields", [{"temperature": "hot"}, {"user": "u" * 3_000}, {"model": "m" * 3_000}, {"n": 0}])
def test_what_decode_refuses_is_not_skimmed(fields: dict[str, Any]) -> None:
    assert skim(CHAT, body(**fields)) is None
    with pytest.raises(BadRequest):
        decode(CHAT, body(**fields))
    assert skim(CHAT, body()[:-1]) is None


def test_whoever_wants_a_text_gets_all_of_it() -> None:
    given = body()
    call = Call("req", None, None, given, None, 0)  # type: ignore[arg-type]
    call.shape, call.reread = "short", lambda data: decode(CHAT, data)
    assert call.shape == "short"
    assert call.asked == decode(CHAT, given) and call.shape is call.asked and call.reread is None
    call.asked = "set"
    assert call.shape == "set"


def test_no_text_of_limited_length_is_cut() -> None:
    """or one that is too long would be taken for one that is not"""
    schema = json.dumps(msgspec.json.schema(Chat))
    limits = [int(part.split(",")[0].split("}")[0]) for part in schema.split('"maxLength": ')[1:]]
    assert limits and max(limits) < KEPT
