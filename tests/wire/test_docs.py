"""Every program in the README and the docs runs, against a real server with the real models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Served, with_models

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(info: str) -> list[pytest.param]:  # type: ignore[valid-type]
    """Every fenced block with just this info string, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{info}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def run(arguments: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=where, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("text", blocks("python"))
def test_a_program_runs_as_it_stands(text: str, server: Served, model_files: Path, tmp_path: Path) -> None:
    """Programs that make a server of their own find the models in a data directory of their own."""
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    done = run(
        ["program.py"], tmp_path, OPENAI_BASE_URL=server.base_url, OPENAI_API_KEY=server.api_key,
        OPENAI_ADMIN_KEY=server.admin_key,
        TERTULIA_DATA=str(with_models(tmp_path / "data", model_files)), HOME=str(tmp_path),
    )  # fmt: skip
    if "print(" in text:
        assert done.stdout.strip()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", blocks("python test"))
def test_a_test_passes_as_it_stands(text: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(text, encoding="utf-8")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], tmp_path, HOME=str(tmp_path))
    assert re.search(r"\d+ passed", done.stdout)


def test_there_are_programs_to_run() -> None:
    assert len(blocks("python")) >= 8 and len(blocks("python test")) >= 3
