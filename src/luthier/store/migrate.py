"""Bringing a database's tables up to date, by Alembic's steps in `migrations/versions/`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from luthier.errors import StorageError
from luthier.store.database import Database

_LOCK = 7_081_952  # any number, the same for all processes


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(database: Database) -> None:
    """Run what has not been run. Processes that start together wait for the first.

    Raises:
        StorageError: for a database of a newer Luthier.
    """
    config = _config()
    script = ScriptDirectory.from_config(config)
    engine = database.engine
    if database.is_sqlite:
        engine = engine.execution_options(luthier_writes=True)
    with engine.begin() as connection:
        if not database.is_sqlite:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        current = MigrationContext.configure(connection).get_current_revision()
        if current == script.get_current_head():
            return
        if current is not None and current not in {step.revision for step in script.walk_revisions()}:
            raise StorageError(
                f"the database is at revision {current}, which this Luthier does not know",
                f"revision {script.get_current_head()} or older",
                "start the Luthier that wrote it, or a newer one",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
