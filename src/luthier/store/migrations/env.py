"""Alembic's entry: runs the steps on the connection that `luthier.store.migrate` hands over."""

from alembic import context

from luthier.store.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, transaction_per_migration=False
)
context.run_migrations()
