"""The database: migrations, one transaction a change, and writers that wait for each other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text

from luthier.errors import StorageError
from luthier.store.database import Database, new_id, now_seconds, open_database
from luthier.store.tables import Table, Tenant


def _tenant(name: str) -> Tenant:
    return Tenant(id=new_id("ten-"), name=name, weight=0.0, created_at=now_seconds())


def test_the_migrations_make_the_tables_of_the_code(database_url: str) -> None:
    database = open_database(database_url)
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    open_database(database_url).close()  # once more does nothing
    database.close()


def test_a_change_is_whole_or_not_at_all(database_url: str) -> None:
    database = open_database(database_url)
    with pytest.raises(ZeroDivisionError), database.writing() as session:  # noqa: PT012
        session.add(_tenant("a"))
        session.flush()
        raise ZeroDivisionError
    with database.reading() as session:
        assert session.scalars(select(Tenant)).all() == []
    database.close()


def test_writers_that_read_first_lose_nothing(database_url: str) -> None:
    database = open_database(database_url)
    with database.writing() as session:
        session.add(_tenant("a"))

    def count() -> None:
        for _ in range(20):
            with database.writing() as session:
                session.scalars(select(Tenant).with_for_update()).one().weight += 1

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert session.scalars(select(Tenant)).one().weight == 160
    database.close()


def test_processes_that_start_together_make_the_tables_once(database_url: str) -> None:
    problems: list[BaseException] = []

    def start() -> None:
        try:
            open_database(database_url).close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_database_of_a_newer_luthier_is_refused(database_url: str) -> None:
    database = open_database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StorageError, match="9999"):
        open_database(database_url)


def test_a_database_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        open_database("postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2")
    broken = Database(f"sqlite:///{tmp_path}/no/such/folder/x.db")
    assert broken.ping() != ""
