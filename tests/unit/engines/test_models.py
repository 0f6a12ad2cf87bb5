"""What model files say of themselves, how they are made, and what the shelf answers without a network."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tertulia.engines import gguf
from tertulia.engines.catalog import CATALOG, DEFAULT_CHAT, DEFAULT_EMBEDDING, hub_name, is_id, nearest
from tertulia.engines.convert import bert_to_gguf
from tertulia.engines.models import BadModelFile, Bar, Shelf, card_of, pull_all
from tertulia.errors import NotFound

LLAMA = {"general.architecture": "llama", "llama.context_length": 512, "general.license": "mit", "general.name": "Tiny"}


def write(path: Path, metadata: dict[str, Any], data: bytes = bytes(64)) -> Path:
    with path.open("wb") as out:
        gguf.write(out, metadata, [gguf.Tensor("token_embd.weight", [len(data) // 4], gguf.F32, [data])])
    return path


# ---- cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "kind", "dimensions"),
    [
        ({}, "completion", None),
        ({"tokenizer.chat_template": "{{ messages }}"}, "chat", None),
        ({"llama.pooling_type": 1, "llama.embedding_length": 24}, "embedding", 24),
        ({"llama.attention.causal": False, "llama.embedding_length": 24}, "embedding", 24),
    ],
)
def test_a_card_is_read_from_the_file(tmp_path: Path, extra: dict[str, Any], kind: str, dimensions: int | None) -> None:
    path = write(tmp_path / "my-model.gguf", LLAMA | extra)
    card = card_of(path)
    assert (card.id, card.kind, card.dimensions, card.context_length) == ("my-model", kind, dimensions, 512)
    assert (card.licence, card.bytes, card.source) == ("mit", path.stat().st_size, f"file:{path}")
    assert "Tiny" in card.description and ("json_schema" in card.capabilities) == (kind != "embedding")


def test_long_arrays_are_skipped_and_short_ones_kept(tmp_path: Path) -> None:
    arrays = {"long": ["word"] * 1000, "numbers": list(range(1000)), "short": ["a", "b"], "after": 7}
    header = gguf.read_header(write(tmp_path / "m.gguf", LLAMA | arrays))
    assert header.metadata["short"] == ["a", "b"] and header.metadata["after"] == 7
    assert "long" not in header.metadata and "numbers" not in header.metadata


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 60, 150, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "m.gguf", LLAMA)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadModelFile, match=r"not a GGUF file|damaged|cut short"):
        card_of(path)


def test_absurd_counts_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(100))
    with pytest.raises(BadModelFile, match="damaged"):
        card_of(path)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (LLAMA | {"general.type": "adapter"}, "adapter"),
        (LLAMA | {"general.architecture": "clip"}, "projector"),
        ({"general.name": "nothing"}, "without architecture"),
    ],
)
def test_what_is_no_model_by_itself_is_refused(tmp_path: Path, metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(BadModelFile, match=says):
        card_of(write(tmp_path / "m.gguf", metadata))


def test_a_missing_file_and_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="No such file"):
        card_of(tmp_path / "none.gguf")
    path = write(tmp_path / "m.gguf", LLAMA)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + path.read_bytes()[8:])  # big-endian
    with pytest.raises(BadModelFile, match="version"):
        card_of(path)


# ---- conversion -----------------------------------------------------------------------------------------------------


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##lo", "[", "world"]
CONFIG = {
    "model_type": "bert", "num_hidden_layers": 1, "max_position_embeddings": 4, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 2, "layer_norm_eps": 1e-12, "type_vocab_size": 2,
}  # fmt: skip


def safetensors(tensors: dict[str, tuple[list[int], list[float]]]) -> bytes:
    table, data = {}, b""
    for name, (shape, values) in tensors.items():
        start = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    head = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    return struct.pack("<Q", len(head)) + head + data


def convert(weights: bytes, config: dict[str, Any] = CONFIG) -> bytes:
    out = io.BytesIO()
    bert_to_gguf(io.BytesIO(weights), config, VOCABULARY, out, name="tiny", licence="mit")
    return out.getvalue()


def wave(count: int) -> list[float]:
    return [((i * 37) % 101 - 50) / 25 for i in range(count)]


def test_a_bert_becomes_a_gguf_with_the_right_values(tmp_path: Path) -> None:
    weights = safetensors(
        {
            "embeddings.word_embeddings.weight": ([9, 32], wave(288)),
            "pooler.dense.weight": ([32, 32], wave(1024)),  # not needed
            "encoder.layer.0.attention.self.query.weight": ([32, 32], wave(1024)),
            "encoder.layer.0.output.LayerNorm.bias": ([32], wave(32)),
        }
    )
    data = convert(weights)
    assert data == convert(weights)
    (tmp_path / "m.gguf").write_bytes(data)
    header = gguf.read_header(tmp_path / "m.gguf")
    assert header.tensors == 3 and header.size == len(data)
    assert header.metadata["tokenizer.ggml.tokens"] == [*VOCABULARY[:5], "▁hello", "lo", "▁[", "▁world"]
    assert header.metadata["tokenizer.ggml.token_type"] == [3, 2, 3, 3, 3, 1, 1, 1, 1]
    assert header.metadata["tokenizer.ggml.cls_token_id"] == 2 and header.metadata["bert.pooling_type"] == 1
    words, query, bias = 288 * 2, 1024 // 32 * 34, 32 * 4
    body = data[-(words + query + bias) :]  # each is a multiple of the alignment
    assert list(struct.unpack("<288e", body[:words])) == pytest.approx(wave(288), abs=1e-3)
    blocks = [struct.unpack_from("<e32b", body, words + at * 34) for at in range(32)]
    restored = [scale * value for scale, *values in blocks for value in values]
    assert restored == pytest.approx(wave(1024), abs=2 / 127)
    assert list(struct.unpack("<32f", body[-bias:])) == pytest.approx(wave(32))


def test_a_block_of_zeros_stays_zero() -> None:
    data = convert(safetensors({"encoder.layer.0.output.dense.weight": ([1, 32], [0.0] * 32)}))
    assert data[-64:][:34] == bytes(34)


def test_weights_that_are_not_what_they_should_be_are_refused() -> None:
    weights = safetensors({"embeddings.LayerNorm.bias": ([32], wave(32))})
    for spoiled, config in (
        (weights[:-4], CONFIG),
        (weights + b"more", CONFIG),
        (weights.replace(b"F32", b"F64"), CONFIG),
        (weights, CONFIG | {"model_type": "roberta"}),
    ):
        with pytest.raises(ValueError, match=r"cut short|longer|float32|BERT"):
            convert(spoiled, config)


# ---- names and the shelf --------------------------------------------------------------------------------------------


def test_the_catalogue_says_everything() -> None:
    for id, known in CATALOG.items():
        card = known.card
        assert card.id == id and is_id(id) and card.source.startswith("pypi:")
        assert len(known.package_sha256) == len(card.sha256 or "") == 64
        assert card.bytes and card.licence and card.context_length and card.capabilities
    assert CATALOG[DEFAULT_CHAT].card.kind == "chat" and CATALOG[DEFAULT_EMBEDDING].card.dimensions == 384


def test_hub_names_and_ids() -> None:
    name = hub_name("hf:Org/Repo-GGUF/q4/model.Q4_K_M.gguf@main")
    assert (name.repository, name.file, name.revision) == ("Org/Repo-GGUF", "q4/model.Q4_K_M.gguf", "main")
    assert name.id == "Org/Repo-GGUF/q4/model.Q4_K_M@main" and is_id(name.id)
    assert name.source == "hf:Org/Repo-GGUF/q4/model.Q4_K_M.gguf@main"
    assert not any(map(is_id, ["../x", "a/../b", "/etc/x", "a//b", ".x", "", "a\0b", "a/"]))
    assert nearest("smolm2", list(CATALOG)) == " Did you mean `smollm2-135m-instruct`?" and not nearest("zz", ["a"])


def test_an_empty_shelf(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "none")
    assert shelf.installed() == shelf.damaged() == [] and shelf.path(DEFAULT_CHAT) is None
    for name in ("../secret", "a\0b", "x" * 5000):
        assert shelf.path(name) is None
        with pytest.raises(NotFound):
            shelf.remove(name)
    with pytest.raises(NotFound, match="No model is installed"):
        shelf.verify(DEFAULT_CHAT)
    assert not (tmp_path / "none").exists()


def test_an_id_cannot_climb_out_of_the_shelf(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside.gguf", LLAMA)
    (tmp_path / "outside.json").write_text("{}")
    shelf = Shelf(tmp_path / "models")
    assert shelf.path("../outside") is None
    with pytest.raises(NotFound):
        shelf.remove("../outside")
    assert outside.exists() and (tmp_path / "outside.json").exists()


def test_a_file_named_by_its_path_stays_where_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.gguf", LLAMA)
    shelf = Shelf(tmp_path / "models")
    assert shelf.fetch(str(path)) == path and shelf.installed() == []
    with pytest.raises(BadModelFile):
        shelf.fetch(str(tmp_path / "none.gguf"))


def test_removing_suggests_what_was_meant(tmp_path: Path) -> None:
    write(tmp_path / f"{DEFAULT_CHAT}.gguf", LLAMA)  # not what the catalogue says, so it is damaged
    shelf = Shelf(tmp_path)
    assert shelf.damaged() == [DEFAULT_CHAT]
    with pytest.raises(NotFound, match=f"Did you mean `{DEFAULT_CHAT}`"):
        shelf.remove("smollm2-135m")
    shelf.remove(DEFAULT_CHAT)
    assert not list(tmp_path.rglob("*.gguf")) and shelf.damaged() == []


# ---- bars -----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(bar: Bar, steps: Iterable[int]) -> None:
    for done in steps:
        bar("downloading", done, 1000)


def test_a_bar_is_drawn_on_a_terminal_and_lines_elsewhere() -> None:
    terminal, file = Terminal(), io.StringIO()
    told(Bar("tiny", terminal), range(0, 1001))
    assert "\r\x1b[K" in terminal.getvalue() and "100%" in terminal.getvalue() and "\n" not in terminal.getvalue()
    told(Bar("tiny", file), range(0, 1001))
    assert file.getvalue().count("\n") == 11 and file.getvalue().endswith("100% of 0.0 MB\n")


def test_a_failed_pull_leaves_a_whole_line(tmp_path: Path) -> None:
    terminal = Terminal()

    class Breaking(Shelf):
        def fetch(self, name: str, progress: Any = None) -> Path:
            progress("downloading", 5, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_all(["tiny"], Breaking(tmp_path), terminal)
    assert terminal.getvalue().endswith("MB\n")


# ---- the real one ---------------------------------------------------------------------------------------------------


def test_the_default_models_are_what_the_catalogue_says(model_files: Path) -> None:
    shelf = Shelf(model_files)
    for id, known in CATALOG.items():
        path = shelf.path(id)
        assert path is not None and hashlib.sha256(path.read_bytes()).hexdigest() == known.card.sha256
        card = card_of(path)
        assert (card.kind, card.context_length, card.dimensions, card.bytes) == (
            known.card.kind, known.card.context_length, known.card.dimensions, known.card.bytes,
        )  # fmt: skip


def test_a_vocabulary_says_what_steers_the_model(tmp_path: Path) -> None:
    tokens = ["a", "longest", "<|im_end|>", "<think>", "<td>", "x", "<end_of_turn>", "[INST]", "\t"]
    types = [1, 1, 3, 4, 4, 4, 1, 3, 3]
    extra = {"tokenizer.ggml.tokens": tokens * 10, "tokenizer.ggml.token_type": types * 10}
    found = gguf.read_vocabulary(write(tmp_path / "v.gguf", {**LLAMA, **extra}))
    assert found.control == ("<end_of_turn>", "<think>", "<|im_end|>", "[INST]") and found.longest == 13
    assert gguf.read_vocabulary(write(tmp_path / "none.gguf", LLAMA)) == ((), 0)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "v.gguf").read_bytes()[:600])
    with pytest.raises(BadModelFile):
        gguf.read_vocabulary(tmp_path / "cut.gguf")
