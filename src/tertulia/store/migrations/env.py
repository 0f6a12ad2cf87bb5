"""What Alembic runs its versions with: the connection it was given, within the transaction that is already open."""

from __future__ import annotations

from alembic import context

from tertulia.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
