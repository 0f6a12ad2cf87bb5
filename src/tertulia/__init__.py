"""Tertulia: the ChatGPT API that you own.

import tertulia
client = tertulia.client()          # an official openai.OpenAI, answered by a server in this process
client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

__version__ = "0.1.0"
__all__ = ["async_client", "client"]


def client(**settings: Any) -> OpenAI:
    """An official OpenAI client wired to a server in the background of this process.

    settings are the server's, as in docs/settings.md (data="...", chat_model="mock", ...). Calls with the same settings
    share one server, which ends with the process. Raises TertuliaError when the server cannot start.
    """
    from .inprocess import shared

    return shared(**settings).client()


def async_client(**settings: Any) -> AsyncOpenAI:
    """The same as client(), asynchronous."""
    from .inprocess import shared

    return shared(**settings).async_client()
