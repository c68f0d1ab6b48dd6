"""How Alembic reaches the database: over the connection it is given. `service.jobs.database.migrate` runs it."""

from __future__ import annotations

from alembic import context

from service.jobs.tables import METADATA


def run() -> None:
    """Run the migrations asked for, in the caller's transaction; batch mode rewrites tables where SQLite cannot alter them."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True, compare_type=True)
    context.run_migrations()


run()
