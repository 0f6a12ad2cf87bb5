"""The child process of one local model: llama.cpp's own HTTP server on a loopback port, behind a secret.

Started by children.py as `python llama.py` with one JSON line on stdin (never in argv, which every user can read):

    {"name", "path", "kind", "slots", "context", "kv_budget", "threads", "lora", "secret", "parent", "log"}

It answers with one JSON line on stdout, {"port": N, "pool": N} once the model answers, or {"error": "one sentence"} and
exit code 1; then it serves until stdin ends, which is how it notices that its gateway is gone however that died.

It knows llama.cpp and the header of a GGUF file. It knows nothing of the gateway, of calls or of OpenAI's shapes, and
imports nothing but the standard library and, late, xllamacpp: a crash in there is why it is a process of its own.
Prompts do not reach a log: llama.cpp's goes nowhere unless `log` names a file, and cores are not dumped.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CONTEXT_LIMIT = 8192  # tokens per request where nobody says otherwise
PROMPT_BATCH = 256  # tokens of a long prompt that are read before the other slots get their next token
HEADER_LIMIT = 64 << 20  # bytes; no model has a longer one, a corrupt file may claim it
_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value types
_STRING, _ARRAY = 8, 9


class NotAModel(Exception):
    """The file is not a GGUF model, or its header is broken."""


class Plan(NamedTuple):
    """What a model will be given: tokens one request may hold, tokens all requests together may, the bytes these come
    to when full, and whether the requests share them or each slot has its own."""

    context: int
    pool: int
    kv_bytes: int
    shared: bool


def plan(path: Path, slots: int, context: int | None, kv_budget: int) -> Plan:
    """How a model is to be loaded. context None: the model's own, at most 8192 tokens. Raises NotAModel.

    If slots * context tokens fit kv_budget bytes, every slot has its own cache: requests cannot take room from each
    other, and the same seed gives the same text whatever else is being answered. If not, all share a pool of as many
    tokens as fit a quarter of it, but never less than one whole context.
    """
    header = read_header(path)
    context = min(context or CONTEXT_LIMIT, _number(header, "context_length", CONTEXT_LIMIT))
    context = max(256, context // 256 * 256)  # llama.cpp counts in pages of 256
    each, wanted = _cell_bytes(header), slots * context
    if wanted * each <= kv_budget:
        return Plan(context, wanted, wanted * each, False)
    pool = max(context, kv_budget // 4 // each // 256 * 256)
    return Plan(context, pool, pool * each, True)


def _cell_bytes(header: dict[str, Any]) -> int:
    """Bytes of the key-value cache for one token in 16-bit floats; 0 for an encoder, which keeps none."""
    if not _number(header, "attention.causal", 1):
        return 0
    heads = _number(header, "attention.head_count", 1)
    kv_heads = _number(header, "attention.head_count_kv", heads)
    size = _number(header, "embedding_length", 0) // max(1, heads)
    keys, values = (_number(header, f"attention.{what}_length", size) for what in ("key", "value"))
    return 2 * _number(header, "block_count", 0) * kv_heads * (keys + values)


def _number(header: dict[str, Any], name: str, default: int) -> int:
    value = header.get(f"{header['general.architecture']}.{name}", default)
    if isinstance(value, list):  # one for each layer: the largest is a safe estimate
        value = max(value, default=default)
    return int(value)


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file up to its vocabulary, which is long and not needed here. Raises NotAModel, OSError.
    The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with path.open("rb") as file:
        try:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise NotAModel("The file is not a GGUF model.")
            found: dict[str, Any] = {}
            for _ in range(count):
                key = _text(file)
                if key.startswith("tokenizer.") and "general.architecture" in found:
                    break
                found[key] = _value(file, _unpack(file, "I"))
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError):
            raise NotAModel("The file is not a GGUF model, or it is incomplete.") from None
    if "general.architecture" not in found:
        raise NotAModel("The file does not say which architecture its model has.")
    return found


def _unpack(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize(code)))[0]


def _text(file: BinaryIO) -> str:
    size = _unpack(file, "Q")
    if size > HEADER_LIMIT:
        raise NotAModel("The header of the model file is corrupt.")
    return file.read(size).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, size = _unpack(file, "I"), _unpack(file, "Q")
        if size > HEADER_LIMIT:
            raise NotAModel("The header of the model file is corrupt.")
        return [_value(file, inner) for _ in range(size)]
    if kind not in _PLAIN:
        raise NotAModel("The header of the model file is corrupt.")
    return _unpack(file, _PLAIN[kind])


# --- the process ---


def main() -> None:
    """The whole life of the child."""
    line = sys.stdin.buffer.readline()
    if not line:
        return  # the gateway changed its mind
    spec = json.loads(line)
    _die_with(spec["parent"])
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")  # ours alone: llama.cpp may print what it likes on 1 and 2
    log = _redirect(spec["log"])
    try:
        started = _serve(spec)
    except Exception as error:  # whatever went wrong, the gateway is to read one sentence
        answer.write(json.dumps({"error": _explain(error, log)}) + "\n")
        answer.flush()
        os._exit(1)
    os.close(log)
    if spec["log"] is None:
        os.close(_redirect(os.devnull))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # llama.cpp took them; there is nothing to save, so just end
    answer.write(json.dumps(started) + "\n")
    answer.close()
    threading.Event().wait()


def _die_with(parent: int) -> None:
    """Nothing of us outlives the gateway: the end of stdin tells, and on Linux the kernel, even while a model loads."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
        try:  # if the machine runs out of memory, the model is to go, not the gateway
            Path("/proc/self/oom_score_adj").write_text("500")
        except OSError:
            pass
    if os.getppid() != parent:
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold prompts

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _redirect(path: str | None) -> int:
    """Sends what llama.cpp prints to the log file or, while it loads, to memory, from which errors are explained."""
    if path is not None:
        log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    elif hasattr(os, "memfd_create"):
        log = os.memfd_create("log")
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            log = os.dup(file.fileno())
    os.dup2(log, 1)
    os.dup2(log, 2)
    return log


def _serve(spec: dict[str, Any]) -> dict[str, int]:
    """Loads the model and starts the server; returns what the gateway needs to know of it."""
    made = plan(Path(spec["path"]), spec["slots"], spec["context"], spec["kv_budget"])
    import xllamacpp

    global _server  # it stops when it is collected
    _server = xllamacpp.Server(_parameters(xllamacpp, spec, made))
    _release_zeros()
    return {"port": int(_server.listening_address.rpartition(":")[2]), "pool": made.pool}


_server: Any = None


def _release_zeros() -> None:
    """llama.cpp fills its key-value cache with zeros, which makes all of it resident: 1.5 GB for eight slots of the
    default model. Given back to the kernel, such pages read as zeros still and come back one by one as tokens fill
    them. Safe only now, while no request can have come and nothing else writes to these mappings.
    """
    if sys.platform != "linux":
        return
    block, dont_need = 1 << 20, 4
    libc, zeros = ctypes.CDLL(None), ctypes.create_string_buffer(block)
    libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split()
        begin, end = (int(edge, 16) for edge in span.split("-"))
        if rights != "rw-p" or inode != "0" or name or end - begin < 16 * block:
            continue
        for at in range(begin, end - block + 1, block):
            if libc.memcmp(at, zeros, block) == 0:
                libc.madvise(at, block, dont_need)


def _parameters(xllamacpp: Any, spec: dict[str, Any], made: Plan) -> Any:
    """llama.cpp's parameters for one model; what is not named here is as llama-server has it."""
    it = xllamacpp.CommonParams()
    it.model.path, it.model_alias = spec["path"], {spec["name"]}
    it.n_parallel = spec["slots"]
    it.n_ctx, it.kv_unified = made.pool, made.shared
    it.kv_unified_per_slot = made.context if made.shared else 0
    it.ctx_shift = False  # never forget the beginning of a conversation silently
    it.cache_ram_mib = 64  # of prompts whose slot was taken; children.PROGRAM counts it
    it.cpuparams.n_threads = it.cpuparams_batch.n_threads = spec["threads"]
    it.prefill_assistant = False  # an assistant message at the end is a turn, as OpenAI reads it, not a beginning
    it.warmup = False  # the first answer is as fast without, and loading is faster
    it.hostnames, it.port = ["127.0.0.1"], 0
    it.api_keys = [spec["secret"]]
    it.cors_origins, it.cors_credentials = "", False
    it.ui = False
    it.endpoint_slots = it.endpoint_props = True
    it.endpoint_metrics = False
    it.sse_ping_interval = -1  # the gateway is on this machine and needs no comments in the stream
    it.n_threads_http = 2 * spec["slots"] + 64  # a call holds a thread from its first byte to its last
    it.verbosity = 3 if spec["log"] else 2
    if spec["kind"] == "embedding":
        it.embedding = True
        it.n_batch = it.n_ubatch = made.context  # an input must fit one batch
    else:
        it.n_batch = it.n_ubatch = PROMPT_BATCH
    adapters = []
    for path in spec["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        adapters.append(adapter)
    it.lora_adapters = adapters
    return it


_CAUSES = (  # what llama.cpp prints, and the sentence for it
    (r"unknown model architecture: '([^']*)'", "The engine does not support models of the architecture {}."),
    (r"corrupted or incomplete|not within the file bounds|invalid magic|failed to read (?:tensor|key)",
     "The model file is corrupt or incomplete."),
    (r"bad_alloc|[Ff]ailed to allocate|unable to allocate|out of memory|Cannot allocate",
     "There is not enough memory to load the model."),
    (r"failed to (?:load|apply) lora|lora.*(?:fail|mismatch|incorrect)",
     "A LoRA adapter does not fit the model or is corrupt."),
    (r"missing tensor|wrong number of tensors|wrong shape", "The model file lacks parts of the model."),
)  # fmt: skip


def _explain(error: Exception, log: int) -> str:
    """One sentence without a path; the reasons are in what llama.cpp has printed."""
    if isinstance(error, NotAModel):
        return str(error)
    if isinstance(error, OSError):
        return f"The model file cannot be read ({type(error).__name__})."
    if isinstance(error, ImportError):
        return "The engine (the package xllamacpp) is not installed or does not run on this machine."
    size = os.lseek(log, 0, os.SEEK_END)
    os.lseek(log, max(0, size - 65536), os.SEEK_SET)
    text = os.read(log, 65536).decode(errors="replace") + str(error)
    for pattern, sentence in _CAUSES:
        match = re.search(pattern, text)
        if match:
            return sentence.format(*match.groups())
    return "The engine could not load the model; with trace_engine its log says why."


if __name__ == "__main__":
    main()
