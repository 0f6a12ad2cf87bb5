"""Whether a request is too long for every model that could be asked first, before anything is sent.

How many tokens a text is, only its model's tokenizer knows; here is a bound that none of them stays below. Tokenizers
split text at spaces and between letters and signs before they join anything, so each word is a token at least. A word
is up to 32 characters, far more than tokens have, without spaces and ASCII signs but with apostrophes (`don't` is one
token to some); what may be a control token is one word. Pictures, tools, spaces and signs count as nothing. English has
about three words in four tokens: what is refused here could not have fitted by any count.

Words are counted only where the body is larger than text that fits is as a rule. What fits the bound and not the model
is the upstream's to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..core import Call
from ..errors import ContextLengthExceeded

BYTES_PER_TOKEN = 4  # bodies below so many bytes for each token of the context are not looked at
PORTION = 65536  # letters looked at between two looks at the count
_words = re.compile(r"<[\w|]{1,40}>|[^\s!-&(-/:-@\[-`{-~]{1,32}").findall
PARAMS = {"chat": "messages", "completion": "prompt", "embedding": "input"}


def refuse_too_long(call: Call, longest: int) -> None:
    """Raises ContextLengthExceeded if a call cannot fit into so many tokens. After its body was decoded."""
    if len(call.body) <= longest * BYTES_PER_TOKEN:
        return
    asked = call.asked
    if call.task.name == "chat":
        least = _least([text for message in asked.messages for text in _texts(message.content)], longest)
    else:  # of several, each has the context for itself
        given: Any = asked.prompt if call.task.name == "completion" else asked.input
        least = max((_of_one(one, longest) for one in _each(given)), default=0)
    if least > longest:
        param = PARAMS[call.task.name]
        raise ContextLengthExceeded(
            f"This model's maximum context length is {longest} tokens. However, your {param} resulted in at least "
            f"{least} tokens. Please reduce the length of the {param}.",
            param=param,
        )


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        yield from (part.text for part in content or () if part.text)


def _each(given: Any) -> list[Any]:
    """The inputs of a request, each a text or token ids."""
    return given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]


def _of_one(given: Any, limit: int) -> int:
    return len(given) if isinstance(given, list) else _least([given or ""], limit)


def _least(texts: list[str], limit: int) -> int:
    """Tokens that these texts have at least; not counted on when it is more than limit."""
    count = 0
    for text in texts:
        for at in range(0, len(text), PORTION):
            count += len(_words(text, at, at + PORTION))
            if count > limit:
                return count
    return count
