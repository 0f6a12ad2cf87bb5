"""The keys themselves: how one is made, hashed, and shown without being told. A key is in the hands of its holder only;
what is kept is a keyed hash.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from ..errors import SettingsError

KEY_LIMIT = 512  # bytes of a key


def make(kind: str, owner_id: str | None) -> str:
    """A new key with 256 random bits; its beginning says what it is for."""
    if kind == "admin":
        return f"sk-admin-{secrets.token_urlsafe(32)}"
    service = owner_id is not None and owner_id.startswith("svc_acct_")
    return f"sk-{'svcacct' if service else 'proj'}-{secrets.token_urlsafe(32)}"


def digest(key: bytes, pepper: bytes) -> bytes:
    """What is kept of a key: 32 bytes that say nothing of it to whoever has not the secret."""
    return hashlib.blake2b(key, key=pepper, digest_size=32).digest()


def fingerprint(pepper: bytes) -> str:
    """Tells one secret from another, and nothing else."""
    return hashlib.blake2b(b"tertulia: which secret is this?", key=pepper, digest_size=16).hexdigest()


def mask(key: str) -> str:
    """First eight and last four characters, the way OpenAI shows a key; short keys show less."""
    if len(key) < 16:
        return key[:2] + "*" * max(0, len(key) - 2)
    return key[:8] + "*" * min(len(key) - 12, 32) + key[-4:]


def checked(key: str | None, name: str) -> str | None:
    """The key, if it is strong enough to be one. Raises SettingsError that names the setting."""
    if key is None:
        return None
    if len(key) < 16 or any(c.isspace() or not c.isprintable() for c in key):
        raise SettingsError(f"{name}: a key needs at least 16 characters and no white space.")
    if len(key.encode()) > KEY_LIMIT:
        raise SettingsError(f"{name}: a key has at most {KEY_LIMIT} bytes.")
    return key


def pepper(path: Path) -> bytes:
    """The secret that hashes are keyed with; made once, readable by the owner only. Raises SettingsError."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        found = _make_pepper(path)
    if len(found) != 32:
        raise SettingsError("The file `secret` in the data directory is damaged: it must hold 32 bytes.")
    return found


def _make_pepper(path: Path) -> bytes:
    made = secrets.token_bytes(32)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.write(file, made)
    os.fsync(file)
    os.close(file)
    try:
        os.link(partial, path)  # fails, rather than replaces, if another process was first
    except FileExistsError:
        made = path.read_bytes()
    os.unlink(partial)
    return made
