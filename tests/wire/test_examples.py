"""Every program in examples/ runs, as its docstring says, against a real server, and says clearly if there is none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import serve, with_models

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = ("chat", "conversation", "streaming", "function_calling", "embeddings_search")
SERVERS = ("flask_app", "fastapi_app")


def environment(server: Any, **more: str) -> dict[str, str]:
    return {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.api_key, **more}


def run(server: Any, example: str, *arguments: str, said: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments]
    return subprocess.run(
        command, input=said, env=environment(server, **more), capture_output=True, text=True, timeout=180
    )


def test_all_examples_are_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROGRAMS, *SERVERS}


def test_chat(server: Any) -> None:
    done = run(server, "chat", "Say hello.")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_conversation(server: Any) -> None:
    done = run(server, "conversation", said="My name is Ada.\nSay goodbye.\n\nnever asked\n")
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr, done.stderr


def test_conversation_forgets_when_it_must(model_files: Path, tmp_path: Path) -> None:
    small = serve(with_models(tmp_path, model_files), "", "--context-length", "256")
    try:
        long = "word " * 90
        done = run(small, "conversation", said=f"{long}\n{long}\n{long * 10}\nSay goodbye.\n")
    finally:
        small.stop()
    assert done.returncode == 0, done.stderr
    forgot, refused = done.stderr.splitlines()[:2]
    assert forgot == "(the oldest turns were forgotten)" and "maximum context length is 256 tokens" in refused


def test_streaming(server: Any) -> None:
    done = run(server, "streaming", "Count to ten.")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert re.search(r"\(\d+ tokens in [\d.]+ s", done.stderr)


def test_function_calling(server: Any) -> None:
    done = run(server, "function_calling")
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    found = re.fullmatch(r"get_weather\((\{.*\})\) = (\{.*\})", first)
    assert found, first
    assert set(json.loads(found[1])) == {"location", "unit"} and json.loads(found[2])


def test_embeddings_search(server: Any) -> None:
    done = run(server, "embeddings_search", "Which animal purrs?")
    assert done.returncode == 0, done.stderr
    cosines = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(cosines) == 5 and cosines == sorted(cosines, reverse=True)
    assert "cat" in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"OPENAI_API_KEY": "sk-wrong-key-000000000000"}, "Incorrect API key"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}, "Is it running"),  # the discard port: nobody listens there
    ],
    ids=["wrong key", "no server"],
)
def test_a_program_says_what_is_wrong(server: Any, wrong: dict[str, str], words: str) -> None:
    with ThreadPoolExecutor(len(PROGRAMS)) as pool:  # most of the time is the SDK trying again
        runs = [pool.submit(run, server, example, said="Hello\n", **wrong) for example in PROGRAMS]
    for example, running in zip(PROGRAMS, runs, strict=True):
        done = running.result()
        assert words in done.stderr and "Traceback" not in done.stderr, (example, done.stderr)
        assert done.returncode == 1 or example == "conversation"


@contextlib.contextmanager
def serving(server: Any, example: str, **more: str) -> Iterator[str]:
    """The address of a web application on a port of the system's choice, read from what it prints."""
    command = [sys.executable, "-u", str(EXAMPLES / f"{example}.py")]
    given = environment(server, PORT="0", **more)
    with subprocess.Popen(command, env=given, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            told = ""
            for line in process.stderr:
                told += line
                if found := re.search(r"[Rr]unning on (http://127\.0\.0\.1:\d+)", line):
                    yield found[1]
                    break
            else:
                raise AssertionError(told)
        finally:
            process.terminate()


def post(url: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("example", SERVERS)
def test_a_web_application_answers(server: Any, example: str) -> None:
    with serving(server, example) as url:
        status, text = post(url + "/chat", {"message": "Say hello."})
        assert status == 200 and json.loads(text)["response"].strip()
        assert post(url + "/chat", {"message": ""})[0] in (400, 422)
        assert post(url + "/chat", {})[0] in (400, 422)
        if example == "fastapi_app":
            status, text = post(url + "/chat/stream", {"message": "Say hello."})
            assert status == 200 and text.strip()


@pytest.mark.parametrize("example", SERVERS)
def test_a_web_application_keeps_our_troubles_to_itself(server: Any, example: str) -> None:
    with serving(server, example, OPENAI_API_KEY="sk-wrong-key-000000000000") as url:
        for path in ("/chat", "/chat/stream")[: 1 + (example == "fastapi_app")]:
            status, text = post(url + path, {"message": "Say hello."})
            assert status == 502 and json.loads(text) == {"error": "The model cannot answer now."}
