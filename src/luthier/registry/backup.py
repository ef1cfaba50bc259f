"""Backup and restore: the database first, then the blobs that it names.

Blobs are written before the record that names them and deleted after it, so a copy of the blobs that is taken after the
database's snapshot lacks only what was deleted in between; those records are told at the restore.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from sqlalchemy import select

from luthier.errors import RunError
from luthier.store.blobs import Blobs, file_pieces
from luthier.store.database import Database, open_database
from luthier.store.tables import File, Model

DATABASE_FILE = "luthier.db"


def back_up(database: Database, blobs: Blobs, target: Path) -> int:
    """Copy everything into a new folder; returns the number of blobs.

    Raises:
        RunError: for a folder that is not empty, or a database that is not SQLite.
    """
    if not database.is_sqlite:
        raise RunError(
            "this backup is for the embedded SQLite",
            "a SQLite database",
            "use pg_dump, then `luthier backup --blobs-only`",
        )
    _make_empty(target)
    with sqlite3.connect(database.url.removeprefix("sqlite:///")) as source:
        copy = sqlite3.connect(target / DATABASE_FILE)
        with copy:
            source.backup(copy)
        copy.close()
    return _copy_blobs(blobs, target)


def back_up_blobs(blobs: Blobs, target: Path) -> int:
    """Copy every blob into a new folder, once the database has been copied otherwise; returns their number.

    Raises:
        RunError: for a folder that is not empty.
    """
    _make_empty(target)
    return _copy_blobs(blobs, target)


def restore_blobs(source: Path, database: Database, blobs: Blobs) -> int:
    """Put back the blobs of a database that has been restored otherwise; returns their number.

    Raises:
        RunError: when the backup is not there, or lacks what the database names.
    """
    num_files = _put_blobs(source, blobs)
    if num_files == 0:
        raise RunError(f"{source} holds no blobs", "a folder that `luthier backup` wrote")
    _check_whole(database, blobs)
    return num_files


def _make_empty(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise RunError(f"{target} is not empty", "a new folder")
    target.mkdir(parents=True, exist_ok=True)


def _copy_blobs(blobs: Blobs, target: Path) -> int:
    num_files = 0
    for name in blobs.names("tenants"):
        path = target / "blobs" / "tenants" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in blobs.pieces(f"tenants/{name}"):
                file.write(piece)
        num_files += 1
    return num_files


def restore(source: Path, database_url: str, blobs: Blobs) -> None:
    """Put a backup into an empty place.

    Raises:
        RunError: when there is a database already, or the backup is not whole.
    """
    if not database_url.startswith("sqlite:///"):
        raise RunError(
            "a backup is restored into SQLite",
            "no LUTHIER_DATABASE_URL of another kind",
            "use pg_restore, then `luthier restore --blobs-only`",
        )
    path = Path(database_url.removeprefix("sqlite:///"))
    if path.exists():
        raise RunError(
            f"{path} is there already", "a data folder that no service has used", "choose another with --data"
        )
    if not (source / DATABASE_FILE).exists():
        raise RunError(f"{source} holds no backup", f"a folder with {DATABASE_FILE}")
    _put_blobs(source, blobs)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / DATABASE_FILE, path)
    database = open_database(database_url)
    try:
        _check_whole(database, blobs)
    finally:
        database.close()


def _put_blobs(source: Path, blobs: Blobs) -> int:
    root = source / "blobs"
    num_files = 0
    for file in sorted(root.rglob("*")) if root.exists() else []:
        if file.is_file():
            with file.open("rb") as stream:
                blobs.write(file.relative_to(root).as_posix(), file_pieces(stream))
            num_files += 1
    return num_files


def _check_whole(database: Database, blobs: Blobs) -> None:
    with database.reading() as session:
        files = set(session.scalars(select(File.blob)))
        models = set(session.scalars(select(Model.blob)))
    names = {f"tenants/{name}" for name in blobs.names("tenants")}
    lost = sorted(files - names) + sorted(m for m in models if not any(n.startswith(m + "/") for n in names))
    if lost:
        raise RunError(f"the backup lacks {len(lost)} blobs, such as {lost[0]}", "all that the database names")
