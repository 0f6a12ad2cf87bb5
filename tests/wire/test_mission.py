"""The code blocks of the text that this project was started from, run verbatim (tests/mission/blocks, byte for byte)
with nothing but OPENAI_BASE_URL and OPENAI_API_KEY set, against a server with a real local model behind gpt-3.5-turbo.

Run here: 01 setup (three ways to give the key), 02 basic, 03 conversation, 04 streaming, 05 function calling, 09 Flask
and 10 FastAPI as real servers in processes of their own, 11 database. Not yet, as what they call does not exist yet:
06 rag (it needs a vector_db), 07 fine_tuning, 08 moderation.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mission import front, play

PLAY = Path(play.__file__)


@pytest.fixture(scope="module")
def module(server: Any) -> Iterator[types.ModuleType]:
    """A notebook in which the setup block has run; the blocks below run in it in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.base_url)
        patch.setenv("OPENAI_API_KEY", server.api_key)
        patch.setattr(openai, "api_key", None)  # restored afterwards: the block sets it
        notebook = play.notebook()
        play.play(play.source("01_setup"), notebook, "01_setup")
        yield notebook


def printed(block: str, module: types.ModuleType) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        play.play(play.source(block), module, block)
    return out.getvalue()


def test_basic_completion(module: types.ModuleType) -> None:
    text = printed("02_basic", module)
    response = module.__dict__["response"]
    assert text.strip() == response.choices[0].message.content.strip() != ""
    assert response.choices[0].finish_reason in ("stop", "length") and response.usage.completion_tokens > 0


def test_conversation(module: types.ModuleType) -> None:
    printed("03_conversation", module)
    chat_with_gpt, messages = module.__dict__["chat_with_gpt"], module.__dict__["messages"]
    answers = [
        chat_with_gpt("My name is Ada. Answer in one short sentence."),
        chat_with_gpt("Say goodbye in one word."),
    ]
    assert all(answers) and [message["role"] for message in messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert [message["content"] for message in messages if message["role"] == "assistant"] == answers


def test_streaming(module: types.ModuleType) -> None:
    assert len(printed("04_streaming", module).split()) > 3


def test_function_calling(module: types.ModuleType) -> None:
    printed("05_function_calling", module)
    choice = module.__dict__["response"].choices[0]
    call = choice.message.function_call  # function_call="auto": the model may answer in words instead
    if call is None:
        assert choice.message.content and choice.finish_reason in ("stop", "length")
    else:
        assert choice.finish_reason == "function_call" and call.name == "get_weather"
        given = json.loads(call.arguments)
        assert isinstance(given["location"], str) and given.get("unit", "celsius") in ("celsius", "fahrenheit")


def ask() -> str:
    asked: Any = [{"role": "user", "content": "Say hello in one word."}]
    answer = openai.chat.completions.create(model="gpt-3.5-turbo", messages=asked, max_tokens=8)
    return answer.choices[0].message.content or ""


def by_method() -> list[str]:
    """The setup block up to the end of each of its three methods."""
    text = play.source("01_setup")
    ends = [text.index("# Method 2"), text.index("# Method 3"), len(text)]
    return [text[:end] for end in ends]


@pytest.fixture
def openai_module(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    monkeypatch.setattr(openai, "api_key", None)


def test_a_key_by_assignment(openai_module: None, server: Any) -> None:
    text = by_method()[0]
    play.play(text, play.notebook())
    assert openai.api_key == "your-api-key"
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided: yo"):
        ask()  # as it stands, it holds a placeholder
    play.play(text.replace("your-api-key", server.api_key), play.notebook())
    assert ask()


def test_a_key_by_environment_variable(openai_module: None, server: Any) -> None:
    play.play(by_method()[1], play.notebook())
    assert openai.api_key == server.api_key
    assert ask()


def test_a_key_by_client(openai_module: None, server: Any) -> None:
    notebook = play.notebook()
    play.play(by_method()[2], notebook)
    client = notebook.__dict__["client"]
    assert client.api_key == server.api_key and str(client.base_url).startswith(server.base_url)
    assert [model.id for model in client.models.list()]


@contextlib.contextmanager
def app(server: Any, *blocks: str, **more: str) -> Iterator[str]:
    """The web application that the blocks make, in a process of its own; its address."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**clean, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.api_key, **more}
    command = [sys.executable, str(PLAY), *blocks]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def post(url: str, body: dict[str, str]) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        assert response.status == 200
        return json.loads(response.read())


def test_flask_app(server: Any) -> None:
    with app(server, "01_setup", "09_flask_app") as url:
        for _ in range(2):
            answer = post(url + "/chat", {"message": "Say hello in one word."})
            assert set(answer) == {"response"} and answer["response"].strip()


def test_fastapi_app(server: Any) -> None:
    with (
        front.openai_address(server.base_url) as address,
        app(server, "01_setup", "10_fastapi_app", **address) as url,
    ):
        for _ in range(2):
            answer = post(url + "/chat", {"message": "Say hello in one word."})
            assert set(answer) == {"response"} and answer["response"].strip()


def test_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = play.notebook()
    play.play(play.source("11_database"), notebook)
    notebook.__dict__["save_conversation"]("ada", "Hello?", "Hello!")
    assert notebook.__dict__["get_user_history"]("ada") == [("Hello?", "Hello!")]
    notebook.__dict__["conn"].close()
