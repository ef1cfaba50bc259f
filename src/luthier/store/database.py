"""The database: SQLite on one machine, PostgreSQL where a URL names it; the same statements run on both.

Every change is one `writing()` block: one transaction, committed whole or not at all. SQLite has one writer at a time:
a writing transaction takes the write lock at its beginning and others wait for it, instead of failing half-way for
having read first. PostgreSQL runs at READ COMMITTED; verbs that check and then change lock the rows that they check,
with `locking`, and where they are several in the order of `seq`.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Select, create_engine, event, func, select
from sqlalchemy.engine import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from luthier.errors import StorageError

_ALPHABET = string.ascii_letters + string.digits
BUSY_SECONDS = 30


class Database:
    """Sessions on one database. Safe to share between threads.

    Args:
        url: SQLAlchemy's, as in "sqlite:////data/luthier.db" or "postgresql+psycopg://user@host/name".
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self._engine = _sqlite_engine(url) if self.is_sqlite else _server_engine(url)

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads; what it gives stays readable afterwards.

        Raises:
            StorageError: when the database is locked or gone.
        """
        with Session(self._engine, expire_on_commit=False) as session:
            try:
                yield session
            except OperationalError as error:
                raise StorageError(f"the database does not answer: {error.orig}", fix="try again") from error

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction: committed when the block ends well, rolled back when it does not.

        Raises:
            StorageError: when the database is locked or gone.
        """
        with Session(self._engine, expire_on_commit=False) as session:
            try:
                if self.is_sqlite:
                    session.connection(execution_options={"luthier_writes": True})
                yield session
                session.commit()
            except OperationalError as error:
                session.rollback()
                raise StorageError(f"the database did not take the change: {error.orig}", fix="try again") from error
            except BaseException:
                session.rollback()
                raise

    def ping(self) -> str:
        """Why the database cannot be used, or an empty string."""
        try:
            with self.reading() as session:
                session.execute(select(1))
        except (SQLAlchemyError, StorageError) as error:
            return str(error.__cause__ or error)
        return ""

    def now(self, session: Session) -> float:
        """The time that leases are measured by: the database server's own where there is one."""
        if self.is_sqlite:
            return time.time()
        return float(session.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())

    def forget_log(self) -> None:
        """Empty SQLite's write-ahead log, which still has old pages; a reader in the way leaves it to later."""
        if self.is_sqlite:
            with self._engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
                    "PRAGMA wal_checkpoint(TRUNCATE)"
                )

    def close(self) -> None:
        self._engine.dispose()


def open_database(url: str) -> Database:
    """Open a database and bring its tables up to date. Several processes may do so at once.

    Raises:
        StorageError: when it cannot be reached or was written by a newer Luthier.
    """
    from luthier.store.migrate import upgrade

    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    database = Database(url)
    try:
        upgrade(database)
    except SQLAlchemyError as error:
        raise StorageError(
            f"the database cannot be opened: {error.__cause__ or error}", fix="look at LUTHIER_DATABASE_URL"
        ) from error
    return database


def _sqlite_engine(url: str) -> Engine:
    # A connection a session: SQLite's are cheap, and none is left over for a forked or dying process.
    arguments = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    engine = create_engine(url, poolclass=NullPool, connect_args=arguments, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver would begin transactions of its own, later than we want them
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "secure_delete=ON",  # what is erased is overwritten, not only let go
            f"busy_timeout={BUSY_SECONDS * 1000}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("luthier_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _server_engine(url: str) -> Engine:
    # Parameters hold what tenants sent, which belongs in no log.
    return create_engine(url, pool_size=10, max_overflow=20, pool_pre_ping=True, hide_parameters=True)


Query = TypeVar("Query", bound="Select[Any]")


def locking(query: Query, *, skip_locked: bool = False) -> Query:
    """The query, with its rows locked until the transaction ends.

    Adding a row takes a shared lock on each row that it names. A plain FOR UPDATE waits for those, so that two
    transactions that each add a child and then lock its parent wait for each other. The lock taken here keeps others
    from changing the row, and lets them name it. Where the row is going to be deleted, lock it plainly.
    """
    return query.with_for_update(key_share=True, skip_locked=skip_locked)


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh public id: the prefix and random letters and digits."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def now_seconds() -> int:
    """Whole seconds since 1970, as public records show time."""
    return int(time.time())
