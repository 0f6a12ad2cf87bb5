"""Who may come in: organizations, projects and API keys. All keys are in memory, as keyed hashes; a key itself is
shown once, when it is made, and kept nowhere.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, insert, select

from ..core import Principal
from ..errors import Forbidden, SettingsError, Unauthorized
from ..store.database import api_keys, organizations, projects

KEY_LIMIT = 512  # bytes of a key we look at


class Directory:
    """Keys to principals. authenticate is on the hot path: one hash and one dictionary look-up."""

    def __init__(self, database: Engine, data: Path) -> None:
        self._database = database
        self._pepper = _pepper(data / "secret")
        self._keys: dict[bytes, Principal] = {}
        self.version = 0  # rises with every change of who may come in
        self.load()

    def load(self) -> None:
        """Reads every key into memory."""
        with self._database.connect() as connection:
            rows = connection.execute(select(api_keys)).all()
        self._keys = {
            bytes(row.hash): Principal(row.id, row.organization_id, row.project_id or "", row.kind) for row in rows
        }
        self.version += 1

    def __len__(self) -> int:
        return len(self._keys)

    def ids(self) -> set[str]:
        """The ids of the keys there are."""
        return {who.key_id for who in self._keys.values()}

    def authenticate(self, key: bytes) -> Principal:
        """Whose key it is. Raises Unauthorized. Looked up by full keyed hash: timing tells nothing about other keys."""
        who = self._keys.get(self._digest(key[:KEY_LIMIT])) if key else None
        if who is None:
            raise Unauthorized(
                f"Incorrect API key provided: {mask(key.decode('latin-1'))}. You can find your API key at "
                "https://platform.openai.com/account/api-keys.",
                code="invalid_api_key",
            )
        return who

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._pepper, digest_size=32).digest()

    def add_key(self, key: str, kind: str, organization: str, project: str | None, name: str) -> str:
        """Stores a key's hash and lets it in at once; returns its id."""
        return self.add_keys([key], kind, organization, project, name)[0]

    def add_keys(self, keys: list[str], kind: str, organization: str, project: str | None, name: str) -> list[str]:
        """The same for many keys in one transaction."""
        now = int(time.time())
        rows = [self._row(key, kind, organization, project, name, now) for key in keys]
        with self._database.begin() as connection:
            connection.execute(insert(api_keys), rows)
        self._let_in(rows)
        return [row["id"] for row in rows]

    def _row(self, key: str, kind: str, organization: str, project: str | None, name: str, now: int) -> dict[str, Any]:
        return {
            "id": f"key_{secrets.token_hex(12)}", "kind": kind, "organization_id": organization, "project_id": project,
            "name": name, "hash": self._digest(key.encode()), "hint": mask(key), "created_at": now,
        }  # fmt: skip

    def _let_in(self, rows: list[dict[str, Any]]) -> None:
        self.version += 1
        for row in rows:
            self._keys[row["hash"]] = Principal(row["id"], row["organization_id"], row["project_id"] or "", row["kind"])

    def first_start(self, api_key: str | None, admin_key: str | None) -> tuple[str, str] | None:
        """On an empty directory makes an organization, a project, and their two keys: (project key, admin key).

        None if there is an organization already. Raises SettingsError for a given key that is too weak. All or nothing:
        a start that fails or is killed here leaves the directory empty.
        """
        keys = (
            checked(api_key, "api_key") or f"sk-proj-{secrets.token_urlsafe(32)}",
            checked(admin_key, "admin_key") or f"sk-admin-{secrets.token_urlsafe(32)}",
        )
        if keys[0] == keys[1]:
            raise SettingsError("api_key and admin_key must differ.")
        now = int(time.time())
        organization, project = f"org-{secrets.token_hex(12)}", f"proj_{secrets.token_hex(12)}"
        rows = [
            self._row(keys[0], "project", organization, project, "Default key", now),
            self._row(keys[1], "admin", organization, None, "Default admin key", now),
        ]
        with self._database.begin() as connection:
            if connection.execute(select(organizations.c.id)).first() is not None:
                return None
            connection.execute(insert(organizations).values(id=organization, name="Personal", created_at=now))
            connection.execute(
                insert(projects).values(
                    id=project, organization_id=organization, name="Default project", created_at=now
                )
            )
            connection.execute(insert(api_keys), rows)
        self._let_in(rows)
        return keys

    def home(self) -> tuple[str, str]:
        """The organization and project that were made at first start."""
        with self._database.connect() as connection:
            row = connection.execute(
                select(projects.c.organization_id, projects.c.id).order_by(projects.c.created_at)
            ).first()
        assert row is not None
        return row.organization_id, row.id


def check_headers(who: Principal, organization: bytes | None, project: bytes | None) -> None:
    """OpenAI-Organization and OpenAI-Project, if sent, must be those of the key. Raises Unauthorized."""
    if organization and organization.decode("latin-1") != who.organization:
        raise Unauthorized(
            "OpenAI-Organization header should match organization for API key", code="mismatched_organization"
        )
    if project and who.kind == "project" and project.decode("latin-1") != who.project:
        raise Unauthorized("OpenAI-Project header should match project for API key", code="mismatched_project")


def check_kind(who: Principal, kind: str) -> None:
    """Admin keys administer, project keys ask models. Raises Forbidden."""
    if who.kind != kind:
        raise Forbidden(
            "You have insufficient permissions for this operation. "
            f"This endpoint needs {'an admin' if kind == 'admin' else 'a project'} key."
        )


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
    return key


def _pepper(path: Path) -> bytes:
    """The secret that hashes are keyed with; made once, readable by the owner only."""
    try:
        pepper = path.read_bytes()
    except FileNotFoundError:
        pepper = secrets.token_bytes(32)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(file, pepper)
        os.fsync(file)
        os.close(file)
        try:
            os.link(partial, path)  # fails, rather than replaces, if another process was first
        except FileExistsError:
            pepper = path.read_bytes()
        os.unlink(partial)
    if len(pepper) != 32:
        raise SettingsError("The file `secret` in the data directory is damaged: it must hold 32 bytes.")
    return pepper
