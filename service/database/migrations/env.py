"""Alembic's entry: migrates inside the transaction it is handed; see `service.database.session.Database.migrate`."""

from __future__ import annotations

from alembic import context

from service.database.tables import Table

connection = context.config.attributes["connection"]
context.configure(
    connection=connection, target_metadata=Table.metadata, compare_type=True, compare_server_default=True,
    # SQLite changes a table by making it anew.
    render_as_batch=connection.dialect.name == "sqlite")
with context.begin_transaction():
    context.run_migrations()
