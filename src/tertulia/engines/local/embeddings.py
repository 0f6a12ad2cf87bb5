"""Embeddings by a local model: inputs as text or token ids, in batches of like length; base64 or floats; fewer
dimensions by cutting and normalising again.

Token ids sent under an OpenAI model name are cl100k_base's, as such clients send them; under the model's own name they
are the model's own.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from typing import Any

import msgspec

from ...core import FINISHED, Call, ModelCard, Usage
from ...errors import BadRequest, ContextLengthExceeded
from .control import COUNTED, least_tokens_of_input
from .exchange import Body, Child, Exchange, Request
from .request import extras
from .shapes import encode
from .tables import cl100k

OPENAI_NAMES = ("text-embedding-",)
GROUP = 8  # inputs a request to the child
Item = str | list[int]


class _Datum(msgspec.Struct):
    embedding: str
    index: int


class _Counted(msgspec.Struct):
    prompt_tokens: int


class _Answer(msgspec.Struct):
    data: list[_Datum]
    usage: _Counted


class _Tokens(msgspec.Struct):
    tokens: list[int]


_answer = msgspec.json.Decoder(_Answer).decode
_tokens = msgspec.json.Decoder(_Tokens).decode


def too_long(prompt: int | str, context: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens, however you requested {prompt} tokens ({prompt} in "
        "your prompt; 0 for the completion). Please reduce your prompt; or completion length.",
        param="input",
    )


class EmbeddingAnswer:
    """The answer to one call."""

    def __init__(self, call: Call, card: ModelCard) -> None:
        """Raises BadRequest for what the model cannot do."""
        asked = call.asked
        raw: dict[str, Any] = msgspec.json.decode(call.body)
        for name in set(raw) & {"top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n", "ignore_eos"}:
            raise BadRequest(
                f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter"
            )  # those are for generation
        extras(raw, asked.__struct_fields__)
        self._call, self._card = call, card
        self._dimensions: int | None = asked.dimensions
        if asked.dimensions and card.dimensions and asked.dimensions > card.dimensions:
            raise _too_many(card.dimensions, asked.dimensions)
        given = asked.input
        items: list[Item] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        self._foreign = call.asked.model.startswith(OPENAI_NAMES)
        if self._foreign:
            items = [item if isinstance(item, str) else cl100k().text(item) for item in items]
        self._items = items
        self._floats = asked.encoding_format != "base64"
        self._truncate = bool(asked.truncate)
        self._found: list[bytes] = [b""] * len(items)
        self._used = 0
        call.reply.on_close(self._settle)

    def need(self, child: Child) -> int:
        """Tokens of the child's memory that the call will need: an encoder keeps none from one batch to the next."""
        return 1

    async def run(self, child: Child) -> None:
        exchange = Exchange(self._call, child, "input", too_long)
        if not self._truncate and len(self._call.body) > COUNTED:
            self._refuse_hopeless(child)
        if any(not isinstance(item, str) for item in self._items):
            await self._complete_ids(exchange)
        if self._truncate:
            await self._cut(exchange, child.context_length)
        # like lengths together: a batch takes as long as its longest
        order = sorted(range(len(self._items)), key=lambda at: len(self._items[at]))
        size = max(1, min(GROUP, child.slots))
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        requests = []
        for group in groups:
            body = encode({"input": [self._items[at] for at in group], "encoding_format": "base64"})
            # counted as half the slots, so that two are with the child at a time and it never waits for us
            listener = Body(lambda answer, group=group: self._take(group, answer))  # type: ignore[misc]
            requests.append(Request(b"/v1/embeddings", body, listener, max(1, child.slots // 2)))
        await exchange.run(requests, self._finish)

    def _refuse_hopeless(self, child: Child) -> None:
        for item in self._items:
            least = least_tokens_of_input(item, child) if isinstance(item, str) else len(item)
            if least > child.context_length:
                raise too_long(f"at least {least}", child.context_length)

    async def _complete_ids(self, exchange: Exchange) -> None:
        """The model's own ids, with the tokens around them that it expects (as [CLS] and [SEP])."""
        around = _tokens(await exchange.ask(b"/tokenize", encode({"content": "", "add_special": True}))).tokens
        for at, item in enumerate(self._items):
            if isinstance(item, list) and len(around) == 2 and item[0] != around[0]:
                self._items[at] = [around[0], *item, around[1]]

    async def _cut(self, exchange: Exchange, context: int) -> None:
        """Cuts inputs that are too long, which the caller has asked for; a header says how many were."""
        cut = 0
        for at, item in enumerate(self._items):
            if isinstance(item, str):
                if len(item.encode()) + 2 <= context:
                    continue
                question = {"content": item, "add_special": True}
                item = _tokens(await exchange.ask(b"/tokenize", encode(question))).tokens
            if len(item) > context:
                self._items[at] = [*item[: context - 1], item[-1]]  # the last is the model's end mark
                cut += 1
        if cut:
            self._call.reply.header("x-tertulia-truncated", str(cut))

    def _take(self, group: list[int], answer: bytes) -> None:
        decoded = _answer(answer)
        for datum in decoded.data:
            self._found[group[datum.index]] = datum.embedding.encode()
        self._used += decoded.usage.prompt_tokens

    def _settle(self, outcome: str) -> None:
        if outcome != FINISHED and self._call.reply.usage is None:
            self._call.reply.usage = Usage(self._used)

    def _finish(self) -> None:
        reply = self._call.reply
        pieces = [b'{"object":"list","data":[']
        for index, found in enumerate(self._found):
            pieces.append(b'%s{"object":"embedding","index":%d,"embedding":' % (b"," if index else b"", index))
            pieces.append(self._spelled(found))
            pieces.append(b"}")
        pieces.append(
            b'],"model":%s,"usage":{"prompt_tokens":%d,"total_tokens":%d}}'
            % (encode(self._card.id), self._used, self._used)
        )
        reply.usage = Usage(self._used)
        reply.begin()
        reply.push(b"".join(pieces))
        reply.close(FINISHED)

    def _spelled(self, found: bytes) -> bytes:
        if self._dimensions is None and not self._floats:
            return b'"%s"' % found
        vector = floats(found)
        if self._dimensions is not None:
            vector = shortened(vector, self._dimensions)
        if self._floats:
            return encode(vector.tolist())
        if sys.byteorder == "big":
            vector.byteswap()
        return b'"%s"' % base64.b64encode(vector.tobytes())


def floats(found: bytes) -> array[float]:
    """A vector of float32 from its base64, little-endian."""
    vector = array("f", base64.b64decode(found))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def shortened(vector: array[float], dimensions: int) -> array[float]:
    """The first dimensions of a vector, of length 1 again."""
    if dimensions > len(vector):
        raise _too_many(len(vector), dimensions)
    if dimensions == len(vector):
        return vector
    vector = vector[:dimensions]
    norm = math.sqrt(math.fsum(value * value for value in vector))
    return array("f", (value / norm for value in vector)) if norm else vector


def _too_many(most: int, asked: int) -> BadRequest:
    return BadRequest(
        f"Invalid value for 'dimensions' = {asked}. Must be less than or equal to {most}.",
        param="dimensions",
        code="invalid_value",
    )
