"""One table for whatever is administered: projects become records. Keys get scopes, expiry and an owner; audit log,
ledger and sums come into the database.
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _records()
    _keys()
    _facts()
    _ledger()
    op.execute("UPDATE schema_version SET version = 2")


def _records() -> None:
    records = op.create_table(
        "records",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("parent", sa.String(128), nullable=False),
        sa.Column("natural", sa.String(512)),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("deleted_at", sa.BigInteger),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.UniqueConstraint("kind", "parent", "natural", name="records_natural"),
    )
    op.create_index("records_listed", "records", ["kind", "parent", "created_at", "id"])
    op.create_index("records_revision", "records", ["revision"])
    old = op.get_bind().execute(sa.text("SELECT id, organization_id, name, created_at FROM projects"))
    rows = [
        {
            "id": row.id, "kind": "project", "parent": row.organization_id, "natural": None,
            "created_at": row.created_at, "deleted_at": None, "revision": 1,
            "body": json.dumps({"name": row.name, "archived_at": None}),
        }
        for row in old
    ]  # fmt: skip
    if rows:
        op.bulk_insert(records, rows)
    op.drop_table("projects")


def _keys() -> None:
    with op.batch_alter_table("api_keys") as keys:  # SQLite changes a table by making it again
        keys.alter_column("hint", existing_type=sa.String(32), type_=sa.String(64), existing_nullable=False)
        keys.add_column(sa.Column("owner_id", sa.String(128)))
        keys.add_column(sa.Column("scopes", sa.Text))
        keys.add_column(sa.Column("expires_at", sa.BigInteger))
        keys.add_column(sa.Column("last_used_at", sa.BigInteger))
        keys.add_column(sa.Column("revoked_at", sa.BigInteger))
        keys.add_column(sa.Column("revision", sa.BigInteger, nullable=False, server_default="1"))
    with op.batch_alter_table("api_keys") as keys:
        keys.alter_column("revision", existing_type=sa.BigInteger, existing_nullable=False, server_default=None)
    op.create_index("api_keys_listed", "api_keys", ["project_id", "created_at", "id"])
    op.create_index("api_keys_revision", "api_keys", ["revision"])


def _facts() -> None:
    counters = op.create_table(
        "counters",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counters, [{"name": "directory", "value": 1}])
    op.create_table(
        "facts", sa.Column("name", sa.String(32), primary_key=True), sa.Column("value", sa.Text, nullable=False)
    )
    op.create_table(
        "audit_logs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("organization_id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64)),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("actor_id", sa.String(128)),
        sa.Column("actor_email", sa.String(320)),
        sa.Column("resource_id", sa.String(128)),
        sa.Column("details", sa.Text, nullable=False),
    )
    op.create_index("audit_logs_at", "audit_logs", ["at", "id"])
    op.create_table(
        "alerts_sent",
        sa.Column("alert_id", sa.String(64), primary_key=True),
        sa.Column("period", sa.String(7), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )


def _ledger() -> None:
    op.create_table(
        "writers",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "ledger",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("call", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("task", sa.String(16), nullable=False),
        sa.Column("asked", sa.String(256), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("milliseconds", sa.Integer, nullable=False),
        *_sums(),
        sa.Column("marks", sa.String(128), nullable=False),
        sa.Column("error", sa.String(64)),
    )
    op.create_index("ledger_at", "ledger", ["at"])
    _roll_up("usage_hours", "hour", sa.Column("key_id", sa.String(64), primary_key=True))
    _roll_up("usage_days", "day")


def _roll_up(name: str, span: str, *by: sa.Column[str]) -> None:
    op.create_table(
        name,
        sa.Column(span, sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("project_id", sa.String(64), primary_key=True),
        *by,
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        *_sums(),
        sqlite_with_rowid=False,
    )


def _sums() -> list[sa.Column[int]]:
    names = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "cost")
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]
