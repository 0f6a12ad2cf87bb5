"""Older releases of the official SDK, each in a virtual environment of its own under .venvs, made from a lock file with
hashes the first time a test asks for it and again when the lock changes.

To renew a lock: echo 'openai>=1,<2' | uv pip compile - --universal --python-version 3.11 --generate-hashes --no-header
-o tests/locks/openai1.txt
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ENVIRONMENTS = TESTS.parent / ".venvs"
SDKS = ("openai1", "openai2")


def python_of(sdk: str) -> Path:
    """The interpreter of the environment for tests/locks/SDK.txt, made if need be. Raises CalledProcessError."""
    lock = TESTS / "locks" / f"{sdk}.txt"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stamp = hashlib.sha256(version.encode() + lock.read_bytes()).hexdigest()
    home = ENVIRONMENTS / sdk
    python = home / "bin" / "python"
    ENVIRONMENTS.mkdir(exist_ok=True)
    with open(ENVIRONMENTS / f"{sdk}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two test runs at once make it once
        made = home / "made-from"
        if made.exists() and made.read_text() == stamp and python.exists():
            return python
        shutil.rmtree(home, ignore_errors=True)
        run(sys.executable, "-m", "venv", str(home))
        run(
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
            "-r",
            str(lock),
        )
        made.write_text(stamp)  # last, so that an interrupted making is started again
    return python


def run(*command: str) -> None:
    # PYTHONPATH and the like would let packages of the outer environment in
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"
    }
    subprocess.run(command, check=True, env=clean, timeout=600)
