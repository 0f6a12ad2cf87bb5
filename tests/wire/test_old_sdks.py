"""Programs written with SDK 1.x and 2.x run against the server, each in an environment of its own (tests/sdks.py)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sdks

PROGRAM = Path(__file__).with_name("old_sdk_program.py")
MODELS = {
    "mock": ("mock", "mock", "mock-embedding"),
    "local": ("gpt-3.5-turbo", "gpt-3.5-turbo-instruct", "text-embedding-ada-002"),
}


@pytest.fixture(scope="session", params=sdks.SDKS)
def old_python(request: pytest.FixtureRequest) -> Path:
    return sdks.python_of(request.param)


@pytest.mark.parametrize("models", MODELS)
def test_programs_of_an_older_sdk_run(old_python: Path, server: Any, models: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI_"))}
    run = subprocess.run(
        [str(old_python), "-I", str(PROGRAM), *MODELS[models]],
        env={**clean, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.api_key},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines, run.stderr
    summary = lines.pop()
    failed = "\n".join(line["check"] + ": " + line["trace"] for line in lines if not line["ok"])
    assert not failed, failed
    assert run.returncode == 0, run.stderr
    major = "1" if "openai1" in str(old_python) else "2"
    assert summary["sdk"].startswith(major + ".") and summary["checks"] == len(lines) >= 20
