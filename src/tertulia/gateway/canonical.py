"""When two requests ask for the same: the key of a call. It is a hash over whose call it is (nobody shares across
projects), what kind of call, who answers (the plan's name and revision, not the name that was asked) and the body in a
canonical form: keys sorted, white space and spellings of numbers and characters gone, what cannot change the answer
left out. Text is compared exactly. A body that cannot be brought into that form stands for itself, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from ..core import Call

# Parameters that say nothing about the answer; the model's name is in the plan.
IGNORED = frozenset(
    {
        "model", "user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key",
        "prompt_cache_retention",
    }
)  # fmt: skip
KNOWN_LIMIT = 8192  # bodies whose key is remembered
SEED_LIMIT = 4096  # hashes begun with project, task and plan that are kept
KEY_BYTES = 32


class Keys:
    """Keys of calls. Of a body seen before, byte by byte, the key is known; another is brought into form first."""

    def __init__(self) -> None:
        self._seeds: dict[tuple[str, ...], Any] = {}
        self._known: dict[bytes, bytes] = {}

    def of(self, call: Call, scope: str | None = None) -> bytes:
        """The key among the calls of one project, or of scope, whatever that is."""
        plan, target = call.plan, call.target
        if scope is None:
            scope = call.principal.project
        if plan is not None:
            place = (scope, call.task.name, plan.name, plan.revision)
        else:
            card = target.card  # type: ignore[union-attr]
            place = (scope, call.task.name, target.model, f"{card.source} {card.sha256} {card.sampling}")  # type: ignore[union-attr]
        seed = self._seeds.get(place)
        if seed is None:
            seed = self._seed(place)
        exact = seed.copy()
        exact.update(call.body)
        digest: bytes = exact.digest()
        key = self._known.get(digest)
        if key is None:
            key = self._learn(seed, digest, call.body)
        return key

    def _seed(self, place: tuple[str, ...]) -> Any:
        if len(self._seeds) >= SEED_LIMIT:
            self._seeds.clear()
        head = _encode(place).encode() + b"\n"  # ends where JSON ends: no two places run into each other
        seed = self._seeds[place] = hashlib.blake2b(head, digest_size=KEY_BYTES)
        return seed

    def _learn(self, seed: Any, digest: bytes, body: bytes) -> bytes:
        form = canonical(body)
        if form is None:
            key = digest
        else:
            whole = seed.copy()
            whole.update(b"canonical\n")  # no body that was decoded begins so
            whole.update(form)
            key = whole.digest()
        if len(self._known) >= KNOWN_LIMIT:
            del self._known[next(iter(self._known))]
        self._known[digest] = key
        return key


def canonical(body: bytes) -> bytes | None:
    """The body in canonical form; None if it has none: it is no JSON object that every reader reads alike."""
    try:
        fields = _decode(body.decode())
        if type(fields) is not dict:
            return None
        kept = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
        if fields.get("store") not in (None, False):  # then somebody will look for it, by its metadata
            kept["store"] = fields["store"]
            if fields.get("metadata") is not None:
                kept["metadata"] = fields["metadata"]
        if kept.get("stream") is False:
            del kept["stream"]
        return _encode(kept).encode()
    except (ValueError, RecursionError):  # ValueError: of decoding and encoding, and ours below
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a name that stands twice: one reader takes the first, another the last."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError
    return fields


def _number(text: str) -> int | float:
    """A number by its value: 1.0 and 1e0 are 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number).decode
# Without Infinity: it stands for every number that is too large. ASCII, so that a lone surrogate can be written.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class _Error(msgspec.Struct, gc=False):
    error: msgspec.Raw = msgspec.Raw(b"null")


_error = msgspec.json.Decoder(_Error)


def has_error(data: bytes) -> bool:
    """Whether an answer, or an event of one, tells of an error. Raises DecodeError if it is no JSON object."""
    return bytes(_error.decode(data).error) != b"null"
