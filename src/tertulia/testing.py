"""Pytest fixtures for programs that use the ChatGPT API; pytest finds them once tertulia is installed.

    def test_greeting(tertulia_client):
        answer = tertulia_client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "hi"}])

The server is real and in this process; its data directory is a temporary one; model `mock` answers without any model
file, deterministically. Override the fixture tertulia_settings to change the server's settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from .inprocess import Background


@pytest.fixture(scope="session")
def tertulia_settings() -> dict[str, Any]:
    """Settings of the server; by default every name of OpenAI's is answered by the mock engine."""
    return {"chat_model": "mock", "embedding_model": "mock-embedding"}


@pytest.fixture(scope="session")
def tertulia_server(
    tmp_path_factory: pytest.TempPathFactory, tertulia_settings: dict[str, Any]
) -> Iterator[Background]:
    """A running server with base_url, api_key, client() and async_client(); one for the whole session."""
    from .inprocess import start

    settings = {"data": str(tmp_path_factory.mktemp("tertulia")), **tertulia_settings}
    with start(**settings) as server:
        yield server


@pytest.fixture
def tertulia_client(tertulia_server: Background) -> OpenAI:
    return tertulia_server.client()


@pytest.fixture
def tertulia_async_client(tertulia_server: Background) -> AsyncOpenAI:
    return tertulia_server.async_client()
