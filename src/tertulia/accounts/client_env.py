"""DATA/client.env: how a program on this machine reaches the server, in lines a shell can read. Only its owner can."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection
from pathlib import Path

KEYS = ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY")


def write(data: Path, base_url: str, api_key: str, admin_key: str | None) -> None:
    """Replaces the file whole, or not at all."""
    lines = [f"export OPENAI_BASE_URL={shlex.quote(base_url)}", f"export OPENAI_API_KEY={shlex.quote(api_key)}"]
    if admin_key:
        lines.append(f"export OPENAI_ADMIN_KEY={shlex.quote(admin_key)}")
    _write(data, lines)


def replace(data: Path, old: Collection[str], new: str) -> None:
    """Puts a new key where the file holds an old one; all other lines stay as they are. Raises OSError."""
    lines = (data / "client.env").read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        name, value = _read(line)
        if name in KEYS and value in old:
            lines[at] = f"export {name}={shlex.quote(new)}"
    _write(data, lines)


def _write(data: Path, lines: list[str]) -> None:
    partial = data / f"client.env.{os.getpid()}"
    try:
        file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, data / "client.env")
    except OSError:  # a full disk: half a file with keys is not left behind
        partial.unlink(missing_ok=True)
        raise


def read(data: Path) -> dict[str, str]:
    """OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_ADMIN_KEY as far as they are there."""
    try:
        text = (data / "client.env").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = {}
    for line in text.splitlines():
        name, value = _read(line)
        if name.startswith("OPENAI_"):
            found[name] = value
    return found


def keys(data: Path) -> list[str]:
    """The keys in it."""
    found = read(data)
    return [found[name] for name in KEYS if name in found]


def _read(line: str) -> tuple[str, str]:
    name, _, value = line.removeprefix("export ").partition("=")
    try:
        return name, "".join(shlex.split(value))
    except ValueError:  # a quote that does not close: somebody edited the file
        return "", ""
