"""A record on each kind of database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from records import Record

from luthier.store.blobs import Blobs
from luthier.store.database import open_database


@pytest.fixture
def record(database_url: str, tmp_path: Path) -> Iterator[Record]:
    database = open_database(database_url)
    yield Record(database, Blobs(str(tmp_path / "blobs")))
    database.close()
