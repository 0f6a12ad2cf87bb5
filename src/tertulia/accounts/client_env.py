"""DATA/client.env: how a program on this machine reaches the server, in lines a shell can read. Only its owner can."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def write(data: Path, base_url: str, api_key: str, admin_key: str | None) -> None:
    """Replaces the file whole, or not at all."""
    lines = [f"export OPENAI_BASE_URL={shlex.quote(base_url)}", f"export OPENAI_API_KEY={shlex.quote(api_key)}"]
    if admin_key:
        lines.append(f"export OPENAI_ADMIN_KEY={shlex.quote(admin_key)}")
    partial = data / f"client.env.{os.getpid()}"
    file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, data / "client.env")


def read(data: Path) -> dict[str, str]:
    """OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_ADMIN_KEY as far as they are there."""
    try:
        text = (data / "client.env").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = {}
    for line in text.splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        if name.startswith("OPENAI_"):
            try:
                found[name] = "".join(shlex.split(value))
            except ValueError:  # a quote that does not close: somebody edited the file
                continue
    return found
