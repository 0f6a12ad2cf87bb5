"""Loading, sharing, unloading and describing children, on the real engine with the real small model."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tertulia.config import LocalModel, Settings
from tertulia.core import ModelCard
from tertulia.engines import llama
from tertulia.engines.children import Children
from tertulia.engines.connection import Pool
from tertulia.errors import EngineFailed, Overloaded, TertuliaError


def card(id: str = "small") -> ModelCard:
    return ModelCard(id=id, kind="chat", source="file:")


def play(part: Callable[[Children], Awaitable[None]], path: Path | None, **settings: object) -> None:
    """Runs part with a Children of its own on the loop the server uses, and leaves no process behind."""

    async def whole() -> None:
        children = Children(Settings(**{"threads": 1, "parallel": 2, **settings}), lambda id: path)  # type: ignore[arg-type]
        try:
            await part(children)
        finally:
            pids = [child.process.pid for child in children.loaded()]
            await children.close()
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    uvloop.run(whole())


def test_callers_share_one_load_and_the_child_describes_itself(model: Path) -> None:
    async def part(children: Children) -> None:
        child, same = await asyncio.gather(children.running(card()), children.running(card()))
        assert child is same and children.loaded() == [child]
        assert await children.running(card()) is child
        assert (child.slots, child.context_length, child.template_knows_tools) == (2, 8192, False)
        assert 50e6 < child.resident_bytes < 600e6
        with child:
            assert child.in_use == 1
        assert child.in_use == 0
        arguments = Path(f"/proc/{child.process.pid}/cmdline").read_bytes()
        assert child.headers.split()[2] not in arguments and b"small" not in arguments
        assert os.getsid(child.process.pid) == child.process.pid

    play(part, model)


def test_the_engine_answers_only_with_its_secret(model: Path) -> None:
    async def part(children: Children) -> None:
        child = await children.running(card())
        body = b'{"prompt":"a","max_tokens":1}'
        for headers, status in ((child.headers, 200), (b"", 401), (b"authorization: Bearer x\r\n", 401)):
            for method, path, sent in (("GET", "/slots", b""), ("POST", "/v1/completions", body)):
                assert (await child.pool.fetch(method, path, headers, sent))[0] == status
        assert (
            b"/" not in json.loads((await child.pool.fetch("GET", "/props", child.headers))[1])["model_alias"].encode()
        )

    play(part, model)


def test_context_and_slots_can_be_chosen_for_a_model(model: Path) -> None:
    async def part(children: Children) -> None:
        child = await children.running(card(), LocalModel(context_length=512, parallel=3))
        assert (child.slots, child.context_length, child.pool_tokens) == (3, 512, 1536)

    play(part, model)


def test_the_least_recently_used_idle_model_makes_room(model: Path) -> None:
    """Each claims 282 MB: 98 of weights, 24 of cache, 160 of program."""

    async def part(children: Children) -> None:
        first = await children.running(card("first"))
        second = await children.running(card("second"))
        await children.running(card("first"))
        third = await children.running(card("third"))
        assert children.loaded() == [first, third] and second.process.returncode is not None
        with third, first:
            with pytest.raises(Overloaded) as full:
                await children.running(card("fourth"))
            assert full.value.retry_after and children.loaded() == [first, third]
        await children.running(card("fourth"))
        assert first.process.returncode is not None and third.alive

    play(part, model, memory_budget=600, context_length=512)


def test_a_model_over_the_whole_budget_is_refused_with_both_numbers(model: Path) -> None:
    async def part(children: Children) -> None:
        with pytest.raises(EngineFailed, match=r"about 4\d\d MB .* memory_budget, 250 MB") as refused:
            await children.running(card())
        assert refused.value.retry is False and children.loaded() == []

    play(part, model, memory_budget=250)


def test_unload_and_load_again(model: Path) -> None:
    async def part(children: Children) -> None:
        first = await children.running(card())
        await children.unload("small")
        assert children.loaded() == [] and first.process.returncode is not None
        assert (await children.running(card())).process.pid != first.process.pid

    play(part, model)


def test_closing_while_loading_leaves_nobody_waiting(model: Path) -> None:
    async def part(children: Children) -> None:
        waiting = asyncio.ensure_future(children.running(card()))
        await asyncio.sleep(0.1)
        await children.close()
        with pytest.raises(Overloaded):
            await waiting
        with pytest.raises(Overloaded):
            await children.running(card())

    play(part, model)


def test_a_caller_who_leaves_does_not_end_the_load_of_others(model: Path) -> None:
    async def part(children: Children) -> None:
        leaver = asyncio.ensure_future(children.running(card()))
        stayer = asyncio.ensure_future(children.running(card()))
        await asyncio.sleep(0.05)
        leaver.cancel()
        assert (await stayer).alive and leaver.cancelled()

    play(part, model)


def test_loading_has_a_time_limit(model: Path) -> None:
    async def part(children: Children) -> None:
        with pytest.raises(EngineFailed, match=r"load_timeout, 0\.01 s"):
            await children.running(card())
        assert children.loaded() == []

    play(part, model, load_timeout=0.01)


def test_children_work_on_a_loop_in_another_thread(model: Path) -> None:
    seen: list[int] = []

    async def part(children: Children) -> None:
        seen.append((await children.running(card())).slots)

    thread = threading.Thread(target=play, args=(part, model))
    thread.start()
    thread.join(60)
    assert seen == [2]


def test_health_and_slots_answer_while_64_calls_wait(model: Path) -> None:
    async def part(children: Children) -> None:
        child = await children.running(card())
        body = b'{"prompt":"Once","max_tokens":6000,"ignore_eos":true}'
        calls = [
            asyncio.ensure_future(child.pool.fetch("POST", "/v1/completions", child.headers, body, 60))
            for _ in range(66)
        ]
        outside = Pool(f"http://127.0.0.1:{child.pool.port}")
        busy = 0
        for _ in range(100):
            await asyncio.sleep(0.05)
            began = time.monotonic()
            assert (await outside.fetch("GET", "/health"))[0] == 200
            _, said = await outside.fetch("GET", "/slots", child.headers)
            took = time.monotonic() - began
            busy = sum(slot["is_processing"] for slot in json.loads(said))
            if child.pool.open_connections == 66 and busy == 2:
                break
        outside.close()
        assert busy == 2 and child.pool.open_connections == 66 and took < 2
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    play(part, model)


def test_the_same_seed_gives_the_same_text_whatever_else_is_answered(model: Path) -> None:
    async def part(children: Children) -> None:
        child = await children.running(card())

        async def ask(text: str, seed: int, tokens: int = 30) -> str:
            body = {"prompt": text, "seed": seed, "max_tokens": tokens, "temperature": 1.0, "cache_prompt": False}
            _, said = await child.pool.fetch(
                "POST", "/v1/completions", child.headers, json.dumps(body).encode(), timeout=60
            )
            return str(json.loads(said)["choices"][0]["text"])

        alone = await ask("The sea", 42)
        assert alone != await ask("The sea", 43)
        together = await asyncio.gather(
            *(ask("The sea", 42) for _ in range(3)), *(ask(f"Dragons {n}", n, 20 + n) for n in range(6))
        )
        assert together[:3] == [alone] * 3 and await ask("The sea", 42) == alone

    play(part, model, parallel=4)


def test_memory_is_used_as_tokens_fill_it(model: Path) -> None:
    """Eight slots of 8,192 tokens come to 1.5 GB when full and must not cost that before."""

    async def part(children: Children) -> None:
        child = await children.running(card())
        assert child.pool_tokens == 8 * 8192
        body = json.dumps({"prompt": "sea " * 800, "max_tokens": 1}).encode()
        before = child.resident_bytes
        assert before < 300e6
        assert (await child.pool.fetch("POST", "/v1/completions", child.headers, body, 100))[0] == 200
        assert 10e6 < child.resident_bytes - before < 150e6

    play(part, model, parallel=8)


# --- without the engine ---


def gguf(path: Path, **values: int | list[int]) -> Path:
    """A header of a model of the architecture `toy`, with nothing behind it."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("toy")]
    for name, value in values.items():
        key = text("toy." + name.replace("__", "."))
        if isinstance(value, list):
            pairs.append(key + struct.pack(f"<IIQ{len(value)}I", 9, 4, len(value), *value))
        else:
            pairs.append(key + struct.pack("<II", 4, value))
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + b"".join(pairs))
    return path


SHAPE = {"block_count": 10, "embedding_length": 64, "attention__head_count": 4, "context_length": 4096}


def test_every_slot_has_its_own_cache_when_memory_allows(tmp_path: Path) -> None:
    made = llama.plan(gguf(tmp_path / "m", **SHAPE), 4, 1000, 1 << 40)
    assert made == (768, 3072, 3072 * 2 * 10 * 4 * 32, False)  # whole pages of 256 tokens


def test_else_they_share_what_fits_but_one_whole_context(tmp_path: Path) -> None:
    cell = 2 * 10 * 4 * 32
    path = gguf(tmp_path / "m", **SHAPE)
    assert llama.plan(path, 8, None, 4 * 6000 * cell) == (4096, 5888, 5888 * cell, True)
    assert llama.plan(path, 8, None, 100 * cell) == (4096, 4096, 4096 * cell, True)  # the model's own context
    assert llama.plan(path, 8, 99999, 100 * cell).context == 4096


def test_heads_may_differ_by_layer_and_an_encoder_has_no_cache(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m", **SHAPE, attention__head_count_kv=[0, 2, 1])
    assert llama.plan(path, 1, 256, 1 << 40).kv_bytes == 256 * 2 * 10 * 2 * 32
    path = gguf(tmp_path / "m", **SHAPE, attention__causal=0)
    assert llama.plan(path, 8, 256, 0) == (256, 2048, 0, False)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello, I am a text file and quite long", b"GGUF" + b"\xff" * 400])
def test_what_is_no_model_is_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)

    async def part(children: Children) -> None:
        with pytest.raises(TertuliaError) as refused:
            await children.running(card())
        assert "GGUF" in refused.value.message and str(tmp_path) not in refused.value.message

    play(part, path)


def test_a_header_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = gguf(tmp_path / "m", **SHAPE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(llama.NotAModel):
            llama.read_header(tmp_path / "cut")


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    async def part(children: Children) -> None:
        with pytest.raises(EngineFailed, match=r"not on this machine|cannot be read"):
            await children.running(card())

    play(part, None)
    play(part, tmp_path / "gone.gguf")
