"""How Alembic runs our scripts: on the connection that it is given, within that one's transaction."""

from __future__ import annotations

from alembic import context

from agentfleet.stores.sql.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    compare_type=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
