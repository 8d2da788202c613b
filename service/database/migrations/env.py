"""Entry point of Alembic; migrates inside the transaction of `service.database.session.Database.migrate`."""

from __future__ import annotations

from alembic import context

# They define the tables.
from service.database import access_tables, dataset_tables, reuse_tables, supervision_tables, tables  # noqa: F401
from service.database.table import Table

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Table.metadata,
    compare_type=True,
    compare_server_default=True,
    # SQLite can make most changes to a table only by copying it.
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
