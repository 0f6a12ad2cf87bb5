"""The tables. Money is in integer nano-dollars, time in integer unix seconds, everything that is JSON is text.

What is administered is one table of records, whatever its kind (project, user, role, spend limit, ...): a new kind
needs no new table. Keys have their own, for their hash; so has what grows: audit log, ledger and its sums.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table, Text, UniqueConstraint

metadata = MetaData()

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(256), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

records = Table(
    "records",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("kind", String(32), nullable=False),  # project, service_account, user, project_user, invite, role, ...
    Column("parent", String(128), nullable=False),  # what it belongs to: an organization, project, group, ...
    Column("natural", String(512)),  # what must be unique among its siblings of a kind: an e-mail address, a name
    Column("created_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),  # kept, so that every process learns of it; natural is null then
    Column("revision", BigInteger, nullable=False),  # counters.directory at its last change
    Column("body", Text, nullable=False),  # JSON: what is particular to its kind
    UniqueConstraint("kind", "parent", "natural", name="records_natural"),
    Index("records_listed", "kind", "parent", "created_at", "id"),
    Index("records_revision", "revision"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),  # project or admin
    Column("organization_id", String(64), nullable=False),
    Column("project_id", String(64)),
    Column("owner_id", String(128)),  # the user or service account it belongs to; null: the organization's owner
    Column("name", String(256), nullable=False),
    # keyed BLAKE2b of the key; the key itself is not kept
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("hint", String(64), nullable=False),  # first and last characters, to recognise it by
    Column("scopes", Text),  # JSON list; null: everything its kind may do
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),  # a revoked key stays in the table, so that every process learns of it
    Column("revision", BigInteger, nullable=False),
    Index("api_keys_listed", "project_id", "created_at", "id"),
    Index("api_keys_revision", "revision"),
)

# One row per counter. `directory` rises with every change of records and api_keys, in the same transaction: its row
# lock makes revisions become visible in their order, so who asks for revisions over the last seen one misses none.
counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

facts = Table(  # of the database itself: the fingerprint of the secret its keys are hashed with, for one
    "facts",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Text, nullable=False),
)

audit_logs = Table(
    "audit_logs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("type", String(64), nullable=False),  # `api_key.created`, ...: as OpenAI names them
    Column("organization_id", String(64), nullable=False),
    Column("project_id", String(64)),
    Column("actor", Text, nullable=False),  # JSON, as the API shows it; who and from where
    Column("actor_id", String(128)),
    Column("actor_email", String(320)),
    Column("resource_id", String(128)),
    Column("details", Text, nullable=False),  # JSON, as the API shows it
    Index("audit_logs_at", "at", "id"),
)

writers = Table(  # who keeps a journal, and how much of it is folded into ledger
    "writers",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", String(64), nullable=False, unique=True),  # random, kept in the writer's data directory
    Column("position", BigInteger, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column(
        "id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    ),  # writer and place
    Column("at", BigInteger, nullable=False),  # when it ended
    Column("call", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),  # from 1; 0: no engine was asked
    Column("key_id", String(64), nullable=False),
    Column("project_id", String(64), nullable=False),
    Column("task", String(16), nullable=False),
    Column("asked", String(256), nullable=False),
    Column("model", String(256), nullable=False),
    Column("target", String(128), nullable=False),
    Column("status", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("milliseconds", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
    Column("marks", String(128), nullable=False),  # what was particular: stream, hit, joined, retry=1, estimated, ...
    Column("error", String(64)),
    Index("ledger_at", "at"),
)


# Tertulia 0.1 looks here, and refuses what is over 1; who is asked today is Alembic's own table, alembic_version.
schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))


def _sums(name: str, *by: Column[object]) -> Table:
    return Table(
        name,
        metadata,
        *by,
        Column("kind", String(16), primary_key=True),  # completions, embeddings, ...: a kind of usage, whatever task
        Column("model", String(256), primary_key=True),
        Column("requests", BigInteger, nullable=False),
        Column("prompt_tokens", BigInteger, nullable=False),
        Column("completion_tokens", BigInteger, nullable=False),
        Column("cached_tokens", BigInteger, nullable=False),
        Column("reasoning_tokens", BigInteger, nullable=False),
        Column("cost", BigInteger, nullable=False),
        sqlite_with_rowid=False,  # its rows lie in the order of their key, as they are read
    )


# Sums over the ledger, added to in the transaction that folds. hour and day: when it begins, in unix seconds.
usage_hours = _sums(
    "usage_hours",
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("project_id", String(64), primary_key=True),
    Column("key_id", String(64), primary_key=True),
)
usage_days = _sums(
    "usage_days",
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("project_id", String(64), primary_key=True),
)

alerts_sent = Table(
    "alerts_sent",
    metadata,
    Column("alert_id", String(64), primary_key=True),
    Column("period", String(7), primary_key=True),  # 2026-11
    Column("at", BigInteger, nullable=False),
)
